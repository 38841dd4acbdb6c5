//! `trefoil simulate --knn K`: nothing is trained; the test rows, and some images of one hospital,
//! are classified by the nearest training rows. Held against the plain run bit for bit, and beside
//! the same in floating point.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use ndarray::Array1;
use trefoil_models::job::{DatasetRef, JobKind};
use trefoil_models::neighbours::Queries;
use trefoil_models::plain_run::{Table, Tables};
use trefoil_models::{NeighbourSpec, schedule};

use super::tables::{Holding, concatenated, holdings, tables};
use super::{DATASET, Simulation, reference};
use crate::data::{self, Preprocess};
use crate::follow::{Finished, bar};
use crate::metrics::Confusion;
use crate::plan::bytes;
use crate::remote::Part;
use crate::rows;

/// What the cluster was needed for.
pub(super) struct Done {
    holdings: Vec<Holding>,
    judged: Finished,
    classified: Finished,
    images: data::Dataset,
}

impl Simulation<'_> {
    /// The jobs, on the data of the experiment.
    pub(super) async fn neighbours(&self, k: usize) -> Result<Done> {
        let training = &self.loaded.experiment.training;
        let hospitals = self.loaded.experiment.data.hospitals;
        let holdings = holdings(&self.loaded.splits, hospitals, training.seed)?;
        let mut spec = NeighbourSpec {
            dataset: DatasetRef {
                name: DATASET.into(),
                train_rows: self.loaded.splits.train.len(),
                test_rows: self.loaded.splits.test.len(),
                snapshot: [0; 32],
            },
            input: self.loaded.network.input,
            classes: self.loaded.network.classes,
            k,
            frac_bits: training.frac_bits,
            ring_bits: training.ring_bits,
            queries: Queries::Test,
        };
        spec.check()?;
        self.share(&holdings).await?;
        let analyst = self.remote("analyst").await?;
        spec.dataset = analyst.dataset(DATASET).await?.reference(DATASET);
        let kind = JobKind::Neighbours(spec.clone());
        let judged = self
            .job(&analyst, "analyst", "classifying-test-rows", kind)
            .await?;
        analyst.close().await;

        let count = self.loaded.experiment.predict.images.max(1);
        let images = data::subset(&self.loaded.splits.test, &(0..count).collect::<Vec<_>>())?;
        let hospital = self.remote("hospital-1").await?;
        let upload = self.upload(Part::Predict, &images)?;
        let receipt = hospital.upload(upload, &mut |_| {}).await?;
        spec.queries = Queries::Upload {
            rows: receipt.rows,
            upload: receipt.upload,
        };
        let kind = JobKind::Neighbours(spec);
        let classified = self
            .job(&hospital, "hospital-1", "classifying", kind)
            .await?;
        hospital.close().await;
        Ok(Done {
            holdings,
            judged,
            classified,
            images,
        })
    }

    /// References and figures; an error if the secure result is not the plain one.
    pub(super) fn print_neighbours(&self, k: usize, done: &Done, start: Instant) -> Result<()> {
        let preprocess = &self.loaded.preprocess;
        let frac_bits = self.loaded.experiment.training.frac_bits;
        let held: Vec<&Holding> = done.holdings.iter().collect();
        let mut plain_tables = tables(&held, preprocess, frac_bits)?;
        let images = rows::images(done.images.images.view(), preprocess, frac_bits)?;
        let table = Table {
            row_words: images.shape()[1],
            words: images.into_data(),
        };
        plain_tables.insert(schedule::UPLOAD_IMAGES.into(), table);
        for job in [&done.judged, &done.classified] {
            equals_plain(job, &plain_tables)?;
        }
        let names = &self.loaded.splits.test.class_names;
        let (confusion, _) = done
            .judged
            .confusions(names)?
            .pop()
            .context("no confusion matrix")?;
        let float = float(&held, preprocess, k, names)?;
        let percent = |of: &Confusion| 100.0 * of.accuracy().unwrap_or(0.0);
        let line = |name: &str, value: String| println!("{name:<28} {value}");
        println!();
        line("test accuracy", format!("{:.2} %", percent(&confusion)));
        line("in floating point", format!("{:.2} %", percent(&float)));
        println!("\n{confusion}");
        let steps = &done.judged.steps;
        let batches: Vec<_> = steps
            .iter()
            .filter(|step| step.phase == "evaluate")
            .collect();
        let rows = confusion.total().max(1) as f64;
        let seconds: f64 = batches.iter().map(|step| step.seconds).sum();
        line("seconds per image", format!("{:.4}", seconds / rows));
        line(
            "rounds per batch",
            batches.first().map_or(0, |step| step.rounds).to_string(),
        );
        let sent: u64 = batches.iter().map(|step| step.sent_bytes).sum();
        line(
            "bytes per image and party",
            bytes((sent as f64 / rows) as u64),
        );
        let dealt: u64 = done.judged.result.dealer.sent_bytes[..3].iter().sum();
        line(
            "dealer bytes per image",
            bytes((dealt as f64 / rows) as u64),
        );
        line(
            "classes for hospital-1",
            format!("{:?}", done.classified.predictions()?.classes),
        );
        line(
            "what the pictures show",
            format!("{:?}", done.images.labels),
        );
        println!("\nsecure result equals the plaintext reference: yes");
        line(
            "seconds in all",
            format!("{:.1}", start.elapsed().as_secs_f64()),
        );
        Ok(())
    }
}

fn equals_plain(job: &Finished, tables: &Tables) -> Result<()> {
    let bar = bar(job.plan.steps.len() as u64, "steps");
    bar.set_message("checking: plaintext reference");
    let plain = reference::plain(&job.kind, tables, None, None, |done| {
        bar.set_position(done as u64)
    });
    bar.finish_and_clear();
    if plain?.revealed != job.revealed {
        bail!(
            "the secure result differs from the plaintext reference: this is a defect, please report it"
        );
    }
    Ok(())
}

/// The test rows by the k nearest in floating point: by distance, then by row; most votes, then the
/// nearest voter.
fn float(
    held: &[&Holding],
    preprocess: &Preprocess,
    k: usize,
    names: &[String],
) -> Result<Confusion> {
    let (train_labels, train) = concatenated(held, |holding| &holding.train)?;
    let (test_labels, test) = concatenated(held, |holding| &holding.test)?;
    let train = reference::matrix(train, preprocess)?;
    let test = reference::matrix(test, preprocess)?;
    let norms: Array1<f32> = train.rows().into_iter().map(|row| row.dot(&row)).collect();
    let predicted: Vec<u8> = test
        .rows()
        .into_iter()
        .map(|image| {
            let distance = &norms - &(2.0 * train.dot(&image));
            let mut order: Vec<usize> = (0..train.nrows()).collect();
            order.sort_by(|a, b| distance[*a].total_cmp(&distance[*b]));
            let voters: Vec<u8> = order[..k].iter().map(|row| train_labels[*row]).collect();
            let votes = |class: u8| voters.iter().filter(|voter| **voter == class).count();
            let most = voters.iter().map(|class| votes(*class)).max();
            let best = voters.iter().find(|class| Some(votes(**class)) == most);
            best.copied().unwrap_or(0)
        })
        .collect();
    Ok(Confusion::new(&test_labels, &predicted, names)?)
}
