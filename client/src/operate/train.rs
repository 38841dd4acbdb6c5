//! `trefoil train`: a job on a shared data set. Its model stays at the parties, as shares.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::DatasetInfo;
use trefoil_models::Network;
use trefoil_models::cost::{self, Work};
use trefoil_models::job::{JobKind, Preparation, TrainSpec};

use super::recipe::RecipeArgs;
use super::record::{Record, Show};
use super::share::{Normalise, held};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, block_on, class_names};
use crate::experiment::read_network;
use crate::plan;

/// Seconds of work between two checkpoints, where nobody says otherwise.
const CHECKPOINT_S: f64 = 60.0;
/// More steps between two are as many as all.
const MAX_STEPS: f64 = 1e6;

/// Arguments of `trefoil train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// A shipped network's name or a network file.
    #[arg(long, value_name = "NAME|FILE")]
    network: String,
    /// The data set; see `trefoil dataset`.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// The name under which the parties keep their shares of the weights.
    #[arg(long, value_name = "MODEL")]
    save_as: String,
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The numbers that the rows were shared with: kept with the model, so that predictions apply
    /// them.
    #[arg(long, value_name = "mean=M,std=S")]
    preprocess: Option<Normalise>,
    /// The parties write their shares of the weights down after so many steps of an epoch, and at its
    /// end, so that a job that loses a machine goes on from there; 0: never. Without this, about once
    /// a minute as far as the work can be estimated.
    #[arg(long, value_name = "STEPS")]
    checkpoint_every: Option<u64>,
    /// Reveal the confusion matrix on the test rows after every epoch, to this member.
    #[arg(long)]
    reveal_metrics: bool,
    /// Reveal the trained WEIGHTS to this member, into this .npz file: they are no secret any more,
    /// and what they tell about the training rows is not hidden.
    #[arg(long, value_name = "FILE")]
    reveal_weights: Option<PathBuf>,
    /// The classes' names in order, with commas, for tables.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Vec<String>,
    #[command(flatten)]
    job: JobArgs,
}

/// Refuses a file that is there, or whose folder is not, before anything is computed for it.
pub fn check_new(path: Option<&Path>, option: &str) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    if path.symlink_metadata().is_ok() {
        bail!(
            "{option}: {} exists; nothing is overwritten",
            path.display()
        );
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        bail!("{option}: there is no folder for {}", path.display());
    }
    Ok(())
}

/// An absolute path, so that the result can be fetched from another folder.
pub fn absolute(path: Option<&Path>) -> Result<Option<PathBuf>> {
    let path = path.map(std::path::absolute).transpose();
    path.context("the current folder is not known")
}

/// Checks that a network reads the data set's images and tells its classes apart.
pub fn check_fit(network: &Network, dataset: &str, info: &DatasetInfo) -> Result<()> {
    let Some(schema) = &info.schema else {
        bail!(
            "data set {dataset} is empty at the parties: a hospital has to share rows first (trefoil share)"
        );
    };
    let shape: Vec<u32> = network.input.iter().map(|side| *side as u32).collect();
    if schema.shape != shape || schema.classes as usize != network.classes {
        bail!(
            "network {} reads images of shape {shape:?} and tells {} classes apart; data set {dataset} has {:?} and {}",
            network.name,
            network.classes,
            schema.shape,
            schema.classes
        );
    }
    Ok(())
}

/// Training steps in about a minute, by the estimate of `trefoil plan`.
fn checkpoint_every(
    network: &Network,
    spec: &TrainSpec,
    link: trefoil_cluster::Link,
) -> Result<u64> {
    let plan = cost::plan(network, spec, Work::Train, link.profile())?;
    let step_s = plan::estimated_seconds(&plan.cost(), link);
    Ok((CHECKPOINT_S / step_s.max(1e-6)).clamp(1.0, MAX_STEPS) as u64)
}

/// Trains a network.
pub fn train(args: &TrainArgs) -> Result<()> {
    let network = read_network(&args.network)?;
    check_new(args.reveal_weights.as_deref(), "--reveal-weights")?;
    let names = class_names(&args.class_names, network.classes)?;
    let member = Member::load(&args.home)?;
    let mut spec = args.recipe.spec(member.consortium.core.ring_bits);
    spec.preparation = args.preprocess.map(|Normalise(p)| Preparation {
        mean: p.mean,
        std: p.std,
    });
    spec.check_for(&network)?;
    block_on(async {
        let remote = member.connect().await?;
        let info = held(&remote, &args.dataset).await?;
        check_fit(&network, &args.dataset, &info)?;
        let kind = JobKind::Train {
            network: network.to_toml(),
            spec: spec.clone(),
            dataset: info.reference(&args.dataset),
            evaluate_each_epoch: args.reveal_metrics,
            save_as: args.save_as.clone(),
            reveal_weights: args.reveal_weights.is_some(),
        };
        let mut job = member.describe("train", kind, &args.job)?;
        job.checkpoint_every = match args.checkpoint_every {
            Some(every) => every,
            None => checkpoint_every(&network, &spec, args.job.link)?,
        };
        let record = Record {
            job,
            show: Show {
                class_names: names,
                images: Vec::new(),
                to: absolute(args.reveal_weights.as_deref())?,
            },
        };
        let show = record.show.clone();
        let done = member
            .run(&remote, record, "training", args.job.detach)
            .await?;
        remote.close().await;
        match done {
            Some(done) => present(&done, &show),
            None => Ok(()),
        }
    })
}
