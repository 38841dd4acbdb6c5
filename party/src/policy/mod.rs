//! A party's policy: the first rule that fits a job decides; and the predictions of the day, which
//! survive restarts in `home/predictions.json`. The rules' form is `trefoil_consortium::config`'s.

mod facts;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use trefoil_consortium::JobDescription;
use trefoil_consortium::config::{Kind, Output, Policy, Rule, Verdict};
use trefoil_consortium::wire::ModelInfo;
use trefoil_models::neighbours::Queries;
use trefoil_models::{JobKind, NeighbourSpec};
use trefoil_transport::Pin;

use crate::files::{self, FileError};
use facts::{Facts, fits};

const SECONDS_PER_DAY: u64 = 86_400;
/// Version of the file of counts.
const COUNTS_VERSION: u32 = 1;
/// Longest file of counts: ten thousand members.
const COUNTS_MAX_BYTES: u64 = 4 << 20;

/// What the policy says of a job that it does not refuse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ruling {
    /// Whether a person has to approve it here.
    pub(crate) ask: bool,
    /// The rule's name, or why none was needed.
    pub(crate) rule: String,
}

/// The rules, and the predictions of the day.
#[derive(Debug)]
pub(crate) struct PolicyDesk {
    policy: Policy,
    /// The party, as refusals name it.
    party: String,
    path: PathBuf,
    counts: Mutex<Counts>,
}

/// Rows predicted for each requester on one day.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counts {
    version: u32,
    /// Days since 1970, UTC.
    day: u64,
    rows: BTreeMap<String, u64>,
}

impl Counts {
    /// The counts that hold at a time. A clock that goes back begins no new day.
    fn at(&self, now_s: u64) -> Counts {
        let day = (now_s / SECONDS_PER_DAY).max(self.day);
        let rows = match day == self.day {
            true => self.rows.clone(),
            false => BTreeMap::new(),
        };
        Counts {
            version: COUNTS_VERSION,
            day,
            rows,
        }
    }
}

impl PolicyDesk {
    /// Reads the counts of the home. `party` is how refusals name it.
    ///
    /// # Errors
    /// A file of counts that cannot be read: a limit must not begin anew by accident.
    pub(crate) fn open(
        home: &Path,
        policy: Policy,
        party: String,
    ) -> Result<PolicyDesk, FileError> {
        let path = home.join("predictions.json");
        let damaged = |detail: String| FileError::Content {
            path: path.clone(),
            detail: format!("{detail}; remove it to begin the day's counts of predictions anew"),
        };
        let counts = match files::read(&path, COUNTS_MAX_BYTES)? {
            None => Counts::default(),
            Some(bytes) => {
                let counts: Counts =
                    serde_json::from_slice(&bytes).map_err(|err| damaged(err.to_string()))?;
                if counts.version != COUNTS_VERSION {
                    return Err(damaged(format!(
                        "version {}, this software reads {COUNTS_VERSION}",
                        counts.version
                    )));
                }
                counts
            }
        };
        Ok(PolicyDesk {
            policy,
            party,
            path,
            counts: Mutex::new(counts),
        })
    }

    /// How long a job may wait.
    pub(crate) fn approval_timeout_s(&self) -> u64 {
        self.policy.approval_timeout_s
    }

    /// What becomes of a job; the error is a refusal that names party and rule and says what to do.
    #[cfg(test)]
    pub(crate) fn rule(
        &self,
        job: &JobDescription,
        requester: &str,
        now_s: u64,
    ) -> Result<Ruling, String> {
        self.rule_for(job, requester, &[], now_s)
    }

    /// As the rules say, for a job from which the members `served` learn something too: they need
    /// the permission that the requester needs.
    pub(crate) fn rule_for(
        &self,
        job: &JobDescription,
        requester: &str,
        served: &[String],
        now_s: u64,
    ) -> Result<Ruling, String> {
        self.judge(job, requester, served, Some(now_s))
    }

