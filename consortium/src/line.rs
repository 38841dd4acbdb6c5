//! Lines that travel by mail or chat, such as cards and signatures: a mark, a version, `key=value`
//! fields, and a check at the end. Line breaks, quotation marks made curly and marks of quoted mail
//! do no harm; the check finds a line that was cut or altered by accident, never by intent.

use sha2::{Digest, Sha256};

use crate::Hex;

/// A text without what mail and word processors do to it.
pub(crate) fn ironed(text: &str) -> String {
    let iron = |c: char| match c {
        '\u{200b}'..='\u{200f}' | '\u{2060}' | '\u{feff}' | '\u{ad}' => None,
        '“' | '”' | '„' | '«' | '»' => Some('"'),
        c if c.is_whitespace() => Some(' '),
        c => Some(c),
    };
    text.chars().filter_map(iron).collect()
}

/// The values of `keys` in what follows the mark; the last key is the check and ends the line.
pub(crate) fn fields<const N: usize>(
    body: &str,
    version: &str,
    keys: &[&str; N],
) -> Result<[Option<String>; N], String> {
    let mut rest = body.trim_start();
    let found = rest.split(' ').next().unwrap_or_default();
    if found != version {
        return Err(format!(
            "has version {:?}; this software reads {version} ({})",
            clip(found),
            crate::SOFTWARE
        ));
    }
    rest = &rest[found.len()..];
    let mut values = [const { None }; N];
    while values[N - 1].is_none() {
        // A mark of quoted mail may stand between two fields.
        rest = rest.trim_start_matches([' ', '>', '|']);
        if rest.is_empty() {
            return Err("is cut off: it has no check; copy the whole line".into());
        }
        let (key, after) = rest
            .split_once('=')
            .ok_or("is cut off or altered; copy the whole line")?;
        let at = keys.iter().position(|known| *known == key);
        let at = at.ok_or_else(|| format!("has an unknown field {:?}", clip(key)))?;
        let (value, left) = match after.strip_prefix('"') {
            Some(quoted) => quoted
                .split_once('"')
                .ok_or("is cut off: a quotation mark is missing; copy the whole line")?,
            None => after.split_once(' ').unwrap_or((after, "")),
        };
        let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
        if values[at].replace(value).is_some() {
            return Err(format!("gives {key} twice"));
        }
        rest = left;
    }
    Ok(values)
}

/// A field's value, which must be there.
pub(crate) fn given(value: Option<String>, key: &str) -> Result<String, String> {
    value.ok_or_else(|| format!("has no {key}; copy the whole line"))
}

/// The check of a line's content.
pub(crate) fn check_sum(domain: &[u8], body: &str) -> String {
    let hash = Sha256::new()
        .chain_update(domain)
        .chain_update(body)
        .finalize();
    Hex(&hash[..4]).to_string()
}

/// Compares the check that a line gives with the one of its content.
pub(crate) fn check(found: Option<String>, of_content: &str) -> Result<(), String> {
    let found = given(found, "check")?;
    if found == of_content {
        return Ok(());
    }
    Err(format!(
        "was altered on its way: its check is {:?}, its content gives {of_content}; ask for it again",
        clip(&found)
    ))
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}
