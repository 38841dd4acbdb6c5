//! The IDX format of MNIST: a big-endian header (two zero bytes, element type,
//! number of dimensions, then each dimension as u32) and the elements, raw or
//! in gzip. Only unsigned bytes are read: images `N x H x W`, labels `N`.
//!
//! A header is believed only within [`super::limits`], and memory grows with
//! the data that is really there, never with what a header promises.
//!
//! Next: [`super::npz`], [`super::folder`].

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use ndarray::Array4;

use super::split::Part;
use super::{DataError, Dataset, Parts, Splits, Want, limits};

/// The element type "unsigned byte".
const UNSIGNED_BYTE: u8 = 0x08;

/// Reads a folder with MNIST's four files, each raw or as `.gz`. The format has
/// no validation split.
pub fn load(folder: &Path, want: &Want) -> Result<Splits, DataError> {
    let train = read_pair(folder, "train")?;
    let test = read_pair(folder, "t10k")?;
    super::assemble(
        train,
        None,
        test,
        want,
        &format!("IDX files in {}", folder.display()),
    )
}

/// Reads one part of a folder; the other's files need not be there.
pub(super) fn load_part(folder: &Path, want: &Want, part: Part) -> Result<Dataset, DataError> {
    let name = folder.display().to_string();
    let prefix = match part {
        Part::Train => "train",
        Part::Test => "t10k",
        Part::Validation => {
            let expected = "train or test: the format has no validation split";
            return Err(DataError::field(&name, "part", expected, part.name()));
        }
    };
    let parts = read_pair(folder, prefix)?;
    super::assemble_one(parts, want, &format!("IDX files in {name}"), part)
}

/// Whether `folder` looks like a folder of MNIST's files.
pub fn is_idx_folder(folder: &Path) -> bool {
    let images = |prefix| candidates(folder, prefix, "images");
    images("train")
        .iter()
        .chain(&images("t10k"))
        .any(|path| path.is_file())
}

fn read_pair(folder: &Path, prefix: &str) -> Result<Parts, DataError> {
    let images = find(folder, prefix, "images")?;
    let labels = find(folder, prefix, "labels")?;
    parse_pair(
        &images.display().to_string(),
        open(&images)?,
        &labels.display().to_string(),
        open(&labels)?,
    )
}

/// Reads a pair of IDX streams, images and labels; gzip is recognised by its
/// first bytes. The names are for the errors.
pub(super) fn parse_pair(
    images_name: &str,
    images: impl Read,
    labels_name: &str,
    labels: impl Read,
) -> Result<Parts, DataError> {
    let (dims, pixels) = parse(images_name, images, 3)?;
    let (rows, height, width) = (dims[0], dims[1], dims[2]);
    let (label_dims, labels) = parse(labels_name, labels, 1)?;
    if label_dims[0] != rows {
        return Err(DataError::field(
            labels_name,
            "number of labels",
            format!("{rows}, one for each image in {images_name}"),
            label_dims[0],
        ));
    }
    let images = Array4::from_shape_vec((rows, 1, height, width), pixels)
        .map_err(|error| DataError::corrupt(images_name, error))?;
    Ok(Parts {
        images,
        labels,
        labels_name: labels_name.to_owned(),
    })
}

/// The images of one file, without labels.
pub(super) fn load_images(file: &Path) -> Result<Array4<u8>, DataError> {
    let name = file.display().to_string();
    let (dims, pixels) = parse(&name, open(file)?, 3)?;
    Array4::from_shape_vec((dims[0], 1, dims[1], dims[2]), pixels)
        .map_err(|error| DataError::corrupt(&name, error))
}

/// MNIST's name, raw and compressed, and the spelling with a dot that some
/// unpackers leave.
fn candidates(folder: &Path, prefix: &str, what: &str) -> [PathBuf; 4] {
    let ndim = if what == "images" { 3 } else { 1 };
    [
        folder.join(format!("{prefix}-{what}-idx{ndim}-ubyte.gz")),
        folder.join(format!("{prefix}-{what}-idx{ndim}-ubyte")),
        folder.join(format!("{prefix}-{what}.idx{ndim}-ubyte.gz")),
        folder.join(format!("{prefix}-{what}.idx{ndim}-ubyte")),
    ]
}

