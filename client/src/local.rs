//! A cluster on this machine, as `simulate` and `bench` use it.

use anyhow::{Context, Result};
use trefoil_cluster::{Cluster, Link};
use trefoil_transport::{Protocol, Settings};

use crate::remote::Remote;

/// The links' settings: loopback carries larger datagrams than a wide-area link.
pub fn settings(link: Link, protocol: Protocol) -> Settings {
    let mut settings = Settings {
        protocol,
        ..Settings::default()
    };
    if link == Link::Loopback {
        settings.datagram_bytes = 4000;
    }
    settings
}

/// A member's connection to the parties.
pub async fn connect(cluster: &Cluster, member: &str, settings: &Settings) -> Result<Remote> {
    let member = cluster.member(member)?;
    Remote::connect(
        &member.identity,
        cluster.consortium(),
        Some(member.parties),
        settings,
    )
    .await
    .with_context(|| format!("{} cannot reach the parties", member.name))
}

/// What went wrong. A node that died says more about the reason than the client that lost it.
pub fn blame(cluster: &Cluster, error: anyhow::Error) -> anyhow::Error {
    match cluster.check() {
        Err(node) => error.context(node),
        Ok(()) => error,
    }
}
