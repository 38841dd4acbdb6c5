//! How people and jobs name a kept model.

use crate::{Hex, JobId, check_name};

/// Fewest and most digits of a version.
const VERSION_DIGITS: std::ops::RangeInclusive<usize> = 8..=64;

/// A kept model as people and jobs name it: `NAME`, its newest version, or `NAME@VERSION`. A version
/// is the hash of the job that made it, or the first digits of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelRef<'a> {
    /// The name.
    pub name: &'a str,
    /// Digits of the version, lower case.
    pub version: Option<&'a str>,
}

impl<'a> ModelRef<'a> {
    /// Reads `NAME` or `NAME@VERSION`.
    pub fn parse(text: &'a str) -> Result<ModelRef<'a>, String> {
        let (name, version) = match text.split_once('@') {
            Some((name, version)) => (name, Some(version)),
            None => (text, None),
        };
        check_name(name)?;
        let digits = |version: &str| {
            let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            VERSION_DIGITS.contains(&version.len()) && version.bytes().all(hex)
        };
        match version.is_none_or(digits) {
            true => Ok(ModelRef { name, version }),
            false => Err(format!(
                "{text:?} names no version: after the @ belong 8 to 64 digits of the hash of the job that made the model"
            )),
        }
    }

    /// Whether it may mean the model that a job made under `name`.
    pub fn means(&self, name: &str, job: &JobId) -> bool {
        let of_version = |version: &str| job.to_string().starts_with(version);
        self.name == name && self.version.is_none_or(of_version)
    }

    /// How a job names a version: short enough to be read, long enough for a hash.
    pub fn text(name: &str, job: &JobId) -> String {
        format!("{name}@{}", Hex(&job.0[..8]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_with_or_without_a_version() {
        let job = JobId([0x5a; 32]);
        let text = ModelRef::text("m", &job);
        assert_eq!(text, "m@5a5a5a5a5a5a5a5a");
        for (text, means) in [
            ("m", true),
            (text.as_str(), true),
            ("m@5a5a5a5a", true),
            ("m@5a5a5a5b", false),
            ("n@5a5a5a5a", false),
        ] {
            assert_eq!(ModelRef::parse(text).unwrap().means("m", &job), means);
        }
    }
}
