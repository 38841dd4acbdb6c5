//! The audit log, `home/audit.log`: one JSON object a line, chained by SHA-256, flushed to the disk
//! before what it speaks of leaves the party. It is never begun anew.
//!
//! A line's hash is of all its text before the hash, the previous line's hash among it. A line that
//! is changed, removed or moved breaks the chain; lines cut off at the end do not, and neither does
//! a log that somebody writes anew as a whole: note the head (`trefoil audit verify`) elsewhere.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use trefoil_consortium::{JobId, SOFTWARE, hex};
use trefoil_transport::Pin;

use crate::files::{self, time_text};

/// The log's name in a home.
pub const AUDIT_FILE: &str = "audit.log";
/// Longest line.
const LINE_MAX_BYTES: usize = 1 << 20;
/// How long a party that ends may still hold the log.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const HASH_KEY: &str = ",\"hash\":\"";
const HASH_DIGITS: usize = 64;

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file system.
    #[error("audit log {path}: {source}")]
    File {
        /// The log.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Another process writes it.
    #[error("audit log {path}: another process uses it: is this party running already?")]
    Locked {
        /// The log.
        path: PathBuf,
    },
    /// A line that does not fit to the one before.
    #[error("audit log {path}: line {line}: {detail}")]
    Broken {
        /// The log.
        path: PathBuf,
        /// Its number, from 1.
        line: u64,
        /// What is wrong.
        detail: String,
    },
    /// It was asked for an entry that cannot be written.
    #[error("audit log {path}: {detail}")]
    Refused {
        /// The log.
        path: PathBuf,
        /// Why, and what to do.
        detail: String,
    },
}

/// A line without its hash.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    number: u64,
    time: String,
    what: String,
    /// Who did it or whom it concerns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    who: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pin: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    job: Option<String>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    details: Value,
    previous: String,
}

/// A log whose chain holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Its lines.
    pub entries: u64,
    /// Hash of the last one, 64 hexadecimal digits; zeros for an empty log.
    pub head: String,
    /// Bytes after the last whole line: a write that was cut short.
    pub torn_bytes: u64,
}

fn line_hash(body: &[u8]) -> String {
    let hash = Sha256::new()
        .chain_update(b"trefoil audit v1\0")
        .chain_update(body);
    hex(&hash.finalize())
}

/// Checks a log's chain. `on_head` hears the hash of every line.
///
/// # Errors
/// The first line that is changed, missing or out of order, by its number.
pub fn verify(path: &Path, on_head: &mut dyn FnMut(&str)) -> Result<Verified, AuditError> {
    let at = |source| AuditError::File {
        path: path.to_owned(),
        source,
    };
    read_chain(
        path,
        &mut BufReader::new(File::open(path).map_err(at)?),
        on_head,
    )
}

fn read_chain(
    path: &Path,
    reader: &mut dyn BufRead,
    on_head: &mut dyn FnMut(&str),
) -> Result<Verified, AuditError> {
    let mut verified = Verified {
        entries: 0,
        head: "0".repeat(HASH_DIGITS),
        torn_bytes: 0,
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = io::Read::take(&mut *reader, LINE_MAX_BYTES as u64 + 1);
        let read = limited.read_until(b'\n', &mut line);
        read.map_err(|source| AuditError::File {
            path: path.to_owned(),
            source,
        })?;
        let broken = |detail: String| AuditError::Broken {
            path: path.to_owned(),
            line: verified.entries + 1,
            detail,
        };
        if line.pop_if(|last| *last == b'\n').is_none() {
            if line.len() > LINE_MAX_BYTES {
                return Err(broken("it is too long for an entry".into()));
            }
            verified.torn_bytes = line.len() as u64;
            return Ok(verified);
        }
        verified.head = check_line(&line, verified.entries + 1, &verified.head).map_err(broken)?;
        verified.entries += 1;
        on_head(&verified.head);
    }
}

/// Checks one line; returns its hash.
fn check_line(line: &[u8], number: u64, previous: &str) -> Result<String, String> {
    let suffix = HASH_KEY.len() + HASH_DIGITS + "\"}".len();
    let body = line.len().checked_sub(suffix).map(|body| &line[..body]);
    let body = body.filter(|body| {
        let rest = &line[body.len()..];
        rest.starts_with(HASH_KEY.as_bytes()) && rest.ends_with(b"\"}")
    });
    let body = body.ok_or("it was changed: it does not end with its hash")?;
    let found = &line[body.len() + HASH_KEY.len()..line.len() - 2];
    let hash = line_hash(body);
    if found != hash.as_bytes() {
        return Err("it was changed: its text has another hash than it says".into());
    }
    let entry = [body, b"}"].concat();
    let entry: Entry = serde_json::from_slice(&entry).map_err(|err| format!("no entry: {err}"))?;
    if entry.number != number {
        return Err(format!(
            "it is entry {}, where {number} belongs: entries were removed or moved",
            entry.number
        ));
    }
    if entry.previous != previous {
        return Err(format!(
            "it follows another entry {} than this one",
            number - 1
        ));
    }
    Ok(hash)
}

