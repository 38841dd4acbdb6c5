//! Small files of a party's home that are no shares: written whole or not at all, mode 0600; and
//! the clock that they speak of.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A file of a party's home that cannot be read or written, or holds something else.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The content.
    #[error("{path}: {detail}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> FileError + '_ {
    |source| FileError::File {
        path: path.to_owned(),
        source,
    }
}

/// Makes a folder that only this user may read.
pub(crate) fn make_folder(path: &Path) -> Result<(), FileError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(at(path))
}

/// Writes a file whole: temporary name, flush, rename. Nobody else writes to `path` meanwhile.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let temporary = path.with_extension("tmp");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(at(&temporary))?;
    fs::rename(&temporary, path).map_err(at(path))?;
    sync_folder(path.parent().unwrap_or(path))
}

/// Makes what happened to names in a folder durable, where the platform can.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), FileError> {
    if cfg!(unix) {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(at(folder))?;
    }
    Ok(())
}

/// Reads a file of at most `max_bytes`; `None` where there is none.
pub(crate) fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(at(path)(err)),
    };
    let mut bytes = Vec::new();
    let read = file.take(max_bytes + 1).read_to_end(&mut bytes);
    read.map_err(at(path))?;
    if bytes.len() as u64 > max_bytes {
        return Err(FileError::Content {
            path: path.to_owned(),
            detail: format!("longer than the {max_bytes} bytes that are possible"),
        });
    }
    Ok(Some(bytes))
}

/// The files with the extension `json` in a folder, sorted; none where there is no folder.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>, FileError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(at(folder)(err)),
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(at(folder))?;
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "json"));
    paths.sort();
    Ok(paths)
}

/// Seconds since 1970, UTC; 0 where the clock is earlier.
pub fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// A time of [`now_s`] as in RFC 3339: `2026-01-31T23:59:59Z`.
pub fn time_text(seconds: u64) -> String {
    // Days to civil dates, in eras of 400 years that begin in March (Hinnant, "chrono-compatible
    // low-level date algorithms").
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3_600,
        rest / 60 % 60,
        rest % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_the_calendar_has_them() {
        // From `date -u -d @SECONDS +%FT%TZ`.
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(time_text(seconds), text);
        }
    }

    #[test]
    fn a_file_is_replaced_whole_and_a_long_one_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        assert_eq!(read(&path, 10).unwrap(), None);
        write(&path, b"first").unwrap();
        write(&path, b"second").unwrap();
        assert_eq!(read(&path, 6).unwrap().as_deref(), Some(&b"second"[..]));
        assert!(read(&path, 5).is_err());
        assert_eq!(list(folder.path()).unwrap(), [path]);
    }
}
