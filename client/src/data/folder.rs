//! Pictures in folders (PNG, JPEG, BMP, TIFF, DICOM), in one of three layouts:
//!
//! 1. `labels.csv` in the folder: [`super::table`].
//! 2. `train/<class>/*`, `test/<class>/*` and, where there is one,
//!    `val/<class>/*` (or `validation`).
//! 3. `<class>/*`: divided 80 / 10 / 10 by the seed, class by class.
//!
//! Classes are the folders' names in alphabetical order, unless names are
//! wanted: then there must be no other. Here pictures are listed; `pictures.rs`
//! reads them, `picture.rs` decodes one.

use std::path::{Path, PathBuf};

use super::picture::check_ending;
use super::pictures::{self, Entry, Pictures, Problems};
use super::split::{Part, permutation};
use super::{DataError, Dataset, Splits, Want, file_name, limits, table};

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
    let pictures = list(folder, labels, want, None)?;
    let missing = |split| DataError::field(&pictures.name, split, "at least 1", 0);
    let mut parts = pictures.load(&[Part::Train, Part::Validation, Part::Test])?;
    let mut next = || (!parts.is_empty()).then(|| parts.remove(0)).flatten();
    let (train, validation, test) = (next(), next(), next());
    let train = train.ok_or_else(|| missing("training pictures"))?;
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
    let pictures = list(folder, labels, want, Some(part))?;
    let parts = pictures.load(&[part])?.pop().flatten();
    let parts = parts.ok_or_else(|| {
        let field = format!("{} pictures", part.name());
        DataError::field(&pictures.name, &field, "at least 1", 0)
    })?;
    let provenance = format!("pictures in {}", pictures.name);
    super::assemble_one(parts, &pictures.want, &provenance, part)
}

/// Lists a folder's pictures without reading them. `undivided` is the part of pictures that nothing
/// divides; without it the seed does.
pub(super) fn list(
    folder: &Path,
    labels: Option<&Path>,
    want: &Want,
    undivided: Option<Part>,
) -> Result<Pictures, DataError> {
    // Before the folder is looked through.
    pictures::shape(want)?;
    let name = folder.display().to_string();
    let inside = folder.join(table::FILE_NAME);
    let labels = labels.or_else(|| inside.is_file().then_some(&inside));
    let mut problems = Problems::default();
    let (class_names, entries) = match labels {
        Some(labels) => table::list(folder, labels, want, undivided, &mut problems)?,
        None => layout(folder, want, undivided)?,
    };
    let place = labels.map_or_else(|| name.clone(), |labels| labels.display().to_string());
    let want = Want {
        class_names,
        ..want.clone()
    };
    Pictures::new(name, place, entries, want, problems)
}

fn layout(
    folder: &Path,
    want: &Want,
    undivided: Option<Part>,
) -> Result<(Vec<String>, Vec<Entry>), DataError> {
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
            entries.extend(rows.map(|(path, part)| Entry {
                path,
                class,
                part,
                line: 0,
            }));
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
            entries.extend(pictures.into_iter().map(|path| Entry {
                path,
                class,
                part,
                line: 0,
            }));
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

#[cfg(test)]
mod tests {
    use std::io::Cursor;

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
        for (name, last) in [
            ("train/a/1.png", 9),
            ("train/b/1.png", 10),
            ("test/a/1.png", 11),
        ] {
            scratch.write(name, &png(2, 3, [7, 8, last]));
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
    fn every_picture_that_cannot_be_used_is_listed_with_its_reason() {
        let scratch = Scratch::new();
        for (name, shade) in [
            ("train/a/1.png", 1),
            ("train/b/1.png", 2),
            ("test/a/1.png", 3),
        ] {
            scratch.write(name, &png(5, 5, [shade; 3]));
        }
        let whole = png(64, 64, [3, 5, 7]);
        scratch.write("train/b/broken.png", &whole[..whole.len() / 2]);
        scratch.write("train/b/words.png", b"not a picture");
        scratch.write("test/b/empty.png", b"");
        scratch.write("test/a/copy.png", &png(5, 5, [2; 3]));
        let said = fault(&scratch, &want());
        assert!(said.contains("4 problem(s)"), "{said}");
        for part in [
            "broken.png cannot be used: ",
            "words.png cannot be used: ",
            "empty.png cannot be used: ",
            "copy.png is the same picture as ",
        ] {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
    }

    #[test]
    fn a_picture_that_claims_to_be_enormous_is_refused() {
        let scratch = Scratch::new();
        scratch.write("train/a/1.png", &png(5, 5, [1; 3]));
        scratch.write("test/a/1.png", &png(5, 5, [2; 3]));
        // An 8 GiB bitmap: the header only.
        let mut bmp = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
        bmp.extend(50_000u32.to_le_bytes());
        bmp.extend(50_000u32.to_le_bytes());
        bmp.extend([1, 0, 24, 0]);
        bmp.extend([0; 24]);
        scratch.write("train/b/huge.bmp", &bmp);
        let said = fault(&scratch, &want());
        assert!(
            said.contains("1 problem") && said.contains("huge.bmp cannot be used"),
            "{said}"
        );
    }

    #[test]
    fn what_is_missing_or_out_of_place_is_named() {
        let scratch = Scratch::new();
        scratch.write("train/a/1.png", &png(5, 5, [1; 3]));
        assert!(fault(&scratch, &want()).contains("classes: expected 2 to 256"));
        scratch.write("train/b/1.png", &png(5, 5, [2; 3]));
        assert!(fault(&scratch, &want()).contains("test pictures: expected at least 1"));
        scratch.write("test/c/1.png", &png(5, 5, [3; 3]));
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
