//! Volumes of pods in VMs: which of the kubelet's folders and files a guest gets, and how its copies are kept in sync.
//!
//! ConfigMaps, Secrets, projected and downward API volumes are copied in, and again whenever the kubelet exchanges them (inotify on the
//! folder of `..data`); an emptyDir is a folder of the guest; single files of the kubelet's (hosts, a subPath of a copied volume) are copied
//! once, and a termination message is copied back at the container's end. Everything else is refused by name before anything is made.
//! A crash leaves the list of what a pod's guest has in the pod's folder, from which the next daemon goes on.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use lxcri_guest_proto::v1;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::guest::{self, DATA, RUN};
use super::{ProxmoxVmBackend, locked, refused};
use crate::backends::oci::mounts::clean;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::Monitor;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::{ContainerConfig, Mount, Propagation};
use crate::utils::atomic::{self, Durability};
use crate::utils::watched::watch;

/// Volumes that are copied; the kubelet's names of their plug-ins.
const COPIED: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Most bytes of a volume or file: a call to the guest has to hold it.
const MAX: u64 = 3 << 20;
/// Most bytes of a termination message that are copied back; the kubelet reads 4 KiB.
const MESSAGE: usize = 64 << 10;
/// The kubelet changes several things one after another.
const SETTLE: Duration = Duration::from_millis(20);
/// A copy that failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// A volume that is exchanged while it is read is read again, so often.
const TRIES: u32 = 10;
/// What a pod's guest has been given, in the pod's folder.
const LIST: &str = "volumes.json";

/// What a mount is in a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// A folder of the kubelet's that is kept in sync.
    Copied { volume: String },
    /// A folder of the guest's.
    Scratch { volume: String },
    /// A file, copied once.
    File,
    /// A file that the container writes and the kubelet reads.
    Message,
}

/// Which one a mount of a container of the pod with this uid is; refused by name otherwise.
pub(super) fn classify(kubelet_root: &Utf8Path, uid: &str, m: &Mount) -> Result<Source> {
    let no = |what: &str| Err(refused(format!("mount at {:?}: {what}", m.container_path)));
    if m.image.is_some() {
        return no("an image can't be a volume of a VM's containers yet");
    }
    if m.propagation == Propagation::Bidirectional {
        return no("mounts can't go from a VM to the node (Bidirectional)");
    }
    if !m.uid_mappings.is_empty() || !m.gid_mappings.is_empty() {
        return no("idmapped mounts can't be had in a VM");
    }
    let path = Utf8PathBuf::from(clean(&m.host_path));
    // Another pod's folder is a path of the node like any other.
    let Ok(inside) = path.strip_prefix(kubelet_root.join("pods").join(uid)) else {
        return no(&format!("{path} is a path of the node, of which a VM sees nothing (hostPath, PersistentVolume)"));
    };
    if m.host_path.split('/').any(|part| part == "..") {
        return no("'..' in the path on the node");
    }
    let parts: Vec<&str> = inside.components().map(|c| c.as_str()).collect();
    match parts.as_slice() {
        ["volumes", plugin, name] if COPIED.contains(plugin) => {
            Ok(Source::Copied { volume: format!("{}-{name}", &plugin["kubernetes.io~".len()..]) })
        }
        ["volumes", EMPTY_DIR, name] => Ok(Source::Scratch { volume: format!("empty-dir-{name}") }),
        ["etc-hosts"] => Ok(Source::File),
        ["containers", _, _] => Ok(Source::Message),
        ["volume-subpaths", _, _, _] if m.readonly => match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => Ok(Source::File),
            _ => no("a folder by subPath can't be had in a VM"),
        },
        ["volume-subpaths", ..] => no("a subPath that is written to can't be had in a VM"),
        ["volumes", plugin, ..] => no(&format!("volumes of {plugin} can't be had in a VM")),
        _ => no(&format!("{path} can't be had in a VM")),
    }
}

/// What a guest has of a pod's volumes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct List {
    /// Names in the guest, and folders of the kubelet's.
    copied: BTreeMap<String, Utf8PathBuf>,
}

/// Where changes of a pod's volumes are told.
pub(super) struct Watched {
    inotify: AsyncFd<OwnedFd>,
    list: std::sync::Mutex<List>,
}

