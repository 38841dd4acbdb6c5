//! How nodes meet. The one that dials says first what it runs and which consortium it belongs to;
//! the other answers the same, or why it will not have the link. Only then is the link used.
//!
//! The same stream answers whoever only wants to look: `trefoil doctor`, `trefoil status`, and each
//! member before it trusts a party. Such a link is never taken for the node's own.
//!
//! The messages are JSON, in which unknown fields are left alone, so that nodes of different
//! versions can tell each other so. Who speaks is the certificate's word, never the message's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use trefoil_transport::{Link, MsgStream, StreamKind, WIRE_VERSION};

use crate::wire::CONTROL_VERSION;
use crate::{ConsortiumFile, SOFTWARE, SessionId, hex};

/// Names the streams of meetings where others name their session, which is a hash.
pub const MEETING: SessionId = *b"trefoil introduction of nodes v1";
/// Longest message of a meeting.
const MESSAGE_MAX_BYTES: usize = 256 << 10;

/// What a node runs, and which consortium it belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeInfo {
    /// Its software.
    pub software: String,
    /// Version of its streams.
    pub wire_version: u32,
    /// Version of its control messages.
    pub control_version: u32,
    /// Hash of the core, hexadecimal.
    pub core: String,
    /// Number of its list of members.
    pub members_number: u64,
    /// Hash of that list, hexadecimal.
    pub members: String,
    /// Its clock, milliseconds since 1970.
    pub unix_ms: u64,
}

impl NodeInfo {
    /// What this node says now.
    pub fn of(consortium: &ConsortiumFile) -> NodeInfo {
        NodeInfo {
            software: SOFTWARE.into(),
            wire_version: WIRE_VERSION,
            control_version: CONTROL_VERSION,
            core: hex(&consortium.core_hash()),
            members_number: consortium.members_number,
            members: hex(&consortium.members_hash()),
            unix_ms: unix_ms(),
        }
    }

    /// Why the two cannot work together; `peer` is who `self` is.
    pub fn differs_from(&self, ours: &NodeInfo, peer: &str) -> Result<(), String> {
        if self.core != ours.core {
            return Err(format!(
                "{peer} belongs to another consortium: core hash {}, here {}; compare the files \
                 (trefoil consortium show)",
                clip(&self.core),
                ours.core
            ));
        }
        if self.control_version != ours.control_version {
            return Err(format!(
                "{peer} speaks control version {} ({}), here {} ({}): use the same software",
                self.control_version,
                clip(&self.software),
                ours.control_version,
                ours.software
            ));
        }
        Ok(())
    }
}

/// How a node is, for its operators and for members.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// What it runs.
    pub info: NodeInfo,
    /// Since its start.
    pub uptime_s: u64,
    /// Its links to the other nodes.
    pub peers: Vec<PeerStatus>,
    /// Jobs that wait; parties only.
    pub jobs_waiting: u64,
    /// Jobs that run; parties only.
    pub jobs_running: u64,
    /// Free bytes where it keeps its data; parties only.
    pub disk_free_bytes: Option<u64>,
    /// The last thing that went wrong, and when, milliseconds since 1970; for nodes only.
    pub last_error: Option<(u64, String)>,
}

/// A link as one of its ends sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerStatus {
    /// `P0`, `P1`, `P2` or `dealer`.
    pub peer: String,
    /// Smoothed round trip in microseconds; none without a link.
    pub rtt_us: Option<u64>,
    /// Why there is no link, as far as it is known.
    pub trouble: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Purpose {
    /// To be this node's link to that one.
    Stay,
    /// To see how it is.
    #[default]
    Look,
}

#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    purpose: Purpose,
    #[serde(default)]
    info: NodeInfo,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Welcome(NodeInfo),
    Status(Box<NodeStatus>),
    Refused(String),
}

/// What a caller wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Met {
    /// To stay: the link is the node's.
    Stays(NodeInfo),
    /// To look: it has been answered.
    Looked,
}

/// Milliseconds since 1970 on this machine's clock.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// The dialling node's side of a link that is to stay. The reason of a refusal names `peer`.
pub async fn introduce(
    link: &Link,
    ours: &NodeInfo,
    peer: &str,
    wait: Duration,
) -> Result<NodeInfo, String> {
    let purpose = Purpose::Stay;
    match ask(link, purpose, ours, peer, wait).await? {
        Reply::Welcome(theirs) => theirs.differs_from(ours, peer).map(|()| theirs),
        Reply::Refused(reason) => Err(format!("{peer} refused the link: {}", clip(&reason))),
        Reply::Status(_) => Err(format!("{peer} answered something else")),
    }
}

/// Asks a node how it is.
pub async fn look(
    link: &Link,
    ours: &NodeInfo,
    peer: &str,
    wait: Duration,
) -> Result<NodeStatus, String> {
    match ask(link, Purpose::Look, ours, peer, wait).await? {
        Reply::Status(status) => Ok(*status),
        Reply::Refused(reason) => Err(format!("{peer} refused: {}", clip(&reason))),
        Reply::Welcome(_) => Err(format!("{peer} answered something else")),
    }
}

