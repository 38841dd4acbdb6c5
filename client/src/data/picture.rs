//! One picture's file as pixels of the size that a network reads: decode, crop, resize, in this
//! order (docs/data.md). Of the file nothing else is kept: no text, no date, no thumbnail, no
//! orientation.
//!
//! The format is told by the content. A file that is broken, or claims a size beyond the bounds, is
//! an error; whatever a decoder does to it, it costs no more than that.

use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, Limits};

use super::dicom::{self, Shown};
use super::{DataError, file_name, limits};

/// The endings of files that are read as pictures.
const ENDINGS: [&str; 8] = ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "dcm", "dicom"];

/// A picture as the network reads it, before normalisation.
pub(super) struct Picture {
    /// `channels x height x width` bytes, row-major.
    pub pixels: Vec<u8>,
    /// It has more than 8 bits, and its own smallest and largest value became black and white.
    pub stretched: bool,
}

/// How a picture is brought to the network's proportions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Crop {
    /// It is not: resizing changes its proportions.
    #[default]
    None,
    /// The largest rectangle of the network's proportions in its middle.
    Centre,
}

/// Checks that a file may be a picture: by its ending, or, as archives of DICOM files seldom have
/// one, by its first bytes.
pub(super) fn check_ending(path: &Path) -> Result<(), DataError> {
    let ending = path
        .extension()
        .map(|ending| ending.to_string_lossy().to_lowercase());
    let known = ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str()));
    if known || starts_as_dicom(path) {
        return Ok(());
    }
    let expected = format!("a picture ({}, or a DICOM file)", ENDINGS.join(", "));
    Err(DataError::field(
        &path.display().to_string(),
        "file",
        expected,
        file_name(path),
    ))
}

fn starts_as_dicom(path: &Path) -> bool {
    let mut start = [0; dicom::START_BYTES];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut start));
    read.is_ok() && dicom::is_dicom(&start)
}

/// Reads a picture's file, within the bounds.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, DataError> {
    let about = std::fs::metadata(path).map_err(|error| DataError::read(path, &error))?;
    if !about.is_file() {
        let place = path.display().to_string();
        return Err(DataError::field(&place, "kind", "a file", "something else"));
    }
    if about.len() > limits::MAX_PICTURE_FILE_BYTES {
        let most = format!("at most {} bytes", limits::MAX_PICTURE_FILE_BYTES);
        return Err(DataError::field(
            &path.display().to_string(),
            "size",
            most,
            about.len(),
        ));
    }
    std::fs::read(path).map_err(|error| DataError::read(path, &error))
}

/// Decodes a file's content for a network that reads `[channels, height, width]`; the error says
/// what stands against it.
pub(super) fn decode(
    content: &[u8],
    [channels, height, width]: [usize; 3],
    crop: Crop,
) -> Result<Picture, String> {
    // A decoder's defect must not cost the hospital the list of its other files.
    let shown = catch_unwind(AssertUnwindSafe(|| match dicom::is_dicom(content) {
        true => dicom::decode(content),
        false => common(content),
    }));
    let shown = shown.map_err(|_| "a decoder failed on it")??;
    let picture = match channels {
        1 => shown.picture.into_luma8().into(),
        _ => shown.picture.into_rgb8().into(),
    };
    let picture = fit(picture, width as u32, height as u32, crop); // at most MAX_SIDE
    let pixels = match channels {
        1 => picture.into_luma8().into_raw(),
        _ => {
            let pixels = picture.into_rgb8().into_raw();
            let of = |channel| pixels.iter().skip(channel).step_by(3).copied();
            (0..3).flat_map(of).collect()
        }
    };
    let stretched = shown.stretched;
    Ok(Picture { pixels, stretched })
}

