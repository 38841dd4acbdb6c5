//! What rules look at in a job, and whether a rule fits it.

use trefoil_consortium::config::{Kind, Output, Rule, Verdict};
use trefoil_consortium::{JobDescription, ModelRef};
use trefoil_models::neighbours::Queries;
use trefoil_models::{JobKind, Network, PredictOutput};

use super::predicted_rows;

/// What rules look at.
pub(super) struct Facts<'a> {
    pub(super) kind: Kind,
    pub(super) dataset: Option<&'a str>,
    /// The names of the models that it makes or reads.
    pub(super) models: Vec<&'a str>,
    pub(super) network: Option<String>,
    pub(super) outputs: Vec<Output>,
    /// Images whose predictions are revealed.
    pub(super) rows: u64,
    /// Of the hospitals with figures of their own, the fewest rows.
    pub(super) fewest_rows: Option<u64>,
}

impl Facts<'_> {
    pub(super) fn of(job: &JobDescription) -> Result<Facts<'_>, String> {
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

    pub(super) fn describe(&self, requester: &str) -> String {
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
pub(super) fn fits(rule: &Rule, names: &[&str], facts: &Facts<'_>) -> bool {
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
