//! Pictures in folders (PNG, JPEG, BMP, TIFF), in one of three layouts:
//!
//! 1. `labels.csv` in the folder: [`super::table`].
//! 2. `train/<class>/*`, `test/<class>/*` and, where there is one,
//!    `val/<class>/*` (or `validation`).
//! 3. `<class>/*`: divided 80 / 10 / 10 by the seed, class by class.
//!
//! Classes are the folders' names in alphabetical order, unless names are
//! wanted: then there must be no other. A picture is turned grey or colour as
//! the network's input asks, and then resized to it (triangle filter), whatever
//! its proportions. One that does not decode stops everything: a picture left
//! out silently would be a row nobody misses.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::{ImageReader, Limits};
use ndarray::Array4;

use super::split::{Part, permutation};
use super::{DataError, Dataset, Parts, Splits, Want, file_name, limits, table};

/// The endings of files that are read as pictures.
const ENDINGS: [&str; 6] = ["png", "jpg", "jpeg", "bmp", "tif", "tiff"];

/// One picture of a list: where it is, its class, its part.
pub(super) struct Entry {
    pub path: PathBuf,
    pub class: u8,
    pub part: Part,
}

/// Reads a folder of pictures.
pub fn load(folder: &Path, want: &Want) -> Result<Splits, DataError> {
    load_with(folder, None, want)
}

/// As [`load`]; the table of labels may lie elsewhere.
pub(super) fn load_with(
    folder: &Path,
    labels: Option<&Path>,
    want: &Want,
) -> Result<Splits, DataError> {
    let pictures = Pictures::list(folder, labels, want, None)?;
    let missing = |split| DataError::field(&pictures.name, split, "at least 1", 0);
    let train = pictures.read(Part::Train)?;
    let train = train.ok_or_else(|| missing("training pictures"))?;
    let validation = pictures.read(Part::Validation)?;
    let test = pictures.read(Part::Test)?;
    let test = test.ok_or_else(|| missing("test pictures"))?;
    let provenance = format!("pictures in {}", pictures.name);
    super::assemble(train, validation, test, &pictures.want, &provenance)
}

/// Reads the pictures of one part alone: those that the folder or its table put there, and all where
/// neither divides them.
pub(super) fn load_part(
    folder: &Path,
    labels: Option<&Path>,
    want: &Want,
    part: Part,
) -> Result<Dataset, DataError> {
    let pictures = Pictures::list(folder, labels, want, Some(part))?;
    let parts = pictures.read(part)?;
    let parts = parts.ok_or_else(|| {
        let field = format!("{} pictures", part.name());
        DataError::field(&pictures.name, &field, "at least 1", 0)
    })?;
    let provenance = format!("pictures in {}", pictures.name);
    super::assemble_one(parts, &pictures.want, &provenance, part)
}

/// A folder's pictures, listed and not read.
struct Pictures {
    name: String,
    shape: [usize; 3],
    entries: Vec<Entry>,
    /// With the classes' names.
    want: Want,
}

impl Pictures {
    /// `undivided` is the part of pictures that nothing divides; without it the seed does.
    fn list(
        folder: &Path,
        labels: Option<&Path>,
        want: &Want,
        undivided: Option<Part>,
    ) -> Result<Pictures, DataError> {
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
        let (class_names, entries) = list(folder, labels, want, undivided)?;
        Ok(Pictures {
            name: folder.display().to_string(),
            shape,
            entries,
            want: Want {
                class_names,
                ..want.clone()
            },
        })
    }

    fn read(&self, part: Part) -> Result<Option<Parts>, DataError> {
        let chosen = self.entries.iter().filter(|entry| entry.part == part);
        let chosen: Vec<&Entry> = chosen.collect();
        if chosen.is_empty() {
            return Ok(None);
        }
        let [channels, height, width] = self.shape;
        limits::check(&self.name, &[chosen.len(), channels, height, width])?;
        let mut pixels = Vec::new();
        for entry in &chosen {
            pixels.extend(decode(&entry.path, self.shape)?);
        }
        let images = Array4::from_shape_vec((chosen.len(), channels, height, width), pixels)
            .map_err(|error| DataError::corrupt(&self.name, error))?;
        let labels = chosen.iter().map(|entry| entry.class).collect();
        Ok(Some(Parts {
            images,
            labels,
            labels_name: self.name.clone(),
        }))
    }
}

