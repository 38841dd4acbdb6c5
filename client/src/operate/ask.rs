//! `trefoil evaluate` and `trefoil predict`: what a kept model is good for, and what it says of new
//! images.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use trefoil_consortium::check_name;
use trefoil_models::job::{JobKind, PredictOutput};

use super::record::{Record, Show};
use super::share::{Normalise, held};
use super::train::{absolute, check_fit, check_new};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, advise, block_on, class_names};
use crate::data::{Crop, unlabelled};
use crate::experiment::read_network;
use crate::follow::bar;
use crate::remote::{Part, Upload};
use crate::{plan, rows};

/// Which model, and how it is made.
#[derive(Debug, Args)]
struct ModelArgs {
    /// The model's name at the parties.
    model: String,
    /// The network that it was trained as: a shipped name or a network file.
    #[arg(long, value_name = "NAME|FILE")]
    network: String,
    /// Fraction bits that it was trained with.
    #[arg(long, default_value_t = 16)]
    frac_bits: u8,
    /// The classes' names in order, with commas, for tables.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Vec<String>,
}

/// Arguments of `trefoil evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    home: HomeArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// The data set by whose test rows it is judged.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// Reveal the area under the ROC curve too: two classes only.
    #[arg(long)]
    auc: bool,
    #[command(flatten)]
    job: JobArgs,
}

/// Arguments of `trefoil predict`.
#[derive(Debug, Args)]
pub struct PredictArgs {
    #[command(flatten)]
    home: HomeArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// A folder of pictures, one picture, an .npz file, or a file of IDX images.
    #[arg(long, value_name = "PATH")]
    images: PathBuf,
    /// The array of an .npz file: `images`, else `test_images`, without it.
    #[arg(long, value_name = "NAME")]
    array: Option<String>,
    /// How pictures are brought to the network's proportions: as those of the data set were.
    #[arg(long, value_enum, default_value_t)]
    crop: Crop,
    /// The numbers that the data set was shared with.
    #[arg(long, value_name = "mean=M,std=S")]
    preprocess: Normalise,
    /// What is revealed, to this member alone: class, probabilities or logits.
    #[arg(long, default_value = "class", value_parser = plan::parse_output)]
    output: PredictOutput,
    /// Write the table here instead of to standard output.
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    #[command(flatten)]
    job: JobArgs,
}

/// Judges a model.
pub fn evaluate(args: &EvaluateArgs) -> Result<()> {
    let network = read_network(&args.model.network)?;
    let names = class_names(&args.model.class_names, network.classes)?;
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let info = held(&remote, &args.dataset).await?;
        check_fit(&network, &args.dataset, &info)?;
        let kind = JobKind::Evaluate {
            model: args.model.model.clone(),
            network: network.to_toml(),
            frac_bits: args.model.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
            dataset: info.reference(&args.dataset),
            auc: args.auc,
        };
        let record = Record {
            job: member.describe("evaluate", kind, &args.job)?,
            show: Show {
                class_names: names,
                ..Show::default()
            },
        };
        let show = record.show.clone();
        let done = member
            .run(&remote, record, "evaluating", args.job.detach)
            .await?;
        remote.close().await;
        match done {
            Some(done) => present(&done, &show),
            None => Ok(()),
        }
    })
}

/// Has images classified.
pub fn predict(args: &PredictArgs) -> Result<()> {
    let network = read_network(&args.model.network)?;
    let names = class_names(&args.model.class_names, network.classes)?;
    check_name(&args.model.model).map_err(anyhow::Error::msg)?;
    check_new(args.to.as_deref(), "--to")?;
    let member = Member::load(&args.home)?;
    let Normalise(preprocess) = args.preprocess;
    let new = unlabelled::load(
        &args.images,
        network.input,
        args.crop,
        args.array.as_deref(),
    )?;
    let upload = Upload {
        dataset: String::new(),
        part: Part::Predict,
        images: rows::images(new.images.view(), &preprocess, args.model.frac_bits)?,
        labels: None,
        shape: network.input.to_vec(),
    };
    let job = |upload: String| {
        let kind = JobKind::Predict {
            model: args.model.model.clone(),
            network: network.to_toml(),
            frac_bits: args.model.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
            rows: new.names.len(),
            upload,
            output: args.output,
        };
        trefoil_models::schedule(&kind)?;
        member.describe("predict", kind, &args.job)
    };
    // A job that cannot be is found before an image is shared.
    job("unnamed".into())?;
    block_on(async {
        let remote = member.connect().await?;
        let bar = bar(new.names.len() as u64, "images");
        bar.set_message("sharing the images");
        let sent = remote
            .upload(upload, &mut |done| bar.set_position(done as u64))
            .await;
        bar.finish_and_clear();
        let receipt = sent.map_err(|err| advise(err, "the images were not shared"))?;
        let record = Record {
            job: job(receipt.upload)?,
            show: Show {
                class_names: names,
                images: new.names.clone(),
                to: absolute(args.to.as_deref())?,
            },
        };
        let show = record.show.clone();
        let done = member
            .run(&remote, record, "predicting", args.job.detach)
            .await?;
        remote.close().await;
        match done {
            Some(done) => present(&done, &show),
            None => Ok(()),
        }
    })
}
