//! Whom we talk to: certificates by a CA, or by their SHA-256 fingerprints. There is no way to check nothing.
//!
//! Used once, when the client is made.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};

use crate::core::config::Proxmox as Settings;
use crate::core::error::{Error, Kind, Result};

/// Largest CA file in bytes.
const MAX_PEM: u64 = 1 << 20;

/// TLS as the configuration says.
pub(super) fn config(settings: &Settings) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let setup = |e: rustls::Error| Error::because(Kind::Internal, "TLS of the Proxmox client", e);
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(setup)?;
    let pinned = settings.fingerprints()?;
    if !pinned.is_empty() {
        let verifier = Arc::new(Pinned { pinned, provider });
        return Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth());
    }
    let path = settings.ca_file();
    let failed = |e: std::io::Error| Error::io(format!("proxmox.ca_file: {path}"), e);
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_PEM {
        return Err(Error::invalid(format!("proxmox.ca_file: {path} is no file of certificates: it is too large")));
    }
    let pem = std::fs::read(path).map_err(failed)?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let bad = |e: String| Error::invalid(format!("proxmox.ca_file: {path}: {e}"));
        roots.add(certificate.map_err(|e| bad(e.to_string()))?).map_err(|e| bad(e.to_string()))?;
    }
    if roots.is_empty() {
        return Err(Error::invalid(format!("proxmox.ca_file: {path} holds no certificate")));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Takes one of the pinned certificates, whoever it says it is; the server still proves that it has the key.
#[derive(Debug)]
struct Pinned {
    pinned: Vec<[u8; 32]>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found: [u8; 32] = Sha256::digest(certificate).into();
        if self.pinned.contains(&found) {
            return Ok(ServerCertVerified::assertion());
        }
        let text = found.iter().map(|b| format!("{b:02X}")).collect::<Vec<_>>().join(":");
        let text = format!("its fingerprint is {text}, which is not configured");
        Err(rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(Mismatch(text))))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Mismatch(String);

/// What a failed connection says about the certificate, if that is why.
pub(super) fn certificate_fault(e: &(dyn std::error::Error + 'static)) -> Option<String> {
    match tls_error(e)? {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => Some(other.0.to_string()),
        rustls::Error::InvalidCertificate(why) => Some(format!("{why:?}")),
        _ => None,
    }
}

fn tls_error<'a>(mut e: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    loop {
        if let Some(tls) = e.downcast_ref() {
            return Some(tls);
        }
        // io::Error's source is its inner error's source: the inner one has to be asked for.
        e = match e.downcast_ref::<std::io::Error>() {
            Some(io) => io.get_ref()?,
            None => e.source()?,
        };
    }
}
