//! Data sets: where images and labels come from, what is checked about them,
//! and how they are divided.
//!
//! * [`idx`]: MNIST's format; [`npz`]: MedMNIST's; [`folder`]: pictures in
//!   folders, or listed in a table of labels, DICOM among them.
//! * [`rows`]: what a hospital shares, read when its turn comes.
//! * [`unlabelled`]: images to be classified.
//! * [`known`]: where the data sets with a name are looked for.
//! * [`split`]: among hospitals, and into training and test.
//! * [`preprocess`]: from bytes to fixed point.
//!
//! Nothing here is secret-shared: this is the hospital's side, before sharing.
//! `docs/data.md` says the same to users.

use std::path::{Path, PathBuf};

use ndarray::{Array4, Axis};

mod dicom;
pub mod error;
pub mod folder;
pub mod idx;
pub mod known;
mod limits;
pub mod npz;
mod picture;
mod pictures;
pub mod preprocess;
pub mod rows;
pub mod split;
mod table;
#[cfg(test)]
mod testing;
pub mod unlabelled;
mod zip;

pub use error::DataError;
pub use known::{Known, resolve};
pub use picture::Crop;
pub use preprocess::Preprocess;
pub use split::{Part as Division, permutation, split_among, split_by_fractions};

/// Images with their labels.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Pixels, `rows x channels x height x width`.
    pub images: Array4<u8>,
    /// The class of each row, below `classes`.
    pub labels: Vec<u8>,
    /// How many classes there are; not every one needs a row.
    pub classes: usize,
    /// The classes' names, in the order of their numbers.
    pub class_names: Vec<String>,
    /// Where it comes from, for people.
    pub provenance: String,
}

impl Dataset {
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
        let (_, channels, height, width) = self.images.dim();
        [channels, height, width]
    }

    /// How many rows each class has.
    pub fn class_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.classes];
        for &label in &self.labels {
            counts[usize::from(label)] += 1;
        }
        counts
    }

    /// The labels as rows of zeros with a one: `rows x classes`, row-major.
    pub fn one_hot(&self) -> Vec<u64> {
        let mut rows = vec![0; self.len() * self.classes];
        for (row, &label) in self.labels.iter().enumerate() {
            rows[row * self.classes + usize::from(label)] = 1;
        }
        rows
    }
}

/// A data set in its parts.
#[derive(Clone, Debug)]
pub struct Splits {
    /// What is trained on.
    pub train: Dataset,
    /// What choices may be made on, where the source has such a part.
    pub validation: Option<Dataset>,
    /// What results are reported on.
    pub test: Dataset,
}

/// A place with data in one of the formats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The 10,000 digits inside this program.
    Digits,
    /// A folder with MNIST's four files.
    Idx(PathBuf),
    /// A NumPy archive in MedMNIST's layout.
    Npz(PathBuf),
    /// A folder of pictures.
    Folder(PathBuf),
}

impl Place {
    /// Tells the format of what is at `path`.
    pub fn detect(path: &Path) -> Result<Place, DataError> {
        let kind = std::fs::metadata(path).map_err(|error| DataError::read(path, &error))?;
        let path = path.to_owned();
        if kind.is_dir() {
            return Ok(if idx::is_idx_folder(&path) {
                Place::Idx(path)
            } else {
                Place::Folder(path)
            });
        }
        if path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("npz"))
        {
            return Ok(Place::Npz(path));
        }
        let expected = "a folder of IDX files or of pictures, or an .npz file";
        Err(DataError::field(
            &path.display().to_string(),
            "kind",
            expected,
            file_name(&path),
        ))
    }
}

/// What the experiment needs of the data: checked where the file decides it,
/// applied where pictures leave it open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// Channels (1 or 3), height and width of the network's input. Pictures in
    /// folders are resized to it; other images must have it.
    pub shape: Option<[usize; 3]>,
    /// The number of classes, usually the network's outputs. Without it, one
    /// more than the largest training label.
    pub classes: Option<usize>,
    /// The classes' names in order; empty for the source's own.
    pub class_names: Vec<String>,
    /// Divides pictures that are not divided yet, 80 / 10 / 10.
    pub seed: u64,
    /// How pictures are brought to the proportions of `shape` before they are resized.
    pub crop: Crop,
}

