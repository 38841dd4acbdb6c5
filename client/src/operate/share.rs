//! `trefoil share`: a hospital's rows become shares at the three parties; `trefoil dataset`: what
//! they hold.
//!
//! Everything is read, checked and compared with what the parties hold before the first share
//! leaves. The home remembers an upload before it begins: after a broken link, a crash or a reboot
//! the same command goes on where it was, and rows that are complete are not shared twice.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use trefoil_consortium::receipt::Schema;
use trefoil_consortium::{check_name, hex};
use trefoil_protocol::party::PartyId;

use super::record::{UploadRecord, part_name, upload_path};
use super::{HomeArgs, Member, advise, block_on};
use crate::data::rows::{Checked, Rows};
use crate::data::{self, Crop, DataSource, Division, Place, Preprocess, Want};
use crate::experiment::read_network;
use crate::follow::bar;
use crate::remote::{DatasetInfo, LazyUpload, Part, Receipt, Remote, RemoteError};
use crate::rows;

/// Arguments of `trefoil share`.
#[derive(Debug, Args)]
pub struct ShareArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// The data set that the rows become part of.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// A folder of pictures, an .npz file in MedMNIST's layout, a folder of IDX files, or `digits`
    /// for the digits inside this program (docs/data.md).
    #[arg(long, value_name = "PATH")]
    images: PathBuf,
    /// The table file,label[,group][,split] of a folder of pictures; without it labels.csv in the
    /// folder, where there is one.
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Share this part alone: what the source itself puts there, or all of it where the source does
    /// not divide its rows. Without it training and test rows are shared; a source that does not
    /// divide its rows is divided 80 / 10 / 10, and validation rows stay here.
    #[arg(long)]
    part: Option<WhichPart>,
    /// Share these rows of the part alone: FROM..TO, from 0, without TO.
    #[arg(long, value_name = "FROM..TO", requires = "part")]
    rows: Option<RowRange>,
    /// The network that will read the images: a shipped name or a network file. It decides shape
    /// and classes; without it the data set that is there already, or the source, does.
    #[arg(long, value_name = "NAME|FILE")]
    network: Option<String>,
    /// The classes' names in order, with commas: the same at every hospital.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    class_names: Vec<String>,
    /// What is subtracted from pixels between 0 and 1, and what they are divided by: the same at
    /// every hospital and for predictions.
    #[arg(long, value_name = "mean=M,std=S")]
    preprocess: Option<Normalise>,
    /// Fraction bits: those of the jobs that will read the data set.
    #[arg(long, default_value_t = 16)]
    frac_bits: u8,
    /// Divides a source that does not divide itself.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How pictures are brought to the network's proportions before they are resized: the same at
    /// every hospital and for predictions.
    #[arg(long, value_enum, default_value_t)]
    crop: Crop,
    /// Share the rows although this home remembers an upload of them.
    #[arg(long)]
    again: bool,
}

/// A part that may be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WhichPart {
    /// Rows to train on.
    Train,
    /// Rows that models are judged by.
    Test,
}

/// Some rows of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RowRange(Range<usize>);

impl FromStr for RowRange {
    type Err = String;

    fn from_str(text: &str) -> Result<RowRange, String> {
        let ends = text.split_once("..");
        let ends = ends.and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
        match ends {
            Some((from, to)) if from < to => Ok(RowRange(from..to)),
            _ => Err("expected FROM..TO with FROM below TO, such as 0..4000".into()),
        }
    }
}

/// [`Preprocess`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalise(pub Preprocess);

impl FromStr for Normalise {
    type Err = String;

    fn from_str(text: &str) -> Result<Normalise, String> {
        let (mut mean, mut std) = (None, None);
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let slot = match key.trim() {
                "mean" => &mut mean,
                "std" => &mut std,
                _ => return Err("expected mean=M,std=S, such as mean=0.1307,std=0.3081".into()),
            };
            let number = value.trim().parse::<f64>();
            *slot = Some(number.map_err(|_| format!("{value:?} is no number"))?);
        }
        let (Some(mean), Some(std)) = (mean, std) else {
            return Err("both are needed: mean=M,std=S".into());
        };
        let preprocess = Preprocess { mean, std };
        preprocess.check().map_err(|err| err.to_string())?;
        Ok(Normalise(preprocess))
    }
}

