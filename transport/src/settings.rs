//! Time-outs, windows and sizes of the links, with one table of defaults.

use crate::TransportError;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::Duration;

/// What links run over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// QUIC over UDP.
    #[default]
    Quic,
    /// TLS 1.3 over TCP, for networks that let no UDP through.
    Tcp,
}

impl Protocol {
    /// What a pair of nodes uses: TCP where one of them does.
    pub fn with(self, other: Protocol) -> Protocol {
        match (self, other) {
            (Protocol::Quic, Protocol::Quic) => Protocol::Quic,
            _ => Protocol::Tcp,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Protocol::Quic => "quic",
            Protocol::Tcp => "tcp",
        })
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Protocol, String> {
        match text {
            "quic" => Ok(Protocol::Quic),
            "tcp" => Ok(Protocol::Tcp),
            _ => Err(format!("{text:?} is neither quic nor tcp")),
        }
    }
}

/// Everything about the links that a user may tune.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What this node dials over; it listens on both. Other nodes' entries in the
    /// consortium file may say `tcp` too: a pair of which one does uses it.
    pub protocol: Protocol,
    /// How long a connection attempt waits for an answer.
    pub connect_timeout_ms: u64,
    /// How long a handshake (TLS, stream header, session hello) may take.
    pub handshake_timeout_ms: u64,
    /// How long a party waits for a peer's frame of a round, or for material.
    pub round_timeout_ms: u64,
    /// How long the dealer waits for a party to make room in its look-ahead.
    pub look_ahead_timeout_ms: u64,
    /// How long an orderly close waits for the last messages to arrive.
    pub close_timeout_ms: u64,
    /// A quiet connection says something this often.
    pub keep_alive_ms: u64,
    /// A connection at most this long without a sign of the peer is closed.
    pub idle_timeout_ms: u64,
    /// Largest UDP payload. Used at once between nodes on one host, reached by
    /// path discovery elsewhere. 1452 fits Ethernet; up to 6400 pays on loopback.
    pub datagram_bytes: u16,
    /// Unread bytes a peer may have in flight on one stream. QUIC's alone, as
    /// `datagram_bytes` and `socket_buffer_bytes`: TCP's windows are the system's.
    pub window_bytes: u32,
    /// Size asked for the socket's send and receive buffers; the operating
    /// system may grant less.
    pub socket_buffer_bytes: u32,
    /// Frames waiting to be sent to one peer, in bytes; one frame is always admitted.
    pub send_queue_bytes: u64,
    /// Frames received and not yet taken by the protocol, per peer, in bytes;
    /// must hold one round. One frame is always admitted.
    pub receive_queue_bytes: u64,
    /// Dealer material that may lie ahead of a party's protocol, per party, in
    /// bytes: half of its own at the dealer and half of its own at the party, which
    /// tells the dealer how far it may go. At each side one segment is always admitted.
    pub look_ahead_bytes: u64,
    /// Longest frame of a round or segment of material that is accepted.
    pub max_frame_bytes: u64,
    /// How long a blocking receive spins before it sleeps. 0 where the nodes
    /// share few cores: a spinning thread then holds up the one it waits for.
    pub spin_us: u32,
}

impl Default for Settings {
    fn default() -> Self {
        const MIB: u32 = 1 << 20;
        Settings {
            protocol: Protocol::Quic,
            connect_timeout_ms: 10_000,
            handshake_timeout_ms: 10_000,
            round_timeout_ms: 60_000,
            look_ahead_timeout_ms: 600_000,
            close_timeout_ms: 2_000,
            keep_alive_ms: 2_000,
            idle_timeout_ms: 8_000,
            datagram_bytes: 1_452,
            window_bytes: 16 * MIB,
            socket_buffer_bytes: 8 * MIB,
            send_queue_bytes: 256 * u64::from(MIB),
            receive_queue_bytes: 1024 * u64::from(MIB),
            look_ahead_bytes: 64 * u64::from(MIB),
            max_frame_bytes: 2048 * u64::from(MIB),
            spin_us: default_spin_us(),
        }
    }
}

/// Four nodes with two busy threads each: below eight cores, spinning takes
/// the core from the thread that would bring the frame.
fn default_spin_us() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores >= 8 { 30 } else { 0 }
}

