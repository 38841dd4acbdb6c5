//! The protocol thread of a serving session: batch by batch, each request's rows to its member.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::Instant;

use serde_json::json;
use tokio::runtime::Handle;
use trefoil_consortium::hex;
use trefoil_consortium::wire::{Event, Progress, ServeBatch};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::OutputShare;

use super::desk::{Happening, Order, ServeDesk, Slot, cut};
use crate::daemon::Party;
use crate::session;

/// Runs one batch: its number, its program, its inputs.
pub(crate) type Run<'a> =
    dyn FnMut(u64, usize, &BTreeMap<String, Tensor>) -> Result<Vec<OutputShare>, String> + 'a;

/// Where the protocol thread of a serving session takes its batches from. Dropping it ends the desk.
pub(crate) struct Seat {
    party: Arc<Party>,
    pub(super) desk: Arc<ServeDesk>,
    orders: blocking::Receiver<Order>,
    runtime: Handle,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.desk.close(&format!(
            "serving of {} has ended; ask again later, or have the images predicted by a job of their own",
            self.desk.spec.model
        ));
        let mut place = self.party.serving.lock();
        if place
            .as_ref()
            .is_some_and(|desk| Arc::ptr_eq(desk, &self.desk))
        {
            *place = None;
        }
    }
}

impl Seat {
    pub(super) fn new(
        party: Arc<Party>,
        desk: Arc<ServeDesk>,
        orders: blocking::Receiver<Order>,
    ) -> Seat {
        Seat {
            party,
            desk,
            orders,
            runtime: Handle::current(),
        }
    }

    /// Runs batches until P0 says that serving is over.
    pub(crate) fn batches(self, run: &mut Run<'_>) -> Result<(), String> {
        let mut rows = 0;
        for number in 0.. {
            match self.orders.recv() {
                Ok(Order::Batch(batch)) if batch.number == number => {
                    rows += u64::from(batch.rows);
                    self.batch(&batch, rows, run)?;
                }
                Ok(Order::Batch(batch)) => {
                    return Err(format!(
                        "P0 ordered batch {} where number {number} belongs",
                        batch.number
                    ));
                }
                Ok(Order::End) => break,
                Err(_) => {
                    let why = self.desk.over();
                    return Err(why.unwrap_or_else(|| "serving was interrupted".into()));
                }
            }
        }
        Ok(())
    }

    /// Runs one batch. `rows` are those of all batches so far, for people.
    fn batch(&self, batch: &ServeBatch, rows: u64, run: &mut Run<'_>) -> Result<(), String> {
        let start = Instant::now();
        let _first = self.party.serving.enter();
        let asked: u64 = batch
            .requests
            .iter()
            .map(|(_, rows)| u64::from(*rows))
            .sum();
        let program = self.desk.spec.program(batch.rows as usize);
        let Some((program, size)) = program.filter(|_| asked == u64::from(batch.rows)) else {
            return Err(format!(
                "P0 ordered a batch of {} images for {asked}, at most {} are possible",
                batch.rows, self.desk.spec.max_batch
            ));
        };
        let (words, slots) = self.desk.take(batch, size);
        // While it runs, the home learns of it.
        let noted = self.note(batch.number, &slots);
        let images = Tensor::new(vec![words.len()], words);
        let inputs = BTreeMap::from([("images".to_owned(), images)]);
        let outputs = run(batch.number, program, &inputs)?;
        let [output] = outputs.as_slice() else {
            return Err(format!("a batch revealed {} outputs", outputs.len()));
        };
        let taken: Vec<u32> = slots.iter().map(|slot| slot.rows).collect();
        let shares = cut(output, size, &taken);
        let (party, job, number) = (self.party.clone(), self.desk.job.id, batch.number);
        self.runtime.spawn(async move {
            match noted.await {
                Ok(Ok(())) => {
                    for (slot, share) in slots.into_iter().zip(shares) {
                        if let Some(answer) = slot.answer {
                            // An error means that its member has gone.
                            let _ = answer.send(Ok((number, share)));
                        }
                    }
                }
                Ok(Err(reason)) => {
                    let reason = format!("{}: nothing is revealed: {reason}", party.me);
                    session::abort_job(&party, job, &reason);
                }
                Err(err) => session::abort_job(&party, job, &format!("{}: {err}", party.me)),
            }
        });
        self.desk.happen(Happening::Done);
        self.desk.job.say(Event::Progress(Progress {
            step: batch.number + 1,
            steps: 0,
            phase: "serve".into(),
            epoch: 0,
            batch: batch.number,
            batches: rows,
            seconds: start.elapsed().as_secs_f64(),
            rounds: 0,
            sent_bytes: 0,
            dealer_bytes: 0,
        }));
        Ok(())
    }

    /// Writes who is given predictions of how many images: the day's counts and the audit log.
    fn note(&self, batch: u64, slots: &[Slot]) -> tokio::task::JoinHandle<Result<(), String>> {
        let (party, job) = (self.party.clone(), self.desk.job.clone());
        let consortium = party.consortium.now();
        let name = |slot: &Slot| match consortium.member(slot.key.member) {
            Some(member) => member.name.clone(),
            None => "no member any more".into(),
        };
        let requests = slots.iter().map(|slot| {
            json!({
                "who": name(slot),
                "pin": slot.key.member.to_string(),
                "request": hex(&slot.key.request),
                "rows": slot.rows,
            })
        });
        let details = json!({"batch": batch, "requests": requests.collect::<Vec<_>>()});
        self.runtime.spawn_blocking(move || {
            party.policy.keep_counts().map_err(|err| err.to_string())?;
            let requester = job.requester();
            let who = Some((requester.as_str(), job.description.requester));
            let written = party
                .audit
                .append("outputs_revealed", who, Some(job.id), details);
            written.map_err(|err| err.to_string())
        })
    }
}
