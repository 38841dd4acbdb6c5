//! Predictions in a serving session on the wire: one stream is one request.

use std::sync::Arc;

use trefoil_consortium::MemberEntry;
use trefoil_consortium::wire::{Answer, RequestKey, ServedImages, ServedRequest, clip_reason};
use trefoil_protocol::share::CompressedShare;
use trefoil_transport::MsgStream;

use super::{refuse, say};
use crate::daemon::Party;
use crate::files::now_s;
use crate::serve::Refusal;

/// What a message of images has beside their words.
const IMAGES_MORE_BYTES: usize = 1_024;
/// Largest share of one request's images; the tool asks for no more.
const REQUEST_MAX_BYTES: usize = 64 << 20;

/// Takes a request's images and answers with this party's share of its predictions. The member
/// keeps its side of the stream open until then: closing it takes the request back.
pub(super) async fn predict(
    party: &Arc<Party>,
    member: &MemberEntry,
    request: ServedRequest,
    stream: &mut MsgStream,
) -> Result<(), String> {
    let desk = party.serving.current();
    let Some(desk) = desk.filter(|desk| desk.job.id == request.job && desk.serves(member.pin))
    else {
        // Others' sessions are as unknown as those that do not exist.
        let reason = format!(
            "{}: job {} serves {} nothing",
            party.me, request.job, member.name
        );
        return refuse(party, stream, reason).await;
    };
    let rows = request.rows as usize;
    if !(1..=desk.spec.max_batch).contains(&rows) {
        let most = desk.spec.max_batch;
        let reason = format!("{rows} images in one request; 1 to {most} are possible");
        return refuse(party, stream, reason).await;
    }
    let words = rows * desk.row_words;
    if words.saturating_mul(8) > REQUEST_MAX_BYTES {
        let reason = format!("{rows} images of this model are too many for one request");
        return refuse(party, stream, reason).await;
    }
    if let Some(reason) = desk.busy() {
        return say(party, stream, &Answer::Busy(clip_reason(&reason))).await;
    }
    let receiving = stream.recv::<ServedImages>(8 * words + IMAGES_MORE_BYTES);
    let images = match tokio::time::timeout(party.wait(), receiving).await {
        Ok(Ok(Some(ServedImages(share)))) => {
            // A seed becomes megabytes: not on the thread that keeps the links alive.
            let expanding = move || CompressedShare::from(share).expand(words);
            let expanded = tokio::task::spawn_blocking(expanding).await;
            expanded.map_err(|err| format!("this node failed: {err}"))?
        }
        Ok(Ok(None)) => return Err("a request for predictions without images".into()),
        Ok(Err(err)) => return Err(err.to_string()),
        Err(_) => return Err("a request for predictions without images in time".into()),
    };
    let Some(images) = images else {
        let reason = format!(
            "{rows} images of this model have {words} values; the request has another number"
        );
        return refuse(party, stream, reason).await;
    };
    let key = RequestKey {
        member: member.pin,
        request: request.request,
    };
    let count = || {
        let (rows, limit) = (rows as u64, desk.limit);
        party
            .policy
            .take_rows(member.pin, &member.name, rows, limit, now_s())
    };
    let answer = match desk.admit(key, request.rows, images, count) {
        Ok(answer) => answer,
        Err(Refusal::Busy(reason)) => {
            return say(party, stream, &Answer::Busy(clip_reason(&reason))).await;
        }
        Err(Refusal::No(reason)) => return refuse(party, stream, reason).await,
    };
    let reply = tokio::select! {
        reply = answer => reply,
        _ = stream.recv_bytes(IMAGES_MORE_BYTES) => {
            desk.leave(key);
            return Err("a member took its request for predictions back".into());
        }
    };
    match reply {
        Ok(Ok((batch, share))) => say(party, stream, &Answer::Predicted { batch, share }).await,
        Ok(Err(reason)) => refuse(party, stream, format!("{}: {reason}", party.me)).await,
        Err(_) => refuse(party, stream, format!("{}: the session ended", party.me)).await,
    }
}
