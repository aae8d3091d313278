//! The way into a registry: blobs that it has not, then manifests (OCI Distribution 1.1, "push").
//!
//! Called by the image store's push. One host is written to, the first that may be and that answers. A blob comes from a file, or
//! straight from another registry and is compared on its way: what turns out to be another content is not completed. Fails with
//! [`RegistryError`]; an upload that was cut is the registry's to clear away.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::stream;
use futures::stream::BoxStream;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Body, Method, Response, StatusCode, Url};
use sha2::{Digest as _, Sha256};

use super::error::RegistryError;
use super::hosts::authority;
use super::transport::{Ask, Call, Connection};
use super::{RegistryClient, Session};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::reference::Reference;

/// Bytes of one piece of a file.
const PIECE: usize = 256 << 10;

/// What is sent.
#[derive(Clone, Copy)]
pub struct Blob<'a> {
    /// Its digest.
    pub digest: &'a Digest,
    /// Its bytes.
    pub size: u64,
}

type Pieces = BoxStream<'static, std::io::Result<Bytes>>;

/// A repository that is written to.
pub struct Target {
    connection: Arc<Connection>,
    name: String,
    repository: String,
    registry: String,
}

impl RegistryClient {
    /// The registry of `reference`, for pushing: the first host of it that may be pushed to and answers.
    pub async fn target(&self, reference: &Reference) -> Result<Target> {
        let session = self.session(reference, None)?;
        let mut last = None;
        for connection in &session.connections {
            let wrong_scheme = |e: &RegistryError| e.may_be_wrong_scheme();
            if !connection.host.push || (connection.host.fallback && !last.as_ref().is_some_and(wrong_scheme)) {
                continue;
            }
            let what = format!("push to {}", reference.name());
            match connection.get(Ask { path: "", accept: "*/*", what: &what, from: 0 }).await {
                Ok(_) => {
                    return Ok(Target {
                        connection: connection.clone(),
                        name: reference.name(),
                        repository: reference.repository().to_owned(),
                        registry: reference.registry().to_owned(),
                    });
                }
                Err(e) => last = Some(e),
            }
        }
        let registry = reference.registry();
        let none = || Error::new(Kind::FailedPrecondition, format!("no host of registry {registry} may be pushed to"));
        Err(last.map_or_else(none, Error::from))
    }
}

impl Target {
    /// Sends what a file holds, unless it is there; whether it was sent.
    pub async fn file(&self, blob: Blob<'_>, open: &(dyn Fn() -> Result<File> + Sync)) -> Result<bool> {
        if self.has(blob).await? {
            return Ok(false);
        }
        let file = tokio::fs::File::from_std(open()?);
        let pieces: Pieces = Box::pin(tokio_util::io::ReaderStream::with_capacity(file, PIECE));
        self.upload(blob, None, async || Ok(pieces)).await?;
        Ok(true)
    }

    /// Sends these bytes, unless they are there; whether they were sent.
    pub async fn bytes(&self, blob: Blob<'_>, bytes: Bytes) -> Result<bool> {
        if self.has(blob).await? {
            return Ok(false);
        }
        let pieces: Pieces = Box::pin(stream::once(async { Ok(bytes) }));
        self.upload(blob, None, async || Ok(pieces)).await?;
        Ok(true)
    }

    /// Sends a blob of another registry, unless it is there; whether it was sent.
    pub async fn copy(&self, blob: Blob<'_>, from: &Arc<Session>, source: &Reference) -> Result<bool> {
        if self.has(blob).await? {
            return Ok(false);
        }
        // Of one registry it may be taken over, if who pushes may read it there.
        let mount = (source.registry() == self.registry).then(|| source.repository());
        let (from, digest) = (from.clone(), blob.digest.clone());
        self.upload(blob, mount, async move || {
            let Some(stream) = from.stream(&digest, None).await? else {
                return Err(Error::not_found(format!("blob {digest}: no host has it")));
            };
            let next = async |mut stream: super::BlobStream| match stream.chunk().await {
                Ok(Some(piece)) => Ok(Some((piece, stream))),
                Ok(None) => Ok(None),
                Err(e) => Err(std::io::Error::other(Error::from(e).chain())),
            };
            Ok(Box::pin(stream::try_unfold(stream, next)) as Pieces)
        })
        .await
    }

