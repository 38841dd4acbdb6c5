//! A node's consortium file while the node runs: the file is looked at every two seconds and at
//! SIGHUP, and a newer list of members is taken without a restart.
//!
//! Taken is a file with the same core, all signatures, and a higher members' number. The highest
//! number that was ever used is remembered in the node's home, also across restarts: an old file,
//! with members that were removed since, is never taken again. Addresses and comments are advice;
//! under the same number they may change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use trefoil_transport::{Node, Pin};

use crate::config::read_text;
use crate::{ConsortiumError, ConsortiumFile, hex};

/// The file in a node's home that remembers the members' number.
pub const CONSORTIUM_RECORD: &str = "consortium-used.json";
/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Longest record of earlier files that is read.
const RECORD_MAX_BYTES: u64 = 1 << 20;

/// The consortium file of a running node.
#[derive(Debug)]
pub struct LiveConsortium {
    path: PathBuf,
    record: PathBuf,
    current: RwLock<Arc<ConsortiumFile>>,
    /// The content that was looked at last, or why there was none.
    looked_at: Mutex<Result<String, String>>,
}

/// What came of a look at the file.
#[derive(Debug)]
pub enum Reloaded {
    /// It is as it was when it was last looked at.
    Same,
    /// It was taken; what has changed, in words.
    Taken(Vec<String>),
    /// It was not taken, and the node goes on with the one before.
    Refused(ConsortiumError),
}

/// The highest number used with one core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Used {
    number: u64,
    /// Of the members under that number.
    hash: String,
}

/// By core hash: a home may have seen more than one consortium.
type Record = BTreeMap<String, Used>;

impl LiveConsortium {
    /// Loads the file for a node that starts. `record` remembers the members' number.
    pub fn open(path: &Path, record: &Path) -> Result<LiveConsortium, ConsortiumError> {
        let text = read_text(path)?;
        let file = ConsortiumFile::parse_signed(path, &text)?;
        remember(path, record, &file)?;
        Ok(LiveConsortium {
            path: path.to_owned(),
            record: record.to_owned(),
            current: RwLock::new(Arc::new(file)),
            looked_at: Mutex::new(Ok(text)),
        })
    }

    /// The file that holds now.
    pub fn now(&self) -> Arc<ConsortiumFile> {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Looks at the file and takes it where it may be taken. One that is refused is said once.
    pub fn reload(&self) -> Reloaded {
        let mut looked_at = self
            .looked_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let read = read_text(&self.path);
        let found = match &read {
            Ok(text) => Ok(text.clone()),
            Err(err) => Err(err.to_string()),
        };
        if *looked_at == found {
            return Reloaded::Same;
        }
        *looked_at = found;
        match read
            .map_err(ConsortiumError::from)
            .and_then(|text| self.take(&text))
        {
            Ok(changes) => Reloaded::Taken(changes),
            Err(err) => {
                if matches!(err, ConsortiumError::Record { .. }) {
                    // A full disk may pass: the file is looked at again.
                    *looked_at = Err(err.to_string());
                }
                Reloaded::Refused(err)
            }
        }
    }

    fn take(&self, text: &str) -> Result<Vec<String>, ConsortiumError> {
        let new = ConsortiumFile::parse_signed(&self.path, text)?;
        let old = self.now();
        if new.core_hash() != old.core_hash() {
            return Err(ConsortiumError::OtherCore {
                path: self.path.clone(),
                found: hex(&new.core_hash()),
                running: hex(&old.core_hash()),
            });
        }
        remember(&self.path, &self.record, &new)?;
        let changes = new.changes_since(&old);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(changes)
    }

    /// Follows the file for ever. `allowed` says whose keys may connect to this node; connections of
    /// all others are closed as soon as a new file is taken.
    pub async fn follow(
        self: Arc<Self>,
        node: Arc<Node>,
        allowed: impl Fn(&ConsortiumFile) -> BTreeSet<Pin>,
    ) {
        let mut hangups = Hangups::listen();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = hangups.next() => {}
            }
            let live = self.clone();
            // A failed look is one that did not happen; the next one follows.
            match tokio::task::spawn_blocking(move || live.reload()).await {
                Ok(Reloaded::Taken(changes)) => {
                    let now = self.now();
                    node.set_allowed(allowed(&now));
                    let (number, members) = (now.members_number, now.members_short());
                    let changes = changes.join("; ");
                    tracing::info!(number, %members, %changes, "took a new consortium file");
                }
                Ok(Reloaded::Refused(reason)) => tracing::error!(
                    %reason, "the new consortium file was not taken; the one before holds"
                ),
                Ok(Reloaded::Same) | Err(_) => {}
            }
        }
    }
}

