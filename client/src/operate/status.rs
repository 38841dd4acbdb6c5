//! `trefoil status`: how the nodes are, as they say themselves and as far as they are from here.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;
use trefoil_consortium::meeting::unix_ms;
use trefoil_consortium::{ConsortiumFile, Role, identity};
use trefoil_protocol::party::Peer;

use super::look::{Seen, look_at};
use super::place::Place;
use super::{block_on, home};

/// Arguments of `trefoil status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The folder of a party, the dealer, a hospital or an analyst; without it TREFOIL_HOME, else
    /// the current folder.
    #[arg(long, value_name = "DIR")]
    home: Option<PathBuf>,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// Asks every node that this home has to do with, its own included.
pub fn status(args: &StatusArgs) -> Result<()> {
    let place = Place::load(&home(args.home.as_deref()))?;
    let file = ConsortiumFile::load(&place.consortium)?;
    let identity = identity::load(&place.identity.certificate, &place.identity.key)?;
    let pin = identity::pin(&identity)?;
    let role = file.role(pin).with_context(|| {
        format!(
            "{} has no entry with the key {pin} of this home",
            place.consortium.display()
        )
    })?;
    place.fits(&role)?;
    let mut peers = place.others(&role);
    if let Role::Node(own) = &role {
        peers.push(*own);
    }
    peers.sort_by_key(|peer| match peer {
        Peer::Party(party) => party.index(),
        Peer::Dealer => 3,
    });
    let looking = look_at(&place, &identity, &file, &peers);
    let seen = block_on(async { looking.await.map_err(anyhow::Error::from) })?;
    let missing = seen.iter().filter(|seen| seen.is_err()).count();
    if args.json {
        let all = peers.iter().zip(&seen).map(|(peer, seen)| match seen {
            Ok(seen) => json!({
                "node": peer.to_string(),
                "name": file.node(*peer).name,
                "rtt_ms": seen.rtt.as_secs_f64() * 1e3,
                "status": seen.status,
            }),
            Err(unseen) => json!({
                "node": peer.to_string(),
                "name": file.node(*peer).name,
                "error": unseen.reason,
            }),
        });
        println!(
            "{}",
            serde_json::to_string_pretty(&all.collect::<Vec<_>>())?
        );
    } else {
        for (peer, seen) in peers.iter().zip(&seen) {
            println!("{peer} {}", file.node(*peer).name);
            match seen {
                Ok(seen) => print!("{}", in_words(seen, unix_ms())),
                Err(unseen) => println!("  no answer    {}; {}", unseen.reason, unseen.advice),
            }
        }
    }
    match missing {
        0 => Ok(()),
        n => bail!("{n} of {} nodes did not answer", peers.len()),
    }
}

fn in_words(seen: &Seen, now_ms: u64) -> String {
    let status = &seen.status;
    let mut words = format!(
        "  runs         {} for {}, members number {}\n  round trip   {:.1} ms from here\n",
        status.info.software,
        span(status.uptime_s),
        status.info.members_number,
        seen.rtt.as_secs_f64() * 1e3
    );
    for link in &status.peers {
        words += &match link.rtt_us {
            Some(us) => format!("  link         {} {:.1} ms\n", link.peer, us as f64 / 1e3),
            None => format!(
                "  NO LINK      {}: {}\n",
                link.peer,
                link.trouble.as_deref().unwrap_or("it has not connected")
            ),
        };
    }
    // The dealer keeps nothing and has no queue.
    if let Some(free) = status.disk_free_bytes {
        let gib = free as f64 / f64::from(1 << 30);
        words += &format!(
            "  jobs         {} running, {} waiting\n  disk         {gib:.1} GiB free\n",
            status.jobs_running, status.jobs_waiting
        );
    }
    if let Some((at_ms, text)) = &status.last_error {
        let ago = Duration::from_millis(now_ms.saturating_sub(*at_ms)).as_secs();
        words += &format!("  last error   {} ago: {text}\n", span(ago));
    }
    words
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
