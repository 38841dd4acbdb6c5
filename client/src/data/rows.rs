//! Rows that are read when their turn comes: what a hospital shares. Pictures stay on the disk, and
//! 100,000 of them take no more memory than a few thousand; arrays are in memory as bytes.
//!
//! [`check`] reads everything once before anything is shared; [`Rows::read`] gives some rows.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ndarray::{Array4, ArrayView4, Axis, s};
use sha2::{Digest, Sha256};

use super::pictures::{Pictures, in_parallel};
use super::split::Part as Division;
use super::{DataError, DataSource, Dataset, Place, Preprocess, Splits, folder};

/// Rows of one part.
#[derive(Debug)]
pub struct Rows {
    content: Content,
    labels: Vec<u8>,
    shape: [usize; 3],
    /// The classes' names, in the order of their numbers.
    pub class_names: Vec<String>,
}

#[derive(Debug)]
enum Content {
    Arrays(Array4<u8>),
    Pictures {
        list: Arc<Pictures>,
        /// Rows as entries of the list.
        chosen: Vec<usize>,
    },
}

/// What [`check`] has seen of some rows.
#[derive(Clone, Debug)]
pub struct Checked {
    /// SHA-256 of shape, labels and pixels: the same rows have the same.
    pub digest: [u8; 32],
    /// Pictures of more than 8 bits, of which each one's smallest and largest value became black and
    /// white.
    pub stretched: usize,
    sum: u64,
    squares: u64,
    pixels: u64,
}

impl Checked {
    /// Mean and standard deviation of the pixels.
    pub fn measured(&self) -> Result<Preprocess, DataError> {
        Preprocess::of_sums(self.sum, self.squares, self.pixels)
    }
}

/// Finds the rows of one part, or of all parts of the source, without reading pictures. `labels` is
/// a table of labels that lies elsewhere than in a folder of pictures.
pub fn open(
    source: &DataSource,
    labels: Option<&Path>,
    part: Option<Division>,
) -> Result<Vec<(Division, Rows)>, DataError> {
    let Place::Folder(folder) = &source.place else {
        if let Some(part) = part {
            let data = super::load_part(source, labels, part)?;
            return Ok(vec![(part, data.into())]);
        }
        let Splits {
            train,
            validation,
            test,
        } = super::load_labelled(source, labels)?;
        let validation = validation.map(|data| (Division::Validation, data.into()));
        let mut parts = vec![
            (Division::Train, train.into()),
            (Division::Test, test.into()),
        ];
        parts.extend(validation);
        return Ok(parts);
    };
    let list = Arc::new(folder::list(folder, labels, &source.want, part)?);
    let (classes, class_names) = super::classes_of(&list.want, 0)?;
    debug_assert_eq!(classes, class_names.len());
    let wanted = match part {
        Some(part) => vec![part],
        None => vec![Division::Train, Division::Test, Division::Validation],
    };
    let mut parts = Vec::new();
    for part in wanted {
        let chosen = list.of(part);
        if chosen.is_empty() && part == Division::Validation {
            continue;
        }
        if chosen.is_empty() {
            // What is wrong with the list may be why.
            list.problems.clone().check(&list.place)?;
            let field = format!("{} pictures", part.name());
            return Err(DataError::field(&list.name, &field, "at least 1", 0));
        }
        let rows = Rows {
            labels: chosen.iter().map(|at| list.entries[*at].class).collect(),
            shape: list.shape,
            class_names: class_names.clone(),
            content: Content::Pictures {
                list: list.clone(),
                chosen,
            },
        };
        parts.push((part, rows));
    }
    Ok(parts)
}

impl From<Dataset> for Rows {
    fn from(data: Dataset) -> Rows {
        Rows {
            shape: data.shape(),
            labels: data.labels,
            class_names: data.class_names,
            content: Content::Arrays(data.images),
        }
    }
}

impl Rows {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Channels, height and width of an image.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The number of classes; not every one needs a row.
    pub fn classes(&self) -> usize {
        self.class_names.len()
    }

    /// Keeps some rows alone. `range` lies inside of them.
    pub fn narrow(&mut self, range: Range<usize>) {
        self.labels = self.labels[range.clone()].to_vec();
        match &mut self.content {
            Content::Arrays(images) => {
                *images = images.slice(s![range, .., .., ..]).to_owned();
            }
            Content::Pictures { chosen, .. } => *chosen = chosen[range].to_vec(),
        }
    }

