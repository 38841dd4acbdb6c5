//! `trefoil knn`: images are classified by the nearest training rows of a shared data set, or its
//! test rows are, to judge that. No network and no model: what is agreed on is the data set and k.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_models::neighbours::Queries;
use trefoil_models::{JobKind, NeighbourSpec};
use trefoil_protocol::ring::Tensor;

use super::record::{Record, Show};
use super::share::{Normalise, held};
use super::train::{absolute, check_new};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, advise, block_on, class_names};
use crate::data::{Crop, unlabelled};
use crate::follow::bar;
use crate::remote::{DatasetInfo, Part, Remote, Upload};
use crate::rows;

/// Arguments of `trefoil knn`.
#[derive(Debug, Args)]
pub struct KnnArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// The data set whose training rows are the neighbours.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// Rows that vote: 1 to 15. A tie goes to the class of the nearest of the tied.
    #[arg(short, long, default_value_t = 5)]
    k: usize,
    /// Pictures to classify: a folder, one picture, an .npz file, or a file of IDX images. Without
    /// it the data set's test rows are classified, and their confusion matrix is revealed.
    #[arg(long, value_name = "PATH", requires = "preprocess")]
    images: Option<PathBuf>,
    /// The array of an .npz file: `images`, else `test_images`, without it.
    #[arg(long, value_name = "NAME", requires = "images")]
    array: Option<String>,
    /// How pictures are brought to the data set's proportions: as its own were.
    #[arg(long, value_enum, default_value_t)]
    crop: Crop,
    /// The numbers that the data set was shared with.
    #[arg(long, value_name = "mean=M,std=S", requires = "images")]
    preprocess: Option<Normalise>,
    /// Fraction bits that the data set was shared with.
    #[arg(long, default_value_t = 16)]
    frac_bits: u8,
    /// The classes' names in order, with commas, for tables.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Vec<String>,
    /// Write the table of classes here instead of to standard output.
    #[arg(long, value_name = "FILE", requires = "images")]
    to: Option<PathBuf>,
    #[command(flatten)]
    job: JobArgs,
}

/// Runs the command.
pub fn knn(args: &KnnArgs) -> Result<()> {
    check_new(args.to.as_deref(), "--to")?;
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let info = held(&remote, &args.dataset).await?;
        let spec = spec(args, &member, &info)?;
        let mut show = Show {
            class_names: class_names(&args.class_names, spec.classes)?,
            to: absolute(args.to.as_deref())?,
            ..Show::default()
        };
        let (spec, message) = match &args.images {
            None => (spec, "judging by the test rows"),
            Some(path) => {
                let array = args.array.as_deref();
                let new = unlabelled::load(path, spec.input, args.crop, array)?;
                let Normalise(preprocess) = args.preprocess.context("--preprocess is missing")?;
                let images = rows::images(new.images.view(), &preprocess, args.frac_bits)?;
                show.images = new.names;
                (upload(&remote, spec, images).await?, "classifying")
            }
        };
        let record = Record {
            job: member.describe("knn", JobKind::Neighbours(spec), &args.job)?,
            show: show.clone(),
        };
        let done = member
            .run(&remote, record, message, args.job.detach)
            .await?;
        remote.close().await;
        done.map_or(Ok(()), |done| present(&done, &show))
    })
}

/// The job on the test split.
fn spec(args: &KnnArgs, member: &Member, info: &DatasetInfo) -> Result<NeighbourSpec> {
    let schema = info.schema.as_ref().with_context(|| {
        format!(
            "data set {} is empty at the parties: a hospital has to share rows first (trefoil share)",
            args.dataset
        )
    })?;
    let [c, h, w] = schema.shape[..] else {
        bail!(
            "data set {} holds no images: shape {:?}",
            args.dataset,
            schema.shape
        );
    };
    let spec = NeighbourSpec {
        dataset: info.reference(&args.dataset),
        input: [c as usize, h as usize, w as usize],
        classes: schema.classes as usize,
        k: args.k,
        frac_bits: args.frac_bits,
        ring_bits: member.consortium.core.ring_bits,
        queries: match &args.images {
            None => Queries::Test,
            Some(_) => Queries::Upload {
                rows: 1,
                upload: String::new(),
            },
        },
    };
    // A job that cannot be is found before an image is shared.
    spec.check()?;
    Ok(spec)
}

/// Shares the images; the job on them.
async fn upload(remote: &Remote, spec: NeighbourSpec, images: Tensor) -> Result<NeighbourSpec> {
    let rows = images.shape()[0];
    let bar = bar(rows as u64, "images");
    bar.set_message("sharing the images");
    let upload = Upload {
        dataset: String::new(),
        part: Part::Predict,
        images,
        labels: None,
        shape: spec.input.to_vec(),
    };
    let sent = remote
        .upload(upload, &mut |done| bar.set_position(done as u64))
        .await;
    bar.finish_and_clear();
    let receipt = sent.map_err(|err| advise(err, "the images were not shared"))?;
    Ok(NeighbourSpec {
        queries: Queries::Upload {
            rows,
            upload: receipt.upload,
        },
        ..spec
    })
}
