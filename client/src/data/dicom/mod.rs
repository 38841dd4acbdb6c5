//! DICOM files: one picture each, as bytes from black to white.
//!
//! `read.rs` walks the data set with dicom-rs's lazy reader and takes the pixel module alone: names,
//! dates and everything else that says who is on the picture are skipped, not read. `codec.rs`
//! unpacks the pixels. Here, in this order: stored value, rescale slope and intercept, window,
//! inversion of MONOCHROME1. A stored value has at most 16 bits, so all of it is one table.
//!
//! What cannot be shown rightly is refused with its reason and never guessed: several frames, a
//! look-up table instead of a window, a transfer syntax without a decoder written in Rust.
//! docs/data.md lists them.

mod codec;
mod read;
#[cfg(test)]
mod tests;

use image::{DynamicImage, GrayImage, RgbImage};

use super::limits;
use read::{Elements, Packing};

/// How far into a file `DICM` stands.
const PREAMBLE_BYTES: usize = 128;

/// Whether these are the first bytes of a DICOM file.
pub(super) fn is_dicom(start: &[u8]) -> bool {
    start.get(PREAMBLE_BYTES..PREAMBLE_BYTES + 4) == Some(b"DICM".as_slice())
}

/// How many first bytes [`is_dicom`] looks at.
pub(super) const START_BYTES: usize = PREAMBLE_BYTES + 4;

/// A picture of at most 8 bits, and how it came to them.
pub(super) struct Shown {
    pub picture: DynamicImage,
    /// It has more than 8 bits and no window: its own smallest and largest value decided.
    pub stretched: bool,
}

/// What the pixels are, from the pixel module.
#[derive(Clone, Copy, Debug)]
struct Form {
    width: usize,
    height: usize,
    samples: usize,
    /// Bits that a native or run-length coded sample takes: 8 or 16.
    allocated: u32,
    /// Bits that count, the lowest ones.
    stored: u32,
    signed: bool,
    colour: Colour,
    /// Samples of one colour lie together, instead of those of one pixel.
    planar: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Colour {
    /// Larger is darker.
    Monochrome1,
    /// Larger is lighter.
    Monochrome2,
    Rgb,
    /// Luminance and two differences; JPEG decoders give RGB.
    Ybr,
}

/// Samples of 8 or 16 bits, pixel by pixel; 16 bits little-endian.
struct Samples {
    bytes: Vec<u8>,
    wide: bool,
}

impl Samples {
    fn get(&self, at: usize) -> u16 {
        match self.wide {
            true => u16::from_le_bytes([self.bytes[2 * at], self.bytes[2 * at + 1]]),
            false => u16::from(self.bytes[at]),
        }
    }
}

/// Decodes a file's one picture; the error says what stands against it.
pub(super) fn decode(file: &[u8]) -> Result<Shown, String> {
    let elements = read::elements(file)?;
    let form = Form::of(&elements)?;
    let samples = codec::unpack(&elements, &form)?;
    let size = (form.width as u32, form.height as u32); // at most MAX_SIDE
    if form.samples == 3 {
        let picture = RgbImage::from_raw(size.0, size.1, samples.bytes);
        return Ok(Shown {
            picture: picture.ok_or("the pixels are too few")?.into(),
            stretched: false,
        });
    }
    let count = form.width * form.height;
    let tone = Tone::of(&elements)?;
    let window = tone.window.unwrap_or_else(|| {
        let padding = elements.word("pixel padding value");
        let (low, high) = extremes(&samples, count, &form, padding);
        let (low, high) = (tone.rescaled(low), tone.rescaled(high));
        Window::Range(low.min(high), low.max(high))
    });
    let table = tone.table(&form, window);
    let mask = (1usize << form.stored) - 1;
    let pixels = (0..count).map(|at| table[usize::from(samples.get(at)) & mask]);
    let picture = GrayImage::from_raw(size.0, size.1, pixels.collect());
    Ok(Shown {
        picture: picture.ok_or("the pixels are too few")?.into(),
        stretched: tone.window.is_none() && form.stored > 8,
    })
}

/// The smallest and the largest value of a picture of more than 8 bits; all that fits into one of
/// fewer. Padding around the picture does not count.
fn extremes(samples: &Samples, count: usize, form: &Form, padding: Option<u16>) -> (i32, i32) {
    let whole = match form.signed {
        true => (-(1 << (form.stored - 1)), (1 << (form.stored - 1)) - 1),
        false => (0, (1 << form.stored) - 1),
    };
    if form.stored <= 8 {
        return whole;
    }
    let values = (0..count).map(|at| form.value(samples.get(at)));
    let padding = padding.map(|padding| form.value(padding));
    let values = values.filter(|value| padding != Some(*value));
    let found = values.fold(None, |found: Option<(i32, i32)>, value| {
        let (low, high) = found.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    });
    found.unwrap_or(whole)
}

impl Form {
    fn of(elements: &Elements) -> Result<Form, String> {
        if let Some(frames) = elements.number("number of frames")?
            && frames != 1.0
        {
            return Err(format!(
                "it has {frames} frames; a record is one picture: write the frames that count as files"
            ));
        }
        let need = |name| elements.unsigned(name)?.ok_or(format!("it has no {name}"));
        let (height, width) = (need("rows")?, need("columns")?);
        let side = 1..=limits::MAX_SIDE as u64;
        if !side.contains(&height)
            || !side.contains(&width)
            || height * width > limits::MAX_PICTURE_PIXELS
        {
            return Err(format!(
                "{width} x {height} pixels: at most {} a side and {} in all",
                limits::MAX_SIDE,
                limits::MAX_PICTURE_PIXELS
            ));
        }
        let name = elements.text("photometric interpretation")?;
        let name = name.ok_or("it has no photometric interpretation")?;
        let (colour, channels) = match name.as_str() {
            "MONOCHROME1" => (Colour::Monochrome1, 1),
            "MONOCHROME2" => (Colour::Monochrome2, 1),
            "RGB" => (Colour::Rgb, 3),
            "YBR_FULL" => (Colour::Ybr, 3),
            // Halved differences are JPEG's business; as plain bytes they are not read.
            "YBR_FULL_422" if elements.packing == Packing::Jpeg => (Colour::Ybr, 3),
            other => {
                return Err(format!(
                    "photometric interpretation {other} is not read: MONOCHROME1, MONOCHROME2, RGB and \
                     YBR_FULL are"
                ));
            }
        };
        let samples = elements.unsigned("samples per pixel")?.unwrap_or(channels);
        if samples != channels {
            return Err(format!("{name} with {samples} samples per pixel"));
        }
        let allocated = need("bits allocated")?;
        let stored = elements.unsigned("bits stored")?.unwrap_or(allocated);
        let high = elements
            .unsigned("high bit")?
            .unwrap_or(stored.wrapping_sub(1));
        let fits = matches!(allocated, 8 | 16)
            && (1..=allocated).contains(&stored)
            && high == stored - 1
            && (channels == 1 || stored == 8 && allocated == 8);
        if !fits {
            return Err(format!(
                "{stored} bits stored in {allocated}, the highest being {high}: 8 or 16 allocated \
                 bits are read, 8 where there is colour, of which the lowest are stored"
            ));
        }
        Ok(Form {
            width: width as usize,
            height: height as usize,
            samples: samples as usize,
            allocated: allocated as u32,
            stored: stored as u32,
            signed: elements.unsigned("pixel representation")? == Some(1),
            colour,
            planar: elements.unsigned("planar configuration")? == Some(1),
        })
    }

