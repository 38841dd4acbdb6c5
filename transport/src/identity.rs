//! Who a node is: its certificate and private key, and the pin others know it by.
//!
//! Nothing but the public key counts in a certificate here: no chain, name or
//! date. Files are read elsewhere; this module sees DER bytes only.

use crate::TransportError;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

/// A node's certificate and private key.
#[derive(Clone)]
pub struct Identity {
    /// The certificate, DER.
    pub cert_der: Vec<u8>,
    /// The private key, PKCS#8 DER.
    pub key_der: Vec<u8>,
}

impl Identity {
    /// The pin by which others know this node.
    pub fn pin(&self) -> Result<Pin, TransportError> {
        Pin::of_certificate(&self.cert_der)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pin = self
            .pin()
            .map(|pin| pin.to_string())
            .unwrap_or_else(|_| "unreadable".into());
        write!(f, "Identity {{ pin: {pin}, key: <redacted> }}")
    }
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo (DER). Printed as hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pin([u8; 32]);

impl Pin {
    /// A pin from its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Pin {
        Pin(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The pin of a DER certificate.
    pub fn of_certificate(cert_der: &[u8]) -> Result<Pin, TransportError> {
        let der = CertificateDer::from(cert_der);
        let cert =
            webpki::EndEntityCert::try_from(&der).map_err(|err| TransportError::Certificate {
                detail: err.to_string(),
            })?;
        Ok(Pin(
            Sha256::digest(cert.subject_public_key_info().as_ref()).into()
        ))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

/// Why a text is not a pin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a pin is 64 hexadecimal digits, this has {found} characters or another sign among them")]
pub struct PinParseError {
    found: usize,
}

impl FromStr for Pin {
    type Err = PinParseError;

    fn from_str(text: &str) -> Result<Pin, PinParseError> {
        let error = PinParseError {
            found: text.chars().count(),
        };
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(error);
        }
        let mut bytes = [0u8; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (Some(high), Some(low)) = (hex_value(pair[0]), hex_value(pair[1])) else {
                return Err(error);
            };
            *byte = high << 4 | low;
        }
        Ok(Pin(bytes))
    }
}

fn hex_value(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

impl Serialize for Pin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pin, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_reads_back_what_it_prints_and_refuses_anything_else() {
        let pin = Pin([0xA7; 32]);
        assert_eq!(pin.to_string().parse::<Pin>(), Ok(pin));
        assert!("a7".parse::<Pin>().is_err());
        assert!("zz".repeat(32).parse::<Pin>().is_err());
        assert!("é".repeat(32).parse::<Pin>().is_err());
    }

    #[test]
    fn the_private_key_is_not_printed() {
        let identity = Identity {
            cert_der: vec![1],
            key_der: vec![222; 8],
        };
        assert!(!format!("{identity:?}").contains("222"));
    }
}
