//! Writes an image of the store as an OCI layout in a tar, which every OCI tool reads.
//!
//! Called by the store. Layers are kept unpacked: their archives are made anew, with the same files. Where such an archive is not
//! the one that came, byte for byte, the image's config names the new one, and so the image has another id, which is told by who
//! reads the archive. The layers wait in files without a name. Fails by name; whoever takes the stream is told by its error, and a
//! crash leaves nothing.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::load::{CONTAINERD_NAME, REF_NAME, blob_name};
use super::{Inner, blocking};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::reference::Reference;
use crate::integrations::layers::export;
use crate::integrations::layers::pipeline::digest_of;

/// Bytes of one piece of the archive.
const PIECE: usize = 64 << 10;
pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layer as a blob.
pub(super) struct Packed {
    pub digest: Digest,
    pub size: u64,
    diff_id: Digest,
    file: File,
}

impl Packed {
    /// The blob from its beginning.
    pub(super) fn open(&self) -> Result<File> {
        let failed = |e| Error::io("a layer's file", e);
        // Another description of the same file: who reads twice at once would share its position.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        File::open(path).map_err(failed)
    }
}

/// An image as blobs.
pub(super) struct Image {
    /// Base first.
    pub layers: Vec<Packed>,
    pub config: Bytes,
    pub manifest: Bytes,
}

/// Counts and sums what goes through.
struct Summed<W> {
    out: W,
    sum: Sha256,
    bytes: u64,
}

impl<W> Summed<W> {
    fn new(out: W) -> Self {
        Self { out, sum: Sha256::new(), bytes: 0 }
    }

    fn digest(&self) -> Digest {
        Digest::from_sha256(&self.sum.clone().finalize().into())
    }
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buffer)?;
        self.sum.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A pipe into a channel, for a blocking writer.
struct Pieces {
    out: mpsc::Sender<Result<Bytes>>,
    runtime: tokio::runtime::Handle,
    patience: Duration,
}

impl Write for Pieces {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(&buffer[..buffer.len().min(PIECE)]);
        let n = piece.len();
        let sent = self.runtime.block_on(self.out.send_timeout(Ok(piece), self.patience));
        sent.map(|()| n).map_err(|e| match e {
            mpsc::error::SendTimeoutError::Timeout(_) => {
                io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")
            }
            mpsc::error::SendTimeoutError::Closed(_) => io::Error::new(io::ErrorKind::BrokenPipe, "the client is gone"),
        })
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Inner {
    /// The image's layers made into blobs, and the documents that name them.
    pub(super) async fn packed(self: &Arc<Self>, id: &Digest) -> Result<Image> {
        let layers = match self.read().get(id) {
            Some((record, _)) => record.layers.clone(),
            None => return Err(Error::not_found(format!("image {id} is not here"))),
        };
        let chains: Vec<Digest> = layers.iter().map(|l| l.chain.clone()).collect();
        let _kept = self.lease(&chains).await;
        let mut packed = Vec::new();
        for layer in &layers {
            let changes = self.layers.layer_changes(&layer.chain).await?;
            let scratch = self.disk.scratch();
            let done = blocking(move || {
                let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
                let file = rustix::fs::open(scratch.as_std_path(), flags, Mode::RUSR | Mode::WUSR);
                let file = File::from(file.map_err(|e| Error::io(format!("a file in {scratch}"), e.into()))?);
                let failed = |e| Error::io("a layer's file", e);
                let blob = Summed::new(BufWriter::with_capacity(256 << 10, file));
                let mut tar = Summed::new(flate2::write::GzEncoder::new(blob, flate2::Compression::new(6)));
                export::write(&changes, &mut tar)?;
                let diff_id = tar.digest();
                let mut blob = tar.out.finish().map_err(failed)?;
                blob.flush().map_err(failed)?;
                let (digest, size) = (blob.digest(), blob.bytes);
                let file = blob.out.into_inner().map_err(|e| failed(e.into_error()))?;
                Ok(Packed { digest, size, diff_id, file })
            })
            .await;
            packed.push(done.map_err(|e| e.context(format!("layer {}", layer.diff_id)))?);
        }
        let path = self.disk.blob_path(id);
        let config = blocking(move || std::fs::read(&path).map_err(|e| Error::io(&path, e))).await?;
        let config = renamed(config.into(), &packed)?;
        let layer = |l: &Packed| json!({"mediaType": LAYER_TYPE, "digest": l.digest, "size": l.size});
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(&config), "size": config.len()},
            "layers": packed.iter().map(layer).collect::<Vec<_>>(),
        });
        Ok(Image { layers: packed, config, manifest: manifest.to_string().into() })
    }

    pub(super) async fn export_image(
        self: &Arc<Self>,
        id: &Digest,
        name: Option<&str>,
        out: mpsc::Sender<Result<Bytes>>,
    ) -> Result<()> {
        let name = match name {
            Some(name) => Some(Reference::parse(name, &self.config.default_registry)?),
            None => None,
        };
        let image = self.packed(id).await?;
        let (runtime, patience) = (tokio::runtime::Handle::current(), self.config.progress_timeout);
        blocking(move || {
            let pieces = Pieces { out, runtime, patience };
            write(image, name.as_ref(), pieces).map_err(|e| match e.kind() {
                io::ErrorKind::TimedOut => Error::because(Kind::DeadlineExceeded, "writing the archive", e),
                io::ErrorKind::BrokenPipe => Error::because(Kind::Aborted, "writing the archive", e),
                _ => Error::io("writing the archive", e),
            })
        })
        .await
    }
}

