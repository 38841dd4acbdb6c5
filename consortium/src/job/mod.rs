//! A job description: everything that decides what is computed and who learns what, in one
//! canonical value whose hash the nodes compare and institutions approve. `words.rs` says it to them.

mod words;

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_models::job::{DatasetRef, JobKind};
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
}

#[cfg(test)]
mod tests;
