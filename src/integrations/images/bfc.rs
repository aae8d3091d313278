//! Images in Binary File Containers: loaded from a file, or pulled as `bfc.local/NAME:TAG` from configured folders.
//!
//! Called by the store. A container holds an OCI image layout, whose blobs are read where they lie (a layer is unpacked
//! straight from the container), or a plain root file system, which becomes an image of one layer. `bfc.local` is asked
//! of no network. Fails by name; see `load` for what stays.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};

use super::archive::Files;
use super::assemble::Plan;
use super::load::{CONTAINERD_NAME, Inside, REF_NAME};
use super::manifest::{self, Descriptor, IndexEntry, LayerEntry, Manifest};
use super::source::{Failure, LayerBytes, Source};
use super::{Inner, blocking};
use crate::core::config::{BfcImages, PlainRootfs};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, KeyPath, PLAIN_ROOTFS};
use crate::core::reference::{DOCKER_HUB, Reference};
use crate::integrations::bfc::rootfs::RootfsTar;
use crate::integrations::bfc::{Container, KeySource, ReadError};
use crate::integrations::layers::pipeline::{Compression, digest_of};
use crate::integrations::registry::MAX_MANIFEST;

/// The registry that stands for the configured folders.
pub(super) const REGISTRY: &str = "bfc.local";
/// Most containers of a folder that are searched for a name.
const MAX_FILES: usize = 1000;
/// What makes a folder look like a root file system.
const ROOT_FOLDERS: [&str; 6] = ["bin", "etc", "lib", "sbin", "usr", "var"];

/// What a container holds.
pub(super) enum Holds {
    Layout(Arc<Files>),
    /// The folder in it that is the root, with a slash; or nothing.
    Rootfs(Arc<Container>, String),
}

/// Opens a container, with its key if it is encrypted.
fn open(path: &Utf8Path, key: Option<&KeyPath>) -> Result<Container> {
    let mut container = Container::open(path)?;
    if container.is_encrypted() {
        let key = key.ok_or_else(|| {
            Error::precondition(format!(
                "{path} is encrypted: name a key (images.bfc.key_file, --keyfile or --password-file)"
            ))
        })?;
        container.unlock(&KeySource::load(key)?)?;
        container.try_key().map_err(|e| Error::from(e).context(path.to_string()))?;
    }
    Ok(container)
}

/// Opens a container and finds out what it holds, at its root or in its only folder.
pub(super) fn look(path: &Utf8Path, key: Option<&KeyPath>) -> Result<Holds> {
    let container = open(path, key)?;
    let mut tops: BTreeSet<&[u8]> = BTreeSet::new();
    for entry in container.entries() {
        tops.insert(entry.path.split(|b| *b == b'/').next().unwrap_or_default());
    }
    let mut prefixes = vec![String::new()];
    if let [top] = tops.iter().collect::<Vec<_>>()[..]
        && let Ok(top) = std::str::from_utf8(top)
    {
        prefixes.push(format!("{top}/"));
    }
    let has = |name: String| container.find(name.as_bytes()).is_some();
    let below = |name: String| container.below(name.as_bytes()).next().is_some();
    let layout = prefixes.iter().find(|p| has(format!("{p}oci-layout")) && has(format!("{p}index.json"))).cloned();
    let rootfs = prefixes.iter().find(|p| ROOT_FOLDERS.iter().any(|f| below(format!("{p}{f}")))).cloned();
    match (layout, rootfs) {
        (Some(prefix), _) => Ok(Holds::Layout(Arc::new(Files::Bfc(path.to_owned(), Arc::new(container), prefix)))),
        (None, Some(prefix)) => Ok(Holds::Rootfs(Arc::new(container), prefix)),
        (None, None) => Err(Error::invalid(format!("{path} holds neither an OCI image layout nor a root file system"))),
    }
}

/// The images that a layout names.
fn entries(files: &Files) -> Result<Vec<IndexEntry>> {
    match manifest::parse(&files.read("index.json", MAX_MANIFEST)?, "")? {
        Manifest::Index(entries) => Ok(entries.into_iter().filter(|e| !e.artifact).collect()),
        Manifest::Image(..) => Err(Error::invalid("index.json is no index")),
    }
}

