//! `trefoil models`: what the parties keep, what is known of it, and its removal; `trefoil reveal-model`: a kept model's
//! weights, opened to whoever asks and may; and what other commands need to know of a model.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use trefoil_consortium::wire::ModelAbout;
use trefoil_consortium::{JobId, ModelRef, hex};
use trefoil_models::job::{JobKind, Preparation};
use trefoil_models::{Network, schedule};
use trefoil_transport::Pin;

use super::figures::Figures;
use super::record::{Record, Show};
use super::train::{absolute, check_new};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, advise, block_on, short, weights};
use crate::experiment::read_network;
use crate::remote::{HeldModel, Remote};

/// Arguments of `trefoil models`.
#[derive(Debug, Args)]
pub struct ModelsArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// Print a JSON array of all models.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<ModelsCommand>,
}

#[derive(Debug, Subcommand)]
enum ModelsCommand {
    /// Show one model: what it was made as, from what and by whom, and the figures that jobs have
    /// revealed to this member.
    Show {
        /// NAME, which means its newest version, or NAME@VERSION.
        model: String,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Remove a model at all three parties: one of this member, unless a party's policy says
    /// otherwise.
    Rm {
        /// NAME, which means all its versions, or NAME@VERSION.
        model: String,
    },
}

/// Arguments of `trefoil reveal-model`.
#[derive(Debug, Args)]
pub struct RevealArgs {
    #[command(flatten)]
    home: HomeArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// The file for the WEIGHTS: .npz, .safetensors, or .onnx with the network. They are no secret
    /// any more, and what they tell about the training rows is not hidden.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    job: JobArgs,
}

/// Which model. What the parties know of it need not be said.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// The model at the parties: NAME, which means its newest version, or NAME@VERSION; see `trefoil
    /// models`.
    pub model: String,
    /// The network that it was made as: a shipped name or a network file. Needed for models of
    /// older releases alone.
    #[arg(long, value_name = "NAME|FILE")]
    pub network: Option<String>,
    /// Fraction bits that it was made with; the parties know them.
    #[arg(long)]
    pub frac_bits: Option<u8>,
}

/// What the parties know of a model, and what was said about it.
#[derive(Debug)]
pub struct KnownModel {
    /// Name and version, as jobs name it.
    pub reference: String,
    pub network: Network,
    pub frac_bits: u8,
    pub preparation: Option<Preparation>,
}

impl ModelArgs {
    /// Looks the model up at the three parties. What was said must be what they know.
    pub async fn find(&self, remote: &Remote) -> Result<KnownModel> {
        let name = &self.model;
        let info = whole(remote.models().await?, name)?.info;
        let given = self.network.as_deref().map(read_network).transpose()?;
        let network = match (&info.about, given) {
            (Some(about), given) => {
                let network = Network::parse(&about.network)?;
                if let Some(difference) = given.and_then(|given| given.difference(&network)) {
                    bail!(
                        "--network: model {name} was made as another network, {}: {difference}; leave --network out",
                        network.name
                    );
                }
                network
            }
            (None, Some(given)) => given,
            (None, None) => bail!(
                "--network: model {name} was kept by an older release, which did not note its network"
            ),
        };
        if self.frac_bits.is_some_and(|bits| bits != info.frac_bits) {
            bail!(
                "--frac-bits: model {name} was made with {}: leave --frac-bits out",
                info.frac_bits
            );
        }
        Ok(KnownModel {
            reference: ModelRef::text(&info.name, &info.job),
            network,
            frac_bits: info.frac_bits,
            preparation: info.about.and_then(|about| about.preparation),
        })
    }
}

/// A model that says what it was made as.
pub async fn known_model(remote: &Remote, text: &str) -> Result<KnownModel> {
    let args = ModelArgs {
        model: text.into(),
        network: None,
        frac_bits: None,
    };
    args.find(remote).await
}

