//! A hospital takes rows back: the store loses them, and the jobs that read them end.

use std::sync::Arc;

use serde_json::json;
use trefoil_consortium::wire::{Contribution, Withdrawal};
use trefoil_consortium::{MemberEntry, MemberRole};

use super::on_files;
use crate::consent;
use crate::daemon::Party;
use crate::desk::JobState;
use crate::session;
use crate::store::StoreError;

/// Removes what the member withdraws of its own; returns what the data set still has of it.
pub(super) async fn rows(
    party: &Arc<Party>,
    member: &MemberEntry,
    dataset: String,
    what: Withdrawal,
) -> Result<Vec<Contribution>, String> {
    if member.role != MemberRole::Hospital {
        return Err(format!("{} is no hospital and has no rows", member.name));
    }
    let gone = {
        let (party, member, dataset) = (party.clone(), member.clone(), dataset.clone());
        on_files(move || {
            let note = |numbers: &[u64]| {
                let who = Some((member.name.as_str(), member.pin));
                let asked = match what {
                    Withdrawal::One(number) => json!({"upload": number}),
                    Withdrawal::Below(end) => json!({"uploads_below": end}),
                };
                let details = json!({"dataset": dataset, "asked": asked, "removed": numbers});
                let written = party.audit.append("rows_withdrawn", who, None, details);
                written.map_err(|err| StoreError::Refused(format!("{}: {err}", party.me)))
            };
            party.store.withdraw(&dataset, member.pin, what, note)
        })
        .await?
    };
    let reason = reason(&member.name, &gone.committed, what, &dataset);
    if !gone.committed.is_empty() || !gone.staged.is_empty() {
        tracing::info!(member = %member.name, %dataset, committed = ?gone.committed,
            staged = ?gone.staged, "rows withdrawn");
    }
    for job in party.jobs.all() {
        let Some(used) = job.description.dataset() else {
            continue;
        };
        if used.name != dataset {
            continue;
        }
        match job.state() {
            JobState::Held | JobState::Waiting if used.snapshot == gone.before => {
                consent::end(party, &job, JobState::Cancelled, &reason).await;
            }
            // Also if an earlier attempt at the withdrawal took the rows out and failed then.
            JobState::Running if job.reads(member.pin, what) => {
                tracing::info!(job = %job.id, %reason, "ended while it runs");
                // The order counts: a session that begins now looks for the word after it can be
                // ended.
                job.cancel(&reason);
                session::abort_job(party, job.id, &reason);
            }
            _ => {}
        }
    }
    let of = party.clone();
    on_files(move || of.store.remove_aside()).await?;
    Ok(gone.left)
}

/// `st-anna withdrew upload 1 of data set digits`.
fn reason(hospital: &str, numbers: &[u64], what: Withdrawal, dataset: &str) -> String {
    let numbers = match (numbers, what) {
        ([], Withdrawal::One(number)) => vec![number],
        ([], Withdrawal::Below(_)) => return format!("{hospital} withdrew its data set {dataset}"),
        (numbers, _) => numbers.to_vec(),
    };
    let plural = if numbers.len() == 1 { "" } else { "s" };
    let numbers: Vec<String> = numbers.iter().map(u64::to_string).collect();
    format!(
        "{hospital} withdrew upload{plural} {} of data set {dataset}",
        numbers.join(", ")
    )
}
