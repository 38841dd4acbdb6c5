//! `trefoil doctor`: everything at a home that can keep it from working, each with what to do.
//!
//! Nothing is changed, and every wait is bounded. What one node sees of another: `look.rs`.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use trefoil_consortium::meeting::NodeInfo;
use trefoil_consortium::{Card, ConsortiumFile, Role, host, identity};
use trefoil_party::probe_bucket;
use trefoil_protocol::party::Peer;
use trefoil_transport::{Identity, Pin};

use super::look::{Seen, Unseen, look_at};
use super::place::Place;
use super::{block_on, home};

/// From here on a clock is worth a word.
const CLOCK_WARNING_MS: u64 = 5_000;
/// From here on times in logs, limits and the days of policies cannot be compared.
const CLOCK_FAIL_MS: u64 = 120_000;
/// Less free disk than this is worth a word.
const DISK_WARNING_BYTES: u64 = 20 << 30;
/// Less is too little for an upload and a model.
const DISK_FAIL_BYTES: u64 = 1 << 30;

/// Arguments of `trefoil doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The folder of a party, the dealer, a hospital or an analyst; without it TREFOIL_HOME, else
    /// the current folder.
    #[arg(long, value_name = "DIR")]
    home: Option<std::path::PathBuf>,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warning,
    Fail,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    verdict: Verdict,
    check: String,
    /// What was found, and what to do where that is not well.
    found: String,
}

#[derive(Debug, Default)]
struct Report(Vec<Line>);

impl Report {
    fn say(&mut self, verdict: Verdict, check: &str, found: impl Into<String>) {
        self.0.push(Line {
            verdict,
            check: check.into(),
            found: found.into(),
        });
    }

    /// What went well, or a failure's line.
    fn take<T>(
        &mut self,
        check: &str,
        done: Result<T>,
        well: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match done {
            Ok(value) => {
                self.say(Verdict::Ok, check, well(&value));
                Some(value)
            }
            Err(err) => {
                self.say(Verdict::Fail, check, format!("{err:#}"));
                None
            }
        }
    }
}

/// Looks at the home and prints a line for each check; an error where one failed.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    let home = home(args.home.as_deref());
    let mut report = Report::default();
    examine(&home, &mut report);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report.0)?);
    } else {
        let width = report.0.iter().map(|line| line.check.len()).max();
        for line in &report.0 {
            let verdict = match line.verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "warning",
                Verdict::Fail => "FAIL",
            };
            let width = width.unwrap_or(0);
            // One line a check, also for an error of several lines.
            let found: Vec<&str> = line.found.split_whitespace().collect();
            println!("{verdict:<8} {:<width$}  {}", line.check, found.join(" "));
        }
    }
    match report
        .0
        .iter()
        .filter(|l| l.verdict == Verdict::Fail)
        .count()
    {
        0 => Ok(()),
        1 => bail!("one check failed"),
        n => bail!("{n} checks failed"),
    }
}

/// All checks, as far as they are possible.
fn examine(home: &Path, report: &mut Report) {
    let place = report.take("configuration", Place::load(home), |place| {
        place.file.display().to_string()
    });
    let Some(place) = place else {
        return;
    };
    let identity = identity::load(&place.identity.certificate, &place.identity.key);
    let identity = identity.map_err(anyhow::Error::from).and_then(|identity| {
        let pin = identity::pin(&identity)?;
        Ok((identity, pin))
    });
    let identity = report.take("key", identity, |(_, pin)| format!("public key {pin}"));
    if let Some((_, pin)) = &identity {
        card(home, *pin, report);
    }
    let loaded = ConsortiumFile::load(&place.consortium).map_err(anyhow::Error::from);
    let file = report.take("consortium", loaded, |file| {
        format!(
            "{}, core hash {}, members number {}, signed by all",
            file.core.name,
            trefoil_consortium::hex(&file.core_hash()),
            file.members_number
        )
    });
    if let (Some(policy), Some(file)) = (&place.policy, &file) {
        requesters(&policy.requesters, file, report);
    }
    if let Some(free) = host::disk_free_bytes(place.store.as_deref().unwrap_or(home)) {
        let (verdict, found) = disk(free);
        report.say(verdict, "disk", found);
    }
    if let (Some(config), Some((_, pin))) = (&place.contributions, &identity)
        && config.url.is_some()
    {
        let probed = probe_bucket(config, *pin).map_err(anyhow::Error::from);
        report.take("bucket", probed, |url| {
            let url = url.as_deref().unwrap_or_default();
            format!("{url}: an object was written, read and deleted")
        });
    }
    let (Some((identity, pin)), Some(file)) = (identity, file) else {
        return;
    };
    let role = file.role(pin).ok_or_else(|| {
        anyhow::anyhow!(
            "{} has no entry with the key {pin}: send this home's card to whoever keeps the file",
            place.consortium.display()
        )
    });
    let role = role.and_then(|role| place.fits(&role).map(|()| role));
    let Some(role) = report.take("role", role, in_words) else {
        return;
    };
    others(&place, &identity, &file, &role, report);
}