    /// A stored sample as the number it stands for.
    fn value(&self, sample: u16) -> i32 {
        let spare = 32 - self.stored;
        match self.signed {
            true => ((u32::from(sample) << spare) as i32) >> spare,
            false => ((u32::from(sample) << spare) >> spare) as i32,
        }
    }
}

/// From stored values to brightness.
struct Tone {
    slope: f64,
    intercept: f64,
    window: Option<Window>,
}

/// Which rescaled values are black and which are white.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Window {
    /// PS3.3 C.11.2.1.2.1: centre and width.
    Linear(f64, f64),
    /// PS3.3 C.11.2.1.3.2.
    LinearExact(f64, f64),
    /// From the first to the second value.
    Range(f64, f64),
}

impl Window {
    /// Brightness from 0 to 1.
    fn apply(self, value: f64) -> f64 {
        let share = match self {
            // The standard's half steps: the centre lies between two whole values.
            Window::Linear(centre, 1.0) => f64::from(u8::from(value > centre - 0.5)),
            Window::Linear(centre, width) => (value - (centre - 0.5)) / (width - 1.0) + 0.5,
            Window::LinearExact(centre, width) => (value - centre) / width + 0.5,
            Window::Range(low, high) if low == high => 0.0,
            Window::Range(low, high) => (value - low) / (high - low),
        };
        share.clamp(0.0, 1.0)
    }
}

impl Tone {
    fn of(elements: &Elements) -> Result<Tone, String> {
        if elements.has("modality LUT sequence") {
            return Err("its values go through a modality look-up table, which is not read".into());
        }
        let slope = elements.number("rescale slope")?.unwrap_or(1.0);
        let intercept = elements.number("rescale intercept")?.unwrap_or(0.0);
        if !slope.is_finite() || slope == 0.0 || !intercept.is_finite() {
            return Err(format!("rescale slope {slope}, intercept {intercept}"));
        }
        let centre = elements.number("window centre")?;
        let width = elements.number("window width")?;
        let window = match (centre, width) {
            (Some(centre), Some(width)) => {
                let function = elements.text("VOI LUT function")?.unwrap_or_default();
                let (window, least) = match function.as_str() {
                    "" | "LINEAR" => (Window::Linear(centre, width), 1.0),
                    "LINEAR_EXACT" => (Window::LinearExact(centre, width), f64::MIN_POSITIVE),
                    other => return Err(format!("VOI LUT function {other} is not read")),
                };
                if !centre.is_finite() || !width.is_finite() || width < least {
                    return Err(format!("window centre {centre}, width {width}"));
                }
                Some(window)
            }
            (None, None) if elements.has("VOI LUT sequence") => {
                return Err(
                    "its brightness goes through a VOI look-up table, which is not read, and it has \
                     no window"
                        .into(),
                );
            }
            (None, None) => None,
            _ => return Err("it has one of window centre and width without the other".into()),
        };
        Ok(Tone {
            slope,
            intercept,
            window,
        })
    }

    fn rescaled(&self, value: i32) -> f64 {
        f64::from(value) * self.slope + self.intercept
    }

    /// Brightness of every stored sample.
    fn table(&self, form: &Form, window: Window) -> Vec<u8> {
        let inverted = form.colour == Colour::Monochrome1;
        let entry = |sample: u32| {
            // Whole numbers, a product, sums and a quotient: the same on every platform.
            let share = window.apply(self.rescaled(form.value(sample as u16)));
            let grey = (share * 255.0).round() as u8;
            if inverted { 255 - grey } else { grey }
        };
        (0..1u32 << form.stored).map(entry).collect()
    }
}
