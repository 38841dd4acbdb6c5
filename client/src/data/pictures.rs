//! Pictures of a list: read, compared and decoded in one pass, or read again when their turn comes.
//!
//! A pass works on a few pictures at a time, on all cores, and keeps nothing of them but a digest:
//! memory does not depend on how many there are. All problems are collected: a picture left out
//! silently would be a row nobody misses. `folder.rs` and `table.rs` make the list.

use std::collections::HashMap;
use std::num::NonZero;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;

use ndarray::Array4;
use sha2::{Digest, Sha256};

use super::picture::{self, Picture};
use super::split::Part;
use super::{DataError, Parts, Want, limits};

/// How many problems are reported; the rest is only counted.
const MAX_REPORTED: usize = 20;
/// Pictures that are worked on between two reports of progress, for each thread.
const AT_A_TIME: usize = 8;
/// Most threads: each holds a picture as it was stored.
const THREADS_MAX: usize = 8;

/// One picture of a list.
#[derive(Debug)]
pub(super) struct Entry {
    pub path: PathBuf,
    pub class: u8,
    pub part: Part,
    /// Its line in a table of labels; 0 without one.
    pub line: u64,
}

impl Entry {
    fn name(&self) -> String {
        match self.line {
            0 => self.path.display().to_string(),
            line => format!("line {line}: {}", self.path.display()),
        }
    }
}

/// What is wrong with a list, each with its place.
#[derive(Clone, Debug, Default)]
pub(super) struct Problems {
    count: usize,
    lines: Vec<(u64, String)>,
}

impl Problems {
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a problem of a line of the table.
    pub(super) fn add(&mut self, line: u64, problem: impl AsRef<str>) {
        self.push(line, format!("line {line}: {}", problem.as_ref()));
    }

    fn push(&mut self, line: u64, text: String) {
        self.count += 1;
        if self.lines.len() < MAX_REPORTED {
            self.lines.push((line, text));
        }
    }

    /// An error that lists them, where there are any.
    pub(super) fn check(mut self, file: &str) -> Result<(), DataError> {
        if self.count == 0 {
            return Ok(());
        }
        self.lines.sort_by_key(|(line, _)| *line);
        Err(DataError::Table {
            file: file.to_owned(),
            count: self.count,
            lines: self.lines.into_iter().map(|(_, text)| text).collect(),
        })
    }
}

/// A list of pictures that have not been read yet.
#[derive(Debug)]
pub(super) struct Pictures {
    /// The folder.
    pub name: String,
    /// What problems are said of: the table of labels, else the folder.
    pub place: String,
    pub entries: Vec<Entry>,
    /// With shape and classes' names.
    pub want: Want,
    pub shape: [usize; 3],
    /// What is wrong with the list itself.
    pub problems: Problems,
    /// Of each file, once all have been read.
    digests: OnceLock<Vec<[u8; 32]>>,
}

impl Pictures {
    pub(super) fn new(
        name: String,
        place: String,
        entries: Vec<Entry>,
        want: Want,
        problems: Problems,
    ) -> Result<Pictures, DataError> {
        Ok(Pictures {
            name,
            place,
            entries,
            shape: shape(&want)?,
            want,
            problems,
            digests: OnceLock::new(),
        })
    }

    /// Entries of a part.
    pub(super) fn of(&self, part: Part) -> Vec<usize> {
        let all = 0..self.entries.len();
        all.filter(|at| self.entries[*at].part == part).collect()
    }

    /// Reads every file, compares it with all others, and decodes those that are `wanted`: `take`
    /// has them in order. `progress` hears how many files are done. An error lists all problems.
    pub(super) fn walk(
        &self,
        wanted: &(dyn Fn(usize) -> bool + Sync),
        progress: &mut dyn FnMut(usize),
        take: &mut dyn FnMut(usize, Picture),
    ) -> Result<(), DataError> {
        let mut problems = self.problems.clone();
        let mut digests = Vec::with_capacity(self.entries.len());
        let mut seen: HashMap<[u8; 32], usize> = HashMap::new();
        let step = AT_A_TIME * threads();
        for start in (0..self.entries.len()).step_by(step) {
            let batch = start..self.entries.len().min(start + step);
            let read = in_parallel(batch.clone(), |at| self.examine(at, wanted(at)));
            for (at, examined) in batch.clone().zip(read) {
                let entry = &self.entries[at];
                let mut problem =
                    |what| problems.push(entry.line, format!("{}{what}", entry.name()));
                match examined {
                    Err(reason) => {
                        problem(reason);
                        digests.push([0; 32]);
                    }
                    Ok((digest, picture)) => {
                        digests.push(digest);
                        if let Some(&first) = seen.get(&digest) {
                            let first = &self.entries[first];
                            problem(format!(" is the same picture as {}", first.name()));
                        } else {
                            seen.insert(digest, at);
                        }
                        if let Some(picture) = picture {
                            take(at, picture);
                        }
                    }
                }
            }
            progress(batch.end);
        }
        problems.check(&self.place)?;
        // A second pass finds the same, or an error.
        let _ = self.digests.set(digests);
        Ok(())
    }

