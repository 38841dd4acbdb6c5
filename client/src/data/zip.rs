//! As much of the zip format as an `.npz` needs: the central directory, and
//! members stored or deflated. Every length is checked against the file's own
//! length and [`super::limits`] before it is used, sizes and CRC-32 after.
//!
//! It deliberately has no zip64 (members over 4 GiB), encryption, or file
//! system side. Why not the `zip` package: the reader of arrays has to know a
//! member's sizes before it unpacks it, and needs nothing else.
//!
//! Next: [`super::npz`].

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use flate2::{Crc, read::DeflateDecoder};

use super::{DataError, limits};

const END_BYTES: u64 = 22;
const LONGEST_COMMENT: u64 = 0xffff;
const MAX_DIRECTORY_BYTES: u64 = 1 << 20;
const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// An open archive: its directory is read, its members are not.
pub struct Archive {
    name: String,
    source: BufReader<File>,
    length: u64,
    members: Vec<Member>,
}

struct Member {
    name: String,
    flags: u16,
    method: u16,
    crc: u32,
    packed_bytes: u64,
    bytes: u64,
    offset: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Archive {
    /// Opens an archive and reads its central directory.
    pub fn open(path: &Path) -> Result<Archive, DataError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| DataError::read(path, &error))?;
        let length = file
            .metadata()
            .map_err(|error| DataError::read(path, &error))?
            .len();
        let mut archive = Archive {
            name,
            source: BufReader::new(file),
            length,
            members: vec![],
        };
        archive.read_directory()?;
        Ok(archive)
    }

    /// The members' names, in the directory's order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.name.as_str())
    }

    /// Unpacks one member; `None` where there is none of that name.
    pub fn member(&mut self, name: &str) -> Result<Option<Vec<u8>>, DataError> {
        match self.members.iter().position(|member| member.name == name) {
            None => Ok(None),
            Some(at) => self.unpack(at).map(Some),
        }
    }

    fn corrupt(&self, reason: impl ToString) -> DataError {
        DataError::corrupt(&self.name, reason)
    }

    fn bytes_at(&mut self, offset: u64, bytes: u64, what: &str) -> Result<Vec<u8>, DataError> {
        if offset
            .checked_add(bytes)
            .is_none_or(|end| end > self.length)
        {
            return Err(self.corrupt(format!("{what} lies beyond the end of the file")));
        }
        let mut data = Vec::new();
        let sought = self.source.seek(SeekFrom::Start(offset));
        let read = sought.and_then(|_| self.source.by_ref().take(bytes).read_to_end(&mut data));
        match read {
            Ok(read) if read as u64 == bytes => Ok(data),
            Ok(_) => Err(self.corrupt(format!("{what} is cut off"))),
            Err(error) => Err(self.corrupt(error)),
        }
    }

    fn read_directory(&mut self) -> Result<(), DataError> {
        let tail_bytes = self.length.min(END_BYTES + LONGEST_COMMENT);
        let tail = self.bytes_at(self.length - tail_bytes, tail_bytes, "the end")?;
        // The comment's length must fit exactly, so that a signature inside a
        // comment is not taken for the record.
        let end = (0..(tail.len() + 1).saturating_sub(END_BYTES as usize))
            .rev()
            .find(|&at| {
                tail[at..].starts_with(b"PK\x05\x06")
                    && at + END_BYTES as usize + usize::from(u16_at(&tail, at + 20)) == tail.len()
            })
            .ok_or_else(|| self.corrupt("not a zip archive, or cut off: no end record"))?;
        let count = u16_at(&tail, end + 10);
        let bytes = u64::from(u32_at(&tail, end + 12));
        let offset = u64::from(u32_at(&tail, end + 16));
        if count == u16::MAX || offset == u64::from(u32::MAX) {
            return Err(self.corrupt("zip64 is not read; write the arrays to smaller files"));
        }
        if bytes > MAX_DIRECTORY_BYTES {
            return Err(DataError::field(
                &self.name,
                "size of the directory",
                format!("at most {MAX_DIRECTORY_BYTES} bytes"),
                bytes,
            ));
        }
        let directory = self.bytes_at(offset, bytes, "the directory")?;
        let mut rest = directory.as_slice();
        for _ in 0..count {
            if rest.len() < 46 || !rest.starts_with(b"PK\x01\x02") {
                return Err(self.corrupt("a directory entry is cut off or out of place"));
            }
            let name_bytes = usize::from(u16_at(rest, 28));
            let entry =
                46 + name_bytes + usize::from(u16_at(rest, 30)) + usize::from(u16_at(rest, 32));
            if rest.len() < entry {
                return Err(self.corrupt("a directory entry is cut off"));
            }
            self.members.push(Member {
                name: String::from_utf8_lossy(&rest[46..46 + name_bytes]).into_owned(),
                flags: u16_at(rest, 8),
                method: u16_at(rest, 10),
                crc: u32_at(rest, 16),
                packed_bytes: u64::from(u32_at(rest, 20)),
                bytes: u64::from(u32_at(rest, 24)),
                offset: u64::from(u32_at(rest, 42)),
            });
            rest = &rest[entry..];
        }
        Ok(())
    }

    fn unpack(&mut self, at: usize) -> Result<Vec<u8>, DataError> {
        let member = &self.members[at];
        let place = format!("{}, member {}", self.name, member.name);
        let (flags, method, crc) = (member.flags, member.method, member.crc);
        let (packed_bytes, bytes, offset) = (member.packed_bytes, member.bytes, member.offset);
        if flags & 1 != 0 {
            return Err(DataError::corrupt(&place, "encrypted members are not read"));
        }
        // The header of an array is small, so the bound on arrays holds here too.
        if bytes > limits::MAX_BYTES {
            let most = format!("at most {} bytes", limits::MAX_BYTES);
            return Err(DataError::field(&place, "size", most, bytes));
        }
        let local = self.bytes_at(offset, 30, "a member's header")?;
        if !local.starts_with(b"PK\x03\x04") {
            return Err(DataError::corrupt(
                &place,
                "no header where the directory says",
            ));
        }
        let data = offset + 30 + u64::from(u16_at(&local, 26)) + u64::from(u16_at(&local, 28));
        let packed = self.bytes_at(data, packed_bytes, "a member's data")?;
        let mut unpacked = Vec::new();
        let read = match method {
            STORED => packed.as_slice().take(bytes + 1).read_to_end(&mut unpacked),
            DEFLATED => DeflateDecoder::new(packed.as_slice())
                .take(bytes + 1)
                .read_to_end(&mut unpacked),
            other => {
                let expected = "0 (stored) or 8 (deflated)";
                return Err(DataError::field(
                    &place,
                    "compression method",
                    expected,
                    other,
                ));
            }
        };
        read.map_err(|error| DataError::corrupt(&place, error))?;
        if unpacked.len() as u64 != bytes {
            let found = if unpacked.len() as u64 > bytes {
                "more".into()
            } else {
                unpacked.len().to_string()
            };
            return Err(DataError::field(&place, "unpacked bytes", bytes, found));
        }
        let mut sum = Crc::new();
        sum.update(&unpacked);
        if sum.sum() != crc {
            let (expected, found) = (format!("{crc:08x}"), format!("{:08x}", sum.sum()));
            return Err(DataError::field(&place, "CRC-32", expected, found));
        }
        Ok(unpacked)
    }
}
