//! `trefoil store`: what lies in a party's store, at the party's host. Rows, owners and sizes; never a
//! share.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use trefoil_consortium::{ConsortiumFile, PartyConfig};
use trefoil_party::{StoredAs, StoredUpload, stored};

use super::record::part_name;

/// Bytes in the megabytes that are shown, and in those of a quota.
const MEGABYTE: f64 = 1e6;

/// Arguments of `trefoil store`.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// The party's configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Lists a party's store; the party may run meanwhile.
///
/// # Errors
/// The store cannot be read with this configuration.
pub fn store(args: &StoreArgs) -> Result<()> {
    let config = PartyConfig::load(&args.config)?;
    let consortium = ConsortiumFile::load(&config.consortium)?;
    let mut all = stored(&config.home)
        .with_context(|| format!("the store in {} cannot be listed", config.home.display()))?;
    all.sort_by(|a, b| {
        let key = |one: &StoredUpload| (one.dataset.clone(), one.owner, one.number);
        key(a).cmp(&key(b))
    });
    println!("dataset,member,upload,part,rows,megabytes,state");
    for one in &all {
        let member = consortium.member(one.owner);
        let member = member.map_or_else(|| one.owner.to_string(), |member| member.name.clone());
        println!(
            "{},{member},{},{},{},{:.3},{}",
            one.dataset,
            one.number,
            part_name(one.part),
            one.rows,
            one.bytes as f64 / MEGABYTE,
            match one.state {
                StoredAs::Committed => "complete",
                StoredAs::Staged => "staged",
            }
        );
    }
    Ok(())
}