    /// Names content: `name` is a tag or the document's digest.
    pub async fn manifest(&self, name: &str, bytes: Bytes, media_type: &str) -> Result<()> {
        let what = format!("manifest {}:{name}", self.name);
        let mut headers = HeaderMap::new();
        let kind = HeaderValue::from_str(media_type).map_err(|_| self.odd(&what, "a media type that is no header"))?;
        headers.insert(header::CONTENT_TYPE, kind);
        let url = self.connection.url(&format!("{}/manifests/{name}", self.repository), &what)?;
        let call = Call { method: Method::PUT, headers, what: &what };
        self.connection.call(url, call, || Some(Body::from(bytes.clone()))).await?;
        Ok(())
    }

    fn odd(&self, what: &str, why: &str) -> RegistryError {
        RegistryError::Protocol { host: self.connection.host.name(), what: what.to_owned(), why: why.to_owned() }
    }

    async fn has(&self, blob: Blob<'_>) -> Result<bool> {
        let what = format!("blob {}@{}", self.name, blob.digest);
        let url = self.connection.url(&format!("{}/blobs/{}", self.repository, blob.digest), &what)?;
        let call = Call { method: Method::HEAD, headers: HeaderMap::new(), what: &what };
        match self.connection.call(url, call, || None).await {
            Ok(_) => Ok(true),
            Err(RegistryError::Status { status: 404, .. }) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Begins an upload, and sends what `open` gives; false where the registry took the blob over from `mount`.
    async fn upload(
        &self,
        blob: Blob<'_>,
        mount: Option<&str>,
        open: impl AsyncFnOnce() -> Result<Pieces>,
    ) -> Result<bool> {
        let what = format!("upload {}@{}", self.name, blob.digest);
        let mut url = self.connection.url(&format!("{}/blobs/uploads/", self.repository), &what)?;
        if let Some(from) = mount {
            url.query_pairs_mut().append_pair("mount", blob.digest.as_str()).append_pair("from", from);
        }
        let call = Call { method: Method::POST, headers: HeaderMap::new(), what: &what };
        let begun = self.connection.call(url.clone(), call, || Some(Body::from(""))).await?;
        if begun.status() == StatusCode::CREATED {
            return Ok(false);
        }
        let mut to = self.location(&begun, &url, &what)?;
        to.query_pairs_mut().append_pair("digest", blob.digest.as_str());
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(blob.size));
        let moved = Arc::new(AtomicU64::new(0));
        let body = Body::wrap_stream(compared(open().await?, blob, moved.clone()));
        let sending = self.connection.send_body(to, headers, body, &what);
        let mut sending = std::pin::pin!(sending);
        let mut last = 0;
        loop {
            match tokio::time::timeout(self.connection.progress, &mut sending).await {
                Ok(done) => return Ok(done.map(|_| true)?),
                Err(_) => {
                    let now = moved.load(Ordering::Relaxed);
                    if now == last {
                        let host = self.connection.host.name();
                        let what = what.clone();
                        return Err(RegistryError::Timeout { host, what, after: self.connection.progress }.into());
                    }
                    last = now;
                }
            }
        }
    }

    /// Where the upload goes on: at the same host, or nobody is told who we are.
    fn location(&self, begun: &Response, asked: &Url, what: &str) -> Result<Url, RegistryError> {
        let location = begun.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
        let to = location.and_then(|l| asked.join(l).ok()).ok_or_else(|| self.odd(what, "an upload to nowhere"))?;
        match authority(&to) == authority(asked) && to.scheme() == asked.scheme() {
            true => Ok(to),
            false => Err(self.odd(what, "an upload to another host")),
        }
    }
}

/// Pieces that fail at their end if they are not what they should be: the upload is not completed then.
fn compared(pieces: Pieces, blob: Blob<'_>, moved: Arc<AtomicU64>) -> Pieces {
    let (wanted, size) = (blob.digest.clone(), blob.size);
    let state = Some((pieces, Sha256::new(), 0_u64));
    Box::pin(stream::try_unfold(state, move |state| {
        let (wanted, moved) = (wanted.clone(), moved.clone());
        async move {
            let Some((mut pieces, mut sum, mut got)) = state else { return Ok(None) };
            let Some(piece) = futures::TryStreamExt::try_next(&mut pieces).await? else {
                let digest = Digest::from_sha256(&sum.finalize().into());
                return match digest == wanted && got == size {
                    true => Ok(None),
                    false => Err(std::io::Error::other(format!("{wanted}: got {digest}, {got} of {size} bytes"))),
                };
            };
            sum.update(&piece);
            got += piece.len() as u64;
            moved.store(got, Ordering::Relaxed);
            if got > size {
                return Err(std::io::Error::other(format!("{wanted} is longer than {size} bytes")));
            }
            Ok(Some((piece, Some((pieces, sum, got)))))
        }
    }))
}
