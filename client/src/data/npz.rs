//! NumPy archives in MedMNIST's layout: `train_images`, `train_labels`,
//! `val_images`, `val_labels` (both or neither), `test_images`, `test_labels`.
//! Images are bytes, `N x H x W` grey or `N x H x W x 3` colour; labels are
//! bytes, `N` or `N x 1`. Nothing is converted silently: another element type
//! is an error that says how to write the right one.
//!
//! Next: [`super::zip`], which unpacks the members.

use std::path::Path;

use ndarray::{Array4, ArrayD, ArrayViewD, Ix4};
use ndarray_npy::{ViewNpyError, ViewNpyExt};

use super::split::Part;
use super::zip::Archive;
use super::{DataError, Dataset, Parts, Splits, Want, limits};

/// NumPy writes 128 bytes for our arrays; a longer header is no array of ours.
const MAX_HEADER_BYTES: usize = 4096;
/// A dictionary that holds a tuple. More would only serve to exhaust the stack
/// of the parser.
const MAX_NESTING: usize = 4;

/// Reads an archive.
pub fn load(file: &Path, want: &Want) -> Result<Splits, DataError> {
    let mut archive = Archive::open(file)?;
    let name = file.display().to_string();
    let train = read_split(&mut archive, &name, "train")?;
    let has_validation = archive.names().any(|member| member.starts_with("val_"));
    let validation = if has_validation {
        Some(read_split(&mut archive, &name, "val")?)
    } else {
        None
    };
    let test = read_split(&mut archive, &name, "test")?;
    super::assemble(train, validation, test, want, &format!("arrays of {name}"))
}

/// The images of an archive without labels: the named array, else `images`, else `test_images`.
pub(super) fn load_images(file: &Path, array: Option<&str>) -> Result<Array4<u8>, DataError> {
    let mut archive = Archive::open(file)?;
    let has = |name: &str| {
        archive
            .names()
            .any(|member| member == format!("{name}.npy"))
    };
    let array = match array {
        Some(array) => array,
        None if !has("images") && has("test_images") => "test_images",
        None => "images",
    };
    read_images(&mut archive, &file.display().to_string(), array).map(|(_, images)| images)
}

/// All members of an archive, unpacked.
pub(crate) fn members(file: &Path) -> Result<Vec<(String, Vec<u8>)>, DataError> {
    let mut archive = Archive::open(file)?;
    let names: Vec<String> = archive.names().map(str::to_owned).collect();
    let read = names.into_iter().map(|name| {
        let content = archive.member(&name)?.unwrap_or_default();
        check_header(&name, &content)?;
        Ok((name, content))
    });
    read.collect()
}

fn read_images(
    archive: &mut Archive,
    name: &str,
    array: &str,
) -> Result<(String, Array4<u8>), DataError> {
    let (images_name, images) = read_array(archive, name, array)?;
    let images = match images.ndim() {
        3 => images.insert_axis(ndarray::Axis(1)),
        4 if matches!(images.shape()[3], 1 | 3) => images.permuted_axes(vec![0, 3, 1, 2]),
        _ => {
            let expected = "(N, height, width) or (N, height, width, 3)";
            let found = format!("{:?}", images.shape());
            return Err(DataError::field(&images_name, "shape", expected, found));
        }
    };
    let images = images.as_standard_layout().into_owned();
    let images = images
        .into_dimensionality::<Ix4>()
        .map_err(|error| DataError::corrupt(&images_name, error))?;
    Ok((images_name, images))
}

/// Reads one part of an archive; the others need not be there.
pub(super) fn load_part(file: &Path, want: &Want, part: Part) -> Result<Dataset, DataError> {
    let mut archive = Archive::open(file)?;
    let name = file.display().to_string();
    let split = match part {
        Part::Train => "train",
        Part::Validation => "val",
        Part::Test => "test",
    };
    let parts = read_split(&mut archive, &name, split)?;
    super::assemble_one(parts, want, &format!("arrays of {name}"), part)
}

fn read_split(archive: &mut Archive, name: &str, split: &str) -> Result<Parts, DataError> {
    let (_, images) = read_images(archive, name, &format!("{split}_images"))?;
    let (labels_name, labels) = read_array(archive, name, &format!("{split}_labels"))?;
    if !matches!(labels.shape(), [_] | [_, 1]) {
        let expected = "(N) or (N, 1), one class for each image";
        let found = format!("{:?}", labels.shape());
        return Err(DataError::field(&labels_name, "shape", expected, found));
    }
    if labels.len() != images.dim().0 {
        let expected = format!("{}, one for each of {split}_images", images.dim().0);
        return Err(DataError::field(
            &labels_name,
            "number of labels",
            expected,
            labels.len(),
        ));
    }
    Ok(Parts {
        images,
        labels: labels.iter().copied().collect(),
        labels_name,
    })
}

