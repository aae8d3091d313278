//! The seams: what the engine needs from the world, as traits. Integrations and backends implement them,
//! `main` wires them, tests put fakes behind them. Every verb may be repeated after a crash.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::Utf8PathBuf;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::error::{Error, Kind, Result};
use super::ids::{ContainerId, Digest, PodId};
use super::progress::PullView;
use super::spec::{DnsConfig, IdMapping, PortMapping, UserNamespace};

pub use lxcri_monitor_proto::v1 as monitor_v1;

// ---------------------------------------------------------------------------------------------- network

/// What a pod's network is made from; the same for ADD, CHECK and DEL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkRequest {
    /// Sandbox.
    pub pod: PodId,
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod uid.
    pub uid: String,
    /// Pinned network namespace.
    pub netns: Utf8PathBuf,
    /// Host ports (only those with a host port).
    pub port_mappings: Vec<PortMapping>,
    /// Bits per second into the pod; 0: no limit.
    pub ingress_bps: u64,
    /// Bits per second out of the pod; 0: no limit.
    pub egress_bps: u64,
    /// For plugins with the dns capability.
    pub dns: Option<DnsConfig>,
    /// For plugins with the cgroupPath capability; "" if unknown.
    pub cgroup_path: String,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct NetworkResult {
    /// Addresses of the pod's default interface (eth0), the primary one first.
    pub ips: Vec<IpAddr>,
}

/// Why pods can't get a network now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkNotReady {
    /// One CamelCase word for the node condition.
    pub reason: String,
    /// For a human.
    pub message: String,
}

/// Connects pods (CNI; later a Proxmox bridge or SDN).
#[async_trait]
pub trait PodNetwork: Send + Sync {
    /// Whether ADD can be expected to work; cheap, asks no plugin when nothing has changed.
    async fn status(&self) -> Result<(), NetworkNotReady>;
    /// Connects the pod and brings `lo` up. On failure everything it made is taken back before it returns.
    async fn add(&self, request: &NetworkRequest) -> Result<NetworkResult>;
    /// Whether the pod is still connected as it was.
    async fn check(&self, request: &NetworkRequest) -> Result<()>;
    /// Disconnects it, from the cached ADD where there is one. A netns or cache that is gone is success.
    async fn del(&self, request: &NetworkRequest) -> Result<()>;
    /// Gives back what belongs to no pod of `live` (addresses, cached results).
    async fn gc(&self, live: &[PodId]) -> Result<()>;
    /// The node's pod networks ("10.1.0.0/24"), as the kubelet tells them at its start and when they change.
    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        let _ = cidrs;
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------- storage

/// Space in use somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Files, folders and so on.
    pub inodes: u64,
}

/// How a container's root file system is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootfsOptions {
    /// Limit in bytes; 0: none.
    pub quota: u64,
    /// Id maps for an idmapped root; empty: none.
    pub uid_map: Vec<IdMapping>,
    /// As `uid_map`, for groups.
    pub gid_map: Vec<IdMapping>,
    /// More committed layers that the container uses, for image volumes: none of them is forgotten before it is removed.
    pub volumes: Vec<Digest>,
}

/// What a container has changed of its image.
#[derive(Debug)]
pub struct RootfsChanges {
    /// Folder that the changed files are in: a mount of its own in which no link is followed, since the container's
    /// processes go on changing it.
    pub folder: OwnedFd,
    /// New and changed files and folders, relative to it, bytes as they are; a folder before what is in it.
    pub changed: Vec<Vec<u8>>,
    /// Files of the image that are gone, from the container's root ("/etc/motd"); bytes as they are.
    pub deleted: Vec<Vec<u8>>,
    /// Folders that hide all that the image has in them, as in `deleted`.
    pub opaque: Vec<Vec<u8>>,
    /// The files' owners are the host's ids of this user namespace; None: they are as they are in the container.
    pub user: Option<UserNamespace>,
}

