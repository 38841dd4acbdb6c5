//! `trefoil train`: a job on a shared data set. Its model stays at the parties, as shares.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::DatasetInfo;
use trefoil_models::cost::{self, Work};
use trefoil_models::job::{JobKind, Preparation, TrainSpec};
use trefoil_models::{EarlyStop, Network};

use super::models::known_model;
use super::recipe::RecipeArgs;
use super::record::{Record, Show};
use super::share::{Normalise, held};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, block_on, class_names, weights};
use crate::experiment::read_network;
use crate::plan;
use crate::remote::Remote;

/// Seconds of work between two checkpoints, where nobody says otherwise.
const CHECKPOINT_S: f64 = 60.0;
/// More steps between two are as many as all.
const MAX_STEPS: f64 = 1e6;

/// Arguments of `trefoil train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// A shipped network's name or a network file; that of the model that training starts from, if it
    /// does.
    #[arg(long, value_name = "NAME|FILE", required_unless_present = "start_from")]
    network: Option<String>,
    /// Start from the weights of this kept model instead of from seeded ones: NAME, which means its
    /// newest version, or NAME@VERSION. The model stays as it is.
    #[arg(long, value_name = "MODEL")]
    start_from: Option<String>,
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
    /// Stop when so many epochs in a row were no better, and keep the best epoch's weights. This
    /// REVEALS to the three parties and this member how many validation rows are right after each
    /// epoch, and to the dealer when training stops.
    #[arg(long, value_name = "EPOCHS", requires = "validation_rows")]
    early_stop: Option<usize>,
    /// An epoch is better that is right in more than this part of the validation rows beyond the best.
    #[arg(
        long,
        value_name = "PART",
        default_value_t = 0.0,
        requires = "early_stop"
    )]
    min_delta: f64,
    /// So many of the training rows are set aside by the seed, to validate by; they are not trained on.
    #[arg(long, value_name = "ROWS", requires = "early_stop")]
    validation_rows: Option<usize>,
    /// Reveal the confusion matrix on the test rows after every epoch, to this member.
    #[arg(long)]
    reveal_metrics: bool,
    /// Reveal the trained WEIGHTS to this member, into this file: .npz, .safetensors, or .onnx with
    /// the network. They are no secret any more, and what they tell about the training rows is not
    /// hidden.
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

/// What training from a kept model has to have in common with it goes into `spec`; returns the
/// model's network.
async fn start(
    remote: &Remote,
    model: &str,
    given: Option<Network>,
    spec: &mut TrainSpec,
) -> Result<Network> {
    let known = known_model(remote, model).await?;
    let differs = given
        .as_ref()
        .and_then(|given| given.difference(&known.network));
    if let Some(difference) = differs {
        bail!(
            "--start-from: model {model} was made as another network than --network: {difference}"
        );
    }
    if spec.frac_bits != known.frac_bits {
        bail!(
            "--start-from: model {model} has {} fraction bits, the job {}: use --frac-bits {}, and rows that were shared with as many",
            known.frac_bits,
            spec.frac_bits,
            known.frac_bits
        );
    }
    match (known.preparation, spec.preparation) {
        (Some(made), Some(said)) if made != said => bail!(
            "--preprocess: model {model} was made with {made}: leave --preprocess out, and share the rows alike"
        ),
        (made, said) => spec.preparation = made.or(said),
    }
    spec.start_from = Some(known.reference);
    Ok(known.network)
}

/// Trains a network.
pub fn train(args: &TrainArgs) -> Result<()> {
    let given = args.network.as_deref().map(read_network).transpose()?;
    if let Some(path) = &args.reveal_weights {
        check_new(Some(path), "--reveal-weights")?;
        weights::check_ending(path, "--reveal-weights")?;
    }
    let member = Member::load(&args.home)?;
    let mut spec = args.recipe.spec(member.consortium.core.ring_bits);
    spec.preparation = args.preprocess.map(|Normalise(p)| Preparation {
        mean: p.mean,
        std: p.std,
    });
    spec.early_stop = match (args.early_stop, args.validation_rows) {
        (Some(patience), Some(validation_rows)) => Some(EarlyStop {
            patience,
            min_delta: args.min_delta,
            validation_rows,
        }),
        _ => None,
    };
    if let Some(network) = &given {
        spec.check_for(network)?;
    }
    block_on(async {
        let remote = member.connect().await?;
        let network = match &args.start_from {
            None => given.context("--network: name a network")?,
            Some(model) => start(&remote, model, given, &mut spec).await?,
        };
        let names = class_names(&args.class_names, network.classes)?;
        spec.check_for(&network)?;
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
        trefoil_models::schedule(&kind)?;
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
                ..Show::default()
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
