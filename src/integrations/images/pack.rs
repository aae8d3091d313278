//! Packs images into a Binary File Container, as an OCI image layout: blobs as they are, so that every digest stays.
//!
//! Called by the command line. Images come from a registry, a layout, an archive or another container; the blobs that a
//! platform needs are compared with their digests on their way into the file. Layers are stored as they are (they are
//! compressed already, and can then be read where they lie); manifests and configs are compressed. Fails by name; the
//! container appears when it is whole, see `bfc::writer`.

use std::collections::HashSet;
use std::io::{self, Cursor, Read};
use std::sync::Arc;

use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::archive::Files;
use super::bfc::{self, Holds};
use super::load::{CONTAINERD_NAME, Layout, REF_NAME, blob_name, is_called};
use super::manifest::{self, Descriptor, Manifest};
use super::platform::Platform;
use super::source::{RegistrySource, Source};
use super::{ImagesConfig, MAX_NESTING, blocking};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{ImageSource, KeyPath};
use crate::core::reference::Reference;
use crate::integrations::bfc::{Compress, WriteOptions, Writer};
use crate::integrations::layers::confined::Unpacker;
use crate::integrations::layers::pipeline::digest_of;
use crate::integrations::registry::{MAX_CONFIG, MAX_MANIFEST, RegistryClient, Session};
use crate::utils::tasks::TaskSet;

/// Version of `bfc.image.json`.
const SCHEMA: u32 = 1;
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const FILE: u32 = 0o644;
const FOLDER: u32 = 0o755;

/// An image to pack.
#[derive(Debug, Clone)]
pub enum PackSource {
    /// From its registry.
    Registry(Reference),
    /// From a file or folder; what it is called inside, or else.
    Local(ImageSource, Option<Reference>),
}

/// An image that was packed.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Digest of its manifest or index.
    pub digest: Digest,
    /// Bytes of its blobs.
    pub size: u64,
}

/// Packs `sources` into `target`. Answers with the images and the container's size in bytes.
pub async fn pack(
    config: &ImagesConfig,
    sources: Vec<PackSource>,
    target: &Utf8Path,
    options: WriteOptions,
    scratch: &Utf8Path,
) -> Result<(Vec<Packed>, u64)> {
    // What can't be written is said before anything is fetched.
    let target = target.to_owned();
    let options = WriteOptions { compress: Compress::Always, threshold: 64, ..options };
    let writer = blocking(move || Ok(Writer::create(&target, options)?)).await?;
    let tasks = TaskSet::new("pack");
    let mut packer = Packer { writer: Some(writer), done: HashSet::new(), images: Vec::new(), entries: Vec::new() };
    packer.folder("blobs").await?;
    packer.folder("blobs/sha256").await?;
    for source in sources {
        match source {
            PackSource::Registry(reference) => {
                let packed = packer.registry(config, &reference, &tasks).await;
                packed.map_err(|e| e.context(format!("pack {reference}")))?;
            }
            PackSource::Local(source, name) => packer.local(config, source, name, scratch).await?,
        }
    }
    tasks.shutdown().await;
    packer.finish().await
}

/// Where manifests are read.
enum Manifests {
    /// With the first one, which was fetched for its digest.
    Registry(Arc<Session>, Option<Bytes>),
    Layout(Arc<Layout>),
}

impl Manifests {
    async fn read(&mut self, descriptor: &Descriptor) -> Result<Bytes> {
        match self {
            Manifests::Registry(session, first) => match first.take() {
                Some(bytes) => Ok(bytes),
                None => Ok(session.manifest(Some(&descriptor.digest)).await?.bytes),
            },
            Manifests::Layout(layout) => layout.compared(descriptor, MAX_MANIFEST).await,
        }
    }
}

struct Packer {
    /// None while a blocking task has it.
    writer: Option<Writer>,
    done: HashSet<Digest>,
    images: Vec<Packed>,
    /// Entries of index.json.
    entries: Vec<serde_json::Value>,
}

