//! Why a cluster does not start or does not go on.

use std::io;
use std::path::PathBuf;

use crate::{NodeName, RelayError};

/// Why a cluster does not start or does not go on.
///
/// Where a node is the reason, the message ends with the last lines of its log.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file of a node's home could not be written or read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// An identity, the consortium file or a configuration could not be made.
    #[error("{what}: {detail}")]
    Setup {
        /// What was being made.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The executable did not run at all.
    #[error("{node}: cannot run {}: {source}", executable.display())]
    Executable {
        /// The node it should have been.
        node: NodeName,
        /// The executable.
        executable: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The node ran but did not say where it listens.
    #[error("{node} did not start: {detail}{log}")]
    Start {
        /// The node.
        node: NodeName,
        /// What was seen instead.
        detail: String,
        /// The last lines of its log.
        log: LogTail,
    },
    /// The node ended though nobody had asked it to.
    #[error("{node} ended unexpectedly ({status}){log}")]
    Ended {
        /// The node.
        node: NodeName,
        /// How it ended.
        status: String,
        /// The last lines of its log.
        log: LogTail,
    },
    /// A process could not be waited for or killed.
    #[error("{node}: {action}: {source}")]
    Process {
        /// The node.
        node: NodeName,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// No member of the cluster has this name.
    #[error("the cluster has no member {name:?}")]
    UnknownMember {
        /// The name asked for.
        name: String,
    },
    /// The links could not be set up.
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// The last lines of a node's log, with the file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogTail {
    /// The log file.
    pub path: PathBuf,
    /// Its last lines, oldest first.
    pub lines: Vec<String>,
}

impl std::fmt::Display for LogTail {
    /// Starts on a line of its own, so that it can follow a message.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.lines.is_empty() {
            return write!(f, "\nits log is empty: {}", self.path.display());
        }
        write!(f, "\nlast lines of {}:", self.path.display())?;
        self.lines
            .iter()
            .try_for_each(|line| write!(f, "\n  {line}"))
    }
}
