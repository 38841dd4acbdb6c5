//! Bounds a file before it is decoded: an empty message takes two bytes in a file and a hundred times
//! that in memory, so that a small hostile file could take gigabytes. Only weights may be large, and
//! only in the fields whose values take no more in memory than in the file.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::ExchangeError;

/// Bytes of a file.
pub const MAX_FILE_BYTES: usize = 256 << 20;
/// Bytes of what is decoded without weights: nodes, names, attributes, shapes.
const MAX_GRAPH_BYTES: usize = 2 << 20;

/// Fields of the file, its graph or an initialiser.
const MAX_FIELDS: usize = 1 << 17;

/// Of the file: producer, its version, graph, operator sets.
const FILE: [u32; 4] = [2, 3, GRAPH, 8];
const GRAPH: u32 = 7;
/// Of the graph: nodes, name, initialisers, inputs, outputs.
const INSIDE: [u32; 5] = [NODE, 2, INITIALIZER, 11, 12];
const NODE: u32 = 1;
const INITIALIZER: u32 = 5;
/// Of a node what is not decoded: documentation, and where an exporter found it, which can be long.
const SKIPPED: [u32; 2] = [6, 9];
/// `float_data`, `raw_data`, `double_data`.
const ELEMENTS: [u32; 3] = [4, 9, 10];

/// The fields of a message: number, and bytes if it is length-delimited.
fn fields(mut rest: &[u8]) -> Result<Vec<(u32, &[u8])>, ExchangeError> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (tag, wire) = decode_key(&mut rest)?;
        if wire == WireType::LengthDelimited {
            let length = decode_varint(&mut rest)?;
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            // What is cut short is found, and said, by the decoder.
            let (field, behind) = rest.split_at(length.min(rest.len()));
            found.push((tag, field));
            rest = behind;
        } else {
            skip_field(wire, tag, &mut rest, DecodeContext::default())?;
        }
        if found.len() > MAX_FIELDS {
            return Err(ExchangeError::File {
                problem: format!("a message with more than {MAX_FIELDS} fields"),
            });
        }
    }
    Ok(found)
}

/// Refuses a file whose messages would take much more memory than the file does.
pub fn check(file: &[u8]) -> Result<(), ExchangeError> {
    let refuse = |problem: String| Err(ExchangeError::File { problem });
    if file.len() > MAX_FILE_BYTES {
        return refuse(format!(
            "{} bytes; at most {MAX_FILE_BYTES} are read",
            file.len()
        ));
    }
    let mut light = 0;
    let without = |message, left_out: &[u32]| {
        let all = fields(message)?;
        let gone = all.iter().filter(|field| left_out.contains(&field.0));
        Ok::<usize, ExchangeError>(message.len() - gone.map(|field| field.1.len()).sum::<usize>())
    };
    for (tag, field) in fields(file)?.into_iter().filter(|f| FILE.contains(&f.0)) {
        if tag != GRAPH {
            light += field.len() + 2;
            continue;
        }
        for (tag, field) in fields(field)?.into_iter().filter(|f| INSIDE.contains(&f.0)) {
            light += 2 + match tag {
                NODE => without(field, &SKIPPED)?,
                INITIALIZER => without(field, &ELEMENTS)?,
                _ => field.len(),
            };
        }
    }
    match light <= MAX_GRAPH_BYTES {
        true => Ok(()),
        false => refuse(format!(
            "{light} bytes besides weights; at most {MAX_GRAPH_BYTES} are read"
        )),
    }
}