/// What an entry is called: its repository, if its name has one, and its tag.
fn names(entry: &IndexEntry) -> Vec<(Option<String>, String)> {
    let named = [CONTAINERD_NAME, REF_NAME].into_iter().filter_map(|key| entry.annotations.get(key));
    named
        .filter_map(|name| {
            if !name.contains(['/', ':']) {
                return Some((None, name.clone()));
            }
            let reference = Reference::parse(name, DOCKER_HUB).ok()?;
            let repository = reference.repository();
            let repository = repository.strip_prefix("library/").unwrap_or(repository);
            Some((Some(repository.to_owned()), reference.tag()?.to_owned()))
        })
        .collect()
}

/// Where a pulled image is.
enum Found {
    Image(Arc<Files>, Digest),
    Rootfs(Utf8PathBuf, Arc<Container>, String),
}

/// How sure a container's own name makes us of what is in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    /// `NAME@TAG.bfc`.
    Whole,
    /// `NAME.bfc`.
    Repository,
    /// Any other.
    No,
}

/// The image in the container `path` that `reference` means.
fn pick(path: &Utf8Path, key: Option<&KeyPath>, reference: &Reference, named: Named) -> Result<Option<Found>> {
    let files = match look(path, key)? {
        Holds::Layout(files) => files,
        Holds::Rootfs(container, prefix) => {
            let latest = named == Named::Repository && reference.tag() == Some("latest");
            let fits = reference.digest().is_none() && (named == Named::Whole || latest);
            return Ok(fits.then(|| Found::Rootfs(path.to_owned(), container, prefix)));
        }
    };
    let all = entries(&files)?;
    // As names() has them: Docker's own images have no folder.
    let repository = reference.repository();
    let repository = repository.strip_prefix("library/").unwrap_or(repository);
    let fits = |entry: &&IndexEntry| {
        let names = names(entry);
        let same_repository = |r: &Option<String>| match r {
            Some(r) => r == repository || named != Named::No,
            None => named != Named::No,
        };
        match (reference.digest(), reference.tag()) {
            (Some(digest), _) => {
                entry.descriptor.digest == *digest
                    && (named != Named::No || names.iter().any(|(r, _)| same_repository(r)))
            }
            (None, Some(tag)) => names.iter().any(|(r, t)| same_repository(r) && t == tag),
            (None, None) => false,
        }
    };
    let mut digests: Vec<Digest> = all.iter().filter(fits).map(|e| e.descriptor.digest.clone()).collect();
    // A container of one image that is called as the image is wanted needs no name inside.
    let only = named == Named::Whole || (named == Named::Repository && reference.tag() == Some("latest"));
    if let ([], [entry], true, None) = (digests.as_slice(), all.as_slice(), only, reference.digest())
        && (named == Named::Whole || names(entry).is_empty())
    {
        digests.push(entry.descriptor.digest.clone());
    }
    digests.sort();
    digests.dedup();
    match digests.as_slice() {
        [] => Ok(None),
        [digest] => Ok(Some(Found::Image(files, digest.clone()))),
        _ => Err(Error::precondition(format!("{path} holds {} images that are {reference}", digests.len()))),
    }
}