/// The model that is meant, which all three parties hold alike; of a name without a version the
/// newest.
fn whole(held: Vec<HeldModel>, text: &str) -> Result<HeldModel> {
    let wanted = ModelRef::parse(text).map_err(anyhow::Error::msg)?;
    let means = |model: &HeldModel| wanted.means(&model.info.name, &model.info.job);
    let mut held: Vec<HeldModel> = held.into_iter().filter(means).collect();
    if wanted.version.is_some() && held.len() > 1 {
        bail!(
            "{} versions begin like {text}: give more digits",
            held.len()
        );
    }
    let newest = held.iter().rposition(|model| model.missing().is_empty());
    match (newest, held.first()) {
        (Some(at), _) => Ok(held.swap_remove(at)),
        (None, Some(model)) => {
            let missing = model.missing();
            let missing: Vec<String> = missing.iter().map(|party| party.to_string()).collect();
            bail!(
                "model {text} is not whole: {} lacks it; make it anew, or remove it (trefoil models rm {text})",
                missing.join(" and ")
            )
        }
        (None, None) => bail!("there is no model {text} at the parties; see `trefoil models`"),
    }
}

/// Lists models, shows or removes one.
pub fn models(args: &ModelsArgs) -> Result<()> {
    if let (true, Some(ModelsCommand::Rm { .. })) = (args.json, &args.command) {
        bail!("--json: a removal prints no JSON");
    }
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let held = remote.models().await;
        let held = held.context("the models are not known")?;
        let done = match &args.command {
            None => list(&member, &held, args.json),
            Some(ModelsCommand::Show { model, json }) => {
                show(&member, held, model, *json || args.json)
            }
            Some(ModelsCommand::Rm { model }) => remove(&remote, &held, model).await,
        };
        remote.close().await;
        done
    })
}

fn name_of(member: &Member, pin: Pin) -> String {
    let members = &member.consortium.members;
    let entry = members.iter().find(|entry| entry.pin == pin);
    entry.map_or_else(|| pin.to_string(), |entry| entry.name.clone())
}

/// Where a model is not.
fn lacking(model: &HeldModel) -> String {
    let missing = model.missing();
    let names: Vec<String> = missing.iter().map(|party| party.to_string()).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("  NOT AT {}", names.join(" AND ")),
    }
}

/// What is public about a model.
fn as_json(member: &Member, model: &HeldModel) -> Value {
    let info = &model.info;
    let missing = model.missing();
    let missing: Vec<String> = missing.iter().map(|party| party.to_string()).collect();
    let about = info.about.as_ref();
    let network = about.and_then(|about| Network::parse(&about.network).ok());
    let dataset = about.and_then(|about| about.dataset.as_ref());
    json!({
        "name": info.name,
        "version": info.job.to_string(),
        "by": name_of(member, info.owner),
        "pin": info.owner.to_string(),
        "ring_bits": info.ring_bits,
        "frac_bits": info.frac_bits,
        "made": about.map(|about| trefoil_party::time_text(about.made_s)),
        "network": network.map(|network| json!({
            "name": network.name,
            "parameters": parameters(&network),
            "input": network.input,
            "classes": network.classes,
        })),
        "preparation": about.and_then(|about| about.preparation),
        "imported": about.map(|about| about.dataset.is_none()),
        "dataset": dataset.map(|(name, snapshot)| json!({
            "name": name,
            "snapshot": hex(snapshot),
        })),
        "started_from": info.started_from,
        "missing_at": missing,
    })
}

/// Values that are kept of a model.
fn parameters(network: &Network) -> usize {
    let kept = network.kept();
    kept.iter()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum()
}

