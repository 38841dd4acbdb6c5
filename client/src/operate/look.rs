//! A look at other nodes with the key of a home: is a node there, is it the one with the pinned key,
//! how far away, and what does it say of itself. No node takes such a link for the home's own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use trefoil_consortium::meeting::{self, NodeInfo, NodeStatus, unix_ms};
use trefoil_consortium::{ConsortiumFile, Role};
use trefoil_protocol::party::Peer;
use trefoil_transport::{Identity, Node, Pin, Settings, TransportError};

use super::place::Place;

/// Longest wait for one step of a look, whatever the configuration says.
const STEP_MAX_MS: u64 = 5_000;

/// What was seen of a node.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) status: NodeStatus,
    pub(super) rtt: Duration,
    /// The node's clock less this machine's, in milliseconds, give or take half a round trip.
    pub(super) clock_ahead_ms: i64,
    /// Where it was reached.
    pub(super) addr: SocketAddr,
}

/// Why nothing was seen, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unseen {
    pub(super) reason: String,
    pub(super) advice: &'static str,
}

/// Looks at all `peers` at once; where a node is, each in the order given.
pub(super) async fn look_at(
    place: &Place,
    identity: &Identity,
    file: &ConsortiumFile,
    peers: &[Peer],
) -> Result<Vec<Result<Seen, Unseen>>, TransportError> {
    let settings = hasty(&place.transport);
    let role = identity.pin().ok().and_then(|pin| file.role(pin));
    let mut places = Vec::new();
    for peer in peers {
        let own = role == Some(Role::Node(*peer));
        places.push(match (own, place.listen) {
            (true, Some(listen)) => Ok(here(listen)),
            _ => resolve(&place.peers.resolve(*peer, file), &settings).await,
        });
    }
    let known = || places.iter().flatten();
    let ip: IpAddr = match (
        known().all(|addr| addr.ip().is_loopback()),
        known().any(SocketAddr::is_ipv6),
    ) {
        (true, false) => Ipv4Addr::LOCALHOST.into(),
        (false, false) => Ipv4Addr::UNSPECIFIED.into(),
        (_, true) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let node = std::sync::Arc::new(Node::bind(identity, (ip, 0).into(), &settings)?);
    let ours = NodeInfo::of(file);
    let mut looks = Vec::new();
    for (peer, addr) in peers.iter().zip(places) {
        let (node, ours, settings) = (node.clone(), ours.clone(), settings.clone());
        let (name, pin) = (peer.to_string(), file.node(*peer).pin);
        looks.push(tokio::spawn(async move {
            match addr {
                Ok(addr) => look(&node, addr, pin, &ours, &name, &settings).await,
                Err(unseen) => Err(unseen),
            }
        }));
    }
    let mut seen = Vec::new();
    for look in looks {
        seen.push(look.await.unwrap_or_else(|err| {
            Err(Unseen {
                reason: format!("the look failed: {err}"),
                advice: "this is a fault of the software: report it",
            })
        }));
    }
    node.close("that was all").await;
    Ok(seen)
}

/// The waits of a person at a terminal.
fn hasty(settings: &Settings) -> Settings {
    let mut hasty = settings.clone();
    hasty.connect_timeout_ms = hasty.connect_timeout_ms.min(STEP_MAX_MS);
    hasty.handshake_timeout_ms = hasty.handshake_timeout_ms.min(STEP_MAX_MS);
    hasty
}

/// Where a node of this home is reached from its own machine.
fn here(listen: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    (ip, listen.port()).into()
}

async fn resolve(address: &str, settings: &Settings) -> Result<SocketAddr, Unseen> {
    let wait = Duration::from_millis(settings.connect_timeout_ms);
    let reason = match tokio::time::timeout(wait, tokio::net::lookup_host(address)).await {
        Ok(Ok(mut found)) => match found.next() {
            Some(addr) => return Ok(addr),
            None => format!("{address} has no address"),
        },
        Ok(Err(err)) => format!("{address}: {err}"),
        Err(_) => format!("{address} was not found within {} ms", wait.as_millis()),
    };
    Err(Unseen {
        reason,
        advice: "correct the address in consortium.toml (it is not signed), or name another one in \
                 [peers] of this home's configuration",
    })
}

async fn look(
    node: &Node,
    addr: SocketAddr,
    pin: Pin,
    ours: &NodeInfo,
    name: &str,
    settings: &Settings,
) -> Result<Seen, Unseen> {
    let link = node.connect(addr, pin).await.map_err(|err| Unseen {
        advice: advice(&err),
        reason: err.to_string(),
    })?;
    let wait = Duration::from_millis(settings.handshake_timeout_ms);
    let asked_ms = unix_ms();
    let status = meeting::look(&link, ours, name, wait).await;
    let status = status.map_err(|reason| Unseen {
        reason,
        advice: "does it run this software? Restart it with the same version",
    })?;
    let clock_ahead_ms = ahead_ms(asked_ms, unix_ms(), status.info.unix_ms);
    Ok(Seen {
        status,
        rtt: link.rtt(),
        clock_ahead_ms,
        addr,
    })
}

/// How far a clock is ahead that said `theirs` between `asked` and `answered` here.
fn ahead_ms(asked: u64, answered: u64, theirs: u64) -> i64 {
    let middle = asked + answered.saturating_sub(asked) / 2;
    let apart = i64::try_from(theirs.abs_diff(middle)).unwrap_or(i64::MAX);
    match theirs >= middle {
        true => apart,
        false => -apart,
    }
}

fn advice(err: &TransportError) -> &'static str {
    match err {
        TransportError::WrongCertificate { .. } => {
            "another node answers there, or its key was replaced: compare the pin with its \
             institution by phone before anything else"
        }
        TransportError::Refused { .. } => {
            "it does not know this home's key: does it have the newest consortium file?"
        }
        TransportError::Unreachable { .. } => {
            "is the node running, is its port open for UDP here and there, and is the address right?"
        }
        _ => "is the node running, and is its address the one to be reached from here?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_compared_with_the_middle_of_the_question() {
        assert_eq!(ahead_ms(1_000, 1_200, 1_100), 0);
        assert_eq!(ahead_ms(1_000, 1_200, 61_100), 60_000);
        assert_eq!(ahead_ms(100_000, 100_200, 40_100), -60_000);
        // This machine's clock may step back meanwhile.
        assert_eq!(ahead_ms(1_000, 900, 1_000), 0);
        assert_eq!(ahead_ms(0, 0, u64::MAX), i64::MAX);
    }

    #[test]
    fn the_own_node_is_looked_for_on_this_machine() {
        let at = |text: &str| here(text.parse().unwrap()).to_string();
        assert_eq!(at("0.0.0.0:7100"), "127.0.0.1:7100");
        assert_eq!(at("[::]:7100"), "[::1]:7100");
        assert_eq!(at("10.0.0.7:7100"), "10.0.0.7:7100");
    }
}
