//! Client of Distribution registries (OCI Distribution 1.1, Docker v2): manifests and blobs over HTTP(S).
//!
//! Called by the image store: a [`Session`] per pull asks the configured hosts in their order. Every wait has a limit,
//! every answer a largest size, and content by digest is compared. Fails with [`error::RegistryError`]; keeps nothing
//! on disk.

pub mod auth;
pub mod error;
pub mod hosts;
mod transport;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use transport::Connection;

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
    /// Limit for connecting, TLS included.
    pub connect_timeout: Duration,
    /// Limit for waiting without a byte.
    pub progress_timeout: Duration,
}

/// Talks to registries; shared by all pulls.
pub struct RegistryClient {
    config: RegistryConfig,
    /// Without TLS settings of its own; others are made for each session.
    plain: reqwest::Client,
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
}

impl BlobStream {
    /// The next piece; None at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        transport::chunk(&mut self.response, &self.host, &self.what, self.progress).await
    }
}

/// One pull's conversation with the hosts of its registry.
pub struct Session {
    reference: Reference,
    connections: Vec<Connection>,
    progress: Duration,
}

impl RegistryClient {
    /// A client. Installs ring as the process's TLS provider if there is none yet.
    pub fn new(config: RegistryConfig) -> Result<Arc<Self>> {
        // Err means that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = transport::client(&hosts::Tls::default(), "(any)", config.connect_timeout)?;
        Ok(Arc::new(Self { config, plain }))
    }

    /// Begins a pull: reads the hosts' configuration, connects to nothing yet.
    pub fn session(&self, reference: &Reference, auth: Option<&RegistryAuth>) -> Result<Session> {
        let hosts = hosts::hosts_for(reference, &self.config.certs_dirs)?;
        let mut connections = Vec::with_capacity(hosts.len());
        for host in hosts {
            let credentials = auth::Credentials::for_host(auth, reference, &host.name());
            let client = if host.tls == hosts::Tls::default() {
                self.plain.clone()
            } else {
                transport::client(&host.tls, &host.name(), self.config.connect_timeout)?
            };
            connections.push(Connection::new(host, client, credentials, reference, self.config.progress_timeout));
        }
        Ok(Session { reference: reference.clone(), connections, progress: self.config.progress_timeout })
    }
}

impl Session {
    /// Asks host after host; the last one's failure counts, as that is the registry itself unless configured otherwise.
    async fn each<T, F>(&self, wanted: impl Fn(&Host) -> bool, ask: F) -> Result<T>
    where
        F: AsyncFn(&Connection) -> Result<T, RegistryError>,
    {
        let mut last: Option<RegistryError> = None;
        for connection in self.connections.iter().filter(|c| wanted(&c.host)) {
            if connection.host.fallback && !last.as_ref().is_some_and(RegistryError::may_be_wrong_scheme) {
                continue;
            }
            match ask(connection).await {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    tracing::debug!(reference = %self.reference, %error, "registry host failed");
                    // Of two ways to the same host the first one's words are the better ones.
                    if !connection.host.fallback || last.is_none() {
                        last = Some(error);
                    }
                }
            }
        }
        Err(last.map_or_else(
            || {
                Error::new(
                    Kind::FailedPrecondition,
                    format!("no host of registry {} may be asked for this", self.reference.registry()),
                )
            },
            Error::from,
        ))
    }

    /// The manifest or index of a tag or digest, compared with the digest if there is one.
    pub async fn manifest(&self, digest: Option<&Digest>) -> Result<ManifestBytes> {
        let object = match digest {
            Some(digest) => digest.as_str(),
            None => self.reference.tag().unwrap_or("latest"),
        };
        let wanted = |host: &Host| if digest.is_some() { host.pull } else { host.resolve };
        self.each(wanted, async |connection| {
            let path = format!("{}/manifests/{object}", self.reference.repository());
            let what = format!("manifest {}", self.reference.name());
            let what = match digest {
                Some(digest) => format!("{what}@{digest}"),
                None => format!("{what}:{object}"),
            };
            let mut response = connection.get(&path, &MANIFEST_TYPES.join(", "), &what).await?;
            let media_type = response
                .headers()
                .get(header::CONTENT_TYPE)
                .and_then(|v| v.to_str().ok())
                .map(|v| v.split(';').next().unwrap_or("").trim().to_owned())
                .unwrap_or_default();
            let told = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok()?.parse().ok());
            let host = connection.host.name();
            let bytes = transport::body(&mut response, &host, &what, MAX_MANIFEST, self.progress).await?;
            let got = digest_of(&bytes);
            if let Some(want) = digest.or(told.as_ref())
                && *want != got
            {
                let what = format!("{what}: digest should be {want}");
                return Err(RegistryError::Digest { host, what, got });
            }
            Ok(ManifestBytes { bytes: bytes.into(), media_type, digest: got })
        })
        .await
    }

    /// A small blob, whole and compared.
    pub async fn blob(&self, digest: &Digest, size: u64, max: u64) -> Result<Bytes> {
        let what = format!("blob {}@{digest}", self.reference.name());
        if size > max {
            return Err(Error::invalid(format!("{what}: {size} bytes are more than the limit of {max}")));
        }
        self.each(
            |host| host.pull,
            async |connection| {
                let path = format!("{}/blobs/{digest}", self.reference.repository());
                let mut response = connection.get(&path, "*/*", &what).await?;
                let host = connection.host.name();
                let bytes = transport::body(&mut response, &host, &what, size, self.progress).await?;
                if bytes.len() as u64 != size {
                    let why = format!("truncated: got {} of {size} bytes", bytes.len());
                    return Err(RegistryError::Protocol { host, what: what.clone(), why });
                }
                let got = digest_of(&bytes);
                if got != *digest {
                    return Err(RegistryError::Digest { host, what: what.clone(), got });
                }
                Ok(bytes.into())
            },
        )
        .await
    }

    /// A blob as a stream, which the reader has to compare. Hosts up to `after` have been tried; None when none is left.
    pub async fn stream(&self, digest: &Digest, after: Option<usize>) -> Result<Option<BlobStream>> {
        let what = format!("blob {}@{digest}", self.reference.name());
        let asked = AtomicBool::new(false);
        let skip = after.map_or(0, |n| n + 1);
        let done = self
            .each(
                |host| host.pull,
                async |connection| {
                    let index = self.connections.iter().position(|c| std::ptr::eq(c, connection)).unwrap_or(0);
                    if index < skip {
                        return Err(RegistryError::Protocol {
                            host: connection.host.name(),
                            what: what.clone(),
                            why: "tried before".into(),
                        });
                    }
                    asked.store(true, Ordering::Relaxed);
                    let path = format!("{}/blobs/{digest}", self.reference.repository());
                    let response = connection.get(&path, "*/*", &what).await?;
                    let host = connection.host.name();
                    Ok(BlobStream { host, index, response, what: what.clone(), progress: self.progress })
                },
            )
            .await;
        match done {
            Ok(stream) => Ok(Some(stream)),
            Err(_) if skip > 0 && !asked.load(Ordering::Relaxed) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