/// Why layers and root file systems can't be made now, or soon can't.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageTrouble {
    /// One CamelCase word for the node condition.
    pub reason: String,
    /// For a human.
    pub message: String,
    /// Nothing can be made until it is over.
    pub blocks: bool,
}

/// The containers that there are at a moment, for a look at all of the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claims {
    /// They have a root file system.
    pub whole: BTreeSet<ContainerId>,
    /// They are being made or removed: they may have one.
    pub half: BTreeSet<ContainerId>,
}

impl Claims {
    /// Whether a root file system may be there for this one.
    pub fn has(&self, container: &ContainerId) -> bool {
        self.whole.contains(container) || self.half.contains(container)
    }
}

/// What a look at all of the store found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StorageReport {
    /// What should not be; a store without any is clean.
    pub problems: Vec<String>,
    /// What is good to know.
    pub notes: Vec<String>,
}

/// What happened to a path of a root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// It is new, or another kind of thing than before.
    Added,
    /// Its content or attributes are others.
    Changed,
    /// It is gone, with all below it.
    Deleted,
}

/// A path that changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileChange {
    /// From the root on, without a leading slash.
    pub path: std::path::PathBuf,
    /// How.
    pub kind: ChangeKind,
}

/// A layer in the state that streams onto it have to begin from: the same chain may be in another state elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LayerState {
    /// The layer.
    pub chain: Digest,
    /// The driver's name for its state.
    pub state: String,
    /// It is here in part: the driver's token for a sender to go on with it.
    pub part: Option<String>,
}

/// Where the stream of a layer begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamFrom {
    /// At nothing.
    Nothing,
    /// At its parent, which the other side has in the state that it has here.
    Parent(Digest),
    /// Where an earlier stream of it was cut: the token that the other side's store gave.
    Cut(String),
}

