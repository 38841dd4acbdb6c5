//! `trefoil simulate --knn K`: nothing is trained; the test rows, and some images of one hospital,
//! are classified by the nearest training rows. Held against the plain run bit for bit, and beside
//! the definition on the pictures' pixels.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use ndarray::Array4;
use trefoil_models::job::{DatasetRef, JobKind};
use trefoil_models::neighbours::Queries;
use trefoil_models::plain_run::{Table, Tables};
use trefoil_models::{NeighbourSpec, schedule};

use super::tables::{Holding, concatenated, holdings, tables};
use super::{DATASET, Simulation, reference, totals};
use crate::data::{self, Dataset};
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
    images: Dataset,
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
        let (labels, test) = concatenated(&held, |holding| &holding.test)?;
        let defined = Confusion::new(&labels, &by_definition(&held, &test, k)?, names)?;
        let percent = |of: &Confusion| 100.0 * of.accuracy().unwrap_or(0.0);
        let same = match confusion == defined {
            true => "the same counts",
            false => "other counts: pixels are rounded before they are shared",
        };
        println!();
        line("test accuracy", format!("{:.2} %", percent(&confusion)));
        line(
            "by definition on the pixels",
            format!("{:.2} %, {same}", percent(&defined)),
        );
        println!("\n{confusion}");
        print_costs(done, confusion.total());
        println!();
        line(
            "classes for hospital-1",
            format!("{:?}", done.classified.predictions()?.classes),
        );
        line(
            "by definition on the pixels",
            format!("{:?}", by_definition(&held, &done.images.images, k)?),
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

fn line(name: &str, value: String) {
    println!("{name:<28} {value}");
}

/// Costs of an image, with the share of its batch, and of both jobs. Opening the training rows is in
/// the seconds and bytes of all, and in what is dealt.
fn print_costs(done: &Done, images: u64) {
    let images = images.max(1) as f64;
    let steps = &done.judged.steps;
    let batches: Vec<_> = steps
        .iter()
        .filter(|step| step.phase == "evaluate")
        .collect();
    let seconds: f64 = batches.iter().map(|step| step.seconds).sum();
    let sent: u64 = batches.iter().map(|step| step.sent_bytes).sum();
    let dealt: u64 = done.judged.result.dealer.sent_bytes[..3].iter().sum();
    let each = |sum: u64| bytes((sum as f64 / images) as u64);
    line(
        "seconds of all test images",
        format!("{:.1}", done.judged.seconds),
    );
    line("batches of test images", batches.len().to_string());
    line("seconds per image", format!("{:.4}", seconds / images));
    line(
        "rounds per batch",
        batches.first().map_or(0, |step| step.rounds).to_string(),
    );
    line("bytes per image and party", each(sent));
    line("dealer bytes per image", each(dealt));
    let (rounds, sent, dealt, _) = totals(&[&done.judged, &done.classified]);
    line("rounds in all", rounds.to_string());
    line("bytes sent per party", bytes(sent));
    line("dealer bytes", bytes(dealt));
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

/// Classes of images by the k nearest training rows: by distance, then by row; most votes, then the
/// nearest voter. Distances are those of the pictures' bytes, hence exact: what prepares pixels moves
/// and scales them all alike, which leaves the order of distances as it is.
fn by_definition(held: &[&Holding], images: &Array4<u8>, k: usize) -> Result<Vec<u8>> {
    let (labels, train) = concatenated(held, |holding| &holding.train)?;
    let values = train.len() / labels.len();
    let train: Vec<u8> = train.into_iter().collect();
    let bar = bar(images.shape()[0] as u64, "images");
    bar.set_message("checking: the definition");
    let classes = images.outer_iter().map(|image| {
        let image: Vec<u8> = image.iter().copied().collect();
        let rows = train.chunks_exact(values);
        let mut order: Vec<(u64, usize)> = rows
            .map(|row| squared_distance(row, &image))
            .zip(0..)
            .collect();
        order.select_nth_unstable(k - 1);
        order.truncate(k);
        order.sort_unstable();
        bar.inc(1);
        majority(order.iter().map(|(_, row)| labels[*row]).collect())
    });
    let classes = classes.collect();
    bar.finish_and_clear();
    classes
}

fn squared_distance(a: &[u8], b: &[u8]) -> u64 {
    let squares = a
        .iter()
        .zip(b)
        .map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2));
    squares.sum()
}

/// The class with the most votes; of several the one whose voter comes first.
fn majority(voters: Vec<u8>) -> Result<u8> {
    let votes = |class: u8| voters.iter().filter(|voter| **voter == class).count();
    let most = voters.iter().map(|class| votes(*class)).max();
    let best = voters.iter().find(|class| Some(votes(**class)) == most);
    best.copied().context("nobody votes")
}
