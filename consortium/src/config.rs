//! The nodes' configuration files, TOML with unknown keys refused. Errors name file, line and key.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Settings;

use crate::ConsortiumFile;

/// Longest configuration file that is read.
const FILE_MAX_BYTES: u64 = 16 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not what it should be; names line and key.
    #[error("{path}: {detail}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column, key and problem.
        detail: String,
    },
}

pub(crate) fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    parse_toml(path, &read_text(path)?)
}

pub(crate) fn parse_toml<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|err| ConfigError::Parse {
        path: path.to_owned(),
        detail: err.to_string(),
    })
}

pub(crate) fn read_text(path: &Path) -> Result<String, ConfigError> {
    let file = |source| ConfigError::File {
        path: path.to_owned(),
        source,
    };
    let len = std::fs::metadata(path).map_err(file)?.len();
    if len > FILE_MAX_BYTES {
        return Err(ConfigError::Parse {
            path: path.to_owned(),
            detail: format!("{len} bytes are too long for a configuration"),
        });
    }
    std::fs::read_to_string(path).map_err(file)
}

/// Where a node's certificate and private key are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityFiles {
    /// The certificate (DER).
    pub certificate: PathBuf,
    /// The private key (PKCS#8 DER), mode 0600.
    pub key: PathBuf,
}

impl IdentityFiles {
    /// Paths in a configuration file are relative to it.
    pub(crate) fn anchor(&mut self, file: &Path) {
        anchor(file, &mut self.certificate);
        anchor(file, &mut self.key);
    }
}

/// Addresses that go before those of the consortium file, `host:port` each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Addresses {
    /// The first party's.
    pub p0: Option<String>,
    /// The second party's.
    pub p1: Option<String>,
    /// The third party's.
    pub p2: Option<String>,
    /// The dealer's.
    pub dealer: Option<String>,
}

impl Addresses {
    /// The address that goes before the consortium file's, if there is one.
    pub fn get(&self, peer: Peer) -> Option<&str> {
        match peer {
            Peer::Party(PartyId::P0) => self.p0.as_deref(),
            Peer::Party(PartyId::P1) => self.p1.as_deref(),
            Peer::Party(PartyId::P2) => self.p2.as_deref(),
            Peer::Dealer => self.dealer.as_deref(),
        }
    }

    /// Where a peer is: here, or in the consortium file.
    pub fn resolve(&self, peer: Peer, consortium: &ConsortiumFile) -> String {
        self.get(peer)
            .unwrap_or(&consortium.node(peer).address)
            .to_owned()
    }

    /// These addresses, and `other`'s where these have none.
    pub fn or(self, other: &Addresses) -> Addresses {
        Addresses {
            p0: self.p0.or_else(|| other.p0.clone()),
            p1: self.p1.or_else(|| other.p1.clone()),
            p2: self.p2.or_else(|| other.p2.clone()),
            dealer: self.dealer.or_else(|| other.dealer.clone()),
        }
    }

    /// The four addresses, in order.
    pub fn of(parties: [SocketAddr; 3], dealer: SocketAddr) -> Addresses {
        let [p0, p1, p2] = parties.map(|addr| Some(addr.to_string()));
        Addresses {
            p0,
            p1,
            p2,
            dealer: Some(dealer.to_string()),
        }
    }
}

/// Who may do what at this party.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Names of the members who may start jobs; none by default.
    pub requesters: Vec<String>,
}

/// A party's configuration. Which party it is follows from its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartyConfig {
    /// Where to listen; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The folder for everything the party keeps.
    pub home: PathBuf,
    /// The consortium file.
    pub consortium: PathBuf,
    /// What is logged, as in `RUST_LOG`, which goes before it.
    #[serde(default = "default_log")]
    pub log: String,
    /// Threads of the kernels; 0 takes a quarter of the cores, at least one, because a machine that
    /// runs one node of a consortium often runs all four.
    #[serde(default)]
    pub threads: usize,
    /// Certificate and key.
    pub identity: IdentityFiles,
    /// Addresses that go before the consortium file's.
    #[serde(default)]
    pub peers: Addresses,
    /// Who may do what.
    #[serde(default)]
    pub policy: Policy,
    /// Time-outs, windows and sizes of the links.
    #[serde(default)]
    pub transport: Settings,
}

/// The dealer's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DealerConfig {
    /// Where to listen; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The consortium file.
    pub consortium: PathBuf,
    /// What is logged, as in `RUST_LOG`, which goes before it.
    #[serde(default = "default_log")]
    pub log: String,
    /// Threads of the kernels; 0 takes a quarter of the cores, at least one, because a machine that
    /// runs one node of a consortium often runs all four.
    #[serde(default)]
    pub threads: usize,
    /// Certificate and key.
    pub identity: IdentityFiles,
    /// Time-outs, windows and sizes of the links.
    #[serde(default)]
    pub transport: Settings,
    /// FOR SIMULATIONS ONLY: derives the coins of stochastic rounding from this seed, so that a
    /// plain run can repeat them. A real dealer draws them from the operating system.
    #[serde(default)]
    pub simulation_coin_seed: Option<u64>,
}

fn default_log() -> String {
    "info".into()
}

/// The key of the rounding coins under [`DealerConfig::simulation_coin_seed`].
pub fn simulation_coin_key(seed: u64) -> [u8; 16] {
    use sha2::{Digest, Sha256};
    let hash = Sha256::new()
        .chain_update(b"trefoil simulated coins v1\0")
        .chain_update(seed.to_le_bytes())
        .finalize();
    let mut key = [0; 16];
    key.copy_from_slice(&hash[..16]);
    key
}

/// Paths in a file are relative to the file.
pub(crate) fn anchor(file: &Path, path: &mut PathBuf) {
    if let Some(folder) = file.parent() {
        *path = folder.join(&*path);
    }
}

pub(crate) fn check_settings(path: &Path, settings: &Settings) -> Result<(), ConfigError> {
    settings.check().map_err(|err| ConfigError::Parse {
        path: path.to_owned(),
        detail: format!("[transport]: {err}"),
    })
}

impl PartyConfig {
    /// Reads the file; relative paths in it are relative to it.
    pub fn load(path: &Path) -> Result<PartyConfig, ConfigError> {
        let mut config: PartyConfig = read_toml(path)?;
        check_settings(path, &config.transport)?;
        anchor(path, &mut config.home);
        anchor(path, &mut config.consortium);
        config.identity.anchor(path);
        Ok(config)
    }

    /// The file's text, as `load` reads it.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, integers and tables have a TOML form")
    }
}

impl DealerConfig {
    /// Reads the file; relative paths in it are relative to it.
    pub fn load(path: &Path) -> Result<DealerConfig, ConfigError> {
        let mut config: DealerConfig = read_toml(path)?;
        check_settings(path, &config.transport)?;
        anchor(path, &mut config.consortium);
        config.identity.anchor(path);
        Ok(config)
    }

    /// The file's text, as `load` reads it.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, integers and tables have a TOML form")
    }
}