fn list(
    folder: &Path,
    labels: Option<&Path>,
    want: &Want,
    undivided: Option<Part>,
) -> Result<(Vec<String>, Vec<Entry>), DataError> {
    let inside = folder.join(table::FILE_NAME);
    if let Some(labels) = labels.or_else(|| inside.is_file().then_some(&inside)) {
        return table::list(folder, labels, want, undivided);
    }
    if !folder.join("train").is_dir() {
        let classes = classes(folder, want)?;
        let mut entries = Vec::new();
        for (class, name) in classes.iter().enumerate() {
            let pictures = pictures(&folder.join(name))?;
            let tenth = (pictures.len() + 5) / 10;
            // Another order in each class, from the one seed.
            let order = permutation(pictures.len(), want.seed.wrapping_add(class as u64));
            let mut parts = vec![undivided.unwrap_or(Part::Train); pictures.len()];
            if undivided.is_none() {
                order[..tenth].iter().for_each(|&at| parts[at] = Part::Test);
                order[tenth..2 * tenth]
                    .iter()
                    .for_each(|&at| parts[at] = Part::Validation);
            }
            let class = class as u8; // `classes` gives at most 256
            let rows = pictures.into_iter().zip(parts);
            entries.extend(rows.map(|(path, part)| Entry { path, class, part }));
        }
        return Ok((classes, entries));
    }
    let names = classes(&folder.join("train"), want)?;
    let mut entries = Vec::new();
    let splits = [
        ("train", Part::Train),
        ("val", Part::Validation),
        ("validation", Part::Validation),
        ("test", Part::Test),
    ];
    for (split, part) in splits {
        let above = folder.join(split);
        if !above.is_dir() {
            continue;
        }
        for name in folders(&above)? {
            let Some(class) = names.iter().position(|known| *known == name) else {
                let expected = format!("one of the classes {}", names.join(", "));
                return Err(DataError::field(
                    &above.display().to_string(),
                    "folder",
                    expected,
                    name,
                ));
            };
            let class = class as u8; // `classes` gives at most 256
            let pictures = pictures(&above.join(name))?;
            entries.extend(pictures.into_iter().map(|path| Entry { path, class, part }));
        }
    }
    Ok((names, entries))
}

/// The classes: the folders' names, in alphabetical order or in the wanted one.
fn classes(above: &Path, want: &Want) -> Result<Vec<String>, DataError> {
    let found = folders(above)?;
    check_classes(&above.display().to_string(), found, want)
}

pub(super) fn check_classes(
    place: &str,
    found: Vec<String>,
    want: &Want,
) -> Result<Vec<String>, DataError> {
    if !want.class_names.is_empty() {
        if let Some(other) = found.iter().find(|name| !want.class_names.contains(name)) {
            let expected = format!("one of {}", want.class_names.join(", "));
            return Err(DataError::field(place, "class", expected, other));
        }
        return Ok(want.class_names.clone());
    }
    if !(2..=256).contains(&found.len()) {
        let expected = "2 to 256 (a folder or label for each class)";
        return Err(DataError::field(place, "classes", expected, found.len()));
    }
    Ok(found)
}

/// The entries of a folder in the order of their names, without hidden ones.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| DataError::read(folder, &error))? {
        let path = entry
            .map_err(|error| DataError::read(folder, &error))?
            .path();
        if file_name(&path).starts_with('.') || file_name(&path) == "Thumbs.db" {
            continue;
        }
        if paths.len() == limits::MAX_ROWS {
            let most = format!("at most {}", limits::MAX_ROWS);
            return Err(DataError::field(
                &folder.display().to_string(),
                "files",
                most,
                "more",
            ));
        }
        paths.push(path);
    }
    paths.sort_unstable_by_key(|path| file_name(path));
    Ok(paths)
}

fn folders(above: &Path) -> Result<Vec<String>, DataError> {
    let paths = entries(above)?;
    Ok(paths
        .iter()
        .filter(|path| path.is_dir())
        .map(|path| file_name(path))
        .collect())
}

pub(super) fn pictures(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    if !folder.is_dir() {
        return Ok(Vec::new()); // a wanted class without pictures here
    }
    let paths = entries(folder)?;
    paths.iter().try_for_each(|path| check_ending(path))?;
    Ok(paths)
}

