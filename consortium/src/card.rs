//! A public card: the one line by which a node or member introduces itself to a consortium.
//!
//! ```text
//! trefoil-card v1 role=hospital id=st-anna name="St. Anna" pin=9f… check=1b2c3d4e
//! ```
//!
//! It holds nothing secret and travels by mail or chat: line breaks, quotation marks made curly,
//! marks of quoted mail and text around it do no harm, and `check` finds a card that was cut or
//! altered by accident. Against intent only a comparison of the pin by another way helps.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use trefoil_transport::Pin;

use crate::{check_name, line};

/// What every card starts with.
const MARK: &str = "trefoil-card";
/// The format's version.
const VERSION: &str = "v1";
/// Longest display name.
const TITLE_MAX_CHARS: usize = 64;
/// Longest address: a host name of 253 characters and a port.
const ADDRESS_MAX_BYTES: usize = 260;
/// Most cards in one text.
const CARDS_MAX: usize = 10_000;

/// What the holder of a card is in a consortium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CardRole {
    /// Computes on shares.
    Party,
    /// Deals correlated randomness.
    Dealer,
    /// Brings data.
    Hospital,
    /// Asks for results.
    Analyst,
}

impl CardRole {
    /// As cards and commands write it.
    pub fn as_str(self) -> &'static str {
        match self {
            CardRole::Party => "party",
            CardRole::Dealer => "dealer",
            CardRole::Hospital => "hospital",
            CardRole::Analyst => "analyst",
        }
    }

    /// Whether others connect to it.
    pub fn listens(self) -> bool {
        matches!(self, CardRole::Party | CardRole::Dealer)
    }
}

impl fmt::Display for CardRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CardRole {
    type Err = String;

    fn from_str(text: &str) -> Result<CardRole, String> {
        let all = [
            CardRole::Party,
            CardRole::Dealer,
            CardRole::Hospital,
            CardRole::Analyst,
        ];
        all.into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is none of party, dealer, hospital, analyst"))
    }
}

/// Who somebody is, for a consortium file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// What it is in the consortium.
    pub role: CardRole,
    /// Its name in files, messages and policies.
    pub id: String,
    /// Its name for people.
    pub title: String,
    /// Its public key's pin.
    pub pin: Pin,
    /// Where others reach it, `host:port`; parties and the dealer only.
    pub address: Option<String>,
}

/// Why a text holds no usable card.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("card {number}: {detail}")]
pub struct CardError {
    /// Which card of the text, from 1.
    pub number: usize,
    /// What is wrong with it, and what to do.
    pub detail: String,
}

/// The name in files that follows from a display name: lower-case ASCII letters and digits, and one
/// `-` for every run of anything else. `None` where letters would be lost, or nothing is left.
pub fn id_of(title: &str) -> Option<String> {
    if title.chars().any(|c| c.is_alphanumeric() && !c.is_ascii()) {
        return None;
    }
    let words = title
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    let id = words.collect::<Vec<_>>().join("-").to_ascii_lowercase();
    check_name(&id).is_ok().then_some(id)
}

/// Checks a name for people, and returns it with single spaces.
pub fn check_title(title: &str) -> Result<String, String> {
    let title = title.split_whitespace().collect::<Vec<_>>().join(" ");
    let plain = |c: char| c.is_alphanumeric() || " .,-'’&()/+".contains(c);
    let fits = (1..=TITLE_MAX_CHARS).contains(&title.chars().count())
        && title.chars().all(plain)
        && title.chars().any(char::is_alphanumeric)
        && !title.contains(MARK);
    if fits {
        return Ok(title);
    }
    Err(format!(
        "{title:?} is no name: 1 to {TITLE_MAX_CHARS} letters, digits, spaces and .,-'&()/+ are possible"
    ))
}

/// Checks an address: a host and a port that others can connect to.
pub fn check_address(address: &str) -> Result<(), String> {
    let wrong = |detail: &str| Err(format!("{address:?} is no address: {detail}"));
    let Some((host, port)) = address.rsplit_once(':') else {
        return wrong("expected host:port, as in north.example.org:7100");
    };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let ipv6 = |c: char| c.is_ascii_hexdigit() || ":.".contains(c);
    let host_fits = match bracketed {
        true => host[1..host.len() - 1].chars().all(ipv6),
        false => host.chars().all(plain),
    };
    if host.is_empty() || !host_fits || address.len() > ADDRESS_MAX_BYTES {
        return wrong("its host is neither a name nor an IP address (IPv6 in square brackets)");
    }
    if ["0.0.0.0", "[::]"].contains(&host) {
        return wrong("this means every interface; say where others reach the node");
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(()),
        _ => wrong("its port is not 1 to 65535"),
    }
}

impl Card {
    /// Checks that the fields fit each other.
    pub fn check(&self) -> Result<(), String> {
        check_name(&self.id)?;
        if check_title(&self.title)? != self.title {
            return Err(format!("{:?} has spaces too many", self.title));
        }
        match (&self.address, self.role.listens()) {
            (Some(address), true) => check_address(address),
            (None, false) => Ok(()),
            (None, true) => Err(format!("a {} needs an address", self.role)),
            (Some(_), false) => Err(format!(
                "a {} has no address: nobody connects to it",
                self.role
            )),
        }
    }

