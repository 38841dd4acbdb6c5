//! What a party does before it accepts a session: compiles the job on its own, checks policy, data
//! set, upload and model, and opens what the job will read.

use std::collections::BTreeMap;
use std::sync::Arc;

use trefoil_consortium::{Derived, JobDescription, SessionId};
use trefoil_models::InitialState;
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;

use crate::consent;
use crate::daemon::Party;
use crate::jobs::Job;
use crate::store::{StoreError, Tables};

/// A job that this party is ready to run.
pub(crate) struct Prepared {
    pub(crate) derived: Derived,
    pub(crate) tables: Tables,
    pub(crate) initial: BTreeMap<String, Tensor>,
    /// The session that this party's shares of the job's model come from.
    pub(crate) model: Option<SessionId>,
}

/// Prepares a job; the reason of a refusal names this party.
pub(crate) async fn prepare(party: &Arc<Party>, job: &Job) -> Result<Prepared, String> {
    if !consent::permitted(party, job)? {
        return Err(format!("job {} is not approved at {}", job.id, party.label));
    }
    let description = &job.description;
    description.check().map_err(|err| err.to_string())?;
    let ring_bits = party.consortium.now().core.ring_bits;
    if description.format().0 != ring_bits {
        return Err(format!(
            "the consortium's ring has {ring_bits} bits, the job's {}",
            description.format().0
        ));
    }
    let (at, wanted) = (party.clone(), description.clone());
    let work = tokio::task::spawn_blocking(move || open(&at, &wanted));
    let prepared = work
        .await
        .map_err(|err| format!("this node failed: {err}"))??;
    if let Some(dataset) = description.dataset() {
        // In this order: a withdrawal removes rows, and then looks for jobs that read them.
        let reads = prepared.tables.contributions();
        job.note_reads(reads);
        if !party.store.holds(&dataset.name, reads) {
            let name = &dataset.name;
            return Err(format!("rows of data set {name} have just been withdrawn"));
        }
    }
    Ok(prepared)
}

fn open(party: &Party, job: &JobDescription) -> Result<Prepared, String> {
    let stored = |err: StoreError| err.to_string();
    let derived = Derived::new(job)?;
    if let Some(dataset) = job.dataset() {
        let info = party.store.dataset(&dataset.name).map_err(stored)?;
        if info.reference(&dataset.name) != *dataset {
            return Err(format!(
                "data set {} has {} training and {} test rows and snapshot {} here; the job was made for {}, {} and {}",
                dataset.name,
                info.train_rows,
                info.test_rows,
                trefoil_consortium::hex(&info.snapshot[..8]),
                dataset.train_rows,
                dataset.test_rows,
                trefoil_consortium::hex(&dataset.snapshot[..8]),
            ));
        }
    }
    if let Some(upload) = job.upload() {
        match party.store.upload(upload) {
            Some((owner, _)) if owner == job.requester => {}
            // Others' uploads are as unknown as those that do not exist.
            _ => {
                return Err(format!(
                    "there is no upload {upload} of the job's requester"
                ));
            }
        }
    }
    if let trefoil_models::JobKind::Train { save_as, .. } = &job.kind {
        party
            .store
            .may_save(save_as, job.requester)
            .map_err(stored)?;
    }
    let tables = party
        .store
        .tables(job.dataset().map(|set| set.name.as_str()), job.upload())
        .map_err(stored)?;
    check_inputs(&derived, &tables)?;
    let (initial, model) = match &derived.schedule.initial {
        InitialState::Public(values) => (
            values
                .iter()
                .map(|(name, value)| (name.clone(), public_share(party.me, value)))
                .collect(),
            None,
        ),
        InitialState::Model(name) => {
            let model = party
                .store
                .model(name, derived.ring_bits, derived.frac_bits)
                .map_err(stored)?;
            (model.shares, Some(model.source))
        }
    };
    Ok(Prepared {
        derived,
        tables,
        initial,
        model,
    })
}

/// P0 holds public values, the others zeros.
fn public_share(me: PartyId, value: &Tensor) -> Tensor {
    match me {
        PartyId::P0 => value.clone(),
        _ => Tensor::zeros(value.shape()),
    }
}

/// Rows and words of all steps' inputs against the tables: found out before the session.
fn check_inputs(derived: &Derived, tables: &Tables) -> Result<(), String> {
    for step in &derived.schedule.steps {
        let program = derived.schedule.programs.get(step.program);
        let program = program.ok_or("a step names a program that does not exist")?;
        for input in &step.inputs {
            let (row_words, _) = tables.size(&input.table).ok_or_else(|| {
                format!(
                    "program {} reads {}, of which there are no rows",
                    program.name, input.table
                )
            })?;
            let ty = program.inputs().find(|(name, _)| *name == input.name);
            let (_, ty) =
                ty.ok_or_else(|| format!("program {} has no input {}", program.name, input.name))?;
            if ty.len() != row_words * input.rows.len() {
                return Err(format!(
                    "input {} of program {} has shape {:?}; {} rows of {} have {} values each",
                    input.name,
                    program.name,
                    ty.shape,
                    input.rows.len(),
                    input.table,
                    row_words
                ));
            }
        }
    }
    Ok(())
}
