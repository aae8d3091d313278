//! Image manifests, indexes and configs: parsed, checked, and turned into what is needed to run the image.
//!
//! Called by the pull and the loader with content whose digest was compared. Pure; fails with [`ManifestError`], by name
//! for each kind of thing that is not an image this node can run.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::platform::Platform;
use crate::core::error::{Error, Kind};
use crate::core::ids::Digest;
use crate::core::ports::ImageConfig;
use crate::integrations::layers::pipeline::Compression;

/// Most layers in an image: what overlayfs stacks.
pub const MAX_LAYERS: usize = 500;
/// Most images in an index.
const MAX_INDEX: usize = 1000;
/// Most entries in any other list of a manifest or config: it is memory as long as the image is here.
const MAX_LIST: usize = 10_000;
/// Characters of a stranger's text in an error.
const MAX_SHOWN: usize = 200;

/// Why something is not an image this node can run.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not what the format says.
    #[error("{what} is malformed: {why}")]
    Malformed {
        /// Manifest, index or config.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A kind of image that is not supported.
    #[error("{0}")]
    Unsupported(String),
    /// Not for this machine.
    #[error("no image for {wanted}; there is {found}")]
    NoMatch {
        /// This machine's platform.
        wanted: String,
        /// The platforms there are.
        found: String,
    },
    /// The config is for another machine.
    #[error("the image is for {found}, this node runs {wanted}")]
    Platform {
        /// This machine's platform.
        wanted: String,
        /// The image's.
        found: String,
    },
}

impl From<ManifestError> for Error {
    fn from(e: ManifestError) -> Self {
        let kind = match &e {
            ManifestError::Malformed { .. } => Kind::InvalidArgument,
            ManifestError::Unsupported(_) => Kind::Unimplemented,
            ManifestError::NoMatch { .. } => Kind::NotFound,
            ManifestError::Platform { .. } => Kind::FailedPrecondition,
        };
        Error::new(kind, e.to_string())
    }
}

/// Names content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type.
    pub media_type: String,
    /// Digest.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: i64,
    platform: Option<RawPlatform>,
    artifact_type: Option<String>,
    #[serde(default)]
    annotations: Option<Capped<BTreeMap<String, String>>>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

impl From<RawPlatform> for Platform {
    fn from(p: RawPlatform) -> Self {
        Self { os: p.os, architecture: p.architecture, variant: p.variant }
    }
}

impl RawDescriptor {
    fn parse(&self, what: &'static str) -> Result<Descriptor, ManifestError> {
        let digest = self.digest.parse().map_err(|_| {
            let shown: String = self.digest.chars().take(100).collect();
            ManifestError::Unsupported(format!("{what}: {shown:?} is not a sha256 digest"))
        })?;
        let size = u64::try_from(self.size)
            .map_err(|_| ManifestError::Malformed { what, why: format!("{digest} has a negative size") })?;
        Ok(Descriptor { media_type: self.media_type.clone(), digest, size })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: Option<i64>,
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Capped<Vec<RawDescriptor>>>,
    manifests: Option<Capped<Vec<RawDescriptor>>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// An index entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// The manifest (or index).
    pub descriptor: Descriptor,
    /// What it is for, if told.
    pub platform: Option<Platform>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Something about an image, not an image.
    pub artifact: bool,
}

/// A layer as an image's manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// The blob.
    pub descriptor: Descriptor,
    /// How it is compressed.
    pub compression: Compression,
}

/// What a manifest document is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// Several images.
    Index(Vec<IndexEntry>),
    /// One image: config and layers, base first.
    Image(Descriptor, Vec<LayerEntry>),
}

/// A list or map that is given up when it has too many entries, before they are memory.
#[derive(Default)]
struct Capped<T>(T);

struct CappedVisitor<T>(PhantomData<T>);

fn full<E: serde::de::Error>() -> E {
    E::custom(format_args!("a list of more than {MAX_LIST} entries"))
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for CappedVisitor<Vec<T>> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element()? {
            if list.len() >= MAX_LIST {
                return Err(full());
            }
            list.push(item);
        }
        Ok(list)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for CappedVisitor<BTreeMap<String, T>> {
    type Value = BTreeMap<String, T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<BTreeMap<String, T>, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, value)) = entries.next_entry()? {
            if map.len() >= MAX_LIST {
                return Err(full());
            }
            map.insert(key, value);
        }
        Ok(map)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Capped<Vec<T>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(CappedVisitor::<Vec<T>>(PhantomData)).map(Self)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Capped<BTreeMap<String, T>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(CappedVisitor::<BTreeMap<String, T>>(PhantomData)).map(Self)
    }
}

