//! What a member's home remembers of its jobs and uploads, so that another process goes on with
//! them: `jobs/ID` and `uploads/...`, a JSON file each, for this user alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_consortium::wire::Withdrawal;
use trefoil_consortium::{JobDescription, hex};

use super::{replace, write_new};
use crate::data::Preprocess;
use crate::remote::{Part, PendingUpload};

/// Longest record that is read: a job and the names of many pictures.
const RECORD_MAX_BYTES: u64 = 1 << 30;
/// Fewest digits by which a job may be named.
const PREFIX_MIN: usize = 8;

/// A job that this member submitted, and what its result is shown with.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was submitted.
    pub job: JobDescription,
    /// How its result is shown.
    pub show: Show,
}

/// How a result is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Show {
    /// The classes' names in order.
    pub class_names: Vec<String>,
    /// A name for each image of a prediction.
    pub images: Vec<String>,
    /// Where the table or the weights go; standard output without it.
    pub to: Option<PathBuf>,
    /// Names of the hospitals that a job's figures are of, by public key in hexadecimal.
    #[serde(default)]
    pub hospitals: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// Canonical bytes, hexadecimal: decimal fractions must come back to the last bit.
    job: String,
    show: Show,
}

/// A record's text.
pub fn read(path: &Path) -> Result<String> {
    let failed = || format!("cannot read {}", path.display());
    if std::fs::metadata(path).with_context(failed)?.len() > RECORD_MAX_BYTES {
        bail!("{} is too long for a record", path.display());
    }
    std::fs::read_to_string(path).with_context(failed)
}

/// Makes a folder of the home.
pub fn make_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))
}

impl Record {
    fn path(&self, home: &Path) -> PathBuf {
        home.join("jobs").join(self.job.id().to_string())
    }

    /// Writes the record.
    pub fn save(&self, home: &Path) -> Result<()> {
        make_folder(&home.join("jobs"))?;
        let stored = Stored {
            job: hex(&self.job.to_bytes()),
            show: self.show.clone(),
        };
        write_new(&self.path(home), &serde_json::to_vec(&stored)?, true)
    }

    /// Removes the record of a job that no party has taken.
    pub fn forget(&self, home: &Path) {
        // A record too many does no harm.
        let _ = std::fs::remove_file(self.path(home));
    }

    /// Finds a job by the first digits of its hash.
    pub fn find(home: &Path, prefix: &str) -> Result<Record> {
        let digits = prefix.len() >= PREFIX_MIN && prefix.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits {
            bail!("{prefix:?} is no job: give at least {PREFIX_MIN} digits of its hash");
        }
        let folder = home.join("jobs");
        let mut found = Vec::new();
        if folder.is_dir() {
            let failed = || format!("cannot read {}", folder.display());
            for entry in std::fs::read_dir(&folder).with_context(failed)? {
                let path = entry.with_context(failed)?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if name.starts_with(&prefix.to_ascii_lowercase()) {
                    found.push(path);
                }
            }
        }
        let [path] = found.as_slice() else {
            bail!(
                "{} jobs in {} begin with {prefix}; a job is watched where it was submitted",
                found.len(),
                folder.display()
            );
        };
        let place = || format!("{}: not a record of a job", path.display());
        let stored: Stored = serde_json::from_str(&read(path)?).with_context(place)?;
        let job = unhex(&stored.job)
            .and_then(|bytes| postcard::from_bytes::<JobDescription>(&bytes).ok())
            .with_context(place)?;
        Ok(Record {
            job,
            show: stored.show,
        })
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let value = |digit: u8| char::from(digit).to_digit(16);
    let pair = |pair: &[u8]| Some((16 * value(pair[0])? + value(pair[1])?) as u8);
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks_exact(2).map(pair).collect())?
}

/// An upload to a data set: under way, or complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UploadRecord {
    /// Its random name.
    pub upload: String,
    /// Its number among this member's uploads to the data set.
    pub number: u64,
    /// Whether all three parties have committed it.
    pub complete: bool,
}

/// Where an upload of these very rows is remembered. The name depends on the rows, on how they are
/// normalised, on where they go and on the consortium.
pub fn upload_path(
    home: &Path,
    core_hash: [u8; 32],
    (dataset, part): (&str, Part),
    rows: [u8; 32],
    (preprocess, frac_bits): (&Preprocess, u8),
) -> PathBuf {
    let mut hash = Sha256::new().chain_update(b"trefoil upload record v2\0");
    hash.update(core_hash);
    hash.update((dataset.len() as u64).to_le_bytes());
    hash.update(dataset);
    hash.update(part.to_string());
    hash.update(rows);
    hash.update(preprocess.mean.to_le_bytes());
    hash.update(preprocess.std.to_le_bytes());
    hash.update([frac_bits]);
    let name = format!("{dataset}-{part}-{}", hex(&hash.finalize()[..8]));
    home.join("uploads").join(name)
}

