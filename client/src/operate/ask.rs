//! `trefoil evaluate` and `trefoil predict`: what a kept model is good for, and what it says of new
//! images.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use trefoil_models::job::{JobKind, PredictOutput};
use trefoil_models::schedule;
use trefoil_protocol::ring::Tensor;

use super::models::{KnownModel, ModelArgs};
use super::record::{Record, Show};
use super::serve::{predict_served, serving};
use super::share::{Normalise, held};
use super::train::{absolute, check_fit, check_new};
use super::watch::{predicted, present};
use super::{HomeArgs, JobArgs, Member, advise, block_on, class_names};
use crate::data::{Crop, Preprocess, unlabelled};
use crate::follow::{Finished, bar};
use crate::remote::{Part, Remote, Upload};
use crate::{plan, rows};

/// Arguments of `trefoil evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    home: HomeArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// The classes' names in order, with commas, for tables.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Vec<String>,
    /// The data set by whose test rows it is judged.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// Reveal the area under the ROC curve too: two classes only.
    #[arg(long)]
    auc: bool,
    /// Reveal a reliability histogram too: in ten bins of the predicted class's probability the number
    /// of rows, of right ones, and their mean probability.
    #[arg(long)]
    calibration: bool,
    /// Reveal the confusion matrix of each hospital's test rows too: every party's policy has to name
    /// the output `hospitals`.
    #[arg(long)]
    by_hospital: bool,
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
    /// The classes' names in order, with commas, for tables.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Vec<String>,
    /// A folder of pictures, one picture, an .npz file, or a file of IDX images.
    #[arg(long, value_name = "PATH")]
    images: PathBuf,
    /// The array of an .npz file: `images`, else `test_images`, without it.
    #[arg(long, value_name = "NAME")]
    array: Option<String>,
    /// How pictures are brought to the network's proportions: as those of the data set were.
    #[arg(long, value_enum, default_value_t)]
    crop: Crop,
    /// The numbers that the data set was shared with; needed where they are not kept with the model.
    #[arg(long, value_name = "mean=M,std=S")]
    preprocess: Option<Normalise>,
    /// Ask in this serving session: the first digits of its job's hash. Without it one that serves
    /// the model is asked, where there is one, and else a job is submitted.
    #[arg(long, value_name = "JOB", conflicts_with = "detach")]
    served: Option<String>,
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
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let known = args.model.find(&remote).await?;
        let names = class_names(&args.class_names, known.network.classes)?;
        let info = held(&remote, &args.dataset).await?;
        check_fit(&known.network, &args.dataset, &info)?;
        let kind = JobKind::Evaluate {
            model: known.reference,
            network: known.network.to_toml(),
            frac_bits: known.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
            dataset: info.reference(&args.dataset),
            auc: args.auc,
            calibration: args.calibration,
            by_hospital: match args.by_hospital {
                true => info.by_hospital(),
                false => Vec::new(),
            },
        };
        schedule(&kind)?;
        let members = member.consortium.members.iter();
        let hospitals = members.map(|entry| (entry.pin.to_string(), entry.name.clone()));
        let record = Record {
            job: member.describe("evaluate", kind, &args.job)?,
            show: Show {
                class_names: names,
                hospitals: match args.by_hospital {
                    true => hospitals.collect(),
                    false => Default::default(),
                },
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

/// How images for a model are prepared: as the model says, and as was said, if both are.
fn preparation(args: &PredictArgs, known: &KnownModel) -> Result<Preprocess> {
    let kept = known.preparation.map(|kept| Preprocess {
        mean: kept.mean,
        std: kept.std,
    });
    let model = &args.model.model;
    match (kept, args.preprocess) {
        (Some(kept), Some(Normalise(said))) if kept != said => bail!(
            "--preprocess: model {model} was made with mean={},std={}: leave --preprocess out",
            kept.mean,
            kept.std
        ),
        (Some(kept), _) => {
            kept.check()?;
            Ok(kept)
        }
        (None, Some(Normalise(said))) => Ok(said),
        (None, None) => bail!(
            "--preprocess mean=M,std=S: model {model} does not say how its images are prepared; ask whoever made it"
        ),
    }
}

/// Has images classified: in a serving session, or by a job.
pub fn predict(args: &PredictArgs) -> Result<()> {
    check_new(args.to.as_deref(), "--to")?;
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let known = args.model.find(&remote).await?;
        let names = class_names(&args.class_names, known.network.classes)?;
        let preprocess = preparation(args, &known)?;
        let (input, array) = (known.network.input, args.array.as_deref());
        let new = unlabelled::load(&args.images, input, args.crop, array)?;
        let images = rows::images(new.images.view(), &preprocess, known.frac_bits)?;
        let show = Show {
            class_names: names,
            images: new.names,
            to: absolute(args.to.as_deref())?,
            ..Show::default()
        };
        let model = &known.reference;
        if !args.job.detach
            && let Some(serving) =
                serving(&remote, model, args.output, args.served.as_deref()).await?
        {
            let predictions = predict_served(&remote, &serving, &images).await;
            remote.close().await;
            return predicted(&predictions?, &show);
        }
        let done = predict_by_job(args, &member, &remote, &known, images, show.clone()).await?;
        remote.close().await;
        match done {
            Some(done) => present(&done, &show),
            None => Ok(()),
        }
    })
}

async fn predict_by_job(
    args: &PredictArgs,
    member: &Member,
    remote: &Remote,
    known: &KnownModel,
    images: Tensor,
    show: Show,
) -> Result<Option<Finished>> {
    let job = |upload: String| {
        let kind = JobKind::Predict {
            model: known.reference.clone(),
            network: known.network.to_toml(),
            frac_bits: known.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
            rows: show.images.len(),
            upload,
            output: args.output,
        };
        schedule(&kind)?;
        member.describe("predict", kind, &args.job)
    };
    // A job that cannot be is found before an image is shared.
    job("unnamed".into())?;
    let upload = Upload {
        dataset: String::new(),
        part: Part::Predict,
        images,
        labels: None,
        shape: known.network.input.to_vec(),
    };
    let bar = bar(show.images.len() as u64, "images");
    bar.set_message("sharing the images");
    let sent = remote
        .upload(upload, &mut |done| bar.set_position(done as u64))
        .await;
    bar.finish_and_clear();
    let receipt = sent.map_err(|err| advise(err, "the images were not shared"))?;
    let record = Record {
        job: job(receipt.upload)?,
        show,
    };
    let detach = args.job.detach;
    member.run(remote, record, "predicting", detach).await
}