/// The log of a running party.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    bytes: u64,
    entries: u64,
    head: String,
    /// Why no entry can be written any more.
    broken: Option<String>,
}

impl Audit {
    /// Opens the log of a home, or begins the first one; checks its chain and cuts off a last line
    /// that an earlier end of the process tore.
    pub(crate) fn open(home: &Path, party: &str) -> Result<Audit, AuditError> {
        let path = home.join(AUDIT_FILE);
        let at = |source| AuditError::File {
            path: path.clone(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&path).map_err(at)?;
        lock(&file, &path)?;
        let verified = read_chain(&path, &mut BufReader::new(&file), &mut |_| {});
        let verified = verified.map_err(|err| match err {
            AuditError::Broken { path, line, detail } => AuditError::Broken {
                path,
                line,
                detail: format!(
                    "{detail}. Find out who did it; put the log back from a copy, or keep this one elsewhere as evidence to begin another"
                ),
            },
            other => other,
        })?;
        let total = file.seek(SeekFrom::End(0)).map_err(at)?;
        let bytes = total - verified.torn_bytes;
        if verified.torn_bytes > 0 {
            file.set_len(bytes)
                .and_then(|()| file.sync_all())
                .map_err(at)?;
        }
        let audit = Audit {
            path: path.clone(),
            inner: Mutex::new(Inner {
                file,
                bytes,
                entries: verified.entries,
                head: verified.head,
                broken: None,
            }),
        };
        if verified.entries == 0 {
            files::sync_folder(home).map_err(|err| AuditError::Refused {
                path: path.clone(),
                detail: err.to_string(),
            })?;
            audit.append("log_begun", None, None, json!({"party": party}))?;
        }
        if verified.torn_bytes > 0 {
            let torn_bytes = verified.torn_bytes;
            tracing::warn!(path = %path.display(), torn_bytes, "repaired the audit log: its last line was torn");
            audit.append(
                "log_repaired",
                None,
                None,
                json!({"torn_bytes": torn_bytes}),
            )?;
        }
        audit.append(
            "party_started",
            None,
            None,
            json!({"party": party, "software": SOFTWARE}),
        )?;
        Ok(audit)
    }

    /// Appends an entry; it is on the disk when this returns.
    ///
    /// # Errors
    /// It is not: what it speaks of must not happen.
    pub(crate) fn append(
        &self,
        what: &str,
        who: Option<(&str, Pin)>,
        job: Option<JobId>,
        details: Value,
    ) -> Result<(), AuditError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = |detail: String| AuditError::Refused {
            path: self.path.clone(),
            detail,
        };
        if let Some(reason) = &inner.broken {
            return Err(refused(format!(
                "{reason}; restart the party when that is mended"
            )));
        }
        let entry = Entry {
            number: inner.entries + 1,
            time: time_text(files::now_s()),
            what: what.into(),
            who: who.map(|(name, _)| name.to_owned()),
            pin: who.map(|(_, pin)| pin.to_string()),
            job: job.map(|job| job.to_string()),
            details,
            previous: inner.head.clone(),
        };
        let mut line = serde_json::to_vec(&entry).map_err(|err| refused(err.to_string()))?;
        // The closing brace comes after the hash.
        line.pop();
        let hash = line_hash(&line);
        line.extend_from_slice(format!("{HASH_KEY}{hash}\"}}\n").as_bytes());
        if line.len() > LINE_MAX_BYTES {
            return Err(refused(format!(
                "an entry of {} bytes is too long",
                line.len()
            )));
        }
        if let Err(source) = inner.file.write_all(&line) {
            let bytes = inner.bytes;
            // A disk that was full may have room again, if no half of the line stays.
            if let Err(err) = inner.file.set_len(bytes) {
                inner.broken = Some(format!("half an entry could not be removed: {err}"));
            }
            let path = self.path.clone();
            return Err(AuditError::File { path, source });
        }
        if let Err(source) = inner.file.sync_data() {
            // What is on the disk now, nobody knows.
            inner.broken = Some(format!("an entry could not be flushed: {source}"));
            let path = self.path.clone();
            return Err(AuditError::File { path, source });
        }
        inner.bytes += line.len() as u64;
        inner.entries += 1;
        inner.head = hash;
        Ok(())
    }
}

