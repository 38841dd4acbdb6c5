//! The nodes' configuration files, TOML with unknown keys refused. Errors name file, line and key.

mod policy;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Settings;

use crate::ConsortiumFile;

pub use policy::{Kind, Output, Policy, Rule, Verdict};

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

/// Where contributions lie, and what hospitals may bring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Megabytes (10^6 bytes) of shares that one hospital's uploads may take here, committed and
    /// staged ones together; no bound without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota_mb_per_hospital: Option<u64>,
    /// `s3://BUCKET/PREFIX`: contributions lie in a bucket of S3-compatible storage, each party under a
    /// prefix of its own; in the home without it. Needs a program built with the feature `s3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Where the storage is, where that is not Amazon's: `https://storage.example.org`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The storage's region; the environment's without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Allows an endpoint without TLS: who listens sees which objects are asked for.
    pub plain_http: bool,
    /// Megabytes of the home's disk for copies of what jobs read from the bucket. One job's data may
    /// take more, while it runs.
    pub cache_mb: u64,
}

impl Default for StoreConfig {
    fn default() -> StoreConfig {
        StoreConfig {
            quota_mb_per_hospital: None,
            url: None,
            endpoint: None,
            region: None,
            plain_http: false,
            cache_mb: 20_000,
        }
    }
}

/// A party's configuration. Which party it is follows from its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartyConfig {
    /// Where to listen, UDP and TCP; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Listens nowhere: only dials out, from the address of `listen`. The consortium file has no
    /// address for such a node.
    #[serde(default)]
    pub dial_out_only: bool,
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
    /// How long a job whose session was interrupted waits for the missing node, in seconds; it goes
    /// on in a new session then. 0: it fails at once.
    #[serde(default = "default_resume_wait_s")]
    pub resume_wait_s: u64,
    /// How long a node that is told to stop waits for the end of a running job's step, and for its
    /// checkpoint, in seconds. 0: it stops at once.
    #[serde(default = "default_stop_wait_s")]
    pub stop_wait_s: u64,
    /// Certificate and key.
    pub identity: IdentityFiles,
    /// Addresses that go before the consortium file's.
    #[serde(default)]
    pub peers: Addresses,
    /// Who may do what.
    #[serde(default)]
    pub policy: Policy,
    /// What hospitals may bring.
    #[serde(default)]
    pub store: StoreConfig,
    /// Time-outs, windows and sizes of the links.
    #[serde(default)]
    pub transport: Settings,
}

/// The dealer's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DealerConfig {
    /// Where to listen, UDP and TCP; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Listens nowhere: only dials out, from the address of `listen`. The consortium file has no
    /// address for such a node.
    #[serde(default)]
    pub dial_out_only: bool,
    /// The consortium file.
    pub consortium: PathBuf,
    /// What is logged, as in `RUST_LOG`, which goes before it.
    #[serde(default = "default_log")]
    pub log: String,
    /// Threads of the kernels; 0 takes a quarter of the cores, at least one, because a machine that
    /// runs one node of a consortium often runs all four.
    #[serde(default)]
    pub threads: usize,
    /// How long a node that is told to stop waits for the end of a running job's step, and for the
    /// parties' checkpoint, in seconds. 0: it stops at once.
    #[serde(default = "default_stop_wait_s")]
    pub stop_wait_s: u64,
    /// Certificate and key.
    pub identity: IdentityFiles,
    /// Addresses of parties that go before the consortium file's, where the dealer dials them.
    #[serde(default)]
    pub peers: Addresses,
    /// Time-outs, windows and sizes of the links.
    #[serde(default)]
    pub transport: Settings,
    /// FOR SIMULATIONS ONLY: derives the coins of stochastic rounding from this seed, so that a
    /// plain run can repeat them. A real dealer draws them from the operating system.
    #[serde(default)]
    pub simulation_coin_seed: Option<u64>,
}

/// How long an interrupted job waits, unless the configuration says otherwise.
pub const RESUME_WAIT_S: u64 = 600;
/// Longest such wait: 7 days.
const RESUME_WAIT_MAX_S: u64 = 7 * 24 * 3600;

fn default_resume_wait_s() -> u64 {
    RESUME_WAIT_S
}

/// How long a node that is told to stop waits for a step's end, unless the configuration says
/// otherwise: less than the 90 s after which a service manager kills it.
pub const STOP_WAIT_S: u64 = 60;
/// Longest such wait: an hour.
const STOP_WAIT_MAX_S: u64 = 3_600;

fn default_stop_wait_s() -> u64 {
    STOP_WAIT_S
}

fn check_stop_wait(path: &Path, stop_wait_s: u64) -> Result<(), ConfigError> {
    match stop_wait_s <= STOP_WAIT_MAX_S {
        true => Ok(()),
        false => Err(ConfigError::Parse {
            path: path.to_owned(),
            detail: format!(
                "stop_wait_s: 0 to {STOP_WAIT_MAX_S} are possible, found {stop_wait_s}"
            ),
        }),
    }
}

fn default_log() -> String {
    "info".into()
}

/// The key of the rounding coins of a job, from a dealer's secret: the same for every attempt at the
/// job, so that one that is taken up rounds as it would have, and for nothing else.
pub fn coin_key(secret: &[u8], job: &crate::JobId) -> [u8; 16] {
    use sha2::{Digest, Sha256};
    let hash = Sha256::new()
        .chain_update(b"trefoil coins v1\0")
        .chain_update((secret.len() as u64).to_le_bytes())
        .chain_update(secret)
        .chain_update(job.0)
        .finalize();
    let mut key = [0; 16];
    key.copy_from_slice(&hash[..16]);
    key
}

/// What a key of coins is known by: it says nothing of the coins, and another key has another name.
pub fn coin_name(key: &[u8; 16]) -> [u8; 32] {
    use sha2::{Digest, Sha256};
    let hash = Sha256::new().chain_update(b"trefoil coin name v1\0");
    hash.chain_update(key).finalize().into()
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
        config.policy.check().map_err(|detail| ConfigError::Parse {
            path: path.to_owned(),
            detail,
        })?;
        if config.resume_wait_s > RESUME_WAIT_MAX_S {
            return Err(ConfigError::Parse {
                path: path.to_owned(),
                detail: format!(
                    "resume_wait_s: 0 to {RESUME_WAIT_MAX_S} are possible, found {}",
                    config.resume_wait_s
                ),
            });
        }
        check_stop_wait(path, config.stop_wait_s)?;
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
        check_stop_wait(path, config.stop_wait_s)?;
        anchor(path, &mut config.consortium);
        config.identity.anchor(path);
        Ok(config)
    }

    /// The file's text, as `load` reads it.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, integers and tables have a TOML form")
    }
}
