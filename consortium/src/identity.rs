//! A node's or a member's key pair: made, saved, loaded, and used to sign receipts and consortium
//! files.
//!
//! Keys are ECDSA on P-256. Nothing in a certificate counts but its public key; TLS itself is the
//! transport's business.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair,
    UnparsedPublicKey,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_transport::{Identity, Pin};

/// Longest certificate or key file that is read.
const FILE_MAX_BYTES: u64 = 64 << 10;
/// DER of a P-256 SubjectPublicKeyInfo up to the point itself.
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// An uncompressed point on P-256.
const POINT_BYTES: usize = 65;
/// Longest ASN.1 signature on P-256.
const SIGNATURE_MAX_BYTES: usize = 80;

/// Why an identity cannot be made, read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A key pair or certificate could not be made.
    #[error("a key pair cannot be made: {0}")]
    Make(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A private key that others on this machine can read.
    #[error("{path}: mode {mode:03o} lets others read this private key; run: chmod 600 {path}")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file holds something else.
    #[error("{path}: {detail}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The key cannot sign.
    #[error("this key cannot sign: {0}")]
    Sign(String),
    /// A signature that does not hold.
    #[error("the signature of {signer} does not hold")]
    Signature {
        /// Whose signature it should be.
        signer: Pin,
    },
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> IdentityError + '_ {
    |source| IdentityError::File {
        path: path.to_owned(),
        source,
    }
}

/// A new key pair with a self-signed certificate for `name`.
pub fn generate(name: &str) -> Result<Identity, IdentityError> {
    let failed = |err: rcgen::Error| IdentityError::Make(err.to_string());
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = rcgen::CertificateParams::new(vec![]).map_err(failed)?;
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(Identity {
        cert_der: certificate.der().to_vec(),
        key_der: key.serialize_der(),
    })
}

/// The pin by which others know this identity.
pub fn pin(identity: &Identity) -> Result<Pin, IdentityError> {
    identity
        .pin()
        .map_err(|err| IdentityError::Make(err.to_string()))
}

/// Writes certificate and private key (DER); the key with mode 0600, never over an existing file.
pub fn save(identity: &Identity, certificate: &Path, key: &Path) -> Result<(), IdentityError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(key).map_err(file_error(key))?;
    file.write_all(&identity.key_der).map_err(file_error(key))?;
    file.sync_all().map_err(file_error(key))?;
    fs::write(certificate, &identity.cert_der).map_err(file_error(certificate))
}

/// Reads certificate and private key, and checks that they belong together and that nobody else
/// on this machine can read the key.
pub fn load(certificate: &Path, key: &Path) -> Result<Identity, IdentityError> {
    #[cfg(unix)]
    {
        let mode =
            std::os::unix::fs::MetadataExt::mode(&fs::metadata(key).map_err(file_error(key))?)
                & 0o777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed {
                path: key.to_owned(),
                mode,
            });
        }
    }
    let identity = Identity {
        cert_der: read(certificate)?,
        key_der: read(key)?,
    };
    let content = |path: &Path, detail: String| IdentityError::Content {
        path: path.to_owned(),
        detail,
    };
    let pin = identity
        .pin()
        .map_err(|err| content(certificate, err.to_string()))?;
    let signer = Signer::new(&identity).map_err(|err| content(key, err.to_string()))?;
    if signer.pin() != pin {
        return Err(content(
            key,
            format!("is not the private key of {}", certificate.display()),
        ));
    }
    Ok(identity)
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let len = fs::metadata(path).map_err(file_error(path))?.len();
    if len > FILE_MAX_BYTES {
        let detail = format!("{len} bytes are too long for a key or certificate");
        return Err(IdentityError::Content {
            path: path.to_owned(),
            detail,
        });
    }
    fs::read(path).map_err(file_error(path))
}

/// The pin of a public point.
fn pin_of_point(point: &[u8]) -> Option<Pin> {
    (point.len() == POINT_BYTES).then(|| {
        Pin::from_bytes(
            Sha256::new()
                .chain_update(SPKI_PREFIX)
                .chain_update(point)
                .finalize()
                .into(),
        )
    })
}

/// Signs with an identity's key.
pub struct Signer {
    key: EcdsaKeyPair,
    pin: Pin,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({})", self.pin)
    }
}

/// A signature with the public key that it is checked with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    point: Vec<u8>,
    signature: Vec<u8>,
}

impl Signer {
    /// The signer of an identity.
    pub fn new(identity: &Identity) -> Result<Signer, IdentityError> {
        let failed = |detail: String| IdentityError::Sign(detail);
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &identity.key_der)
            .map_err(|err| failed(format!("not a P-256 key in PKCS#8: {err}")))?;
        let pin = pin_of_point(key.public_key().as_ref())
            .ok_or_else(|| failed("its public key has another form".into()))?;
        Ok(Signer { key, pin })
    }

    /// Who signs.
    pub fn pin(&self) -> Pin {
        self.pin
    }

    /// Signs `message`.
    pub fn sign(&self, message: &[u8]) -> Result<Signature, IdentityError> {
        let signature = self
            .key
            .sign(&SystemRandom::new(), message)
            .map_err(|err| IdentityError::Sign(err.to_string()))?;
        Ok(Signature {
            point: self.key.public_key().as_ref().to_vec(),
            signature: signature.as_ref().to_vec(),
        })
    }
}

impl Signature {
    /// The public point and the ASN.1 signature, for text forms.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        (&self.point, &self.signature)
    }

    /// From what [`Signature::parts`] gave; nothing is checked before [`Signature::verify`].
    pub(crate) fn from_parts(point: Vec<u8>, signature: Vec<u8>) -> Signature {
        Signature { point, signature }
    }

    /// Checks that the holder of the key pinned as `signer` signed `message`.
    pub fn verify(&self, signer: Pin, message: &[u8]) -> Result<(), IdentityError> {
        let known = pin_of_point(&self.point) == Some(signer)
            && self.signature.len() <= SIGNATURE_MAX_BYTES;
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.point);
        if known && key.verify(message, &self.signature).is_ok() {
            Ok(())
        } else {
            Err(IdentityError::Signature { signer })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_back_and_its_signature_holds_for_its_pin_only() {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = (
            folder.path().join("cert.der"),
            folder.path().join("key.der"),
        );
        let made = generate("st-anna").unwrap();
        save(&made, &certificate, &key).unwrap();
        assert!(
            save(&made, &certificate, &key).is_err(),
            "an existing key is not overwritten"
        );
        let read = load(&certificate, &key).unwrap();
        let signer = Signer::new(&read).unwrap();
        assert_eq!(signer.pin(), pin(&made).unwrap());

        let signature = signer.sign(b"twelve rows").unwrap();
        signature.verify(signer.pin(), b"twelve rows").unwrap();
        assert!(signature.verify(signer.pin(), b"thirteen rows").is_err());
        let other = pin(&generate("other").unwrap()).unwrap();
        assert!(signature.verify(other, b"twelve rows").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_and_a_key_of_another_certificate_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = (
            folder.path().join("cert.der"),
            folder.path().join("key.der"),
        );
        save(&generate("a").unwrap(), &certificate, &key).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let err = load(&certificate, &key).unwrap_err().to_string();
        assert!(
            err.contains("chmod 600") && err.contains("key.der"),
            "{err}"
        );

        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&certificate, generate("b").unwrap().cert_der).unwrap();
        let err = load(&certificate, &key).unwrap_err().to_string();
        assert!(err.contains("is not the private key of"), "{err}");
    }
}
