//! A job in words: what whoever approves it reads.

use std::fmt::Write;

use trefoil_models::job::{DatasetRef, JobKind, PredictOutput};
use trefoil_models::neighbours::Queries;

use super::JobDescription;
use crate::Hex;

impl JobDescription {
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
