//! The bounds on what a file's header may ask for, checked before anything is
//! allocated. They are far above the data sets this system is made for.

use super::DataError;

/// Records in one split.
pub const MAX_ROWS: usize = 1 << 24;
/// Height and width of a stored image, in pixels.
pub const MAX_SIDE: usize = 1 << 14;
/// Bytes of one array.
pub const MAX_BYTES: u64 = 1 << 31;
/// Bytes of one picture's file.
pub const MAX_PICTURE_FILE_BYTES: u64 = 1 << 28;

/// Pixels of one picture, before it is resized: a large mammogram has 23 million.
pub const MAX_PICTURE_PIXELS: u64 = 1 << 26;

/// Checks an array's dimensions (rows first) and returns its bytes.
pub fn check(name: &str, dims: &[usize]) -> Result<u64, DataError> {
    let mut bytes: u64 = 1;
    for (at, &dim) in dims.iter().enumerate() {
        let most = if at == 0 { MAX_ROWS } else { MAX_SIDE };
        let field = format!("dimension {at}");
        if dim == 0 {
            return Err(DataError::field(name, &field, "at least 1", 0));
        }
        if dim > most {
            return Err(DataError::field(
                name,
                &field,
                format!("at most {most}"),
                dim,
            ));
        }
        bytes = bytes.saturating_mul(dim as u64);
    }
    if bytes > MAX_BYTES {
        return Err(DataError::field(
            name,
            &format!("size of {dims:?}"),
            format!("at most {MAX_BYTES} bytes"),
            bytes,
        ));
    }
    Ok(bytes)
}
