//! Kept models on the wire: which there are, and the removal of one by its owner.

use std::sync::Arc;

use serde_json::json;
use trefoil_consortium::wire::Answer;
use trefoil_consortium::{MemberEntry, SessionId, hex};
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

/// Removes a member's own model. A session that has opened it goes on; later jobs find none.
pub(super) async fn remove(
    party: &Arc<Party>,
    member: &MemberEntry,
    name: String,
    source: SessionId,
    stream: &mut MsgStream,
) -> Result<(), String> {
    let (removing, owner) = (party.clone(), member.clone());
    let removed = on_files(move || {
        let removed = removing.store.remove_model(&name, owner.pin, source)?;
        if removed {
            tracing::info!(member = %owner.name, model = %name, "a model was removed");
            let details = json!({"model": name, "source": hex(&source)});
            let who = Some((owner.name.as_str(), owner.pin));
            let written = removing.audit.append("model_removed", who, None, details);
            written.map_err(|err| StoreError::Refused(err.to_string()))?;
        }
        Ok(())
    });
    match removed.await {
        Ok(()) => say(party, stream, &Answer::ModelRemoved).await,
        Err(reason) => refuse(party, stream, reason).await,
    }
}
