//! Kept models on the wire: which there are, and the removal of one by its owner.

use std::sync::Arc;

use serde_json::json;
use trefoil_consortium::wire::Answer;
use trefoil_consortium::{JobId, MemberEntry, SessionId, hex};
use trefoil_transport::MsgStream;

use super::{on_files, refuse, say};
use crate::daemon::Party;
use crate::store::StoreError;

/// Names every kept model: what it is, not what it says. Who may use one is the policy's word.
pub(super) async fn list(party: &Arc<Party>, stream: &mut MsgStream) -> Result<(), String> {
    let reading = party.clone();
    match on_files(move || reading.store.models()).await {
        Ok(models) => say(party, stream, &Answer::Models(models)).await,
        Err(reason) => refuse(party, stream, reason).await,
    }
}

/// Which model is to be removed, and whether it is only asked for.
pub(super) struct Removal {
    pub(super) name: String,
    pub(super) job: JobId,
    pub(super) source: SessionId,
    pub(super) ask: bool,
}

/// Removes a model where the policy lets this member. A session that has opened it goes on; later
/// jobs find none.
pub(super) async fn remove(
    party: &Arc<Party>,
    member: &MemberEntry,
    what: Removal,
    stream: &mut MsgStream,
) -> Result<(), String> {
    let (removing, member) = (party.clone(), member.clone());
    let removed = on_files(move || {
        let Removal {
            name,
            job,
            source,
            ask,
        } = what;
        let Some(model) = removing.store.made_by(&name, &job, source)? else {
            return Ok(());
        };
        let may = removing.policy.may_remove(&model, member.pin, &member.name);
        may.map_err(StoreError::Refused)?;
        if ask {
            return Ok(());
        }
        removing.store.remove_model(&model)?;
        tracing::info!(member = %member.name, model = %name, version = %job, "a model was removed");
        let details = json!({"model": name, "version": job.to_string(), "source": hex(&source)});
        let who = Some((member.name.as_str(), member.pin));
        let written = removing.audit.append("model_removed", who, None, details);
        written.map_err(|err| StoreError::Refused(err.to_string()))?;
        Ok(())
    });
    match removed.await {
        Ok(()) => say(party, stream, &Answer::ModelRemoved).await,
        Err(reason) => refuse(party, stream, reason).await,
    }
}
