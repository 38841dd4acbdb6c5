//! The operator's desk: through files in the party's home a person on the party's host sees its
//! jobs and decides on them. Whoever may write to the home, is the operator; nothing else is asked.
//!
//! ```text
//! home/jobs/HASH.json         a job and where it stands, written by the party alone
//! home/approvals/HASH.json    a decision, written by the operator's tool, taken by the party
//! ```
//! A file is written whole or not at all. The party looks for decisions every second; what they do
//! is `consent.rs`'s business.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trefoil_consortium::{JobDescription, JobId, Mark, hex};
use trefoil_transport::Pin;

use crate::files::{self, FileError};

/// Version of both kinds of files.
const DESK_VERSION: u32 = 1;
/// Longest file of a job: its description in hexadecimal digits, and some words.
const RECORD_MAX_BYTES: u64 = 4 << 20;
/// Longest decision.
const DECISION_MAX_BYTES: u64 = 64 << 10;
/// Jobs that are over whose files are kept.
const PAST_MAX: usize = 1_000;
/// Fewest digits that name a job.
const PREFIX_MIN: usize = 8;

/// Where a job stands at a party.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for approval here.
    Held,
    /// May run here; waits for its turn or for the other parties.
    Waiting,
    /// A session runs.
    Running,
    /// Done.
    Done,
    /// Ended with an error.
    Failed,
    /// Turned down by this party's operator.
    Denied,
    /// Ended by this party's operator.
    Cancelled,
    /// Taken back by its requester.
    Withdrawn,
    /// Waited for too long.
    Expired,
}

impl JobState {
    /// Whether nothing more happens to the job.
    pub fn over(self) -> bool {
        !matches!(self, JobState::Held | JobState::Waiting | JobState::Running)
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            JobState::Held => "held",
            JobState::Waiting => "waiting",
            JobState::Running => "running",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Denied => "denied",
            JobState::Cancelled => "cancelled",
            JobState::Withdrawn => "withdrawn",
            JobState::Expired => "expired",
        })
    }
}

/// A job as a party's home has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRecord {
    version: u32,
    /// The job hash, 64 hexadecimal digits.
    pub job: String,
    /// The job's name.
    pub name: String,
    /// Who asked.
    pub requester: String,
    /// The requester's public key.
    pub pin: Pin,
    /// Seconds since 1970, UTC.
    pub submitted_s: u64,
    /// Where it stands.
    pub state: JobState,
    /// Since when: seconds since 1970, UTC.
    pub since_s: u64,
    /// The policy's rule for it.
    pub rule: String,
    /// Who approved it here, under the core below; empty where nobody has.
    pub approved_by: String,
    /// Hash of the consortium's core under which this party took or restored it, 64 hexadecimal digits;
    /// empty in records of earlier releases.
    #[serde(default)]
    pub core: String,
    /// What there is to say: how it ended, what it waits for.
    pub note: String,
    /// Sessions that were begun here; more than one where some were interrupted.
    #[serde(default)]
    pub attempts: u32,
    /// At P0: the name of the dealer's key of rounding coins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) coins: Option<[u8; 32]>,
    /// At P0: the state that the job has left, where another party may not know yet that it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unconcluded: Option<Mark>,
    /// Its canonical bytes, hexadecimal.
    description: String,
}

impl JobRecord {
    /// A new record of a job.
    pub(crate) fn new(
        job: &JobDescription,
        requester: &str,
        submitted_s: u64,
        state: JobState,
        rule: &str,
    ) -> JobRecord {
        JobRecord {
            version: DESK_VERSION,
            job: job.id().to_string(),
            name: job.name.clone(),
            requester: requester.into(),
            pin: job.requester,
            submitted_s,
            state,
            since_s: submitted_s,
            rule: rule.into(),
            approved_by: String::new(),
            core: String::new(),
            note: String::new(),
            attempts: 0,
            coins: None,
            unconcluded: None,
            description: hex(&job.to_bytes()),
        }
    }

