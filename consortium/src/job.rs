//! A job description: everything that decides what is computed and who learns what, in one
//! canonical value whose hash the nodes compare and institutions approve.

use std::fmt;
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_models::job::{DatasetRef, JobKind, PredictOutput};
use trefoil_models::neighbours::Queries;
use trefoil_models::{NeighbourSpec, ServeSpec};
use trefoil_protocol::plan::LinkProfile;
use trefoil_transport::Pin;

use crate::{Hex, ModelRef};

/// Version of the description's format.
pub const JOB_VERSION: u32 = 4;
/// Longest description that is accepted.
pub const JOB_MAX_BYTES: usize = 1 << 20;
/// Longest name of a job, data set, model or member.
const NAME_MAX_BYTES: usize = 64;
/// Longest wall time a job may ask for: thirty days.
const WALL_TIME_MAX_S: u64 = 30 * 24 * 3600;

/// What a serving job's wall time has beyond its duration: beginning and end.
pub const SERVE_MARGIN_S: u64 = 600;

/// SHA-256 of a job description.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobId(pub [u8; 32]);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobId({self})")
    }
}

/// Bounds that a job sets itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The session ends with an error after this long.
    pub wall_time_s: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            wall_time_s: 24 * 3600,
        }
    }
}

/// What is to be computed, for whom, within which limits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobDescription {
    /// Version of this format: [`JOB_VERSION`].
    pub version: u32,
    /// A name for people.
    pub name: String,
    /// Who asked; everything the job reveals goes to this key's holder alone.
    pub requester: Pin,
    /// The computation.
    pub kind: JobKind,
    /// Its limits.
    pub limits: Limits,
    /// The parties write their shares of the carried state down after so many training steps of an
    /// epoch, and at its end; 0: never, and a job that is interrupted begins anew.
    pub checkpoint_every: u64,
    /// The links between the nodes: what the programs are lowered for.
    pub link: LinkProfile,
    /// Makes the hash of a repeated job another one.
    pub nonce: [u8; 16],
}

/// Why a description is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// Of another version.
    #[error(
        "the job has format version {found}, this node reads {JOB_VERSION} ({})",
        crate::SOFTWARE
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// A field that is out of its range.
    #[error("job field {field}: {detail}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// Longer than accepted.
    #[error("the job has {found} bytes, at most {JOB_MAX_BYTES} are accepted")]
    TooLong {
        /// Its length.
        found: usize,
    },
}