/// A place, and what is wanted from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSource {
    /// Where.
    pub place: Place,
    /// What for.
    pub want: Want,
}

/// Reads and checks a data set.
pub fn load(source: &DataSource) -> Result<Splits, DataError> {
    match &source.place {
        Place::Digits => digits(&source.want),
        Place::Idx(folder) => idx::load(folder, &source.want),
        Place::Npz(file) => npz::load(file, &source.want),
        Place::Folder(folder) => folder::load(folder, &source.want),
    }
}

/// As [`load`]; for pictures the table of labels may lie elsewhere than in their folder.
pub fn load_labelled(source: &DataSource, labels: Option<&Path>) -> Result<Splits, DataError> {
    match (&source.place, labels) {
        (Place::Folder(folder), labels) => folder::load_with(folder, labels, &source.want),
        (_, None) => load(source),
        (_, Some(labels)) => Err(table_without_pictures(labels)),
    }
}

/// Reads one part alone, where the source divides itself; all of it where nothing does.
pub fn load_part(
    source: &DataSource,
    labels: Option<&Path>,
    part: Division,
) -> Result<Dataset, DataError> {
    let want = &source.want;
    match (&source.place, labels) {
        (Place::Folder(folder), labels) => folder::load_part(folder, labels, want, part),
        (_, Some(labels)) => Err(table_without_pictures(labels)),
        (Place::Idx(folder), None) => idx::load_part(folder, want, part),
        (Place::Npz(file), None) => npz::load_part(file, want, part),
        (Place::Digits, None) => {
            let splits = digits(want)?;
            match part {
                Division::Train => Ok(splits.train),
                Division::Test => Ok(splits.test),
                Division::Validation => {
                    let expected = "train or test: the digits have no validation split";
                    Err(DataError::setting("part", expected, part.name()))
                }
            }
        }
    }
}

fn table_without_pictures(labels: &Path) -> DataError {
    let place = labels.display().to_string();
    let expected = "a folder of pictures";
    DataError::field(&place, "images", expected, "data with labels of its own")
}

/// The 8,000 training and 2,000 test digits inside this program.
pub fn embedded_digits() -> Result<Splits, DataError> {
    digits(&Want::default())
}

const DIGITS: [(&str, &[u8]); 4] = [
    (
        "data/digits/train-images-idx3-ubyte.gz",
        include_bytes!("../../../data/digits/train-images-idx3-ubyte.gz"),
    ),
    (
        "data/digits/train-labels-idx1-ubyte.gz",
        include_bytes!("../../../data/digits/train-labels-idx1-ubyte.gz"),
    ),
    (
        "data/digits/t10k-images-idx3-ubyte.gz",
        include_bytes!("../../../data/digits/t10k-images-idx3-ubyte.gz"),
    ),
    (
        "data/digits/t10k-labels-idx1-ubyte.gz",
        include_bytes!("../../../data/digits/t10k-labels-idx1-ubyte.gz"),
    ),
];

fn digits(want: &Want) -> Result<Splits, DataError> {
    let pair = |images: (&str, &[u8]), labels: (&str, &[u8])| {
        idx::parse_pair(images.0, images.1, labels.0, labels.1)
    };
    let train = pair(DIGITS[0], DIGITS[1])?;
    let test = pair(DIGITS[2], DIGITS[3])?;
    let provenance = "10,000 digits of MNIST's training set, embedded (data/digits)";
    assemble(train, None, test, want, provenance)
}

/// The given rows, in the given order; a row may occur more than once.
pub fn subset(data: &Dataset, rows: &[usize]) -> Result<Dataset, DataError> {
    if let Some(row) = rows.iter().find(|row| **row >= data.len()) {
        let expected = format!("below {}, the rows of {}", data.len(), data.provenance);
        return Err(DataError::setting("row", expected, row));
    }
    Ok(Dataset {
        images: data.images.select(Axis(0), rows),
        labels: rows.iter().map(|&row| data.labels[row]).collect(),
        classes: data.classes,
        class_names: data.class_names.clone(),
        provenance: data.provenance.clone(),
    })
}

