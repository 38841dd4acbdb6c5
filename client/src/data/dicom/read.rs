//! The elements of a DICOM file that say what its pixels are, and the pixels' bytes.
//!
//! Values are only read where they are wanted and short; a length that a header claims never decides
//! about memory. Reading ends with the pixels.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Cursor, Read};

use dicom_core::header::Header;
use dicom_core::{Tag, VR};
use dicom_parser::StatefulDecode;
use dicom_parser::dataset::LazyDataToken;
use dicom_parser::dataset::lazy_read::LazyDataSetReader;
use dicom_transfer_syntax_registry::entries::{
    EXPLICIT_VR_BIG_ENDIAN, EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN,
};
use flate2::read::DeflateDecoder;

use super::{START_BYTES, is_dicom};
use crate::data::limits;

/// The wanted elements outside of the pixels: short numbers and words.
const WANTED: [(Tag, &str); 20] = [
    (Tag(0x0028, 0x0002), "samples per pixel"),
    (Tag(0x0028, 0x0004), "photometric interpretation"),
    (Tag(0x0028, 0x0006), "planar configuration"),
    (Tag(0x0028, 0x0008), "number of frames"),
    (Tag(0x0028, 0x0010), "rows"),
    (Tag(0x0028, 0x0011), "columns"),
    (Tag(0x0028, 0x0100), "bits allocated"),
    (Tag(0x0028, 0x0101), "bits stored"),
    (Tag(0x0028, 0x0102), "high bit"),
    (Tag(0x0028, 0x0103), "pixel representation"),
    (Tag(0x0028, 0x0120), "pixel padding value"),
    (Tag(0x0028, 0x1050), "window centre"),
    (Tag(0x0028, 0x1051), "window width"),
    (Tag(0x0028, 0x1052), "rescale intercept"),
    (Tag(0x0028, 0x1053), "rescale slope"),
    (Tag(0x0028, 0x1056), "VOI LUT function"),
    (Tag(0x0028, 0x3000), "modality LUT sequence"),
    (Tag(0x0028, 0x3010), "VOI LUT sequence"),
    (Tag(0x7FE0, 0x0008), "float pixel data"),
    (Tag(0x7FE0, 0x0009), "double float pixel data"),
];
/// Explicit VR Big Endian, retired and still in archives.
const BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";
const PIXEL_DATA: Tag = Tag(0x7FE0, 0x0010);
/// Longest value that is read of a wanted element.
const VALUE_MAX_BYTES: u32 = 1 << 10;

/// How the pixels are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// As they are, 16 bits little-endian.
    Native,
    /// Run lengths.
    Rle,
    /// JPEG: baseline, extended with 8 bits, lossless.
    Jpeg,
}

/// A value as it stands in the file.
struct Value {
    bytes: Vec<u8>,
    /// A number of two bytes; text otherwise.
    binary: bool,
}

/// What is known of a picture.
pub(super) struct Elements {
    values: BTreeMap<&'static str, Value>,
    big_endian: bool,
    pub packing: Packing,
    pub pixels: Vec<u8>,
}

impl Elements {
    pub(super) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The first two bytes of an element.
    pub(super) fn word(&self, name: &str) -> Option<u16> {
        let &[a, b, ..] = self.values.get(name)?.bytes.as_slice() else {
            return None; // an empty value is no value
        };
        Some(match self.big_endian {
            true => u16::from_be_bytes([a, b]),
            false => u16::from_le_bytes([a, b]),
        })
    }

    /// The first number of an element, whether it is written in digits or not.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.values.get(name) else {
            return Ok(None);
        };
        if value.binary {
            return Ok(self.word(name).map(f64::from));
        }
        match self.text(name)? {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|_| format!("{name}: {text:?} is no number")),
        }
    }

    pub(super) fn unsigned(&self, name: &str) -> Result<Option<u64>, String> {
        match self.number(name)? {
            None => Ok(None),
            Some(number) if number >= 0.0 && number.fract() == 0.0 => Ok(Some(number as u64)),
            Some(number) => Err(format!("{name}: {number}")),
        }
    }

    /// The first of an element's words.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>, String> {
        let Some(value) = self.values.get(name) else {
            return Ok(None);
        };
        let text = std::str::from_utf8(&value.bytes)
            .map_err(|_| format!("{name}: it is no text"))?
            .split('\\')
            .next()
            .unwrap_or_default()
            .trim_matches([' ', '\0']);
        Ok((!text.is_empty()).then(|| text.to_owned()))
    }
}

