//! Session keys on their way: every party sends the dealer its generator's key, and of two parties
//! the lower sends the higher the key of their sharings of zero. Each travels once, on a control
//! stream of its own that names the session, and is kept in memory only.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use trefoil_protocol::party::Peer;
use trefoil_transport::{Link, MsgStream, Pin, StreamKind};

use crate::session::SessionId;
use crate::wire::{KeyReceived, SessionKey};

/// Largest message of a key stream.
const KEY_MAX_BYTES: usize = 64;
/// Keys that wait for one session at most: one from each other node.
const KEYS_MAX: usize = 4;

type Trays = Arc<Mutex<HashMap<SessionId, mpsc::Sender<(Pin, [u8; 16])>>>>;

/// Where keys arrive.
#[derive(Clone, Default)]
pub struct KeyDesk(Trays);

impl std::fmt::Debug for KeyDesk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyDesk(..)")
    }
}

/// The keys of one session. Dropping it ends their reception.
pub struct KeyTray {
    trays: Trays,
    session: SessionId,
    keys: mpsc::Receiver<(Pin, [u8; 16])>,
}

impl std::fmt::Debug for KeyTray {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyTray(..)")
    }
}

impl KeyDesk {
    /// From now on this session's keys are taken.
    pub fn open(&self, session: SessionId) -> KeyTray {
        let (sender, keys) = mpsc::channel(KEYS_MAX);
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(session, sender);
        KeyTray {
            trays: self.0.clone(),
            session,
            keys,
        }
    }

    /// Reads the key from a control stream that names `session`, if this node waits for it.
    pub async fn deliver(
        &self,
        session: SessionId,
        mut stream: MsgStream,
        wait: Duration,
    ) -> Result<(), String> {
        let tray = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&session)
            .cloned();
        let tray = tray.ok_or("a key for a session that is not known or over")?;
        let receiving = async {
            let key = stream
                .recv::<SessionKey>(KEY_MAX_BYTES)
                .await
                .map_err(|err| err.to_string())?;
            let SessionKey(key) = key.ok_or("a key stream without a key")?;
            tray.try_send((stream.link().peer(), key))
                .map_err(|_| "more keys than nodes")?;
            stream
                .send(&KeyReceived)
                .await
                .map_err(|err| err.to_string())
        };
        match tokio::time::timeout(wait, receiving).await {
            Ok(result) => result,
            Err(_) => Err("a key stream without a key in time".into()),
        }
    }
}

impl KeyTray {
    /// Waits for exactly one key from each of `peers`.
    pub async fn take(
        &mut self,
        peers: &[(Peer, Pin)],
        wait: Duration,
    ) -> Result<BTreeMap<Pin, [u8; 16]>, String> {
        let mut keys = BTreeMap::new();
        let gathering = async {
            while keys.len() < peers.len() {
                let Some((from, key)) = self.keys.recv().await else {
                    return Err("the session is over".to_owned());
                };
                let Some((peer, _)) = peers.iter().find(|(_, pin)| *pin == from) else {
                    return Err(format!("a session key from {from}, who has none to send"));
                };
                if keys.insert(from, key).is_some() {
                    return Err(format!("{peer} sent two session keys"));
                }
            }
            Ok(())
        };
        match tokio::time::timeout(wait, gathering).await {
            Ok(Ok(())) => Ok(keys),
            Ok(Err(reason)) => Err(reason),
            Err(_) => {
                let missing: Vec<String> = peers
                    .iter()
                    .filter(|(_, pin)| !keys.contains_key(pin))
                    .map(|(peer, _)| peer.to_string())
                    .collect();
                Err(format!(
                    "no session key from {} within {} ms",
                    missing.join(", "),
                    wait.as_millis()
                ))
            }
        }
    }
}

impl Drop for KeyTray {
    fn drop(&mut self) {
        self.trays
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.session);
    }
}

/// Sends a key to `peer` and waits until it is there.
pub async fn send_key(
    peer: Peer,
    link: &Link,
    session: SessionId,
    key: [u8; 16],
    wait: Duration,
) -> Result<(), String> {
    let sending = async {
        let mut stream = link.open(StreamKind::Control, session).await?;
        stream.send(&SessionKey(key)).await?;
        stream.recv::<KeyReceived>(KEY_MAX_BYTES).await
    };
    match tokio::time::timeout(wait, sending).await {
        Ok(Ok(Some(KeyReceived))) => Ok(()),
        Ok(Ok(None)) => Err(format!("{peer} did not take the session key")),
        Ok(Err(err)) => Err(format!("{peer}: {err}")),
        Err(_) => Err(format!(
            "{peer} did not take the session key within {} ms",
            wait.as_millis()
        )),
    }
}
