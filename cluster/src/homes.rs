//! The files of a cluster: an identity and a configuration for every node, the
//! consortium file, an identity for every member.
//!
//! ```text
//! ROOT/consortium.toml
//! ROOT/p0/  party.toml   certificate.der  key.der  log  store/
//! ROOT/dealer/  dealer.toml   certificate.der  key.der  log
//! ROOT/members/hospital-1/  certificate.der  key.der
//! ```
//!
//! The same files that an institution writes by hand, with the same functions.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use trefoil_consortium::config::{IdentityFiles, Policy, Rule, STOP_WAIT_S, Verdict};
use trefoil_consortium::{
    Addresses, ConsortiumFile, Core, DealerConfig, Member, MemberEntry, MemberRole, PartyConfig,
    identity,
};
use trefoil_transport::{Identity, Pin, Protocol};

use crate::{ClusterError, ClusterSpec, NodeName};

const CERTIFICATE: &str = "certificate.der";
const KEY: &str = "key.der";
/// Each node picks a free port and says which.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A hospital or analyst of the cluster: what it needs to reach the parties.
#[derive(Clone, Debug)]
pub struct ClusterMember {
    /// Its name in the consortium file.
    pub name: String,
    /// Hospital or analyst.
    pub role: MemberRole,
    /// Its certificate and key.
    pub identity: Identity,
    /// The folder with its certificate and key.
    pub folder: PathBuf,
    /// The parties, as seen from its place in the network.
    pub parties: [SocketAddr; 3],
}

/// The files of a cluster.
pub(crate) struct Homes {
    pub(crate) root: PathBuf,
    pub(crate) consortium: ConsortiumFile,
    pub(crate) members: Vec<ClusterMember>,
}

impl Homes {
    /// Makes all keys and writes all files below `root`.
    pub(crate) fn write(root: &Path, spec: &ClusterSpec) -> Result<Homes, ClusterError> {
        let mut nodes = Vec::with_capacity(NodeName::ALL.len());
        let mut identities = Vec::with_capacity(NodeName::ALL.len());
        for name in NodeName::ALL {
            let folder = make_folder(root.join(name.as_str()))?;
            let (identity, pin) = make_identity(&folder, name.as_str())?;
            identities.push(identity);
            let over_tcp = spec.over_tcp.contains(&name);
            nodes.push(Member {
                name: name.to_string(),
                pin,
                address: match spec.dials_out_only == Some(name) {
                    true => String::new(),
                    false => LISTEN.to_string(),
                },
                transport: match over_tcp {
                    true => Protocol::Tcp,
                    false => spec.settings.protocol,
                },
            });
        }
        let Ok([p0, p1, p2, dealer]) = <[Member; 4]>::try_from(nodes) else {
            unreachable!("one entry for each of the four nodes");
        };
        let members = make_members(root, spec)?;
        let core = Core {
            name: "simulated".into(),
            ring_bits: spec.ring_bits,
            parties: [p0, p1, p2],
            dealer,
        };
        // All keys are here, so all signatures are.
        let consortium = ConsortiumFile::new(core, entries(&members)?)
            .signed_by(&identities)
            .map_err(|error| setup("the nodes", &error))?;
        consortium
            .check()
            .map_err(|(field, detail)| ClusterError::Setup {
                what: format!("the consortium file, {field}"),
                detail,
            })?;
        let homes = Homes {
            root: root.to_owned(),
            consortium,
            members,
        };
        write(&homes.consortium_path(), &homes.consortium.to_toml())?;
        for name in NodeName::PARTIES {
            make_folder(homes.folder(name).join("store"))?;
            write(&homes.config(name), &homes.party(name, spec).to_toml())?;
        }
        write(
            &homes.config(NodeName::Dealer),
            &homes.dealer(spec).to_toml(),
        )?;
        Ok(homes)
    }

    /// Has a node listen at this address from its next start on.
    pub(crate) fn settle(&self, node: NodeName, address: SocketAddr) -> Result<(), ClusterError> {
        let path = self.config(node);
        let text = std::fs::read_to_string(&path).map_err(|source| ClusterError::File {
            path: path.clone(),
            source,
        })?;
        let settled = text.replace(&format!("\"{LISTEN}\""), &format!("\"{address}\""));
        write(&path, &settled)
    }

