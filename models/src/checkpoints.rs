//! After which steps of a schedule the carried state is kept, so that the job can be taken up again
//! there in another session.
//!
//! Openings under masks live and die with their session. A schedule can be taken up only where no
//! later step reads one that an earlier step made: inside an evaluation it cannot.

use std::collections::BTreeSet;

use trefoil_protocol::program::{Op, Program, Sink};

use crate::schedule::{Phase, Schedule};

/// Openings that a program reads, and those that it makes.
fn openings(program: &Program) -> (BTreeSet<&str>, BTreeSet<&str>) {
    let read = program.nodes.iter().filter_map(|node| match &node.op {
        Op::CarriedMasked(name) => Some(name.as_str()),
        _ => None,
    });
    let made = program.outputs.iter();
    let made = made.filter(|output| output.sink == Sink::CarryMasked);
    (
        read.collect(),
        made.map(|output| output.name.as_str()).collect(),
    )
}

impl Schedule {
    /// Numbers of the steps before which the carried state is kept: after every `every` training
    /// steps of an epoch, after its last one, and after its evaluation and validation. None where `every` is 0, none
    /// at the beginning and none at the end.
    pub fn checkpoints(&self, every: u64) -> BTreeSet<usize> {
        let mut kept = BTreeSet::new();
        if every == 0 {
            return kept;
        }
        let programs: Vec<_> = self.programs.iter().map(openings).collect();
        // Openings that steps from here on read and that have to be there already.
        let mut needed: BTreeSet<&str> = BTreeSet::new();
        for (number, step) in self.steps.iter().enumerate().skip(1).rev() {
            if let Some((read, made)) = programs.get(step.program) {
                needed.retain(|name| !made.contains(name));
                needed.extend(read);
            }
            let due = match self.steps[number - 1].phase {
                Phase::Train { batch, of, .. } => {
                    (batch as u64 + 1).is_multiple_of(every) || batch + 1 == of
                }
                Phase::Result { .. } | Phase::Validated { .. } => true,
                _ => false,
            };
            if due && needed.is_empty() {
                kept.insert(number);
            }
        }
        kept
    }

    /// Where a session that has begun no step from `next` on may stop early: before which step, and
    /// the job loses nothing. Inside an evaluation that is after it. Where no such place is left, the
    /// steps are done to the end; a job that is never written down may stop anywhere.
    pub fn stop_before(&self, every: u64, next: u64) -> u64 {
        let places = match every {
            0 => BTreeSet::new(),
            _ => self.checkpoints(1),
        };
        let next_place = places.iter().find(|place| **place as u64 >= next);
        match next_place {
            Some(place) => *place as u64,
            None if places.is_empty() => next,
            None => self.steps.len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{DatasetRef, JobKind, TrainSpec};
    use crate::{Network, schedule};

    fn job(evaluate_each_epoch: bool) -> Schedule {
        let spec = TrainSpec {
            batch: 10,
            epochs: 2,
            ..TrainSpec::default()
        };
        let dataset = DatasetRef {
            name: "digits".into(),
            train_rows: 50,
            test_rows: 200,
            snapshot: [0; 32],
        };
        let kind = JobKind::Train {
            network: Network::builtin("mlp").unwrap().to_toml(),
            spec,
            dataset,
            evaluate_each_epoch,
            save_as: "m".into(),
            reveal_weights: true,
        };
        schedule(&kind).unwrap()
    }

    #[test]
    fn state_is_kept_every_so_often_and_around_the_evaluation_but_never_inside_it() {
        // An epoch: 5 batches, then set-up, 2 batches and the result of the evaluation; the weights
        // are revealed by the last of 19 steps.
        let steps = |evaluate, every| -> Vec<usize> {
            job(evaluate).checkpoints(every).into_iter().collect()
        };
        assert_eq!(job(true).steps.len(), 19);
        assert_eq!(steps(true, 2), [2, 4, 5, 9, 11, 13, 14, 18]);
        assert_eq!(steps(true, 100), [5, 9, 14, 18]);
        assert_eq!(steps(false, 3), [3, 5, 8, 10]);
        assert_eq!(steps(true, 0), []);
    }

    #[test]
    fn a_session_stops_early_at_the_next_place_where_the_job_can_be_taken_up() {
        let schedule = job(true);
        let stops = |every, next| schedule.stop_before(every, next);
        // After any training step, whatever the job's own checkpoints are; after an evaluation.
        assert_eq!(
            [1, 3, 5, 6, 8, 9].map(|next| stops(100, next)),
            [1, 3, 5, 9, 9, 9]
        );
        // At the beginning nothing is lost that there is not; near the end the rest is done.
        assert_eq!(stops(1, 0), 1);
        assert_eq!(stops(1, 19), 19);
        // Never written down: nothing to wait for.
        assert_eq!(stops(0, 7), 7);
    }

    #[test]
    fn a_schedule_whose_openings_are_needed_later_is_not_taken_up_there() {
        let mut schedule = job(true);
        let train = schedule.steps[0].clone();
        // A training step in the middle of an evaluation is no place to begin.
        schedule.steps.insert(7, train);
        assert!(!schedule.checkpoints(1).contains(&8));
        assert!(schedule.checkpoints(1).contains(&5));
    }
}
