//! Client of Distribution registries (OCI Distribution 1.1, Docker v2): manifests and blobs over HTTP(S).
//!
//! Called by the image store: a [`Session`] per pull asks the configured hosts in their order. Every wait has a limit,
//! every answer a largest size, and content by digest is compared. Fails with [`error::RegistryError`]; keeps nothing
//! on disk.

pub mod auth;
pub mod conf;
pub mod error;
pub mod explain;
pub mod hosts;
pub mod keychain;
pub mod proxy;
pub mod push;
mod tokens;
mod transport;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use camino::Utf8PathBuf;
use reqwest::header;

use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::RegistryAuth;
use crate::core::reference::Reference;
use crate::integrations::layers::pipeline::digest_of;

use error::RegistryError;
use hosts::Host;
use keychain::Keychain;
use proxy::{Clients, Proxies};
use tokens::Tokens;
use transport::{Ask, Connection};

/// Largest manifest or index in bytes.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image config in bytes.
pub const MAX_CONFIG: u64 = 8 << 20;
/// Kinds of manifest that are understood.
pub const MANIFEST_TYPES: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Settings of the client.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Folders with `<host>/hosts.toml`, first match counts.
    pub certs_dirs: Vec<Utf8PathBuf>,
    /// The node's own credentials.
    pub keychain: Keychain,
    /// How hosts are reached.
    pub proxies: Proxies,
    /// Limit for connecting, TLS included.
    pub connect_timeout: Duration,
    /// Limit for waiting without a byte.
    pub progress_timeout: Duration,
}

/// Talks to registries; shared by all pulls.
pub struct RegistryClient {
    config: RegistryConfig,
    keychain: Arc<Keychain>,
    /// Without TLS settings of their own; others are made for each session.
    plain: Arc<Clients>,
    tokens: Arc<Tokens>,
}

/// A manifest or index as it came.
#[derive(Debug, Clone)]
pub struct ManifestBytes {
    /// Content.
    pub bytes: Bytes,
    /// Content-Type, or "".
    pub media_type: String,
    /// Its digest, computed here.
    pub digest: Digest,
}

/// A blob on its way.
pub struct BlobStream {
    /// Host that sends it.
    pub host: String,
    /// Which of the session's hosts that is.
    pub index: usize,
    response: reqwest::Response,
    what: String,
    progress: Duration,
    connection: Arc<Connection>,
    path: String,
    /// Bytes that came.
    received: u64,
    /// What had come when the stream broke last, and how often it did.
    broken: (u64, u32),
}

/// How often a blob's broken stream is taken up again.
const MAX_RESUMES: u32 = 5;

impl BlobStream {
    /// The next piece; None at the end. A stream that breaks is taken up where it broke, if the host can.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            match transport::chunk(&mut self.response, &self.host, &self.what, self.progress).await {
                Ok(piece) => {
                    self.received += piece.as_ref().map_or(0, |p| p.len() as u64);
                    return Ok(piece);
                }
                Err(error) => self.resume(error).await?,
            }
        }
    }

    /// Asks for the rest; the stream's own failure counts where that can't be had.
    async fn resume(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        let (at, times) = self.broken;
        let broke = matches!(error, RegistryError::Unreachable { .. } | RegistryError::Timeout { .. });
        // Without a byte since the last time it would go on like this.
        if !broke || self.received <= at || times >= MAX_RESUMES {
            return Err(error);
        }
        self.broken = (self.received, times + 1);
        let ask = Ask { path: &self.path, accept: "*/*", what: &self.what, from: self.received };
        match self.connection.get(ask).await {
            Ok(response) if continues(&response, self.received) => {
                tracing::debug!(host = self.host, what = self.what, at = self.received, %error, "taken up again");
                self.response = response;
                Ok(())
            }
            // The whole from its beginning is of no use: what came is unpacked already.
            Ok(_) => Err(error),
            Err(again) => {
                tracing::debug!(host = self.host, what = self.what, error = %again, "not taken up again");
                Err(error)
            }
        }
    }
}

