//! What hospitals and analysts ask of a party: uploads, data sets, jobs, results.

use std::sync::Arc;

use trefoil_consortium::receipt::check_receipts;
use trefoil_consortium::wire::{
    Answer, Ask, CHUNK_MAX_BYTES, COMMIT_MAX_BYTES, CONTROL_MAX_BYTES, CONTROL_VERSION, Chunk,
    Commit, Event, Request, UploadBegin, clip_reason,
};
use trefoil_consortium::{JobDescription, JobId, MemberEntry, MemberRole, Part, SOFTWARE};
use trefoil_protocol::party::PartyId;
use trefoil_transport::{MsgStream, TransportError};

use crate::daemon::Party;
use crate::jobs::Job;
use crate::store::{Staging, StoreError};

/// A hospital may take this many rounds' time-outs between two chunks.
const CHUNK_PATIENCE: u32 = 10;

/// Upload numbers stay below this.
const UPLOAD_NUMBERS_END: u64 = 1 << 32;

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
        Ask::Upload(begin) => upload(party, member, begin, &mut stream).await?,
        Ask::Dataset(name) => match party.store.dataset(&name) {
            Ok(info) => say(party, &mut stream, &Answer::Dataset(info)).await?,
            Err(err) => refuse(party, &mut stream, err.to_string()).await?,
        },
        Ask::Submit(job) => match submit(party, member, job).await {
            Ok(id) => say(party, &mut stream, &Answer::Submitted(id)).await?,
            Err(reason) => refuse(party, &mut stream, reason).await?,
        },
        Ask::Withdraw(id) => {
            let withdrawn = own_job(party, member, &id).and_then(|job| party.jobs.withdraw(&job));
            match withdrawn {
                Ok(()) => say(party, &mut stream, &Answer::Withdrawn).await?,
                Err(reason) => refuse(party, &mut stream, reason).await?,
            }
        }
        Ask::Watch(id) => match own_job(party, member, &id) {
            Ok(job) => watch(party, &job, &mut stream).await?,
            Err(reason) => say(party, &mut stream, &Event::Failed(reason)).await?,
        },
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
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|err| err.to_string()),
        Err(err) => Err(format!("this node failed: {err}")),
    }
}

async fn upload(
    party: &Arc<Party>,
    member: &MemberEntry,
    begin: UploadBegin,
    stream: &mut MsgStream,
) -> Result<(), String> {
    if member.role != MemberRole::Hospital && begin.part != Part::Predict {
        let reason = format!("{} is no hospital and brings no data", member.name);
        return refuse(party, stream, reason).await;
    }
    let Ok(_permit) = party.uploads.try_acquire() else {
        return refuse(
            party,
            stream,
            "busy: too many uploads at the same time; try again later".into(),
        )
        .await;
    };
    let next_number = party.store.next_number(&begin.dataset, member.pin);
    tracing::info!(member = %member.name, dataset = %begin.dataset, part = %begin.part, rows = begin.rows, "upload");
    let begun = {
        let (party, owner) = (party.clone(), member.pin);
        on_files(move || party.store.begin(begin, owner)).await
    };
    let staging = match begun {
        Ok(staging) => staging,
        Err(reason) => return refuse(party, stream, reason).await,
    };
    say(party, stream, &Answer::Ready { next_number }).await?;
    // An early return drops `staging`, which removes what was staged.
    let staging = match stage(party, staging, stream).await? {
        Ok(staging) => staging,
        Err(reason) => return refuse(party, stream, reason).await,
    };
    let commit: Commit = within(party, stream.recv(COMMIT_MAX_BYTES)).await?;
    let committed = {
        let party = party.clone();
        on_files(move || commit_checked(&party, &staging, &commit)).await
    };
    match committed {
        Ok(digest) => say(party, stream, &Answer::Committed { digest }).await,
        Err(reason) => refuse(party, stream, reason).await,
    }
}

/// Takes all chunks; the inner error is for the member.
async fn stage(
    party: &Arc<Party>,
    mut staging: Staging,
    stream: &mut MsgStream,
) -> Result<Result<Staging, String>, String> {
    while staging.staged() < staging.chunk_rows().len() {
        let chunk: Chunk = within(party, stream.recv(CHUNK_MAX_BYTES)).await?;
        let party = party.clone();
        let staged = on_files({
            let party = party.clone();
            move || {
                let receipt = staging.stage(chunk)?;
                let signed = receipt
                    .sign(&party.signer)
                    .map_err(|err| StoreError::Refused(err.to_string()))?;
                Ok((staging, signed))
            }
        });
        match staged.await {
            Ok((next, signed)) => {
                staging = next;
                say(&party, stream, &Answer::Staged(signed)).await?;
            }
            Err(reason) => return Ok(Err(reason)),
        }
    }
    Ok(Ok(staging))
}

fn commit_checked(
    party: &Party,
    staging: &Staging,
    commit: &Commit,
) -> Result<[u8; 32], StoreError> {
    let refuse = |reason: String| StoreError::Refused(reason);
    let digest = check_receipts(
        &party.consortium,
        &staging.about(),
        staging.chunk_rows(),
        &commit.receipts,
    )
    .map_err(refuse)?;
    let own = &commit.receipts[party.me.index()];
    if own
        .iter()
        .zip(staging.digests())
        .any(|(signed, digest)| signed.receipt.digest != *digest)
    {
        return Err(refuse(format!(
            "{}: a receipt speaks of other shares than are staged here",
            party.me
        )));
    }
    if !(1..UPLOAD_NUMBERS_END).contains(&commit.number) {
        return Err(refuse(format!(
            "upload number {} is not between 1 and {}",
            commit.number,
            UPLOAD_NUMBERS_END - 1
        )));
    }
    party
        .store
        .commit(staging, commit.number, digest)
        .map(|committed| committed.digest)
}

async fn within<T>(
    party: &Party,
    receiving: impl Future<Output = Result<Option<T>, TransportError>>,
) -> Result<T, String> {
    match tokio::time::timeout(party.wait() * CHUNK_PATIENCE, receiving).await {
        Ok(Ok(Some(message))) => Ok(message),
        Ok(Ok(None)) => Err("the member ended the upload".into()),
        Ok(Err(err)) => Err(err.to_string()),
        Err(_) => Err("the member went silent during an upload".into()),
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
    allowed(party, &member.name)?;
    tracing::info!(job = %job.id(), "submitted by {}:\n{}", member.name, job.describe(&member.name));
    let job = party.jobs.submit(job)?;
    if party.me == PartyId::P0 {
        // The queue is as long as the book of jobs.
        if party.queue.try_send(job.clone()).is_err() {
            party.jobs.withdraw(&job)?;
            return Err("busy: too many jobs are waiting".into());
        }
    }
    Ok(job.id)
}

/// Whether this party's policy lets a member start jobs.
pub(crate) fn allowed(party: &Party, member: &str) -> Result<(), String> {
    if party.requesters.contains(member) {
        return Ok(());
    }
    Err(format!(
        "policy of {} ({}): {member} may not start jobs; add it to [policy] requesters in this party's configuration",
        party.me,
        party.consortium.core.parties[party.me.index()].name
    ))
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
