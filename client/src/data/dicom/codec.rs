//! From a file's pixel bytes to samples, pixel by pixel.
//!
//! JPEG goes through the decoder that dicom-rs uses too, after its header has been compared with the
//! file's: dicom-rs's own adapter would allocate what the header claims. Run lengths are unpacked
//! here for the same reason: its adapter panics on a broken header.

use jpeg_decoder::{ColorTransform, PixelFormat};

use super::read::{Elements, Packing};
use super::{Colour, Form, Samples};

/// Most segments of a run-length coded frame, and the bytes of its header.
const RLE_SEGMENTS_MAX: usize = 15;
const RLE_HEADER_BYTES: usize = 64;

pub(super) fn unpack(elements: &Elements, form: &Form) -> Result<Samples, String> {
    let samples = match elements.packing {
        Packing::Native => native(&elements.pixels, form)?,
        Packing::Rle => run_lengths(&elements.pixels, form)?,
        Packing::Jpeg => return jpeg(&elements.pixels, form),
    };
    match form.colour {
        Colour::Ybr => Ok(Samples {
            bytes: rgb_of_ybr(samples.bytes),
            wide: false,
        }),
        _ => Ok(samples),
    }
}

fn native(pixels: &[u8], form: &Form) -> Result<Samples, String> {
    let wide = form.allocated == 16;
    let area = form.width * form.height;
    let expected = area * form.samples * if wide { 2 } else { 1 };
    let Some(pixels) = pixels.get(..expected) else {
        return Err(format!(
            "{} bytes of pixels, where {} x {} take {expected}",
            pixels.len(),
            form.width,
            form.height
        ));
    };
    let bytes = match (form.samples, form.planar) {
        (3, true) => (0..area)
            .flat_map(|at| [pixels[at], pixels[area + at], pixels[2 * area + at]])
            .collect(),
        _ => pixels.to_vec(),
    };
    Ok(Samples { bytes, wide })
}

/// PS3.5, annex G: a segment for each byte of a pixel, the most significant first.
fn run_lengths(frame: &[u8], form: &Form) -> Result<Samples, String> {
    let wide = form.allocated == 16;
    let depth = form.samples * if wide { 2 } else { 1 };
    let area = form.width * form.height;
    let word = |at: usize| {
        let bytes = frame.get(4 * at..4 * at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes) as usize)
    };
    let broken = || "its run lengths have a broken header".to_owned();
    let segments = word(0)
        .filter(|_| frame.len() >= RLE_HEADER_BYTES)
        .ok_or_else(broken)?;
    if segments != depth || segments > RLE_SEGMENTS_MAX {
        return Err(format!(
            "its run lengths have {segments} segments, expected {depth}"
        ));
    }
    // An honest frame packs 128 bytes into 2, at best.
    if area * depth > 64 * frame.len() {
        return Err("its run lengths are too few for its size".into());
    }
    let mut bytes = vec![0; area * depth];
    for segment in 0..segments {
        let start = word(1 + segment).ok_or_else(broken)?;
        let end = match segment + 1 < segments {
            true => word(2 + segment).ok_or_else(broken)?,
            false => frame.len(),
        };
        let packed = frame.get(start..end).ok_or_else(broken)?;
        // Most significant first in the file, least significant first here.
        let place = match wide {
            true => segment ^ 1,
            false => segment,
        };
        let mut out = bytes.iter_mut().skip(place).step_by(depth);
        let mut left = area;
        let mut packed = packed.iter();
        while left > 0 {
            let cut = || "its run lengths end too early".to_owned();
            let head = *packed.next().ok_or_else(cut)? as i8;
            let (run, repeated) = match head {
                -128 => continue,
                0.. => (usize::from(head as u8) + 1, None),
                _ => (
                    1 + usize::from(head.unsigned_abs()),
                    Some(*packed.next().ok_or_else(cut)?),
                ),
            };
            for _ in 0..run.min(left) {
                let byte = match repeated {
                    Some(byte) => byte,
                    None => *packed.next().ok_or_else(cut)?,
                };
                // `left` counts what `out` still has.
                if let Some(slot) = out.next() {
                    *slot = byte;
                }
            }
            left -= run.min(left);
        }
    }
    Ok(Samples { bytes, wide })
}

fn jpeg(pixels: &[u8], form: &Form) -> Result<Samples, String> {
    let mut decoder = jpeg_decoder::Decoder::new(pixels);
    let area = form.width * form.height;
    // Two bytes a sample, and the rows that fill the last blocks.
    decoder.set_max_decoding_buffer_size(2 * form.samples * area + (1 << 20));
    let failed = |err: jpeg_decoder::Error| format!("its JPEG does not decode: {err}");
    decoder.read_info().map_err(failed)?;
    let info = decoder.info().ok_or("its JPEG has no header")?;
    if (usize::from(info.width), usize::from(info.height)) != (form.width, form.height) {
        return Err(format!(
            "its JPEG is {} x {}, the file says {} x {}",
            info.width, info.height, form.width, form.height
        ));
    }
    let (wide, samples) = match info.pixel_format {
        PixelFormat::L8 => (false, 1),
        PixelFormat::L16 => (true, 1),
        PixelFormat::RGB24 => (false, 3),
        PixelFormat::CMYK32 => return Err("its JPEG has four colours".into()),
    };
    if samples != form.samples || wide && form.allocated == 8 {
        return Err(format!(
            "its JPEG holds {:?}, the file says otherwise",
            info.pixel_format
        ));
    }
    match form.colour {
        Colour::Rgb => decoder.set_color_transform(ColorTransform::RGB),
        Colour::Ybr => decoder.set_color_transform(ColorTransform::YCbCr),
        Colour::Monochrome1 | Colour::Monochrome2 => {}
    }
    let decoded = decoder.decode().map_err(failed)?;
    if decoded.len() != area * samples * if wide { 2 } else { 1 } {
        return Err("its JPEG gives another number of pixels".into());
    }
    let bytes = match wide {
        // The decoder gives words in the machine's order.
        true => decoded
            .chunks_exact(2)
            .flat_map(|word| u16::from_ne_bytes([word[0], word[1]]).to_le_bytes())
            .collect(),
        false => decoded,
    };
    Ok(Samples { bytes, wide })
}

/// PS3.3 C.7.6.3.1.2: full range, the coefficients of ITU-R BT.601.
fn rgb_of_ybr(mut bytes: Vec<u8>) -> Vec<u8> {
    for pixel in bytes.chunks_exact_mut(3) {
        let [y, b, r] = [pixel[0], pixel[1], pixel[2]].map(f64::from);
        let (b, r) = (b - 128.0, r - 128.0);
        let rgb = [
            y + 1.402 * r,
            y - 0.344_136 * b - 0.714_136 * r,
            y + 1.772 * b,
        ];
        for (out, value) in pixel.iter_mut().zip(rgb) {
            *out = value.round().clamp(0.0, 255.0) as u8;
        }
    }
    bytes
}
