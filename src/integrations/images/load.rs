//! Takes images from local files: OCI layouts (folder or archive) and what `docker save` writes.
//!
//! Called by the store. Everything is compared as in a pull: blobs with their digests, layers of docker archives with
//! the diff ids in the config. Fails by name; images of the same source that were complete before stay.

use std::io::Read;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;

use super::archive::Files;
use super::assemble::Plan;
use super::manifest::{self, Descriptor, LayerEntry, Manifest};
use super::source::{Failure, LayerBytes, Source};
use super::{Inner, MAX_NESTING, blocking};
use crate::core::error::{Error, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, ImageSource};
use crate::core::reference::Reference;
use crate::integrations::layers::pipeline::{Compression, digest_of};
use crate::integrations::registry::{MAX_CONFIG, MAX_MANIFEST};

/// Most images taken from one source.
const MAX_IMAGES: usize = 200;

/// An OCI layout: blobs by digest.
pub(super) struct Layout {
    pub(super) files: Arc<Files>,
}

pub(super) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl Layout {
    pub(super) async fn compared(&self, blob: &Descriptor, max: u64) -> Result<Bytes> {
        let (files, blob) = (self.files.clone(), blob.clone());
        blocking(move || {
            let data = files.read(&blob_name(&blob.digest), max)?;
            let got = digest_of(&data);
            if got != blob.digest {
                return Err(Error::internal(format!("blob {}: got {got}", blob.digest)));
            }
            Ok(data.into())
        })
        .await
    }
}

#[async_trait]
impl Source for Layout {
    async fn blob(&self, blob: &Descriptor, max: u64) -> Result<Bytes> {
        self.compared(blob, max).await
    }

    async fn layer(&self, layer: &Descriptor, after: Option<usize>) -> Result<Option<LayerBytes>> {
        open_layer(self.files.clone(), blob_name(&layer.digest), after).await
    }
}

/// A docker archive: layers by file name, in the order of the config's diff ids.
struct DockerArchive {
    files: Arc<Files>,
    /// Diff id and file of each layer.
    layers: Vec<(Digest, String)>,
}

#[async_trait]
impl Source for DockerArchive {
    fn has_blob_digests(&self) -> bool {
        false
    }

    async fn blob(&self, blob: &Descriptor, _max: u64) -> Result<Bytes> {
        // The config is read before; nothing else is asked for.
        Err(Error::not_found(format!("a docker archive has no blob {}", blob.digest)))
    }

    async fn layer(&self, layer: &Descriptor, after: Option<usize>) -> Result<Option<LayerBytes>> {
        match self.layers.iter().find(|(diff_id, _)| *diff_id == layer.digest) {
            Some((_, name)) => open_layer(self.files.clone(), name.clone(), after).await,
            None => Ok(None),
        }
    }
}