impl Packer {
    async fn with<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Writer) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let lost = || Error::internal("the container's writer is gone");
        let mut writer = self.writer.take().ok_or_else(lost)?;
        let (writer, result) = blocking(move || {
            let result = work(&mut writer);
            Ok((writer, result))
        })
        .await?;
        self.writer = Some(writer);
        result
    }

    async fn folder(&mut self, path: &'static str) -> Result<()> {
        self.with(move |w| Ok(w.add_folder(path.as_bytes(), FOLDER, 0)?)).await
    }

    async fn file(&mut self, path: String, data: Bytes) -> Result<()> {
        let size = data.len() as u64;
        self.with(move |w| Ok(w.add_file(path.as_bytes(), FILE, 0, size, &mut Cursor::new(data))?)).await
    }

    async fn registry(&mut self, config: &ImagesConfig, reference: &Reference, tasks: &TaskSet) -> Result<()> {
        let client = RegistryClient::new(config.registry())?;
        let session = Arc::new(client.session(reference, None)?);
        let top = session.manifest(reference.digest()).await?;
        let cancel = tasks.token().child_token();
        let source = Arc::new(RegistrySource {
            session: session.clone(),
            tasks: tasks.clone(),
            cancel,
            progress: Default::default(),
        });
        let manifests = Manifests::Registry(session, Some(top.bytes.clone()));
        let size = top.bytes.len() as u64;
        let top = Descriptor { media_type: top.media_type, digest: top.digest, size };
        self.image(top, Some(reference.to_string()), source, manifests).await
    }

    async fn local(
        &mut self,
        config: &ImagesConfig,
        source: ImageSource,
        name: Option<Reference>,
        scratch: &Utf8Path,
    ) -> Result<()> {
        let (files, inside, shown) = {
            let (key, scratch, unpacker) = (config.bfc.key_file.clone(), scratch.to_owned(), config.unpacker.clone());
            blocking(move || open(source, key, &scratch, &unpacker)).await?
        };
        let index = {
            let files = files.clone();
            blocking(move || files.read("index.json", MAX_MANIFEST)).await?
        };
        let Manifest::Index(entries) = manifest::parse(&index, "")? else {
            return Err(Error::invalid(format!("{shown}: index.json is no index")));
        };
        let named = |entry: &manifest::IndexEntry| {
            let keys = [CONTAINERD_NAME, REF_NAME];
            keys.into_iter().find_map(|key| entry.annotations.get(key).cloned())
        };
        let entries: Vec<_> = entries
            .into_iter()
            .filter(|e| !e.artifact && inside.as_ref().is_none_or(|i| is_called(e, i, &config.default_registry)))
            .collect();
        if entries.is_empty() {
            return Err(Error::not_found(format!("{shown}: no image of that name in it")));
        }
        if name.is_some() && entries.len() > 1 {
            return Err(Error::invalid(format!("{shown}: {} images can't have one name", entries.len())));
        }
        for entry in entries {
            let layout = Arc::new(Layout { files: files.clone() });
            let called = name.as_ref().map(ToString::to_string).or_else(|| named(&entry));
            let manifests = Manifests::Layout(layout.clone());
            let packed = self.image(entry.descriptor, called, layout, manifests).await;
            packed.map_err(|e| e.context(format!("pack {shown}")))?;
        }
        Ok(())
    }

    /// One image: its manifests from the top down, then its config and layers.
    async fn image(
        &mut self,
        top: Descriptor,
        name: Option<String>,
        source: Arc<dyn Source>,
        mut manifests: Manifests,
    ) -> Result<()> {
        let platform = Platform::host();
        let mut size = 0;
        let mut descriptor = top.clone();
        let mut nesting = 0;
        let mut media_type = None;
        let (config, layers) = loop {
            let bytes = manifests.read(&descriptor).await?;
            let document = manifest::parse(&bytes, &descriptor.media_type)?;
            size += bytes.len() as u64;
            // Media types are told by servers and indexes, not always by the document itself.
            media_type.get_or_insert_with(|| match &document {
                _ if !descriptor.media_type.is_empty() => descriptor.media_type.clone(),
                Manifest::Image(..) => MANIFEST.to_owned(),
                Manifest::Index(_) => INDEX.to_owned(),
            });
            if self.done.insert(descriptor.digest.clone()) {
                self.file(blob_name(&descriptor.digest), bytes).await?;
            }
            match document {
                Manifest::Image(config, layers) => break (config, layers),
                Manifest::Index(_) if nesting == MAX_NESTING => {
                    return Err(Error::invalid("indexes are nested too deep"));
                }
                Manifest::Index(inner) => descriptor = manifest::choose(&inner, &platform)?.descriptor,
            }
            nesting += 1;
        };
        let bytes = source.blob(&config, MAX_CONFIG).await?;
        manifest::parse_config(&bytes, layers.len(), &platform)?;
        size += bytes.len() as u64;
        if self.done.insert(config.digest.clone()) {
            self.file(blob_name(&config.digest), bytes).await?;
        }
        for layer in layers {
            size += layer.descriptor.size;
            if self.done.insert(layer.descriptor.digest.clone()) {
                self.layer(&source, layer.descriptor).await?;
            }
        }
        let mut entry = json!({
            "mediaType": media_type.unwrap_or_else(|| MANIFEST.to_owned()),
            "digest": top.digest.to_string(),
            "size": top.size,
        });
        if let Some(name) = &name {
            let tag = Reference::parse(name, crate::core::reference::DOCKER_HUB).ok();
            let tag = tag.as_ref().and_then(|r| r.tag()).unwrap_or(name);
            // The full name where containerd keeps it, the tag where the specification has it.
            entry["annotations"] = match name.contains(['/', ':']) {
                true => json!({(CONTAINERD_NAME): name, (REF_NAME): tag}),
                false => json!({(REF_NAME): name}),
            };
        }
        self.entries.push(entry);
        self.images.push(Packed { name, digest: top.digest, size });
        Ok(())
    }

    /// A layer, from the first place that has it whole.
    async fn layer(&mut self, source: &Arc<dyn Source>, layer: Descriptor) -> Result<()> {
        let (mut after, mut last) = (None, None);
        loop {
            let Some(bytes) = source.layer(&layer, after).await? else {
                let none = || Error::not_found(format!("layer {}: no place has it", layer.digest));
                return Err(last.unwrap_or_else(none));
            };
            let (wanted, name) = (layer.clone(), blob_name(&layer.digest));
            let mut reader =
                Compared { inner: bytes.reader, sum: Sha256::new(), left: wanted.size, wanted: wanted.digest };
            let done = self.with(move |w| Ok(w.add_stream(name.as_bytes(), FILE, 0, &mut reader)?)).await;
            let Err(error) = done else { return Ok(()) };
            let cause = bytes.failure.take().unwrap_or(error);
            (after, last) =
                (Some(bytes.place), Some(cause.context(format!("layer {} from {}", layer.digest, bytes.from))));
        }
    }

    async fn finish(mut self) -> Result<(Vec<Packed>, u64)> {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": self.entries});
        let index = Bytes::from(index.to_string());
        let about = json!({
            "schemaVersion": SCHEMA,
            "rootDigest": digest_of(&index).to_string(),
            "images": self.images.iter().map(|i| json!({
                "name": i.name, "digest": i.digest.to_string(), "size": i.size,
            })).collect::<Vec<_>>(),
        });
        self.file("bfc.image.json".into(), about.to_string().into()).await?;
        self.file("index.json".into(), index).await?;
        self.file("oci-layout".into(), Bytes::from_static(b"{\"imageLayoutVersion\":\"1.0.0\"}")).await?;
        let writer = self.writer.take().ok_or_else(|| Error::internal("the container's writer is gone"))?;
        let size = blocking(move || Ok(writer.finish()?)).await?;
        Ok((self.images, size))
    }
}

