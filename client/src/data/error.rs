//! What can be wrong with data: every variant names the file, and as far as
//! they are known the field and row, what was expected and what was found.

use std::path::Path;

/// An error of reading, checking, splitting or converting data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system would not read it.
    #[error("{file}: cannot be read: {reason}")]
    Read {
        /// The file or folder.
        file: String,
        /// The system's words.
        reason: String,
    },
    /// A container (gzip, zip, npy, csv) or picture that does not decode.
    #[error("{file}: corrupt: {reason}")]
    Corrupt {
        /// The file, with the member of the archive where there is one.
        file: String,
        /// What the decoder met.
        reason: String,
    },
    /// A value of the file that is not what it has to be.
    #[error("{file}: {field}: expected {expected}, found {found}")]
    Field {
        /// The file, with the member of the archive where there is one.
        file: String,
        /// Which value.
        field: String,
        /// What it has to be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// One row of a field that is not what it has to be; rows count from 0.
    #[error("{file}: {field}, row {row}: expected {expected}, found {found}")]
    Row {
        /// The file, with the member of the archive where there is one.
        file: String,
        /// Which column or array.
        field: String,
        /// Which row, from 0.
        row: usize,
        /// What it has to be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A table of labels with problems, each with its line.
    #[error("{file}: {count} problem(s):\n  {}", .lines.join("\n  "))]
    Table {
        /// The table's file.
        file: String,
        /// How many problems there are; `lines` holds the first of them.
        count: usize,
        /// "line 7: ...", at most twenty.
        lines: Vec<String>,
    },
    /// A data set that is nowhere to be found.
    #[error("{set}: not found (looked at {}); {help}", .tried.join(", "))]
    Absent {
        /// The data set's name.
        set: String,
        /// Where it was looked for.
        tried: Vec<String>,
        /// What to do about it.
        help: String,
    },
    /// A setting of the experiment that cannot be carried out.
    #[error("{setting}: expected {expected}, found {found}")]
    Setting {
        /// The setting's name.
        setting: String,
        /// What it has to be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl DataError {
    pub(super) fn read(file: &Path, error: &std::io::Error) -> DataError {
        DataError::Read {
            file: file.display().to_string(),
            reason: error.to_string(),
        }
    }

    pub(super) fn corrupt(file: &str, reason: impl ToString) -> DataError {
        DataError::Corrupt {
            file: file.to_owned(),
            reason: reason.to_string(),
        }
    }

    pub(super) fn field(
        file: &str,
        field: &str,
        expected: impl ToString,
        found: impl ToString,
    ) -> DataError {
        DataError::Field {
            file: file.to_owned(),
            field: field.to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    pub(super) fn setting(
        setting: &str,
        expected: impl ToString,
        found: impl ToString,
    ) -> DataError {
        DataError::Setting {
            setting: setting.to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}