/// What is in a list or map that need not be there.
fn given<T: Default>(list: Option<Capped<T>>) -> T {
    list.unwrap_or_default().0
}

fn json<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|e| ManifestError::Malformed { what, why: cut(&e.to_string()) })
}

/// What a registry said, short enough for an error: a manifest may be megabytes of one word.
fn cut(text: &str) -> String {
    text.chars().take(MAX_SHOWN).collect()
}

/// Parses a manifest or index; `media_type` is what the transport says it is ("": nothing).
pub fn parse(bytes: &[u8], media_type: &str) -> Result<Manifest, ManifestError> {
    let what = "manifest";
    let raw: RawManifest = json(what, bytes)?;
    let malformed = |why: &str| ManifestError::Malformed { what, why: why.into() };
    let own_type = raw.media_type.as_deref().unwrap_or(media_type);
    if raw.schema_version == Some(1) || raw.fs_layers.is_some() || own_type.contains("distribution.manifest.v1+") {
        return Err(ManifestError::Unsupported("Docker image manifests of schema 1 are not supported".into()));
    }
    if raw.schema_version != Some(2) {
        return Err(malformed("its schemaVersion is not 2"));
    }
    // A document that can be read both ways would be another image to another reader.
    match (raw.manifests, raw.config, raw.layers) {
        (Some(_), Some(_), _) | (Some(_), _, Some(_)) => Err(malformed("it is an index and an image at once")),
        (Some(manifests), None, None) => {
            if own_type.ends_with("image.manifest.v1+json") || own_type.ends_with("distribution.manifest.v2+json") {
                return Err(malformed("its media type says image, its content says index"));
            }
            index(manifests.0)
        }
        (None, Some(config), Some(layers)) => {
            if own_type.ends_with("image.index.v1+json") || own_type.ends_with("manifest.list.v2+json") {
                return Err(malformed("its media type says index, its content says image"));
            }
            if let Some(artifact) = raw.artifact_type.filter(|a| !a.is_empty()) {
                return Err(not_runnable(&artifact));
            }
            image(&config, &layers.0)
        }
        _ => Err(malformed("it has neither manifests nor config and layers")),
    }
}

fn not_runnable(kind: &str) -> ManifestError {
    let shown: String = kind.chars().take(100).collect();
    ManifestError::Unsupported(format!("this is an artifact of type {shown:?} and not an image that can be run"))
}

fn index(manifests: Vec<RawDescriptor>) -> Result<Manifest, ManifestError> {
    if manifests.len() > MAX_INDEX {
        let why = format!("an index of {} entries (limit {MAX_INDEX})", manifests.len());
        return Err(ManifestError::Malformed { what: "index", why });
    }
    let mut entries = Vec::with_capacity(manifests.len());
    for raw in manifests {
        let descriptor = raw.parse("index")?;
        let annotations = given(raw.annotations);
        let artifact =
            raw.artifact_type.is_some_and(|a| !a.is_empty()) || annotations.contains_key("vnd.docker.reference.type");
        entries.push(IndexEntry { descriptor, platform: raw.platform.map(Into::into), annotations, artifact });
    }
    Ok(Manifest::Index(entries))
}

fn image(config: &RawDescriptor, layers: &[RawDescriptor]) -> Result<Manifest, ManifestError> {
    match config.media_type.as_str() {
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json" => {}
        // What Docker's first registries stored.
        "application/octet-stream" => {}
        other => return Err(not_runnable(other)),
    }
    if layers.is_empty() {
        return Err(ManifestError::Unsupported("the image has no layers: there is nothing to run".into()));
    }
    if layers.len() > MAX_LAYERS {
        return Err(ManifestError::Unsupported(format!("an image of {} layers (limit {MAX_LAYERS})", layers.len())));
    }
    let mut list = Vec::with_capacity(layers.len());
    for raw in layers {
        let descriptor = raw.parse("manifest")?;
        let compression = compression(&descriptor)?;
        list.push(LayerEntry { descriptor, compression });
    }
    Ok(Manifest::Image(config.parse("manifest")?, list))
}