impl Settings {
    /// Checks every value against its range.
    pub fn check(&self) -> Result<(), TransportError> {
        // quinn sends at most ten datagrams with one system call, and one call
        // carries at most 65,507 bytes.
        within(
            "datagram_bytes",
            self.datagram_bytes.into(),
            1_200,
            6_400,
            "1200 to 6400",
        )?;
        within(
            "window_bytes",
            self.window_bytes.into(),
            64 << 10,
            1 << 30,
            "64 KiB to 1 GiB",
        )?;
        within(
            "socket_buffer_bytes",
            self.socket_buffer_bytes.into(),
            64 << 10,
            1 << 30,
            "64 KiB to 1 GiB",
        )?;
        for (field, value) in [
            ("connect_timeout_ms", self.connect_timeout_ms),
            ("handshake_timeout_ms", self.handshake_timeout_ms),
            ("round_timeout_ms", self.round_timeout_ms),
            ("look_ahead_timeout_ms", self.look_ahead_timeout_ms),
            ("close_timeout_ms", self.close_timeout_ms),
            ("keep_alive_ms", self.keep_alive_ms),
            ("idle_timeout_ms", self.idle_timeout_ms),
        ] {
            within(field, value, 1, 1 << 32, "1 to 4294967296")?;
        }
        if self.keep_alive_ms >= self.idle_timeout_ms {
            return Err(TransportError::Setting {
                field: "keep_alive_ms",
                value: self.keep_alive_ms,
                detail: "must be below idle_timeout_ms, or a quiet link closes itself",
            });
        }
        for (field, value) in [
            ("send_queue_bytes", self.send_queue_bytes),
            ("receive_queue_bytes", self.receive_queue_bytes),
            ("look_ahead_bytes", self.look_ahead_bytes),
            ("max_frame_bytes", self.max_frame_bytes),
        ] {
            within(field, value, 1, 1 << 40, "1 to 2^40")?;
        }
        within("spin_us", self.spin_us.into(), 0, 10_000, "0 to 10000")
    }

    pub(crate) fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    pub(crate) fn close_timeout(&self) -> Duration {
        Duration::from_millis(self.close_timeout_ms)
    }

    /// QUIC's parameters for a connection with a peer at `remote`.
    pub(crate) fn transport_config(&self, remote: IpAddr) -> quinn::TransportConfig {
        let mut config = quinn::TransportConfig::default();
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        discovery.upper_bound(self.datagram_bytes);
        // On one host the datagram size is known to pass; on a real path it is
        // found out, because a size that vanishes silently costs seconds.
        let initial_mtu = if remote.is_loopback() {
            self.datagram_bytes
        } else {
            1_200
        };
        // QUIC counts from its own last keep-alive, which may follow the peer's last
        // sign by one interval; a user counts from that sign.
        let silence = Duration::from_millis(self.idle_timeout_ms - self.keep_alive_ms);
        config
            .initial_mtu(initial_mtu)
            .min_mtu(1_200)
            .mtu_discovery_config(Some(discovery))
            .enable_segmentation_offload(true)
            .stream_receive_window(self.window_bytes.into())
            // Material that waits for its party to catch up must not use up the
            // whole connection: rounds and control go on beside it.
            .receive_window(
                quinn::VarInt::from_u64(8 * u64::from(self.window_bytes))
                    .unwrap_or(quinn::VarInt::MAX),
            )
            .send_window(2 * u64::from(self.window_bytes))
            .keep_alive_interval(Some(Duration::from_millis(self.keep_alive_ms)))
            .max_idle_timeout(quinn::IdleTimeout::try_from(silence).ok())
            // A first packet sent before the peer listens is repeated after
            // three times this, then twice that, and so on.
            .initial_rtt(Duration::from_millis(60))
            .max_concurrent_bidi_streams(256u32.into())
            .max_concurrent_uni_streams(64u32.into())
            .datagram_receive_buffer_size(None);
        config
    }
}

fn within(
    field: &'static str,
    value: u64,
    low: u64,
    high: u64,
    detail: &'static str,
) -> Result<(), TransportError> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(TransportError::Setting {
            field,
            value,
            detail,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_within_their_ranges() {
        Settings::default().check().unwrap();
    }

    #[test]
    fn a_setting_outside_its_range_is_named() {
        let settings = Settings {
            datagram_bytes: 9_000,
            ..Settings::default()
        };
        assert!(
            settings
                .check()
                .unwrap_err()
                .to_string()
                .contains("datagram_bytes = 9000")
        );
        let settings = Settings {
            keep_alive_ms: 8_000,
            ..Settings::default()
        };
        assert!(
            settings
                .check()
                .unwrap_err()
                .to_string()
                .contains("keep_alive_ms")
        );
    }
}
