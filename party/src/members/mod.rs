//! What hospitals and analysts ask of a party: data sets, jobs, results; uploads in `upload.rs`, and
//! taking them back in `withdraw.rs`.

mod models;
mod served;
mod upload;
mod withdraw;

use std::sync::Arc;

use trefoil_consortium::wire::{
    Answer, Ask, CONTROL_MAX_BYTES, CONTROL_VERSION, Event, Request, clip_reason,
};
use trefoil_consortium::{JobDescription, JobId, MemberEntry, SOFTWARE};
use trefoil_transport::MsgStream;

use crate::consent;
use crate::daemon::Party;
use crate::jobs::Job;
use crate::serve;
use crate::store::StoreError;

/// Answers one request. An error is for the log: the member has been told.
pub(crate) async fn answer(
    party: &Arc<Party>,
    member: &MemberEntry,
    mut stream: MsgStream,
) -> Result<(), String> {
    let request =
        match tokio::time::timeout(party.wait(), stream.recv::<Request>(CONTROL_MAX_BYTES)).await {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None)) => return Err("a stream without a request".into()),
            Ok(Err(err)) => return Err(err.to_string()),
            Err(_) => return Err("a stream without a request in time".into()),
        };
    if request.version != CONTROL_VERSION {
        let reason = format!(
            "control version {}, this party speaks {CONTROL_VERSION} ({SOFTWARE})",
            request.version
        );
        return refuse(party, &mut stream, reason).await;
    }
    match request.ask {
        Ask::NextNumber(dataset) => match party.store.next_number(&dataset, member.pin) {
            Ok(number) => say(party, &mut stream, &Answer::NextNumber(number)).await?,
            Err(err) => refuse(party, &mut stream, err.to_string()).await?,
        },
        Ask::Upload(begin) => upload::upload(party, member, begin, &mut stream).await?,
        Ask::Commit(id) => upload::commit(party, member, id, &mut stream).await?,
        Ask::Dataset(name) => match party.store.dataset(&name) {
            Ok(info) => say(party, &mut stream, &Answer::Dataset(info)).await?,
            Err(err) => refuse(party, &mut stream, err.to_string()).await?,
        },
        Ask::Submit(job) => match submit(party, member, *job).await {
            Ok(id) => say(party, &mut stream, &Answer::Submitted(id)).await?,
            Err(reason) => refuse(party, &mut stream, reason).await?,
        },
        Ask::Withdraw(id) => {
            let withdrawn = match own_job(party, member, &id) {
                Ok(job) => withdraw(party, &job).await,
                Err(reason) => Err(reason),
            };
            match withdrawn {
                Ok(()) => say(party, &mut stream, &Answer::Withdrawn).await?,
                Err(reason) => refuse(party, &mut stream, reason).await?,
            }
        }
        Ask::Servings => {
            let servings = serve::servings(party, member);
            say(party, &mut stream, &Answer::Servings(servings)).await?
        }
        Ask::StopServing(id) => match own_job(party, member, &id) {
            Ok(job) => {
                serve::stop(party, &job);
                say(party, &mut stream, &Answer::Stopping).await?
            }
            Err(reason) => refuse(party, &mut stream, reason).await?,
        },
        Ask::Served(request) => served::predict(party, member, request, &mut stream).await?,
        Ask::Models => models::list(party, &mut stream).await?,
        Ask::RemoveModel {
            name,
            job,
            source,
            ask,
        } => {
            let what = models::Removal {
                name,
                job,
                source,
                ask,
            };
            models::remove(party, member, what, &mut stream).await?
        }
        Ask::Watch(id) => match own_job(party, member, &id) {
            Ok(job) => watch(party, &job, &mut stream).await?,
            Err(reason) => say(party, &mut stream, &Event::Failed(reason)).await?,
        },
        Ask::WithdrawRows { dataset, uploads } => {
            match withdraw::rows(party, member, dataset, uploads).await {
                Ok(left) => say(party, &mut stream, &Answer::RowsWithdrawn { left }).await?,
                Err(reason) => refuse(party, &mut stream, reason).await?,
            }
        }
    }
    stream.finish().await.map_err(|err| err.to_string())
}

async fn say<T: serde::Serialize>(
    party: &Party,
    stream: &mut MsgStream,
    message: &T,
) -> Result<(), String> {
    match tokio::time::timeout(party.wait(), stream.send(message)).await {
        Ok(sent) => sent.map_err(|err| err.to_string()),
        Err(_) => Err("the member takes no messages".into()),
    }
}

async fn refuse(party: &Party, stream: &mut MsgStream, reason: String) -> Result<(), String> {
    tracing::info!(%reason, "refused");
    say(party, stream, &Answer::Refused(clip_reason(&reason))).await
}

/// Work on files, away from the thread of the links.
pub(crate) async fn on_files<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, String> {
    store_work(work).await.map_err(|err| err.to_string())
}

/// As [`on_files`], with the store's own error.
async fn store_work<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(err) => Err(StoreError::Refused(format!("this node failed: {err}"))),
    }
}

async fn submit(
    party: &Arc<Party>,
    member: &MemberEntry,
    job: JobDescription,
) -> Result<JobId, String> {
    job.check().map_err(|err| err.to_string())?;
    if job.requester != member.pin {
        return Err(format!(
            "the job names {} as its requester, {} submitted it",
            job.requester, member.name
        ));
    }
    consent::submit(party, member, job).await
}

async fn withdraw(party: &Arc<Party>, job: &Arc<Job>) -> Result<(), String> {
    party.jobs.withdraw(job)?;
    consent::ended(party, job).await;
    Ok(())
}

fn own_job(party: &Party, member: &MemberEntry, id: &JobId) -> Result<Arc<Job>, String> {
    // Others' jobs are as unknown as those that do not exist.
    let job = party
        .jobs
        .get(id)
        .filter(|job| job.description.requester == member.pin);
    job.ok_or_else(|| format!("{} knows no job {id} of {}", party.me, member.name))
}

async fn watch(party: &Party, job: &Job, stream: &mut MsgStream) -> Result<(), String> {
    let mut changed = job.subscribe();
    let mut next = 0;
    loop {
        changed.mark_unchanged();
        let (events, all) = job.heard(next);
        for (number, event) in events {
            next = number + 1;
            say(party, stream, &*event).await?;
        }
        if all {
            return Ok(());
        }
        let closed = stream.link().clone();
        tokio::select! {
            // The sender lives as long as the job.
            _ = changed.changed() => {}
            reason = closed.closed() => return Err(reason),
        }
    }
}
