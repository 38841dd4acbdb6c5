//! The data sets with a name that are not inside the program: where they are
//! looked for, and whether the files are the ones this project was measured on.
//!
//! Nothing is ever downloaded. `docs/data.md` says where a user gets them.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{DataError, DataSource, Place, Want};

/// A data set with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// MNIST: 60,000 and 10,000 handwritten digits.
    Mnist,
    /// Fashion-MNIST: 60,000 and 10,000 pictures of clothing.
    Fashion,
    /// PneumoniaMNIST: 4,708, 524 and 624 chest X-rays of children.
    Pneumonia,
}

const MNIST_FILES: &[(&str, &str)] = &[
    (
        "train-images-idx3-ubyte.gz",
        "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    ),
    (
        "train-labels-idx1-ubyte.gz",
        "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    ),
    (
        "t10k-images-idx3-ubyte.gz",
        "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    ),
    (
        "t10k-labels-idx1-ubyte.gz",
        "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
    ),
];

const FASHION_FILES: &[(&str, &str)] = &[
    (
        "train-images-idx3-ubyte.gz",
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    ),
    (
        "train-labels-idx1-ubyte.gz",
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    ),
    (
        "t10k-images-idx3-ubyte.gz",
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    ),
    (
        "t10k-labels-idx1-ubyte.gz",
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    ),
];

const FASHION_CLASSES: [&str; 10] = [
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
];

const PNEUMONIA_FILES: &[(&str, &str)] = &[(
    "pneumoniamnist.npz",
    "ce8250bf5debc3c389b89affcc1d9feac579b26e875a848301e9f937bb0c2eee",
)];

impl Known {
    /// The name in a config file.
    pub fn name(self) -> &'static str {
        match self {
            Known::Mnist => "mnist",
            Known::Fashion => "fashion",
            Known::Pneumonia => "pneumonia",
        }
    }

    /// The data set of a name.
    pub fn from_name(name: &str) -> Option<Known> {
        [Known::Mnist, Known::Fashion, Known::Pneumonia]
            .into_iter()
            .find(|set| set.name() == name)
    }

    /// The environment variable with its path.
    pub fn variable(self) -> &'static str {
        match self {
            Known::Mnist => "TREFOIL_MNIST",
            Known::Fashion => "TREFOIL_FASHION",
            Known::Pneumonia => "TREFOIL_PNEUMONIA",
        }
    }

    /// Where it is looked for last, from the current folder.
    pub fn default_path(self) -> &'static str {
        match self {
            Known::Mnist => "../shared/data/mnist",
            // Where Debian's package `dataset-fashion-mnist` puts it.
            Known::Fashion => "/usr/share/datasets/fashion-mnist",
            Known::Pneumonia => "../shared/data/pneumoniamnist/pneumoniamnist.npz",
        }
    }

    /// Its files, with the SHA-256 of each.
    pub fn files(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Known::Mnist => MNIST_FILES,
            Known::Fashion => FASHION_FILES,
            Known::Pneumonia => PNEUMONIA_FILES,
        }
    }

    /// The classes' names in order.
    pub fn class_names(self) -> Vec<String> {
        match self {
            Known::Mnist => (0..10).map(|digit| digit.to_string()).collect(),
            Known::Fashion => FASHION_CLASSES.map(str::to_owned).to_vec(),
            Known::Pneumonia => vec!["normal".to_owned(), "pneumonia".to_owned()],
        }
    }

    /// Finds it: at the given path, else where the environment variable says,
    /// else at the default path. The first that is set decides; it is an error
    /// if nothing is there.
    pub fn locate(self, given: Option<&Path>) -> Result<PathBuf, DataError> {
        self.locate_from(
            given,
            std::env::var_os(self.variable()),
            Path::new(self.default_path()),
        )
    }

    fn locate_from(
        self,
        given: Option<&Path>,
        variable: Option<OsString>,
        default: &Path,
    ) -> Result<PathBuf, DataError> {
        let (path, named) = match (given, variable.filter(|value| !value.is_empty())) {
            (Some(path), _) => (path.to_owned(), format!("--data {}", path.display())),
            (None, Some(value)) => {
                let path = PathBuf::from(value);
                let named = format!("{}={}", self.variable(), path.display());
                (path, named)
            }
            (None, None) => (default.to_owned(), default.display().to_string()),
        };
        if !path.exists() {
            return Err(DataError::Absent {
                set: self.name().to_owned(),
                tried: vec![named],
                help: format!(
                    "docs/data.md says where to get it; then give its path with --data or {}",
                    self.variable()
                ),
            });
        }
        // A folder that holds the one file is as good as the file.
        let inside = path.join("pneumoniamnist.npz");
        Ok(if self == Known::Pneumonia && inside.is_file() {
            inside
        } else {
            path
        })
    }

    /// Compares the files with their SHA-256. A difference is no error, as other
    /// copies of the same data exist: it is a warning, a line for each file.
    pub fn verify(self, path: &Path) -> Result<Vec<String>, DataError> {
        let mut warnings = Vec::new();
        for (name, expected) in self.files() {
            let file = if path.is_dir() {
                path.join(name)
            } else {
                path.to_owned()
            };
            if !file.is_file() {
                warnings.push(format!(
                    "{} is not there, so its SHA-256 is not checked",
                    file.display()
                ));
                continue;
            }
            let found = sha256_file(&file)?;
            if found != *expected {
                warnings.push(format!(
                    "{} is not the file this project was measured on: SHA-256 {found}, expected \
                     {expected}; results may differ",
                    file.display()
                ));
            }
        }
        Ok(warnings)
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256_file(path: &Path) -> Result<String, DataError> {
    let mut file = File::open(path).map_err(|error| DataError::read(path, &error))?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 16];
    loop {
        let read = file
            .read(&mut block)
            .map_err(|error| DataError::read(path, &error))?;
        if read == 0 {
            return Ok(hash
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect());
        }
        hash.update(&block[..read]);
    }
}