/// Reads one array of bytes; also returns its name for the errors that follow.
fn read_array(
    archive: &mut Archive,
    file: &str,
    array: &str,
) -> Result<(String, ArrayD<u8>), DataError> {
    let place = format!("{file}, array {array}");
    let Some(bytes) = archive.member(&format!("{array}.npy"))? else {
        let names = archive.names().take(16);
        let found = names
            .map(|name| name.trim_end_matches(".npy"))
            .collect::<Vec<_>>()
            .join(", ");
        return Err(DataError::field(
            file,
            "arrays",
            format!("one called {array}"),
            found,
        ));
    };
    parse_npy(&place, &bytes).map(|parsed| (place, parsed))
}

/// Parses an `.npy` of bytes. The array is viewed in place first, so that a
/// header's shape never decides about an allocation.
fn parse_npy(place: &str, bytes: &[u8]) -> Result<ArrayD<u8>, DataError> {
    check_header(place, bytes)?;
    let view = ArrayViewD::<u8>::view_npy(bytes).map_err(|error| match error {
        ViewNpyError::WrongDescriptor(found) => wrong_type(place, found),
        ViewNpyError::MissingBytes(missing) => DataError::field(
            place,
            "data",
            "as many bytes as the shape says",
            format!("{missing} too few"),
        ),
        ViewNpyError::ExtraBytes(extra) => DataError::field(
            place,
            "data",
            "as many bytes as the shape says",
            format!("{extra} too many"),
        ),
        other => DataError::corrupt(place, other),
    })?;
    limits::check(place, view.shape())?;
    Ok(view.as_standard_layout().into_owned())
}

fn wrong_type(place: &str, found: impl ToString) -> DataError {
    let expected = "unsigned bytes, '|u1' (in NumPy: array.astype(numpy.uint8))";
    DataError::field(place, "element type", expected, found)
}

