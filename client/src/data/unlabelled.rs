//! Images without labels, to be classified: pictures, an `.npz` with one array, or a file of IDX
//! images. The readers are those of labelled data.

use std::path::Path;

use ndarray::Array4;

use super::picture::{self, Crop};
use super::{DataError, file_name, folder, idx, limits, npz, rows};

/// Images and what each is called in the answer.
#[derive(Clone, Debug)]
pub struct Unlabelled {
    /// Pixels, `rows x channels x height x width`.
    pub images: Array4<u8>,
    /// A name for each row: a picture's file name, or the row's number, from 0.
    pub names: Vec<String>,
}

/// Reads images of shape `[channels, height, width]`. Pictures are resized to it; others must have
/// it. `array` names the array of an `.npz`: by default `images`, else `test_images`.
pub fn load(
    path: &Path,
    shape: [usize; 3],
    crop: Crop,
    array: Option<&str>,
) -> Result<Unlabelled, DataError> {
    let place = path.display().to_string();
    let kind = std::fs::metadata(path).map_err(|error| DataError::read(path, &error))?;
    let name = file_name(path).to_lowercase();
    let unlabelled = if kind.is_dir() {
        pictures(path, shape, crop)?
    } else if name.ends_with(".npz") {
        numbered(npz::load_images(path, array)?)
    } else if name.contains("-idx3-") || name.contains(".idx3-") {
        numbered(idx::load_images(path)?)
    } else {
        picture::check_ending(path)?;
        decode(&[path.to_owned()], shape, crop)?
    };
    let (rows, channels, height, width) = unlabelled.images.dim();
    if rows == 0 {
        return Err(DataError::field(&place, "images", "at least 1", 0));
    }
    if [channels, height, width] != shape {
        let expected = format!("{shape:?} (channels, height, width), the network's input");
        let found = format!("{:?}", [channels, height, width]);
        return Err(DataError::field(&place, "images", expected, found));
    }
    Ok(unlabelled)
}

fn pictures(folder: &Path, shape: [usize; 3], crop: Crop) -> Result<Unlabelled, DataError> {
    let paths = folder::pictures(folder)?;
    if paths.is_empty() {
        let place = folder.display().to_string();
        return Err(DataError::field(&place, "pictures", "at least 1", 0));
    }
    decode(&paths, shape, crop)
}

fn decode(
    paths: &[std::path::PathBuf],
    shape: [usize; 3],
    crop: Crop,
) -> Result<Unlabelled, DataError> {
    let [channels, height, width] = shape;
    if !matches!(channels, 1 | 3) {
        let setting = "channels of pictures";
        return Err(DataError::setting(setting, "1 or 3", channels));
    }
    let dims = [paths.len(), channels, height, width];
    limits::check("pictures", &dims)?;
    let pixels = rows::decode_all(paths, |path| {
        let decoded = picture::decode(&picture::read(path)?, shape, crop);
        let decoded = decoded.map_err(|why| DataError::corrupt(&path.display().to_string(), why));
        Ok(decoded?.pixels)
    })?;
    let images = Array4::from_shape_vec((dims[0], channels, height, width), pixels)
        .map_err(|error| DataError::corrupt("pictures", error))?;
    let names = paths.iter().map(|path| file_name(path)).collect();
    Ok(Unlabelled { images, names })
}

fn numbered(images: Array4<u8>) -> Unlabelled {
    let names = (0..images.dim().0).map(|row| row.to_string()).collect();
    Unlabelled { images, names }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Scratch, zip};
    use super::*;
    use crate::data::{embedded_digits, subset};

    #[test]
    fn pictures_are_named_and_rows_of_arrays_are_numbered() {
        let scratch = Scratch::new();
        for (name, shade) in [("b.png", 7), ("a.png", 9)] {
            let path = scratch.path().join("pictures").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::from_pixel(5, 5, image::Luma([shade]))
                .save(path)
                .unwrap();
        }
        let read = load(
            &scratch.path().join("pictures"),
            [1, 3, 3],
            Crop::None,
            None,
        )
        .unwrap();
        assert_eq!(read.names, ["a.png", "b.png"]);
        assert_eq!(read.images[[0, 0, 2, 2]], 9);
        let one = load(
            &scratch.path().join("pictures/b.png"),
            [1, 3, 3],
            Crop::None,
            None,
        )
        .unwrap();
        assert_eq!(one.names, ["b.png"]);

        let rows = subset(&embedded_digits().unwrap().test, &[0, 1, 2]).unwrap();
        idx::write(scratch.path(), "t10k", &rows).unwrap();
        let file = scratch.path().join("t10k-images-idx3-ubyte");
        let read = load(&file, [1, 28, 28], Crop::None, None).unwrap();
        assert_eq!(read.images, rows.images);
        assert_eq!(read.names, ["0", "1", "2"]);
        let said = load(&file, [1, 32, 32], Crop::None, None)
            .unwrap_err()
            .to_string();
        assert!(said.contains("the network's input"), "{said}");
    }

    #[test]
    fn an_npz_names_its_array_and_another_is_asked_for() {
        let array = ndarray::Array3::<u8>::from_elem((2, 4, 4), 3);
        let mut bytes = Vec::new();
        ndarray_npy::WriteNpyExt::write_npy(&array, &mut bytes).unwrap();
        let scratch = Scratch::new();
        let file = scratch.write("new.npz", &zip(&[("x.npy", bytes)], true));
        let said = load(&file, [1, 4, 4], Crop::None, None)
            .unwrap_err()
            .to_string();
        assert!(said.contains("images") && said.contains('x'), "{said}");
        assert_eq!(
            load(&file, [1, 4, 4], Crop::None, Some("x"))
                .unwrap()
                .names
                .len(),
            2
        );
    }
}