/// Walks a file up to the end of its pixels.
pub(super) fn elements(file: &[u8]) -> Result<Elements, String> {
    let (syntax, data) = meta(file)?;
    let packing = match syntax.as_str() {
        "1.2.840.10008.1.2" | "1.2.840.10008.1.2.1" | "1.2.840.10008.1.2.1.99" => Packing::Native,
        BIG_ENDIAN => Packing::Native,
        "1.2.840.10008.1.2.5" => Packing::Rle,
        "1.2.840.10008.1.2.4.50"
        | "1.2.840.10008.1.2.4.51"
        | "1.2.840.10008.1.2.4.57"
        | "1.2.840.10008.1.2.4.70" => Packing::Jpeg,
        other => return Err(unread(other)),
    };
    let data = match syntax.as_str() {
        "1.2.840.10008.1.2.1.99" => inflated(data)?,
        _ => Cow::Borrowed(data),
    };
    let encoding = match (syntax.as_str(), packing) {
        ("1.2.840.10008.1.2", _) => IMPLICIT_VR_LITTLE_ENDIAN.erased(),
        (BIG_ENDIAN, _) => EXPLICIT_VR_BIG_ENDIAN.erased(),
        _ => EXPLICIT_VR_LITTLE_ENDIAN.erased(),
    };
    let broken = |err: &dyn std::fmt::Display| format!("its data set is broken: {err}");
    let mut reader = LazyDataSetReader::new_with_ts(Cursor::new(&*data), &encoding)
        .map_err(|err| broken(&err))?;
    let mut found = Elements {
        values: BTreeMap::new(),
        big_endian: syntax == BIG_ENDIAN,
        packing,
        pixels: Vec::new(),
    };
    let mut depth = 0usize;
    // Packed pixels come in items, the first of which tells where frames begin.
    let mut items = None;
    while let Some(token) = reader.advance() {
        match token.map_err(|err| broken(&err))? {
            LazyDataToken::SequenceStart { tag, .. } => {
                if depth == 0
                    && let Some(name) = wanted(tag)
                {
                    let (bytes, binary) = (Vec::new(), false);
                    found.values.insert(name, Value { bytes, binary });
                }
                depth += 1;
            }
            LazyDataToken::PixelSequenceStart => {
                depth += 1;
                items = (depth == 1).then_some(0usize);
            }
            LazyDataToken::SequenceEnd => {
                depth = depth.saturating_sub(1);
                if depth == 0 && items.is_some() {
                    return packed(found);
                }
            }
            LazyDataToken::LazyItemValue { len, decoder } => {
                if items.is_some_and(|items| items > 0) && depth == 1 {
                    let before = found.pixels.len();
                    let read = decoder.read_to(len, &mut found.pixels);
                    read.map_err(|err| broken(&err))?;
                    if found.pixels.len() - before != len as usize {
                        return Err("it ends in the middle of its pixels".into());
                    }
                } else {
                    decoder.skip_bytes(len).map_err(|err| broken(&err))?;
                }
                items = items.map(|items| items + 1);
            }
            // An empty first item has no value of its own.
            LazyDataToken::ItemStart { len } if len.0 == 0 => {
                items = items.map(|items| items + 1);
            }
            LazyDataToken::LazyValue { header, decoder } => {
                let length = header.len.0;
                if depth == 0 && header.tag() == PIXEL_DATA {
                    let read = decoder.read_to(length, &mut found.pixels);
                    read.map_err(|err| broken(&err))?;
                    if found.pixels.len() != length as usize {
                        return Err("it ends in the middle of its pixels".into());
                    }
                    // Words, whether a sample fills one or half of one.
                    if found.big_endian && header.vr() == VR::OW {
                        found.pixels.chunks_exact_mut(2).for_each(<[u8]>::reverse);
                    }
                    return native(found);
                }
                match wanted(header.tag()).filter(|_| depth == 0) {
                    Some(name) if length <= VALUE_MAX_BYTES => {
                        let mut bytes = Vec::new();
                        let read = decoder.read_to(length, &mut bytes);
                        read.map_err(|err| broken(&err))?;
                        if bytes.len() != length as usize {
                            return Err(format!("it ends in the middle of its {name}"));
                        }
                        let binary = matches!(header.vr(), VR::US | VR::SS | VR::OW);
                        found.values.insert(name, Value { bytes, binary });
                    }
                    _ => decoder.skip_bytes(length).map_err(|err| broken(&err))?,
                }
            }
            _ => {}
        }
    }
    match found.has("float pixel data") || found.has("double float pixel data") {
        true => Err("its pixels are floating-point numbers: 8 to 16 bits are read".into()),
        false => Err("there are no pixels in it".into()),
    }
}