/// Arguments of `trefoil dataset`.
#[derive(Debug, Args)]
pub struct DatasetArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// The data set.
    name: String,
}

/// Shows what the three parties hold of a data set.
pub fn dataset(args: &DatasetArgs) -> Result<()> {
    check_name(&args.name).map_err(anyhow::Error::msg)?;
    let member = Member::load(&args.home)?;
    let info = block_on(async {
        let remote = member.connect().await?;
        let info = held(&remote, &args.name).await;
        remote.close().await;
        info
    })?;
    let Some(schema) = &info.schema else {
        println!("data set {}: nothing is shared yet", args.name);
        return Ok(());
    };
    println!("data set      {}", args.name);
    println!("image shape   {}", shape(&schema.shape));
    println!("classes       {}", schema.classes);
    println!("training rows {}", info.train_rows);
    println!("test rows     {}", info.test_rows);
    println!("snapshot      {}", hex(&info.snapshot));
    // For people by name; the parties keep them by key.
    let mut contributions: Vec<_> = info
        .contributions
        .iter()
        .map(|contribution| {
            let members = member.consortium.members.iter();
            let mut owner = members.filter(|member| member.pin == contribution.hospital);
            let owner = owner.next().map_or("(no member now)", |owner| &owner.name);
            (owner, contribution)
        })
        .collect();
    contributions.sort_by_key(|(owner, contribution)| (*owner, contribution.number));
    for (owner, contribution) in contributions {
        println!(
            "{:13} upload {}, {} {} rows",
            owner,
            contribution.number,
            contribution.rows,
            part_name(contribution.part)
        );
    }
    Ok(())
}

/// What the three parties hold of a data set.
pub async fn held(remote: &Remote, name: &str) -> Result<DatasetInfo> {
    let info = remote.dataset(name).await;
    info.map_err(|err| advise(err, &format!("cannot look at data set {name}")))
}

/// Shares a hospital's rows.
pub fn share(args: &ShareArgs) -> Result<()> {
    check_name(&args.dataset).map_err(|err| anyhow::anyhow!("--dataset: {err}"))?;
    let member = Member::load(&args.home)?;
    member.must_be_hospital()?;
    // Asked before the images are read: reading may take longer than a quiet link lives.
    let info = block_on(async {
        let remote = member.connect().await?;
        let info = held(&remote, &args.dataset).await;
        remote.close().await;
        info
    })?;
    let parts = find(args, info.schema.as_ref())?;
    for (_, rows) in &parts {
        fits(args, info.schema.as_ref(), rows)?;
    }
    let checked = check(&parts)?;
    let Some(Normalise(preprocess)) = args.preprocess else {
        bail!("{}", measured(&parts, &checked)?);
    };
    let mut uploads = Vec::new();
    for ((part, rows), checked) in parts.into_iter().zip(&checked) {
        let numbers = (&preprocess, args.frac_bits);
        let place = (args.dataset.as_str(), part);
        let core = member.consortium.core_hash();
        let path = upload_path(&member.home, core, place, checked.digest, numbers);
        let known = match args.again {
            true => None,
            false => UploadRecord::load(&path)?,
        };
        announce(&member, args, part, &rows, checked, known.as_ref());
        let upload = rows::lazy_upload(
            &args.dataset,
            part,
            Arc::new(rows),
            &preprocess,
            args.frac_bits,
        )?;
        uploads.push((part, upload, path, known));
    }
    let complete = |known: &Option<UploadRecord>| known.as_ref().is_some_and(|k| k.complete);
    if uploads.iter().all(|(.., known)| complete(known)) {
        bail!(
            "these rows are part of {} already: shared once more they would count twice; if that is \
             meant, say --again",
            args.dataset
        );
    }
    uploads.retain(|(.., known)| !complete(known));
    block_on(async {
        let remote = member.connect().await?;
        for (part, upload, path, known) in uploads {
            let receipt = send(&remote, part, upload, &path, known).await?;
            println!(
                "shared {} {} rows with data set {}: upload {} of {}, digest {}",
                receipt.rows,
                part_name(part),
                args.dataset,
                receipt.number,
                member.name(),
                hex(&receipt.digest)
            );
            for (party, digest) in PartyId::ALL.into_iter().zip(&receipt.party_digests) {
                println!(
                    "  {party} holds {} rows, digest {}",
                    receipt.rows,
                    hex(digest)
                );
            }
        }
        remote.close().await;
        Ok(())
    })
}