fn find(folder: &Path, prefix: &str, what: &str) -> Result<PathBuf, DataError> {
    let candidates = candidates(folder, prefix, what);
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(DataError::field(
            &folder.display().to_string(),
            &format!("{prefix} {what}"),
            candidates.map(|path| super::file_name(&path)).join(" or "),
            "no such file",
        )),
    }
}

fn open(path: &Path) -> Result<BufReader<File>, DataError> {
    File::open(path)
        .map(BufReader::new)
        .map_err(|error| DataError::read(path, &error))
}

/// Reads one IDX stream of unsigned bytes with `ndim` dimensions.
fn parse(
    name: &str,
    mut source: impl Read,
    ndim: usize,
) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let mut first = Vec::with_capacity(2);
    let took = source.by_ref().take(2).read_to_end(&mut first);
    took.map_err(|error| DataError::corrupt(name, error))?;
    let gzip = first == [0x1f, 0x8b];
    let whole = first.as_slice().chain(source);
    if gzip {
        parse_raw(name, MultiGzDecoder::new(whole), ndim)
    } else {
        parse_raw(name, whole, ndim)
    }
}

fn parse_raw(
    name: &str,
    mut source: impl Read,
    ndim: usize,
) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let size = 4 + 4 * ndim;
    let header = read_at_most(name, &mut source, size as u64)?;
    if header.len() >= 4 {
        let expected = [0, 0, UNSIGNED_BYTE, ndim as u8];
        if header[..4] != expected {
            return Err(DataError::field(
                name,
                "magic number",
                hex(&expected),
                hex(&header[..4]),
            ));
        }
    }
    if header.len() < size {
        return Err(DataError::field(
            name,
            "header",
            format!("{size} bytes"),
            header.len(),
        ));
    }
    let dims: Vec<usize> = header[4..]
        .chunks_exact(4)
        .map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize)
        .collect();
    let bytes = limits::check(name, &dims)?;
    // One byte more than promised: it tells "longer than the header says", and
    // reading up to the end is what makes gzip compare its checksum.
    let data = read_at_most(name, &mut source, bytes + 1)?;
    if data.len() as u64 != bytes {
        let found = if data.len() as u64 > bytes {
            "more".to_owned()
        } else {
            data.len().to_string()
        };
        return Err(DataError::field(
            name,
            "data",
            format!("{bytes} bytes as the header's {dims:?} says"),
            found,
        ));
    }
    Ok((dims, data))
}

