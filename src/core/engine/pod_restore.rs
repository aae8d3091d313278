//! RestorePod: a new pod whose containers go on where those of a checkpoint were.
//!
//! The sandbox is made as any other. Its containers have the files of the checkpoint and are CREATED, without a process:
//! StartContainer has the processes restored. Until then the images of the processes are kept in `<root>/restores/<id>`, so that
//! the checkpoint may go. Everything in a checkpoint is read without following links and with limits on size; what the images of
//! processes do to the container is what their maker wanted: a checkpoint is as trusted as its folder. Fails by name for a folder
//! that is none, another handler or image, containers that are not those of the checkpoint. On failure nothing is left. A crash
//! leaves a pod with some of the containers.

use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::sync::oneshot;

use super::checkpoint::make_folder;
use super::pod::{Base, Command, PodTask};
use super::pod_checkpoint::{FILES, MANIFEST, Manifest, VERSION, is_folder_name};
use super::{Engine, Scope, Shared, takeover};
use crate::core::backend::RestoreContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::monitor_v1;
use crate::core::records::ContainerRecord;
use crate::core::spec::{ContainerConfig, Owner, SandboxConfig};
use crate::core::state::ContainerPhase;
use crate::utils::beneath::{self, Root};

/// Largest manifest, OCI spec or list of streams, in bytes.
const TEXT_MAX: u64 = 16 << 20;
/// Most files of one container's images.
const IMAGES_MAX: usize = 65_536;
/// Files beside the images that a restore needs.
const TEXTS: [&str; 2] = ["spec.dump", "criu.conf"];

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The new pod.
    pub pod: PodId,
    /// Names and ids of its containers, in the order in which they were asked for.
    pub containers: Vec<(String, ContainerId)>,
}

/// A container to be made, and the folder of the checkpoint that it is in.
type Wanted = (ContainerConfig, Utf8PathBuf);

impl Engine {
    /// Makes a pod of the checkpoint in the folder `from`, absolute. `containers` are all of its containers, by name, and no
    /// others; their images have to be here.
    pub async fn restore_pod(
        &self,
        owner: Owner,
        from: &str,
        config: SandboxConfig,
        handler: &str,
        containers: Vec<ContainerConfig>,
    ) -> Result<Restored> {
        let told = format!("restore of pod {} from {from:?}", config.metadata.name);
        let named = |e: Error| e.context(told.clone());
        let path = from.to_owned();
        let (folder, manifest) = blocking(move || read_manifest(&path)).await.map_err(named)?;
        let wanted = self.matched(&config, handler, &folder, manifest, containers).map_err(named)?;
        let (engine, handler, what) = (self.clone(), handler.to_owned(), told.clone());
        let (answer, answered) = oneshot::channel();
        self.shared.tasks.spawn(told, async move {
            let done = engine.make_restored(owner, config, &handler, wanted).await;
            if let Err(Ok(unclaimed)) = answer.send(done.map_err(|e| e.context(what))) {
                // The name has to be free for whoever asks again.
                tracing::info!(pod = unclaimed.pod.as_str(), "nobody waited for a restored pod: it is removed");
                let _ = engine.remove_sandbox(scope_of(owner), unclaimed.pod.as_str()).await;
            }
        });
        answered.await.unwrap_or_else(|_| Err(Error::new(Kind::Aborted, "the daemon ends")))
    }

    /// Whether that is what the checkpoint has, and can be made here.
    fn matched(
        &self,
        pod: &SandboxConfig,
        handler: &str,
        folder: &Utf8Path,
        manifest: Manifest,
        containers: Vec<ContainerConfig>,
    ) -> Result<Vec<Wanted>> {
        let backend = self.shared.backend(handler)?;
        if backend.handler() != manifest.handler {
            return Err(Error::precondition(format!(
                "it is of handler {:?}, and the pod's is {:?}",
                manifest.handler,
                backend.handler()
            )));
        }
        let mut entries: BTreeMap<String, _> = BTreeMap::new();
        for entry in manifest.containers {
            let name = entry.name.clone();
            if !is_folder_name(&entry.folder) || entries.insert(name.clone(), entry).is_some() {
                return Err(Error::invalid(format!("{MANIFEST}: container {name:?} makes no sense")));
            }
        }
        let mut all = Vec::new();
        for config in containers {
            let Some(entry) = entries.remove(&config.name) else {
                return Err(Error::invalid(format!(
                    "container {:?} is not in the checkpoint, or twice asked for",
                    config.name
                )));
            };
            let named = |e: Error| e.context(format!("container {:?}", config.name));
            let image = self.shared.ports.images.resolve(&config.image.image).ok_or_else(|| {
                named(Error::not_found(format!("image {:?} is not here: pull it first", config.image.image)))
            })?;
            if image.id != entry.image_id {
                return Err(named(Error::precondition(format!(
                    "its image is {}, and {} in the checkpoint",
                    image.id, entry.image_id
                ))));
            }
            backend.can_restore(pod, &config).map_err(named)?;
            all.push((config, folder.join(&entry.folder)));
        }
        match entries.keys().next() {
            Some(name) => Err(Error::invalid(format!("container {name:?} of the checkpoint has no configuration"))),
            None if all.is_empty() => Err(Error::invalid("a checkpoint without containers")),
            None => Ok(all),
        }
    }