/// One split as a format's reader found it.
struct Parts {
    images: Array4<u8>,
    labels: Vec<u8>,
    /// Names the labels in an error.
    labels_name: String,
}

/// Checks what no format can check alone, and makes the splits.
fn assemble(
    train: Parts,
    validation: Option<Parts>,
    test: Parts,
    want: &Want,
    provenance: &str,
) -> Result<Splits, DataError> {
    let largest = train.labels.iter().copied().max().map_or(0, usize::from);
    let (classes, class_names) = classes_of(want, largest)?;
    let (_, channels, height, width) = train.images.dim();
    let shape = want.shape.unwrap_or([channels, height, width]);
    let finish = |parts: Parts, split: &str| -> Result<Dataset, DataError> {
        let (_, channels, height, width) = parts.images.dim();
        if [channels, height, width] != shape {
            let expected = format!("{shape:?} (channels, height, width), the network's input");
            let found = format!("{:?}", [channels, height, width]);
            return Err(DataError::field(
                provenance,
                &format!("{split} images"),
                expected,
                found,
            ));
        }
        if let Some(row) = parts
            .labels
            .iter()
            .position(|label| usize::from(*label) >= classes)
        {
            return Err(DataError::Row {
                file: parts.labels_name,
                field: "label".to_owned(),
                row,
                expected: format!("0 to {}", classes - 1),
                found: parts.labels[row].to_string(),
            });
        }
        Ok(Dataset {
            images: parts.images,
            labels: parts.labels,
            classes,
            class_names: class_names.clone(),
            provenance: format!("{provenance}, {split}"),
        })
    };
    Ok(Splits {
        train: finish(train, "training")?,
        validation: validation
            .map(|parts| finish(parts, "validation"))
            .transpose()?,
        test: finish(test, "test")?,
    })
}

/// The number of classes and their names; `largest` is the largest label.
fn classes_of(want: &Want, largest: usize) -> Result<(usize, Vec<String>), DataError> {
    let classes = match (want.classes, want.class_names.len()) {
        (Some(classes), 0) => classes,
        (Some(classes), names) if names != classes => {
            let expected = format!("{classes}, one for each class");
            return Err(DataError::setting("number of class names", expected, names));
        }
        (_, 0) => (largest + 1).max(2),
        (_, names) => names,
    };
    if !(2..=256).contains(&classes) {
        return Err(DataError::setting("number of classes", "2 to 256", classes));
    }
    let class_names = if want.class_names.is_empty() {
        (0..classes).map(|class| class.to_string()).collect()
    } else {
        want.class_names.clone()
    };
    Ok((classes, class_names))
}

