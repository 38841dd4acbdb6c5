//! A dealer that only dials out: it makes the links to the parties, introduces itself, and makes
//! them again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use trefoil_consortium::Addresses;
use trefoil_consortium::meeting::{self, NodeInfo};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{Link, Node};

use crate::daemon::{Dealer, serve_party};

/// First wait before a broken link is dialled again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Dials a party for ever, and serves it while the link lives.
pub(crate) async fn dial(
    dealer: Arc<Dealer>,
    party: PartyId,
    node: Arc<Node>,
    mut addresses: watch::Receiver<Option<Addresses>>,
) {
    let (mut pause, mut trouble) = (FIRST_PAUSE, None);
    loop {
        let overrides = match addresses.wait_for(Option::is_some).await {
            Ok(overrides) => overrides.clone().unwrap_or_default(),
            Err(_) => return,
        };
        let address = overrides.resolve(Peer::Party(party), &dealer.consortium.now());
        match connect(&dealer, party, &node, &address).await {
            Ok(link) => {
                (pause, trouble) = (FIRST_PAUSE, None);
                serve_party(dealer.clone(), party, link).await;
            }
            Err(reason) if trouble.as_ref() != Some(&reason) => {
                tracing::warn!(peer = %party, %reason, "not connected");
                trouble = Some(reason);
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

async fn connect(
    dealer: &Dealer,
    party: PartyId,
    node: &Node,
    address: &str,
) -> Result<Link, String> {
    let waited = Duration::from_millis(dealer.settings.connect_timeout_ms);
    let found = tokio::time::timeout(waited, tokio::net::lookup_host(address)).await;
    let addr = match found {
        Ok(Ok(mut found)) => found.next().ok_or(format!("{address} has no address"))?,
        Ok(Err(err)) => return Err(format!("{address}: {err}")),
        Err(_) => return Err(format!("{address} was not found in time")),
    };
    let file = dealer.consortium.now();
    let entry = file.node(Peer::Party(party));
    let link = node.connect_to(entry.transport, addr, entry.pin).await;
    let link = link.map_err(|err| err.to_string())?;
    let (ours, wait) = (NodeInfo::of(&file), dealer.short_wait());
    match meeting::introduce(&link, &ours, &party.to_string(), wait).await {
        Ok(_) => Ok(link),
        Err(reason) => {
            link.close(&reason);
            Err(reason)
        }
    }
}
