//! Makes an image of a container: one more layer on the container's image, and a config that says so.
//!
//! Called by the store. The layer waits in a file without a name, which ends with its descriptor. There is no manifest: as
//! with an image out of a docker archive, nobody has its layers as blobs. Fails when the container's image is gone or has
//! as many layers as an image can have. A crash leaves at most a layer that no image names.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::assemble::Plan;
use super::manifest::{self, Descriptor, LayerEntry, MAX_LAYERS};
use super::source::{Failure, LayerBytes, Source};
use super::{Inner, blocking, now_ns};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, ImageEdit, PackedLayer, RootfsChanges};
use crate::core::reference::Reference;
use crate::integrations::layers::export;
use crate::integrations::layers::pipeline::{Compression, digest_of};

/// Where the only layer that is not there yet is.
struct Packed {
    file: Arc<File>,
    diff_id: Digest,
}

struct FromStart {
    file: Arc<File>,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

#[async_trait]
impl Source for Packed {
    fn has_blob_digests(&self) -> bool {
        false
    }

    async fn blob(&self, blob: &Descriptor, _max: u64) -> Result<Bytes> {
        Err(Error::internal(format!("no blob {} is needed to commit a container", blob.digest)))
    }

    async fn layer(&self, layer: &Descriptor, after: Option<usize>) -> Result<Option<LayerBytes>> {
        if after.is_some() || layer.digest != self.diff_id {
            return Ok(None);
        }
        let reader = Box::new(FromStart { file: self.file.clone(), at: 0 });
        Ok(Some(LayerBytes { reader, failure: Failure::default(), place: 0, from: "the container".into() }))
    }
}

/// Counts what goes through.
struct Summed<W> {
    out: W,
    sum: Sha256,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buffer)?;
        self.sum.update(&buffer[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Inner {
    pub(super) async fn pack(&self, changes: RootfsChanges) -> Result<PackedLayer> {
        let scratch = self.disk.scratch();
        blocking(move || {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let file = rustix::fs::open(scratch.as_std_path(), flags, Mode::RUSR | Mode::WUSR);
            let file = File::from(file.map_err(|e| Error::io(format!("a file in {scratch}"), e.into()))?);
            let mut out = Summed { out: BufWriter::with_capacity(256 << 10, file), sum: Sha256::new() };
            export::write(&changes, &mut out)?;
            let diff_id = Digest::from_sha256(&out.sum.finalize().into());
            let file = out.out.into_inner().map_err(|e| Error::io("a layer's file", e.into_error()))?;
            Ok(PackedLayer { file, diff_id })
        })
        .await
    }

    pub(super) async fn commit_container(
        self: &Arc<Self>,
        base: &Digest,
        layer: PackedLayer,
        edit: &ImageEdit,
        reference: &str,
    ) -> Result<Arc<Image>> {
        let reference = Reference::parse(reference, &self.config.default_registry)?;
        let tag = reference.tagged().filter(|_| reference.digest().is_none());
        let tag = tag.ok_or_else(|| Error::invalid(format!("{reference}: a name with a tag is needed")))?;
        let layers = match self.read().get(base) {
            Some((record, _)) => record.layers.clone(),
            None => return Err(Error::precondition(format!("the container's image {base} is not here any more"))),
        };
        if layers.len() >= MAX_LAYERS {
            return Err(Error::precondition(format!("its image has {MAX_LAYERS} layers: no more can be added")));
        }
        let path = self.disk.blob_path(base);
        let bytes = blocking(move || std::fs::read(&path).map_err(|e| Error::io(&path, e))).await?;
        let config = next_config(&bytes, &layer.diff_id, edit, now_ns())?;
        let diff_ids: Vec<Digest> = layers.iter().map(|l| l.diff_id.clone()).chain([layer.diff_id.clone()]).collect();
        // What was written is read as any image's config is.
        let (_, told) = manifest::parse_config(&config, diff_ids.len(), &self.platform)?;
        if told != diff_ids {
            return Err(Error::internal(format!("the config of image {base} names other layers than its record")));
        }
        let config = Bytes::from(config);
        let plan = Plan {
            source: Arc::new(Packed { file: Arc::new(layer.file), diff_id: layer.diff_id }),
            config: Descriptor { media_type: String::new(), digest: digest_of(&config), size: config.len() as u64 },
            config_bytes: Some(config),
            layers: diff_ids.into_iter().map(plain_layer).collect(),
            manifests: Vec::new(),
            repo_tags: vec![tag],
            repo_digests: Vec::new(),
            cancel: self.tasks.token().child_token(),
            progress: Default::default(),
        };
        let id = self.assemble(plan).await?;
        self.by_id(&id)
    }
}

/// A layer that is named by its content.
pub(super) fn plain_layer(diff_id: Digest) -> LayerEntry {
    let descriptor = Descriptor { media_type: String::new(), digest: diff_id, size: 0 };
    LayerEntry { descriptor, compression: Compression::None }
}

fn object<'a>(value: &'a mut Value, key: &str) -> Result<&'a mut Map<String, Value>> {
    let slot = value.as_object_mut().map(|o| o.entry(key).or_insert(Value::Null));
    let slot = slot.ok_or_else(|| Error::internal("an image config that is no object"))?;
    if slot.is_null() {
        *slot = json!({});
    }
    slot.as_object_mut().ok_or_else(|| Error::internal(format!("an image config whose {key} is no object")))
}

/// The base's config with the layer and the edit. What we do not know of it stays.
fn next_config(base: &[u8], diff_id: &Digest, edit: &ImageEdit, now: i64) -> Result<Vec<u8>> {
    let damaged = |e| Error::because(Kind::Internal, "the config of the container's image", e);
    let mut config: Value = serde_json::from_slice(base).map_err(damaged)?;
    let created = prost_types::Timestamp { seconds: now.div_euclid(1_000_000_000), nanos: 0 }.to_string();
    let run = object(&mut config, "config")?;
    if let Some(cmd) = &edit.cmd {
        run.insert("Cmd".into(), json!(cmd));
    }
    if !edit.env.is_empty() {
        let mut env: Vec<String> =
            run.get("Env").and_then(|e| serde_json::from_value(e.clone()).ok()).unwrap_or_default();
        let key = |line: &str| line.split_once('=').map(|(key, _)| key.to_owned());
        for line in &edit.env {
            let Some(name) = key(line).filter(|k| !k.is_empty() && !line.contains('\0')) else {
                // Not shown: it may be a secret.
                return Err(Error::invalid("an environment variable that is not NAME=VALUE"));
            };
            env.retain(|old| key(old).as_ref() != Some(&name));
            env.push(line.clone());
        }
        run.insert("Env".into(), json!(env));
    }
    let rootfs = object(&mut config, "rootfs")?;
    let diff_ids = rootfs.get_mut("diff_ids").and_then(Value::as_array_mut);
    diff_ids.ok_or_else(|| Error::internal("an image config without diff ids"))?.push(json!(diff_id.to_string()));
    if let Some(top) = config.as_object_mut() {
        top.insert("created".into(), json!(created));
        if !edit.author.is_empty() {
            top.insert("author".into(), json!(edit.author));
        }
        let mut step = json!({"created": created, "created_by": "proxmox-lxcri container commit"});
        for (key, text) in [("author", &edit.author), ("comment", &edit.message)] {
            if !text.is_empty() {
                step[key] = json!(text);
            }
        }
        match top.entry("history").or_insert_with(|| json!([])) {
            Value::Array(history) => history.push(step),
            other => *other = json!([step]),
        }
    }
    serde_json::to_vec(&config).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_keeps_what_it_had() {
        let base = json!({
            "os": "linux", "architecture": "amd64", "unknown": {"kept": true},
            "config": {"Cmd": ["sh"], "Env": ["PATH=/bin", "A=1"], "Labels": {"l": "1"}},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:aa"]},
        });
        let edit = ImageEdit {
            author: "me".into(),
            message: "why".into(),
            cmd: Some(vec!["run".into()]),
            env: vec!["A=2".into(), "B=".into()],
        };
        let diff = digest_of(b"layer");
        let next = next_config(base.to_string().as_bytes(), &diff, &edit, 1_700_000_000_123_456_789).expect("a config");
        let next: Value = serde_json::from_slice(&next).expect("JSON");
        assert_eq!(next["unknown"]["kept"], true);
        assert_eq!(next["config"]["Cmd"], json!(["run"]));
        assert_eq!(next["config"]["Env"], json!(["PATH=/bin", "A=2", "B="]));
        assert_eq!(next["config"]["Labels"]["l"], "1");
        assert_eq!(next["rootfs"]["diff_ids"], json!(["sha256:aa", diff.to_string()]));
        assert_eq!((&next["author"], &next["history"][0]["comment"]), (&json!("me"), &json!("why")));
        assert_eq!(next["created"], "2023-11-14T22:13:20Z");
        let plain = next_config(b"{\"rootfs\":{\"diff_ids\":[]}}", &diff, &ImageEdit::default(), 0).expect("a config");
        assert!(String::from_utf8_lossy(&plain).contains("history"));
        let bad = ImageEdit { env: vec!["secret".into()], ..Default::default() };
        let told = next_config(base.to_string().as_bytes(), &diff, &bad, 0).expect_err("no variable").chain();
        assert!(!told.contains("secret"));
    }
}