/// Keeps unpacked layers and gives containers root file systems made of them (drivers `overlay`, `zfs`).
///
/// A layer is named by its chain id. It exists or it does not: an apply that did not end leaves nothing.
#[async_trait]
pub trait LayerStore: Send + Sync {
    /// Name of the driver.
    fn driver(&self) -> &'static str;
    /// Whether the layer is committed.
    async fn has(&self, chain: &Digest) -> Result<bool>;
    /// Unpacks an *uncompressed* layer tar onto `parent` and commits it as `chain`. `tar` is read to its end
    /// on a blocking thread; `verify` runs after that and before the commit: its error discards the layer.
    /// Returns what the layer takes. Two callers with the same chain: the second waits for the first.
    async fn apply(
        &self,
        parent: Option<&Digest>,
        chain: &Digest,
        tar: Box<dyn std::io::Read + Send>,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<Usage>;
    /// Whether layers may be unpacked before their parent is committed. If not, `apply` needs a committed parent from
    /// its beginning; if so, only when `verify` has returned.
    fn parallel_unpack(&self) -> bool {
        false
    }
    /// What a committed layer takes, from memory; None if it is not there or not known.
    fn layer_usage(&self, chain: &Digest) -> Option<Usage> {
        let _ = chain;
        None
    }
    /// Forgets layers that are not in `keep`, and parts of such; those in use by a container stay. Returns the bytes freed, when they are
    /// free: a kubelet looks at the disk as soon as an image is removed, and ends pods if that was not enough.
    async fn retain_layers(&self, keep: &[Digest]) -> Result<u64>;
    /// Waits until all that was removed is off the disk, but for what forks of it keep; false: it took longer.
    async fn settled(&self, longest: Duration) -> bool {
        let _ = longest;
        true
    }
    /// Makes the container's writable root on the layers `chains` (base first, at least one). Repeatable.
    async fn create_rootfs(&self, container: &ContainerId, chains: &[Digest], options: &RootfsOptions) -> Result<()>;
    /// A detached mount of it, ready for move_mount(2). Repeatable.
    async fn mount_rootfs(&self, container: &ContainerId) -> Result<OwnedFd>;
    /// A detached mount of the committed layers `chains` (base first), read-only, noexec, nosuid and nodev. They must be
    /// among the `volumes` of a container that is there as long as the mount is. `user`: its files have the ids that they
    /// have in the image when seen from that user namespace.
    async fn mount_volume(&self, chains: &[Digest], user: Option<&UserNamespace>) -> Result<OwnedFd> {
        let _ = (chains, user);
        Err(Error::new(Kind::Unimplemented, format!("image volumes: the {} driver has none", self.driver())))
    }
    /// Removes it; unknown is success.
    async fn remove_rootfs(&self, container: &ContainerId) -> Result<()>;
    /// All containers that have a root file system, for garbage collection.
    async fn list_rootfs(&self) -> Result<Vec<ContainerId>>;
    /// What the container has written. From memory or a bounded scan, never a storage command.
    async fn rootfs_usage(&self, container: &ContainerId) -> Result<Usage>;
    /// Whether root file systems can be idmapped here, found by trying; the error says why not.
    async fn try_idmap(&self) -> Result<()> {
        Err(Error::new(Kind::Unimplemented, format!("driver {} has no idmapped root file systems", self.driver())))
    }
    /// What the container has changed of its image, to be read while nothing of it is removed.
    async fn rootfs_changes(&self, container: &ContainerId) -> Result<RootfsChanges> {
        let message = format!("container {container}: driver {} can't tell what it has changed", self.driver());
        Err(Error::new(Kind::Unimplemented, message))
    }
    /// What a committed layer has changed of those below it, to be read while nothing of it is removed.
    async fn layer_changes(&self, chain: &Digest) -> Result<RootfsChanges> {
        Err(self.lacks(&format!("way back from a layer to its archive ({chain})")))
    }
    /// Applies a foreign layer's uncompressed tar to a container's writable root, in which nothing runs yet.
    async fn write_rootfs(&self, container: &ContainerId, layer: std::fs::File) -> Result<()> {
        let _ = (container, layer);
        Err(self.lacks("files of checkpoints"))
    }
    /// Folder on the file system that holds the layers.
    fn mountpoint(&self) -> Utf8PathBuf;
    /// A cut of several containers' root file systems at one moment, called `name`; AlreadyExists if one has it.
    async fn snapshot_rootfs(&self, containers: &[ContainerId], name: &str) -> Result<()> {
        let _ = (containers, name);
        Err(self.lacks("snapshots"))
    }
    /// Puts root file systems back to the cut; newer cuts of them go. They may be mounted.
    async fn rollback_rootfs(&self, containers: &[ContainerId], name: &str) -> Result<()> {
        let _ = (containers, name);
        Err(self.lacks("snapshots"))
    }
    /// Names of a container's cuts, oldest first; from memory.
    async fn rootfs_snapshots(&self, container: &ContainerId) -> Result<Vec<String>> {
        let _ = container;
        Err(self.lacks("snapshots"))
    }
    /// A moment that root file systems can be forked from, as a name for [`LayerStore::fork_rootfs`]: their cut `name`, or
    /// one that is made now, is not listed and goes with the last fork of it. NotFound if one of them lacks the cut.
    async fn fork_point(&self, containers: &[ContainerId], name: Option<&str>) -> Result<String> {
        let _ = (containers, name);
        Err(self.lacks("forks of root file systems"))
    }
    /// Makes the container's writable root as that of `of` was at a [`LayerStore::fork_point`]. Repeatable. `of` may be
    /// removed at any time: what both share stays.
    async fn fork_rootfs(
        &self,
        of: &ContainerId,
        point: &str,
        container: &ContainerId,
        options: &RootfsOptions,
    ) -> Result<()> {
        let _ = (of, point, container, options);
        Err(self.lacks("forks of root file systems"))
    }
    /// Gives a moment back that not all forks were made of. Cuts with a name stay.
    async fn drop_fork_point(&self, containers: &[ContainerId], point: &str) -> Result<()> {
        let _ = (containers, point);
        Ok(())
    }
    /// What differs between the cut `from` (None: the layers that it is made of) and the root file system as it is.
    async fn diff_rootfs(&self, container: &ContainerId, from: Option<&str>) -> Result<Vec<FileChange>> {
        let _ = (container, from);
        Err(self.lacks("differences of root file systems"))
    }
    /// All committed layers, and those that are here in part, for whoever is to send to this node; from memory.
    fn layer_states(&self) -> Result<Vec<LayerState>> {
        Err(self.lacks("streams of layers"))
    }
    /// Whether a stream of this layer can begin at `token`; why not is the error.
    async fn can_go_on(&self, chain: &Digest, token: &str) -> Result<()> {
        let _ = (chain, token);
        Err(self.lacks("streams that go on where they were cut"))
    }
    /// Writes a committed layer into `out` as a stream of this driver's.
    async fn send_layer(&self, chain: &Digest, from: &StreamFrom, out: OwnedFd) -> Result<()> {
        let _ = (chain, from, out);
        Err(self.lacks("streams of layers"))
    }
    /// Takes such a stream from `input` and commits it as `chain`, of which `usage` is told; `verify` runs when it has ended
    /// and before the commit. The stream's content is the sender's responsibility. A layer that is there is success. `token`:
    /// the stream goes on with what is here in part. Where the driver can, what came before a stream is cut stays, as a
    /// part of [`Self::layer_states`], until layers are collected or the layer begins anew.
    async fn receive_layer(
        &self,
        chain: &Digest,
        usage: Usage,
        token: Option<&str>,
        input: OwnedFd,
        verify: Box<dyn FnOnce() -> Result<()> + Send>,
    ) -> Result<()> {
        let _ = (chain, usage, token, input, verify);
        Err(self.lacks("streams of layers"))
    }
    /// What this driver does not do.
    fn lacks(&self, what: &str) -> Error {
        Error::new(Kind::Unimplemented, format!("the {} driver has no {what}", self.driver()))
    }
    /// Why unpacking is less closely confined than it could be; from memory.
    fn weakness(&self) -> Option<StorageTrouble> {
        None
    }
    /// What is wrong with it now; from memory.
    fn trouble(&self) -> Option<StorageTrouble> {
        None
    }
    /// Compares what is on disk with what is known; `claims` tells the containers that there are when it is called.
    /// Changes nothing.
    async fn check(&self, claims: &(dyn Fn() -> Claims + Send + Sync)) -> Result<StorageReport> {
        let _ = claims;
        Err(self.lacks("check"))
    }
}

// ---------------------------------------------------------------------------------------------- images

/// What an image's config says about running it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// "user[:group]", names or numbers; "" is root.
    pub user: String,
    /// KEY=value.
    pub env: Vec<String>,
    /// Entry point.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// "" is /.
    pub working_dir: String,
    /// Volumes declared by the image (paths).
    pub volumes: Vec<String>,
    /// "SIGTERM", "15", ...; "": none.
    pub stop_signal: String,
    /// Labels.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// A complete image in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of its config: the image's id.
    pub id: Digest,
    /// Full references with a tag ("registry.k8s.io/pause:3.9").
    pub repo_tags: Vec<String>,
    /// Full references with a manifest digest.
    pub repo_digests: Vec<String>,
    /// Bytes in the store, all layers.
    pub size: u64,
    /// Chain ids, base first.
    pub chains: Vec<Digest>,
    /// How to run it.
    pub config: ImageConfig,
    /// Never garbage collected.
    pub pinned: bool,
    /// Unix time in nanoseconds.
    pub pulled_at: i64,
}

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The whole name there, with its tag.
    pub name: String,
    /// Digest of the manifest or index there.
    pub digest: Digest,
    /// Where it came from: "registry HOST", or "this node's store".
    pub from: String,
    /// Blobs that had to be sent, and their bytes.
    pub sent: (usize, u64),
    /// Blobs that were there.
    pub there: usize,
}