pub(super) fn check_ending(path: &Path) -> Result<(), DataError> {
    let ending = path
        .extension()
        .map(|ending| ending.to_string_lossy().to_lowercase());
    if ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str())) {
        return Ok(());
    }
    let expected = format!("a picture ({})", ENDINGS.join(", "));
    Err(DataError::field(
        &path.display().to_string(),
        "file",
        expected,
        file_name(path),
    ))
}

/// Reads a picture's file, within the bounds.
pub(super) fn read_picture(path: &Path) -> Result<Vec<u8>, DataError> {
    let bytes = std::fs::metadata(path)
        .map_err(|error| DataError::read(path, &error))?
        .len();
    if bytes > limits::MAX_PICTURE_FILE_BYTES {
        let most = format!("at most {} bytes", limits::MAX_PICTURE_FILE_BYTES);
        return Err(DataError::field(
            &path.display().to_string(),
            "size",
            most,
            bytes,
        ));
    }
    std::fs::read(path).map_err(|error| DataError::read(path, &error))
}

/// Reads one picture as `channels x height x width` bytes, row-major. Also used
/// for the pictures of a prediction.
pub fn decode(path: &Path, [channels, height, width]: [usize; 3]) -> Result<Vec<u8>, DataError> {
    let name = path.display().to_string();
    let content = read_picture(path)?;
    let mut bounds = Limits::default();
    bounds.max_image_width = Some(limits::MAX_SIDE as u32);
    bounds.max_image_height = Some(limits::MAX_SIDE as u32);
    bounds.max_alloc = Some(limits::MAX_BYTES);
    let reader = ImageReader::new(Cursor::new(content)).with_guessed_format();
    let mut reader = reader.map_err(|error| DataError::corrupt(&name, error))?;
    reader.limits(bounds);
    let picture = reader
        .decode()
        .map_err(|error| DataError::corrupt(&name, error))?;
    let (w, h) = (width as u32, height as u32); // at most MAX_SIDE
    let resize = |picture: image::DynamicImage| {
        if (picture.width(), picture.height()) == (w, h) {
            picture
        } else {
            picture.resize_exact(w, h, FilterType::Triangle)
        }
    };
    if channels == 1 {
        return Ok(resize(picture.into_luma8().into()).into_luma8().into_raw());
    }
    let pixels = resize(picture.into_rgb8().into()).into_rgb8().into_raw();
    Ok((0..3)
        .flat_map(|channel| pixels.iter().skip(channel).step_by(3).copied())
        .collect())
}

#[cfg(test)]
mod tests {
    use image::{ImageFormat, Rgb, RgbImage};

    use super::super::testing::Scratch;
    use super::*;

    fn want() -> Want {
        Want {
            shape: Some([1, 4, 4]),
            ..Want::default()
        }
    }

