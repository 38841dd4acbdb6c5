//! What a member's home remembers of what jobs have revealed about models: `figures/JOB`, a JSON file
//! each, for this user alone. The parties never see these figures, so that nobody else can be shown
//! them: `trefoil models show` shows what was revealed to this member.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use trefoil_consortium::wire::ModelInfo;
use trefoil_consortium::{JobId, ModelRef, hex};
use trefoil_models::job::JobKind;
use trefoil_models::outcome;

use super::record::{Show, make_folder, read};
use super::replace;
use crate::follow::Finished;
use crate::simulate::report::{Quality, quality};

const FOLDER: &str = "figures";

/// What one job has revealed of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// The model, `NAME@VERSION`.
    pub model: String,
    /// The job that revealed them.
    pub job: String,
    /// Its name.
    pub job_name: String,
    /// The data set by whose test rows it was judged.
    pub dataset: String,
    /// Hash of what it held.
    pub snapshot: String,
    /// Test rows.
    pub rows: u64,
    /// Accuracy and so on.
    pub quality: Quality,
    /// Expected calibration error, where the job revealed a reliability histogram.
    pub calibration_error: Option<f64>,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { quality, rows, .. } = self;
        write!(f, "{quality}")?;
        if let Some(error) = self.calibration_error {
            write!(f, ", calibration error {error:.4}")?;
        }
        let job: String = self.job.chars().take(16).collect();
        let snapshot: String = self.snapshot.chars().take(16).collect();
        write!(
            f,
            " on {rows} rows of {} (snapshot {snapshot}), by job {} {job}",
            self.dataset, self.job_name
        )
    }
}

/// Notes what a finished job has revealed of a model; nothing for jobs that reveal no figures. Where
/// it cannot be noted that is said, and the result is shown all the same.
pub fn note(home: &Path, job_name: &str, id: JobId, done: &Finished, show: &Show) {
    if let Err(err) = keep(home, job_name, id, done, show) {
        eprintln!("these figures are not noted for `trefoil models show`: {err:#}");
    }
}

fn keep(home: &Path, job_name: &str, id: JobId, done: &Finished, show: &Show) -> Result<()> {
    let (model, dataset, calibration) = match &done.kind {
        // With an early stop the model is not that of the last figures.
        JobKind::Train {
            spec,
            dataset,
            evaluate_each_epoch: true,
            save_as,
            ..
        } if spec.early_stop.is_none() => (ModelRef::text(save_as, &id), dataset, None),
        JobKind::Evaluate {
            model,
            dataset,
            calibration,
            ..
        } => {
            let bins = match calibration {
                true => outcome::calibration_error(&done.calibration()?),
                false => None,
            };
            (model.clone(), dataset, bins)
        }
        _ => return Ok(()),
    };
    let Some((confusion, auc)) = done.confusions(&show.class_names)?.pop() else {
        return Ok(());
    };
    let figures = Figures {
        model,
        job: id.to_string(),
        job_name: job_name.into(),
        dataset: dataset.name.clone(),
        snapshot: hex(&dataset.snapshot),
        rows: confusion.total(),
        quality: quality(&confusion, auc),
        calibration_error: calibration,
    };
    let folder = home.join(FOLDER);
    make_folder(&folder)?;
    replace(
        &folder.join(id.to_string()),
        &serde_json::to_vec(&figures)?,
        true,
    )
}

impl Figures {
    /// What was revealed to this home of a model.
    pub fn of_model(home: &Path, info: &ModelInfo) -> Result<Vec<Figures>> {
        let folder = home.join(FOLDER);
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let failed = || format!("cannot read {}", folder.display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&folder).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            let place = || format!("{}: no figures of a model", path.display());
            let figures: Figures = serde_json::from_str(&read(&path)?).with_context(place)?;
            let model = ModelRef::parse(&figures.model).map_err(anyhow::Error::msg);
            if model.with_context(place)?.means(&info.name, &info.job) {
                found.push(figures);
            }
        }
        found.sort_by(|a, b| (&a.dataset, &a.job).cmp(&(&b.dataset, &b.job)));
        Ok(found)
    }
}