/// Credentials for one pull. Never stored or shown.
#[derive(Clone, Default)]
pub struct RegistryAuth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// base64 of user:password.
    pub auth: String,
    /// Registry it is for; "": the image's.
    pub server_address: String,
    /// OAuth2 refresh token.
    pub identity_token: String,
    /// Bearer token as it is.
    pub registry_token: String,
}

impl std::fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryAuth").field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// `oci:DIR` (an OCI image layout), with an optional name inside it.
    OciLayout(Utf8PathBuf, Option<String>),
    /// `oci-archive:FILE`.
    OciArchive(Utf8PathBuf),
    /// `docker-archive:FILE` (docker save).
    DockerArchive(Utf8PathBuf),
    /// `bfc:FILE` (a Binary File Container with an OCI image layout or a plain root file system), with an optional name
    /// inside it and, where it is encrypted, a key; without one the configuration's.
    Bfc(Utf8PathBuf, Option<String>, Option<KeyPath>),
}

/// Label of images that were made of a plain root file system; its value says what was lost.
pub const PLAIN_ROOTFS: &str = "io.proxmox-lxcri.bfc.plain-rootfs";

/// Where the key of an encrypted container is: a path, never the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPath {
    /// 32 bytes.
    KeyFile(Utf8PathBuf),
    /// A password.
    PasswordFile(Utf8PathBuf),
}