/// Takes the log for this process; a party that is just ending may hold it for a moment.
fn lock(file: &File, path: &Path) -> Result<(), AuditError> {
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_WAIT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(TryLockError::WouldBlock) => {
                let path = path.to_owned();
                return Err(AuditError::Locked { path });
            }
            Err(TryLockError::Error(source)) => {
                let path = path.to_owned();
                return Err(AuditError::File { path, source });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(home: &Path) -> Vec<Vec<u8>> {
        let audit = Audit::open(home, "P1 (west)").unwrap();
        for rows in 0..4 {
            let who = Some(("st-anna", Pin::from_bytes([1; 32])));
            let job = Some(JobId([rows; 32]));
            let details = json!({"rows": rows, "outputs": ["class \"0\", \\ and more"]});
            audit.append("outputs_revealed", who, job, details).unwrap();
        }
        let text = std::fs::read(home.join(AUDIT_FILE)).unwrap();
        text.split_inclusive(|byte| *byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect()
    }

    fn check(lines: &[Vec<u8>]) -> Result<Verified, String> {
        let text = lines.concat();
        let read = read_chain(Path::new("audit.log"), &mut &text[..], &mut |_| {});
        read.map_err(|err| err.to_string())
    }

    #[test]
    fn a_log_is_read_as_written_goes_on_after_a_restart_and_is_locked_meanwhile() {
        let home = tempfile::tempdir().unwrap();
        let lines = written(home.path());
        assert_eq!(lines.len(), 6, "begun, started and four entries");
        let first = check(&lines).unwrap();
        assert_eq!((first.entries, first.torn_bytes), (6, 0));
        let audit = Audit::open(home.path(), "P1").unwrap();
        let mut heads = Vec::new();
        let path = home.path().join(AUDIT_FILE);
        let second = verify(&path, &mut |head| heads.push(head.to_owned())).unwrap();
        assert_eq!(second.entries, 7, "started again, begun once");
        assert!(heads.contains(&first.head) && heads.last() == Some(&second.head));
        let other = File::open(&path).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(audit);
        other.try_lock().unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn every_changed_byte_removed_line_and_moved_line_is_named() {
        let home = tempfile::tempdir().unwrap();
        let lines = written(home.path());
        for at in 0..lines.len() {
            for byte in 0..lines[at].len() - 1 {
                let mut bad = lines.clone();
                bad[at][byte] ^= 1;
                let err = check(&bad).unwrap_err();
                assert!(
                    err.contains(&format!("line {}:", at + 1)),
                    "{at} {byte}: {err}"
                );
            }
            if at + 1 < lines.len() {
                let mut bad = lines.clone();
                bad.remove(at);
                let err = check(&bad).unwrap_err();
                assert!(
                    err.contains(&format!("line {}: it is entry {}", at + 1, at + 2)),
                    "{err}"
                );
                let mut bad = lines.clone();
                bad.swap(at, at + 1);
                let err = check(&bad).unwrap_err();
                assert!(err.contains(&format!("line {}:", at + 1)), "{err}");
            }
        }
        // A line with a right hash and number, from another log.
        let other = tempfile::tempdir().unwrap();
        Audit::open(other.path(), "P2 (east)").unwrap();
        let mut bad = lines.clone();
        bad[1] = std::fs::read(other.path().join(AUDIT_FILE)).unwrap();
        let second = bad[1].iter().position(|byte| *byte == b'\n').unwrap() + 1;
        bad[1].drain(..second);
        let err = check(&bad).unwrap_err();
        assert!(err.contains("line 2: it follows another entry"), "{err}");
    }

    #[test]
    fn a_log_torn_at_any_byte_of_its_last_line_is_repaired_and_says_so() {
        let home = tempfile::tempdir().unwrap();
        let lines = written(home.path());
        let path = home.path().join(AUDIT_FILE);
        let whole = lines[..5].concat();
        for kept in 1..lines[5].len() {
            let torn = [&whole[..], &lines[5][..kept]].concat();
            std::fs::write(&path, &torn).unwrap();
            drop(Audit::open(home.path(), "P1").unwrap());
            assert_eq!(verify(&path, &mut |_| {}).unwrap().entries, 7);
            let text = std::fs::read_to_string(&path).unwrap();
            let repaired = text.lines().nth(5).unwrap();
            let expected =
                format!("\"what\":\"log_repaired\",\"details\":{{\"torn_bytes\":{kept}}}");
            assert!(repaired.contains(&expected), "{repaired}");
        }
    }

    #[test]
    fn a_party_does_not_go_on_with_a_broken_log() {
        let home = tempfile::tempdir().unwrap();
        let mut lines = written(home.path());
        lines.remove(2);
        std::fs::write(home.path().join(AUDIT_FILE), lines.concat()).unwrap();
        let err = Audit::open(home.path(), "P1").unwrap_err().to_string();
        assert!(
            err.contains("line 3:") && err.contains("from a copy"),
            "{err}"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_entry_that_cannot_be_written_is_an_error() {
        let file = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let audit = Audit {
            path: "/dev/full".into(),
            inner: Mutex::new(Inner {
                file,
                bytes: 0,
                entries: 0,
                head: "0".repeat(HASH_DIGITS),
                broken: None,
            }),
        };
        for _ in 0..2 {
            let err = audit
                .append("job_started", None, None, Value::Null)
                .unwrap_err();
            assert!(err.to_string().contains("/dev/full"), "{err}");
        }
    }
}