/// PNG, JPEG, BMP, TIFF.
fn common(content: &[u8]) -> Result<Shown, String> {
    let mut bounds = Limits::default();
    bounds.max_image_width = Some(limits::MAX_SIDE as u32);
    bounds.max_image_height = Some(limits::MAX_SIDE as u32);
    bounds.max_alloc = Some(8 * limits::MAX_PICTURE_PIXELS);
    let reader = ImageReader::new(Cursor::new(content)).with_guessed_format();
    let mut reader = reader.map_err(|error| error.to_string())?;
    reader.limits(bounds);
    let picture = reader.decode().map_err(|error| error.to_string())?;
    let picture = match picture {
        DynamicImage::ImageLuma16(_) | DynamicImage::ImageLumaA16(_) => {
            let grey = picture.into_luma16();
            let pixels = stretch(grey.as_raw());
            image::GrayImage::from_raw(grey.width(), grey.height(), pixels).map(Into::into)
        }
        DynamicImage::ImageRgb16(_) | DynamicImage::ImageRgba16(_) => {
            let colour = picture.into_rgb16();
            let pixels = stretch(colour.as_raw());
            image::RgbImage::from_raw(colour.width(), colour.height(), pixels).map(Into::into)
        }
        DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_) => {
            return Err("its pixels are floating-point numbers: 8 to 16 bits are read".into());
        }
        picture => {
            let stretched = false;
            return Ok(Shown { picture, stretched });
        }
    };
    Ok(Shown {
        picture: picture.ok_or("the pixels are too few")?,
        stretched: true,
    })
}

/// 16 bits to 8: the smallest value becomes 0 and the largest 255, rounded. A fixed shift would
/// leave sixteen shades of a picture that uses 12 of its 16 bits.
fn stretch(values: &[u16]) -> Vec<u8> {
    let low = values.iter().copied().min().unwrap_or(0);
    let high = values.iter().copied().max().unwrap_or(0);
    let range = u32::from(high - low).max(1);
    let shade = |value: &u16| ((u32::from(value - low) * 255 + range / 2) / range) as u8;
    values.iter().map(shade).collect()
}

fn fit(picture: DynamicImage, width: u32, height: u32, crop: Crop) -> DynamicImage {
    let (has_width, has_height) = (u64::from(picture.width()), u64::from(picture.height()));
    let (w, h) = (u64::from(width), u64::from(height));
    let picture = match crop {
        Crop::Centre if has_width * h != has_height * w => {
            // The side that is too long, in whole pixels; at least one.
            let keep_width = has_width.min((has_height * w / h).max(1)) as u32;
            let keep_height = has_height.min((has_width * h / w).max(1)) as u32;
            let left = (picture.width() - keep_width) / 2;
            let top = (picture.height() - keep_height) / 2;
            picture.crop_imm(left, top, keep_width, keep_height)
        }
        _ => picture,
    };
    if (picture.width(), picture.height()) == (width, height) {
        return picture;
    }
    picture.resize_exact(width, height, FilterType::Triangle)
}

#[cfg(test)]
mod tests {
    use image::{ExtendedColorType, ImageEncoder, ImageFormat, Luma, Rgb};

    use super::*;

    type Grey16 = image::ImageBuffer<Luma<u16>, Vec<u16>>;
    type Rgb16 = image::ImageBuffer<Rgb<u16>, Vec<u16>>;

    fn file(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        picture.write_to(&mut out, format).unwrap();
        out.into_inner()
    }

    fn grey(content: &[u8], height: usize, width: usize, crop: Crop) -> Vec<u8> {
        decode(content, [1, height, width], crop).unwrap().pixels
    }

    #[test]
    fn sixteen_bits_become_eight_without_losing_the_ones_in_use() {
        // Twelve bits in a container of sixteen: a shift by eight would leave 0, 3, 7, 15.
        let values = vec![0u16, 1024, 2048, 4095];
        let grey16: DynamicImage = Grey16::from_raw(4, 1, values.clone()).unwrap().into();
        for format in [ImageFormat::Png, ImageFormat::Tiff] {
            let decoded = decode(&file(&grey16, format), [1, 1, 4], Crop::None).unwrap();
            assert_eq!(decoded.pixels, [0, 64, 128, 255], "{format:?}");
            assert!(decoded.stretched);
        }
        // Colours keep their proportions to each other.
        let colour = vec![0u16, 1024, 2048, 4095, 0, 0];
        let colour: DynamicImage = Rgb16::from_raw(2, 1, colour).unwrap().into();
        let decoded = decode(&file(&colour, ImageFormat::Png), [3, 1, 2], Crop::None).unwrap();
        assert_eq!(decoded.pixels, [0, 255, 64, 0, 128, 0]);
        let eight: DynamicImage = image::GrayImage::from_raw(2, 1, vec![7, 9]).unwrap().into();
        let decoded = decode(&file(&eight, ImageFormat::Png), [1, 1, 2], Crop::None).unwrap();
        assert!(decoded.pixels == [7, 9] && !decoded.stretched);
        let float = DynamicImage::ImageRgb32F(image::ImageBuffer::new(2, 2));
        let refused = decode(&file(&float, ImageFormat::Tiff), [1, 1, 2], Crop::None);
        assert!(refused.map(|_| ()).unwrap_err().contains("floating-point"));
    }