/// A layer that was written down and is in no store yet: an uncompressed tar in a file without a name.
#[derive(Debug)]
pub struct PackedLayer {
    /// The tar; to be read from its beginning, wherever the descriptor is.
    pub file: std::fs::File,
    /// Digest of it.
    pub diff_id: Digest,
}

/// How an image made of a container differs from the container's image, beside its files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageEdit {
    /// Who made it.
    pub author: String,
    /// What for.
    pub message: String,
    /// Replaces the command; None: as it was.
    pub cmd: Option<Vec<String>>,
    /// KEY=value, over those of the image.
    pub env: Vec<String>,
}

/// An image to be sent to another node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SendImage {
    /// Id or reference.
    pub image: String,
    /// An image that the other node has from this one.
    pub since: Option<String>,
    /// Layers that the other node has.
    pub have: Vec<LayerState>,
}

/// Pulls, keeps and removes images. Lists and lookups are answered from memory.
#[async_trait]
pub trait ImageStore: Send + Sync {
    /// Pulls `reference` ("busybox", "host:5000/a/b:tag", "a@sha256:..."); answers with the complete image.
    async fn pull(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<Arc<Image>>;
    /// The same; `view` shows how far it is.
    async fn pull_shown(&self, reference: &str, view: Arc<PullView>) -> Result<Arc<Image>> {
        let _ = view;
        self.pull(reference, None).await
    }
    /// Writes the image as an OCI layout in a tar into `out`, layers made anew from what is stored. The caller tells an error;
    /// what was written until then is no whole archive.
    async fn export(
        &self,
        image: &Digest,
        name: Option<&str>,
        out: tokio::sync::mpsc::Sender<Result<bytes::Bytes>>,
    ) -> Result<()> {
        let _ = (name, out);
        Err(Error::new(Kind::Unimplemented, format!("this image store can't export {image}")))
    }
    /// Copies `source` to the registry of `target`: an image of the store that has no registry, or what a reference names there,
    /// all platforms, blobs as they are.
    async fn push(&self, source: &str, target: &str) -> Result<Pushed> {
        Err(Error::new(Kind::Unimplemented, format!("this image store can't push {source} to {target}")))
    }
    /// Compares the store's own files with what is known; `deep`: also reads every blob.
    async fn check(&self, deep: bool) -> Result<StorageReport> {
        let _ = deep;
        Ok(StorageReport::default())
    }
    /// Takes images from a local file or folder; `name` overrides the reference found inside.
    async fn load(&self, source: &ImageSource, name: Option<&str>) -> Result<Vec<Arc<Image>>>;
    /// Keeps the image `id` from a kubelet's garbage collection, or ends that.
    async fn set_pinned(&self, id: &Digest, pinned: bool) -> Result<Arc<Image>> {
        let _ = pinned;
        Err(Error::new(Kind::Unimplemented, format!("image {id}: this store pins no images")))
    }
    /// Gives the image `id` one more name, which another image loses by that.
    async fn tag(&self, id: &Digest, name: &str) -> Result<Arc<Image>> {
        Err(Error::new(Kind::Unimplemented, format!("image {id}: this store names none {name}")))
    }
    /// All images.
    fn list(&self) -> Vec<Arc<Image>>;
    /// By id (with or without "sha256:", or a unique prefix of at least 12 digits), tag or digest reference.
    fn resolve(&self, reference: &str) -> Option<Arc<Image>>;
    /// Removes the image with all its references; layers go when nothing uses them. Unknown is success.
    async fn remove(&self, reference: &str) -> Result<()>;
    /// Removes layers, and beginnings of such, that no image, unfinished pull or container uses; answers with the bytes freed.
    async fn collect_layers(&self) -> Result<u64> {
        Err(Error::new(Kind::Unimplemented, "this store collects no layers"))
    }
    /// Writes changes down as an image's layer; the same changes are the same bytes.
    async fn pack(&self, changes: RootfsChanges) -> Result<PackedLayer> {
        let _ = changes;
        Err(Error::new(Kind::Unimplemented, "this image store makes no layers"))
    }
    /// Makes an image of `base` with one more layer. `reference`: its name, with a tag.
    async fn commit(&self, base: &Digest, layer: PackedLayer, edit: &ImageEdit, reference: &str) -> Result<Arc<Image>> {
        let _ = (layer, edit, reference);
        Err(Error::new(Kind::Unimplemented, format!("this image store makes no images of {base}")))
    }
    /// Writes an image with the layers that the other node has not into `out`. The caller tells an error; what was
    /// written until then is no whole image.
    async fn send(&self, wanted: SendImage, out: tokio::sync::mpsc::Sender<Result<bytes::Bytes>>) -> Result<()> {
        let _ = out;
        Err(Error::new(Kind::Unimplemented, format!("this image store can't send {}", wanted.image)))
    }
    /// Takes an image that another node has sent. Nothing of it is listed before all of it was there and compared; whole
    /// layers of a failed try are not needed again. DeadlineExceeded for one that stands still.
    async fn receive(&self, input: Box<dyn tokio::io::AsyncRead + Send + Unpin>) -> Result<Arc<Image>> {
        let _ = input;
        Err(Error::new(Kind::Unimplemented, "this image store can't receive"))
    }
    /// What images take, and the folder whose file system holds them. Never waits for the disk.
    fn usage(&self) -> (Utf8PathBuf, Usage);
}

// ---------------------------------------------------------------------------------------------- monitors

/// What a monitor says on its own.
#[derive(Debug, Clone, PartialEq)]
pub enum MonitorEvent {
    /// A container's main process ended and its output is in the log.
    ContainerExited(ContainerId, monitor_v1::Exit),
    /// The init of the shared PID namespace ended.
    InitExited(monitor_v1::Exit),
    /// A container's stdin is at its end for good: duplicates of its writer have to go.
    StdinClosed(ContainerId),
    /// Output can't be logged ("" : it can again).
    LogTrouble(ContainerId, String),
    /// So many bytes of a log were dropped, since it had become too large.
    LogDropped(ContainerId, u64),
    /// The monitor is gone or the connection is broken. Always the last one.
    Gone,
}

/// Starts monitors and finds those that run.
#[async_trait]
pub trait Supervisor: Send + Sync {
    /// Starts the pod's monitor, which is a program of the handler's. `pod_info` is what it gives back in its Hello. One that
    /// finds out by itself what runs in the pod tells it in there.
    async fn spawn(&self, pod: &PodId, handler: &str, pod_info: Vec<u8>) -> Result<MonitorLink>;
    /// Connects to the pod's running monitor; NotFound when there is none.
    async fn connect(&self, pod: &PodId) -> Result<MonitorLink>;
    /// Pods whose monitor's socket is there, alive or not.
    async fn list(&self) -> Result<Vec<PodId>>;
    /// Removes what a dead or ended monitor left in the run directory. Kills one that does not answer.
    async fn cleanup(&self, pod: &PodId) -> Result<()>;
    /// Kills the pod's monitor, whether it answers or not; its containers run on. That there is none is success.
    async fn kill(&self, pod: &PodId) -> Result<()>;
}

/// A connection to a monitor, what it said first, and what it will say.
pub struct MonitorLink {
    /// Calls.
    pub monitor: Arc<dyn Monitor>,
    /// State at the time of connecting; newer events follow in `events`.
    pub hello: monitor_v1::HelloReply,
    /// Ends after [`MonitorEvent::Gone`].
    pub events: tokio::sync::mpsc::Receiver<MonitorEvent>,
}

/// What a container's streams and end hang on: with duplicates of these they outlive their monitor.
#[derive(Debug, Default)]
pub struct Lent {
    /// Write end of the stdin FIFO.
    pub stdin: Option<OwnedFd>,
    /// Read end of the stdout FIFO.
    pub stdout: Option<OwnedFd>,
    /// Read end of the stderr FIFO.
    pub stderr: Option<OwnedFd>,
    /// Master of the terminal.
    pub terminal: Option<OwnedFd>,
    /// Pidfd of the init.
    pub pidfd: Option<OwnedFd>,
}

/// How an exec ended.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecExit {
    /// Code and so on.
    pub exit: monitor_v1::Exit,
    /// Killed because its time was up.
    pub timed_out: bool,
}

