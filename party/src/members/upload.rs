//! Uploads on the wire: one stream stages chunks, another one commits. Both may be repeated until
//! they have been answered; what is staged and what is committed is the store's business.

use std::io;
use std::sync::Arc;

use serde_json::json;
use tokio::sync::SemaphorePermit;
use trefoil_consortium::receipt::{SignedReceipt, StagedReceipt, UploadId, check_receipts};
use trefoil_consortium::wire::{
    Answer, CHUNK_MAX_BYTES, COMMIT_MAX_BYTES, Chunk, Commit, UploadBegin, clip_reason,
};
use trefoil_consortium::{MemberEntry, MemberRole, Part, hex};
use trefoil_transport::{MsgStream, TransportError};

use super::{refuse, say, store_work};
use crate::daemon::Party;
use crate::store::{Found, Staging, StoreError};

/// A hospital may take this many rounds' time-outs between two chunks.
const CHUNK_PATIENCE: u32 = 10;

/// Stages chunks until the member ends the stream. What is staged stays.
pub(super) async fn upload(
    party: &Arc<Party>,
    member: &MemberEntry,
    begin: UploadBegin,
    stream: &mut MsgStream,
) -> Result<(), String> {
    if member.role != MemberRole::Hospital && begin.part != Part::Predict {
        let reason = format!("{} is no hospital and brings no data", member.name);
        return refuse(party, stream, reason).await;
    }
    let permit = match permit(party) {
        Ok(permit) => permit,
        Err(busy) => return turn_down(party, stream, &busy).await,
    };
    let (upload, about) = (
        hex(&begin.upload),
        format!("{} {}", begin.dataset, begin.part),
    );
    let found = {
        let (party, owner) = (party.clone(), member.pin);
        let found = move || {
            let found = party.store.begin(begin, owner)?;
            let receipts = match &found {
                Found::Staged(staging) => staging.receipts(),
                Found::Committed { receipts, .. } => receipts.clone(),
            };
            let receipts = receipts.into_iter().map(|receipt| sign(&party, receipt));
            Ok((found, receipts.collect::<Result<Vec<_>, _>>()?))
        };
        store_work(found).await
    };
    let (mut staging, receipts) = match found {
        Ok((Found::Staged(staging), receipts)) => (staging, receipts),
        Ok((Found::Committed { .. }, receipts)) => {
            drop(permit);
            let committed = true;
            return say(
                party,
                stream,
                &Answer::Ready {
                    receipts,
                    committed,
                },
            )
            .await;
        }
        Err(err) => {
            drop(permit);
            return turn_down(party, stream, &err).await;
        }
    };
    tracing::info!(
        member = %member.name, %upload, %about, number = staging.begin().number,
        rows = staging.begin().rows, staged = receipts.len(), chunks = staging.chunk_rows().len(),
        "upload"
    );
    let committed = false;
    say(
        party,
        stream,
        &Answer::Ready {
            receipts,
            committed,
        },
    )
    .await?;
    while let Some(chunk) = within(party, stream.recv::<Chunk>(CHUNK_MAX_BYTES)).await? {
        let staged = {
            let party = party.clone();
            let staged = move || {
                let receipt = staging.stage(chunk)?;
                Ok((sign(&party, receipt)?, staging))
            };
            store_work(staged).await
        };
        match staged {
            Ok((receipt, next)) => {
                staging = next;
                say(party, stream, &Answer::Staged(receipt)).await?;
            }
            Err(err) => return turn_down(party, stream, &err).await,
        }
    }
    Ok(())
}