    pub(crate) fn consortium_path(&self) -> PathBuf {
        self.root.join("consortium.toml")
    }

    pub(crate) fn folder(&self, node: NodeName) -> PathBuf {
        self.root.join(node.as_str())
    }

    pub(crate) fn config(&self, node: NodeName) -> PathBuf {
        self.folder(node).join(format!("{}.toml", node.command()))
    }

    pub(crate) fn log(&self, node: NodeName) -> PathBuf {
        self.folder(node).join("log")
    }

    fn party(&self, name: NodeName, spec: &ClusterSpec) -> PartyConfig {
        PartyConfig {
            listen: LISTEN,
            dial_out_only: spec.dials_out_only == Some(name),
            home: "store".into(),
            consortium: "../consortium.toml".into(),
            log: spec.log.clone(),
            threads: 0,
            resume_wait_s: spec.resume_wait_s,
            stop_wait_s: STOP_WAIT_S,
            identity: identity_files(),
            peers: Addresses::default(),
            store: Default::default(),
            policy: Policy {
                requesters: self.members.iter().map(|m| m.name.clone()).collect(),
                // All parties of a cluster are one person's, who starts its jobs.
                rules: vec![Rule::new("local-cluster", Verdict::Allow)],
                ..Policy::default()
            },
            transport: spec.settings.clone(),
        }
    }

    fn dealer(&self, spec: &ClusterSpec) -> DealerConfig {
        DealerConfig {
            listen: LISTEN,
            dial_out_only: spec.dials_out_only == Some(NodeName::Dealer),
            peers: Addresses::default(),
            consortium: "../consortium.toml".into(),
            log: spec.log.clone(),
            threads: 0,
            stop_wait_s: STOP_WAIT_S,
            identity: identity_files(),
            transport: spec.settings.clone(),
            simulation_coin_seed: spec.simulation_coin_seed,
        }
    }
}

fn identity_files() -> IdentityFiles {
    IdentityFiles {
        certificate: CERTIFICATE.into(),
        key: KEY.into(),
    }
}

fn make_members(root: &Path, spec: &ClusterSpec) -> Result<Vec<ClusterMember>, ClusterError> {
    let hospitals = spec
        .hospitals
        .iter()
        .map(|name| (name, MemberRole::Hospital));
    hospitals
        .chain([(&spec.analyst, MemberRole::Analyst)])
        .map(|(name, role)| {
            // A name becomes a folder below; this refuses separators and dots.
            trefoil_consortium::check_name(name).map_err(|detail| ClusterError::Setup {
                what: format!("member {name:?}"),
                detail,
            })?;
            let folder = make_folder(root.join("members").join(name))?;
            let (identity, _) = make_identity(&folder, name)?;
            Ok(ClusterMember {
                name: name.clone(),
                role,
                identity,
                folder,
                // Known once the nodes listen.
                parties: [LISTEN; 3],
            })
        })
        .collect()
}

fn entries(members: &[ClusterMember]) -> Result<Vec<MemberEntry>, ClusterError> {
    let entry = |member: &ClusterMember| {
        let pin = identity::pin(&member.identity).map_err(|error| setup(&member.name, &error))?;
        Ok(MemberEntry::new(&member.name, member.role, pin))
    };
    members.iter().map(entry).collect()
}

fn make_identity(folder: &Path, name: &str) -> Result<(Identity, Pin), ClusterError> {
    let made = identity::generate(name).and_then(|made| {
        identity::save(&made, &folder.join(CERTIFICATE), &folder.join(KEY))?;
        let pin = identity::pin(&made)?;
        Ok((made, pin))
    });
    made.map_err(|error| setup(name, &error))
}

fn setup(name: &str, error: &identity::IdentityError) -> ClusterError {
    ClusterError::Setup {
        what: format!("identity of {name}"),
        detail: error.to_string(),
    }
}

fn make_folder(path: PathBuf) -> Result<PathBuf, ClusterError> {
    match std::fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(ClusterError::File { path, source }),
    }
}

fn write(path: &Path, text: &str) -> Result<(), ClusterError> {
    std::fs::write(path, text).map_err(|source| ClusterError::File {
        path: path.to_owned(),
        source,
    })
}