fn wanted(tag: Tag) -> Option<&'static str> {
    let known = WANTED.iter().find(|(known, _)| *known == tag);
    known.map(|(_, name)| *name)
}

fn native(found: Elements) -> Result<Elements, String> {
    match found.packing {
        Packing::Native => Ok(found),
        _ => Err("its transfer syntax packs pixels, and these are not packed".into()),
    }
}

fn packed(found: Elements) -> Result<Elements, String> {
    match found.packing {
        Packing::Native => {
            Err("its transfer syntax does not pack pixels, and these are packed".into())
        }
        _ => Ok(found),
    }
}

/// The transfer syntax, and what comes after the file's own elements. They are of group 2, and little
/// endian with types in every file.
fn meta(file: &[u8]) -> Result<(String, &[u8]), String> {
    if !is_dicom(file) {
        return Err("it has no DICOM preamble".into());
    }
    let mut rest = &file[START_BYTES..];
    let mut syntax = None;
    while let Some(&[0x02, 0x00, low, high, a, b, c, d]) = rest.first_chunk::<8>() {
        let (length, start): (usize, usize) = match &[a, b] {
            b"OB" | b"OW" | b"UN" | b"UT" | b"SQ" => {
                let Some(&[e, f, g, h]) = rest.get(8..12).and_then(<[u8]>::first_chunk) else {
                    break;
                };
                (u32::from_le_bytes([e, f, g, h]) as usize, 12)
            }
            _ => (usize::from(u16::from_le_bytes([c, d])), 8),
        };
        let value = start
            .checked_add(length)
            .and_then(|end| rest.get(start..end));
        let value = value.ok_or("it ends in its file information")?;
        if [low, high] == [0x10, 0x00] {
            let text = String::from_utf8_lossy(value);
            syntax = Some(text.trim_matches([' ', '\0']).to_owned());
        }
        rest = &rest[start + length..];
    }
    let syntax = syntax.ok_or("its file information names no transfer syntax")?;
    Ok((syntax, rest))
}

fn inflated(data: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let most = limits::MAX_PICTURE_FILE_BYTES;
    let mut out = Vec::new();
    let mut packed = DeflateDecoder::new(data).take(most + 1);
    let read = packed.read_to_end(&mut out);
    read.map_err(|err| format!("its data set does not unpack: {err}"))?;
    match out.len() as u64 > most {
        true => Err(format!("its data set is longer than {most} bytes")),
        false => Ok(out.into()),
    }
}

fn unread(syntax: &str) -> String {
    let name = match syntax {
        "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => " (JPEG-LS)",
        "1.2.840.10008.1.2.4.90" | "1.2.840.10008.1.2.4.91" => " (JPEG 2000)",
        "1.2.840.10008.1.2.4.92" | "1.2.840.10008.1.2.4.93" => " (JPEG 2000, many components)",
        "1.2.840.10008.1.2.4.201" | "1.2.840.10008.1.2.4.202" | "1.2.840.10008.1.2.4.203" => {
            " (High-Throughput JPEG 2000)"
        }
        "1.2.840.10008.1.2.4.110" | "1.2.840.10008.1.2.4.111" | "1.2.840.10008.1.2.4.112" => {
            " (JPEG XL)"
        }
        _ => "",
    };
    let clean: String = syntax
        .chars()
        .filter(|c| !c.is_control())
        .take(64)
        .collect();
    format!(
        "transfer syntax {clean}{name} is not read: convert it to Explicit VR Little Endian, RLE or JPEG"
    )
}