/// Searches the configured folders in their order: first by the containers' names, then by what they hold.
fn find(config: &BfcImages, reference: &Reference) -> Result<Found> {
    let key = config.key_file.clone().map(KeyPath::KeyFile);
    let repository = reference.repository();
    let mut unreadable = Vec::new();
    for folder in &config.directories {
        let mut candidates = Vec::new();
        if let Some(tag) = reference.tag() {
            candidates.push((folder.join(format!("{repository}@{tag}.bfc")), Named::Whole));
        }
        candidates.push((folder.join(format!("{repository}.bfc")), Named::Repository));
        for (path, named) in candidates {
            // Such a file can't be: a repository below what is no folder, or with a name that is too long.
            let absent = |e: std::io::Error| matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ENAMETOOLONG));
            if path.symlink_metadata().is_err_and(absent) {
                continue;
            }
            match pick(&path, key.as_ref(), reference, named) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        let mut others = match containers(folder) {
            Ok(others) => others,
            Err(e) => {
                unreadable.push(e.chain());
                continue;
            }
        };
        others.sort();
        let mut found: Option<(Utf8PathBuf, Arc<Files>, Digest)> = None;
        for path in others {
            match pick(&path, key.as_ref(), reference, Named::No) {
                Ok(Some(Found::Image(files, digest))) => match &found {
                    Some((first, _, known)) if *known != digest => {
                        let why = format!("{first} and {path} hold different images that are {reference}");
                        return Err(Error::precondition(why));
                    }
                    Some(_) => {}
                    None => found = Some((path, files, digest)),
                },
                Ok(_) => {}
                // One bad file does not hide the others.
                Err(e) => {
                    tracing::warn!(container = %path, error = e.chain(), "a container can't be searched for images");
                    unreadable.push(e.chain());
                }
            }
        }
        if let Some((_, files, digest)) = found {
            return Ok(Found::Image(files, digest));
        }
    }
    let mut why = format!("no container in {:?} holds it", config.directories);
    for e in unreadable.iter().take(5) {
        why.push_str(&format!("; {e}"));
    }
    Err(Error::not_found(why))
}

/// The containers of a folder.
fn containers(folder: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let failed = |e| Error::io(format!("listing {folder}"), e);
    let mut paths = Vec::new();
    for entry in folder.read_dir_utf8().map_err(failed)? {
        let path = entry.map_err(failed)?.into_path();
        // What is being written has a name of its own.
        if path.extension() == Some("bfc") && !path.file_name().is_some_and(|n| n.starts_with('.')) {
            paths.push(path);
        }
        if paths.len() > MAX_FILES {
            return Err(Error::precondition(format!("{folder} has more than {MAX_FILES} containers")));
        }
    }
    Ok(paths)
}

/// A plain root file system.
struct RootfsSource {
    container: Arc<Container>,
    prefix: String,
}

#[async_trait]
impl Source for RootfsSource {
    fn has_blob_digests(&self) -> bool {
        false
    }

    async fn blob(&self, blob: &Descriptor, _max: u64) -> Result<Bytes> {
        Err(Error::not_found(format!("a plain root file system has no blob {}", blob.digest)))
    }

    async fn layer(&self, _: &Descriptor, after: Option<usize>) -> Result<Option<LayerBytes>> {
        if after.is_some() {
            return Ok(None);
        }
        let reader = Box::new(RootfsTar::new(self.container.clone(), self.prefix.as_bytes()));
        Ok(Some(LayerBytes { reader, failure: Failure::default(), place: 0, from: "the container".into() }))
    }
}

impl Inner {
    /// Takes the images of a container.
    pub(super) async fn load_bfc(
        self: &Arc<Self>,
        path: &Utf8Path,
        inside: Option<&str>,
        key: Option<&KeyPath>,
        name: Option<&Reference>,
    ) -> Result<Vec<Arc<Image>>> {
        let (file, own, configured) = (path.to_owned(), key.cloned(), self.config.bfc.key_file.clone());
        let holds = blocking(move || {
            if own.is_some() {
                // Who names a key wants what was made with it: what is not encrypted at all is refused, too.
                Container::open(&file)?.all_encrypted().map_err(|e| e.context(file.to_string()))?;
            }
            look(&file, own.or(configured.map(KeyPath::KeyFile)).as_ref())
        })
        .await?;
        match holds {
            Holds::Layout(files) => self.load_layout(files, Inside::of(inside), name).await,
            Holds::Rootfs(..) if inside.is_some() => {
                Err(Error::not_found(format!("{path} holds a plain root file system and no named image")))
            }
            Holds::Rootfs(container, prefix) => {
                Ok(vec![self.load_rootfs(path, container, prefix, name.and_then(Reference::tagged)).await?])
            }
        }
    }

