//! A whole cluster: four node processes, the links between them, and an end.
//!
//! Everything here blocks and is meant for a plain thread; from asynchronous
//! code, call [`Cluster::start`] and [`Cluster::stop`] where blocking is allowed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tracing::{debug, info, warn};
use trefoil_consortium::ConsortiumFile;
use trefoil_transport::{Protocol, Settings};

use crate::error::LogTail;
use crate::homes::{ClusterMember, Homes};
use crate::process::{Process, Start, Usage};
use crate::{ClusterError, Link, NodeAddresses, NodeName, Relays};

/// Where the nodes' homes are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Home {
    /// A fresh folder that goes with the cluster.
    #[default]
    Temporary,
    /// This folder, which must be new or empty; it stays.
    At(PathBuf),
}

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    /// The executable; it is called as `EXECUTABLE party|dealer --config FILE --attached`.
    pub executable: PathBuf,
    /// Where the nodes' homes are.
    pub home: Home,
    /// What lies between every two nodes, and between members and parties.
    pub link: Link,
    /// The transport's settings at every node; their protocol is in all entries of the consortium
    /// file.
    pub settings: Settings,
    /// Nodes that use TCP where the settings say QUIC.
    pub over_tcp: Vec<NodeName>,
    /// A node that listens nowhere and dials all others.
    pub dials_out_only: Option<NodeName>,
    /// Names of the hospitals.
    pub hospitals: Vec<String>,
    /// Name of the analyst.
    pub analyst: String,
    /// The nodes' log filter, as in `info,trefoil_party=debug`.
    pub log: String,
    /// Width of the ring: 64 or 48.
    pub ring_bits: u8,
    /// Makes the dealer derive the coins of stochastic rounding from this seed, so
    /// that a plain run can repeat them. Real dealers draw them.
    pub simulation_coin_seed: Option<u64>,
    /// How long an interrupted job waits for the missing node; 0: it fails at once.
    pub resume_wait_s: u64,
    /// More environment for the nodes; they inherit this process's.
    pub env: BTreeMap<String, String>,
    /// How long all nodes together may take to say where they listen.
    pub start_timeout: Duration,
    /// How long [`Cluster::stop`] waits before it kills.
    pub stop_timeout: Duration,
}

impl ClusterSpec {
    /// The defaults, with this process's own executable.
    pub fn new() -> Result<ClusterSpec, ClusterError> {
        let executable = std::env::current_exe().map_err(|source| ClusterError::File {
            path: "this executable".into(),
            source,
        })?;
        Ok(ClusterSpec::of(executable))
    }

    /// The defaults, with this executable.
    pub fn of(executable: impl Into<PathBuf>) -> ClusterSpec {
        ClusterSpec {
            executable: executable.into(),
            home: Home::Temporary,
            link: Link::Loopback,
            settings: Settings::default(),
            over_tcp: Vec::new(),
            dials_out_only: None,
            hospitals: (1..=3).map(|n| format!("hospital-{n}")).collect(),
            analyst: "analyst".into(),
            log: "info".into(),
            ring_bits: 64,
            simulation_coin_seed: None,
            resume_wait_s: 0,
            env: BTreeMap::new(),
            start_timeout: Duration::from_secs(15),
            stop_timeout: Duration::from_secs(3),
        }
    }
}

/// How a node ended in [`Cluster::stop`].
#[derive(Clone, Debug)]
pub struct NodeExit {
    /// The node.
    pub node: NodeName,
    /// How it ended.
    pub status: Option<ExitStatus>,
    /// It had not ended in time and was killed.
    pub killed: bool,
    /// What it had used when it was asked to end.
    pub usage: Option<Usage>,
    /// The last lines of its log.
    pub log: LogTail,
}

/// A running cluster. Dropping it ends every node, like [`Cluster::stop`].
pub struct Cluster {
    // Dropped in this order: nodes, then the links between them, then their files.
    nodes: Vec<Mutex<Process>>,
    relays: Option<Relays>,
    addresses: NodeAddresses,
    homes: Homes,
    executable: PathBuf,
    env: BTreeMap<String, String>,
    start_timeout: Duration,
    stop_timeout: Duration,
    _temporary: Option<TempDir>,
}

