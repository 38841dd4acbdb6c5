//! A party's policy: the first rule that fits a job decides; and the predictions of the day, which
//! survive restarts in `home/predictions.json`. The rules' form is `trefoil_consortium::config`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use trefoil_consortium::config::{Kind, Output, Policy, Rule, Verdict};
use trefoil_consortium::wire::ModelInfo;
use trefoil_consortium::{JobDescription, ModelRef};
use trefoil_models::neighbours::Queries;
use trefoil_models::{JobKind, NeighbourSpec, Network, PredictOutput};
use trefoil_transport::Pin;

use crate::files::{self, FileError};

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

/// What rules look at.
struct Facts<'a> {
    kind: Kind,
    dataset: Option<&'a str>,
    /// The names of the models that it makes or reads.
    models: Vec<&'a str>,
    network: Option<String>,
    outputs: Vec<Output>,
    /// Images whose predictions are revealed.
    rows: u64,
    /// Of the hospitals with figures of their own, the fewest rows.
    fewest_rows: Option<u64>,
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

impl Facts<'_> {
    fn of(job: &JobDescription) -> Result<Facts<'_>, String> {
        let name = |network: &str| match Network::parse(network) {
            Ok(network) => Ok(Some(network.name)),
            Err(err) => Err(format!("the job's network cannot be read: {err}")),
        };
        let revealed = |output: PredictOutput| match output {
            PredictOutput::Class => Output::Class,
            PredictOutput::Probabilities => Output::Probabilities,
            PredictOutput::Logits => Output::Logits,
        };
        let (kind, network, outputs) = match &job.kind {
            JobKind::Train {
                network,
                spec,
                evaluate_each_epoch,
                reveal_weights,
                ..
            } => {
                let metrics = evaluate_each_epoch.then_some(Output::Metrics);
                let validation = spec.early_stop.map(|_| Output::Validation);
                let weights = reveal_weights.then_some(Output::Weights);
                let outputs = metrics.into_iter().chain(validation).chain(weights);
                (Kind::Train, name(network)?, outputs.collect())
            }
            JobKind::Evaluate {
                network,
                calibration,
                by_hospital,
                ..
            } => {
                let bins = calibration.then_some(Output::Calibration);
                let hospitals = (!by_hospital.is_empty()).then_some(Output::Hospitals);
                let outputs = [Output::Metrics].into_iter().chain(bins).chain(hospitals);
                (Kind::Evaluate, name(network)?, outputs.collect())
            }
            JobKind::Predict {
                network, output, ..
            } => {
                let outputs = vec![revealed(*output)];
                (Kind::Predict, name(network)?, outputs)
            }
            JobKind::RevealModel { network, .. } => {
                (Kind::Reveal, name(network)?, vec![Output::Weights])
            }
            JobKind::ImportModel { network, .. } => (Kind::Import, name(network)?, Vec::new()),
            JobKind::Serve(spec) => (
                Kind::Serve,
                name(&spec.network)?,
                vec![revealed(spec.output)],
            ),
            JobKind::Neighbours(spec) => {
                let output = match spec.queries {
                    Queries::Upload { .. } => Output::Class,
                    Queries::Test => Output::Metrics,
                };
                (Kind::Knn, None, vec![output])
            }
            JobKind::Benchmark { .. } => (Kind::Benchmark, None, Vec::new()),
        };
        // Rules name models without a version.
        let read = job.model().map(ModelRef::parse).transpose()?;
        let models = job.save_as().into_iter();
        let fewest_rows = match &job.kind {
            JobKind::Evaluate { by_hospital, .. } => {
                by_hospital.iter().map(|each| each.rows as u64).min()
            }
            _ => None,
        };
        Ok(Facts {
            kind,
            dataset: job.dataset().map(|dataset| dataset.name.as_str()),
            models: models.chain(read.map(|model| model.name)).collect(),
            network,
            outputs,
            rows: predicted_rows(&job.kind),
            fewest_rows,
        })
    }

    fn describe(&self, requester: &str) -> String {
        let kind = match self.kind {
            Kind::Train => "a training",
            Kind::Evaluate => "an evaluation",
            Kind::Predict => "a prediction",
            Kind::Benchmark => "a benchmark",
            Kind::Reveal => "the opening of a model's weights",
            Kind::Import => "an import of weights",
            Kind::Serve => "a serving session",
            Kind::Remove => "a removal",
            Kind::Knn => "a classification by nearest rows",
        };
        let mut text = format!("{kind} of {requester}");
        if let Some(dataset) = self.dataset {
            text.push_str(&format!(" on data set {dataset}"));
        }
        if !self.models.is_empty() {
            text.push_str(&format!(" with model {}", self.models.join(" and ")));
        }
        let outputs: Vec<String> = self.outputs.iter().map(Output::to_string).collect();
        match outputs.is_empty() {
            true => text.push_str(" that reveals nothing"),
            false => text.push_str(&format!(" that reveals {}", outputs.join(" and "))),
        }
        text
    }
}