    #[test]
    fn what_is_cropped_is_the_middle() {
        // Columns 0, 1, .. 5 of two rows.
        let columns = [0u8, 1, 2, 3, 4, 5].repeat(2);
        let wide: DynamicImage = image::GrayImage::from_raw(6, 2, columns).unwrap().into();
        let wide = file(&wide, ImageFormat::Bmp);
        assert_eq!(grey(&wide, 2, 2, Crop::Centre), [2, 3, 2, 3]);
        assert_eq!(
            grey(&wide, 2, 6, Crop::Centre),
            [0, 1, 2, 3, 4, 5].repeat(2)
        );
        assert_ne!(grey(&wide, 2, 2, Crop::None), [2, 3, 2, 3]);
        let tall: DynamicImage = image::GrayImage::from_raw(1, 5, vec![0, 1, 2, 3, 4])
            .unwrap()
            .into();
        assert_eq!(
            grey(&file(&tall, ImageFormat::Png), 1, 1, Crop::Centre),
            [2]
        );
        // Far narrower than a pixel: one column is left.
        assert_eq!(
            grey(&file(&tall, ImageFormat::Png), 1, 9, Crop::Centre),
            [2; 9]
        );
    }

    #[test]
    fn a_file_cut_or_changed_anywhere_never_panics() {
        let pixels = (0..300).map(|at| (at * 7) as u16).collect();
        let grey16: DynamicImage = Grey16::from_raw(20, 15, pixels).unwrap().into();
        let eight: DynamicImage = grey16.to_rgb8().into();
        for (format, picture) in [
            (ImageFormat::Png, &grey16),
            (ImageFormat::Tiff, &grey16),
            (ImageFormat::Bmp, &eight),
            (ImageFormat::Jpeg, &eight),
        ] {
            let whole = file(picture, format);
            for cut in (0..whole.len()).step_by(7) {
                let _ = decode(&whole[..cut], [1, 4, 4], Crop::None);
            }
            let mut state = 3u64;
            for _ in 0..3_000 {
                let mut changed = whole.clone();
                for _ in 0..3 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let at = (state >> 33) as usize % changed.len().min(400);
                    changed[at] = (state >> 20) as u8;
                }
                if let Err(reason) = decode(&changed, [1, 4, 4], Crop::Centre) {
                    assert_ne!(reason, "a decoder failed on it", "{format:?}");
                }
            }
        }
    }

    #[test]
    fn a_header_of_60000_pixels_a_side_is_refused() {
        let mut png = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut png);
        encoder
            .write_image(&[0; 4], 2, 2, ExtendedColorType::L8)
            .unwrap();
        let side = 60_000u32.to_be_bytes();
        png[16..20].copy_from_slice(&side);
        png[20..24].copy_from_slice(&side);
        let mut hash = flate2::Crc::new();
        hash.update(&png[12..29]);
        png[29..33].copy_from_slice(&hash.sum().to_be_bytes());
        let said = decode(&png, [1, 4, 4], Crop::None).map(|_| ()).unwrap_err();
        assert!(said.to_lowercase().contains("limit"), "{said}");
        let black: DynamicImage = image::GrayImage::new(8, 8).into();
        let mut jpeg = file(&black, ImageFormat::Jpeg);
        let frame = jpeg
            .windows(2)
            .position(|marker| marker == [0xFF, 0xC0])
            .unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xEA, 0x60, 0xEA, 0x60]);
        assert!(decode(&jpeg, [1, 4, 4], Crop::None).is_err());
    }
}
