//! Files written by dicom-rs's writer, which the reader here does not share code for pixels with.

use dicom_core::value::{PixelFragmentSequence, Value};
use dicom_core::{DataElement, PrimitiveValue, Tag, VR, dicom_value};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject};
use flate2::{Compression, write::DeflateEncoder};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};
use std::io::Write;

use super::*;

const EXPLICIT: &str = "1.2.840.10008.1.2.1";
const IMPLICIT: &str = "1.2.840.10008.1.2";
const BIG_ENDIAN: &str = "1.2.840.10008.1.2.2";
const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
const RLE: &str = "1.2.840.10008.1.2.5";
const JPEG: &str = "1.2.840.10008.1.2.4.50";

/// A picture of `width` x 2 pixels, and what the file says of it.
struct Sample {
    object: InMemDicomObject,
    width: u16,
}

impl Sample {
    fn grey(bits: u16, signed: bool, width: u16) -> Sample {
        let mut sample = Sample {
            object: InMemDicomObject::new_empty(),
            width,
        };
        let allocated = if bits > 8 { 16 } else { 8 };
        sample.text(0x0010, 0x0010, VR::PN, "Doe^Jane");
        sample.word(0x0028, 0x0002, 1);
        sample.text(0x0028, 0x0004, VR::CS, "MONOCHROME2");
        sample.word(0x0028, 0x0010, 2);
        sample.word(0x0028, 0x0011, width);
        sample.word(0x0028, 0x0100, allocated);
        sample.word(0x0028, 0x0101, bits);
        sample.word(0x0028, 0x0102, bits - 1);
        sample.word(0x0028, 0x0103, signed.into());
        sample
    }

    fn rgb(width: u16) -> Sample {
        let mut sample = Sample::grey(8, false, width);
        sample.word(0x0028, 0x0002, 3);
        sample.text(0x0028, 0x0004, VR::CS, "RGB");
        sample
    }

    fn word(&mut self, group: u16, element: u16, word: u16) -> &mut Sample {
        let value = dicom_value!(U16, [word]);
        let element = DataElement::new(Tag(group, element), VR::US, value);
        self.object.put(element);
        self
    }

    fn text(&mut self, group: u16, element: u16, vr: VR, text: &str) -> &mut Sample {
        let element = DataElement::new(Tag(group, element), vr, PrimitiveValue::from(text));
        self.object.put(element);
        self
    }