    /// Pixels, `rows x channels x height x width`, and labels of some rows.
    pub fn read(&self, range: Range<usize>) -> Result<(Array4<u8>, &[u8]), DataError> {
        let [channels, height, width] = self.shape;
        let labels = &self.labels[range.clone()];
        let images = match &self.content {
            Content::Arrays(images) => images.slice(s![range, .., .., ..]).to_owned(),
            Content::Pictures { list, chosen } => {
                let pixels = list.read(&chosen[range])?;
                Array4::from_shape_vec((labels.len(), channels, height, width), pixels)
                    .map_err(|error| DataError::corrupt(&list.name, error))?
            }
        };
        Ok((images, labels))
    }
}

/// What is summed up over rows.
struct Sums {
    hash: Sha256,
    stretched: usize,
    sum: u64,
    squares: u64,
    pixels: u64,
}

impl Sums {
    fn new(rows: &Rows) -> Sums {
        let mut hash = Sha256::new().chain_update(b"trefoil rows v1\0");
        let sides = rows.shape.into_iter().chain([rows.classes(), rows.len()]);
        sides.for_each(|side| hash.update((side as u64).to_le_bytes()));
        Sums {
            hash,
            stretched: 0,
            sum: 0,
            squares: 0,
            pixels: 0,
        }
    }

    fn row(&mut self, label: u8, pixels: &[u8]) {
        self.hash.update([label]);
        self.hash.update(pixels);
        self.pixels += pixels.len() as u64;
        // 2^24 rows of at most 2^24 pixels of at most 2^16 fit into 64 bits.
        for &pixel in pixels {
            self.sum += u64::from(pixel);
            self.squares += u64::from(pixel) * u64::from(pixel);
        }
    }

    fn done(self) -> Checked {
        Checked {
            digest: self.hash.finalize().into(),
            stretched: self.stretched,
            sum: self.sum,
            squares: self.squares,
            pixels: self.pixels,
        }
    }
}

/// How many steps [`check`] takes: files of the whole source, or rows.
pub fn steps(parts: &[&Rows]) -> usize {
    match parts.first().map(|rows| &rows.content) {
        Some(Content::Pictures { list, .. }) => list.entries.len(),
        _ => parts.iter().map(|rows| rows.len()).sum(),
    }
}

/// Reads all of `parts`, which come from one source, and checks it: every picture decodes, and no
/// picture of the source is there twice. `progress` hears the steps that are done.
pub fn check(parts: &[&Rows], progress: &mut dyn FnMut(usize)) -> Result<Vec<Checked>, DataError> {
    let mut sums: Vec<Sums> = parts.iter().map(|rows| Sums::new(rows)).collect();
    let mut done = 0;
    for (rows, sums) in parts.iter().zip(&mut sums) {
        if let Content::Arrays(images) = &rows.content {
            each_row(images.view(), |row, pixels| {
                sums.row(rows.labels[row], pixels);
                done += 1;
                progress(done);
            });
        }
    }
    let list = parts.iter().find_map(|rows| match &rows.content {
        Content::Pictures { list, .. } => Some(list.clone()),
        Content::Arrays(_) => None,
    });
    if let Some(list) = list {
        // To which part an entry belongs.
        let mut owner = vec![None; list.entries.len()];
        for (part, rows) in parts.iter().enumerate() {
            if let Content::Pictures { chosen, .. } = &rows.content {
                chosen.iter().for_each(|at| owner[*at] = Some(part));
            }
        }
        list.walk(&|at| owner[at].is_some(), progress, &mut |at, picture| {
            if let Some(part) = owner[at] {
                sums[part].row(list.entries[at].class, &picture.pixels);
                sums[part].stretched += usize::from(picture.stretched);
            }
        })?;
    }
    Ok(sums.into_iter().map(Sums::done).collect())
}

fn each_row(images: ArrayView4<'_, u8>, mut row: impl FnMut(usize, &[u8])) {
    for (number, image) in images.axis_iter(Axis(0)).enumerate() {
        match image.as_slice() {
            Some(pixels) => row(number, pixels),
            None => row(number, &image.iter().copied().collect::<Vec<u8>>()),
        }
    }
}

/// Decodes pictures without labels, in order.
pub(super) fn decode_all(
    paths: &[std::path::PathBuf],
    decode: impl Fn(&Path) -> Result<Vec<u8>, DataError> + Sync,
) -> Result<Vec<u8>, DataError> {
    let decoded = in_parallel(0..paths.len(), |at| decode(&paths[at]));
    Ok(decoded.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}