    /// As [`PolicyDesk::rule_for`], for a job whose predictions are counted already: it has begun.
    pub(crate) fn rule_again(
        &self,
        job: &JobDescription,
        requester: &str,
    ) -> Result<Ruling, String> {
        self.judge(job, requester, &[], None)
    }

    fn judge(
        &self,
        job: &JobDescription,
        requester: &str,
        served: &[String],
        uncounted_s: Option<u64>,
    ) -> Result<Ruling, String> {
        let party = &self.party;
        let names: Vec<&str> = std::iter::once(requester)
            .chain(served.iter().map(String::as_str))
            .collect();
        let known = |name: &str| self.policy.requesters.iter().any(|known| known == name);
        if let Some(stranger) = names.iter().find(|name| !known(name)) {
            return Err(format!(
                "policy of {party}: {stranger} may not start jobs; add it to [policy] requesters in this party's configuration"
            ));
        }
        let facts = Facts::of(job)?;
        let fits = |rule: &&Rule| fits(rule, &names, &facts);
        let rule = self.policy.rules.iter().find(fits);
        self.let_hospitals_out(&facts, rule)?;
        let Some(rule) = rule else {
            let benchmark = facts.kind == Kind::Benchmark;
            let why = if benchmark {
                "benchmarks read no data"
            } else {
                "no rule fits"
            };
            return Ok(Ruling {
                ask: !benchmark,
                rule: why.into(),
            });
        };
        if rule.verdict == Verdict::Refuse {
            return Err(format!(
                "policy of {party}: rule {:?} refuses {}; change the job, or ask this party's operator, who sets [policy] in its configuration",
                rule.name,
                facts.describe(requester)
            ));
        }
        if let (Some(limit), Some(now_s)) = (rule.rows_per_day, uncounted_s) {
            let used = self.used(job.requester, now_s);
            if used.saturating_add(facts.rows) > limit {
                return Err(format!(
                    "policy of {party}: rule {:?} gives {requester} {limit} predictions a day (UTC), {used} are used and this job asks for {}; ask for fewer, or tomorrow",
                    rule.name, facts.rows
                ));
            }
        }
        Ok(Ruling {
            ask: rule.verdict == Verdict::Ask,
            rule: rule.name.clone(),
        })
    }

    /// Figures by hospital need a rule that names them, whoever approves, and enough rows.
    fn let_hospitals_out(&self, facts: &Facts<'_>, rule: Option<&Rule>) -> Result<(), String> {
        let Some(fewest) = facts.fewest_rows else {
            return Ok(());
        };
        let party = &self.party;
        let outputs = rule.and_then(|rule| rule.outputs.as_ref());
        if !outputs.is_some_and(|outputs| outputs.contains(&Output::Hospitals)) {
            return Err(format!(
                "policy of {party}: figures by hospital are not let out here: a rule has to name the output \"hospitals\""
            ));
        }
        let least = self.policy.hospital_rows_min;
        if fewest < least {
            return Err(format!(
                "policy of {party}: a hospital with figures of its own needs {least} test rows (hospital_rows_min), one has {fewest}"
            ));
        }
        Ok(())
    }

    /// Whether `member` may have a model removed: its owner may unless a rule for the kind `remove`
    /// refuses it, others where one allows it. Rules that do not name the kind do not speak of
    /// removals.
    pub(crate) fn may_remove(
        &self,
        model: &ModelInfo,
        member: Pin,
        name: &str,
    ) -> Result<(), String> {
        let party = &self.party;
        let facts = Facts {
            kind: Kind::Remove,
            dataset: None,
            models: vec![&model.name],
            network: None,
            outputs: Vec::new(),
            rows: 0,
            fewest_rows: None,
        };
        let mut rules = self.policy.rules.iter();
        let rule = rules.find(|rule| rule.kinds.is_some() && fits(rule, &[name], &facts));
        match (rule.map(|rule| rule.verdict), model.owner == member) {
            (Some(Verdict::Allow), false) if !self.policy.requesters.iter().any(|n| n == name) => {
                Err(format!(
                    "policy of {party}: {name} is not among its requesters"
                ))
            }
            (Some(Verdict::Allow), _) | (None, true) => Ok(()),
            (Some(Verdict::Ask | Verdict::Refuse), _) => Err(format!(
                "policy of {party}: rule {:?} keeps model {} from being removed by {name}",
                rule.map(|rule| rule.name.as_str()).unwrap_or_default(),
                model.name
            )),
            (None, false) => Err(format!(
                "model {} belongs to another member, who alone may remove it at {party}",
                model.name
            )),
        }
    }