    /// Puts the record under a consortium's core; whether an approval under another one is void now:
    /// what was approved is a job among these parties, not among others.
    pub(crate) fn under(&mut self, core: &[u8; 32]) -> bool {
        let core = hex(core);
        let void = self.core != core && !self.approved_by.is_empty();
        if void {
            self.approved_by.clear();
        }
        self.core = core;
        void
    }

    /// The job itself, whose hash is the record's.
    ///
    /// # Errors
    /// The record holds another job than it says.
    pub fn description(&self) -> Result<JobDescription, String> {
        let digits = self.description.as_bytes().chunks(2);
        let bytes: Option<Vec<u8>> = digits
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect();
        let job = bytes.and_then(|bytes| postcard::from_bytes::<JobDescription>(&bytes).ok());
        let job = job.filter(|job| job.id().to_string() == self.job && job.requester == self.pin);
        job.ok_or_else(|| format!("the record of job {} holds another job", self.job))
    }
}

/// What an operator decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The held job may run.
    Approve,
    /// The held job may not run.
    Deny,
    /// The job ends, wherever it stands.
    Cancel,
}

/// A decision on its way to the party.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    version: u32,
    /// The job hash, 64 hexadecimal digits.
    pub job: String,
    /// What is decided.
    pub choice: Choice,
    /// The operator's name on the host.
    pub by: String,
    /// The operator's words for the requester; may be empty.
    pub reason: String,
    /// The consortium's core under which the operator saw the job, as in its record.
    #[serde(default)]
    pub core: String,
}

impl Decision {
    /// A decision on the job of a record.
    pub fn new(record: &JobRecord, choice: Choice, by: &str, reason: &str) -> Decision {
        Decision {
            version: DESK_VERSION,
            job: record.job.clone(),
            choice,
            by: by.into(),
            reason: reason.into(),
            core: record.core.clone(),
        }
    }
}

fn content(path: &Path, detail: impl fmt::Display) -> FileError {
    FileError::Content {
        path: path.to_owned(),
        detail: detail.to_string(),
    }
}

fn job_path(home: &Path, job: &str) -> PathBuf {
    home.join("jobs").join(format!("{job}.json"))
}

fn decision_path(home: &Path, job: &str) -> PathBuf {
    home.join("approvals").join(format!("{job}.json"))
}

fn read_record(path: &Path) -> Result<Option<JobRecord>, FileError> {
    let Some(bytes) = files::read(path, RECORD_MAX_BYTES)? else {
        return Ok(None);
    };
    let record: JobRecord = serde_json::from_slice(&bytes).map_err(|err| content(path, err))?;
    let named = path.file_stem().is_some_and(|stem| *stem == *record.job);
    if record.version != DESK_VERSION || !named {
        return Err(content(path, "a job's record of another version or name"));
    }
    Ok(Some(record))
}

/// All jobs of a home, the oldest first.
pub fn records(home: &Path) -> Result<Vec<JobRecord>, FileError> {
    let mut records = Vec::new();
    for path in files::list(&home.join("jobs"))? {
        // One may go while others are read.
        records.extend(read_record(&path)?);
    }
    records.sort_by(|a, b| (a.submitted_s, &a.job).cmp(&(b.submitted_s, &b.job)));
    Ok(records)
}

/// One job by its hash or the first digits of it, eight at least.
pub fn find(home: &Path, prefix: &str) -> Result<JobRecord, String> {
    let prefix = prefix.to_ascii_lowercase();
    if prefix.len() < PREFIX_MIN || !prefix.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(format!(
            "{prefix:?} names no job: give its hash, or the first {PREFIX_MIN} digits or more"
        ));
    }
    let mut fitting = Vec::new();
    for path in files::list(&home.join("jobs")).map_err(|err| err.to_string())? {
        let fits = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(&prefix);
        if path.file_name().is_some_and(fits) {
            fitting.extend(read_record(&path).map_err(|err| err.to_string())?);
        }
    }
    match fitting.len() {
        1 => Ok(fitting.swap_remove(0)),
        0 => Err(format!("{}: there is no job {prefix}", home.display())),
        n => Err(format!(
            "{prefix} begins the hashes of {n} jobs: give more digits"
        )),
    }
}