/// Checks a file against what was used before, and remembers it where its number is higher.
fn remember(path: &Path, record: &Path, file: &ConsortiumFile) -> Result<(), ConsortiumError> {
    let wrong = |detail: String| ConsortiumError::Record {
        path: record.to_owned(),
        detail,
    };
    let mut all: Record = match fs::metadata(record) {
        Ok(meta) if meta.len() > RECORD_MAX_BYTES => {
            return Err(wrong(format!("{} bytes are too long", meta.len())));
        }
        Ok(_) => {
            let text = fs::read_to_string(record).map_err(|err| wrong(err.to_string()))?;
            serde_json::from_str(&text).map_err(|err| {
                wrong(format!(
                    "is damaged ({err}): compare the members' number with the other parties \
                     (trefoil consortium show), then remove this file"
                ))
            })?
        }
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Record::new(),
        Err(err) => return Err(wrong(err.to_string())),
    };
    let core = hex(&file.core_hash());
    let now = Used {
        number: file.members_number,
        hash: hex(&file.members_hash()),
    };
    match all.get(&core) {
        Some(used) if used.number > now.number => Err(ConsortiumError::Older {
            path: path.to_owned(),
            found: now.number,
            seen: used.number,
            record: record.to_owned(),
        }),
        Some(used) if used.number == now.number && used.hash != now.hash => {
            Err(ConsortiumError::Twofold {
                path: path.to_owned(),
                number: now.number,
                found: now.hash[..16].into(),
                seen: used.hash.chars().take(16).collect(),
            })
        }
        Some(used) if *used == now => Ok(()),
        _ => {
            all.insert(core, now);
            let text = serde_json::to_string(&all).map_err(|err| wrong(err.to_string()))?;
            write_durably(record, &text).map_err(|err| wrong(err.to_string()))
        }
    }
}

/// In one step, and before the file is used: a power cut does not take the number back.
fn write_durably(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The rename itself is on disk once its folder is; not every platform opens a folder.
    match path.parent().map(fs::File::open) {
        Some(Ok(folder)) => folder.sync_all(),
        _ => Ok(()),
    }
}

/// SIGHUP, where there is one.
struct Hangups {
    #[cfg(unix)]
    signal: Option<tokio::signal::unix::Signal>,
}

