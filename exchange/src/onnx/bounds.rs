//! Bounds a file before it is decoded: an empty message takes two bytes in a file and a hundred times
//! that in memory, so that a small hostile file could take gigabytes. Only weights may be large, and
//! only in the fields whose values take no more in memory than in the file.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::ExchangeError;

/// Bytes of a file.
pub const MAX_FILE_BYTES: usize = 256 << 20;
/// Bytes of a graph without its initialisers: nodes, names, attributes.
const MAX_GRAPH_BYTES: usize = 2 << 20;
/// Initialisers.
const MAX_TENSORS: usize = 1 << 14;
/// Bytes of a tensor without its floating-point elements.
const MAX_TENSOR_BYTES: usize = 64 << 10;

/// Fields of the file, its graph or an initialiser.
const MAX_FIELDS: usize = 1 << 17;

const GRAPH: u32 = 7;
const INITIALIZER: u32 = 5;
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
    let top = fields(file)?;
    let other: usize = top
        .iter()
        .filter(|f| f.0 != GRAPH)
        .map(|f| f.1.len() + 2)
        .sum();
    let mut light = other;
    let mut tensors = 0;
    for (_, graph) in top.iter().filter(|field| field.0 == GRAPH) {
        let inside = fields(graph)?;
        let mut heavy = 0;
        for (_, tensor) in inside.iter().filter(|field| field.0 == INITIALIZER) {
            tensors += 1;
            let elements = fields(tensor)?;
            let elements = elements.iter().filter(|field| ELEMENTS.contains(&field.0));
            let elements: usize = elements.map(|field| field.1.len()).sum();
            if tensor.len() - elements > MAX_TENSOR_BYTES {
                return refuse(format!(
                    "an initialiser has more than {MAX_TENSOR_BYTES} bytes besides floating-point elements"
                ));
            }
            heavy += tensor.len();
        }
        light += graph.len() - heavy;
    }
    if light > MAX_GRAPH_BYTES || tensors > MAX_TENSORS {
        return refuse(format!(
            "{light} bytes besides {tensors} initialisers; {MAX_GRAPH_BYTES} bytes and {MAX_TENSORS} initialisers are possible"
        ));
    }
    Ok(())
}