impl Cluster {
    /// Writes the homes, starts the nodes and the links, and introduces the nodes
    /// to each other. On an error nothing is left running.
    pub fn start(spec: &ClusterSpec) -> Result<Cluster, ClusterError> {
        let tcp = spec.settings.protocol == Protocol::Tcp || !spec.over_tcp.is_empty();
        if tcp && spec.link != Link::Loopback {
            return Err(ClusterError::Setup {
                what: format!("the link {}", spec.link),
                detail: "the emulated network carries UDP alone; over TCP only lan is possible"
                    .into(),
            });
        }
        let (folder, temporary) = open_home(&spec.home)?;
        let homes = Homes::write(&folder, spec)?;
        let deadline = Instant::now() + spec.start_timeout;

        let mut processes = Vec::with_capacity(NodeName::ALL.len());
        for name in NodeName::ALL {
            processes.push(Process::start(Start {
                name,
                executable: &spec.executable,
                config: &homes.config(name),
                log: homes.log(name),
                env: &spec.env,
            })?);
        }
        let mut listening = Vec::with_capacity(processes.len());
        for process in &mut processes {
            listening.push(process.listening(deadline)?);
        }
        let addresses = match listening[..] {
            [p0, p1, p2, dealer] => NodeAddresses { p0, p1, p2, dealer },
            _ => unreachable!("one address for each of the four nodes"),
        };

        let relays = match spec.link {
            Link::Loopback => None,
            Link::Emulated { rtt_ms, mbit_per_s } => Some(Relays::start(rtt_ms, mbit_per_s)?),
        };
        let mut cluster = Cluster {
            nodes: processes.into_iter().map(Mutex::new).collect(),
            relays,
            addresses,
            homes,
            executable: spec.executable.clone(),
            env: spec.env.clone(),
            start_timeout: spec.start_timeout,
            stop_timeout: spec.stop_timeout,
            _temporary: temporary,
        };
        cluster.introduce()?;
        info!(link = %spec.link, home = %cluster.home().display(), "cluster started");
        Ok(cluster)
    }

    /// Gives every node, and every member, its own view of the addresses.
    fn introduce(&mut self) -> Result<(), ClusterError> {
        for dialler in NodeName::ALL {
            let seen = self.seen(dialler)?;
            self.node(dialler).greet(seen)?;
        }
        for at in 0..self.homes.members.len() {
            let name = &self.homes.members[at].name;
            let [p0, p1, p2] = NodeName::PARTIES.map(|party| self.way(name, party));
            self.homes.members[at].parties = [p0?, p1?, p2?];
        }
        Ok(())
    }

    /// The addresses as a node sees them.
    fn seen(&self, dialler: NodeName) -> Result<NodeAddresses, ClusterError> {
        let seen = |node: NodeName| {
            if node == dialler {
                Ok(self.addresses.of(node))
            } else {
                self.way(dialler.as_str(), node)
            }
        };
        Ok(NodeAddresses {
            p0: seen(NodeName::P0)?,
            p1: seen(NodeName::P1)?,
            p2: seen(NodeName::P2)?,
            dealer: seen(NodeName::Dealer)?,
        })
    }

    /// Starts a node again that has ended, in its old home and at its old address. The other nodes
    /// are left alone.
    ///
    /// # Errors
    /// It runs, or does not start.
    pub fn restart(&self, node: NodeName) -> Result<(), ClusterError> {
        let mut process = self.node(node);
        if process.status()?.is_none() {
            return Err(ClusterError::Setup {
                what: format!("{node} again"),
                detail: "it still runs".into(),
            });
        }
        let address = self.addresses.of(node);
        self.homes.settle(node, address)?;
        let deadline = Instant::now() + self.start_timeout;
        *process = Process::start(Start {
            name: node,
            executable: &self.executable,
            config: &self.homes.config(node),
            log: self.homes.log(node),
            env: &self.env,
        })?;
        let listening = process.listening(deadline)?;
        if listening != address {
            return Err(ClusterError::Setup {
                what: format!("{node} again"),
                detail: format!("it listens at {listening} instead of {address}"),
            });
        }
        process.greet(self.seen(node)?)
    }

    /// The address that `dialler` uses for a node: a relay's where the link is emulated.
    fn way(&self, dialler: &str, node: NodeName) -> Result<SocketAddr, ClusterError> {
        let listener = self.addresses.of(node);
        match &self.relays {
            None => Ok(listener),
            Some(relays) => Ok(relays.add(dialler, node.as_str(), listener)?),
        }
    }

    /// The hospitals and the analyst, each with its identity and the parties'
    /// addresses as seen from its place.
    pub fn members(&self) -> &[ClusterMember] {
        &self.homes.members
    }

    /// One member by name.
    pub fn member(&self, name: &str) -> Result<&ClusterMember, ClusterError> {
        let found = self.members().iter().find(|member| member.name == name);
        found.ok_or_else(|| ClusterError::UnknownMember { name: name.into() })
    }

    /// The folder that holds the nodes' homes and the consortium file.
    pub fn home(&self) -> &Path {
        &self.homes.root
    }