/// The config, with the diff ids that the layers have now; the same bytes where they are the same.
fn renamed(config: Bytes, layers: &[Packed]) -> Result<Bytes> {
    let damaged = |e| Error::because(Kind::Internal, "the image's config", e);
    let mut value: Value = serde_json::from_slice(&config).map_err(damaged)?;
    let now: Vec<String> = layers.iter().map(|l| l.diff_id.to_string()).collect();
    let named = value.pointer_mut("/rootfs/diff_ids");
    let named = named.ok_or_else(|| Error::internal("the image's config names no layers"))?;
    if *named == json!(now) {
        return Ok(config);
    }
    *named = json!(now);
    Ok(serde_json::to_vec(&value).map_err(damaged)?.into())
}

fn write(image: Image, name: Option<&Reference>, out: Pieces) -> io::Result<()> {
    let mut tar = tar::Builder::new(BufWriter::with_capacity(PIECE, out));
    let mut add = |path: &str, size: u64, data: &mut dyn Read| {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        tar.append_data(&mut header, path, data)
    };
    let mut small = |path: &str, data: &[u8]| add(path, data.len() as u64, &mut io::Cursor::new(data));
    small("oci-layout", b"{\"imageLayoutVersion\":\"1.0.0\"}")?;
    let digest = digest_of(&image.manifest);
    let mut entry = json!({"mediaType": MANIFEST_TYPE, "digest": digest, "size": image.manifest.len()});
    if let Some(tagged) = name.and_then(Reference::tagged) {
        let tag = name.and_then(Reference::tag).unwrap_or_default();
        entry["annotations"] = json!({(CONTAINERD_NAME): tagged, (REF_NAME): tag});
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}).to_string();
    small("index.json", index.as_bytes())?;
    small(&blob_name(&digest), &image.manifest)?;
    small(&blob_name(&digest_of(&image.config)), &image.config)?;
    let mut done: Vec<Digest> = Vec::new();
    for layer in image.layers {
        // The same layer twice is one blob.
        if done.contains(&layer.digest) {
            continue;
        }
        let mut file = layer.file;
        file.seek(SeekFrom::Start(0))?;
        add(&blob_name(&layer.digest), layer.size, &mut file)?;
        done.push(layer.digest);
    }
    tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(())
}
