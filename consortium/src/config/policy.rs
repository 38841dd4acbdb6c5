//! A party's rules: who may do what, as its configuration says it. Which rule decides a job is
//! `trefoil-party`'s.

use serde::{Deserialize, Serialize};

/// How long a job waits for approval, unless the configuration says otherwise: 7 days.
const APPROVAL_TIMEOUT_S: u64 = 7 * 24 * 3600;
/// Longest such wait: 90 days.
const APPROVAL_TIMEOUT_MAX_S: u64 = 90 * 24 * 3600;
/// Fewest rows of a hospital with figures of its own, unless the configuration says otherwise, and
/// whatever it says.
const HOSPITAL_ROWS_MIN: u64 = 100;
const HOSPITAL_ROWS_LEAST: u64 = 10;
/// Most rules of one party.
const RULES_MAX: usize = 1_000;

/// Who may do what at this party. The first rule that fits a job decides; a job that no rule fits
/// waits for a person, except that benchmarks, which read no data, run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Names of the members who may ask for jobs; none by default. All others are refused.
    pub requesters: Vec<String>,
    /// A job that waits longer than this, here or elsewhere, is given up.
    pub approval_timeout_s: u64,
    /// Fewest test rows that each hospital must have where figures by hospital are revealed: few rows
    /// say much of each.
    pub hospital_rows_min: u64,
    /// In the order in which they are tried.
    pub rules: Vec<Rule>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            requesters: Vec::new(),
            approval_timeout_s: APPROVAL_TIMEOUT_S,
            hospital_rows_min: HOSPITAL_ROWS_MIN,
            rules: Vec::new(),
        }
    }
}

/// One rule. A condition that is left out holds for every job; a job fits where all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its name, for refusals and the audit log.
    pub name: String,
    /// What becomes of a job that fits.
    pub verdict: Verdict,
    /// The requester is one of these members.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requesters: Option<Vec<String>>,
    /// The job is one of these kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kinds: Option<Vec<Kind>>,
    /// The job reads one of these data sets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datasets: Option<Vec<String>>,
    /// The job makes or reads one of these kept models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// The job's network has one of these names. A name is the requester's word: whoever may choose
    /// the network may give it any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
    /// `allow`: everything that the job reveals is among these. `ask` and `refuse`: something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<Vec<Output>>,
    /// A job that fits is refused where the requester's predictions of the day (UTC), its own
    /// included, would be more than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_per_day: Option<u64>,
}

impl Rule {
    /// A rule without conditions.
    pub fn new(name: &str, verdict: Verdict) -> Rule {
        Rule {
            name: name.into(),
            verdict,
            requesters: None,
            kinds: None,
            datasets: None,
            models: None,
            networks: None,
            outputs: None,
            rows_per_day: None,
        }
    }
}

/// What becomes of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It runs as soon as the other parties agree.
    Allow,
    /// It waits until a person has approved it here.
    Ask,
    /// It is turned down.
    Refuse,
}

/// A job's kind, as rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Training.
    Train,
    /// Evaluation of a kept model.
    Evaluate,
    /// Predictions of a kept model.
    Predict,
    /// Work on public numbers, to be timed.
    Benchmark,
    /// Opening a kept model's weights.
    Reveal,
    /// Keeping weights that their owner has shared.
    Import,
    /// Predictions in a session that stays open.
    Serve,
    /// Removal of a kept model: no job, it is done or refused at once.
    Remove,
    /// Classes by the nearest rows of a data set.
    Knn,
}

/// What a job reveals to its requester, as rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// Confusion matrices and AUC.
    Metrics,
    /// Reliability histograms.
    Calibration,
    /// Confusion matrices of each hospital's rows.
    Hospitals,
    /// To the parties, too: right predictions on validation rows, for an early stop.
    Validation,
    /// The most probable class of each image.
    Class,
    /// A probability for each class of each image.
    Probabilities,
    /// The last layer's outputs for each image.
    Logits,
    /// The trained weights.
    Weights,
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Output::Metrics => "metrics",
            Output::Calibration => "calibration",
            Output::Hospitals => "hospitals",
            Output::Validation => "validation",
            Output::Class => "class",
            Output::Probabilities => "probabilities",
            Output::Logits => "logits",
            Output::Weights => "weights",
        })
    }
}