fn in_words(role: &Role) -> String {
    match role {
        Role::Node(peer) => peer.to_string(),
        Role::Member(member) => format!("{} {}", member.role, member.name),
    }
}

/// The card that was mailed is of the key that is used.
fn card(home: &Path, pin: Pin, report: &mut Report) {
    let path = home.join("card");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        // Only for those who look for it.
        Err(err) => {
            let found = format!("{}: {err}; it is not needed any more", path.display());
            return report.say(Verdict::Warning, "card", found);
        }
    };
    let (verdict, found) = match Card::parse_all(&text) {
        Ok(cards) if cards.iter().any(|card| card.pin == pin) => {
            (Verdict::Ok, "is of this key".to_owned())
        }
        Ok(_) => (
            Verdict::Fail,
            format!(
                "{} is of another key: whoever got it waits for a key that is not used here",
                path.display()
            ),
        ),
        Err(err) => (Verdict::Warning, format!("{}: {err}", path.display())),
    };
    report.say(verdict, "card", found);
}

fn requesters(names: &[String], file: &ConsortiumFile, report: &mut Report) {
    let known = |name: &&String| file.members.iter().any(|member| member.name == **name);
    let strangers: Vec<&str> = names.iter().filter(|n| !known(n)).map(|n| &n[..]).collect();
    let (verdict, found) = match (names.is_empty(), strangers.is_empty()) {
        (true, _) => (
            Verdict::Warning,
            "nobody may ask for jobs here: name members in [policy] requesters".to_owned(),
        ),
        (_, true) => (
            Verdict::Ok,
            format!("{} may ask for jobs", names.join(", ")),
        ),
        (_, false) => (
            Verdict::Warning,
            format!(
                "requesters names {}, and no member is called so",
                strangers.join(", ")
            ),
        ),
    };
    report.say(verdict, "policy", found);
}

fn disk(free: u64) -> (Verdict, String) {
    let gib = free as f64 / f64::from(1 << 30);
    let found = format!("{gib:.1} GiB free");
    match free {
        0..DISK_FAIL_BYTES => (
            Verdict::Fail,
            format!("{found}: too little for an upload or a model; make room"),
        ),
        DISK_FAIL_BYTES..DISK_WARNING_BYTES => (
            Verdict::Warning,
            format!("{found}: large data sets need more"),
        ),
        _ => (Verdict::Ok, found),
    }
}

