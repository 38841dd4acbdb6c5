//! `trefoil models`: what the parties keep, and its removal; `trefoil reveal-model`: a kept model's
//! weights, opened to whoever asks and may; and what other commands need to know of a model.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use trefoil_consortium::check_name;
use trefoil_consortium::wire::ModelAbout;
use trefoil_models::job::{JobKind, Preparation};
use trefoil_models::{Network, schedule};

use super::record::{Record, Show};
use super::train::{absolute, check_new};
use super::watch::present;
use super::{HomeArgs, JobArgs, Member, block_on, weights};
use crate::experiment::read_network;
use crate::remote::{HeldModel, Remote};

/// Arguments of `trefoil models`.
#[derive(Debug, Args)]
pub struct ModelsArgs {
    #[command(flatten)]
    home: HomeArgs,
    #[command(subcommand)]
    command: Option<ModelsCommand>,
}

#[derive(Debug, Subcommand)]
enum ModelsCommand {
    /// Remove a model of this member at all three parties.
    Rm {
        /// The model's name.
        name: String,
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
    /// The model's name at the parties; see `trefoil models`.
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
    pub network: Network,
    pub frac_bits: u8,
    pub preparation: Option<Preparation>,
}

impl ModelArgs {
    /// Looks the model up at the three parties. What was said must be what they know.
    pub async fn find(&self, remote: &Remote) -> Result<KnownModel> {
        let name = &self.model;
        check_name(name).map_err(anyhow::Error::msg)?;
        let info = whole(remote.models().await?, name)?.info;
        let given = self.network.as_deref().map(read_network).transpose()?;
        let network = match (&info.about, given) {
            (Some(about), given) => {
                let network = Network::parse(&about.network)?;
                if given.is_some_and(|given| given != network) {
                    bail!(
                        "--network: model {name} was made as another network, {}: leave --network out",
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
            network,
            frac_bits: info.frac_bits,
            preparation: info.about.and_then(|about| about.preparation),
        })
    }
}

/// The model of a name that all three parties hold alike.
fn whole(held: Vec<HeldModel>, name: &str) -> Result<HeldModel> {
    let mut held: Vec<HeldModel> = held.into_iter().filter(|m| m.info.name == name).collect();
    let all = held.iter().position(|model| model.missing().is_empty());
    match (all, held.first()) {
        (Some(at), _) => Ok(held.swap_remove(at)),
        (None, Some(model)) => {
            let missing = model.missing();
            let missing: Vec<String> = missing.iter().map(|party| party.to_string()).collect();
            bail!(
                "model {name} is not whole: {} lacks it; make it anew, or remove it (trefoil models rm {name})",
                missing.join(" and ")
            )
        }
        (None, None) => bail!("there is no model {name} at the parties; see `trefoil models`"),
    }
}

/// Lists models, or removes one.
pub fn models(args: &ModelsArgs) -> Result<()> {
    let member = Member::load(&args.home)?;
    block_on(async {
        let remote = member.connect().await?;
        let held = remote.models().await;
        let held = held.context("the models are not known")?;
        let done = match &args.command {
            None => {
                list(&member, &held);
                Ok(())
            }
            Some(ModelsCommand::Rm { name }) => remove(&member, &remote, &held, name).await,
        };
        remote.close().await;
        done
    })
}

fn list(member: &Member, held: &[HeldModel]) {
    if held.is_empty() {
        println!("the parties keep no models");
        return;
    }
    let owner = |model: &HeldModel| {
        let members = &member.consortium.members;
        let entry = members.iter().find(|entry| entry.pin == model.info.owner);
        entry.map_or_else(|| model.info.owner.to_string(), |entry| entry.name.clone())
    };
    println!(
        "model             network     data set               made              by               job"
    );
    for model in held {
        let info = &model.info;
        let (network, dataset, made) = match &info.about {
            None => ("not noted".into(), "not noted".into(), String::new()),
            Some(about) => (network_name(about), dataset_name(about), time(about.made_s)),
        };
        let at = match model.missing().as_slice() {
            [] => String::new(),
            missing => {
                let names: Vec<String> = missing.iter().map(|party| party.to_string()).collect();
                format!("  NOT AT {}", names.join(" AND "))
            }
        };
        println!(
            "{:<17} {network:<11} {dataset:<22} {made:<17} {:<16} {}{at}",
            info.name,
            owner(model),
            &info.job.to_string()[..16],
        );
    }
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

async fn remove(member: &Member, remote: &Remote, held: &[HeldModel], name: &str) -> Result<()> {
    let mut found = held.iter().filter(|model| model.info.name == name);
    let own: Vec<&HeldModel> = found
        .by_ref()
        .filter(|model| model.info.owner == member.entry.pin)
        .collect();
    if own.is_empty() {
        bail!("the parties keep no model {name} of {}", member.name());
    }
    for model in own {
        remote.remove_model(&model.info).await?;
    }
    println!("removed model {name} at the three parties");
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
            model: args.model.model.clone(),
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
