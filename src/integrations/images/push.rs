//! Copies an image to a registry: from another one with every byte as it is, or from this node's store.
//!
//! Called by the store. A reference is copied from its registry, all platforms of it, so that its digest stays; an image that no
//! registry has (loaded from a file, or made of a container) is written anew, see `export`. A blob that is there is not sent.
//! Manifests come last, from the inside out: what a registry names is whole. Fails by name; what was sent until then stays there
//! without a name, and is not sent again.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use super::export::MANIFEST_TYPE;
use super::{Inner, MAX_NESTING};
use crate::core::error::{Error, Result};
use crate::core::ids::Digest;
use crate::core::ports::Pushed;
use crate::core::reference::Reference;
use crate::integrations::layers::pipeline::digest_of;
use crate::integrations::registry::Session;
use crate::integrations::registry::push::{Blob, Target};

/// Most blobs and manifests of one copy.
const MAX_COPIED: usize = 5000;

/// What a manifest names, whatever kind of artifact it is.
#[derive(Deserialize)]
struct Names {
    config: Option<Named>,
    #[serde(default)]
    layers: Vec<Named>,
    #[serde(default)]
    manifests: Vec<Named>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    digest: Digest,
    size: u64,
    #[serde(default)]
    media_type: String,
}

/// A document on its way: its bytes, type, and depth below the first one.
struct Document {
    bytes: Bytes,
    media_type: String,
    digest: Digest,
}

impl Inner {
    pub(super) async fn push_image(self: &Arc<Self>, source: &str, target: &str) -> Result<Pushed> {
        let target = Reference::parse(target, &self.config.default_registry)?;
        let name = target.tagged().filter(|_| target.digest().is_none());
        let name = name.ok_or_else(|| Error::invalid(format!("{target}: a name with a tag is needed")))?;
        let local = self.find(source);
        let known = local.as_ref().and_then(|id| self.read().get(id).map(|(r, _)| r.repo_digests.clone()));
        // By digest: what is here is copied, whatever a tag means there by now.
        let origin = match known {
            Some(digests) => digests.iter().find(|d| !d.starts_with("localhost/")).cloned(),
            None => Some(source.to_owned()),
        };
        let mut copy = Copy { target: self.registry.target(&target).await?, sent: (0, 0), there: 0 };
        let (digest, from) = match (origin, local) {
            (Some(origin), _) => {
                let origin = Reference::parse(&origin, &self.config.default_registry)?;
                let session = Arc::new(self.registry.session(&origin, None)?);
                (copy.of_registry(&session, &origin, &target).await?, format!("registry {}", origin.registry()))
            }
            (None, Some(id)) => (copy.of_store(self, &id, &target).await?, "this node's store".to_owned()),
            (None, None) => return Err(Error::not_found(format!("image {source} is not here"))),
        };
        Ok(Pushed { name, digest, from, sent: copy.sent, there: copy.there })
    }
}

struct Copy {
    target: Target,
    sent: (usize, u64),
    there: usize,
}

impl Copy {
    fn count(&mut self, size: u64, sent: bool) -> Result<()> {
        match sent {
            true => self.sent = (self.sent.0 + 1, self.sent.1 + size),
            false => self.there += 1,
        }
        match self.sent.0 + self.there > MAX_COPIED {
            true => Err(Error::invalid(format!("more than {MAX_COPIED} blobs"))),
            false => Ok(()),
        }
    }

    async fn of_registry(&mut self, session: &Arc<Session>, from: &Reference, to: &Reference) -> Result<Digest> {
        let top = session.manifest(from.digest()).await?;
        let mut documents = vec![Document { bytes: top.bytes, media_type: top.media_type, digest: top.digest.clone() }];
        let (mut at, mut depth, mut level_end) = (0, 0, 1);
        // Level by level; what is inside is put there before what names it.
        while at < documents.len() {
            if at == level_end {
                (depth, level_end) = (depth + 1, documents.len());
            }
            let names: Names = serde_json::from_slice(&documents[at].bytes)
                .map_err(|_| Error::invalid(format!("manifest {} can't be understood", documents[at].digest)))?;
            if depth >= MAX_NESTING && !names.manifests.is_empty() {
                return Err(Error::invalid("indexes are nested too deep"));
            }
            for inner in names.manifests {
                if documents.iter().any(|d| d.digest == inner.digest) {
                    continue;
                }
                let got = session.manifest(Some(&inner.digest)).await?;
                let media_type = if inner.media_type.is_empty() { got.media_type } else { inner.media_type };
                documents.push(Document { bytes: got.bytes, media_type, digest: got.digest });
            }
            if documents.len() > MAX_COPIED {
                return Err(Error::invalid(format!("more than {MAX_COPIED} manifests")));
            }
            for blob in names.config.into_iter().chain(names.layers) {
                let wanted = Blob { digest: &blob.digest, size: blob.size };
                let sent = self.target.copy(wanted, session, from).await?;
                self.count(blob.size, sent)?;
            }
            at += 1;
        }
        for document in documents.iter().skip(1).rev() {
            self.target.manifest(document.digest.as_str(), document.bytes.clone(), &document.media_type).await?;
        }
        let Document { bytes, media_type, digest } = documents.swap_remove(0);
        self.target.manifest(to.tag().unwrap_or("latest"), bytes, &media_type).await?;
        Ok(digest)
    }

    async fn of_store(&mut self, store: &Arc<Inner>, id: &Digest, to: &Reference) -> Result<Digest> {
        let image = store.packed(id).await?;
        for layer in &image.layers {
            let sent = self.target.file(Blob { digest: &layer.digest, size: layer.size }, &|| layer.open()).await?;
            self.count(layer.size, sent)?;
        }
        let config = digest_of(&image.config);
        let size = image.config.len() as u64;
        let sent = self.target.bytes(Blob { digest: &config, size }, image.config.clone()).await?;
        self.count(size, sent)?;
        let digest = digest_of(&image.manifest);
        self.target.manifest(to.tag().unwrap_or("latest"), image.manifest, MANIFEST_TYPE).await?;
        Ok(digest)
    }
}