/// The own port, and every node that this home has to do with.
fn others(
    place: &Place,
    identity: &Identity,
    file: &ConsortiumFile,
    role: &Role,
    report: &mut Report,
) {
    // Before the look, which may ask the own node.
    let port = place.listen.map(|listen| (listen, UdpSocket::bind(listen)));
    let mut peers = place.others(role);
    let own = match (role, &port) {
        (Role::Node(peer), Some((_, Err(_)))) => Some(*peer),
        _ => None,
    };
    peers.extend(own);
    let looking = look_at(place, identity, file, &peers);
    let looked = block_on(async { looking.await.map_err(anyhow::Error::from) });
    let mut seen = match looked {
        Ok(seen) => seen,
        Err(err) => return report.say(Verdict::Fail, "nodes", format!("{err:#}")),
    };
    if let Some((listen, bound)) = port {
        let own = own.and_then(|_| seen.pop());
        let (verdict, found) = listening(listen, bound.err(), own);
        report.say(verdict, "port", found);
    }
    let ours = NodeInfo::of(file);
    for (peer, seen) in peers.iter().zip(seen) {
        let check = peer.to_string();
        match seen {
            Ok(seen) => node(*peer, &ours, &seen, report),
            // A dealer that listens dials nobody.
            Err(Unseen { reason, advice }) => {
                let verdict = match role {
                    Role::Node(Peer::Dealer) if place.listen.is_some() => Verdict::Warning,
                    // A peer that only dials out cannot be looked at.
                    _ if file.node(*peer).dials_out_only() => Verdict::Warning,
                    _ => Verdict::Fail,
                };
                report.say(verdict, &check, format!("{reason}; {advice}"));
            }
        }
    }
}

/// The port that this home's node listens on.
fn listening(
    listen: SocketAddr,
    bound: Option<std::io::Error>,
    own: Option<Result<Seen, Unseen>>,
) -> (Verdict, String) {
    match (bound, own) {
        (None, _) => (
            Verdict::Warning,
            format!("{listen} is free: this home's node does not run"),
        ),
        (Some(_), Some(Ok(seen))) => (
            Verdict::Ok,
            format!(
                "{listen}: this home's node listens, for {} s",
                seen.status.uptime_s
            ),
        ),
        (Some(err), Some(Err(unseen))) => (
            Verdict::Fail,
            format!(
                "{listen}: {err}, and this home's node does not answer there ({}): is it another \
                 program? Choose another port in `listen`, or end that program",
                unseen.reason
            ),
        ),
        (Some(err), None) => (
            Verdict::Fail,
            format!("{listen}: {err}: is this an address of this machine?"),
        ),
    }
}

/// What a node says of itself, against what this home has.
fn node(peer: Peer, ours: &NodeInfo, seen: &Seen, report: &mut Report) {
    let name = peer.to_string();
    let theirs = &seen.status.info;
    if let Err(reason) = theirs.differs_from(ours, &name) {
        return report.say(Verdict::Fail, &name, reason);
    }
    let found = format!(
        "{} answers with the pinned key, round trip {:.1} ms, {}",
        seen.addr,
        seen.rtt.as_secs_f64() * 1e3,
        theirs.software
    );
    report.say(Verdict::Ok, &name, found);
    if theirs.software != ours.software {
        let found = format!(
            "{} there, {} here: update the older",
            theirs.software, ours.software
        );
        report.say(Verdict::Warning, &format!("{name} software"), found);
    }
    if (theirs.members_number, &theirs.members) != (ours.members_number, &ours.members) {
        let check = format!("{name} members");
        let (there, here) = (theirs.members_number, ours.members_number);
        let (verdict, found) = match there.cmp(&here) {
            std::cmp::Ordering::Less => (
                Verdict::Warning,
                format!("number {there} there, {here} here: it needs the newer consortium file"),
            ),
            std::cmp::Ordering::Greater => (
                Verdict::Warning,
                format!("number {there} there, {here} here: this home needs the newer file"),
            ),
            std::cmp::Ordering::Equal => (
                Verdict::Fail,
                format!("others there under the same number {here}: compare the two files"),
            ),
        };
        report.say(verdict, &check, found);
    }
    let (verdict, found) = clock(seen.clock_ahead_ms);
    if verdict != Verdict::Ok {
        report.say(verdict, &format!("{name} clock"), found);
    }
    for link in &seen.status.peers {
        if link.rtt_us.is_none() {
            let trouble = link.trouble.as_deref().unwrap_or("it has not connected");
            let found = format!("{name} has no link to {}: {trouble}", link.peer);
            report.say(Verdict::Warning, &format!("{name} links"), found);
        }
    }
}