    /// Pulls `bfc.local/...`.
    pub(super) async fn pull_bfc(self: &Arc<Self>, reference: &Reference) -> Result<Arc<Image>> {
        self.admit_local(reference).await?;
        if !self.config.bfc.enabled {
            return Err(Error::precondition(format!(
                "{REGISTRY} stands for containers on the node, which images.bfc.enabled is to allow"
            )));
        }
        if reference.digest().is_some()
            && let Some(id) = self.find(&reference.to_string())
        {
            return self.by_id(&id);
        }
        let (config, wanted) = (self.config.bfc.clone(), reference.clone());
        let found = blocking(move || find(&config, &wanted)).await?;
        let (send, done) = tokio::sync::oneshot::channel();
        let (store, reference) = (self.clone(), reference.clone());
        // It outlives its caller: who asks again finds the layers that are done.
        self.tasks.spawn(format!("pull {reference}"), async move {
            // Nobody may be there any more.
            let _ = send.send(store.take(found, &reference).await);
        });
        done.await.map_err(|_| Error::new(Kind::Aborted, "the pull was ended"))?
    }

    async fn take(self: &Arc<Self>, found: Found, reference: &Reference) -> Result<Arc<Image>> {
        let tags: Vec<String> = match reference.digest() {
            Some(_) => Vec::new(),
            None => reference.tagged().into_iter().collect(),
        };
        let image = match found {
            Found::Image(files, digest) => {
                let digests = vec![reference.digested(&digest)];
                if let Some(id) = self.by_manifest(&digest) {
                    self.add_names(&id, tags, digests).await?
                } else {
                    let images = self.load_layout(files, Inside::Digest(&digest), Some(reference)).await?;
                    let first = images.into_iter().next();
                    first.ok_or_else(|| Error::internal(format!("{digest} was loaded without a result")))?
                }
            }
            Found::Rootfs(path, container, prefix) => {
                self.load_rootfs(&path, container, prefix, tags.into_iter().next()).await?
            }
        };
        match self.config.bfc.pinned {
            true => self.set_pinned(&image.id, true).await,
            false => Ok(image),
        }
    }

    /// Makes an image of a plain root file system, where that is allowed.
    async fn load_rootfs(
        self: &Arc<Self>,
        path: &Utf8Path,
        container: Arc<Container>,
        prefix: String,
        tag: Option<String>,
    ) -> Result<Arc<Image>> {
        if self.config.bfc.plain_rootfs == PlainRootfs::Refuse {
            return Err(Error::precondition(format!(
                "{path} holds a plain root file system, which images.bfc.plain_rootfs refuses"
            )));
        }
        tracing::warn!(
            container = %path,
            "a plain root file system: all files are owned by 0:0, without extended attributes and hard links"
        );
        let diff_id = {
            let (container, prefix) = (container.clone(), prefix.clone());
            blocking(move || tar_digest(container, &prefix)).await?
        };
        let config = serde_json::json!({
            "architecture": self.platform.architecture,
            "os": self.platform.os,
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["/bin/sh"],
                "Labels": {(PLAIN_ROOTFS): "owners, extended attributes and hard links are lost"},
            },
            "rootfs": {"type": "layers", "diff_ids": [diff_id.to_string()]},
        });
        let config_bytes = Bytes::from(config.to_string());
        let config =
            Descriptor { media_type: String::new(), digest: digest_of(&config_bytes), size: config_bytes.len() as u64 };
        let descriptor = Descriptor { media_type: String::new(), digest: diff_id, size: 0 };
        let plan = Plan {
            source: Arc::new(RootfsSource { container, prefix }),
            config,
            config_bytes: Some(config_bytes),
            layers: vec![LayerEntry { descriptor, compression: Compression::None }],
            manifests: Vec::new(),
            repo_tags: tag.into_iter().collect(),
            repo_digests: Vec::new(),
            cancel: self.tasks.token().child_token(),
            progress: Default::default(),
        };
        let id = self.assemble(plan).await?;
        self.by_id(&id)
    }
}

/// Digest of the tar that a plain root file system becomes: all of it is read.
fn tar_digest(container: Arc<Container>, prefix: &str) -> Result<Digest> {
    let mut tar = RootfsTar::new(container, prefix.as_bytes());
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match tar.read(&mut buffer) {
            Ok(0) => return Ok(Digest::from_sha256(&sum.finalize().into())),
            Ok(n) => sum.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ReadError::of_stream(b"root file system", e).into()),
        }
    }
}
