//! TLS of the streaming server: reads certificate and key once, at start. Fails with the file's name.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::core::config::Stream;
use crate::core::error::{Error, Kind, Result};

/// None without files.
pub fn acceptor(config: &Stream) -> Result<Option<TlsAcceptor>> {
    let (Some(cert), Some(key)) = (&config.tls_cert_file, &config.tls_key_file) else { return Ok(None) };
    let bad = |file: &camino::Utf8Path, e: rustls::pki_types::pem::Error| {
        Error::because(Kind::InvalidArgument, format!("server.stream: {file}"), e)
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect).map_err(|e| bad(cert, e))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, e))?;
    let unfit = |e| Error::because(Kind::InvalidArgument, format!("server.stream: {cert} and {key}"), e);
    let server = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unfit)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(unfit)?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}
