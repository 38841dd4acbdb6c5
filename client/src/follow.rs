//! A job from its submission to its end, with a progress bar, and what it revealed in the terms of
//! the one who asked. `simulate` and the commands of a deployment share it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use trefoil_consortium::JobId;
use trefoil_models::early_stop::VALIDATION_RIGHT;
use trefoil_models::job::{JobKind, PredictOutput};
use trefoil_models::neighbours::Queries;
use trefoil_models::outcome::{self, Auc, Bin};
use trefoil_models::{NeighbourSpec, Phase, Schedule};
use trefoil_protocol::Tensor;
use trefoil_protocol::party::PartyId;

use crate::metrics::Confusion;
use crate::remote::{Event, JobResult, Progress, Remote, RemoteError};

/// Revealed outputs of a job, step by step.
pub type Revealed = BTreeMap<usize, BTreeMap<String, Tensor>>;

/// A finished job with its description and what it revealed.
#[derive(Debug)]
pub struct Finished {
    /// What was computed.
    pub kind: JobKind,
    /// Its steps.
    pub plan: Schedule,
    /// What was revealed.
    pub revealed: Revealed,
    /// What the nodes counted.
    pub result: JobResult,
    /// P0's report of each step.
    pub steps: Vec<Progress>,
    /// Seconds from its submission, or from when it was watched, to its end.
    pub seconds: f64,
}

/// What a prediction job says of each image.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    /// The most probable class.
    pub classes: Vec<usize>,
    /// Logits or probabilities, `rows x classes`, where the job reveals them.
    pub scores: Option<ndarray::Array2<f64>>,
}