/// Waits for the end of an attached client's output; of one with input alone, for the end of that. True: it was closed
/// because its buffer was full.
pub type AttachEnd = BoxFuture<'static, Result<bool>>;

/// Calls to one monitor. Each has a deadline and fails with Unavailable when the monitor is gone.
#[async_trait]
pub trait Monitor: Send + Sync {
    /// Pid of the monitor process.
    fn pid(&self) -> i32;
    /// See CreateContainer in monitor.proto; `mounts`: the plan's root file system, if it has one, then its volumes.
    async fn create(&self, plan: monitor_v1::CreateContainer, mounts: Vec<OwnedFd>) -> Result<monitor_v1::Created>;
    /// Lets the init run; answers with the time (Unix, ns).
    async fn start(&self, container: &ContainerId) -> Result<i64>;
    /// Signals the init (or all of the container's processes with SIGKILL); ended or unknown is success.
    async fn signal(&self, container: &ContainerId, signal: i32, all: bool) -> Result<()>;
    /// Kills, removes and forgets the container; unknown is success.
    async fn delete(&self, container: &ContainerId) -> Result<()>;
    /// Runs a process in a container and waits for its end. Dropping the future kills it.
    /// `stdio`: the process's stdin, stdout and stderr; missing ones are /dev/null.
    async fn exec(&self, exec: monitor_v1::Exec, stdio: [Option<OwnedFd>; 3]) -> Result<ExecExit>;
    /// Opens the log file anew; answers after the swap.
    async fn reopen_log(&self, container: &ContainerId) -> Result<()>;
    /// Starts the shared PID namespace's init; answers with its pid.
    async fn start_init(&self, request: monitor_v1::StartInit) -> Result<i32>;
    /// Connects a client with a running container's streams. `stdio`: where its input comes from, and where stdout and
    /// stderr go from now on (pipes or stream sockets; a client whose buffer is full is closed). The answer waits for
    /// the end; dropping it changes nothing, closing the other ends does.
    async fn attach(&self, container: &ContainerId, _stdio: [Option<OwnedFd>; 3]) -> Result<AttachEnd> {
        Err(Error::new(Kind::Unimplemented, format!("container {container}: this monitor can't attach")))
    }
    /// Sets the size, in cells, of the container's terminal or, with `exec`, of that exec's.
    async fn resize(&self, container: &ContainerId, _exec: Option<&str>, _width: u32, _height: u32) -> Result<()> {
        Err(Error::new(Kind::Unimplemented, format!("container {container}: this monitor has no terminals")))
    }
    /// Ends the container's stdin for good.
    async fn close_stdin(&self, container: &ContainerId) -> Result<()> {
        Err(Error::new(Kind::Unimplemented, format!("container {container}: this monitor has no stdin")))
    }
    /// Duplicates of what the container hangs on, to be held and not used while this monitor lives. FailedPrecondition when it
    /// has ended; Unimplemented from an older monitor.
    async fn lend(&self, container: &ContainerId) -> Result<Lent> {
        Err(Error::new(Kind::Unimplemented, format!("container {container}: this monitor lends nothing")))
    }
    /// Takes over a container of a monitor that is gone; its `streams` are set from what is lent.
    async fn adopt(&self, adopt: monitor_v1::AdoptContainer, _lent: &Lent) -> Result<()> {
        let id = adopt.plan.map(|p| p.id).unwrap_or_default();
        Err(Error::new(Kind::Unimplemented, format!("container {id}: this monitor takes nothing over")))
    }
    /// Takes over the pod's init.
    async fn adopt_init(&self, pid: i32, _start_time: u64, _pidfd: BorrowedFd<'_>) -> Result<()> {
        Err(Error::new(Kind::Unimplemented, format!("init {pid}: this monitor takes nothing over")))
    }
    /// Has the agent in the pod's virtual machine carry out a call (encoded, as its answer is; see GuestCall in monitor.proto).
    /// Waits for a guest that can't be reached for a while: DeadlineExceeded.
    async fn guest(&self, _call: Vec<u8>) -> Result<Vec<u8>> {
        Err(Error::new(Kind::Unimplemented, "this monitor is not that of a virtual machine"))
    }
    /// Whether it answers, within a few seconds.
    async fn ping(&self) -> Result<()> {
        Ok(())
    }
    /// Replaces the record that the monitor keeps for the daemon.
    async fn set_pod_info(&self, pod_info: Vec<u8>) -> Result<()>;
    /// Ends the monitor (with `force` its containers first) and waits until its process is gone.
    async fn shutdown(&self, force: bool) -> Result<()>;
}

