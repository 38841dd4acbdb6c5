//! Tables of rows over committed chunks. All three parties order contributions alike, so a row's
//! number means the same everywhere. Rows are read when a step needs them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use trefoil_consortium::{Part, Words};
use trefoil_models::schedule::{
    PADDING_ROW, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, UPLOAD_IMAGES,
};
use trefoil_transport::Pin;

use super::vault::{Sealed, Vault};
use super::{Entry, StoreError, staging};

/// Files that are open at the same time, at most; further ones are opened for each read.
const OPEN_MAX: usize = 256;

/// The tables that one job reads.
#[derive(Debug)]
pub(crate) struct Tables {
    vault: Arc<Vault>,
    files: Vec<Piece>,
    tables: BTreeMap<&'static str, Table>,
    /// Hospital and upload number of each contribution to a data set in them.
    contributions: Vec<(Pin, u64)>,
    /// What is read stays where it is as long as this is held.
    _reads: Arc<()>,
}

#[derive(Debug)]
struct Piece {
    path: PathBuf,
    file: Option<Sealed>,
}

#[derive(Debug, Default)]
struct Table {
    row_words: usize,
    rows: usize,
    /// Where runs of rows lie, by their first row.
    runs: Vec<Run>,
}

#[derive(Debug)]
struct Run {
    first: usize,
    rows: usize,
    file: usize,
    offset: u64,
}

impl Tables {
    /// No table.
    pub(super) fn new(vault: Arc<Vault>, reads: Arc<()>) -> Tables {
        Tables {
            vault,
            files: Vec::new(),
            contributions: Vec::new(),
            tables: BTreeMap::new(),
            _reads: reads,
        }
    }

    /// Adds a contribution's rows, which lie in these files, at the end of its tables.
    pub(super) fn append(&mut self, entry: &Entry, chunks: &[PathBuf]) -> Result<(), StoreError> {
        let (images, labels) = match entry.contribution.part {
            Part::Train => (TRAIN_IMAGES, Some(TRAIN_LABELS)),
            Part::Test => (TEST_IMAGES, Some(TEST_LABELS)),
            Part::Predict => (UPLOAD_IMAGES, None),
        };
        let contribution = &entry.contribution;
        if contribution.part != Part::Predict {
            let key = (contribution.hospital, contribution.number);
            self.contributions.push(key);
        }
        let image_words = entry.schema.image_words().unwrap_or(0);
        let classes = entry.schema.classes as usize;
        for (chunk, path) in entry.chunks.iter().zip(chunks) {
            let path = path.clone();
            let rows = chunk.rows as usize;
            let expected = staging::chunk_bytes(&entry.schema, chunk.rows);
            let mut file = self.vault.open_file(&path, staging::CHUNK_FILE_MAX_BYTES)?;
            let length = file.length();
            if length != expected {
                let detail = format!("expected a chunk of {expected} bytes, found {length}");
                return Err(StoreError::Damaged { path, detail });
            }
            // The digest that this party signed covers more than a file's own tags: a chunk under
            // another one's name would pass those.
            if file.digest()? != chunk.digest {
                let detail = "holds other shares than its receipt says: the file is damaged".into();
                return Err(StoreError::Damaged { path, detail });
            }
            let index = self.files.len();
            let mut add = |name, row_words, offset| {
                let table: &mut Table = self.tables.entry(name).or_default();
                table.row_words = row_words;
                table.runs.push(Run {
                    first: table.rows,
                    rows,
                    file: index,
                    offset,
                });
                table.rows += rows;
            };
            add(images, image_words, 0);
            if let Some(labels) = labels {
                add(labels, classes, 8 * (rows * image_words) as u64);
            }
            self.files.push(Piece {
                path,
                file: (index < OPEN_MAX).then_some(file),
            });
        }
        Ok(())
    }

    /// Hospital and upload number of each contribution to a data set that can be read here.
    pub(crate) fn contributions(&self) -> &[(Pin, u64)] {
        &self.contributions
    }

    /// Words of a table's rows, and their number.
    pub(crate) fn size(&self, table: &str) -> Option<(usize, usize)> {
        self.tables
            .get(table)
            .map(|table| (table.row_words, table.rows))
    }

    /// The named rows of a table, one after the other; padding rows are zeros.
    pub(crate) fn gather(&mut self, table: &str, rows: &[u32]) -> Result<Vec<u64>, StoreError> {
        let found = self.tables.get(table);
        let found =
            found.ok_or_else(|| StoreError::Refused(format!("there are no rows of {table}")))?;
        let mut out = Vec::with_capacity(rows.len() * found.row_words);
        let mut buffer = vec![0; 8 * found.row_words];
        for row in rows {
            if *row == PADDING_ROW {
                out.resize(out.len() + found.row_words, 0);
                continue;
            }
            let row = *row as usize;
            let run = found
                .runs
                .partition_point(|run| run.first <= row)
                .checked_sub(1)
                .map(|at| &found.runs[at]);
            let run = run.filter(|run| row < run.first + run.rows);
            let run = run.ok_or_else(|| {
                StoreError::Refused(format!(
                    "{table} has {} rows, row {row} is not among them",
                    found.rows
                ))
            })?;
            let piece = &mut self.files[run.file];
            let mut opened;
            let file = match &mut piece.file {
                Some(file) => file,
                None => {
                    let max_bytes = staging::CHUNK_FILE_MAX_BYTES;
                    opened = self.vault.open_file(&piece.path, max_bytes)?;
                    &mut opened
                }
            };
            let offset = run.offset + (8 * found.row_words * (row - run.first)) as u64;
            file.read_at(offset, &mut buffer)?;
            out.extend(Words::from_bytes(&buffer).unwrap_or_default());
        }
        Ok(out)
    }
}