async fn open_layer(files: Arc<Files>, name: String, after: Option<usize>) -> Result<Option<LayerBytes>> {
    if after.is_some() {
        return Ok(None);
    }
    let (from, reader): (String, Box<dyn Read + Send>) = blocking(move || {
        let (_, reader) = files.open(&name)?;
        Ok((name, reader))
    })
    .await?;
    Ok(Some(LayerBytes { reader, failure: Failure::default(), place: 0, from }))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Which images of a layout.
#[derive(Debug, Clone, Copy)]
pub(super) enum Inside<'a> {
    /// Those that it names.
    All,
    /// The one with this name.
    Name(&'a str),
    /// The one with this digest.
    Digest(&'a Digest),
}

impl<'a> Inside<'a> {
    pub(super) fn of(name: Option<&'a str>) -> Self {
        name.map_or(Inside::All, Inside::Name)
    }
}

impl Inner {
    pub(super) async fn load_source(
        self: &Arc<Self>,
        source: &ImageSource,
        name: Option<&str>,
    ) -> Result<Vec<Arc<Image>>> {
        let name = name.map(|n| Reference::parse(n, &self.config.default_registry)).transpose()?;
        let scratch = self.disk.scratch();
        let unpacker = self.config.unpacker.clone();
        match source {
            ImageSource::OciLayout(path, inside) => {
                let folder = path.clone();
                let files = blocking(move || Files::folder(&folder)).await?;
                let done = self.load_layout(Arc::new(files), Inside::of(inside.as_deref()), name.as_ref()).await;
                done.map_err(|e| e.context(format!("load oci:{path}")))
            }
            ImageSource::OciArchive(path) => {
                let file = path.clone();
                let files = blocking(move || Files::archive(&file, &scratch, &unpacker)).await?;
                let done = self.load_layout(Arc::new(files), Inside::All, name.as_ref()).await;
                done.map_err(|e| e.context(format!("load oci-archive:{path}")))
            }
            ImageSource::DockerArchive(path) => {
                let file = path.clone();
                let files = blocking(move || Files::archive(&file, &scratch, &unpacker)).await?;
                let done = self.load_docker(Arc::new(files), name.as_ref()).await;
                done.map_err(|e| e.context(format!("load docker-archive:{path}")))
            }
            ImageSource::Bfc(path, inside, key) => {
                let done = self.load_bfc(path, inside.as_deref(), key.as_ref(), name.as_ref()).await;
                done.map_err(|e| e.context(format!("load bfc:{path}")))
            }
        }
    }

    pub(super) async fn load_layout(
        self: &Arc<Self>,
        files: Arc<Files>,
        inside: Inside<'_>,
        name: Option<&Reference>,
    ) -> Result<Vec<Arc<Image>>> {
        let index = {
            let files = files.clone();
            blocking(move || files.read("index.json", MAX_MANIFEST)).await?
        };
        let Manifest::Index(entries) = manifest::parse(&index, "")? else {
            return Err(Error::invalid("index.json is no index"));
        };
        let entries: Vec<_> = entries
            .into_iter()
            .filter(|e| !e.artifact)
            .filter(|e| match inside {
                Inside::All => true,
                Inside::Name(wanted) => is_called(e, wanted, &self.config.default_registry),
                Inside::Digest(wanted) => e.descriptor.digest == *wanted,
            })
            .collect();
        if entries.is_empty() {
            return Err(Error::not_found(match inside {
                Inside::Name(wanted) => format!("index.json names no image {wanted:?}"),
                Inside::Digest(wanted) => format!("index.json names no image {wanted}"),
                Inside::All => "index.json names no image".to_owned(),
            }));
        }
        if entries.len() > MAX_IMAGES {
            return Err(Error::invalid(format!("more than {MAX_IMAGES} images")));
        }
        // One image under several names: the first of them does.
        let entries = match inside {
            Inside::Digest(_) => entries.into_iter().take(1).collect(),
            _ => entries,
        };
        // Entries that differ in their platform alone are one image.
        let all_platforms =
            entries.len() > 1 && entries.iter().all(|e| e.platform.is_some() && self.entry_name(e, &files).is_none());
        let entries = if all_platforms { vec![manifest::choose(&entries, &self.platform)?] } else { entries };
        if name.is_some() && entries.len() > 1 {
            return Err(Error::invalid(format!("{} images can't have one name", entries.len())));
        }
        let mut images = Vec::new();
        for entry in entries {
            let reference = name.cloned().or_else(|| self.entry_name(&entry, &files));
            let layout = Arc::new(Layout { files: files.clone() });
            let mut kept = Vec::new();
            let mut descriptor = entry.descriptor.clone();
            let (config, layers) = loop {
                let bytes = layout.compared(&descriptor, MAX_MANIFEST).await?;
                let document = manifest::parse(&bytes, &descriptor.media_type)?;
                kept.push((descriptor.digest.clone(), bytes));
                match document {
                    Manifest::Image(config, layers) => break (config, layers),
                    Manifest::Index(_) if kept.len() > MAX_NESTING => {
                        return Err(Error::invalid("indexes are nested too deep"));
                    }
                    Manifest::Index(inner) => descriptor = manifest::choose(&inner, &self.platform)?.descriptor,
                }
            };
            let plan = Plan {
                source: layout,
                config,
                config_bytes: None,
                layers,
                manifests: kept,
                repo_tags: reference.iter().filter_map(Reference::tagged).collect(),
                repo_digests: reference.iter().map(|r| r.digested(&entry.descriptor.digest)).collect(),
                cancel: self.tasks.token().child_token(),
                progress: Default::default(),
            };
            let id = self.assemble(plan).await?;
            images.push(self.by_id(&id)?);
        }
        Ok(images)
    }

    /// The reference that a layout gives an image, if it is one. A tag alone says nothing of a repository: that is the name of
    /// the layout's folder or archive then, on no registry.
    fn entry_name(&self, entry: &manifest::IndexEntry, files: &Files) -> Option<Reference> {
        let name = entry.annotations.get(CONTAINERD_NAME).or_else(|| entry.annotations.get(REF_NAME))?;
        if !is_tag_alone(name) {
            return Reference::parse(name, &self.config.default_registry).ok();
        }
        let stem = files.path().file_stem()?.to_ascii_lowercase();
        Reference::parse(&format!("localhost/{stem}:{name}"), &self.config.default_registry).ok()
    }

    async fn load_docker(self: &Arc<Self>, files: Arc<Files>, name: Option<&Reference>) -> Result<Vec<Arc<Image>>> {
        let text = {
            let files = files.clone();
            blocking(move || files.read("manifest.json", MAX_MANIFEST)).await?
        };
        let entries: Vec<DockerEntry> = serde_json::from_slice(&text)
            .map_err(|e| Error::because(crate::core::error::Kind::InvalidArgument, "manifest.json is malformed", e))?;
        if entries.is_empty() || entries.len() > MAX_IMAGES {
            return Err(Error::invalid(format!("{} images (1 to {MAX_IMAGES} can be loaded)", entries.len())));
        }
        if name.is_some() && entries.len() > 1 {
            return Err(Error::invalid(format!("{} images can't have one name", entries.len())));
        }
        let mut images = Vec::new();
        for entry in entries {
            let config_bytes: Bytes = {
                let (files, file) = (files.clone(), entry.config.clone());
                blocking(move || files.read(&file, MAX_CONFIG)).await?.into()
            };
            let (_, diff_ids) = manifest::parse_config(&config_bytes, entry.layers.len(), &self.platform)?;
            let layers = diff_ids
                .iter()
                .map(|diff_id| LayerEntry {
                    descriptor: Descriptor { media_type: String::new(), digest: diff_id.clone(), size: 0 },
                    compression: Compression::Detect,
                })
                .collect::<Vec<_>>();
            if layers.is_empty() {
                return Err(Error::invalid(format!("image {}: it has no layers", entry.config)));
            }
            let repo_tags = match name {
                Some(name) => name.tagged().into_iter().collect(),
                None => {
                    let tags = entry.repo_tags.unwrap_or_default();
                    let parsed = tags.iter().map(|t| Reference::parse(t, &self.config.default_registry));
                    parsed.map(|r| r.map(|r| r.tagged())).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()
                }
            };
            let source = Arc::new(DockerArchive {
                files: files.clone(),
                layers: diff_ids.into_iter().zip(entry.layers).collect(),
            });
            let digest = digest_of(&config_bytes);
            let size = config_bytes.len() as u64;
            let plan = Plan {
                source,
                config: Descriptor { media_type: String::new(), digest, size },
                config_bytes: Some(config_bytes),
                layers,
                manifests: Vec::new(),
                repo_tags,
                repo_digests: Vec::new(),
                cancel: self.tasks.token().child_token(),
                progress: Default::default(),
            };
            let id = self.assemble(plan).await?;
            images.push(self.by_id(&id)?);
        }
        Ok(images)
    }
}

/// Whether a layout's entry has this name; a reference is the same in short and in full.
pub(super) fn is_called(entry: &manifest::IndexEntry, wanted: &str, default_registry: &str) -> bool {
    let parsed = |name: &str| Reference::parse(name, default_registry).ok();
    let whole = |name: &str| name.contains(['/', ':']);
    [REF_NAME, CONTAINERD_NAME].iter().filter_map(|key| entry.annotations.get(*key)).any(|name| {
        name == wanted || (whole(name) && whole(wanted) && parsed(name).is_some_and(|n| parsed(wanted) == Some(n)))
    })
}

/// "latest", "1.27", "v2-alpine": what no one calls a repository.
fn is_tag_alone(name: &str) -> bool {
    let version = name.strip_prefix('v').unwrap_or(name);
    !name.contains(['/', ':']) && (name == "latest" || version.starts_with(|c: char| c.is_ascii_digit()))
}

/// Where layouts keep a name; often a tag alone.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Where containerd keeps the full name.
pub(super) const CONTAINERD_NAME: &str = "io.containerd.image.name";