    /// Images of one member a day that a serving job may take: the job's own bound, and that of the
    /// rule that it fits.
    pub(crate) fn served_rows(
        &self,
        job: &JobDescription,
        requester: &str,
        served: &[String],
    ) -> Result<u64, String> {
        let facts = Facts::of(job)?;
        // Each one's own rule counts too, so that naming others beside it loosens nothing.
        let names: Vec<&str> = std::iter::once(requester)
            .chain(served.iter().map(String::as_str))
            .collect();
        let alone = names.iter().map(std::slice::from_ref);
        let rules = alone.chain([&names[..]]).filter_map(|names| {
            let mut rules = self.policy.rules.iter();
            rules.find(|rule| fits(rule, names, &facts))
        });
        let own = job.serves().map(|spec| spec.rows_per_day);
        let own = own.filter(|rows| *rows > 0).unwrap_or(u64::MAX);
        let strictest = rules.filter_map(|rule| rule.rows_per_day).min();
        Ok(own.min(strictest.unwrap_or(u64::MAX)))
    }

    /// Counts images that a serving session takes of a member, in memory until
    /// [`PolicyDesk::keep_counts`].
    pub(crate) fn take_rows(
        &self,
        member: Pin,
        name: &str,
        rows: u64,
        limit: u64,
        now_s: u64,
    ) -> Result<(), String> {
        let mut held = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *held = held.at(now_s);
        let used = held.rows.entry(member.to_string()).or_default();
        let sum = used.saturating_add(rows);
        if sum > limit {
            return Err(format!(
                "{} gives {name} {limit} predictions a day (UTC), {used} are used and this request asks for {rows}; ask for fewer, or tomorrow",
                self.party
            ));
        }
        *used = sum;
        Ok(())
    }

    /// Writes the day's counts.
    pub(crate) fn keep_counts(&self) -> Result<(), FileError> {
        let held = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&held)
    }

    fn write(&self, counts: &Counts) -> Result<(), FileError> {
        let text = serde_json::to_vec(counts).map_err(|err| FileError::Content {
            path: self.path.clone(),
            detail: err.to_string(),
        })?;
        files::write(&self.path, &text)
    }

    /// Predictions of the day so far.
    fn used(&self, requester: Pin, now_s: u64) -> u64 {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = counts.at(now_s);
        counts
            .rows
            .get(&requester.to_string())
            .copied()
            .unwrap_or(0)
    }

    /// Counts the predictions of a job that is about to run; does nothing for other jobs. They are
    /// on the disk before the first of them can leave.
    pub(crate) fn count(&self, job: &JobDescription, now_s: u64) -> Result<(), FileError> {
        let rows = predicted_rows(&job.kind);
        if rows == 0 {
            return Ok(());
        }
        let mut held = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut counts = held.at(now_s);
        let used = counts.rows.entry(job.requester.to_string()).or_default();
        *used = used.saturating_add(rows);
        self.write(&counts)?;
        *held = counts;
        Ok(())
    }
}

fn predicted_rows(kind: &JobKind) -> u64 {
    match kind {
        JobKind::Predict { rows, .. } => *rows as u64,
        JobKind::Neighbours(NeighbourSpec {
            queries: Queries::Upload { rows, .. },
            ..
        }) => *rows as u64,
        // A serving job's images are counted when they come.
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