/// What the daemon logs.
pub trait LogLevel: Send + Sync {
    /// Levels as `log.level` has them.
    fn get(&self) -> String;
    /// Other ones from now on; refuses what makes none.
    fn set(&self, levels: &str) -> Result<()>;
}

/// Keeps descriptors for the next daemon, where the node's service manager can. Names are letters, digits, dots and dashes.
pub trait FdStore: Send + Sync {
    /// Keeps a duplicate, in place of what was kept under the name.
    fn park(&self, name: &str, fd: BorrowedFd<'_>);
    /// Keeps it no longer.
    fn forget(&self, name: &str);
    /// What an earlier daemon has parked, once.
    fn take(&self, name: &str) -> Option<OwnedFd>;
    /// Of what an earlier daemon has parked and nobody has taken, replaced or forgotten yet, keeps no more than what is `wanted`
    /// (by name).
    fn sweep(&self, wanted: &dyn Fn(&str) -> bool);
}

/// There is no such place.
pub struct NoFdStore;

impl FdStore for NoFdStore {
    fn park(&self, _: &str, _: BorrowedFd<'_>) {}
    fn forget(&self, _: &str) {}
    fn take(&self, _: &str) -> Option<OwnedFd> {
        None
    }
    fn sweep(&self, _: &dyn Fn(&str) -> bool) {}
}

// ---------------------------------------------------------------------------------------------- time

/// The time of day; a trait so that tests can bend it.
pub trait Clock: Send + Sync {
    /// Unix time in nanoseconds.
    fn now_ns(&self) -> i64;
    /// Time since boot, suspended time included.
    fn since_boot(&self) -> Duration;
}