    async fn make_restored(
        &self,
        owner: Owner,
        config: SandboxConfig,
        handler: &str,
        wanted: Vec<Wanted>,
    ) -> Result<Restored> {
        let scope = scope_of(owner);
        let pod = self.run_sandbox(owner, config, handler).await?;
        let made = async {
            let handle = self.shared.index().find_pod(scope, pod.as_str())?.map(|(_, handle)| handle);
            let handle = handle.ok_or_else(|| Error::new(Kind::Aborted, "the new pod was removed meanwhile"))?;
            let mut containers = Vec::new();
            for (config, from) in wanted {
                let (name, base) = (config.name.clone(), Base::Restore { from });
                let id = handle.ask(|reply| Command::CreateContainer { config: Box::new(config), base, reply }).await?;
                containers.push((name, id));
            }
            Ok(containers)
        };
        match made.await {
            Ok(containers) => Ok(Restored { pod, containers }),
            Err(e) => {
                if let Err(left) = self.remove_sandbox(scope, pod.as_str()).await {
                    tracing::error!(pod = pod.as_str(), error = left.chain(), "a failed restore left a pod behind");
                }
                Err(e)
            }
        }
    }
}

fn scope_of(owner: Owner) -> Scope {
    match owner {
        Owner::Cri => Scope::Cri,
        Owner::Local => Scope::Local,
    }
}

/// Blocks.
fn read_manifest(from: &str) -> Result<(Utf8PathBuf, Manifest)> {
    let path = Utf8PathBuf::from(from);
    if !path.is_absolute() || from.contains('\0') {
        return Err(Error::invalid("checkpoint_path is not an absolute path"));
    }
    let because = |e: std::io::Error| {
        let absent = matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory);
        let kind = if absent { Kind::NotFound } else { Kind::InvalidArgument };
        Error::because(kind, format!("no checkpoint of a pod: {MANIFEST}"), e)
    };
    let text = Root::open(path.as_std_path()).and_then(|root| root.read_file(MANIFEST, TEXT_MAX)).map_err(because)?;
    let nonsense = |e| Error::because(Kind::InvalidArgument, format!("{MANIFEST} makes no sense"), e);
    let version: serde_json::Value = serde_json::from_slice(&text).map_err(nonsense)?;
    if version["version"] != VERSION {
        return Err(Error::precondition(format!("{MANIFEST}: version {} is not known", version["version"])));
    }
    Ok((path, serde_json::from_value(version).map_err(nonsense)?))
}

/// A regular file of the checkpoint, whatever links are there.
fn open_file(root: &Root, name: &Utf8Path) -> Result<std::fs::File> {
    let failed = |e: std::io::Error| Error::because(Kind::InvalidArgument, format!("{name} of the checkpoint"), e);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = root.open_at(name, flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(std::fs::File::from(file)),
        _ => Err(Error::invalid(format!("{name} of the checkpoint is not a file"))),
    }
}

/// Copies what a restore of the processes needs. Blocks.
fn copy_images(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let failed = |e| Error::because(Kind::InvalidArgument, format!("checkpoint folder {from}"), e);
    let root = Root::open(from.as_std_path()).map_err(failed)?;
    make_folder(&to.join("checkpoint"))?;
    let mut names: Vec<Utf8PathBuf> = TEXTS.iter().map(Utf8PathBuf::from).collect();
    for (n, entry) in from.join("checkpoint").read_dir_utf8().map_err(failed)?.enumerate() {
        if n >= IMAGES_MAX {
            return Err(Error::invalid(format!("checkpoint folder {from}: more than {IMAGES_MAX} files")));
        }
        names.push(Utf8Path::new("checkpoint").join(entry.map_err(failed)?.file_name()));
    }
    for name in names {
        let mut file = open_file(&root, &name)?;
        let path = to.join(&name);
        let failed = |e| Error::io(format!("write {path}"), e);
        let size = file.metadata().map_err(failed)?.len();
        if TEXTS.contains(&name.as_str()) && size > TEXT_MAX {
            return Err(Error::invalid(format!("{name} of the checkpoint is larger than {TEXT_MAX} bytes")));
        }
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        std::io::copy(&mut file, &mut made.map_err(failed)?).map_err(failed)?;
    }
    Ok(())
}

/// Gives a new container's root file system what the old one had changed.
pub(super) async fn write_files(shared: &Arc<Shared>, id: &ContainerId, from: &Utf8Path) -> Result<()> {
    let folder = from.to_owned();
    let layer = blocking(move || {
        let failed = |e| Error::because(Kind::InvalidArgument, format!("checkpoint folder {folder}"), e);
        open_file(&Root::open(folder.as_std_path()).map_err(failed)?, FILES.into())
    });
    shared.ports.layers.write_rootfs(id, layer.await?).await
}