    fn png(width: u32, height: u32, colour: [u8; 3]) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        RgbImage::from_pixel(width, height, Rgb(colour))
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    fn fault(scratch: &Scratch, want: &Want) -> String {
        load(scratch.path(), want)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn given_splits_are_kept_and_pictures_resized() {
        let scratch = Scratch::new();
        for (name, grey) in [
            ("train/normal/a.png", 10),
            ("train/normal/b.PNG", 20),
            ("train/sick/c.png", 200),
            ("val/sick/d.png", 210),
            ("test/normal/e.png", 30),
        ] {
            scratch.write(name, &png(9, 6, [grey; 3]));
        }
        scratch.write("train/normal/.hidden", b"");
        let splits = load(scratch.path(), &want()).unwrap();
        assert_eq!(splits.train.class_names, ["normal", "sick"]);
        assert_eq!(splits.train.labels, [0, 0, 1]);
        assert_eq!(splits.train.images.dim(), (3, 1, 4, 4));
        assert!(
            splits
                .train
                .images
                .index_axis(ndarray::Axis(0), 1)
                .iter()
                .all(|pixel| *pixel == 20)
        );
        assert_eq!(splits.validation.unwrap().labels, [1]);
        assert_eq!(splits.test.labels, [0]);
    }

    #[test]
    fn colour_comes_channel_by_channel() {
        let scratch = Scratch::new();
        for name in ["train/a/1.png", "train/b/1.png", "test/a/1.png"] {
            scratch.write(name, &png(2, 3, [7, 8, 9]));
        }
        let want = Want {
            shape: Some([3, 3, 2]),
            ..Want::default()
        };
        let images = load(scratch.path(), &want).unwrap().train.images;
        assert_eq!(images.dim(), (2, 3, 3, 2));
        let pixels: Vec<u8> = images.iter().take(18).copied().collect();
        assert_eq!(pixels, [[7; 6], [8; 6], [9; 6]].concat());
    }

    #[test]
    fn one_heap_of_classes_is_divided_by_the_seed() {
        let scratch = Scratch::new();
        for class in ["a", "b"] {
            for number in 0..20u8 {
                let shade = number + if class == "a" { 0 } else { 100 };
                scratch.write(&format!("{class}/{number:02}.png"), &png(4, 4, [shade; 3]));
            }
        }
        let shades = |seed| {
            let splits = load(scratch.path(), &Want { seed, ..want() }).unwrap();
            assert_eq!(splits.train.class_counts(), [16, 16]);
            assert_eq!(splits.validation.as_ref().unwrap().class_counts(), [2, 2]);
            assert_eq!(splits.test.class_counts(), [2, 2]);
            let parts = [
                &splits.train,
                splits.validation.as_ref().unwrap(),
                &splits.test,
            ];
            parts.map(|part| part.images.iter().step_by(16).copied().collect::<Vec<u8>>())
        };
        let one = shades(1);
        assert_eq!(one, shades(1));
        assert_ne!(one, shades(2));
        let mut all = one.concat();
        all.sort_unstable();
        assert_eq!(all, (0..20).chain(100..120).collect::<Vec<u8>>());
    }

    #[test]
    fn a_corrupt_picture_is_named() {
        let scratch = Scratch::new();
        for name in ["train/a/1.png", "train/b/1.png", "test/a/1.png"] {
            scratch.write(name, &png(5, 5, [1; 3]));
        }
        let whole = png(64, 64, [3, 5, 7]);
        for broken in [&whole[..whole.len() / 2], b"not a picture", b""] {
            scratch.write("train/b/broken.png", broken);
            let said = fault(&scratch, &want());
            assert!(said.contains("broken.png: corrupt"), "{said}");
        }
    }

    #[test]
    fn a_picture_that_claims_to_be_enormous_is_refused() {
        let scratch = Scratch::new();
        scratch.write("train/a/1.png", &png(5, 5, [1; 3]));
        scratch.write("test/a/1.png", &png(5, 5, [1; 3]));
        // An 8 GiB bitmap: the header only.
        let mut bmp = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
        bmp.extend(50_000u32.to_le_bytes());
        bmp.extend(50_000u32.to_le_bytes());
        bmp.extend([1, 0, 24, 0]);
        bmp.extend([0; 24]);
        scratch.write("train/b/huge.bmp", &bmp);
        assert!(fault(&scratch, &want()).contains("huge.bmp: corrupt"));
    }

    #[test]
    fn what_is_missing_or_out_of_place_is_named() {
        let scratch = Scratch::new();
        scratch.write("train/a/1.png", &png(5, 5, [1; 3]));
        assert!(fault(&scratch, &want()).contains("classes: expected 2 to 256"));
        scratch.write("train/b/1.png", &png(5, 5, [1; 3]));
        assert!(fault(&scratch, &want()).contains("test pictures: expected at least 1"));
        scratch.write("test/c/1.png", &png(5, 5, [1; 3]));
        assert!(fault(&scratch, &want()).contains("one of the classes a, b, found c"));
        std::fs::remove_dir_all(scratch.path().join("test/c")).unwrap();
        scratch.write("test/a/notes.txt", b"");
        assert!(fault(&scratch, &want()).contains("notes.txt"));
        let named = Want {
            class_names: vec!["a".into(), "x".into()],
            ..want()
        };
        assert!(fault(&scratch, &named).contains("expected one of a, x, found b"));
        assert!(fault(&scratch, &Want::default()).contains("image size"));
        let two = Want {
            shape: Some([2, 4, 4]),
            ..Want::default()
        };
        assert!(fault(&scratch, &two).contains("expected 1 or 3, found 2"));
    }
}