/// Leaves a decision for the party of this home.
pub fn decide(home: &Path, decision: &Decision) -> Result<(), FileError> {
    let path = decision_path(home, &decision.job);
    let text = serde_json::to_vec_pretty(decision).map_err(|err| content(&path, err))?;
    files::write(&path, &text)
}

/// Whether a decision still waits for the party.
pub fn undecided(home: &Path, job: &str) -> bool {
    decision_path(home, job).exists()
}

/// Makes the folders.
pub(crate) fn open(home: &Path) -> Result<(), FileError> {
    files::make_folder(&home.join("jobs"))?;
    files::make_folder(&home.join("approvals"))
}

/// Writes where a job stands.
pub(crate) fn write_record(home: &Path, record: &JobRecord) -> Result<(), FileError> {
    let path = job_path(home, &record.job);
    let text = serde_json::to_vec(record).map_err(|err| content(&path, err))?;
    files::write(&path, &text)
}

/// What the home has of a job.
pub(crate) fn record(home: &Path, job: &JobId) -> Result<Option<JobRecord>, FileError> {
    read_record(&job_path(home, &job.to_string()))
}

/// Forgets the oldest of many jobs that are over; the audit log has them all.
pub(crate) fn prune(home: &Path) -> Result<(), FileError> {
    let mut past = records(home)?;
    past.retain(|record| record.state.over());
    for old in past.iter().take(past.len().saturating_sub(PAST_MAX)) {
        let path = job_path(home, &old.job);
        std::fs::remove_file(&path).map_err(files::at(&path))?;
    }
    Ok(())
}

/// The decisions that wait, each with the operator's name as the host has it. A file that holds
/// none is logged and set aside.
pub(crate) fn decisions(home: &Path) -> Result<Vec<(PathBuf, Decision, String)>, FileError> {
    let mut found = Vec::new();
    for path in files::list(&home.join("approvals"))? {
        let read = files::read(&path, DECISION_MAX_BYTES).and_then(|bytes| {
            let decision: Decision = serde_json::from_slice(&bytes.unwrap_or_default())
                .map_err(|err| content(&path, err))?;
            let named = path.file_stem().is_some_and(|stem| *stem == *decision.job);
            match decision.version == DESK_VERSION && named {
                true => Ok(decision),
                false => Err(content(
                    &path,
                    "a decision of another version or on another job",
                )),
            }
        });
        match read {
            Ok(decision) => {
                let who = operator(&path, &decision.by);
                found.push((path, decision, who));
            }
            Err(err) => {
                tracing::warn!(%err, "a decision that cannot be read is set aside");
                let aside = path.with_extension("unreadable");
                std::fs::rename(&path, &aside).map_err(files::at(&path))?;
            }
        }
    }
    Ok(found)
}

/// A decision has been taken.
pub(crate) fn taken(path: &Path) -> Result<(), FileError> {
    std::fs::remove_file(path).map_err(files::at(path))
}

/// The name that an operator gave, and the number of the user who owns the file.
fn operator(path: &Path, by: &str) -> String {
    let by: String = by.chars().filter(|c| !c.is_control()).take(64).collect();
    #[cfg(unix)]
    if let Ok(about) = std::fs::metadata(path) {
        let uid = std::os::unix::fs::MetadataExt::uid(&about);
        return format!("operator {by} (uid {uid})");
    }
    let _ = path;
    format!("operator {by}")
}

#[cfg(test)]
mod tests {
    use trefoil_models::{Benchmark, JobKind};

    use super::*;