/// Finds the data of an experiment. `name` is `digits`, `mnist`, `fashion`, `pneumonia`
/// or a path; `given` (from `--data`) says where it is, and wins. Also returns
/// warnings for the user: files that are not the known ones.
pub fn resolve(
    name: &str,
    given: Option<&Path>,
    mut want: Want,
) -> Result<(DataSource, Vec<String>), DataError> {
    let Some(set) = Known::from_name(name) else {
        let place = match (name, given) {
            (_, Some(path)) => Place::detect(path)?,
            ("digits", None) => Place::Digits,
            (_, None) if Path::new(name).exists() => Place::detect(Path::new(name))?,
            (_, None) => {
                return Err(DataError::Absent {
                    set: name.to_owned(),
                    tried: vec![name.to_owned()],
                    help: "the data is \"digits\", \"mnist\", \"fashion\", \"pneumonia\", or the path \
                           of a folder or an .npz file (docs/data.md)"
                        .to_owned(),
                });
            }
        };
        return Ok((DataSource { place, want }, Vec::new()));
    };
    let path = set.locate(given)?;
    let place = Place::detect(&path)?;
    // The checksums and names are those of the published files; pictures of
    // one's own under the same name bring theirs.
    let mut warnings = Vec::new();
    if !matches!(place, Place::Folder(_)) {
        warnings = set.verify(&path)?;
        if want.class_names.is_empty() {
            want.class_names = set.class_names();
        }
    } else {
        warnings.push(format!(
            "{}: {} is a folder of pictures, not the published files",
            set.name(),
            path.display()
        ));
    }
    Ok((DataSource { place, want }, warnings))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Scratch;
    use super::*;

    /// Looks for a data set beside the checkout; says so where it is absent.
    fn beside(set: Known) -> Option<PathBuf> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(set.default_path());
        if !path.exists() {
            println!("skipped: {} is not there (docs/data.md)", set.name());
            return None;
        }
        Some(path)
    }

    #[test]
    fn the_given_path_wins_over_the_variable_and_that_over_the_default() {
        let scratch = Scratch::new();
        let (a, b, c) = (
            scratch.write("a.npz", b""),
            scratch.write("b.npz", b""),
            scratch.write("c.npz", b""),
        );
        let set = Known::Pneumonia;
        let variable = Some(b.clone().into_os_string());
        assert_eq!(set.locate_from(Some(&a), variable.clone(), &c).unwrap(), a);
        assert_eq!(set.locate_from(None, variable, &c).unwrap(), b);
        assert_eq!(set.locate_from(None, None, &c).unwrap(), c);
        assert_eq!(set.locate_from(None, Some("".into()), &c).unwrap(), c);
    }

    #[test]
    fn an_absent_set_says_where_it_was_looked_for_and_where_to_get_it() {
        let nowhere = Path::new("no/such/place");
        let said = Known::Pneumonia
            .locate_from(None, None, nowhere)
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("no/such/place") && said.contains("docs/data.md"),
            "{said}"
        );
        assert!(said.contains("TREFOIL_PNEUMONIA"), "{said}");
        let said = Known::Mnist.locate(Some(nowhere)).unwrap_err().to_string();
        assert!(said.contains("--data no/such/place"), "{said}");
        let said = resolve("mnits", None, Want::default())
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("mnits") && said.contains("\"pneumonia\""),
            "{said}"
        );
    }

    #[test]
    fn a_folder_with_the_one_file_stands_for_the_file() {
        let scratch = Scratch::new();
        let file = scratch.write("pneumoniamnist.npz", b"");
        let found = Known::Pneumonia
            .locate_from(Some(scratch.path()), None, Path::new(""))
            .unwrap();
        assert_eq!(found, file);
    }

    #[test]
    fn a_file_that_differs_is_warned_about() {
        let scratch = Scratch::new();
        let file = scratch.write("set.npz", b"abc");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_file(&file).unwrap(), abc);
        let warnings = Known::Pneumonia.verify(&file).unwrap();
        assert!(
            warnings.len() == 1 && warnings[0].contains(abc),
            "{warnings:?}"
        );
    }

    #[test]
    fn pneumonia_reads_with_its_published_sizes() {
        let Some(path) = beside(Known::Pneumonia) else {
            return;
        };
        let (source, warnings) = resolve("pneumonia", Some(&path), Want::default()).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let splits = super::super::load(&source).unwrap();
        assert_eq!(splits.train.images.dim(), (4708, 1, 28, 28));
        assert_eq!(splits.validation.unwrap().len(), 524);
        assert_eq!(splits.test.class_counts(), [234, 390]);
        assert_eq!(splits.test.class_names, ["normal", "pneumonia"]);
        let measured = super::super::Preprocess::measure(&splits.train).unwrap();
        assert!((measured.mean - 0.5719).abs() < 1e-4 && (measured.std - 0.1684).abs() < 1e-4);
    }

    #[test]
    fn mnist_reads_with_its_published_sizes() {
        let Some(path) = beside(Known::Mnist) else {
            return;
        };
        let (source, warnings) = resolve("mnist", Some(&path), Want::default()).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let splits = super::super::load(&source).unwrap();
        assert_eq!((splits.train.len(), splits.test.len()), (60_000, 10_000));
        assert_eq!(splits.test.labels[..5], [7, 2, 1, 0, 4]);
    }

    #[test]
    fn fashion_reads_with_its_published_sizes() {
        let Some(path) = beside(Known::Fashion) else {
            return;
        };
        let (source, warnings) = resolve("fashion", Some(&path), Want::default()).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let splits = super::super::load(&source).unwrap();
        assert_eq!((splits.train.len(), splits.test.len()), (60_000, 10_000));
        assert_eq!(splits.test.class_counts(), [1000; 10]);
        assert_eq!(splits.test.class_names[9], "boot");
        let measured = super::super::Preprocess::measure(&splits.train).unwrap();
        assert!((measured.mean - 0.2860).abs() < 1e-4 && (measured.std - 0.3530).abs() < 1e-4);
    }
}
