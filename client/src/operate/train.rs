//! `trefoil train`: a job on a shared data set. Its model stays at the parties, as shares.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::DatasetInfo;
use trefoil_models::Network;
use trefoil_models::job::JobKind;

use super::recipe::RecipeArgs;
use super::record::{Record, Show};
use super::share::held;
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, block_on, class_names};
use crate::experiment::read_network;

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

/// Trains a network.
pub fn train(args: &TrainArgs) -> Result<()> {
    let network = read_network(&args.network)?;
    check_new(args.reveal_weights.as_deref(), "--reveal-weights")?;
    let names = class_names(&args.class_names, network.classes)?;
    let member = Member::load(&args.home)?;
    let spec = args.recipe.spec(member.consortium.core.ring_bits);
    spec.check_for(&network)?;
    block_on(async {
        let remote = member.connect().await?;
        let info = held(&remote, &args.dataset).await?;
        check_fit(&network, &args.dataset, &info)?;
        let kind = JobKind::Train {
            network: network.to_toml(),
            spec,
            dataset: info.reference(&args.dataset),
            evaluate_each_epoch: args.reveal_metrics,
            save_as: args.save_as.clone(),
            reveal_weights: args.reveal_weights.is_some(),
        };
        let record = Record {
            job: member.describe("train", kind, &args.job)?,
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