/// As [`assemble`], of one part.
fn assemble_one(
    parts: Parts,
    want: &Want,
    provenance: &str,
    part: Division,
) -> Result<Dataset, DataError> {
    let (_, channels, height, width) = parts.images.dim();
    let none = Parts {
        images: Array4::zeros((0, channels, height, width)),
        labels: Vec::new(),
        labels_name: parts.labels_name.clone(),
    };
    let mut data = assemble(parts, None, none, want, provenance)?.train;
    data.provenance = format!("{provenance}, {}", part.name());
    Ok(data)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::testing::Scratch;
    use super::*;

    #[test]
    fn the_embedded_digits_are_whole_and_disjoint() {
        let splits = embedded_digits().unwrap();
        assert_eq!(splits.train.images.dim(), (8000, 1, 28, 28));
        assert_eq!(splits.test.images.dim(), (2000, 1, 28, 28));
        assert!(splits.validation.is_none());
        assert_eq!(
            splits.train.class_counts(),
            [802, 896, 771, 821, 781, 704, 830, 862, 731, 802]
        );
        assert_eq!(
            splits.test.class_counts(),
            [199, 231, 220, 211, 199, 159, 184, 208, 213, 176]
        );
        assert_eq!(splits.test.class_names[7], "7");
        let seen: HashSet<Vec<u8>> = splits
            .train
            .images
            .outer_iter()
            .map(|image| image.iter().copied().collect())
            .collect();
        let in_both = splits
            .test
            .images
            .outer_iter()
            .filter(|image| seen.contains(&image.iter().copied().collect::<Vec<u8>>()));
        assert_eq!(in_both.count(), 0, "a test picture was trained on");
    }

    #[test]
    fn a_written_set_reads_back_the_same() {
        let splits = embedded_digits().unwrap();
        let part = subset(&splits.test, &[3, 1, 4, 1, 5]).unwrap();
        let scratch = Scratch::new();
        idx::write(scratch.path(), "train", &part).unwrap();
        idx::write(scratch.path(), "t10k", &part).unwrap();
        let place = Place::detect(scratch.path()).unwrap();
        assert_eq!(place, Place::Idx(scratch.path().to_owned()));
        let want = Want {
            classes: Some(10),
            ..Want::default()
        };
        let read = load(&DataSource { place, want }).unwrap();
        assert_eq!(read.train.images, part.images);
        assert_eq!(read.test.labels, part.labels);
    }

    #[test]
    fn a_subset_keeps_its_order_and_refuses_rows_that_are_not_there() {
        let test = embedded_digits().unwrap().test;
        let part = subset(&test, &[7, 2, 7]).unwrap();
        assert_eq!(
            part.labels,
            [test.labels[7], test.labels[2], test.labels[7]]
        );
        assert_eq!(
            part.images.index_axis(Axis(0), 1),
            test.images.index_axis(Axis(0), 2)
        );
        assert!(
            subset(&test, &[2000])
                .unwrap_err()
                .to_string()
                .contains("below 2000")
        );
        let hot = part.one_hot();
        assert_eq!(hot.len(), 30);
        assert_eq!(hot[usize::from(part.labels[0])], 1);
        assert_eq!(hot.iter().sum::<u64>(), 3);
    }

    #[test]
    fn what_the_network_needs_is_checked() {
        let with = |want: Want| {
            load(&DataSource {
                place: Place::Digits,
                want,
            })
            .map(|_| ())
            .unwrap_err()
            .to_string()
        };
        let said = with(Want {
            shape: Some([3, 32, 32]),
            ..Want::default()
        });
        assert!(
            said.contains("expected [3, 32, 32]") && said.contains("found [1, 28, 28]"),
            "{said}"
        );
        let said = with(Want {
            classes: Some(5),
            ..Want::default()
        });
        assert!(
            said.contains("data/digits/train-labels") && said.contains("expected 0 to 4"),
            "{said}"
        );
        let names = vec!["a".to_owned(), "b".to_owned()];
        let said = with(Want {
            classes: Some(10),
            class_names: names,
            ..Want::default()
        });
        assert!(
            said.contains("number of class names: expected 10"),
            "{said}"
        );
        assert!(
            with(Want {
                classes: Some(1),
                ..Want::default()
            })
            .contains("2 to 256")
        );
    }

    #[test]
    fn a_place_of_no_known_kind_is_named() {
        let scratch = Scratch::new();
        let path = scratch.write("images.csv", b"");
        assert!(
            Place::detect(&path)
                .unwrap_err()
                .to_string()
                .contains("images.csv")
        );
        let absent = scratch.path().join("nothing");
        assert!(
            Place::detect(&absent)
                .unwrap_err()
                .to_string()
                .contains("nothing")
        );
    }

    #[test]
    fn pixels_of_the_digits_measure_as_mnist_does() {
        let measured = Preprocess::measure(&embedded_digits().unwrap().train).unwrap();
        assert!((measured.mean - Preprocess::DIGITS.mean).abs() < 0.005);
        assert!((measured.std - Preprocess::DIGITS.std).abs() < 0.005);
    }
}