fn read_at_most(name: &str, source: &mut impl Read, bytes: u64) -> Result<Vec<u8>, DataError> {
    let mut data = Vec::new();
    match source.by_ref().take(bytes).read_to_end(&mut data) {
        Ok(_) => Ok(data),
        // A cut gzip stream ends here; a cut raw file is met by its length.
        Err(error) => Err(DataError::corrupt(
            name,
            format!("{error} after {} bytes", data.len()),
        )),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Writes a data set's split in IDX, raw: for tools and tests.
pub fn write(folder: &Path, prefix: &str, data: &Dataset) -> Result<(), DataError> {
    let (rows, channels, height, width) = data.images.dim();
    if channels != 1 {
        return Err(DataError::setting("channels of an IDX file", 1, channels));
    }
    let dims = |list: &[usize]| -> Result<Vec<u8>, DataError> {
        let mut head = vec![0, 0, UNSIGNED_BYTE, list.len() as u8];
        for &dim in list {
            let dim = u32::try_from(dim)
                .map_err(|_| DataError::setting("dimension of an IDX file", "below 2^32", dim))?;
            head.extend(dim.to_be_bytes());
        }
        Ok(head)
    };
    let mut images = dims(&[rows, height, width])?;
    images.extend(data.images.iter());
    let mut labels = dims(&[rows])?;
    labels.extend(&data.labels);
    for (name, content) in [("images-idx3", images), ("labels-idx1", labels)] {
        let path = folder.join(format!("{prefix}-{name}-ubyte"));
        std::fs::write(&path, content).map_err(|error| DataError::read(&path, &error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn idx(dims: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, dims.len() as u8];
        dims.iter().for_each(|dim| bytes.extend(dim.to_be_bytes()));
        bytes.extend(data);
        bytes
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn pair(images: &[u8], labels: &[u8]) -> Result<Parts, String> {
        parse_pair("images", images, "labels", labels).map_err(|error| error.to_string())
    }

    fn fault(images: &[u8], labels: &[u8]) -> String {
        pair(images, labels).map(|_| ()).unwrap_err()
    }

    #[test]
    fn raw_and_gzip_read_alike() {
        let images = idx(&[2, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]);
        let labels = idx(&[2], &[1, 0]);
        for (images, labels) in [
            (images.clone(), labels.clone()),
            (gzip(&images), gzip(&labels)),
        ] {
            let parts = pair(&images, &labels).unwrap();
            assert_eq!(parts.images.dim(), (2, 1, 2, 3));
            assert_eq!(parts.images[[1, 0, 1, 2]], 255);
            assert_eq!(parts.labels, [1, 0]);
        }
    }

    #[test]
    fn a_wrong_magic_number_is_named() {
        let labels = idx(&[1], &[0]);
        let said = fault(&labels, &labels);
        assert_eq!(
            said,
            "images: magic number: expected 00 00 08 03, found 00 00 08 01"
        );
        let mut floats = idx(&[1, 1, 1], &[0]);
        floats[2] = 0x0d;
        assert!(fault(&floats, &labels).contains("found 00 00 0d 03"));
    }

    #[test]
    fn a_truncated_file_is_named_with_its_length() {
        let images = idx(&[2, 2, 2], &[0; 8]);
        let labels = idx(&[2], &[0, 1]);
        assert!(fault(&images[..images.len() - 1], &labels).contains("expected 8 bytes"));
        assert!(fault(&images, &labels[..labels.len() - 1]).starts_with("labels: data"));
        assert!(fault(&images[..9], &labels).contains("header: expected 16 bytes, found 9"));
        assert!(fault(&[], &labels).contains("header: expected 16 bytes, found 0"));
        let packed = gzip(&images);
        assert!(fault(&packed[..packed.len() - 9], &labels).starts_with("images: corrupt"));
    }

    #[test]
    fn bytes_after_the_data_are_refused() {
        let labels = idx(&[1], &[0]);
        assert!(fault(&idx(&[1, 1, 1], &[0, 0]), &labels).ends_with("found more"));
    }

    #[test]
    fn a_flipped_bit_in_gzip_is_met_by_its_checksum() {
        let labels = idx(&[1], &[0]);
        let mut packed = gzip(&idx(&[1, 16, 16], &[7; 256]));
        let at = packed.len() - 6; // inside the stored CRC
        packed[at] ^= 1;
        assert!(fault(&packed, &labels).starts_with("images: corrupt"));
    }

    #[test]
    fn a_header_that_promises_terabytes_allocates_nothing() {
        let labels = idx(&[1], &[0]);
        for dims in [
            [u32::MAX, u32::MAX, u32::MAX],
            [u32::MAX, 28, 28],
            [1, u32::MAX, 1],
            [1 << 20, 4096, 4096],
        ] {
            let said = fault(&idx(&dims, &[]), &labels);
            assert!(said.contains("expected at most"), "{said}");
        }
        // Within the limits, but not there: nothing near 1 GiB is allocated first.
        let said = fault(&idx(&[1 << 20, 32, 32], &[1, 2, 3]), &labels);
        assert!(said.ends_with("found 3"), "{said}");
    }

    #[test]
    fn empty_images_are_refused() {
        let labels = idx(&[0], &[]);
        assert!(fault(&idx(&[0, 28, 28], &[]), &labels).contains("expected at least 1"));
        assert!(fault(&idx(&[5, 0, 28], &[]), &labels).contains("expected at least 1"));
    }

    #[test]
    fn a_count_of_labels_that_does_not_match_names_both_files() {
        let said = fault(&idx(&[2, 1, 1], &[0, 0]), &idx(&[3], &[0, 0, 0]));
        assert_eq!(
            said,
            "labels: number of labels: expected 2, one for each image in images, found 3"
        );
    }
}