/// Forgets uploads that were withdrawn: their rows may be shared again.
pub fn forget_uploads(home: &Path, dataset: &str, what: Withdrawal) -> Result<()> {
    let folder = home.join("uploads");
    if !folder.is_dir() {
        return Ok(());
    }
    let failed = || format!("cannot read {}", folder.display());
    for entry in std::fs::read_dir(&folder).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A data set's name may have hyphens, part and hash have none.
        let mut parts = name.rsplitn(3, '-');
        let of_it = parts.nth(2) == Some(dataset);
        let record = UploadRecord::load(&path).ok().flatten().filter(|_| of_it);
        if record.is_some_and(|record| what.covers(record.number)) {
            std::fs::remove_file(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

impl UploadRecord {
    /// An upload that begins.
    pub fn begun(pending: &PendingUpload) -> UploadRecord {
        UploadRecord {
            upload: hex(&pending.upload),
            number: pending.number,
            complete: false,
        }
    }

    /// What the record says; `None` where there is none.
    pub fn load(path: &Path) -> Result<Option<UploadRecord>> {
        if path.symlink_metadata().is_err() {
            return Ok(None);
        }
        let record = serde_json::from_str(&read(path)?);
        record
            .map(Some)
            .with_context(|| format!("{}: not a record of an upload", path.display()))
    }

    /// Writes the record over an older one.
    pub fn save(&self, path: &Path) -> Result<()> {
        make_folder(path.parent().unwrap_or(Path::new(".")))?;
        replace(path, &serde_json::to_vec(self)?, true)
    }

    /// What [`crate::remote::Remote::resume`] needs.
    pub fn pending(&self) -> Result<PendingUpload> {
        let upload = unhex(&self.upload).and_then(|bytes| bytes.try_into().ok());
        Ok(PendingUpload {
            upload: upload.with_context(|| format!("{:?} is no upload's name", self.upload))?,
            number: self.number,
        })
    }
}

/// How messages call a part.
pub fn part_name(part: Part) -> &'static str {
    match part {
        Part::Train => "training",
        Part::Test => "test",
        Part::Predict => "prediction",
    }
}

#[cfg(test)]
mod tests {
    use trefoil_models::job::{DatasetRef, JobKind, TrainSpec};
    use trefoil_transport::Pin;

    use super::*;

    fn record() -> Record {
        let kind = JobKind::Train {
            network: "name = \"mlp\"".into(),
            spec: TrainSpec {
                learning_rate: 0.1 + 0.2,
                ..TrainSpec::default()
            },
            dataset: DatasetRef {
                name: "digits".into(),
                train_rows: 10,
                test_rows: 2,
                snapshot: [7; 32],
            },
            evaluate_each_epoch: true,
            save_as: "m".into(),
            reveal_weights: false,
        };
        Record {
            job: JobDescription::new("train", Pin::from_bytes([1; 32]), kind).unwrap(),
            show: Show {
                class_names: vec!["ill".into()],
                ..Show::default()
            },
        }
    }

    #[test]
    fn a_job_is_found_by_its_first_digits_as_it_was_submitted() {
        let home = tempfile::tempdir().unwrap();
        let record = record();
        record.save(home.path()).unwrap();
        let id = record.job.id().to_string();
        let found = Record::find(home.path(), &id[..12].to_uppercase()).unwrap();
        assert_eq!(found.job, record.job);
        assert_eq!(found.job.id(), record.job.id());
        assert_eq!(found.show, record.show);
        for wrong in ["", "12", "zzzzzzzzzz", "../../../etc"] {
            assert!(Record::find(home.path(), wrong).is_err(), "{wrong}");
        }
        record.forget(home.path());
        let err = Record::find(home.path(), &id).unwrap_err().to_string();
        assert!(err.contains("0 jobs"), "{err}");
    }

    #[test]
    fn an_upload_is_remembered_by_its_rows() {
        let home = tempfile::tempdir().unwrap();
        let place = |word, part| {
            let numbers = (&Preprocess::DIGITS, 16);
            upload_path(home.path(), [3; 32], ("digits", part), [word; 32], numbers)
        };
        let path = place(1, Part::Train);
        assert_ne!(path, place(2, Part::Train));
        assert_ne!(path, place(1, Part::Test));
        assert_eq!(UploadRecord::load(&path).unwrap(), None);
        let pending = PendingUpload {
            upload: [0xa5; 16],
            number: 4,
        };
        let mut record = UploadRecord::begun(&pending);
        record.save(&path).unwrap();
        record.complete = true;
        record.save(&path).unwrap();
        let read = UploadRecord::load(&path).unwrap().unwrap();
        assert_eq!(read, record);
        assert_eq!(read.pending().unwrap(), pending);
        for (dataset, what) in [
            ("other", Withdrawal::Below(9)),
            ("digits", Withdrawal::One(3)),
            ("digits", Withdrawal::Below(4)),
        ] {
            forget_uploads(home.path(), dataset, what).unwrap();
            assert!(path.exists(), "{dataset} {what:?}");
        }
        forget_uploads(home.path(), "digits", Withdrawal::One(4)).unwrap();
        assert!(!path.exists());
    }
}