/// Commits an upload that is staged; says so again where it is committed.
pub(super) async fn commit(
    party: &Arc<Party>,
    member: &MemberEntry,
    upload: UploadId,
    stream: &mut MsgStream,
) -> Result<(), String> {
    let permit = match permit(party) {
        Ok(permit) => permit,
        Err(busy) => return turn_down(party, stream, &busy).await,
    };
    let found = {
        let (party, owner) = (party.clone(), member.pin);
        let found = move || {
            let found = party.store.reopen(&upload, owner)?;
            if let Found::Staged(staging) = &found {
                staging.check_complete()?;
            }
            Ok(found)
        };
        store_work(found).await
    };
    let staging = match found {
        Ok(Found::Staged(staging)) => staging,
        Ok(Found::Committed { digest, .. }) => {
            drop(permit);
            return say(party, stream, &Answer::Committed { digest }).await;
        }
        Err(err) => {
            drop(permit);
            return turn_down(party, stream, &err).await;
        }
    };
    say(party, stream, &Answer::CommitDue).await?;
    let Some(commit) = within(party, stream.recv::<Commit>(COMMIT_MAX_BYTES)).await? else {
        return Err("the member ended the stream before its commit".into());
    };
    let committed = {
        let party = party.clone();
        let member = member.clone();
        store_work(move || commit_checked(&party, &member, &staging, &commit)).await
    };
    match committed {
        Ok(digest) => {
            tracing::info!(member = %member.name, upload = %hex(&upload), "committed");
            say(party, stream, &Answer::Committed { digest }).await
        }
        Err(err) => turn_down(party, stream, &err).await,
    }
}

fn permit(party: &Party) -> Result<SemaphorePermit<'_>, StoreError> {
    let busy = |_| StoreError::Busy("too many uploads at the same time".into());
    party.uploads.try_acquire().map_err(busy)
}

async fn turn_down(party: &Party, stream: &mut MsgStream, err: &StoreError) -> Result<(), String> {
    let answer = match err {
        StoreError::Busy(reason) => Answer::Busy(clip_reason(reason)),
        StoreError::NumberTaken(_) => Answer::NumberTaken,
        StoreError::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            tracing::error!(%err, "the disk is full");
            let reason = format!(
                "{}: its disk is full; nothing of this chunk is kept, what is staged stays, and the \
                 upload can go on when there is room",
                party.label
            );
            return refuse(party, stream, reason).await;
        }
        other => return refuse(party, stream, other.to_string()).await,
    };
    tracing::info!(reason = %err, "turned down");
    say(party, stream, &answer).await
}

fn sign(party: &Party, receipt: StagedReceipt) -> Result<SignedReceipt, StoreError> {
    let signed = receipt.sign(&party.signer);
    signed.map_err(|err| StoreError::Refused(err.to_string()))
}

fn commit_checked(
    party: &Party,
    member: &MemberEntry,
    staging: &Staging,
    commit: &Commit,
) -> Result<[u8; 32], StoreError> {
    let digest = check_receipts(
        &party.consortium.now(),
        &staging.begin().receipt(),
        staging.chunk_rows(),
        &commit.receipts,
    )
    .map_err(StoreError::Refused)?;
    let own = &commit.receipts[party.me.index()];
    if !own
        .iter()
        .map(|signed| &signed.receipt)
        .eq(&staging.receipts())
    {
        return Err(StoreError::Refused(format!(
            "{}: a receipt speaks of other shares than are staged here: resume the upload",
            party.me
        )));
    }
    let begin = staging.begin();
    let details = json!({
        "upload": hex(&begin.upload),
        "dataset": begin.dataset,
        "part": begin.part.to_string(),
        "number": begin.number,
        "rows": begin.rows,
        "digest": hex(&digest),
    });
    let note = |what: &str| {
        let who = Some((member.name.as_str(), member.pin));
        let written = party.audit.append(what, who, None, details.clone());
        written.map_err(|err| StoreError::Refused(format!("{}: {err}", party.me)))
    };
    note("upload_committed")?;
    party.store.commit(staging, digest).inspect_err(|_| {
        if let Err(err) = note("upload_not_committed") {
            tracing::error!(%err, "the audit log says of an upload that it is committed");
        }
    })?;
    Ok(digest)
}

async fn within<T>(
    party: &Party,
    receiving: impl Future<Output = Result<Option<T>, TransportError>>,
) -> Result<Option<T>, String> {
    match tokio::time::timeout(party.wait() * CHUNK_PATIENCE, receiving).await {
        Ok(received) => received.map_err(|err| err.to_string()),
        Err(_) => Err("the member went silent during an upload".into()),
    }
}