/// Whether all conditions of a rule hold. A condition on something that the job has not, fails.
fn fits(rule: &Rule, names: &[&str], facts: &Facts<'_>) -> bool {
    let among = |list: &Option<Vec<String>>, found: Option<&str>| match list {
        None => true,
        Some(list) => found.is_some_and(|found| list.iter().any(|name| name == found)),
    };
    let outputs = match (&rule.outputs, rule.verdict) {
        (None, _) => true,
        // A permission covers everything that the job reveals; a restriction holds for any of it.
        (Some(list), Verdict::Allow) => facts.outputs.iter().all(|output| list.contains(output)),
        (Some(list), Verdict::Ask | Verdict::Refuse) => {
            facts.outputs.iter().any(|output| list.contains(output))
        }
    };
    let listed = |list: &Vec<String>, name: &str| list.iter().any(|known| known == name);
    // A permission covers every model that is made or read; a restriction holds for any of them.
    let models = match (&rule.models, rule.verdict) {
        (None, _) => true,
        (Some(list), Verdict::Allow) => {
            !facts.models.is_empty() && facts.models.iter().all(|name| listed(list, name))
        }
        (Some(list), Verdict::Ask | Verdict::Refuse) => {
            facts.models.iter().any(|name| listed(list, name))
        }
    };
    // A permission covers all who learn something; a restriction holds for any of them.
    let asked = match (&rule.requesters, rule.verdict) {
        (None, _) => true,
        (Some(list), Verdict::Allow) => names.iter().all(|name| listed(list, name)),
        (Some(list), Verdict::Ask | Verdict::Refuse) => names.iter().any(|name| listed(list, name)),
    };
    let kind = rule
        .kinds
        .as_ref()
        .is_none_or(|kinds| kinds.contains(&facts.kind));
    kind && outputs
        && asked
        && among(&rule.datasets, facts.dataset)
        && models
        && among(&rule.networks, facts.network.as_deref())
}

#[cfg(test)]
mod tests {
    use trefoil_models::job::DatasetRef;
    use trefoil_models::{Benchmark, TrainSpec};

    use super::*;

    const NETWORK: &str =
        "name = \"tiny\"\ninput = [1, 4, 4]\nclasses = 3\n[[layer]]\nkind = \"dense\"\n";
    /// A minute before a midnight, UTC.
    const EVENING: u64 = 20_000 * SECONDS_PER_DAY - 60;

    fn job(kind: JobKind) -> JobDescription {
        JobDescription::new("job", Pin::from_bytes([1; 32]), kind).unwrap()
    }

    fn train(dataset: &str, metrics: bool, weights: bool) -> JobDescription {
        job(JobKind::Train {
            network: NETWORK.into(),
            spec: TrainSpec::default(),
            dataset: DatasetRef {
                name: dataset.into(),
                train_rows: 10,
                test_rows: 2,
                snapshot: [7; 32],
            },
            evaluate_each_epoch: metrics,
            save_as: "model".into(),
            reveal_weights: weights,
        })
    }

    fn predict(output: PredictOutput, rows: usize) -> JobDescription {
        job(JobKind::Predict {
            model: "model".into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            rows,
            upload: "upload".into(),
            output,
        })
    }

