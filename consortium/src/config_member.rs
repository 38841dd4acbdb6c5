//! A hospital's or analyst's configuration file, `member.toml` in its home folder. It connects to
//! the parties and nobody connects to it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Settings;

use crate::ConsortiumFile;
use crate::config::{Addresses, ConfigError, IdentityFiles, anchor, check_settings, read_toml};

/// A member's configuration. Who it is follows from its certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// The consortium file.
    pub consortium: PathBuf,
    /// Certificate and key.
    pub identity: IdentityFiles,
    /// Addresses of parties that go before the consortium file's.
    #[serde(default)]
    pub peers: Addresses,
    /// Time-outs, windows and sizes of the links.
    #[serde(default)]
    pub transport: Settings,
}

impl MemberConfig {
    /// Reads the file; relative paths in it are relative to it.
    pub fn load(path: &Path) -> Result<MemberConfig, ConfigError> {
        let mut config: MemberConfig = read_toml(path)?;
        check_settings(path, &config.transport)?;
        if config.peers.dealer.is_some() {
            return Err(ConfigError::Parse {
                path: path.to_owned(),
                detail: "[peers] dealer: a member does not connect to the dealer; remove this key"
                    .into(),
            });
        }
        anchor(path, &mut config.consortium);
        config.identity.anchor(path);
        Ok(config)
    }

    /// The file's text, as `load` reads it.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, integers and tables have a TOML form")
    }

    /// The consortium as this member sees it: its own addresses of the parties go first.
    pub fn seen_from_here(&self, mut consortium: ConsortiumFile) -> ConsortiumFile {
        for party in PartyId::ALL {
            let address = self.peers.resolve(Peer::Party(party), &consortium);
            consortium.core.parties[party.index()].address = address;
        }
        consortium
    }
}