fn clock(ahead_ms: i64) -> (Verdict, String) {
    let apart = ahead_ms.unsigned_abs();
    let verdict = match apart {
        0..CLOCK_WARNING_MS => return (Verdict::Ok, String::new()),
        CLOCK_WARNING_MS..CLOCK_FAIL_MS => Verdict::Warning,
        _ => Verdict::Fail,
    };
    let side = if ahead_ms > 0 { "ahead of" } else { "behind" };
    let seconds = apart as f64 / 1e3;
    let found = format!("{seconds:.0} s {side} this machine's: set both by NTP");
    (verdict, found)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use trefoil_consortium::meeting::{NodeStatus, PeerStatus};
    use trefoil_protocol::party::PartyId;

    use super::*;

    #[test]
    fn clocks_apart_are_a_warning_and_far_apart_a_failure() {
        assert_eq!(clock(4_999).0, Verdict::Ok);
        assert_eq!(clock(-4_999).0, Verdict::Ok);
        let (verdict, found) = clock(60_000);
        assert_eq!(verdict, Verdict::Warning);
        assert!(found.contains("60 s ahead"), "{found}");
        let (verdict, found) = clock(-3_600_000);
        assert_eq!(verdict, Verdict::Fail);
        assert!(found.contains("3600 s behind"), "{found}");
    }

    #[test]
    fn a_disk_without_room_fails() {
        assert_eq!(disk(0).0, Verdict::Fail);
        assert_eq!(disk(DISK_FAIL_BYTES).0, Verdict::Warning);
        assert_eq!(disk(DISK_WARNING_BYTES).0, Verdict::Ok);
    }

    fn said(change: impl FnOnce(&mut Seen)) -> Vec<(Verdict, String)> {
        let ours = NodeInfo {
            software: "trefoil 1".into(),
            core: "c0".into(),
            members_number: 3,
            members: "aa".into(),
            ..NodeInfo::default()
        };
        let mut seen = Seen {
            status: NodeStatus {
                info: ours.clone(),
                ..NodeStatus::default()
            },
            rtt: Duration::from_millis(20),
            clock_ahead_ms: 0,
            addr: "127.0.0.1:7101".parse().unwrap(),
        };
        change(&mut seen);
        let mut report = Report::default();
        node(Peer::Party(PartyId::P1), &ours, &seen, &mut report);
        let lines = report.0.into_iter();
        lines.map(|line| (line.verdict, line.found)).collect()
    }

    #[test]
    fn what_a_node_says_of_itself_is_compared() {
        let all = said(|_| {});
        assert_eq!(all.len(), 1);
        assert!(all[0].1.contains("round trip 20.0 ms"), "{all:?}");

        let all = said(|seen| seen.status.info.core = "c1".into());
        assert_eq!((all.len(), all[0].0), (1, Verdict::Fail));
        assert!(all[0].1.contains("another consortium"), "{all:?}");
        let all = said(|seen| seen.status.info.software = "trefoil 2".into());
        assert_eq!(all[1].0, Verdict::Warning);
        let all = said(|seen| seen.status.info.members_number = 2);
        assert!(all[1].0 == Verdict::Warning && all[1].1.contains("it needs the newer"));
        let all = said(|seen| seen.status.info.members_number = 4);
        assert!(all[1].0 == Verdict::Warning && all[1].1.contains("this home needs"));
        let all = said(|seen| seen.status.info.members = "bb".into());
        assert!(all[1].0 == Verdict::Fail && all[1].1.contains("the same number 3"));
        let all = said(|seen| seen.clock_ahead_ms = -600_000);
        assert!(all[1].0 == Verdict::Fail && all[1].1.contains("NTP"));
        let all = said(|seen| {
            let peer = "dealer".into();
            seen.status.peers = vec![PeerStatus {
                peer,
                ..PeerStatus::default()
            }];
        });
        assert!(all[1].0 == Verdict::Warning && all[1].1.contains("no link to dealer"));
    }
}