/// Reads everything that is to be shared once, with a progress bar.
fn check(parts: &[(Part, Rows)]) -> Result<Vec<Checked>> {
    let parts: Vec<&Rows> = parts.iter().map(|(_, rows)| rows).collect();
    let bar = bar(data::rows::steps(&parts) as u64, "pictures");
    bar.set_message("checking what is to be shared");
    let checked = data::rows::check(&parts, &mut |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    checked.context("the images cannot be shared: nothing has left this machine")
}

/// Finds the parts that are to be shared.
fn find(args: &ShareArgs, schema: Option<&Schema>) -> Result<Vec<(Part, Rows)>> {
    let network = args.network.as_deref().map(read_network).transpose()?;
    let held = schema.and_then(|schema| {
        let sides: Vec<usize> = schema.shape.iter().map(|side| *side as usize).collect();
        Some((sides.try_into().ok()?, schema.classes as usize))
    });
    let wanted: Option<([usize; 3], usize)> = network
        .map(|network| (network.input, network.classes))
        .or(held);
    let want = Want {
        shape: wanted.map(|(shape, _)| shape),
        classes: wanted.map(|(_, classes)| classes),
        class_names: args.class_names.clone(),
        seed: args.seed,
        crop: args.crop,
    };
    let place = match args.images.as_os_str() == "digits" && !args.images.exists() {
        true => Place::Digits,
        false => Place::detect(&args.images)?,
    };
    if matches!(place, Place::Folder(_)) && wanted.is_none() {
        bail!(
            "--network: data set {} is empty, so the network that will read it has to say to which \
             size pictures are brought",
            args.dataset
        );
    }
    let source = DataSource { place, want };
    let labels = args.labels.as_deref();
    // A hospital need not have pictures of every class; it has to know all of them.
    let advice = || match (&source.place, args.class_names.is_empty()) {
        (Place::Folder(_), true) => {
            "the images cannot be shared (--class-names names all classes of the data set in order, \
             where this hospital has not all of them)"
        }
        _ => "the images cannot be shared",
    };
    let division = args.part.map(|which| match which {
        WhichPart::Train => Division::Train,
        WhichPart::Test => Division::Test,
    });
    let found = data::rows::open(&source, labels, division).with_context(advice)?;
    let mut parts = Vec::new();
    for (division, mut rows) in found {
        if let Some(RowRange(range)) = &args.rows {
            if range.end > rows.len() {
                bail!(
                    "--rows: {}..{} are asked for, the {} part of {} has {}",
                    range.start,
                    range.end,
                    division.name(),
                    args.images.display(),
                    rows.len()
                );
            }
            rows.narrow(range.clone());
        }
        match division {
            Division::Train => parts.push((Part::Train, rows)),
            Division::Test => parts.push((Part::Test, rows)),
            Division::Validation => eprintln!(
                "note: {} validation rows stay here; --part shares the others alone",
                rows.len()
            ),
        }
    }
    Ok(parts)
}

/// Checks rows against what the parties hold.
fn fits(args: &ShareArgs, schema: Option<&Schema>, rows: &Rows) -> Result<()> {
    let ours = Schema {
        shape: rows.shape().map(|side| side as u32).into(),
        classes: rows.classes() as u32,
    };
    match schema {
        Some(schema) if *schema != ours => bail!(
            "data set {} holds images of shape {} and {} classes; {} has {} and {}",
            args.dataset,
            shape(&schema.shape),
            schema.classes,
            args.images.display(),
            shape(&ours.shape),
            ours.classes
        ),
        _ => Ok(()),
    }
}

fn shape(sides: &[u32]) -> String {
    let sides: Vec<String> = sides.iter().map(u32::to_string).collect();
    sides.join(" x ")
}

/// Why nothing is shared without agreed statistics of the pixels.
fn measured(parts: &[(Part, Rows)], checked: &[Checked]) -> Result<String> {
    let (Some((_, rows)), Some(checked)) = (parts.first(), checked.first()) else {
        bail!("there are no rows");
    };
    let here = checked.measured()?;
    Ok(format!(
        "--preprocess mean=M,std=S: all hospitals have to use the same numbers, and models and \
         predictions depend on them; agree on one pair. The {} images here have mean={:.4},std={:.4}",
        rows.len(),
        here.mean,
        here.std
    ))
}

fn announce(
    member: &Member,
    args: &ShareArgs,
    part: Part,
    rows: &Rows,
    checked: &Checked,
    known: Option<&UploadRecord>,
) {
    let known = match known {
        Some(known) if known.complete => format!("; upload {} brought them", known.number),
        Some(known) => format!("; going on with upload {}", known.number),
        None => String::new(),
    };
    let sides: Vec<u32> = rows.shape().iter().map(|side| *side as u32).collect();
    eprintln!(
        "{} shares {} {} rows of shape {} with data set {}, classes {}{known}",
        member.name(),
        rows.len(),
        part_name(part),
        shape(&sides),
        args.dataset,
        rows.class_names.join(", ")
    );
    if checked.stretched > 0 {
        eprintln!(
            "note: {} of these pictures have more than 8 bits and no window: the smallest value of each \
             becomes black, the largest white (docs/data.md)",
            checked.stretched
        );
    }
}

/// One upload, begun or gone on with, with a progress bar.
async fn send(
    remote: &Remote,
    part: Part,
    upload: LazyUpload,
    path: &Path,
    known: Option<UploadRecord>,
) -> Result<Receipt> {
    let bar = bar(upload.rows as u64, "rows");
    bar.set_message(format!("sharing {} rows", part_name(part)));
    let mut progress = |done: usize| bar.set_position(done as u64);
    let done = match known {
        Some(known) => {
            let pending = known
                .pending()
                .with_context(|| path.display().to_string())?;
            remote.resume_lazy(pending, upload, &mut progress).await
        }
        None => {
            let mut note = |pending: &_| {
                let begun = UploadRecord::begun(pending).save(path);
                begun.map_err(|err| format!("{err:#}"))
            };
            remote.upload_lazy(upload, &mut note, &mut progress).await
        }
    };
    bar.finish_and_clear();
    let receipt = match done {
        Ok(receipt) => receipt,
        Err(err) => return Err(unfinished(err, part, path)),
    };
    let complete = UploadRecord {
        upload: receipt.upload.clone(),
        number: receipt.number,
        complete: true,
    };
    complete.save(path)?;
    Ok(receipt)
}

fn unfinished(err: RemoteError, part: Part, path: &Path) -> anyhow::Error {
    let what = format!("the {} rows were not shared", part_name(part));
    match err {
        RemoteError::Unfinished { .. } => anyhow::anyhow!(
            "{what}: {err}\n  the same command goes on with this upload ({})",
            path.display()
        ),
        RemoteError::NumberTaken { number, .. } => anyhow::anyhow!(
            "{what}: {err}\n  upload {number} was not finished and another one has its number now; \
             see `trefoil dataset`, then share these rows with --again"
        ),
        other => {
            // Nothing is staged under the name that was noted; a refusal repeats itself.
            advise(other, &what)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_statistics_are_read_and_mistakes_are_named() {
        assert_eq!("3..10".parse(), Ok(RowRange(3..10)));
        for wrong in ["", "3", "3..3", "9..3", "-1..3", "a..b"] {
            assert!(wrong.parse::<RowRange>().is_err(), "{wrong}");
        }
        let digits = "mean=0.1307, std=0.3081".parse();
        assert_eq!(digits, Ok(Normalise(Preprocess::DIGITS)));
        for wrong in ["", "mean=0.1", "mean=a,std=1", "mean=0.1,std=0", "m=1,s=1"] {
            assert!(wrong.parse::<Normalise>().is_err(), "{wrong}");
        }
    }
}