/// Whether it is the rest from byte `from` on.
fn continues(response: &reqwest::Response, from: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok());
    let first = range.and_then(|r| r.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok());
    response.status() == reqwest::StatusCode::PARTIAL_CONTENT && first == Some(from)
}

/// One pull's conversation with the hosts of its registry.
pub struct Session {
    reference: Reference,
    connections: Vec<Arc<Connection>>,
    progress: Duration,
}

impl RegistryClient {
    /// A client. Installs ring as the process's TLS provider if there is none yet.
    pub fn new(config: RegistryConfig) -> Result<Arc<Self>> {
        // Err means that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // One is made now: that none can be made here is told at the daemon's start.
        transport::client(&hosts::Tls::default(), "(any)", config.connect_timeout, &proxy::Way::Environment)?;
        let keychain = Arc::new(config.keychain.clone());
        let client = |tls, name| Clients::new(tls, name, config.connect_timeout, config.proxies.clone());
        let plain = Arc::new(client(hosts::Tls::default(), "(any)".into()));
        Ok(Arc::new(Self { config, keychain, plain, tokens: Arc::default() }))
    }

    /// Begins a pull: reads the hosts' configuration, connects to nothing yet.
    pub fn session(&self, reference: &Reference, auth: Option<&RegistryAuth>) -> Result<Session> {
        let hosts = hosts::hosts_for(reference, &self.config.certs_dirs)?;
        let mut connections = Vec::with_capacity(hosts.len());
        for host in hosts {
            let credentials = auth::Credentials::for_host(auth, reference, &host.name());
            let clients = if host.tls == hosts::Tls::default() {
                self.plain.clone()
            } else {
                let (tls, name) = (host.tls.clone(), host.name());
                let own = Clients::new(tls, name, self.config.connect_timeout, self.config.proxies.clone());
                // A certificate that can't be read is told whoever is asked first.
                own.to(&host.base)?;
                Arc::new(own)
            };
            let (keychain, progress) = (self.keychain.clone(), self.config.progress_timeout);
            let tokens = self.tokens.clone();
            connections.push(Connection::new(host, clients, tokens, credentials, keychain, reference, progress));
        }
        // Another way to speak with a host is none of its own.
        let last = connections.iter().rposition(|c| !c.host.fallback).unwrap_or(0);
        connections.iter_mut().skip(last).for_each(Connection::set_last);
        let connections = connections.into_iter().map(Arc::new).collect();
        Ok(Session { reference: reference.clone(), connections, progress: self.config.progress_timeout })
    }
}

/// Walks the hosts: which one is asked next, and whose failure counts in the end.
#[derive(Default)]
struct Attempts {
    last: Option<RegistryError>,
}

impl Attempts {
    /// Whether `host` should be asked now.
    fn admits(&self, host: &Host) -> bool {
        !host.fallback || self.last.as_ref().is_some_and(RegistryError::may_be_wrong_scheme)
    }

    /// The last failure counts, as the last host is the registry itself unless configured otherwise. Where nothing was
    /// reached in either of two ways to one host, the first one's words are the better ones.
    fn failed(&mut self, host: &Host, error: RegistryError) {
        tracing::debug!(host = host.name(), %error, "registry host failed");
        if !host.fallback || !matches!(self.last, Some(RegistryError::Unreachable { .. })) {
            self.last = Some(error);
        }
    }

    fn into_error(self, reference: &Reference) -> Error {
        let none = || {
            let registry = reference.registry();
            Error::new(Kind::FailedPrecondition, format!("no host of registry {registry} may be asked for this"))
        };
        self.last.map_or_else(none, Error::from)
    }
}

impl Session {
    /// The manifest or index of a tag or digest, compared with the digest if there is one.
    pub async fn manifest(&self, digest: Option<&Digest>) -> Result<ManifestBytes> {
        let mut attempts = Attempts::default();
        for connection in &self.connections {
            let host = &connection.host;
            if !attempts.admits(host) || !(if digest.is_some() { host.pull } else { host.resolve }) {
                continue;
            }
            match self.manifest_from(connection, digest).await {
                Ok(manifest) => return Ok(manifest),
                Err(e) => attempts.failed(host, e),
            }
        }
        Err(attempts.into_error(&self.reference))
    }