impl Watched {
    fn new(list: List) -> Result<Self> {
        let failed = |e: rustix::io::Errno| Error::io("inotify", e.into());
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed)?;
        let this = Self {
            inotify: watch(fd, Interest::READABLE).map_err(|e| Error::io("inotify", e))?,
            list: std::sync::Mutex::new(List::default()),
        };
        for (volume, folder) in list.copied {
            // It stays in the list: what changes in it is copied whenever something else changes.
            if let Err(e) = this.watch(&folder) {
                tracing::error!(%folder, error = e.chain(), "changes of a volume are not seen any more");
            }
            locked(&this.list).copied.insert(volume, folder);
        }
        Ok(this)
    }

    fn add(&self, volume: &str, folder: &Utf8Path) -> Result<()> {
        self.watch(folder)?;
        locked(&self.list).copied.insert(volume.to_owned(), folder.to_owned());
        Ok(())
    }

    fn watch(&self, folder: &Utf8Path) -> Result<()> {
        let flags = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::CLOSE_WRITE | WatchFlags::DELETE;
        inotify::add_watch(self.inotify.get_ref(), folder.as_std_path(), flags | WatchFlags::ONLYDIR)
            .map(|_| ())
            .map_err(|e| Error::io(format!("watch {folder}"), e.into()))
    }

    fn copied(&self) -> BTreeMap<String, Utf8PathBuf> {
        locked(&self.list).copied.clone()
    }

    /// Waits for a change.
    async fn changed(&self) -> std::io::Result<()> {
        let mut buffer = [0u8; 4096];
        loop {
            let mut ready = self.inotify.readable().await?;
            match rustix::io::read(self.inotify.get_ref(), &mut buffer) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl ProxmoxVmBackend {
    /// Gives the guest what a container's mounts need; their sources there, in the mounts' order.
    pub(super) async fn give_volumes(
        &self,
        pod: &PodRecord,
        id: &ContainerId,
        config: &ContainerConfig,
        monitor: &dyn Monitor,
    ) -> Result<Vec<String>> {
        let mut sources = Vec::with_capacity(config.mounts.len());
        for (n, m) in config.mounts.iter().enumerate() {
            let named = |e: Error| e.context(format!("mount at {:?}", m.container_path));
            let path = Utf8PathBuf::from(clean(&m.host_path));
            let source = match classify(&self.config.kubelet_root, &pod.config.metadata.uid, m)? {
                Source::Copied { volume } => {
                    // Watched first: a change in between is seen.
                    self.watched(pod).and_then(|w| w.add(&volume, &path)).map_err(named)?;
                    self.save_list(pod).await.map_err(named)?;
                    copy(monitor, &volume, &path).await.map_err(named)?;
                    format!("{DATA}/volumes/{volume}")
                }
                Source::Scratch { volume } => {
                    let of = path.clone();
                    let meta =
                        blocking(move || std::fs::metadata(&of).map_err(|e| Error::io(of, e))).await.map_err(named)?;
                    let folder = v1::Folder { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() };
                    let call = v1::Sync { volume: volume.clone(), files: Vec::new(), folder: Some(folder) };
                    guest::sync(monitor, call).await.map_err(named)?;
                    format!("{DATA}/volumes/{volume}")
                }
                Source::File | Source::Message => {
                    let file = blocking(move || read_file(&path, String::new())).await.map_err(named)?;
                    let name = format!("{}/files/{n}", guest::bundle(id.as_str()));
                    let owner = (file.uid, file.gid);
                    guest::write(monitor, name.clone(), file.content, file.mode, owner).await.map_err(named)?;
                    format!("{RUN}/{name}")
                }
            };
            sources.push(source);
        }
        Ok(sources)
    }

    /// Copies a container's termination messages back to where the kubelet looks for them.
    pub(super) async fn fetch_messages(&self, pod: &PodRecord, container: &ContainerRecord) -> Result<()> {
        let Some(monitor) = self.monitor_if_any(&pod.id) else { return Ok(()) };
        for (n, m) in container.config.mounts.iter().enumerate() {
            let source = classify(&self.config.kubelet_root, &pod.config.metadata.uid, m);
            if !matches!(source, Ok(Source::Message)) || m.readonly {
                continue;
            }
            let path = format!("{RUN}/{}/files/{n}", guest::bundle(container.id.as_str()));
            let read = guest::read(&*monitor, vec![path]).await?;
            let Some(read) = read.into_iter().next().filter(|r| r.errno == 0 && r.content.len() <= MESSAGE) else {
                return Err(Error::internal(format!("the guest has no message for {}", m.host_path)));
            };
            let file = Utf8PathBuf::from(&m.host_path);
            blocking(move || {
                // The kubelet's own, which is there; never through a link.
                let written =
                    std::fs::File::options().write(true).truncate(true).custom_flags(libc::O_NOFOLLOW).open(&file);
                written
                    .and_then(|mut f| std::io::Write::write_all(&mut f, &read.content))
                    .map_err(|e| Error::io(format!("write {file}"), e))
            })
            .await?;
        }
        Ok(())
    }

    /// What watches the pod's volumes; begun now if need be.
    fn watched(&self, pod: &PodRecord) -> Result<Arc<Watched>> {
        let mut live = locked(&self.live);
        let entry = live.get_mut(&pod.id).ok_or_else(|| Error::new(Kind::Unavailable, "the pod has no relay"))?;
        if let Some(watched) = &entry.volumes {
            return Ok(watched.clone());
        }
        let watched = Arc::new(Watched::new(List::default())?);
        entry.volumes = Some(watched.clone());
        let cancel = entry.cancel.clone();
        drop(live);
        self.keep_in_sync(pod.id.clone(), watched.clone(), cancel);
        Ok(watched)
    }

    async fn save_list(&self, pod: &PodRecord) -> Result<()> {
        let list = List { copied: self.watched(pod)?.copied() };
        let file = self.pod_dir(&pod.id).join(LIST);
        let text = serde_json::to_vec(&list).map_err(|e| Error::because(Kind::Internal, "encode volumes", e))?;
        blocking(move || {
            atomic::write(file.as_std_path(), &text, 0o600, Durability::Process)
                .map_err(|e| Error::io(format!("write {file}"), e))
        })
        .await
    }

    /// Goes on with what an earlier daemon kept in sync.
    pub(super) fn resume_volumes(&self, pod: &PodId) -> Result<Option<Arc<Watched>>> {
        let file = self.pod_dir(pod).join(LIST);
        let text = match std::fs::read(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(format!("read {file}"), e)),
        };
        let list = serde_json::from_slice(&text).map_err(|e| Error::because(Kind::Internal, format!("{file}"), e))?;
        Watched::new(list).map(|watched| Some(Arc::new(watched)))
    }

    /// Copies again whatever has changed, until the pod's end.
    pub(super) fn keep_in_sync(&self, pod: PodId, watched: Arc<Watched>, cancel: tokio_util::sync::CancellationToken) {
        let this = self.clone();
        let work = async move {
            loop {
                let mut failed = false;
                for (volume, folder) in watched.copied() {
                    let Some(monitor) = this.monitor_if_any(&pod) else {
                        failed = true;
                        break;
                    };
                    if let Err(e) = copy(&*monitor, &volume, &folder).await {
                        tracing::warn!(pod = pod.as_str(), %folder, error = e.chain(), "a volume's change is not in the guest yet");
                        failed = true;
                    }
                }
                let changed = watched.changed();
                let waited = match failed {
                    true => tokio::time::timeout(AGAIN, changed).await.unwrap_or(Ok(())),
                    false => changed.await,
                };
                if let Err(e) = waited {
                    tracing::error!(pod = pod.as_str(), error = %e, "changes of volumes are not seen any more");
                    return;
                }
                tokio::time::sleep(SETTLE).await;
            }
        };
        self.tasks.spawn_cancellable("volumes of a VM", async move {
            cancel.run_until_cancelled(work).await;
        });
    }
}

/// Brings the guest's copy of a volume to what the kubelet has now.
async fn copy(monitor: &dyn Monitor, volume: &str, folder: &Utf8Path) -> Result<()> {
    let of = folder.to_owned();
    let files = blocking(move || read_volume(&of)).await?;
    guest::sync(monitor, v1::Sync { volume: volume.to_owned(), files, folder: None }).await
}

/// The files of a volume: those of the state that `..data` points to, or of a folder without such.
fn read_volume(folder: &Utf8Path) -> Result<Vec<v1::File>> {
    for _ in 0..TRIES {
        let state = state_of(folder)?;
        let read = read_state(&state);
        // The kubelet exchanges it and removes the old one, of which a part may be gone by then.
        if state_of(folder)? == state {
            return read;
        }
    }
    Err(Error::new(Kind::Unavailable, format!("{folder} changes all the time")))
}

/// The folder with a volume's files as they are now.
fn state_of(folder: &Utf8Path) -> Result<Utf8PathBuf> {
    let data = folder.join("..data");
    match data.canonicalize_utf8() {
        Ok(root) if root.starts_with(folder.canonicalize_utf8().unwrap_or_else(|_| folder.to_owned())) => Ok(root),
        Ok(root) => Err(Error::invalid(format!("{data} leads out of its volume, to {root}"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(folder.to_owned()),
        Err(e) => Err(Error::io(data, e)),
    }
}

fn read_state(root: &Utf8Path) -> Result<Vec<v1::File>> {
    let (mut files, mut total) = (Vec::new(), 0);
    let mut folders = vec![(root.to_owned(), String::new())];
    while let Some((folder, above)) = folders.pop() {
        for entry in folder.read_dir_utf8().map_err(|e| Error::io(format!("list {folder}"), e))? {
            let entry = entry.map_err(|e| Error::io(format!("list {folder}"), e))?;
            let name = format!("{above}{}", entry.file_name());
            let kind = entry.file_type().map_err(|e| Error::io(entry.path(), e))?;
            if kind.is_dir() {
                folders.push((entry.path().to_owned(), format!("{name}/")));
            } else if kind.is_file() {
                let file = read_file(entry.path(), name)?;
                total += file.content.len() as u64;
                if total > MAX {
                    return Err(refused(format!("{folder} has more than {MAX} bytes")));
                }
                files.push(file);
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn read_file(path: &Utf8Path, name: String) -> Result<v1::File> {
    let read = || -> std::io::Result<_> {
        // What is no file may have nobody who writes.
        let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path)?;
        let meta = file.metadata()?;
        let mut content = Vec::new();
        file.take(MAX + 1).read_to_end(&mut content)?;
        Ok((meta, content))
    };
    let (meta, content) = read().map_err(|e| Error::io(format!("read {path}"), e))?;
    if !meta.is_file() || content.len() as u64 > MAX {
        return Err(refused(format!("{path} is no file of at most {MAX} bytes")));
    }
    Ok(v1::File { path: name, content, mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() })
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_gets_and_what_is_refused() {
        let mount = |host: &str| Mount {
            container_path: "/x".into(),
            host_path: host.into(),
            readonly: true,
            ..Mount::default()
        };
        let root = Utf8Path::new("/var/lib/kubelet");
        let of = |rest: &str| classify(root, "uid", &mount(&format!("/var/lib/kubelet/pods/uid/{rest}")));
        let copied = |volume: &str| Source::Copied { volume: volume.into() };
        assert_eq!(of("volumes/kubernetes.io~configmap/cfg").expect("a ConfigMap"), copied("configmap-cfg"));
        assert_eq!(of("volumes/kubernetes.io~projected/api/").expect("a token"), copied("projected-api"));
        let scratch = Source::Scratch { volume: "empty-dir-tmp".into() };
        assert_eq!(of("volumes/kubernetes.io~empty-dir/tmp").expect("an emptyDir"), scratch);
        assert_eq!(of("etc-hosts").expect("hosts"), Source::File);
        assert_eq!(of("containers/c/0123abcd").expect("a message"), Source::Message);
        for (bad, why) in [
            ("volumes/kubernetes.io~csi/pv/mount", "volumes of kubernetes.io~csi"),
            ("volumes/kubernetes.io~configmap/../../../../etc", "'..'"),
            ("volume-subpaths/none/c/0", "subPath"),
            ("plugins", "can't be had"),
            ("../other/volumes/kubernetes.io~secret/s", "'..'"),
        ] {
            let e = of(bad).expect_err(bad);
            assert!(e.kind() == Kind::Unimplemented && e.chain().contains(why), "{bad}: {}", e.chain());
        }
        for path in ["/etc", "/var/lib/kubelet/pods/other/volumes/kubernetes.io~secret/s", "/var/lib/kubelet/pods"] {
            let e = classify(root, "uid", &mount(path)).expect_err("a hostPath").chain();
            assert!(e.contains(&format!("{path} is a path of the node")), "{e}");
        }
        assert!(classify(root, "", &mount("/var/lib/kubelet/pods/other/etc-hosts")).is_err(), "a pod without uid");
        let both = Mount { propagation: Propagation::Bidirectional, ..mount("/var/lib/kubelet/pods/uid/etc-hosts") };
        assert!(classify(root, "uid", &both).expect_err("refused").chain().contains("Bidirectional"));
    }

    #[test]
    fn a_volume_is_read_as_the_kubelet_writes_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = Utf8Path::from_path(dir.path()).expect("UTF-8");
        std::fs::create_dir_all(folder.join("..1/deep")).expect("a state");
        std::fs::write(folder.join("..1/a"), "1").expect("a file");
        std::fs::write(folder.join("..1/deep/b"), "2").expect("a file");
        std::os::unix::fs::symlink("..1", folder.join("..data")).expect("a link");
        std::os::unix::fs::symlink("..data/a", folder.join("a")).expect("a link");
        let names = |files: &[v1::File]| files.iter().map(|f| f.path.clone()).collect::<Vec<_>>();
        let files = read_volume(folder).expect("read");
        assert_eq!((names(&files), files[0].content.as_slice()), (vec!["a".to_owned(), "deep/b".into()], &b"1"[..]));
        std::fs::remove_file(folder.join("..data")).expect("removed");
        std::os::unix::fs::symlink("/etc", folder.join("..data")).expect("a link");
        assert!(read_volume(folder).expect_err("a link out of it").chain().contains("leads out"));
        let plain = folder.join("..1");
        assert_eq!(names(&read_volume(&plain).expect("without ..data")), ["a", "deep/b"]);
    }
}