    fn job(name: &str) -> JobDescription {
        let kind = JobKind::Benchmark {
            work: Benchmark::Relu { elements: 8 },
            repetitions: 1,
            frac_bits: 16,
            ring_bits: 64,
        };
        JobDescription::new(name, Pin::from_bytes([1; 32]), kind).unwrap()
    }

    #[test]
    fn a_job_is_found_by_eight_digits_and_holds_what_its_hash_says() {
        let home = tempfile::tempdir().unwrap();
        open(home.path()).unwrap();
        let job = job("first");
        let record = JobRecord::new(&job, "st-anna", 7, JobState::Held, "no rule fits");
        write_record(home.path(), &record).unwrap();
        let found = find(home.path(), &record.job[..8].to_uppercase()).unwrap();
        assert_eq!(found, record);
        assert_eq!(found.description().unwrap(), job);
        assert!(
            find(home.path(), &record.job[..7])
                .unwrap_err()
                .contains("8 digits")
        );
        assert!(find(home.path(), "../../etc").is_err());
        assert!(
            find(home.path(), "0123456789")
                .unwrap_err()
                .contains("no job")
        );
        let mut other = record.clone();
        other.description = hex(&self::job("second").to_bytes());
        assert!(other.description().is_err());
    }

    #[test]
    fn a_decision_arrives_once_and_an_unreadable_one_is_set_aside() {
        let home = tempfile::tempdir().unwrap();
        open(home.path()).unwrap();
        let record = JobRecord::new(&job("first"), "st-anna", 7, JobState::Held, "");
        let decision = Decision::new(&record, Choice::Deny, "jd\u{1b}[2J", "not in May");
        decide(home.path(), &decision).unwrap();
        std::fs::write(home.path().join("approvals/00.json"), "{").unwrap();
        // The name of a file must be the job that it decides on.
        let moved = home.path().join("approvals/11.json");
        std::fs::copy(decision_path(home.path(), &record.job), moved).unwrap();
        let found = decisions(home.path()).unwrap();
        assert_eq!(found.len(), 1);
        let (path, read, who) = &found[0];
        assert_eq!(read, &decision);
        assert!(who.starts_with("operator jd[2J"), "{who}");
        assert!(undecided(home.path(), &record.job));
        taken(path).unwrap();
        assert!(!undecided(home.path(), &record.job));
        assert!(decisions(home.path()).unwrap().is_empty());
    }

    #[test]
    fn an_approval_is_void_under_another_core() {
        let mut record = JobRecord::new(&job("first"), "st-anna", 7, JobState::Held, "");
        assert!(!record.under(&[1; 32]));
        record.approved_by = "operator".into();
        let decision = Decision::new(&record, Choice::Approve, "jd", "");
        assert_eq!(decision.core, hex(&[1; 32]));
        assert!(!record.under(&[1; 32]) && record.approved_by == "operator");
        assert!(record.under(&[2; 32]) && record.approved_by.is_empty());
        assert_ne!(decision.core, record.core);
        // A record of an earlier release says no core.
        let mut old = JobRecord::new(&job("old"), "st-anna", 7, JobState::Waiting, "");
        old.approved_by = "operator".into();
        assert!(old.under(&[1; 32]) && old.approved_by.is_empty());
    }

    #[test]
    fn only_the_oldest_jobs_that_are_over_are_forgotten() {
        let home = tempfile::tempdir().unwrap();
        open(home.path()).unwrap();
        for at in 0..PAST_MAX as u64 + 3 {
            let state = if at == 1 {
                JobState::Held
            } else {
                JobState::Done
            };
            let record = JobRecord::new(&job("past"), "st-anna", at, state, "");
            // Flushing a thousand files would take the test's time.
            let text = serde_json::to_vec(&record).unwrap();
            std::fs::write(job_path(home.path(), &record.job), text).unwrap();
        }
        prune(home.path()).unwrap();
        let left = records(home.path()).unwrap();
        assert_eq!(left.len(), PAST_MAX + 1);
        assert_eq!(left[0].state, JobState::Held);
        assert_eq!(left[1].submitted_s, 3);
    }
}
