//! The trust decisions: TLS 1.3 only, one hybrid post-quantum key exchange,
//! both sides authenticated by pinned public keys.
//!
//! A certificate is a carrier of a public key and nothing else: chain, name and
//! dates are ignored. Two checks remain, and both are needed: the key is pinned,
//! and the peer holds its private half (the handshake signature). Whoever
//! records all links of a data owner could add the shares up once the key
//! exchange is broken, hence X25519MLKEM768 and no fallback.
//!
//! Deliberately absent: 0-RTT (can be replayed), tickets and resumption (would
//! skip the check of the pin), a process-wide provider.

use crate::{Identity, Pin, TransportError};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, PeerMisbehaved, SignatureScheme,
};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// The application protocol both sides must name.
pub(crate) const ALPN: &[u8] = b"trefoil/1";

/// What a client names that only asks whether it would get in.
pub(crate) const PROBE_ALPN: &[u8] = b"trefoil-probe/1";

/// The name clients put into the handshake; nobody looks at it.
pub(crate) const SERVER_NAME: &str = "trefoil";

/// The algorithms of every handshake: aws-lc-rs with one key exchange.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        kx_groups: vec![aws_lc_rs::kx_group::X25519MLKEM768],
        // AES-128 first: the protocol's own randomness is AES-128, so a longer
        // key here buys nothing and costs throughput.
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// The node's certificate with its private key, checked to belong together.
pub(crate) fn certified_key(
    identity: &Identity,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, TransportError> {
    let cert = CertificateDer::from(identity.cert_der.clone());
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(identity.key_der.clone()));
    identity.pin()?;
    CertifiedKey::from_der(vec![cert], key, provider)
        .map(Arc::new)
        .map_err(|err| TransportError::Identity {
            detail: err.to_string(),
        })
}

/// The set of keys that may connect, shared with the verifier of a running endpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Allowed(Arc<RwLock<BTreeSet<Pin>>>);

impl Allowed {
    pub(crate) fn set(&self, pins: BTreeSet<Pin>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pins;
    }

    pub(crate) fn contains(&self, pin: &Pin) -> bool {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(pin)
    }
}