/// A progress bar on standard error; none where that is no terminal.
pub fn bar(length: u64, unit: &str) -> ProgressBar {
    let template = format!("{{msg:32}} [{{bar:30}}] {{pos}}/{{len}} {unit} {{eta}}");
    let style =
        ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(length).with_style(style.progress_chars("=> "));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A line above the bar, on standard error.
fn notice(bar: &ProgressBar, line: &str) {
    bar.suspend(|| eprintln!("{line}"));
}

/// What the bar says while parties have not approved.
fn waiting(message: &str, at: &BTreeMap<PartyId, String>) -> String {
    match at.is_empty() {
        true => message.to_owned(),
        false => {
            let parties: Vec<String> = at.keys().map(PartyId::to_string).collect();
            format!("{message}: {} to approve", parties.join(", "))
        }
    }
}

/// Follows a submitted job to its end. `plan` is its schedule, `message` what the bar says.
pub async fn follow(
    remote: &Remote,
    id: JobId,
    kind: JobKind,
    plan: Schedule,
    message: &str,
) -> Result<Finished, RemoteError> {
    let bar = bar(plan.steps.len() as u64, "steps");
    bar.set_message(message.to_string());
    let start = Instant::now();
    let mut steps = Vec::new();
    let mut last = String::new();
    let mut waits = BTreeMap::new();
    let watched = remote
        .watch(id, &mut |event| match event {
            Event::Held { party, at } => {
                let digits: String = id.to_string().chars().take(16).collect();
                let say = format!("waits for approval at {at}: trefoil approve {digits}");
                waits.insert(party, at);
                notice(&bar, &say);
                bar.set_message(waiting(message, &waits));
            }
            Event::Approved { party, at } => {
                waits.remove(&party);
                notice(&bar, &format!("{at} has approved"));
                bar.set_message(waiting(message, &waits));
            }
            Event::Interrupted(waits) => {
                notice(&bar, &waits);
                bar.set_message(format!("{message}: interrupted"));
            }
            Event::Waits { reason, .. } => notice(&bar, &reason),
            Event::Started { from, .. } => {
                if from > 0 {
                    notice(&bar, &format!("goes on from step {from} in a new session"));
                }
                if let JobKind::Serve(spec) = &kind {
                    let say = format!("serving {} for {} s", spec.model, spec.duration_s);
                    notice(&bar, &say);
                }
                bar.set_position(from);
                bar.set_message(message.to_string());
            }
            Event::Progress(progress) if progress.phase == "serve" => {
                bar.set_message(format!("{message}: {} images", progress.batches));
                // The last one tells of all.
                steps.clear();
                steps.push(progress);
            }
            Event::Progress(progress) => {
                bar.set_position(progress.step + 1);
                bar.set_message(match progress.phase.as_str() {
                    "train" => format!("{message}, epoch {}{last}", progress.epoch + 1),
                    _ => format!("{message}: {}{last}", progress.phase),
                });
                // A session that takes the job up does some of them again.
                steps.retain(|known: &Progress| known.step < progress.step);
                steps.push(progress);
            }
            Event::Output(revealed) if revealed.name == "confusion" => {
                let outputs = BTreeMap::from([(revealed.name, revealed.tensor)]);
                if let Ok(counts) = outcome::confusion(&outputs) {
                    let right: u64 = counts.diag().sum();
                    let percent = 100.0 * right as f64 / counts.sum().max(1) as f64;
                    last = format!(" ({percent:.2} %)");
                }
            }
            Event::Output(_) => {}
        })
        .await;
    bar.finish_and_clear();
    let result = watched?;
    let mut revealed = Revealed::new();
    for output in &result.outputs {
        revealed
            .entry(output.step)
            .or_default()
            .insert(output.name.clone(), output.tensor.clone());
    }
    Ok(Finished {
        kind,
        plan,
        revealed,
        result,
        steps,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Confusion matrices, and AUCs where there are any, of a job's result steps, in order of epochs.
pub fn confusions(
    plan: &Schedule,
    revealed: &Revealed,
    names: &[String],
) -> Result<Vec<(Confusion, Option<Auc>)>> {
    let mut out = Vec::new();
    for (index, step) in plan.steps.iter().enumerate() {
        if !matches!(step.phase, Phase::Result { .. }) {
            continue;
        }
        let outputs = match revealed.get(&index) {
            Some(outputs) => outputs,
            // Training stopped before it.
            None if plan.stopping.is_some() => break,
            None => bail!("step {index} revealed nothing"),
        };
        let counts = outcome::confusion(outputs)?;
        let auc = match outputs.contains_key("auc_balance") {
            true => outcome::auc(outputs)?,
            false => None,
        };
        out.push((Confusion::from_counts(counts, names.to_vec())?, auc));
    }
    Ok(out)
}

impl Finished {
    /// See [`confusions`].
    pub fn confusions(&self, names: &[String]) -> Result<Vec<(Confusion, Option<Auc>)>> {
        confusions(&self.plan, &self.revealed, names)
    }

    /// Outputs of the steps of a phase that were run.
    fn outputs_of(
        &self,
        wanted: impl Fn(&Phase) -> bool,
    ) -> impl Iterator<Item = &BTreeMap<String, Tensor>> {
        let steps = self.plan.steps.iter().enumerate();
        let steps = steps.filter(move |(_, step)| wanted(&step.phase));
        steps.filter_map(|(index, _)| self.revealed.get(&index))
    }

    /// Right rows after each epoch, as an early stop has opened them.
    pub fn validated(&self) -> Vec<u64> {
        let outputs = self.outputs_of(|phase| matches!(phase, Phase::Validated { .. }));
        let right = outputs.filter_map(|outputs| outputs.get(VALIDATION_RIGHT));
        right
            .filter_map(|right| right.data().first().copied())
            .collect()
    }

    /// The reliability histogram of an evaluation.
    pub fn calibration(&self) -> Result<Vec<Bin>> {
        let mut outputs = self.outputs_of(|phase| matches!(phase, Phase::Result { .. }));
        let outputs = outputs.next().context("the evaluation revealed nothing")?;
        Ok(outcome::calibration(outputs)?)
    }

    /// The confusion matrix of each hospital whose figures an evaluation revealed.
    pub fn by_hospital(&self, names: &[String]) -> Result<Vec<([u8; 32], Confusion)>> {
        let JobKind::Evaluate { by_hospital, .. } = &self.kind else {
            return Ok(Vec::new());
        };
        let outputs = self.outputs_of(|phase| matches!(phase, Phase::HospitalResult { .. }));
        let counts = outputs.map(|outputs| {
            let counts = outcome::hospital_confusion(outputs)?;
            Ok(Confusion::from_counts(counts, names.to_vec())?)
        });
        let counts = counts.collect::<Result<Vec<_>>>()?;
        if counts.len() != by_hospital.len() {
            bail!(
                "{} of {} hospitals' figures were revealed",
                counts.len(),
                by_hospital.len()
            );
        }
        let hospitals = by_hospital.iter().map(|each| each.hospital);
        Ok(hospitals.zip(counts).collect())
    }

    /// The weights that a training job revealed.
    pub fn weights(&self) -> Result<BTreeMap<String, Tensor>> {
        let revealed = self.revealed.values().flatten();
        let named: BTreeMap<_, _> = revealed
            .filter(|(name, _)| self.plan.save.contains(name))
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        if named.len() != self.plan.save.len() {
            bail!(
                "the training job revealed {} of {} weights",
                named.len(),
                self.plan.save.len()
            );
        }
        Ok(named)
    }

    /// The classes of a prediction job, and the scores where it reveals them.
    pub fn predictions(&self) -> Result<Predictions> {
        let (rows, output, frac_bits) = match self.kind {
            JobKind::Predict {
                rows,
                output,
                frac_bits,
                ..
            } => (rows, output, frac_bits),
            JobKind::Neighbours(NeighbourSpec {
                queries: Queries::Upload { rows, .. },
                frac_bits,
                ..
            }) => (rows, PredictOutput::Class, frac_bits),
            _ => bail!("only a prediction job reveals predictions"),
        };
        let steps: Vec<_> = self.revealed.values().cloned().collect();
        predictions(&steps, rows, output, frac_bits)
    }
}

/// What batches of predictions say of `rows` images; `frac_bits` are the model's.
pub fn predictions(
    steps: &[BTreeMap<String, Tensor>],
    rows: usize,
    output: PredictOutput,
    frac_bits: u8,
) -> Result<Predictions> {
    let (name, frac_bits) = match output {
        PredictOutput::Class => {
            return Ok(Predictions {
                classes: outcome::classes(steps, rows)?,
                scores: None,
            });
        }
        PredictOutput::Logits => ("logits", 2 * u32::from(frac_bits)),
        PredictOutput::Probabilities => ("probabilities", 16),
    };
    let scores = outcome::rows(steps, name, rows, frac_bits)?;
    let best = |row: ndarray::ArrayView1<'_, f64>| {
        (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
    };
    Ok(Predictions {
        classes: scores.rows().into_iter().map(best).collect(),
        scores: Some(scores),
    })
}