    async fn manifest_from(
        &self,
        connection: &Connection,
        digest: Option<&Digest>,
    ) -> Result<ManifestBytes, RegistryError> {
        let name = self.reference.name();
        let (object, what) = match digest {
            Some(digest) => (digest.as_str(), format!("manifest {name}@{digest}")),
            None => {
                let tag = self.reference.tag().unwrap_or("latest");
                (tag, format!("manifest {name}:{tag}"))
            }
        };
        let path = format!("{}/manifests/{object}", self.reference.repository());
        let mut response =
            connection.get(Ask { path: &path, accept: &MANIFEST_TYPES.join(", "), what: &what, from: 0 }).await?;
        let text = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let media_type = text(header::CONTENT_TYPE.as_str()).unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        let told: Option<Digest> = text("docker-content-digest").and_then(|v| v.parse().ok());
        let host = connection.host.name();
        let bytes = transport::body(&mut response, &host, &what, MAX_MANIFEST, self.progress).await?;
        let got = digest_of(&bytes);
        if let Some(want) = digest.or(told.as_ref())
            && *want != got
        {
            return Err(RegistryError::Digest { host, what: format!("{what}: digest should be {want}"), got });
        }
        Ok(ManifestBytes { bytes: bytes.into(), media_type, digest: got })
    }

    /// A small blob, whole and compared.
    pub async fn blob(&self, digest: &Digest, size: u64, max: u64) -> Result<Bytes> {
        let what = format!("blob {}@{digest}", self.reference.name());
        if size > max {
            return Err(Error::invalid(format!("{what}: {size} bytes are more than the limit of {max}")));
        }
        let mut attempts = Attempts::default();
        for connection in &self.connections {
            if !attempts.admits(&connection.host) || !connection.host.pull {
                continue;
            }
            match self.blob_from(connection, digest, size, &what).await {
                Ok(bytes) => return Ok(bytes),
                Err(e) => attempts.failed(&connection.host, e),
            }
        }
        Err(attempts.into_error(&self.reference))
    }

    async fn blob_from(
        &self,
        connection: &Connection,
        digest: &Digest,
        size: u64,
        what: &str,
    ) -> Result<Bytes, RegistryError> {
        let path = format!("{}/blobs/{digest}", self.reference.repository());
        let mut response = connection.get(Ask { path: &path, accept: "*/*", what, from: 0 }).await?;
        let host = connection.host.name();
        let bytes = transport::body(&mut response, &host, what, size, self.progress).await?;
        if bytes.len() as u64 != size {
            let why = format!("truncated: got {} of {size} bytes", bytes.len());
            return Err(RegistryError::Protocol { host, what: what.to_owned(), why });
        }
        let got = digest_of(&bytes);
        if got != *digest {
            return Err(RegistryError::Digest { host, what: what.to_owned(), got });
        }
        Ok(bytes.into())
    }

    /// A blob as a stream, which the reader has to compare. Hosts up to number `after` are left out; None when none is
    /// left to ask.
    pub async fn stream(&self, digest: &Digest, after: Option<usize>) -> Result<Option<BlobStream>> {
        let what = format!("blob {}@{digest}", self.reference.name());
        let path = format!("{}/blobs/{digest}", self.reference.repository());
        let mut attempts = Attempts::default();
        for (index, connection) in self.connections.iter().enumerate().skip(after.map_or(0, |n| n + 1)) {
            if !attempts.admits(&connection.host) || !connection.host.pull {
                continue;
            }
            match connection.get(Ask { path: &path, accept: "*/*", what: &what, from: 0 }).await {
                Ok(response) => {
                    let host = connection.host.name();
                    return Ok(Some(BlobStream {
                        host,
                        index,
                        response,
                        what,
                        progress: self.progress,
                        connection: connection.clone(),
                        path,
                        received: 0,
                        broken: (0, 0),
                    }));
                }
                Err(e) => attempts.failed(&connection.host, e),
            }
        }
        if after.is_some() && attempts.last.is_none() {
            return Ok(None);
        }
        Err(attempts.into_error(&self.reference))
    }
}