/// The listening side: demands a client certificate whose key is allowed.
pub(crate) fn server_config(
    key: Arc<CertifiedKey>,
    allowed: Allowed,
) -> Result<rustls::ServerConfig, rustls::Error> {
    let provider = provider();
    let verifier = AllowedClients {
        allowed,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN.to_vec(), PROBE_ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// What a client saw in one handshake, kept so that a refusal can name it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen(Arc<Mutex<Option<Pin>>>);

impl Seen {
    pub(crate) fn pin(&self) -> Option<Pin> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connecting side: demands exactly the key `expect`.
pub(crate) fn client_config(
    key: Arc<CertifiedKey>,
    expect: Pin,
    seen: Seen,
) -> Result<rustls::ClientConfig, rustls::Error> {
    let provider = provider();
    let verifier = PinnedServer {
        expect,
        seen,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.enable_early_data = false;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn pin_of(cert: &CertificateDer<'_>) -> Result<Pin, rustls::Error> {
    Pin::of_certificate(cert).map_err(|_| CertificateError::BadEncoding.into())
}

/// TLS 1.2 is not compiled in; a call here means that the peer broke the rules.
fn no_tls12() -> rustls::Error {
    PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into()
}

#[derive(Debug)]
struct PinnedServer {
    expect: Pin,
    seen: Seen,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = pin_of(end_entity)?;
        *self.seen.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        if found == self.expect {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct AllowedClients {
    allowed: Allowed,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AllowedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let found = pin_of(end_entity)?;
        if self.allowed.contains(&found) {
            Ok(ClientCertVerified::assertion())
        } else {
            tracing::warn!(pin = %found, "refused a connection: this public key is not in the consortium");
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{AlertDescription, ClientConnection, ConfigBuilder, NamedGroup, ServerConnection};

    struct Made {
        cert: CertificateDer<'static>,
        key: Arc<CertifiedKey>,
        pin: Pin,
    }

    fn made() -> Made {
        let made = rcgen::generate_simple_self_signed(vec!["node".into()]).unwrap();
        let identity = Identity {
            cert_der: made.cert.der().to_vec(),
            key_der: made.signing_key.serialize_der(),
        };
        Made {
            cert: made.cert.der().clone(),
            key: certified_key(&identity, &provider()).unwrap(),
            pin: identity.pin().unwrap(),
        }
    }

    /// The certificate of one node with the private key of another.
    fn stolen(cert: &Made, key: &Made) -> Arc<CertifiedKey> {
        Arc::new(CertifiedKey::new(
            vec![cert.cert.clone()],
            key.key.key.clone(),
        ))
    }

    fn allowing(pin: Pin) -> Allowed {
        let allowed = Allowed::default();
        allowed.set(BTreeSet::from([pin]));
        allowed
    }

    /// Errors of client and server.
    type Failures = (Option<rustls::Error>, Option<rustls::Error>);

    /// Runs a handshake in memory.
    fn handshake(
        client: rustls::ClientConfig,
        server: rustls::ServerConfig,
    ) -> Result<ClientConnection, Box<Failures>> {
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        let (mut client_error, mut server_error) = (None, None);
        for _ in 0..8 {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            let mut rest = &wire[..];
            while !rest.is_empty() && server.read_tls(&mut rest).unwrap() > 0 {
                server_error = server_error.or(server.process_new_packets().err());
            }
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut rest = &wire[..];
            while !rest.is_empty() && client.read_tls(&mut rest).unwrap() > 0 {
                client_error = client_error.or(client.process_new_packets().err());
            }
        }
        let done = !client.is_handshaking() && !server.is_handshaking();
        if done && client_error.is_none() && server_error.is_none() {
            Ok(client)
        } else {
            Err(Box::new((client_error, server_error)))
        }
    }

    #[test]
    fn pinned_nodes_agree_on_the_post_quantum_key_exchange_and_nothing_is_resumed() {
        let (a, b) = (made(), made());
        let client = client_config(a.key, b.pin, Seen::default()).unwrap();
        let server = server_config(b.key, allowing(a.pin)).unwrap();
        let done = handshake(client, server).unwrap();
        let group = done.negotiated_key_exchange_group().unwrap();
        assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
        assert_eq!(done.alpn_protocol(), Some(ALPN));
        assert_eq!(done.tls13_tickets_received(), 0);
        assert_eq!(done.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }

    #[test]
    fn a_client_that_offers_only_a_classical_key_exchange_is_refused() {
        let (a, b) = (made(), made());
        let classical = Arc::new(CryptoProvider {
            kx_groups: vec![aws_lc_rs::kx_group::X25519],
            ..aws_lc_rs::default_provider()
        });
        let verifier = PinnedServer {
            expect: b.pin,
            seen: Seen::default(),
            algorithms: classical.signature_verification_algorithms,
        };
        let builder: ConfigBuilder<_, _> = rustls::ClientConfig::builder_with_provider(classical)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap();
        let mut client = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(a.key)));
        client.alpn_protocols = vec![ALPN.to_vec()];
        let server = server_config(b.key, allowing(a.pin)).unwrap();
        let (client_error, server_error) = *handshake(client, server).unwrap_err();
        assert_eq!(
            server_error,
            Some(rustls::PeerIncompatible::NoKxGroupsInCommon.into())
        );
        let alert = rustls::Error::AlertReceived(AlertDescription::HandshakeFailure);
        assert_eq!(client_error, Some(alert));
    }

    #[test]
    fn the_right_certificate_with_another_private_key_is_refused_on_both_sides() {
        let (a, b, thief) = (made(), made(), made());
        let bad_signature = Some(rustls::Error::from(CertificateError::BadSignature));

        let client = client_config(a.key.clone(), b.pin, Seen::default()).unwrap();
        let server = server_config(stolen(&b, &thief), allowing(a.pin)).unwrap();
        assert_eq!(handshake(client, server).unwrap_err().0, bad_signature);

        let client = client_config(stolen(&a, &thief), b.pin, Seen::default()).unwrap();
        let server = server_config(b.key.clone(), allowing(a.pin)).unwrap();
        assert_eq!(handshake(client, server).unwrap_err().1, bad_signature);
    }

    #[test]
    fn a_key_that_is_not_pinned_and_a_client_that_is_not_allowed_are_refused() {
        let (a, b, other) = (made(), made(), made());
        let refused = Some(rustls::Error::from(
            CertificateError::ApplicationVerificationFailure,
        ));

        let seen = Seen::default();
        let client = client_config(a.key.clone(), other.pin, seen.clone()).unwrap();
        let server = server_config(b.key.clone(), allowing(a.pin)).unwrap();
        assert_eq!(handshake(client, server).unwrap_err().0, refused);
        assert_eq!(seen.pin(), Some(b.pin));

        let client = client_config(a.key.clone(), b.pin, Seen::default()).unwrap();
        let server = server_config(b.key.clone(), allowing(other.pin)).unwrap();
        assert_eq!(handshake(client, server).unwrap_err().1, refused);
    }

    #[test]
    fn an_identity_whose_key_is_another_is_refused_before_it_is_used() {
        let (a, b) = (
            rcgen::generate_simple_self_signed(vec![]).unwrap(),
            rcgen::KeyPair::generate().unwrap(),
        );
        let mixed = Identity {
            cert_der: a.cert.der().to_vec(),
            key_der: b.serialize_der(),
        };
        assert!(matches!(
            certified_key(&mixed, &provider()),
            Err(TransportError::Identity { .. })
        ));
    }
}