fn list(member: &Member, held: &[HeldModel], json: bool) -> Result<()> {
    if json {
        let all: Vec<Value> = held.iter().map(|model| as_json(member, model)).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    if held.is_empty() {
        println!("the parties keep no models");
        return Ok(());
    }
    println!(
        "model             version           network     data set               made              by"
    );
    for model in held {
        let info = &model.info;
        let (network, dataset, made) = match &info.about {
            None => ("not noted".into(), "not noted".into(), String::new()),
            Some(about) => (network_name(about), dataset_name(about), time(about.made_s)),
        };
        println!(
            "{:<17} {} {network:<11} {dataset:<22} {made:<17} {}{}",
            info.name,
            short(&info.job),
            name_of(member, info.owner),
            lacking(model)
        );
    }
    Ok(())
}

/// What is known of one model: public facts from the parties, figures from this home.
fn show(member: &Member, held: Vec<HeldModel>, text: &str, json: bool) -> Result<()> {
    let model = whole(held, text)?;
    let info = &model.info;
    let figures = Figures::of_model(&member.home, info)?;
    if json {
        let mut value = as_json(member, &model);
        value["figures"] = serde_json::to_value(&figures)?;
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let line = |label: &str, words: String| println!("{label:<14} {words}");
    line("model", info.name.clone());
    line(
        "version",
        format!("{}, the hash of the job that made it", info.job),
    );
    line("by", name_of(member, info.owner));
    line(
        "numbers",
        format!("{} fraction bits of {}", info.frac_bits, info.ring_bits),
    );
    let from = info.started_from.as_deref();
    if let Some(about) = &info.about {
        line("made", format!("{} UTC", time(about.made_s)));
        let network = Network::parse(&about.network)?;
        line(
            "network",
            format!("{}, {} parameters", network.name, parameters(&network)),
        );
        let [c, h, w] = network.input;
        let classes = network.classes;
        line(
            "reads",
            format!("images of {c} x {h} x {w}, tells {classes} classes apart"),
        );
        let prepared = about.preparation.map(|preparation| preparation.to_string());
        line("prepared", prepared.unwrap_or("not noted".into()));
        line(
            "trained on",
            match &about.dataset {
                None => "weights that were imported".into(),
                Some((name, snapshot)) => {
                    format!("data set {name}, snapshot {}", hex(&snapshot[..8]))
                }
            },
        );
    }
    line("started from", from.unwrap_or("seeded weights").into());
    if figures.is_empty() {
        line(
            "figures",
            format!("none were revealed to {}", member.name()),
        );
    }
    for each in figures {
        line("figures", each.to_string());
    }
    Ok(())
}

fn network_name(about: &ModelAbout) -> String {
    Network::parse(&about.network).map_or("unreadable".into(), |network| network.name)
}

fn dataset_name(about: &ModelAbout) -> String {
    match &about.dataset {
        None => "imported".into(),
        Some((name, snapshot)) => format!("{name} {}", trefoil_consortium::hex(&snapshot[..4])),
    }
}

/// `2026-11-22 20:54`, UTC.
fn time(seconds: u64) -> String {
    let text = trefoil_party::time_text(seconds);
    text.chars().take(16).collect::<String>().replace('T', " ")
}

async fn remove(remote: &Remote, held: &[HeldModel], text: &str) -> Result<()> {
    let wanted = ModelRef::parse(text).map_err(anyhow::Error::msg)?;
    let means = |model: &&HeldModel| wanted.means(&model.info.name, &model.info.job);
    let found: Vec<&HeldModel> = held.iter().filter(means).collect();
    if found.is_empty() {
        bail!("the parties keep no model {text}; see `trefoil models`");
    }
    let versions: BTreeSet<JobId> = found.iter().map(|model| model.info.job).collect();
    if wanted.version.is_some() && versions.len() > 1 {
        bail!(
            "{} versions begin like {text}: give more digits",
            versions.len()
        );
    }
    for HeldModel { info, .. } in found {
        let removed = remote.remove_model(info).await;
        removed.map_err(|err| advise(err, "the model was not removed"))?;
        println!(
            "removed model {} at the three parties",
            ModelRef::text(&info.name, &info.job)
        );
    }
    Ok(())
}

/// Opens a kept model's weights.
pub fn reveal_model(args: &RevealArgs) -> Result<()> {
    check_new(Some(&args.to), "--to")?;
    weights::check_ending(&args.to, "--to")?;
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let known = args.model.find(&remote).await?;
        let kind = JobKind::RevealModel {
            model: known.reference,
            network: known.network.to_toml(),
            frac_bits: known.frac_bits,
            ring_bits: member.consortium.core.ring_bits,
        };
        schedule(&kind)?;
        let record = Record {
            job: member.describe("reveal-model", kind, &args.job)?,
            show: Show {
                to: absolute(Some(&args.to))?,
                ..Show::default()
            },
        };
        let show = record.show.clone();
        let done = member
            .run(&remote, record, "opening the weights", args.job.detach)
            .await?;
        remote.close().await;
        match done {
            Some(done) => present(&done, &show),
            None => Ok(()),
        }
    })
}