impl Policy {
    /// Checks ranges and names; the error names the key.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=APPROVAL_TIMEOUT_MAX_S).contains(&self.approval_timeout_s) {
            return Err(format!(
                "policy.approval_timeout_s: 1 to {APPROVAL_TIMEOUT_MAX_S} are possible, found {}",
                self.approval_timeout_s
            ));
        }
        if self.hospital_rows_min < HOSPITAL_ROWS_LEAST {
            return Err(format!(
                "policy.hospital_rows_min: at least {HOSPITAL_ROWS_LEAST} is possible, found {}",
                self.hospital_rows_min
            ));
        }
        if self.rules.len() > RULES_MAX {
            return Err(format!("policy.rules: at most {RULES_MAX} are possible"));
        }
        for (at, rule) in self.rules.iter().enumerate() {
            let fail = |key: &str, detail: String| {
                Err(format!(
                    "policy.rules[{at}].{key} ({:?}): {detail}",
                    rule.name
                ))
            };
            if let Err(detail) = crate::check_name(&rule.name) {
                return fail("name", detail);
            }
            if self.rules[..at].iter().any(|other| other.name == rule.name) {
                return fail("name", "another rule has this name".into());
            }
            let empty = [
                ("requesters", rule.requesters.as_ref().map(Vec::len)),
                ("kinds", rule.kinds.as_ref().map(Vec::len)),
                ("datasets", rule.datasets.as_ref().map(Vec::len)),
                ("models", rule.models.as_ref().map(Vec::len)),
                ("networks", rule.networks.as_ref().map(Vec::len)),
                ("outputs", rule.outputs.as_ref().map(Vec::len)),
            ];
            if let Some((key, _)) = empty.into_iter().find(|(_, len)| *len == Some(0)) {
                let detail = "an empty list fits no job; leave the key out to fit every one";
                return fail(key, detail.into());
            }
            let stranger = rule.requesters.iter().flatten();
            let mut stranger = stranger.filter(|name| !self.requesters.contains(name));
            if let Some(name) = stranger.next() {
                let detail = format!("{name:?} is not in policy.requesters and always refused");
                return fail("requesters", detail);
            }
            let removes = rule
                .kinds
                .iter()
                .flatten()
                .any(|kind| *kind == Kind::Remove);
            if removes && rule.verdict == Verdict::Ask {
                let detail =
                    "a removal does not wait for a person: allow or refuse it in a rule of its own";
                return fail("kinds", detail.into());
            }
            if rule.rows_per_day.is_some() {
                if rule.verdict == Verdict::Refuse {
                    return fail("rows_per_day", "a rule that refuses counts no rows".into());
                }
                let counted = |kind: &Kind| matches!(kind, Kind::Predict | Kind::Serve | Kind::Knn);
                if !rule
                    .kinds
                    .as_ref()
                    .is_some_and(|kinds| kinds.iter().all(counted))
                {
                    let detail = "rows are counted for predictions: add kinds with \"predict\", \"serve\" or \"knn\" alone";
                    return fail("rows_per_day", detail.into());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::PartyConfig;

    fn error_of(change: impl FnOnce(&mut Policy)) -> String {
        let mut policy = Policy {
            requesters: vec!["anna".into()],
            rules: vec![
                Rule::new("first", Verdict::Allow),
                Rule::new("second", Verdict::Ask),
            ],
            ..Policy::default()
        };
        policy.check().unwrap();
        change(&mut policy);
        policy.check().unwrap_err()
    }

    #[test]
    fn a_policy_that_cannot_be_meant_is_refused_naming_rule_and_key() {
        let err = error_of(|policy| policy.rules[1].name = "first".into());
        assert!(
            err.contains("rules[1].name") && err.contains("another rule"),
            "{err}"
        );
        let err = error_of(|policy| policy.rules[0].requesters = Some(vec!["bernd".into()]));
        assert!(
            err.contains("rules[0].requesters") && err.contains("\"bernd\""),
            "{err}"
        );
        let err = error_of(|policy| policy.rules[0].outputs = Some(vec![]));
        assert!(
            err.contains("rules[0].outputs") && err.contains("empty"),
            "{err}"
        );
        let err = error_of(|policy| policy.rules[0].rows_per_day = Some(1));
        assert!(
            err.contains("rows_per_day") && err.contains("predict"),
            "{err}"
        );
        let err = error_of(|policy| policy.approval_timeout_s = 0);
        assert!(err.contains("approval_timeout_s"), "{err}");
    }

    #[test]
    fn the_shipped_policy_has_every_key_and_unknown_ones_are_refused() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/policy.toml");
        let config = PartyConfig::load(&shipped).unwrap();
        let text = std::fs::read_to_string(&shipped).unwrap();
        let all = toml::to_string(&Rule {
            requesters: Some(vec![]),
            kinds: Some(vec![]),
            datasets: Some(vec![]),
            models: Some(vec![]),
            networks: Some(vec![]),
            outputs: Some(vec![]),
            rows_per_day: Some(1),
            ..Rule::new("all", Verdict::Ask)
        });
        for line in all.unwrap().lines() {
            let key = line.split('=').next().unwrap_or_default();
            assert!(text.contains(&format!("\n{key}=")), "{key} is not shown");
        }
        assert_eq!(config.policy.approval_timeout_s, APPROVAL_TIMEOUT_S);
        let unknown = text.replace("rows_per_day", "rows_per_week");
        let err = toml::from_str::<PartyConfig>(&unknown)
            .unwrap_err()
            .to_string();
        assert!(err.contains("rows_per_week"), "{err}");
    }
}