/// Removes what is kept for a restore that was, or that will not be any more. Blocks.
pub(super) fn forget(shared: &Shared, id: &ContainerId) -> Result<()> {
    let folder = shared.records.restores().join(id.as_str());
    beneath::remove_tree(folder.as_std_path()).map_err(|e| Error::io(format!("remove {folder}"), e))
}

/// Removes what is kept for containers that are not among `claimed`. Blocks.
pub(super) fn sweep(restores: &Utf8Path, claimed: &[ContainerId]) -> Result<()> {
    for entry in restores.read_dir_utf8().into_iter().flatten().flatten() {
        if !claimed.iter().any(|id| id.as_str() == entry.file_name()) {
            let path = entry.path();
            beneath::remove_tree(path.as_std_path()).map_err(|e| Error::io(format!("remove {path}"), e))?;
        }
    }
    Ok(())
}

impl PodTask {
    /// In place of a `create`: all that StartContainer needs is kept, and the container is CREATED.
    pub(super) async fn prepare_restore(
        &self,
        record: &mut ContainerRecord,
        config: &ContainerConfig,
        plan: monitor_v1::CreateContainer,
        from: &Utf8Path,
    ) -> Result<()> {
        let run_dir = self.shared.run_dir(&self.pod.id, &record.id);
        let folder = self.shared.records.restores().join(record.id.as_str());
        let (source, target) = (from.to_owned(), folder.clone());
        blocking(move || copy_images(&source, &target)).await?;
        let context = RestoreContext { pod: &self.pod, id: &record.id, config, run_dir: &run_dir, folder: &folder };
        let plan = self.backend.restore_plan(context, plan).await?;
        takeover::save_restore(&run_dir, &plan).await?;
        record.restore = true;
        record.phase = ContainerPhase::Created;
        self.save_container(&Arc::new(record.clone())).await
    }

    /// Has the processes of a container restored that was made from a checkpoint: they run when this returns.
    pub(super) async fn restore(&mut self, record: &mut ContainerRecord) -> Result<()> {
        let monitor = self.the_monitor()?;
        let id = record.id.clone();
        let plan = takeover::load_restore(&self.shared.run_dir(&self.pod.id, &id)).await?;
        let rootfs = self.shared.ports.layers.mount_rootfs(&id).await?;
        let made = tokio::select! {
            made = monitor.create(plan, vec![rootfs]) => made?,
            () = self.cancel.cancelled() => return Err(Error::new(Kind::Aborted, "the pod was stopped meanwhile")),
        };
        (record.pid, record.pid_start_time) = (made.pid, made.pid_start_time);
        record.restore = false;
        let saved = self.put(record.clone());
        self.save_container(&saved).await?;
        self.keep(&id).await;
        let shared = self.shared.clone();
        blocking(move || forget(&shared, &id)).await
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[test]
    fn foreign_checkpoints_are_read_with_care() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Utf8PathBuf::try_from(temp.path().to_owned()).unwrap();
        let kind = |path: &str| read_manifest(path).map(drop).map_err(|e| e.kind());
        assert_eq!(kind("relative"), Err(Kind::InvalidArgument));
        assert_eq!(kind(dir.as_str()), Err(Kind::NotFound));
        for (text, expected) in [
            ("", Kind::InvalidArgument),
            ("{}", Kind::FailedPrecondition),
            (r#"{"version": 2}"#, Kind::FailedPrecondition),
            (r#"{"version": 1, "containers": 5}"#, Kind::InvalidArgument),
        ] {
            std::fs::write(dir.join(MANIFEST), text).unwrap();
            assert_eq!(kind(dir.as_str()), Err(expected), "{text}");
        }
        for (folder, good) in [("c0", true), ("c", false), ("..", false), ("c0/..", false), ("c1234567", false)] {
            assert_eq!(is_folder_name(folder), good, "{folder}");
        }
        // A link, a FIFO or a folder in an image's place is refused, and nothing behind it is read.
        let from = dir.join("c0");
        std::fs::create_dir_all(from.join("checkpoint")).unwrap();
        for name in TEXTS {
            std::fs::write(from.join(name), "text").unwrap();
        }
        let bad = from.join("checkpoint/bad");
        let copied = |n: usize| copy_images(&from, &dir.join(format!("to{n}"))).map_err(|e| e.kind());
        assert_eq!(copied(0), Ok(()));
        std::os::unix::fs::symlink("/etc/shadow", &bad).unwrap();
        assert_eq!(copied(1), Err(Kind::InvalidArgument));
        std::fs::remove_file(&bad).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, bad.as_std_path(), Mode::RUSR).unwrap();
        assert_eq!(copied(2), Err(Kind::InvalidArgument));
        std::fs::remove_file(&bad).unwrap();
        std::fs::create_dir(&bad).unwrap();
        assert_eq!(copied(3), Err(Kind::InvalidArgument));
    }
}