/// Opens what is packed from disk: its files, which image of it, and what errors call it.
fn open(
    source: ImageSource,
    key: Option<Utf8PathBuf>,
    scratch: &Utf8Path,
    unpacker: &Unpacker,
) -> Result<(Arc<Files>, Option<String>, String)> {
    match source {
        ImageSource::OciLayout(path, inside) => Ok((Arc::new(Files::folder(&path)?), inside, format!("oci:{path}"))),
        ImageSource::OciArchive(path) => {
            Ok((Arc::new(Files::archive(&path, scratch, unpacker)?), None, format!("oci-archive:{path}")))
        }
        ImageSource::Bfc(path, inside, own) => {
            let key = own.or(key.map(KeyPath::KeyFile));
            let Holds::Layout(files) = bfc::look(&path, key.as_ref())? else {
                return Err(Error::invalid(format!(
                    "bfc:{path} holds a root file system and no OCI image layout to pack"
                )));
            };
            Ok((files, inside, format!("bfc:{path}")))
        }
        ImageSource::DockerArchive(path) => Err(Error::new(
            Kind::Unimplemented,
            format!("docker-archive:{path}: it has no manifest to pack; make an OCI layout of it first"),
        )),
    }
}

/// A blob on its way: fails at its end if it is not what its descriptor says.
struct Compared {
    inner: Box<dyn Read + Send>,
    sum: Sha256,
    left: u64,
    wanted: Digest,
}

impl Read for Compared {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let bad = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        if n == 0 && !buffer.is_empty() {
            let got = Digest::from_sha256(&self.sum.clone().finalize().into());
            if self.left != 0 || got != self.wanted {
                return bad(format!("{}: got {got}, {} bytes are missing", self.wanted, self.left));
            }
            return Ok(0);
        }
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => return bad(format!("{} is longer than its descriptor says", self.wanted)),
        }
        self.sum.update(&buffer[..n]);
        Ok(n)
    }
}