    /// The digest of a file, and its pixels where they are wanted.
    fn examine(&self, at: usize, wanted: bool) -> Result<([u8; 32], Option<Picture>), String> {
        let content = picture::read(&self.entries[at].path).map_err(|err| missing(&err))?;
        let digest = Sha256::digest(&content).into();
        let decoded = wanted.then(|| picture::decode(&content, self.shape, self.want.crop));
        let decoded = decoded.transpose().map_err(|reason| unusable(&reason))?;
        Ok((digest, decoded))
    }

    /// The pixels of some entries, one after the other. They have to be what [`Pictures::walk`] has
    /// seen.
    pub(super) fn read(&self, entries: &[usize]) -> Result<Vec<u8>, DataError> {
        let mut pixels = Vec::with_capacity(entries.len() * self.shape.iter().product::<usize>());
        for batch in entries.chunks(AT_A_TIME * threads()) {
            let read = in_parallel(0..batch.len(), |at| self.again(batch[at]));
            for picture in read {
                pixels.extend(picture?.pixels);
            }
        }
        Ok(pixels)
    }

    fn again(&self, at: usize) -> Result<Picture, DataError> {
        let path = &self.entries[at].path;
        let name = path.display().to_string();
        let content = picture::read(path)?;
        let known = self.digests.get().map(|digests| digests[at]);
        if known.is_some_and(|known| known != <[u8; 32]>::from(Sha256::digest(&content))) {
            let expected = "the picture that was checked a moment ago";
            return Err(DataError::field(&name, "content", expected, "another one"));
        }
        let decoded = picture::decode(&content, self.shape, self.want.crop);
        decoded.map_err(|reason| DataError::corrupt(&name, reason))
    }

    /// All pictures of some parts, in memory; `None` for a part without any.
    pub(super) fn load(&self, parts: &[Part]) -> Result<Vec<Option<Parts>>, DataError> {
        let [channels, height, width] = self.shape;
        let mut all: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for part in parts {
            let count = self.of(*part).len().max(1);
            limits::check(&self.name, &[count, channels, height, width])?;
            all.push(Default::default());
        }
        let place = |at: usize| {
            let part = self.entries[at].part;
            parts.iter().position(|wanted| *wanted == part)
        };
        let wanted = |at| place(at).is_some();
        self.walk(&wanted, &mut |_| {}, &mut |at, picture| {
            if let Some(part) = place(at) {
                all[part].0.extend(picture.pixels);
                all[part].1.push(self.entries[at].class);
            }
        })?;
        let parts = all.into_iter().map(|(pixels, labels)| {
            if labels.is_empty() {
                return Ok(None);
            }
            let dims = (labels.len(), channels, height, width);
            let images = Array4::from_shape_vec(dims, pixels)
                .map_err(|error| DataError::corrupt(&self.name, error))?;
            Ok(Some(Parts {
                images,
                labels,
                labels_name: self.name.clone(),
            }))
        });
        parts.collect()
    }
}

/// The wanted size, which pictures are brought to.
pub(super) fn shape(want: &Want) -> Result<[usize; 3], DataError> {
    let Some(shape) = want.shape else {
        return Err(DataError::setting(
            "image size",
            "channels, height and width",
            "none",
        ));
    };
    let [channels, height, width] = shape;
    if !matches!(channels, 1 | 3) {
        return Err(DataError::setting(
            "channels of pictures",
            "1 or 3",
            channels,
        ));
    }
    limits::check("image size", &[1, height, width])?;
    Ok(shape)
}

fn missing(err: &DataError) -> String {
    format!(": missing picture: {err}")
}

fn unusable(reason: &str) -> String {
    format!(" cannot be used: {reason}")
}

fn threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    cores.min(THREADS_MAX)
}

/// Does `work` for each number of a range, on all cores; the answers in order.
pub(super) fn in_parallel<T: Send>(
    range: Range<usize>,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let share = range.len().div_ceil(threads()).max(1);
    let work = &work;
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for start in range.clone().step_by(share) {
            let part = start..range.end.min(start + share);
            running.push(scope.spawn(move || part.map(work).collect::<Vec<T>>()));
        }
        let mut done = Vec::with_capacity(range.len());
        for thread in running {
            match thread.join() {
                Ok(part) => done.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    })
}