    fn desk(home: &Path, rules: Vec<Rule>) -> PolicyDesk {
        let policy = Policy {
            requesters: vec!["anna".into(), "bernd".into()],
            rules,
            ..Policy::default()
        };
        policy.check().unwrap();
        PolicyDesk::open(home, policy, "P1 (west)".into()).unwrap()
    }

    fn rule(name: &str, verdict: Verdict, change: impl FnOnce(&mut Rule)) -> Rule {
        let mut rule = Rule::new(name, verdict);
        change(&mut rule);
        rule
    }

    /// `allow`, `ask` or the refusal.
    fn says(desk: &PolicyDesk, job: &JobDescription, requester: &str) -> String {
        match desk.rule(job, requester, EVENING) {
            Ok(Ruling { ask: true, rule }) => format!("ask {rule}"),
            Ok(Ruling { ask: false, rule }) => format!("allow {rule}"),
            Err(refusal) => refusal,
        }
    }

    #[test]
    fn naming_others_beside_it_loosens_no_served_members_bound() {
        let home = tempfile::tempdir().unwrap();
        let serve = |name, who: Option<&str>, rows| {
            rule(name, Verdict::Allow, |rule| {
                rule.kinds = Some(vec![Kind::Serve]);
                rule.requesters = who.map(|who| vec![who.to_owned()]);
                rule.rows_per_day = rows;
            })
        };
        let desk = desk(
            home.path(),
            vec![
                serve("anna", Some("anna"), Some(10)),
                serve("bernd", Some("bernd"), Some(70)),
                serve("all", None, None),
            ],
        );
        let job = job(JobKind::Serve(trefoil_models::ServeSpec {
            model: "model".into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            members: vec![[1; 32], [2; 32]],
            output: PredictOutput::Class,
            max_batch: 4,
            max_wait_ms: 1,
            max_pending: 2,
            rows_per_day: 50,
            duration_s: 60,
        }));
        let limit = |requester, served: &[&str]| {
            let served: Vec<String> = served.iter().map(|name| (*name).to_owned()).collect();
            desk.served_rows(&job, requester, &served).unwrap()
        };
        assert_eq!(limit("anna", &["anna"]), 10);
        // Together they fit the rule without a bound alone.
        assert_eq!(limit("anna", &["anna", "bernd"]), 10);
        assert_eq!(limit("bernd", &["bernd", "anna"]), 10);
        assert_eq!(limit("bernd", &["bernd"]), 50, "the job's own");
    }

    #[test]
    fn without_rules_a_listed_requester_is_held_others_are_refused_and_benchmarks_run() {
        let home = tempfile::tempdir().unwrap();
        let desk = desk(home.path(), vec![]);
        assert_eq!(
            says(&desk, &train("xray", true, false), "anna"),
            "ask no rule fits"
        );
        let refusal = says(&desk, &train("xray", true, false), "carla");
        assert!(refusal.contains("P1 (west): carla may not"), "{refusal}");
        let benchmark = job(JobKind::Benchmark {
            work: Benchmark::Relu { elements: 8 },
            repetitions: 1,
            frac_bits: 16,
            ring_bits: 64,
        });
        assert_eq!(
            says(&desk, &benchmark, "anna"),
            "allow benchmarks read no data"
        );
    }

    #[test]
    fn the_first_rule_that_fits_decides_and_every_condition_counts() {
        let home = tempfile::tempdir().unwrap();
        let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let rules = vec![
            rule("no-ct", Verdict::Refuse, |r| r.datasets = list(&["ct"])),
            rule("anna-xray", Verdict::Allow, |r| {
                r.requesters = list(&["anna"]);
                r.kinds = Some(vec![Kind::Train]);
                r.datasets = list(&["xray"]);
                r.networks = list(&["tiny"]);
                r.models = list(&["model"]);
            }),
            rule("all-ct", Verdict::Allow, |r| r.datasets = list(&["ct"])),
        ];
        let desk = desk(home.path(), rules.clone());
        let job = train("xray", true, true);
        assert_eq!(says(&desk, &job, "anna"), "allow anna-xray");
        assert_eq!(says(&desk, &job, "bernd"), "ask no rule fits");
        let refusal = says(&desk, &train("ct", true, false), "anna");
        for words in ["P1 (west)", "\"no-ct\"", "data set ct", "operator"] {
            assert!(refusal.contains(words), "{refusal}");
        }
        // A prediction reads no data set: a rule for one does not fit.
        assert_eq!(
            says(&desk, &predict(PredictOutput::Class, 1), "anna"),
            "ask no rule fits"
        );
        // Each condition alone takes the job out of the rule.
        let changes: [fn(&mut Rule); 5] = [
            |r| r.requesters = Some(vec!["bernd".into()]),
            |r| r.kinds = Some(vec![Kind::Evaluate]),
            |r| r.datasets = Some(vec!["mri".into()]),
            |r| r.networks = Some(vec!["large".into()]),
            |r| r.models = Some(vec!["other".into()]),
        ];
        for change in changes {
            let home = tempfile::tempdir().unwrap();
            let mut rules = rules.clone();
            change(&mut rules[1]);
            let desk = self::desk(home.path(), rules);
            assert_eq!(says(&desk, &job, "anna"), "ask no rule fits");
        }
    }