    /// A node's own folder.
    pub fn node_home(&self, node: NodeName) -> PathBuf {
        self.homes.folder(node)
    }

    /// Who takes part, with everybody's pins.
    pub fn consortium(&self) -> &ConsortiumFile {
        &self.homes.consortium
    }

    /// The consortium file.
    pub fn consortium_path(&self) -> PathBuf {
        self.homes.consortium_path()
    }

    /// Where the nodes listen, without any relay.
    pub fn addresses(&self) -> NodeAddresses {
        self.addresses
    }

    /// The emulated links, for faults and statistics; none on loopback. The ends'
    /// names are the nodes' (`p0`, `p1`, `p2`, `dealer`) and the members'.
    pub fn relays(&self) -> Option<&Relays> {
        self.relays.as_ref()
    }

    /// The process id of a node.
    pub fn pid(&self, node: NodeName) -> u32 {
        self.node(node).pid()
    }

    /// Kills one node (SIGKILL), and nothing else. From here on its end is no error.
    pub fn kill(&self, node: NodeName) -> Result<(), ClusterError> {
        self.node(node).kill().map(drop)
    }

    /// An error, with the last lines of its log, for the first node that has ended
    /// though nobody asked it to.
    pub fn check(&self) -> Result<(), ClusterError> {
        NodeName::ALL
            .into_iter()
            .try_for_each(|name| self.node(name).check())
    }

    /// Waits until a node has ended by itself, at most for `timeout`; `None`: it runs on.
    pub fn wait(
        &self,
        node: NodeName,
        timeout: Duration,
    ) -> Result<Option<ExitStatus>, ClusterError> {
        self.node(node).wait(Instant::now() + timeout)
    }

    /// CPU time and memory of a node's process, where the operating system tells.
    pub fn usage(&self, node: NodeName) -> Option<Usage> {
        self.node(node).usage()
    }

    /// The file with a node's standard error.
    pub fn log_path(&self, node: NodeName) -> PathBuf {
        self.node(node).log().to_owned()
    }

    /// The last lines of a node's log.
    pub fn log_tail(&self, node: NodeName) -> LogTail {
        self.node(node).tail()
    }

    /// Ends all nodes in order: closes their inputs, waits a while for all of
    /// them together, kills what is left. Then the links, then a temporary home.
    pub fn stop(mut self) -> Vec<NodeExit> {
        self.end_nodes()
    }

    fn end_nodes(&mut self) -> Vec<NodeExit> {
        let nodes = std::mem::take(&mut self.nodes);
        let mut nodes: Vec<Process> = nodes
            .into_iter()
            .map(|node| node.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect();
        nodes.iter_mut().for_each(Process::close_input);
        let deadline = Instant::now() + self.stop_timeout;
        let exits = NodeName::ALL.into_iter().zip(&mut nodes);
        exits
            .map(|(name, process)| {
                let ended = process.wait(deadline).unwrap_or_default();
                let status = ended.or_else(|| match process.kill() {
                    Ok(status) => Some(status),
                    Err(error) => {
                        warn!(node = %name, %error, "could not be ended");
                        None
                    }
                });
                if ended.is_none() {
                    debug!(node = %name, "did not end by itself and was killed");
                }
                NodeExit {
                    node: name,
                    status,
                    killed: ended.is_none(),
                    usage: process.usage(),
                    log: process.tail(),
                }
            })
            .collect()
    }

    fn node(&self, name: NodeName) -> MutexGuard<'_, Process> {
        // A process is valid after every statement; a panic elsewhere leaves it so.
        self.nodes[name.index()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end_nodes();
    }
}

/// The folder for the homes, readable by nobody else where the system has that.
fn open_home(home: &Home) -> Result<(PathBuf, Option<TempDir>), ClusterError> {
    match home {
        Home::Temporary => {
            let made = tempfile::Builder::new().prefix("trefoil-").tempdir();
            let folder = made.map_err(|source| ClusterError::File {
                path: std::env::temp_dir(),
                source,
            })?;
            Ok((folder.path().to_owned(), Some(folder)))
        }
        Home::At(path) => {
            std::fs::create_dir_all(path)
                .and_then(|()| std::fs::read_dir(path))
                .and_then(|mut entries| match entries.next() {
                    None => Ok(()),
                    Some(_) => Err(std::io::Error::other(
                        "is not empty; a cluster needs a new or empty folder",
                    )),
                })
                .map_err(|source| ClusterError::File {
                    path: path.clone(),
                    source,
                })?;
            // The absolute path holds whatever folder a node runs in.
            let absolute = std::path::absolute(path).map_err(|source| ClusterError::File {
                path: path.clone(),
                source,
            })?;
            Ok((absolute, None))
        }
    }
}
