//! Serving: a job whose session stays open while members ask for predictions.
//!
//! Members give shares of their images to each party (`members/served.rs`), which keeps them on its
//! desk (`desk.rs`). P1 and P2 tell P0 what lies there; P0 composes batches of what all three hold
//! (`ledger.rs`) and tells the others (`lead.rs`). The protocol thread runs batch by batch and gives
//! each request its own rows (`seat.rs`). Such a session runs beside one other session, whose steps
//! give way to its batches.

mod desk;
mod lead;
mod ledger;
mod seat;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use trefoil_consortium::wire::{Serving, serve_stream};
use trefoil_consortium::{JobDescription, MemberEntry, SessionId};
use trefoil_models::Network;
use trefoil_transport::Pin;

use crate::daemon::Party;
use crate::files::{now_s, time_text};
use crate::jobs::Job;
use crate::policy::Ruling;
pub(crate) use desk::{Refusal, ServeDesk};
pub(crate) use lead::lead;
pub(crate) use seat::Seat;

/// A step of another session waits at most this long for batches: it must end some time.
const GIVE_WAY_MAX: Duration = Duration::from_millis(500);

/// Where a serving session stands at a party, if one runs.
#[derive(Default)]
pub(crate) struct ServingPlace {
    /// One serving session at a time.
    slot: tokio::sync::Mutex<()>,
    desk: Mutex<Option<Arc<ServeDesk>>>,
    /// Batches that run.
    busy: Mutex<usize>,
    quiet: Condvar,
}

impl ServingPlace {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<ServeDesk>>> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The desk of the session that runs.
    pub(crate) fn current(&self) -> Option<Arc<ServeDesk>> {
        self.lock().clone()
    }

    /// The desk to which a stream of this name belongs.
    pub(crate) fn of_stream(&self, name: &[u8; 32]) -> Option<Arc<ServeDesk>> {
        self.current()
            .filter(|desk| serve_stream(&desk.session) == *name)
    }

    /// Lets a batch that runs go first. For the thread of another session.
    pub(crate) fn give_way(&self) {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // Whether it is quiet by then or not: the other session's peers wait too.
        let waited = self
            .quiet
            .wait_timeout_while(busy, GIVE_WAY_MAX, |busy| *busy > 0);
        drop(waited);
    }

    /// Other sessions give way while the returned value lives.
    fn enter(&self) -> Busy<'_> {
        *self.busy.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Busy(self)
    }
}

struct Busy<'a>(&'a ServingPlace);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        *self.0.busy.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.quiet.notify_all();
    }
}

/// The names of the members whom a job serves; none for other jobs.
fn served(party: &Party, job: &JobDescription) -> Result<Vec<String>, String> {
    let consortium = party.consortium.now();
    let members = job.serves().map_or(&[][..], |spec| &spec.members);
    let name = |pin: &[u8; 32]| {
        let pin = Pin::from_bytes(*pin);
        match consortium.member(pin) {
            Some(member) => Ok(member.name.clone()),
            None => Err(format!(
                "the job serves {pin}, who is no member of the consortium"
            )),
        }
    };
    members.iter().map(name).collect()
}

/// What the policy says of a job, and of those whom it serves.
pub(crate) fn rule(party: &Party, job: &JobDescription, requester: &str) -> Result<Ruling, String> {
    let served = served(party, job)?;
    party.policy.rule_for(job, requester, &served, now_s())
}

/// The place of a job among the sessions of a party.
///
/// # Errors
/// Another job serves already: until when.
pub(crate) fn slot<'a>(party: &'a Party, job: &Job) -> Result<&'a tokio::sync::Mutex<()>, String> {
    if job.description.serves().is_none() {
        return Ok(&party.slot);
    }
    match party.serving.current() {
        Some(desk) if desk.job.id != job.id => Err(format!(
            "waits: {} serves {} until {}",
            party.me,
            desk.spec.model,
            time_text(desk.until_s)
        )),
        _ => Ok(&party.serving.slot),
    }
}

/// Opens the desk of a serving job; `None` for other jobs. `model` is where its shares come from.
pub(crate) fn open(
    party: &Arc<Party>,
    job: &Arc<Job>,
    session: SessionId,
    model: Option<SessionId>,
) -> Result<Option<Seat>, String> {
    let description = &job.description;
    let Some(spec) = description.serves() else {
        return Ok(None);
    };
    let network = Network::parse(&spec.network).map_err(|err| err.to_string())?;
    let served = served(party, description)?;
    let limit = party
        .policy
        .served_rows(description, &job.requester(), &served)?;
    let (desk, orders) = ServeDesk::new(
        job.clone(),
        session,
        model.unwrap_or_default(),
        network.input_len(),
        limit,
    );
    let desk = Arc::new(desk);
    *party.serving.lock() = Some(desk.clone());
    Ok(Some(Seat::new(party.clone(), desk, orders)))
}

/// The serving sessions that a member may ask.
pub(crate) fn servings(party: &Party, member: &MemberEntry) -> Vec<Serving> {
    let desk = party.serving.current();
    let desk = desk.filter(|desk| desk.serves(member.pin) && desk.over().is_none());
    let about = desk.map(|desk| Serving {
        job: desk.job.id,
        spec: desk.shown_spec(member.pin),
        model: desk.model,
        until_s: desk.until_s,
    });
    about.into_iter().collect()
}

/// Ends a job's serving in an orderly way. P0 tells the others; nothing happens elsewhere.
pub(crate) fn stop(party: &Party, job: &Job) {
    if let Some(desk) = party.serving.current().filter(|desk| desk.job.id == job.id) {
        desk.stop.notify_one();
    }
}