    fn window(&mut self, centre: &str, width: &str) -> &mut Sample {
        self.text(0x0028, 0x1050, VR::DS, centre);
        self.text(0x0028, 0x1051, VR::DS, width)
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Sample {
        let value = PrimitiveValue::U8(bytes.iter().copied().collect());
        self.object
            .put(DataElement::new(Tag(0x7FE0, 0x0010), VR::OB, value));
        self
    }

    fn words(&mut self, words: &[u16]) -> &mut Sample {
        let value = PrimitiveValue::U16(words.iter().copied().collect());
        self.object
            .put(DataElement::new(Tag(0x7FE0, 0x0010), VR::OW, value));
        self
    }

    fn packed(&mut self, fragments: Vec<Vec<u8>>) -> &mut Sample {
        let value = Value::PixelSequence(PixelFragmentSequence::new(vec![], fragments));
        self.object
            .put(DataElement::new(Tag(0x7FE0, 0x0010), VR::OB, value));
        self
    }

    /// The file, in a transfer syntax.
    fn file(&self, syntax: &str) -> Vec<u8> {
        let written = if syntax == DEFLATED { EXPLICIT } else { syntax };
        let meta = FileMetaTableBuilder::new()
            .transfer_syntax(written)
            .media_storage_sop_class_uid("1.2.840.10008.5.1.4.1.1.7")
            .media_storage_sop_instance_uid("1.2.3");
        let mut file = Vec::new();
        let object = self.object.clone().with_meta(meta).unwrap();
        object.write_all(&mut file).unwrap();
        if syntax != DEFLATED {
            return file;
        }
        // The writer does not deflate here: the name is exchanged and the data set packed.
        let plain = file
            .windows(8)
            .position(|at| at == [0x08, 0, 0x18, 0, b'U', b'I', 0, 0]);
        let start = plain.unwrap_or_else(|| {
            let first = [0x10, 0, 0x10, 0, b'P', b'N'];
            file.windows(6).position(|at| at == first).unwrap()
        });
        let data = file.split_off(start);
        let mut packed = DeflateEncoder::new(Vec::new(), Compression::default());
        packed.write_all(&data).unwrap();
        let name = [0x02, 0, 0x10, 0, b'U', b'I'];
        let at = file.windows(6).position(|at| at == name).unwrap();
        let old = usize::from(u16::from_le_bytes([file[at + 6], file[at + 7]]));
        let mut meta = file[..at + 6].to_vec();
        meta.extend((DEFLATED.len() as u16).to_le_bytes());
        meta.extend(DEFLATED.as_bytes());
        meta.extend(&file[at + 8 + old..]);
        meta.extend(packed.finish().unwrap());
        meta
    }

    fn grey_of(&self, syntax: &str) -> Vec<u8> {
        let shown = decode(&self.file(syntax)).unwrap();
        assert_eq!(shown.picture.width(), u32::from(self.width));
        shown.picture.into_luma8().into_raw()
    }

    fn refused(&self, syntax: &str, reason: &str) {
        let said = decode(&self.file(syntax)).map(|_| ()).unwrap_err();
        assert!(said.contains(reason), "{reason:?} is not in {said:?}");
    }
}

/// One run-length segment: literal runs, then one repeated byte.
fn segment(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for run in bytes.chunks(128) {
        if run.len() > 2 && run.iter().all(|byte| *byte == run[0]) {
            out.extend([(1 - run.len() as i32) as i8 as u8, run[0]]);
        } else {
            out.push(run.len() as u8 - 1);
            out.extend(run);
        }
    }
    if out.len() % 2 == 1 {
        out.push(0x80);
    }
    out
}

fn rle(planes: &[Vec<u8>]) -> Vec<u8> {
    let mut header = vec![planes.len() as u32];
    let mut body = Vec::new();
    for plane in planes {
        header.push(64 + body.len() as u32);
        body.extend(segment(plane));
    }
    header.resize(16, 0);
    let mut out: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    out.extend(body);
    out
}

#[test]
fn eight_bits_are_kept_as_they_are_in_every_transfer_syntax() {
    let pixels = [0u8, 1, 2, 100, 200, 255];
    for syntax in [EXPLICIT, IMPLICIT, DEFLATED, BIG_ENDIAN] {
        let mut sample = Sample::grey(8, false, 3);
        assert_eq!(sample.bytes(&pixels).grey_of(syntax), pixels, "{syntax}");
        assert!(!decode(&sample.file(syntax)).unwrap().stretched);
    }
    // Two samples to a word.
    let words = pixels
        .chunks(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let words: Vec<u16> = words.collect();
    let mut sample = Sample::grey(8, false, 3);
    assert_eq!(sample.words(&words).grey_of(BIG_ENDIAN), pixels);
    assert_eq!(sample.grey_of(IMPLICIT), pixels);
    let mut sample = Sample::grey(8, false, 3);
    assert_eq!(
        sample.packed(vec![rle(&[pixels.to_vec()])]).grey_of(RLE),
        pixels
    );
    let flat = vec![9; 400];
    let mut sample = Sample::grey(8, false, 200);
    assert_eq!(
        sample
            .packed(vec![rle(std::slice::from_ref(&flat))])
            .grey_of(RLE),
        flat
    );
}

#[test]
fn monochrome1_is_inverted() {
    let mut sample = Sample::grey(8, false, 3);
    sample.text(0x0028, 0x0004, VR::CS, "MONOCHROME1");
    let shown = sample.bytes(&[0, 1, 2, 100, 200, 255]).grey_of(EXPLICIT);
    assert_eq!(shown, [255, 254, 253, 155, 55, 0]);
}

#[test]
fn a_window_acts_on_rescaled_values_as_the_standard_says() {
    // Signed Hounsfield units: stored = unit + 1024, window of soft tissue.
    let units = [-1024i32, -160, -159, 40, 239, 3000];
    let stored: Vec<u16> = units.iter().map(|unit| (unit + 1024) as u16).collect();
    let mut sample = Sample::grey(12, false, 3);
    sample.text(0x0028, 0x1052, VR::DS, "-1024");
    sample.text(0x0028, 0x1053, VR::DS, "1");
    sample.window("40\\500", "400\\2000").words(&stored);
    // ((x - 39.5) / 399 + 0.5) * 255: -159 -> 0.64, 40 -> 127.8, 239 -> 255.
    assert_eq!(sample.grey_of(EXPLICIT), [0, 0, 1, 128, 255, 255]);
    assert!(!decode(&sample.file(EXPLICIT)).unwrap().stretched);
    assert_eq!(sample.grey_of(IMPLICIT), sample.grey_of(BIG_ENDIAN));
    assert_eq!(sample.grey_of(IMPLICIT), [0, 0, 1, 128, 255, 255]);
    sample.text(0x0028, 0x1056, VR::CS, "LINEAR_EXACT");
    // ((x - 40) / 400 + 0.5) * 255: -159 -> 0.64, 40 -> 127.5, 239 -> 254.4.
    assert_eq!(sample.grey_of(EXPLICIT), [0, 0, 1, 128, 254, 255]);
    // A slope doubles what the window sees.
    sample.text(0x0028, 0x1053, VR::DS, "2");
    assert_ne!(sample.grey_of(EXPLICIT), [0, 0, 1, 128, 254, 255]);
}

#[test]
fn signed_pixels_are_negative() {
    let words = [-2000i16, -1000, 0, 1000, 2000, 0].map(|word| word as u16);
    let mut sample = Sample::grey(16, true, 3);
    assert_eq!(
        sample.words(&words).grey_of(EXPLICIT),
        [0, 64, 128, 191, 255, 128]
    );
    // 12 bits of two's complement: what lies above them does not count.
    let words = [-2048i16, -1, 0, 2047, 1, 0].map(|word| (word as u16 & 0xFFF) | 0x7000);
    let mut sample = Sample::grey(12, true, 3);
    sample.window("0", "4096").words(&words);
    assert_eq!(sample.grey_of(EXPLICIT), [0, 127, 128, 255, 128, 128]);
}

#[test]
fn more_than_eight_bits_without_a_window_go_from_their_smallest_to_their_largest_value() {
    let mut sample = Sample::grey(16, false, 3);
    sample.words(&[1000, 1001, 1002, 2020, 2275, 1510]);
    assert_eq!(sample.grey_of(EXPLICIT), [0, 0, 0, 204, 255, 102]);
    assert!(decode(&sample.file(EXPLICIT)).unwrap().stretched);
    // Padding is not part of the picture.
    sample.word(0x0028, 0x0120, 1000);
    assert_eq!(sample.grey_of(EXPLICIT)[..3], [0, 0, 0]);
    assert_eq!(sample.grey_of(EXPLICIT)[5], 102); // (1510 - 1001) / 1274 * 255
    sample.words(&[1000, 40_000, 41_000, 50_000, 60_000, 1000]);
    assert_eq!(sample.grey_of(EXPLICIT), [0, 0, 13, 128, 255, 0]);
    // A negative slope turns it round, MONOCHROME1 back again.
    sample.text(0x0028, 0x1053, VR::DS, "-1");
    let turned = [255, 255, 242, 128, 0, 255];
    assert_eq!(sample.grey_of(EXPLICIT), turned);
    sample.text(0x0028, 0x0004, VR::CS, "MONOCHROME1");
    assert_eq!(sample.grey_of(EXPLICIT), turned.map(|grey| 255 - grey));
    assert_eq!(
        Sample::grey(16, false, 1).words(&[7, 7]).grey_of(EXPLICIT),
        [0, 0]
    );
}

#[test]
fn sixteen_bits_of_run_lengths_equal_the_plain_ones() {
    let words = [1000u16, 1001, 1002, 2020, 65_275, 1510];
    let plane = |shift: u16| words.iter().map(|word| (word >> shift) as u8).collect();
    let mut plain = Sample::grey(16, false, 3);
    let mut packed = Sample::grey(16, false, 3);
    assert_eq!(
        packed.packed(vec![rle(&[plane(8), plane(0)])]).grey_of(RLE),
        plain.words(&words).grey_of(EXPLICIT)
    );
}

#[test]
fn colour_comes_pixel_by_pixel_whatever_lies_how() {
    let colours = [
        [200, 10, 20],
        [0, 255, 0],
        [1, 2, 3],
        [9, 9, 9],
        [255, 0, 255],
        [0, 0, 0],
    ];
    let flat = colours.concat();
    let planes: Vec<Vec<u8>> = (0..3)
        .map(|at| colours.iter().map(|c| c[at]).collect())
        .collect();
    let rgb = |sample: &Sample, syntax| {
        decode(&sample.file(syntax))
            .unwrap()
            .picture
            .into_rgb8()
            .into_raw()
    };
    assert_eq!(rgb(Sample::rgb(3).bytes(&flat), EXPLICIT), flat);
    assert_eq!(rgb(Sample::rgb(3).packed(vec![rle(&planes)]), RLE), flat);
    let mut planar = Sample::rgb(3);
    planar.word(0x0028, 0x0006, 1).bytes(&planes.concat());
    assert_eq!(rgb(&planar, EXPLICIT), flat);
    // Grey is luminance: green counts most.
    let grey = planar.grey_of(EXPLICIT);
    assert!(
        grey[1] > grey[4] && grey[5] == 0 && grey[3] == 9,
        "{grey:?}"
    );
    let mut ybr = Sample::rgb(3);
    ybr.text(0x0028, 0x0004, VR::CS, "YBR_FULL");
    ybr.bytes(
        &[
            [76, 85, 255],
            [255, 128, 128],
            [0; 3],
            [9, 128, 128],
            [5; 3],
            [6; 3],
        ]
        .concat(),
    );
    let shown = rgb(&ybr, EXPLICIT);
    assert_eq!(shown[..6], [254, 0, 0, 255, 255, 255]); // red, white
    ybr.text(0x0028, 0x0004, VR::CS, "YBR_FULL_422")
        .refused(EXPLICIT, "YBR_FULL_422");
    ybr.text(0x0028, 0x0004, VR::CS, "PALETTE COLOR")
        .refused(EXPLICIT, "PALETTE COLOR");
}

fn jpeg_of(pixels: &[u8], width: u32, kind: ExtendedColorType) -> Vec<u8> {
    let mut out = Vec::new();
    let encoder = JpegEncoder::new_with_quality(&mut out, 100);
    encoder.write_image(pixels, width, 2, kind).unwrap();
    if out.len() % 2 == 1 {
        out.push(0);
    }
    out
}

#[test]
fn jpeg_decodes_also_from_several_fragments() {
    let pixels: Vec<u8> = (0..32).map(|at| (at * 8) as u8).collect();
    let jpeg = jpeg_of(&pixels, 16, ExtendedColorType::L8);
    let close = |shown: Vec<u8>| {
        let far = shown.iter().zip(&pixels).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(far <= Some(4), "{shown:?}");
    };
    close(
        Sample::grey(8, false, 16)
            .packed(vec![jpeg.clone()])
            .grey_of(JPEG),
    );
    let (a, b) = jpeg.split_at(200);
    let pieces = vec![a.to_vec(), b.to_vec()];
    close(Sample::grey(8, false, 16).packed(pieces).grey_of(JPEG));
    let colour = jpeg_of(&[200; 96], 16, ExtendedColorType::Rgb8);
    let mut sample = Sample::rgb(16);
    sample.text(0x0028, 0x0004, VR::CS, "YBR_FULL_422");
    let grey = sample.packed(vec![colour]).grey_of(JPEG);
    assert!(grey.iter().all(|grey| grey.abs_diff(200) <= 2), "{grey:?}");
    // The header inside decides about memory: it has to agree with the file's.
    Sample::grey(8, false, 15)
        .packed(vec![jpeg.clone()])
        .refused(JPEG, "its JPEG is 16 x 2");
    Sample::grey(8, false, 16)
        .packed(vec![])
        .refused(JPEG, "JPEG");
    Sample::grey(8, false, 16)
        .packed(vec![jpeg])
        .refused(RLE, "run lengths");
}

#[test]
fn what_cannot_be_shown_rightly_is_refused_with_its_reason() {
    let pixels = [0u8; 6];
    let sample = || {
        let mut sample = Sample::grey(8, false, 3);
        sample.bytes(&pixels);
        sample
    };
    sample()
        .text(0x0028, 0x0008, VR::IS, "3")
        .refused(EXPLICIT, "it has 3 frames");
    assert!(decode(&sample().text(0x0028, 0x0008, VR::IS, "1").file(EXPLICIT)).is_ok());
    sample().window("40", "0").refused(EXPLICIT, "width 0");
    sample()
        .window("forty", "400")
        .refused(EXPLICIT, "\"forty\" is no number");
    sample()
        .text(0x0028, 0x1050, VR::DS, "40")
        .refused(EXPLICIT, "without the other");
    sample()
        .text(0x0028, 0x1053, VR::DS, "0")
        .refused(EXPLICIT, "rescale slope 0");
    let mut sigmoid = sample();
    sigmoid
        .window("40", "400")
        .text(0x0028, 0x1056, VR::CS, "SIGMOID");
    sigmoid.refused(EXPLICIT, "VOI LUT function SIGMOID");
    sample()
        .word(0x0028, 0x0100, 32)
        .refused(EXPLICIT, "8 or 16 allocated");
    sample()
        .word(0x0028, 0x0102, 11)
        .refused(EXPLICIT, "the highest being 11");
    sample()
        .word(0x0028, 0x0101, 0)
        .refused(EXPLICIT, "0 bits stored");
    sample()
        .word(0x0028, 0x0011, 4)
        .refused(EXPLICIT, "6 bytes of pixels, where 4 x 2 take 8");
    sample()
        .word(0x0028, 0x0002, 3)
        .refused(EXPLICIT, "with 3 samples");
    let mut none = Sample::grey(8, false, 3);
    none.text(0x0028, 0x1052, VR::DS, "1")
        .refused(EXPLICIT, "no pixels");
    let mut lut = sample();
    let item = InMemDicomObject::new_empty();
    let sequence = dicom_core::value::DataSetSequence::from(vec![item]);
    let value = Value::Sequence(sequence);
    lut.object
        .put(DataElement::new(Tag(0x0028, 0x3000), VR::SQ, value.clone()));
    lut.refused(EXPLICIT, "modality look-up table");
    let mut lut = sample();
    lut.object
        .put(DataElement::new(Tag(0x0028, 0x3010), VR::SQ, value));
    lut.refused(EXPLICIT, "VOI look-up table");
    assert!(decode(&lut.window("40", "400").file(EXPLICIT)).is_ok());
    sample().refused("1.2.840.10008.1.2.4.90", "(JPEG 2000) is not read");
    sample().refused(RLE, "not packed");
}

#[test]
fn elements_of_nested_sequences_are_not_the_pictures() {
    let mut sample = Sample::grey(8, false, 3);
    let mut icon = Sample::grey(8, false, 1);
    icon.bytes(&[77, 77]);
    let sequence = dicom_core::value::DataSetSequence::from(vec![icon.object]);
    let icons = DataElement::new(Tag(0x0009, 0x1110), VR::SQ, Value::Sequence(sequence));
    sample.object.put(icons);
    assert_eq!(
        sample.bytes(&[1, 2, 3, 4, 5, 6]).grey_of(EXPLICIT),
        [1, 2, 3, 4, 5, 6]
    );
}

#[test]
fn a_size_beyond_the_bounds_is_refused_before_memory_is_taken() {
    let mut huge = Sample::grey(16, false, 60_000);
    huge.word(0x0028, 0x0010, 60_000).words(&[1, 2]);
    huge.refused(EXPLICIT, "60000 x 60000 pixels: at most 16384");
    huge.word(0x0028, 0x0010, 16_000)
        .word(0x0028, 0x0011, 16_000);
    huge.refused(EXPLICIT, "16000 x 16000 pixels");
    // Within the bounds, and still nothing behind it.
    huge.word(0x0028, 0x0010, 8_000).word(0x0028, 0x0011, 8_000);
    huge.refused(EXPLICIT, "4 bytes of pixels");
    let mut packed = Sample::grey(16, false, 8_000);
    packed
        .word(0x0028, 0x0010, 8_000)
        .packed(vec![rle(&[vec![1; 4], vec![2; 4]])]);
    packed.refused(RLE, "too few for its size");
}

/// Files of every packing.
fn corpus() -> Vec<Vec<u8>> {
    let words: Vec<u16> = (0..32).map(|at| at * 37).collect();
    let bytes: Vec<u8> = (0..32).collect();
    let jpeg = jpeg_of(&bytes, 16, ExtendedColorType::L8);
    let mut plain = Sample::grey(12, true, 16);
    plain.window("40", "400").words(&words);
    let rle = rle(&[bytes.clone(), bytes.clone()]);
    vec![
        plain.file(EXPLICIT),
        plain.file(IMPLICIT),
        plain.file(BIG_ENDIAN),
        plain.file(DEFLATED),
        Sample::grey(16, false, 16).packed(vec![rle]).file(RLE),
        Sample::grey(8, false, 16).packed(vec![jpeg]).file(JPEG),
    ]
}

#[test]
fn a_file_cut_or_changed_anywhere_never_panics() {
    for whole in corpus() {
        decode(&whole).map(|_| ()).unwrap();
        for cut in 0..whole.len() {
            // The byte that fills an odd length may be missing.
            let kept = decode(&whole[..cut]);
            assert!(
                kept.is_err() || cut + 12 > whole.len(),
                "{cut} of {}",
                whole.len()
            );
        }
        for at in 0..whole.len() {
            for flip in [0x01, 0x80, 0xFF] {
                let mut changed = whole.clone();
                changed[at] ^= flip;
                let _ = decode(&changed);
            }
        }
        // Several changes at once, from one seed.
        let mut state = 7u64;
        for _ in 0..2_000 {
            let mut changed = whole.clone();
            for _ in 0..4 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let at = (state >> 33) as usize % changed.len();
                changed[at] = (state >> 20) as u8;
            }
            let _ = decode(&changed);
        }
    }
}

/// The test files of the Python package pydicom, where `TREFOIL_PYDICOM_FILES` names their folder:
/// all kinds of files, many of them broken on purpose. Prints what becomes of each.
#[test]
fn pydicoms_files_decode_or_say_why_not() {
    let Some(folder) = std::env::var_os("TREFOIL_PYDICOM_FILES") else {
        eprintln!("skipped: TREFOIL_PYDICOM_FILES names no folder of pydicom's test files");
        return;
    };
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "dcm"))
        .collect();
    paths.sort();
    let mut decoded = 0;
    for path in &paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let file = std::fs::read(path).unwrap();
        match std::panic::catch_unwind(|| decode(&file)).expect("no file makes it panic") {
            Ok(shown) => {
                decoded += 1;
                let picture = shown.picture;
                println!(
                    "{name}: {} x {} {:?}{}",
                    picture.width(),
                    picture.height(),
                    picture.color(),
                    if shown.stretched { ", stretched" } else { "" }
                );
            }
            Err(reason) => println!("{name}: refused: {reason}"),
        }
    }
    println!("{decoded} of {} files decode", paths.len());
    assert!(decoded >= 25, "{decoded} of {} files decode", paths.len());
}
