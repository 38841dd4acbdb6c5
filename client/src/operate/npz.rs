//! Writes weights as an `.npz` archive: members stored, no compression, for NumPy and others.

use anyhow::{Context, Result};
use flate2::Crc;
use ndarray::{ArrayD, IxDyn};
use ndarray_npy::WriteNpyExt;

/// The archive's bytes. Names become `NAME.npy`.
pub fn archive(arrays: &[(String, Vec<usize>, Vec<f64>)]) -> Result<Vec<u8>> {
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    let four = |n: usize| u32::try_from(n).context("weights of 4 GiB and more fit no .npz file");
    for (name, shape, values) in arrays {
        let array = ArrayD::from_shape_vec(IxDyn(shape), values.clone())?;
        let mut content = Vec::new();
        array.write_npy(&mut content)?;
        let name = format!("{name}.npy");
        let mut crc = Crc::new();
        crc.update(&content);
        let size = four(content.len())?.to_le_bytes();
        // Version needed, flags, method (stored), time, date (1 January 1980).
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        common.extend(crc.sum().to_le_bytes());
        common.extend(size);
        common.extend(size);
        common.extend(u16::try_from(name.len())?.to_le_bytes());
        common.extend([0, 0]);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(four(archive.len())?.to_le_bytes());
        directory.extend(name.as_bytes());
        archive.extend(b"PK\x03\x04");
        archive.extend(&common);
        archive.extend(name.as_bytes());
        archive.extend(content);
    }
    let count = u16::try_from(arrays.len())?.to_le_bytes();
    let (offset, length) = (four(archive.len())?, four(directory.len())?);
    archive.extend(&directory);
    archive.extend(b"PK\x05\x06\0\0\0\0");
    archive.extend(count);
    archive.extend(count);
    archive.extend(length.to_le_bytes());
    archive.extend(offset.to_le_bytes());
    archive.extend([0, 0]);
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use ndarray_npy::ReadNpyExt;

    use super::*;

    #[test]
    fn an_independent_reader_finds_the_arrays() {
        let arrays = [
            ("a.weight".to_owned(), vec![2, 1], vec![0.5, -1.25]),
            ("a.bias".to_owned(), vec![1], vec![3.0]),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.npz");
        std::fs::write(&path, archive(&arrays).unwrap()).unwrap();
        // The reader of data sets, which checks lengths and CRC-32.
        let members = crate::data::npz::members(&path).unwrap();
        for ((name, shape, values), (found, bytes)) in arrays.iter().zip(members) {
            assert_eq!(found, format!("{name}.npy"));
            let array = ArrayD::<f64>::read_npy(bytes.as_slice()).unwrap();
            assert_eq!(array.shape(), shape.as_slice());
            assert_eq!(array.into_raw_vec_and_offset().0, *values);
        }
    }
}
