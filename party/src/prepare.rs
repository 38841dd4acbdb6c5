//! What a party does before it accepts a session: compiles the job on its own, checks policy, data
//! set, upload and model, and opens what the job will read.

use std::collections::BTreeMap;
use std::sync::Arc;

use trefoil_consortium::wire::ModelAbout;
use trefoil_consortium::{Attempt, Derived, Ending, JobDescription, SessionId};
use trefoil_models::schedule::UPLOAD_IMAGES;
use trefoil_models::{InitialState, JobKind, Network, import_tensors};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;

use crate::consent;
use crate::daemon::Party;
use crate::jobs::Job;
use crate::resume;
use crate::store::{Lease, Results, StoreError, Tables};

/// A job that this party is ready to run.
pub(crate) struct Prepared {
    pub(crate) derived: Derived,
    pub(crate) tables: Tables,
    pub(crate) initial: BTreeMap<String, Tensor>,
    /// The session that this party's shares of the job's model come from.
    pub(crate) model: Option<SessionId>,
    /// Which attempt it is.
    pub(crate) attempt: Attempt,
    /// Whether what is revealed is kept on the disk: not for benchmarks.
    pub(crate) keeps_results: bool,
    /// Where.
    pub(crate) results: Option<Results>,
    /// The attempt's right to write its files.
    pub(crate) lease: Lease,
    /// What earlier sessions have opened for an early stop.
    pub(crate) validated: Vec<u64>,
}

/// Prepares an attempt at a job; the reason of a refusal names this party.
pub(crate) async fn prepare(
    party: &Arc<Party>,
    job: &Job,
    attempt: Attempt,
) -> Result<Prepared, Ending> {
    let prepared = prepare_anew(party, job, attempt).await;
    let prepared = prepared.map_err(Ending::Over)?;
    let (party, id) = (party.clone(), job.id);
    let work = move || resume::take_up(&party, id, attempt, prepared);
    let taken_up = tokio::task::spawn_blocking(work).await;
    taken_up.map_err(|err| Ending::Over(format!("this node failed: {err}")))?
}

async fn prepare_anew(party: &Arc<Party>, job: &Job, attempt: Attempt) -> Result<Prepared, String> {
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
    let resumes = attempt.resume.is_some();
    let work = tokio::task::spawn_blocking(move || open(&at, &wanted, resumes));
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

/// Opens what a job reads. One that `resumes` needs no model to start from: it has its own state.
fn open(party: &Party, job: &JobDescription, resumes: bool) -> Result<Prepared, String> {
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
    if let JobKind::Evaluate { by_hospital, .. } = &job.kind
        && !by_hospital.is_empty()
        && *by_hospital
            != party
                .store
                .test_rows(job.dataset().map_or("", |set| &set.name))
    {
        return Err("the job names other hospitals, or other numbers of their test rows, than have shared here".into());
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
    if let Some(save_as) = job.save_as() {
        party
            .store
            .may_save(save_as, job.requester)
            .map_err(stored)?;
    }
    let mut tables = party
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
            same_network(name, model.about.as_ref(), job)?;
            (model.shares, Some(model.source))
        }
        InitialState::StartFrom { .. } if resumes => (BTreeMap::new(), None),
        InitialState::StartFrom { model: name, zeros } => {
            let model = party
                .store
                .model(name, derived.ring_bits, derived.frac_bits)
                .map_err(stored)?;
            same_network(name, model.about.as_ref(), job)?;
            same_preparation(name, model.about.as_ref(), job)?;
            let mut state = model.shares;
            state.extend(zeros.clone());
            (state, Some(model.source))
        }
        InitialState::Upload => (imported(job, &mut tables)?, None),
    };
    Ok(Prepared {
        derived,
        tables,
        initial,
        model,
        attempt: Attempt::default(),
        keeps_results: !matches!(job.kind, JobKind::Benchmark { .. } | JobKind::Serve(_)),
        results: None,
        lease: party.store.lease(job.id()),
        validated: Vec::new(),
    })
}

/// A model is used with the network that it was made with, where the store knows that.
fn same_network(
    name: &str,
    about: Option<&ModelAbout>,
    job: &JobDescription,
) -> Result<(), String> {
    let (Some(about), Some(network)) = (about, job.network()) else {
        return Ok(());
    };
    let parse = |toml: &str| Network::parse(toml).map_err(|err| err.to_string());
    let (made, asked) = (parse(&about.network)?, parse(network)?);
    match made.difference(&asked) {
        None => Ok(()),
        Some(difference) => Err(format!(
            "model {name} was made as network {}, and the job brings another one, named {}: {difference}; leave the network out",
            made.name, asked.name
        )),
    }
}

/// Training goes on with rows that are prepared as those were that the model was trained on, where
/// both are known.
fn same_preparation(
    name: &str,
    about: Option<&ModelAbout>,
    job: &JobDescription,
) -> Result<(), String> {
    let JobKind::Train { spec, .. } = &job.kind else {
        return Ok(());
    };
    let made = about.and_then(|about| about.preparation);
    match (made, spec.preparation) {
        (Some(made), Some(asked)) if made != asked => Err(format!(
            "model {name} was made with rows prepared by {made}, the job's are by {asked}: share them alike"
        )),
        _ => Ok(()),
    }
}

/// This party's shares of weights that the requester has uploaded.
fn imported(job: &JobDescription, tables: &mut Tables) -> Result<BTreeMap<String, Tensor>, String> {
    let network = Network::parse(job.network().unwrap_or_default());
    let network = network.map_err(|err| err.to_string())?;
    let (_, rows) = tables
        .size(UPLOAD_IMAGES)
        .ok_or("there are no rows of the uploaded weights")?;
    let rows: Vec<u32> = (0..rows as u32).collect();
    let words = tables.gather(UPLOAD_IMAGES, &rows);
    let words = words.map_err(|err| err.to_string())?;
    let tensors = import_tensors(&network, &words);
    tensors.ok_or_else(|| {
        format!(
            "the upload holds {} words, which are not the weights of network {}",
            words.len(),
            network.name
        )
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
