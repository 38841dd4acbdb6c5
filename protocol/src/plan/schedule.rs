//! Cuts the instructions into rounds, drops what nobody needs, and says when values die.
//!
//! A value's level is the largest level of its operands, plus one if it is opened. All openings of a
//! level travel together. Openings whose source is there from the start (weights, images) are
//! placed as late as their readers allow without adding a round, so that they do not all live from
//! round 0; dealt values are made where they are first read.

use super::{Class, Instr, Plan, PlanBuilder, Round, VId};
use crate::program::Program;

pub(super) fn schedule(builder: PlanBuilder, program: &Program) -> Plan {
    let PlanBuilder {
        ring_bits,
        profile,
        slots,
        instrs,
        outputs,
        ..
    } = builder;
    let kept: Vec<VId> = outputs
        .iter()
        .flat_map(|output| {
            let masked = output.masked.iter().flat_map(|(open, mask)| [*open, *mask]);
            std::iter::once(output.share).chain(masked)
        })
        .collect();
    let instrs = live(instrs, &kept, slots.len());
    let (at, rounds) = levels(&instrs, &kept, slots.len());

    let mut cut: Vec<Round> = (0..=rounds).map(|_| Round::default()).collect();
    for (instr, level) in instrs.into_iter().zip(at) {
        match instr {
            Instr::Open { .. } => cut[level - 1].opens.push(instr),
            instr => cut[level].work.push((instr, Vec::new())),
        }
    }
    frees(&mut cut, &kept, slots.len());
    Plan {
        ring_bits,
        profile,
        slots,
        rounds: cut,
        outputs,
        scopes: program.scopes.clone(),
    }
}

/// Drops instructions whose results nobody reads. Inputs and carried state stay: they are the
/// program's interface.
fn live(instrs: Vec<Instr>, kept: &[VId], slots: usize) -> Vec<Instr> {
    let mut needed = vec![false; slots];
    for id in kept {
        needed[id.index()] = true;
    }
    let mut keep = vec![false; instrs.len()];
    for (i, instr) in instrs.iter().enumerate().rev() {
        let source = matches!(
            instr,
            Instr::Input { .. } | Instr::Carried { .. } | Instr::CarriedMasked { .. }
        );
        if source || instr.outs().iter().any(|out| needed[out.index()]) {
            keep[i] = true;
            for id in instr.ins() {
                needed[id.index()] = true;
            }
        }
    }
    instrs
        .into_iter()
        .zip(keep)
        .filter_map(|(instr, keep)| keep.then_some(instr))
        .collect()
}

/// The level of every instruction (an opening's result is at its level), and the number of rounds.
fn levels(instrs: &[Instr], kept: &[VId], slots: usize) -> (Vec<usize>, usize) {
    let mut value = vec![0usize; slots];
    let mut at = vec![0usize; instrs.len()];
    let level_of = |instr: &Instr, value: &[usize]| {
        let base = instr
            .ins()
            .iter()
            .map(|id| value[id.index()])
            .max()
            .unwrap_or(0);
        base + usize::from(matches!(instr, Instr::Open { .. }))
    };
    let assign = |at: &mut Vec<usize>, value: &mut Vec<usize>, late: &[Option<usize>]| {
        for (i, instr) in instrs.iter().enumerate() {
            at[i] = level_of(instr, value).max(late[i].unwrap_or(0));
            for out in instr.outs() {
                value[out.index()] = at[i];
            }
        }
    };
    assign(&mut at, &mut value, &vec![None; instrs.len()]);
    let rounds = value.iter().copied().max().unwrap_or(0);

    // Latest level of every value that delays nobody.
    let mut latest = vec![rounds; slots];
    for (instr, level) in instrs.iter().zip(&at).rev() {
        let own = instr
            .outs()
            .iter()
            .map(|out| latest[out.index()])
            .min()
            .unwrap_or(rounds);
        // Only openings from level 0 move; everything else stays where it is as soon as it can be.
        let fixed = match instr {
            Instr::Open { .. } if *level == 1 => own,
            Instr::Rand { .. } | Instr::Deal { .. } | Instr::Derive { .. } => own,
            _ => own.min(*level),
        };
        for id in instr.ins() {
            let before = if matches!(instr, Instr::Open { .. }) {
                fixed.saturating_sub(1)
            } else {
                fixed
            };
            latest[id.index()] = latest[id.index()].min(before);
        }
        for out in instr.outs() {
            latest[out.index()] = fixed;
        }
    }
    for id in kept {
        latest[id.index()] = latest[id.index()].min(rounds);
    }
    let late: Vec<Option<usize>> = instrs
        .iter()
        .zip(&at)
        .map(|(instr, level)| match instr {
            Instr::Open { out, .. } if *level == 1 => Some(latest[out.index()]),
            Instr::Rand { out } | Instr::Deal { out, .. } | Instr::Derive { out, .. } => {
                Some(latest[out.index()])
            }
            _ => None,
        })
        .collect();
    assign(&mut at, &mut value, &late);
    (at, rounds)
}

/// Marks where each value is read for the last time. The dealer follows the same marks: a dealt
/// value may be read by the dealer and by the parties, so the later reader counts.
fn frees(rounds: &mut [Round], kept: &[VId], slots: usize) {
    let mut seen = vec![false; slots];
    for id in kept {
        seen[id.index()] = true;
    }
    for round in rounds.iter_mut().rev() {
        let mut free = Vec::new();
        for open in &round.opens {
            for id in open.outs().into_iter().chain(open.ins()) {
                if !std::mem::replace(&mut seen[id.index()], true) {
                    free.push(id);
                }
            }
        }
        round.free = free;
        for (instr, free) in round.work.iter_mut().rev() {
            for id in instr.outs().into_iter().chain(instr.ins()) {
                if !std::mem::replace(&mut seen[id.index()], true) {
                    free.push(id);
                }
            }
        }
    }
}

impl Plan {
    /// Whether the dealer has this value.
    pub(crate) fn dealer_has(&self, id: VId) -> bool {
        matches!(self.slot(id).class, Class::Dealt | Class::Known)
    }
}