    fn starting(model: &str) -> JobDescription {
        let mut job = train("xray", false, false);
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.start_from = Some(format!("{model}@0123456789abcdef"));
        }
        job
    }

    #[test]
    fn a_permission_covers_every_model_that_is_made_or_read_and_a_restriction_any() {
        let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let says_of = |verdict, models: &[&str], job: &JobDescription| {
            let home = tempfile::tempdir().unwrap();
            let rule = rule("rule", verdict, |r| r.models = list(models));
            says(&desk(home.path(), vec![rule]), job, "anna")
        };
        let job = starting("base");
        assert_eq!(
            says_of(Verdict::Allow, &["model"], &job),
            "ask no rule fits"
        );
        assert_eq!(says_of(Verdict::Allow, &["base"], &job), "ask no rule fits");
        assert_eq!(
            says_of(Verdict::Allow, &["base", "model"], &job),
            "allow rule"
        );
        assert_eq!(says_of(Verdict::Ask, &["base"], &job), "ask rule");
        let refusal = says_of(Verdict::Refuse, &["base"], &job);
        assert!(refusal.contains("with model model and base"), "{refusal}");
    }

    #[test]
    fn an_early_stop_is_an_output_of_its_own() {
        let home = tempfile::tempdir().unwrap();
        let rules = vec![rule("metrics", Verdict::Allow, |r| {
            r.outputs = Some(vec![Output::Metrics]);
        })];
        let desk = desk(home.path(), rules);
        let mut job = train("xray", true, false);
        assert_eq!(says(&desk, &job, "anna"), "allow metrics");
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.early_stop = Some(trefoil_models::EarlyStop {
                patience: 1,
                min_delta: 0.0,
                validation_rows: 5,
            });
        }
        assert_eq!(says(&desk, &job, "anna"), "ask no rule fits");
    }

    #[test]
    fn figures_by_hospital_need_a_rule_that_names_them_whoever_approves() {
        let evaluate = |rows: &[usize]| {
            let each = rows
                .iter()
                .enumerate()
                .map(|(at, rows)| trefoil_models::HospitalRows {
                    hospital: [at as u8; 32],
                    rows: *rows,
                });
            job(JobKind::Evaluate {
                model: "model".into(),
                network: NETWORK.into(),
                frac_bits: 16,
                ring_bits: 64,
                dataset: DatasetRef {
                    name: "xray".into(),
                    train_rows: 0,
                    test_rows: rows.iter().sum(),
                    snapshot: [7; 32],
                },
                auc: false,
                calibration: false,
                by_hospital: each.collect(),
            })
        };
        let says_of = |rules: Vec<Rule>, rows: &[usize]| {
            let home = tempfile::tempdir().unwrap();
            says(&desk(home.path(), rules), &evaluate(rows), "anna")
        };
        let refused = |words: String| assert!(words.contains("not let out here"), "{words}");
        refused(says_of(vec![], &[200, 100]));
        refused(says_of(
            vec![rule("all", Verdict::Allow, |_| {})],
            &[200, 100],
        ));
        refused(says_of(
            vec![rule("all", Verdict::Ask, |_| {})],
            &[200, 100],
        ));
        let named = |verdict| {
            vec![rule("named", verdict, |r| {
                r.outputs = Some(vec![Output::Metrics, Output::Hospitals]);
            })]
        };
        assert_eq!(says_of(named(Verdict::Allow), &[200, 100]), "allow named");
        assert_eq!(says_of(named(Verdict::Ask), &[200, 100]), "ask named");
        let few = says_of(named(Verdict::Allow), &[200, 99]);
        assert!(
            few.contains("needs 100 test rows") && few.contains("one has 99"),
            "{few}"
        );
        // Without such figures the same evaluation is as ever.
        assert_eq!(says_of(named(Verdict::Allow), &[]), "allow named");
    }

    #[test]
    fn a_permission_covers_all_outputs_and_a_restriction_any() {
        let home = tempfile::tempdir().unwrap();
        let only = |outputs: &[Output]| Some(outputs.to_vec());
        let rules = vec![
            rule("weights-ask", Verdict::Ask, |r| {
                r.outputs = only(&[Output::Weights])
            }),
            rule("metrics", Verdict::Allow, |r| {
                r.outputs = only(&[Output::Metrics, Output::Class])
            }),
            rule("rest", Verdict::Refuse, |_| {}),
        ];
        let desk = desk(home.path(), rules);
        assert_eq!(
            says(&desk, &train("x", true, true), "anna"),
            "ask weights-ask"
        );
        assert_eq!(
            says(&desk, &train("x", true, false), "anna"),
            "allow metrics"
        );
        assert_eq!(
            says(&desk, &train("x", false, false), "anna"),
            "allow metrics"
        );
        assert_eq!(
            says(&desk, &predict(PredictOutput::Class, 3), "anna"),
            "allow metrics"
        );
        for output in [PredictOutput::Logits, PredictOutput::Probabilities] {
            let refusal = says(&desk, &predict(output, 3), "anna");
            assert!(
                refusal.contains("\"rest\" refuses a prediction of anna"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn rows_of_a_day_are_counted_by_requester_over_restarts_and_begin_anew_at_midnight() {
        let home = tempfile::tempdir().unwrap();
        let limited = rule("classes", Verdict::Allow, |r| {
            r.kinds = Some(vec![Kind::Predict]);
            r.rows_per_day = Some(10);
        });
        let open = || desk(home.path(), vec![limited.clone()]);
        let desk = open();
        let six = predict(PredictOutput::Class, 6);
        desk.rule(&six, "anna", EVENING).unwrap();
        desk.count(&six, EVENING).unwrap();
        for desk in [&desk, &open()] {
            let refusal = desk.rule(&six, "anna", EVENING).unwrap_err();
            for words in ["\"classes\"", "10 predictions", "6 are used", "asks for 6"] {
                assert!(refusal.contains(words), "{refusal}");
            }
            let four = predict(PredictOutput::Class, 4);
            desk.rule(&four, "anna", EVENING).unwrap();
            let mut other = six.clone();
            other.requester = Pin::from_bytes([2; 32]);
            desk.rule(&other, "bernd", EVENING).unwrap();
        }
        let desk = open();
        let morning = EVENING + 60;
        desk.rule(&six, "anna", morning).unwrap();
        desk.count(&six, morning).unwrap();
        assert!(desk.rule(&six, "anna", morning).is_err());
        assert!(
            desk.rule(&six, "anna", EVENING).is_err(),
            "a clock that goes back begins no new day"
        );
        // Other kinds are not counted.
        desk.count(&train("x", true, false), morning).unwrap();
        assert_eq!(desk.used(six.requester, morning), 6);
    }

    fn knn(queries: Queries) -> JobDescription {
        job(JobKind::Neighbours(NeighbourSpec {
            dataset: DatasetRef {
                name: "xray".into(),
                train_rows: 10,
                test_rows: 2,
                snapshot: [7; 32],
            },
            input: [1, 4, 4],
            classes: 3,
            k: 1,
            frac_bits: 13,
            ring_bits: 64,
            queries,
        }))
    }

    fn of_images(rows: usize) -> JobDescription {
        let upload = "upload".into();
        knn(Queries::Upload { rows, upload })
    }

    #[test]
    fn nearest_rows_run_only_where_a_rule_lets_them() {
        let list = |name: &str| Some(vec![name.to_owned()]);
        let says_of = |verdict, job: &JobDescription, change: &dyn Fn(&mut Rule)| {
            let home = tempfile::tempdir().unwrap();
            let rules = vec![
                rule("rule", verdict, change),
                rule("rest", Verdict::Refuse, |_| {}),
            ];
            says(&desk(home.path(), rules), job, "anna")
        };
        let refused = "\"rest\" refuses a classification by nearest rows of anna on data set xray";
        let (images, test) = (of_images(3), knn(Queries::Test));
        for job in [&images, &test] {
            let home = tempfile::tempdir().unwrap();
            let bare = desk(home.path(), vec![]);
            assert_eq!(says(&bare, job, "anna"), "ask no rule fits");
            assert!(says(&bare, job, "carla").contains("carla may not"));

            let allows: [&dyn Fn(&mut Rule); 3] = [
                &|r| r.kinds = Some(vec![Kind::Knn]),
                &|r| r.datasets = list("xray"),
                &|r| r.outputs = Some(vec![Output::Class, Output::Metrics]),
            ];
            for change in allows {
                assert_eq!(says_of(Verdict::Allow, job, change), "allow rule");
            }
            // It has no network and no model, and is neither a prediction nor an evaluation.
            let others: [&dyn Fn(&mut Rule); 5] = [
                &|r| {
                    r.kinds = Some(vec![
                        Kind::Predict,
                        Kind::Serve,
                        Kind::Evaluate,
                        Kind::Train,
                    ])
                },
                &|r| r.datasets = list("mri"),
                &|r| r.networks = list("tiny"),
                &|r| r.models = list("model"),
                &|r| r.outputs = Some(vec![Output::Probabilities, Output::Weights]),
            ];
            for change in others {
                let refusal = says_of(Verdict::Allow, job, change);
                assert!(refusal.contains(refused), "{refusal}");
            }
        }

        // What comes out of the test rows is another output than the classes of images.
        let only = |output| move |r: &mut Rule| r.outputs = Some(vec![output]);
        let class = only(Output::Class);
        let metrics = only(Output::Metrics);
        assert_eq!(says_of(Verdict::Allow, &images, &class), "allow rule");
        assert_eq!(says_of(Verdict::Allow, &test, &metrics), "allow rule");
        let refusal = says_of(Verdict::Allow, &images, &metrics);
        assert!(refusal.contains("that reveals class"), "{refusal}");
        let refusal = says_of(Verdict::Allow, &test, &class);
        assert!(refusal.contains("that reveals metrics"), "{refusal}");
    }

    #[test]
    fn images_classified_by_nearest_rows_count_as_predictions_of_the_day() {
        let home = tempfile::tempdir().unwrap();
        let desk = desk(
            home.path(),
            vec![rule("predictions", Verdict::Allow, |r| {
                r.kinds = Some(vec![Kind::Predict, Kind::Knn]);
                r.rows_per_day = Some(10);
            })],
        );
        let six = of_images(6);
        assert_eq!(says(&desk, &six, "anna"), "allow predictions");
        desk.count(&six, EVENING).unwrap();
        let refusal = says(&desk, &six, "anna");
        assert!(
            refusal.contains("6 are used and this job asks for 6"),
            "{refusal}"
        );
        let four = predict(PredictOutput::Class, 4);
        assert_eq!(says(&desk, &four, "anna"), "allow predictions");
        desk.count(&four, EVENING).unwrap();
        assert!(says(&desk, &of_images(1), "anna").contains("10 are used"));
        // A matrix of the test rows is no prediction.
        assert_eq!(
            says(&desk, &knn(Queries::Test), "anna"),
            "allow predictions"
        );
        desk.count(&knn(Queries::Test), EVENING).unwrap();
        assert_eq!(desk.used(six.requester, EVENING), 10);
    }

    #[test]
    fn damaged_counts_are_named() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("predictions.json"), "{\"day\": 1").unwrap();
        let err = PolicyDesk::open(home.path(), Policy::default(), "P1".into()).unwrap_err();
        let err = err.to_string();
        assert!(
            err.contains("predictions.json") && err.contains("remove it"),
            "{err}"
        );
    }
}