fn check_header(place: &str, bytes: &[u8]) -> Result<(), DataError> {
    let header = match bytes {
        [0x93, b'N', b'U', b'M', b'P', b'Y', 1, 0, a, b, rest @ ..] => {
            Some((usize::from(u16::from_le_bytes([*a, *b])), rest))
        }
        [
            0x93,
            b'N',
            b'U',
            b'M',
            b'P',
            b'Y',
            2 | 3,
            0,
            a,
            b,
            c,
            d,
            rest @ ..,
        ] => Some((u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest)),
        _ => None,
    };
    let Some((length, rest)) = header else {
        return Err(DataError::field(
            place,
            "magic number",
            "93 'NUMPY' and a version from 1 to 3",
            bytes
                .iter()
                .take(8)
                .map(|byte| format!("{byte:02x} "))
                .collect::<String>(),
        ));
    };
    if length > MAX_HEADER_BYTES || length > rest.len() {
        let most = MAX_HEADER_BYTES.min(rest.len());
        return Err(DataError::field(
            place,
            "header",
            format!("at most {most} bytes"),
            length,
        ));
    }
    let mut depth = 0usize;
    for byte in &rest[..length] {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(DataError::corrupt(place, "its header is nested too deeply"));
        }
    }
    // The parser multiplies the shape's numbers; with a 0 among them it would not
    // notice that the others overflow. Here every number of the header counts.
    let numbers = rest[..length]
        .split(|byte| !byte.is_ascii_digit())
        .filter(|run| !run.is_empty());
    let mut product = 1u64;
    for run in numbers {
        let number = run.iter().fold(0u64, |sum, digit| {
            sum.saturating_mul(10)
                .saturating_add(u64::from(digit - b'0'))
        });
        product = product.saturating_mul(number.max(1));
    }
    // Eight for the widest element type, whose width is one of the numbers.
    if product > 8 * limits::MAX_BYTES {
        let most = format!("a shape of at most {} bytes", limits::MAX_BYTES);
        let found = String::from_utf8_lossy(&rest[..length.min(160)])
            .trim()
            .to_owned();
        return Err(DataError::field(place, "header", most, found));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, Array2, Array3, Array4, Ix3};
    use ndarray_npy::{WritableElement, WriteNpyExt};

    use super::super::testing::{Scratch, zip};
    use super::*;

    fn npy<T: WritableElement, D: ndarray::Dimension>(array: &Array<T, D>) -> Vec<u8> {
        let mut bytes = Vec::new();
        array.write_npy(&mut bytes).unwrap();
        bytes
    }

    fn small(rows: usize) -> Array3<u8> {
        Array::from_shape_fn((rows, 4, 5), |(n, h, w)| (n * 20 + h * 5 + w) as u8)
    }

    fn column(labels: &[u8]) -> Array2<u8> {
        Array2::from_shape_vec((labels.len(), 1), labels.to_vec()).unwrap()
    }

    /// MedMNIST's six members for a tiny data set.
    fn members() -> Vec<(&'static str, Vec<u8>)> {
        vec![
            ("train_images.npy", npy(&small(4))),
            ("train_labels.npy", npy(&column(&[0, 1, 1, 0]))),
            ("val_images.npy", npy(&small(1))),
            ("val_labels.npy", npy(&column(&[1]))),
            ("test_images.npy", npy(&small(2))),
            ("test_labels.npy", npy(&column(&[1, 0]))),
        ]
    }

    fn replaced(name: &'static str, bytes: Vec<u8>) -> Vec<(&'static str, Vec<u8>)> {
        let mut members = members();
        let at = members.iter().position(|member| member.0 == name).unwrap();
        members[at].1 = bytes;
        members
    }

    fn read(archive: &[u8]) -> Result<Splits, String> {
        let scratch = Scratch::new();
        let path = scratch.write("set.npz", archive);
        load(&path, &Want::default()).map_err(|error| error.to_string())
    }

    fn fault(archive: &[u8]) -> String {
        read(archive).map(|_| ()).unwrap_err()
    }

    #[test]
    fn stored_and_deflated_archives_read_alike() {
        for deflate in [false, true] {
            let splits = read(&zip(&members(), deflate)).unwrap();
            assert_eq!(splits.train.images.dim(), (4, 1, 4, 5));
            assert_eq!(splits.train.images[[3, 0, 3, 4]], 79);
            assert_eq!(splits.train.labels, [0, 1, 1, 0]);
            assert_eq!(splits.validation.unwrap().labels, [1]);
            assert_eq!(splits.test.labels, [1, 0]);
            assert_eq!(splits.test.classes, 2);
        }
    }

    #[test]
    fn colour_images_come_with_three_channels_first() {
        let colour = |rows| {
            Array4::<u8>::from_shape_fn((rows, 4, 5, 3), |(n, h, w, c)| {
                (n * 60 + h * 15 + w * 3 + c) as u8
            })
        };
        let mut set = members();
        for (at, rows) in [(0, 4), (2, 1), (4, 2)] {
            set[at].1 = npy(&colour(rows));
        }
        let images = read(&zip(&set, true)).unwrap().train.images;
        assert_eq!(images.dim(), (4, 3, 4, 5));
        assert_eq!(images[[2, 1, 3, 4]], (2 * 60 + 3 * 15 + 4 * 3 + 1) as u8);
        assert!(images.is_standard_layout());
    }

    #[test]
    fn fortran_order_and_flat_labels_are_read() {
        let mut transposed = Array3::<u8>::zeros(ndarray::ShapeBuilder::f(Ix3(4, 4, 5)));
        transposed.assign(&small(4));
        let mut set = replaced("train_images.npy", npy(&transposed));
        assert!(String::from_utf8_lossy(&set[0].1).contains("'fortran_order': True"));
        set[1].1 = npy(&ndarray::arr1(&[0u8, 1, 1, 0]));
        let splits = read(&zip(&set, true)).unwrap();
        assert_eq!(
            splits.train.images,
            read(&zip(&members(), true)).unwrap().train.images
        );
    }

    #[test]
    fn a_missing_array_is_named_beside_those_present() {
        let mut set = members();
        set.remove(1);
        let said = fault(&zip(&set, true));
        assert!(
            said.contains("expected one called train_labels, found train_images, val_images"),
            "{said}"
        );
        let mut set = members();
        set.remove(3);
        assert!(fault(&zip(&set, true)).contains("one called val_labels"));
    }

    #[test]
    fn a_wrong_element_type_is_named_with_the_remedy() {
        let said = fault(&zip(
            &replaced("test_images.npy", npy(&small(2).mapv(f32::from))),
            true,
        ));
        assert!(
            said.contains("array test_images: element type: expected unsigned bytes"),
            "{said}"
        );
        assert!(said.contains("<f4"), "{said}");
        let said = fault(&zip(
            &replaced(
                "train_labels.npy",
                npy(&column(&[0, 1, 1, 0]).mapv(i64::from)),
            ),
            true,
        ));
        assert!(said.contains("array train_labels: element type"), "{said}");
    }

    #[test]
    fn labels_that_do_not_match_are_named() {
        let said = fault(&zip(
            &replaced("train_labels.npy", npy(&column(&[0, 1]))),
            true,
        ));
        assert!(
            said.contains("number of labels: expected 4, one for each of train_images, found 2"),
            "{said}"
        );
        let several = Array2::<u8>::zeros((4, 14));
        let said = fault(&zip(&replaced("train_labels.npy", npy(&several)), true));
        assert!(said.contains("found [4, 14]"), "{said}");
        let said = fault(&zip(
            &replaced("test_labels.npy", npy(&column(&[1, 9]))),
            true,
        ));
        assert!(
            said.contains("array test_labels: label, row 1: expected 0 to 1, found 9"),
            "{said}"
        );
    }

    #[test]
    fn shapes_that_are_no_images_are_named() {
        let volume = Array4::<u8>::zeros((4, 5, 5, 5));
        assert!(
            fault(&zip(&replaced("train_images.npy", npy(&volume)), true))
                .contains("found [4, 5, 5, 5]")
        );
        let flat = Array2::<u8>::zeros((4, 25));
        assert!(
            fault(&zip(&replaced("train_images.npy", npy(&flat)), true)).contains("found [4, 25]")
        );
    }

    fn header(dictionary: &str) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((dictionary.len() as u16).to_le_bytes());
        bytes.extend(dictionary.as_bytes());
        bytes
    }

    #[test]
    fn hostile_headers_end_in_errors() {
        let shapes = [
            "(4611686018427387904, 28, 28)",
            "(0, 4611686018427387904, 4)",
            "(99999999999999999999999999, 28, 28)",
            "(16777216, 16384, 16384)",
            "(1000000, 28, 28)",
            "(-1, 28, 28)",
            "(0, 28, 28)",
            "()",
        ];
        for shape in shapes {
            let text = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n");
            let said = fault(&zip(&replaced("train_images.npy", header(&text)), true));
            assert!(said.contains("train_images"), "{shape}: {said}");
        }
        let nested = format!("{{'descr': {}", "(".repeat(3000));
        let said = fault(&zip(&replaced("train_images.npy", header(&nested)), true));
        assert!(said.contains("nested too deeply"), "{said}");
        let said = fault(&zip(
            &replaced("train_images.npy", header(&"(".repeat(60_000))),
            true,
        ));
        assert!(
            said.contains("header: expected at most 4096 bytes"),
            "{said}"
        );
        let mut wide = b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec();
        wide.extend(b"{}");
        assert!(
            fault(&zip(&replaced("train_images.npy", wide), true)).contains("found 4294967295")
        );
        for bytes in [&b""[..], b"\x93NUMPY", b"\x89PNG\r\n\x1a\n...."] {
            let said = fault(&zip(&replaced("train_images.npy", bytes.to_vec()), false));
            assert!(said.contains("magic number"), "{said}");
        }
    }

    #[test]
    fn truncated_and_overlong_arrays_are_named() {
        let mut bytes = npy(&small(4));
        bytes.pop();
        assert!(
            fault(&zip(&replaced("train_images.npy", bytes.clone()), true)).contains("1 too few")
        );
        bytes.extend([0, 0]);
        assert!(fault(&zip(&replaced("train_images.npy", bytes), true)).contains("1 too many"));
    }

    #[test]
    fn an_archive_cut_or_changed_anywhere_never_panics() {
        let whole = zip(&members(), true);
        for cut in 0..whole.len() {
            read(&whole[..cut]).map(|_| ()).unwrap_err();
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            let _ = read(&changed); // dates and the like may change unnoticed
        }
        assert!(fault(b"not an archive at all, but long enough").contains("no end record"));
    }

    #[test]
    fn a_changed_byte_of_the_data_is_met_by_the_checksum() {
        let mut archive = zip(&members(), false);
        let at = archive
            .windows(4)
            .position(|four| four == [1, 2, 3, 4])
            .unwrap();
        archive[at] ^= 1;
        assert!(fault(&archive).contains("CRC-32"));
    }

    #[test]
    fn a_member_that_claims_gigabytes_is_refused() {
        let mut archive = zip(&members(), true);
        let at = archive
            .windows(4)
            .position(|four| four == b"PK\x01\x02")
            .unwrap();
        archive[at + 24..at + 28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(fault(&archive).contains("size: expected at most"));
    }
}