impl Hangups {
    fn listen() -> Hangups {
        Hangups {
            #[cfg(unix)]
            signal: tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).ok(),
        }
    }

    /// Never comes where signals cannot be taken: the file is looked at all the same.
    async fn next(&mut self) {
        #[cfg(unix)]
        if let Some(signal) = &mut self.signal
            && signal.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{self, Signer};
    use crate::{Core, Member, MemberEntry, MemberRole};

    struct World {
        folder: tempfile::TempDir,
        signers: Vec<Signer>,
        file: ConsortiumFile,
    }

    impl World {
        fn new() -> World {
            let mut signers = Vec::new();
            let mut node = |name: &str| {
                let made = identity::generate(name).unwrap();
                let signer = Signer::new(&made).unwrap();
                let pin = signer.pin();
                signers.push(signer);
                Member {
                    name: name.into(),
                    pin,
                    address: "127.0.0.1:1".into(),
                    transport: Default::default(),
                }
            };
            let core = Core {
                name: "test".into(),
                ring_bits: 64,
                parties: [node("north"), node("west"), node("east")],
                dealer: node("notary"),
            };
            let world = World {
                folder: tempfile::tempdir().unwrap(),
                signers,
                file: ConsortiumFile::new(core, vec![entry("anna", 9)]),
            };
            world.write(|_| {});
            world
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("consortium.toml")
        }

        fn open(&self) -> Result<LiveConsortium, ConsortiumError> {
            LiveConsortium::open(&self.path(), &self.folder.path().join("record"))
        }

        /// Writes the file with a change, signed by all.
        fn write(&self, change: impl Fn(&mut ConsortiumFile)) {
            let mut file = self.file.clone();
            change(&mut file);
            for signer in &self.signers {
                file.sign(signer).unwrap();
            }
            fs::write(self.path(), file.to_toml()).unwrap();
        }
    }

    fn entry(name: &str, byte: u8) -> MemberEntry {
        MemberEntry::new(name, MemberRole::Hospital, Pin::from_bytes([byte; 32]))
    }

    fn refused(live: &LiveConsortium) -> String {
        match live.reload() {
            Reloaded::Refused(err) => err.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_newer_list_is_taken_and_an_older_one_never_again() {
        let world = World::new();
        let live = world.open().unwrap();
        assert!(matches!(live.reload(), Reloaded::Same));
        world.write(|file| {
            file.members_number = 3;
            file.members.push(entry("berta", 10));
        });
        match live.reload() {
            Reloaded::Taken(changes) => assert!(changes[0].contains("adds hospital berta")),
            other => panic!("{other:?}"),
        }
        assert_eq!(live.now().members.len(), 2);

        world.write(|file| file.members_number = 2);
        let text = refused(&live);
        assert!(
            text.contains("number 2") && text.contains("used number 3"),
            "{text}"
        );
        assert!(matches!(live.reload(), Reloaded::Same), "it is said once");
        assert_eq!(live.now().members.len(), 2);
        // Not after a restart either.
        let text = world.open().unwrap_err().to_string();
        assert!(text.contains("used number 3"), "{text}");

        world.write(|file| file.members_number = 3);
        let text = refused(&live);
        assert!(text.contains("raises the number"), "{text}");
        world.write(|file| file.members_number = 4);
        assert!(matches!(live.reload(), Reloaded::Taken(_)));
        assert_eq!(live.now().members.len(), 1);
        drop(world.open().unwrap());
    }

    #[test]
    fn another_core_a_signature_that_is_missing_and_a_damaged_file_leave_all_as_it_was() {
        let world = World::new();
        let live = world.open().unwrap();
        world.write(|file| {
            file.members_number = 2;
            file.core.ring_bits = 48;
        });
        let text = refused(&live);
        assert!(text.contains("another consortium"), "{text}");

        let mut file = world.file.clone();
        file.members_number = 2;
        world.signers[..2]
            .iter()
            .for_each(|signer| drop(file.sign(signer).unwrap()));
        fs::write(world.path(), file.to_toml()).unwrap();
        let text = refused(&live);
        assert!(text.contains("not signed by east, notary"), "{text}");
        fs::write(world.path(), &file.to_toml()[..100]).unwrap();
        assert!(refused(&live).contains("consortium.toml"));
        fs::remove_file(world.path()).unwrap();
        assert!(refused(&live).contains("consortium.toml"));
        assert_eq!(live.now().members_number, 1);

        // What was refused is not remembered as used.
        world.write(|file| file.members_number = 2);
        assert!(matches!(live.reload(), Reloaded::Taken(_)));
    }

    #[test]
    fn a_file_whose_record_could_not_be_written_is_looked_at_again() {
        let world = World::new();
        let live = world.open().unwrap();
        let [record, aside] = ["record", "aside"].map(|name| world.folder.path().join(name));
        // A folder in its place: as if the disk had failed.
        fs::rename(&record, &aside).unwrap();
        fs::create_dir(&record).unwrap();
        world.write(|file| file.members_number = 2);
        assert!(refused(&live).contains("record"));
        assert_eq!(live.now().members_number, 1);
        fs::remove_dir(&record).unwrap();
        fs::rename(&aside, &record).unwrap();
        // The file is the same as before.
        assert!(matches!(live.reload(), Reloaded::Taken(_)));
        assert_eq!(live.now().members_number, 2);
    }

    #[test]
    fn addresses_and_comments_change_under_the_same_number() {
        let world = World::new();
        let live = world.open().unwrap();
        world.write(|file| file.core.dealer.address = "elsewhere:7103".into());
        assert!(matches!(live.reload(), Reloaded::Taken(changes) if changes.is_empty()));
        assert_eq!(live.now().core.dealer.address, "elsewhere:7103");
    }

    #[test]
    fn a_damaged_record_is_no_reason_to_forget() {
        let world = World::new();
        fs::write(world.folder.path().join("record"), "{").unwrap();
        let text = world.open().unwrap_err().to_string();
        assert!(
            text.contains("damaged") && text.contains("record"),
            "{text}"
        );
    }
}