async fn ask(
    link: &Link,
    purpose: Purpose,
    ours: &NodeInfo,
    peer: &str,
    wait: Duration,
) -> Result<Reply, String> {
    let asking = async {
        let mut stream = link
            .open(StreamKind::Control, MEETING)
            .await
            .map_err(|err| err.to_string())?;
        let info = ours.clone();
        send(&mut stream, &Greeting { purpose, info }).await?;
        receive::<Reply>(&mut stream).await
    };
    match tokio::time::timeout(wait, asking).await {
        Ok(reply) => reply.map_err(|reason| format!("{peer}: {reason}")),
        Err(_) => Err(format!(
            "{peer} did not introduce itself within {} ms: does it run this version ({SOFTWARE})?",
            wait.as_millis()
        )),
    }
}

/// The called node's side: the first stream of a new link from the node that the certificate says
/// is `peer`. An error is for the link's end and the log; the caller has been told.
pub async fn meet(
    link: &Link,
    peer: &str,
    wait: Duration,
    status: impl Fn() -> NodeStatus,
) -> Result<Met, String> {
    let meeting = async {
        let (_, name, stream) = link.accept().await.map_err(|err| err.to_string())?;
        if name != MEETING {
            return Err(format!(
                "{peer} did not introduce itself: does it run this version ({SOFTWARE})?"
            ));
        }
        answer(stream, Some(peer), status).await
    };
    match tokio::time::timeout(wait, meeting).await {
        Ok(met) => met,
        Err(_) => Err(format!(
            "{peer} did not introduce itself within {} ms",
            wait.as_millis()
        )),
    }
}

/// Answers a meeting's stream. Whoever is no node (`peer` is none) can only look.
pub async fn answer(
    mut stream: MsgStream,
    peer: Option<&str>,
    status: impl Fn() -> NodeStatus,
) -> Result<Met, String> {
    let greeting: Greeting = receive(&mut stream).await?;
    let status = status();
    let (reply, met) = match (greeting.purpose, peer) {
        (Purpose::Look, _) => (Reply::Status(Box::new(status)), Ok(Met::Looked)),
        (Purpose::Stay, None) => {
            let reason = "only nodes have links of their own".to_owned();
            (Reply::Refused(reason.clone()), Err(reason))
        }
        // The caller compares as well, so that each side says in its own words what differs.
        (Purpose::Stay, Some(peer)) => {
            let differs = greeting.info.differs_from(&status.info, peer);
            let met = differs.map(|()| Met::Stays(greeting.info));
            (Reply::Welcome(status.info), met)
        }
    };
    send(&mut stream, &reply).await?;
    stream.finish().await.map_err(|err| err.to_string())?;
    met
}

async fn send<T: Serialize>(stream: &mut MsgStream, message: &T) -> Result<(), String> {
    let bytes = serde_json::to_vec(message).map_err(|err| err.to_string())?;
    let sent = stream.send_bytes(bytes.into()).await;
    sent.map_err(|err| err.to_string())
}

async fn receive<T: DeserializeOwned>(stream: &mut MsgStream) -> Result<T, String> {
    match stream.recv_bytes(MESSAGE_MAX_BYTES).await {
        Ok(Some(bytes)) => {
            serde_json::from_slice(&bytes).map_err(|err| format!("is not understood: {err}"))
        }
        Ok(None) => Err("ended the stream without a word".into()),
        Err(err) => Err(err.to_string()),
    }
}

/// At most 400 printable characters of what another node said.
fn clip(text: &str) -> String {
    let plain = text.chars().filter(|c| !c.is_control());
    plain.take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::tests::example;

    #[test]
    fn nodes_of_another_core_and_of_another_version_are_told_apart() {
        let ours = NodeInfo::of(&example());
        ours.differs_from(&ours.clone(), "P1").unwrap();
        let mut other = example();
        other.core.name = "other".into();
        let theirs = NodeInfo::of(&other);
        let reason = theirs.differs_from(&ours, "P1").unwrap_err();
        for part in ["P1", &theirs.core, &ours.core, "another consortium"] {
            assert!(reason.contains(part), "{reason}");
        }
        let theirs = NodeInfo {
            control_version: 999,
            software: "trefoil 9".into(),
            ..ours.clone()
        };
        let reason = theirs.differs_from(&ours, "P1").unwrap_err();
        assert!(
            reason.contains("999") && reason.contains("trefoil 9"),
            "{reason}"
        );
        // Another list of members is no reason: it is handed out one node after the other.
        let mut newer = example();
        newer.members_number = 2;
        NodeInfo::of(&newer).differs_from(&ours, "P1").unwrap();
    }

    #[test]
    fn a_greeting_of_a_later_version_is_understood_as_far_as_it_can_be() {
        let text = r#"{"purpose":"stay","info":{"software":"trefoil 9","control_version":9,"mood":"good"},"x":1}"#;
        let greeting: Greeting = serde_json::from_str(text).unwrap();
        assert_eq!(greeting.purpose, Purpose::Stay);
        assert_eq!(greeting.info.control_version, 9);
        assert_eq!(greeting.info.core, "");
    }
}