/// Checks that a text can name something in files and messages.
pub fn check_name(name: &str) -> Result<(), String> {
    let fits = (1..=NAME_MAX_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !name.starts_with('.');
    if fits {
        return Ok(());
    }
    Err(format!(
        "{:?} is no name: 1 to {NAME_MAX_BYTES} letters, digits, '-', '_' and '.' (not first) are possible",
        name.chars().take(NAME_MAX_BYTES + 1).collect::<String>()
    ))
}

impl JobDescription {
    /// A description with default limits and a fresh nonce.
    ///
    /// # Errors
    /// The operating system gives no random bytes.
    pub fn new(name: &str, requester: Pin, kind: JobKind) -> Result<JobDescription, String> {
        Ok(JobDescription {
            version: JOB_VERSION,
            name: name.into(),
            requester,
            kind,
            limits: Limits::default(),
            checkpoint_every: 0,
            link: LinkProfile::default(),
            nonce: crate::random_bytes()?,
        })
    }

    /// The canonical bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("strings, numbers and byte arrays have a postcard form")
    }

    /// The job hash.
    pub fn id(&self) -> JobId {
        JobId(
            Sha256::new()
                .chain_update(b"trefoil job v2\0")
                .chain_update(self.to_bytes())
                .finalize()
                .into(),
        )
    }

    /// Checks version, names and limits. What the computation itself allows is the schedule's word.
    pub fn check(&self) -> Result<(), JobError> {
        if self.version != JOB_VERSION {
            return Err(JobError::Version {
                found: self.version,
            });
        }
        let found = self.to_bytes().len();
        if found > JOB_MAX_BYTES {
            return Err(JobError::TooLong { found });
        }
        let name = |field, name: &str| {
            check_name(name).map_err(|detail| JobError::Field { field, detail })
        };
        name("name", &self.name)?;
        if let Some(model) = self.model() {
            let parsed = ModelRef::parse(model);
            parsed.map_err(|detail| JobError::Field {
                field: "model",
                detail,
            })?;
        }
        match &self.kind {
            JobKind::Train {
                dataset,
                save_as,
                spec,
                ..
            } => {
                name("dataset.name", &dataset.name)?;
                name("save_as", save_as)?;
                if let Some(model) = spec.start_from.as_ref().filter(|m| !m.contains('@')) {
                    // What is approved is one model, not whichever is the newest then.
                    return Err(JobError::Field {
                        field: "start_from",
                        detail: format!("{model:?} has no version: {model}@VERSION is needed"),
                    });
                }
            }
            JobKind::Evaluate { dataset, .. } => name("dataset.name", &dataset.name)?,
            JobKind::Predict { upload, .. } => name("upload", upload)?,
            JobKind::RevealModel { .. } => {}
            JobKind::ImportModel {
                upload, save_as, ..
            } => {
                name("upload", upload)?;
                name("save_as", save_as)?;
            }
            JobKind::Serve(spec) => {
                if self.limits.wall_time_s < spec.duration_s + SERVE_MARGIN_S {
                    let detail = format!(
                        "a session that serves for {} s needs {SERVE_MARGIN_S} s more",
                        spec.duration_s
                    );
                    return Err(JobError::Field {
                        field: "limits.wall_time_s",
                        detail,
                    });
                }
            }
            JobKind::Neighbours(spec) => {
                name("dataset.name", &spec.dataset.name)?;
                if let Queries::Upload { upload, .. } = &spec.queries {
                    name("upload", upload)?;
                }
            }
            JobKind::Benchmark { .. } => {}
        }
        if !(1..=WALL_TIME_MAX_S).contains(&self.limits.wall_time_s) {
            let detail = format!(
                "1 to {WALL_TIME_MAX_S} are possible, found {}",
                self.limits.wall_time_s
            );
            return Err(JobError::Field {
                field: "limits.wall_time_s",
                detail,
            });
        }
        Ok(())
    }

    /// The data set that the job reads, if it reads one.
    pub fn dataset(&self) -> Option<&DatasetRef> {
        match &self.kind {
            JobKind::Train { dataset, .. } | JobKind::Evaluate { dataset, .. } => Some(dataset),
            JobKind::Neighbours(spec) => Some(&spec.dataset),
            JobKind::Predict { .. }
            | JobKind::Benchmark { .. }
            | JobKind::RevealModel { .. }
            | JobKind::ImportModel { .. }
            | JobKind::Serve(_) => None,
        }
    }

    /// The kept model that the job reads, if it reads one.
    pub fn model(&self) -> Option<&str> {
        match &self.kind {
            JobKind::Train { spec, .. } => spec.start_from.as_deref(),
            JobKind::Benchmark { .. } | JobKind::ImportModel { .. } | JobKind::Neighbours(_) => {
                None
            }
            JobKind::Evaluate { model, .. }
            | JobKind::Predict { model, .. }
            | JobKind::RevealModel { model, .. } => Some(model),
            JobKind::Serve(spec) => Some(&spec.model),
        }
    }

    /// The name under which the job keeps a model, if it makes one.
    pub fn save_as(&self) -> Option<&str> {
        match &self.kind {
            JobKind::Train { save_as, .. } | JobKind::ImportModel { save_as, .. } => Some(save_as),
            _ => None,
        }
    }

    /// The network's text, if the job has a network that its requester chose.
    pub fn network(&self) -> Option<&str> {
        match &self.kind {
            JobKind::Train { network, .. }
            | JobKind::Evaluate { network, .. }
            | JobKind::Predict { network, .. }
            | JobKind::RevealModel { network, .. }
            | JobKind::ImportModel { network, .. } => Some(network),
            JobKind::Serve(spec) => Some(&spec.network),
            JobKind::Benchmark { .. } | JobKind::Neighbours(_) => None,
        }
    }

    /// What the job serves, if it does.
    pub fn serves(&self) -> Option<&ServeSpec> {
        match &self.kind {
            JobKind::Serve(spec) => Some(spec),
            _ => None,
        }
    }

    /// The upload that the job reads, if it reads one.
    pub fn upload(&self) -> Option<&str> {
        match &self.kind {
            JobKind::Predict { upload, .. }
            | JobKind::ImportModel { upload, .. }
            | JobKind::Neighbours(NeighbourSpec {
                queries: Queries::Upload { upload, .. },
                ..
            }) => Some(upload),
            _ => None,
        }
    }

    /// The ring's width and the fraction bits.
    pub fn format(&self) -> (u8, u8) {
        match &self.kind {
            JobKind::Train { spec, .. } => (spec.ring_bits, spec.frac_bits),
            JobKind::Evaluate {
                ring_bits,
                frac_bits,
                ..
            }
            | JobKind::Predict {
                ring_bits,
                frac_bits,
                ..
            }
            | JobKind::Benchmark {
                ring_bits,
                frac_bits,
                ..
            }
            | JobKind::RevealModel {
                ring_bits,
                frac_bits,
                ..
            }
            | JobKind::ImportModel {
                ring_bits,
                frac_bits,
                ..
            } => (*ring_bits, *frac_bits),
            JobKind::Serve(spec) => (spec.ring_bits, spec.frac_bits),
            JobKind::Neighbours(spec) => (spec.ring_bits, spec.frac_bits),
        }
    }

    /// What is computed and what is revealed to whom, in words. `requester` is the key holder's name.
    pub fn describe(&self, requester: &str) -> String {
        let mut text = format!("Job {} ({})\n", self.name, self.id());
        let mut line = |label: &str, words: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {label:<10} {words}");
        };
        let network = |toml: &str| {
            let name = toml
                .lines()
                .find_map(|line| line.trim().strip_prefix("name")?.trim().strip_prefix('='));
            name.map_or("a network".into(), |name| {
                format!("network {}", name.trim().trim_matches('"'))
            })
        };
        let snapshot = |dataset: &DatasetRef| {
            format!(
                "data set {} ({} training rows, {} test rows, snapshot {})",
                dataset.name,
                dataset.train_rows,
                dataset.test_rows,
                Hex(&dataset.snapshot[..8])
            )
        };
        match &self.kind {
            JobKind::Train {
                network: toml,
                spec,
                dataset,
                evaluate_each_epoch,
                save_as,
                reveal_weights,
            } => {
                line(
                    "computes",
                    format!("training of {} on {}", network(toml), snapshot(dataset)),
                );
                line("with", spec.describe());
                if let Some(model) = &spec.start_from {
                    line("starts", format!("from the kept weights of model {model}"));
                }
                line(
                    "keeps",
                    format!("shares of the weights at the three parties, as {save_as}"),
                );
                if *evaluate_each_epoch {
                    line(
                        "reveals",
                        format!(
                            "to {requester}: the confusion matrix on the test split, every epoch"
                        ),
                    );
                }
                if let Some(rule) = &spec.early_stop {
                    line(
                        "REVEALS",
                        format!(
                            "to the three parties and {requester}: how many of {} validation rows are right, after every epoch",
                            rule.validation_rows
                        ),
                    );
                    line(
                        "reveals",
                        "to the dealer: after which epoch training stops".into(),
                    );
                }
                if *reveal_weights {
                    line(
                        "REVEALS",
                        format!(
                            "to {requester}: THE TRAINED WEIGHTS, which are no secret any more"
                        ),
                    );
                }
                if !evaluate_each_epoch && !reveal_weights && spec.early_stop.is_none() {
                    line("reveals", "nothing".into());
                }
            }
            JobKind::Evaluate {
                model,
                network: toml,
                dataset,
                auc,
                calibration,
                by_hospital,
                ..
            } => {
                line(
                    "computes",
                    format!(
                        "evaluation of model {model} ({}) on {}",
                        network(toml),
                        snapshot(dataset)
                    ),
                );
                let auc = if *auc {
                    " and the area under the ROC curve"
                } else {
                    ""
                };
                line(
                    "reveals",
                    format!("to {requester}: the confusion matrix on the test split{auc}"),
                );
                if *calibration {
                    line(
                        "reveals",
                        format!(
                            "to {requester}: in ten bins of the predicted class's probability the number of rows, of right ones, and their mean probability"
                        ),
                    );
                }
                if !by_hospital.is_empty() {
                    let each = by_hospital
                        .iter()
                        .map(|each| format!("{} ({} rows)", Hex(&each.hospital[..8]), each.rows));
                    let each: Vec<String> = each.collect();
                    line(
                        "REVEALS",
                        format!(
                            "to {requester}: A CONFUSION MATRIX OF EACH HOSPITAL'S ROWS, by the first digits of their public keys: {}",
                            each.join(", ")
                        ),
                    );
                }
            }
            JobKind::Predict {
                model,
                network: toml,
                rows,
                upload,
                output,
                ..
            } => {
                line(
                    "computes",
                    format!(
                        "predictions of model {model} ({}) for {rows} images",
                        network(toml)
                    ),
                );
                line(
                    "reads",
                    format!("upload {upload}, which only {requester} may use"),
                );
                line(
                    "reveals",
                    format!("to {requester}: {}", output_words(*output)),
                );
            }
            JobKind::RevealModel {
                model,
                network: toml,
                ..
            } => {
                line("opens", format!("model {model} ({})", network(toml)));
                line(
                    "REVEALS",
                    format!("to {requester}: THE MODEL'S WEIGHTS, which are no secret any more"),
                );
            }
            JobKind::ImportModel {
                network: toml,
                upload,
                save_as,
                ..
            } => {
                line(
                    "keeps",
                    format!(
                        "weights that {requester} has shared (upload {upload}) as model {save_as} ({})",
                        network(toml)
                    ),
                );
                line("reveals", "nothing".into());
            }
            JobKind::Serve(spec) => {
                line(
                    "serves",
                    format!(
                        "predictions of model {} ({}) for {} s, without asking again",
                        spec.model,
                        network(&spec.network),
                        spec.duration_s
                    ),
                );
                let members = spec.members.iter().map(|pin| Hex(&pin[..8]).to_string());
                let members: Vec<String> = members.collect();
                line(
                    "to",
                    format!(
                        "{} members, by the first digits of their public keys: {}",
                        members.len(),
                        members.join(" ")
                    ),
                );
                let what = output_words(spec.output);
                line("reveals", format!("to each, of its own images: {what}"));
                let day = match spec.rows_per_day {
                    0 => "as many images of a member on one day as each party allows".into(),
                    rows => format!("{rows} images of a member on one day (UTC)"),
                };
                line(
                    "at most",
                    format!(
                        "{day}; {} images in a batch, which waits {} ms; {} requests wait",
                        spec.max_batch, spec.max_wait_ms, spec.max_pending
                    ),
                );
            }
            JobKind::Neighbours(spec) => {
                let near = format!(
                    "the class of each by its {} nearest training rows of {}",
                    spec.k,
                    snapshot(&spec.dataset)
                );
                match &spec.queries {
                    Queries::Upload { rows, upload } => {
                        line("computes", format!("of {rows} images {near}"));
                        let words = format!("upload {upload}, which only {requester} may use");
                        line("reads", words);
                        let from = match spec.k {
                            1 => "it is the label of one training row".into(),
                            k => format!("it follows from the labels of {k} training rows"),
                        };
                        let words = format!(
                            "to {requester}: the class of each image, nothing else; {from}"
                        );
                        line("reveals", words);
                    }
                    Queries::Test => {
                        line("computes", format!("of the test rows {near}"));
                        let words =
                            format!("to {requester}: the confusion matrix on the test split");
                        line("reveals", words);
                    }
                }
            }
            JobKind::Benchmark {
                work, repetitions, ..
            } => {
                let work = work.describe();
                line(
                    "measures",
                    format!("{repetitions} times {work}; reads no data"),
                );
                line(
                    "reveals",
                    format!("to {requester}: nothing but results on public numbers"),
                );
            }
        }
        line(
            "links",
            format!(
                "as if a round trip took {} ms and a link carried {} Mbit/s",
                f64::from(self.link.rtt_us) / 1e3,
                f64::from(self.link.kbit_per_s) / 1e3
            ),
        );
        if self.checkpoint_every > 0 {
            let words = format!(
                "shares of its state at the three parties, every {} steps and every epoch, until it is over",
                self.checkpoint_every
            );
            line("keeps", words);
        }
        line("limits", format!("at most {} s", self.limits.wall_time_s));
        text
    }
}