    /// All cards in a text, in order; what stands around them is left alone.
    pub fn parse_all(text: &str) -> Result<Vec<Card>, CardError> {
        let text = line::ironed(text);
        let mut cards = Vec::new();
        for (at, body) in text.split(MARK).skip(1).enumerate() {
            let number = at + 1;
            let wrong = |detail| CardError { number, detail };
            if number > CARDS_MAX {
                return Err(wrong(format!("at most {CARDS_MAX} cards are read")));
            }
            cards.push(parse(body).map_err(wrong)?);
        }
        Ok(cards)
    }

    fn body(&self) -> String {
        let Card {
            role,
            id,
            title,
            pin,
            address,
        } = self;
        let address = address
            .as_ref()
            .map_or(String::new(), |address| format!(" address={address}"));
        format!("{MARK} {VERSION} role={role} id={id} name=\"{title}\" pin={pin}{address}")
    }

    fn check_sum(&self) -> String {
        line::check_sum(b"trefoil card v1\0", &self.body())
    }
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} check={}", self.body(), self.check_sum())
    }
}

/// Parses what follows the mark, up to the check.
fn parse(body: &str) -> Result<Card, String> {
    let keys = ["role", "id", "name", "pin", "address", "check"];
    let [role, id, title, pin, address, check] = line::fields(body, VERSION, &keys)?;
    let card = Card {
        role: line::given(role, "role")?.parse()?,
        id: line::given(id, "id")?,
        title: line::given(title, "name")?,
        pin: line::given(pin, "pin")?
            .parse()
            .map_err(|err| format!("pin: {err}"))?,
        address,
    };
    line::check(check, &card.check_sum())?;
    card.check()?;
    Ok(card)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party() -> Card {
        Card {
            role: CardRole::Party,
            id: "north-clinic".into(),
            title: "North Clinic".into(),
            pin: Pin::from_bytes([0xab; 32]),
            address: Some("north.example.org:7100".into()),
        }
    }

    fn hospital() -> Card {
        Card {
            role: CardRole::Hospital,
            id: "st-anna".into(),
            title: "St. Anna".into(),
            pin: Pin::from_bytes([1; 32]),
            address: None,
        }
    }

    fn fault(text: &str) -> String {
        Card::parse_all(text).unwrap_err().to_string()
    }

    #[test]
    fn cards_are_read_as_they_are_written_whatever_mail_does_to_them() {
        let text = format!("{}\n{}\n", party(), hospital());
        assert_eq!(Card::parse_all(&text), Ok(vec![party(), hospital()]));
        assert!(!hospital().to_string().contains('\n'));

        let mailed = format!(
            "Dear all,\n> {}\nBest = regards\n",
            hospital()
                .to_string()
                .replace("\"St. Anna\"", "“St.\n> Anna”")
                .replace(" pin=", "\u{a0}\r\n> pin=")
        );
        // The mark of quoted mail inside the name is the one thing that cannot be told apart.
        let mailed = mailed.replace("“St.\n> Anna”", "“St.\nAnna”");
        assert_eq!(Card::parse_all(&mailed), Ok(vec![hospital()]));
        assert_eq!(Card::parse_all("no cards here"), Ok(vec![]));
    }

    #[test]
    fn a_card_that_was_cut_or_altered_is_refused_with_its_number() {
        let good = party().to_string();
        let at = good.rfind(" check").unwrap();
        assert!(fault(&good[..at]).contains("no check"));
        assert!(fault(&format!("{good} {}", &good[..at - 5])).starts_with("card 2"));
        assert!(fault(&good.replace(":7100", ":7101")).contains("altered"));
        assert!(fault(&good.replace("North Clinic", "South Clinic")).contains("altered"));
        assert!(fault(&good.replace("abab", "ab")).contains("pin"));
        assert!(fault(&good.replace(" v1 ", " v9 ")).contains("v9"));
        assert!(fault(&good.replace("role=party", "role=boss")).contains("boss"));
        assert!(fault(&good.replace(" id=", " id=x id=")).contains("twice"));
        assert!(fault(&good.replace(" id=", " age=3 id=")).contains("age"));
    }

    #[test]
    fn a_card_with_a_right_check_and_wrong_content_is_refused() {
        let wrong = |change: fn(&mut Card)| {
            let mut card = party();
            change(&mut card);
            fault(&card.to_string())
        };
        assert!(wrong(|card| card.id = "../keys".into()).contains("no name"));
        assert!(wrong(|card| card.address = None).contains("needs an address"));
        assert!(wrong(|card| card.address = Some("0.0.0.0:7100".into())).contains("interface"));
        assert!(wrong(|card| card.role = CardRole::Analyst).contains("nobody connects"));
    }

    #[test]
    fn names_for_files_follow_from_names_for_people_or_are_asked_for() {
        assert_eq!(id_of("St. Anna").as_deref(), Some("st-anna"));
        assert_eq!(
            id_of("  Clinic 7 (East) ").as_deref(),
            Some("clinic-7-east")
        );
        assert_eq!(id_of("Hôpital Nord"), None);
        assert_eq!(id_of("..."), None);
        assert_eq!(check_title(" St.  Anna "), Ok("St. Anna".into()));
        for title in ["", "a\"b", "a\u{202e}b", "x trefoil-card y", "(.)"] {
            assert!(check_title(title).is_err(), "{title:?}");
        }
    }

    #[test]
    fn addresses_name_a_host_and_a_port() {
        for good in ["a.b:1", "10.0.0.1:7100", "[::1]:7100", "[fe80::1]:9"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for bad in [
            "a.b",
            "a.b:0",
            "a.b:70000",
            ":7100",
            "a b:1",
            "[::]:1",
            "::1:7100",
        ] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }
}