fn compression(layer: &Descriptor) -> Result<Compression, ManifestError> {
    match layer.media_type.as_str() {
        "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
            Ok(Compression::None)
        }
        "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            Ok(Compression::Gzip)
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            Ok(Compression::Zstd)
        }
        other if other.contains("foreign") || other.contains("nondistributable") => Err(ManifestError::Unsupported(
            format!("layer {}: foreign layers (type {:?}) are not supported", layer.digest, cut(other)),
        )),
        other => Err(ManifestError::Unsupported(format!("layer {}: unknown type {:?}", layer.digest, cut(other)))),
    }
}

/// The entry of an index that fits this machine best; the first of equals.
pub fn choose(entries: &[IndexEntry], wanted: &Platform) -> Result<IndexEntry, ManifestError> {
    let images: Vec<&IndexEntry> = entries.iter().filter(|e| !e.artifact).collect();
    let told = images.iter().filter_map(|e| Some((wanted.fit(e.platform.as_ref()?)?, *e)));
    if let Some((_, best)) = told.min_by_key(|(fit, _)| *fit) {
        return Ok(best.clone());
    }
    // A lone image that does not say what it is for says so in its config.
    if let [only] = images.as_slice()
        && only.platform.as_ref().is_none_or(|p| p.os.is_empty() && p.architecture.is_empty())
    {
        return Ok((*only).clone());
    }
    let found: Vec<String> = images
        .iter()
        .take(30)
        .map(|e| e.platform.as_ref().map_or("(platform not told)".into(), |p| cut(&p.to_string())))
        .collect();
    let found = if found.is_empty() { "none at all".into() } else { found.join(", ") };
    Err(ManifestError::NoMatch { wanted: wanted.to_string(), found })
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
    rootfs: Option<RawRootfs>,
    config: Option<RawRun>,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Option<Capped<Vec<String>>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawRun {
    user: Option<String>,
    env: Option<Capped<Vec<String>>>,
    entrypoint: Option<Capped<Vec<String>>>,
    cmd: Option<Capped<Vec<String>>>,
    working_dir: Option<String>,
    volumes: Option<Capped<BTreeMap<String, serde::de::IgnoredAny>>>,
    stop_signal: Option<String>,
    labels: Option<Capped<BTreeMap<String, String>>>,
}

/// Parses an image's config: how to run it, and the diff ids of its `layers` layers.
pub fn parse_config(
    bytes: &[u8],
    layers: usize,
    wanted: &Platform,
) -> Result<(ImageConfig, Vec<Digest>), ManifestError> {
    let raw: RawConfig = json("image config", bytes)?;
    let malformed = |why: String| ManifestError::Malformed { what: "image config", why };
    let found = Platform { os: raw.os, architecture: raw.architecture, variant: raw.variant };
    if found.os.is_empty() && found.architecture.is_empty() && raw.rootfs.is_none() {
        return Err(not_runnable("application/json"));
    }
    if wanted.fit(&found).is_none() {
        return Err(ManifestError::Platform { wanted: wanted.to_string(), found: cut(&found.to_string()) });
    }
    let diff_ids = given(raw.rootfs.and_then(|r| r.diff_ids));
    if diff_ids.len() != layers {
        return Err(malformed(format!("{layers} layers, but {} diff ids", diff_ids.len())));
    }
    let diff_ids = diff_ids
        .iter()
        .map(|d| d.parse().map_err(|_| malformed("a diff id is not a sha256 digest".into())))
        .collect::<Result<Vec<Digest>, _>>()?;
    let run = raw.config.unwrap_or_default();
    let config = ImageConfig {
        user: run.user.unwrap_or_default(),
        env: given(run.env),
        entrypoint: given(run.entrypoint),
        cmd: given(run.cmd),
        working_dir: run.working_dir.unwrap_or_default(),
        volumes: given(run.volumes).into_keys().collect(),
        stop_signal: run.stop_signal.unwrap_or_default(),
        labels: given(run.labels),
    };
    Ok((config, diff_ids))
}

/// Chain ids of layers with these diff ids
/// (<https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid>).
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chains: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff in diff_ids {
        let chain = match chains.last() {
            None => diff.clone(),
            Some(parent) => crate::integrations::layers::pipeline::digest_of(format!("{parent} {diff}").as_bytes()),
        };
        chains.push(chain);
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn doc(config: &str, layer: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{D}","size":2}},
            "layers":[{{"mediaType":"{layer}","digest":"{D}","size":3}}]}}"#
        )
    }

    #[test]
    fn images_of_both_kinds() {
        for (config, layer, compression) in [
            (
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.oci.image.layer.v1.tar+zstd",
                Compression::Zstd,
            ),
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                Compression::Gzip,
            ),
        ] {
            let Ok(Manifest::Image(_, layers)) = parse(doc(config, layer).as_bytes(), "") else { panic!("image") };
            assert_eq!(layers[0].compression, compression);
        }
    }

    #[test]
    fn refused_by_name() {
        let oci = "application/vnd.oci.image.config.v1+json";
        let tar = "application/vnd.oci.image.layer.v1.tar";
        let both = doc(oci, tar).replace("\"layers\"", "\"manifests\":[],\"layers\"");
        let artifact = doc(oci, tar).replace("\"config\"", "\"artifactType\":\"application/x\",\"config\"");
        let sha512 = doc(oci, tar).replace("sha256:", "sha512:");
        for (text, part) in [
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), "schema 1"),
            (doc("application/vnd.cncf.helm.config.v1+json", tar), "artifact"),
            (doc("application/vnd.oci.empty.v1+json", tar), "artifact"),
            (doc(oci, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "foreign"),
            (doc(oci, "application/vnd.oci.image.layer.nondistributable.v1.tar"), "foreign"),
            (doc(oci, "application/vnd.oci.image.layer.v1.tar+encrypted"), "unknown type"),
            (both, "at once"),
            (artifact, "artifact"),
            (sha512, "sha256 digest"),
            (doc(oci, tar).replace("\"size\":3", "\"size\":-3"), "negative"),
            ("{}".to_owned(), "schemaVersion"),
            (r#"{"schemaVersion":2}"#.to_owned(), "neither"),
            ("garbage".to_owned(), "malformed"),
            ("[]".to_owned(), "malformed"),
        ] {
            let e = parse(text.as_bytes(), "").expect_err(part).to_string();
            assert!(e.contains(part), "{part}: {e}");
        }
        assert!(parse(doc(oci, tar).as_bytes(), "application/vnd.oci.image.index.v1+json").is_err());
    }

    fn entry(platform: Option<(&str, &str, &str)>, artifact: bool) -> IndexEntry {
        let platform = platform.map(|(os, architecture, variant)| Platform {
            os: os.into(),
            architecture: architecture.into(),
            variant: variant.into(),
        });
        let descriptor = Descriptor { media_type: String::new(), digest: D.parse().expect("digest"), size: 1 };
        IndexEntry { descriptor, platform, annotations: BTreeMap::new(), artifact }
    }

    #[test]
    fn platforms() {
        let host = Platform { os: "linux".into(), architecture: "arm64".into(), variant: String::new() };
        let list = [
            entry(Some(("linux", "amd64", "")), false),
            entry(Some(("unknown", "unknown", "")), true),
            entry(Some(("linux", "arm64", "v8")), false),
        ];
        assert_eq!(choose(&list, &host).expect("arm64"), list[2]);
        let e = choose(&list[..2], &host).expect_err("none").to_string();
        assert_eq!(e, "no image for linux/arm64; there is linux/amd64");
        assert!(choose(&[entry(None, false), entry(None, true)], &host).is_ok());
        assert!(choose(&[entry(None, false), entry(None, false)], &host).is_err());
        assert!(choose(&[], &host).is_err());
    }

    #[test]
    fn configs() {
        let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{D}"]}},
            "config":{{"Env":null,"Cmd":["a"],"Volumes":{{"/v":{{}}}},"User":"1:2","ExposedPorts":{{"80/tcp":{{}}}}}}}}"#
        );
        let (config, diffs) = parse_config(text.as_bytes(), 1, &host).expect("config");
        assert_eq!((config.user.as_str(), config.volumes, diffs.len()), ("1:2", vec!["/v".to_owned()], 1));
        let e = parse_config(text.as_bytes(), 2, &host).expect_err("count").to_string();
        assert!(e.contains("2 layers, but 1 diff ids"), "{e}");
        let other = text.replace("amd64", "s390x");
        let e = parse_config(other.as_bytes(), 1, &host).expect_err("platform").to_string();
        assert_eq!(e, "the image is for linux/s390x, this node runs linux/amd64");
        assert!(parse_config(b"{}", 0, &host).is_err());
    }

    #[test]
    fn chains() {
        let diffs: Vec<Digest> = vec![D.parse().expect("digest"), D.parse().expect("digest")];
        let chains = chain_ids(&diffs);
        assert_eq!(chains[0], diffs[0]);
        assert_ne!(chains[1], diffs[1]);
    }
}