fn output_words(output: PredictOutput) -> &'static str {
    match output {
        PredictOutput::Class => "the most probable class of each image, nothing else",
        PredictOutput::Logits => "the last layer's outputs for each image",
        PredictOutput::Probabilities => "the probability of each class for each image",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trefoil_models::job::TrainSpec;

    fn train() -> JobDescription {
        let kind = JobKind::Train {
            network: "name = \"mlp\"".into(),
            spec: TrainSpec::default(),
            dataset: DatasetRef {
                name: "digits".into(),
                train_rows: 10,
                test_rows: 2,
                snapshot: [7; 32],
            },
            evaluate_each_epoch: true,
            save_as: "digits-mlp".into(),
            reveal_weights: true,
        };
        JobDescription::new("first", Pin::from_bytes([1; 32]), kind).unwrap()
    }

    #[test]
    fn the_hash_changes_with_what_is_revealed_and_the_words_say_it() {
        let job = train();
        job.check().unwrap();
        let mut other = job.clone();
        if let JobKind::Train { reveal_weights, .. } = &mut other.kind {
            *reveal_weights = false;
        }
        assert_ne!(job.id(), other.id());
        let words = job.describe("st-anna");
        assert!(
            words.contains("to st-anna: THE TRAINED WEIGHTS") && words.contains("network mlp"),
            "{words}"
        );
        assert!(!other.describe("st-anna").contains("WEIGHTS"));
        let read: JobDescription = postcard::from_bytes(&job.to_bytes()).unwrap();
        assert_eq!(read, job);
    }

    fn words(job: &JobDescription) -> String {
        job.check().unwrap();
        job.describe("st-anna")
    }

    #[test]
    fn a_start_and_an_early_stop_are_said_and_a_start_names_its_version() {
        let mut job = train();
        let plain = words(&job);
        assert!(
            !plain.contains("starts") && !plain.contains("dealer"),
            "{plain}"
        );
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.start_from = Some("base@0123456789abcdef".into());
            spec.early_stop = Some(trefoil_models::EarlyStop {
                patience: 2,
                min_delta: 0.001,
                validation_rows: 400,
            });
        }
        let said = words(&job);
        for part in [
            "from the kept weights of model base@0123456789abcdef",
            "REVEALS    to the three parties and st-anna: how many of 400 validation rows are right",
            "reveals    to the dealer: after which epoch training stops",
            "early stop after 2 epochs",
        ] {
            assert!(said.contains(part), "{part:?} is not in:\n{said}");
        }
        for wrong in [
            "base",
            "base@",
            "base@0123",
            "base@0123456z",
            "../b@01234567",
        ] {
            if let JobKind::Train { spec, .. } = &mut job.kind {
                spec.start_from = Some(wrong.into());
            }
            assert!(job.check().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_an_evaluation_reveals_beside_its_matrix_is_said() {
        let mut job = train();
        let JobKind::Train { dataset, .. } = job.kind.clone() else {
            unreachable!()
        };
        let kind = |calibration, by_hospital| JobKind::Evaluate {
            model: "m@01234567".into(),
            network: String::new(),
            frac_bits: 16,
            ring_bits: 64,
            dataset: dataset.clone(),
            auc: false,
            calibration,
            by_hospital,
        };
        job.kind = kind(false, Vec::new());
        let plain = words(&job);
        assert!(
            !plain.contains("bins") && !plain.contains("HOSPITAL"),
            "{plain}"
        );
        let anna = trefoil_models::HospitalRows {
            hospital: [0xab; 32],
            rows: 2,
        };
        job.kind = kind(true, vec![anna]);
        let said = words(&job);
        assert!(
            said.contains("in ten bins of the predicted class"),
            "{said}"
        );
        let part = "A CONFUSION MATRIX OF EACH HOSPITAL'S ROWS, by the first digits of their public keys: abababababababab (2 rows)";
        assert!(said.contains(part), "{said}");
    }

    #[test]
    fn what_nearest_rows_tell_is_said_and_to_whom() {
        let mut job = train();
        let JobKind::Train { dataset, .. } = job.kind.clone() else {
            unreachable!()
        };
        let kind = |k, queries| {
            JobKind::Neighbours(NeighbourSpec {
                dataset: dataset.clone(),
                input: [1, 2, 2],
                classes: 3,
                k,
                frac_bits: 13,
                ring_bits: 64,
                queries,
            })
        };
        let images = |upload: &str| Queries::Upload {
            rows: 4,
            upload: upload.into(),
        };
        let near = "training rows of data set digits (10 training rows, 2 test rows, snapshot 0707070707070707)";
        let lines = |job: &JobDescription| -> Vec<String> {
            let said = words(job);
            let lines = said.lines().map(str::trim).map(str::to_owned);
            lines
                .filter(|line| {
                    ["computes", "reads", "reveals"]
                        .iter()
                        .any(|l| line.starts_with(l))
                })
                .collect()
        };
        job.kind = kind(3, images("new"));
        let three = job.id();
        assert_eq!(
            lines(&job),
            [
                format!("computes   of 4 images the class of each by its 3 nearest {near}"),
                "reads      upload new, which only st-anna may use".into(),
                "reveals    to st-anna: the class of each image, nothing else; it follows from the labels of 3 training rows".into(),
            ]
        );
        // Of one neighbour it is more than a vote.
        job.kind = kind(1, images("new"));
        assert_ne!(job.id(), three);
        assert_eq!(
            lines(&job)[2],
            "reveals    to st-anna: the class of each image, nothing else; it is the label of one training row"
        );
        job.kind = kind(3, Queries::Test);
        assert_eq!(
            lines(&job),
            [
                format!("computes   of the test rows the class of each by its 3 nearest {near}"),
                "reveals    to st-anna: the confusion matrix on the test split".into(),
            ]
        );
        job.kind = kind(3, images("../keys"));
        assert!(job.check().unwrap_err().to_string().contains("upload"));
    }

    #[test]
    fn a_name_that_leaves_its_folder_is_refused() {
        let mut job = train();
        if let JobKind::Train { save_as, .. } = &mut job.kind {
            *save_as = "../keys".into();
        }
        assert!(job.check().unwrap_err().to_string().contains("save_as"));
        job.version = JOB_VERSION + 1;
        let found = job.version;
        assert_eq!(job.check(), Err(JobError::Version { found }));
    }
}
