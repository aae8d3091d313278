//! CheckpointContainer: a running container's processes and files as an archive, in the layout that other runtimes and
//! `checkpointctl` know. The container runs on.
//!
//! ```text
//! checkpoint/       the images of criu          rootfs-diff.tar   files changed since the image
//! config.dump       which container and image   deleted.files     files of the image that are gone (JSON)
//! spec.dump         the OCI spec                status.dump       when it was made and started
//! bind.mounts       mounts from outside (JSON)  network.status    the pod's addresses
//! container.log     its log                     dump.log          criu's words
//! criu.conf         names of its streams in the images, for `inherit-fd` at a restore
//! ```
//! The memory of the processes is in it, and with it every secret that they hold, environment included: the archive can be
//! read by its owner, root, alone. Work goes on in a task of its own when the caller's time is up, since a dump that is killed in
//! the middle could harm the container; then its result is thrown away. A crash leaves a folder below the
//! records' and perhaps an unfinished file (`.checkpoint-...`) beside the archive: the next start removes both.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};

use super::{Engine, Scope, Shared, pod_checkpoint};
use crate::core::backend::CheckpointContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::core::records::{ContainerRecord, PodRecord};
use crate::utils::atomic::{self, Durability};
use crate::utils::beneath;
use crate::utils::process::SpawnError;
use crate::utils::tar::{self, Files};

/// How long a caller waits that does not say.
const TIMEOUT: Duration = Duration::from_secs(120);
/// How long one under way may take to end when the daemon does.
pub(super) const LAST: Duration = Duration::from_secs(8);
/// Longest time to write an archive.
const ARCHIVE: Duration = Duration::from_secs(1800);
/// In the folder of a checkpoint: names the unfinished archive elsewhere.
const UNFINISHED: &str = "unfinished";

impl Engine {
    /// Writes a checkpoint of a running container to `location`, an absolute path; a file that is there is replaced.
    /// FailedPrecondition when it does not run, is being checkpointed, or the node lacks something; DeadlineExceeded after
    /// `timeout` (120 s unless given), with the container as it was.
    pub async fn checkpoint(&self, scope: Scope, id: &str, location: &str, timeout: Option<Duration>) -> Result<()> {
        let (container, _) = self.reach(scope, id)?;
        let location = location.to_owned();
        let location = blocking(move || check_location(&location)).await?;
        let pod = self.shared.index().pod(&container.pod).ok_or_else(|| Error::not_found("the pod is gone"))?;
        let busy = Busy::take(&self.shared, &container.id)?;
        let (answer, answered) = tokio::sync::oneshot::channel();
        let shared = self.shared.clone();
        let (id, what) = (container.id.clone(), format!("checkpoint {}", container.id.short()));
        self.shared.tasks.spawn(what, async move {
            let _busy = busy;
            let folder = shared.records.checkpoints().join(uuid::Uuid::new_v4().simple().to_string());
            let wanted = || !answer.is_closed();
            let result = tokio::select! {
                result = perform(&shared, &pod, &container, &folder, &location, &wanted) => result,
                // A backend ends its dump by itself before that, and in order.
                () = shared.tasks.overdue(LAST) => Err(Error::new(Kind::Aborted, "the daemon ends")),
            };
            let remove = folder.clone();
            let removed = blocking(move || {
                beneath::remove_tree(remove.as_std_path()).map_err(|e| Error::io(format!("remove {remove}"), e))
            });
            if let Err(e) = removed.await {
                tracing::warn!(error = e.chain(), "what a checkpoint needed stays until the next start");
            }
            if let Err(Err(e)) = answer.send(result) {
                tracing::warn!(
                    container = container.id.as_str(),
                    error = e.chain(),
                    "a checkpoint nobody waits for failed"
                );
            }
        });
        let named = |e: Error| e.context(format!("checkpoint of container {id}"));
        let timeout = timeout.unwrap_or(TIMEOUT);
        match tokio::time::timeout(timeout, answered).await {
            Ok(Ok(result)) => result.map_err(named),
            Ok(Err(_)) => Err(named(Error::internal("its task ended without an answer"))),
            Err(_) => Err(named(Error::new(Kind::DeadlineExceeded, format!("not done within {timeout:?}")))),
        }
    }

    /// Removes what checkpoints of an earlier daemon have left. To be called before anything is served.
    pub(super) async fn sweep_checkpoints(&self) -> Result<()> {
        let folder = self.shared.records.checkpoints();
        blocking(move || {
            for entry in folder.read_dir_utf8().into_iter().flatten().flatten() {
                if let Ok(path) = std::fs::read_to_string(entry.path().join(UNFINISHED)) {
                    let _ = std::fs::remove_file(path);
                }
                pod_checkpoint::discard_unfinished(entry.path())?;
            }
            beneath::remove_tree(folder.as_std_path()).map_err(|e| Error::io(format!("remove {folder}"), e))
        })
        .await
    }
}

/// One checkpoint of a container at a time.
pub(super) struct Busy {
    shared: Arc<Shared>,
    id: ContainerId,
}

impl Busy {
    pub(super) fn take(shared: &Arc<Shared>, id: &ContainerId) -> Result<Self> {
        if !shared.checkpointing().insert(id.clone()) {
            return Err(Error::precondition(format!("container {id} is being checkpointed already")));
        }
        Ok(Self { shared: shared.clone(), id: id.clone() })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.shared.checkpointing().remove(&self.id);
    }
}

/// The folder of the archive must be there; the archive takes the place of a file at most. Blocks.
fn check_location(location: &str) -> Result<Utf8PathBuf> {
    let bad = |why: &str| Err(Error::invalid(format!("checkpoint location {location:?}: {why}")));
    let path = Utf8PathBuf::from(location);
    let (Some(folder), Some(_)) = (path.parent(), path.file_name()) else { return bad("not the path of a file") };
    if !path.is_absolute() || location.contains('\0') || location.ends_with('/') {
        return bad("not the absolute path of a file");
    }
    if !folder.is_dir() {
        return bad("its folder is not there");
    }
    // Found out before the container is frozen for nothing.
    if let Err(e) = rustix::fs::access(folder.as_std_path(), rustix::fs::Access::WRITE_OK) {
        return Err(Error::because(Kind::FailedPrecondition, format!("checkpoint location {location:?}"), e));
    }
    match std::fs::symlink_metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(path),
        // A device or a FIFO would be gone for everybody else.
        Ok(there) if !there.is_file() => bad("something else than a file is there"),
        Ok(_) => Ok(path),
        Err(e) => Err(Error::because(Kind::InvalidArgument, format!("checkpoint location {location:?}"), e)),
    }
}

/// A failure to write an archive.
fn unwritten(what: &str, e: SpawnError) -> Error {
    let kind = if tar::is_full(&e) { Kind::ResourceExhausted } else { Kind::Internal };
    Error::because(kind, format!("write {what}"), e)
}

async fn perform(
    shared: &Arc<Shared>,
    pod: &PodRecord,
    container: &ContainerRecord,
    folder: &Utf8Path,
    location: &Utf8Path,
    wanted: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let images = folder.join("archive/checkpoint");
    make_folder(&images)?;
    let archive = folder.join("archive");
    let run_dir = shared.run_dir(&pod.id, &container.id);
    let begun = shared.ports.clock.now_ns();
    let context = CheckpointContext { pod, container, run_dir: &run_dir, folder, archive: &archive, groups: false };
    shared.backend(&pod.handler)?.checkpoint(context).await?;
    let changes = shared.ports.layers.rootfs_changes(&container.id).await?;
    let diff = archive.join("rootfs-diff.tar");
    let from = format!("/proc/{}/fd/{}", std::process::id(), changes.folder.as_raw_fd());
    let written = tar::create(diff.as_std_path(), from.as_ref(), &changes.changed, Files::InUse, ARCHIVE).await;
    written.map_err(|e| unwritten("what the container has changed", e))?;
    let text = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    let opaque = changes.opaque.iter().map(|f| format!("{}/.wh..wh..opq", text(f)));
    let deleted: Vec<String> = changes.deleted.iter().map(text).chain(opaque).collect();
    write(&archive.join("deleted.files"), &json!(deleted))?;
    for (name, value) in descriptions(pod, container, begun) {
        write(&archive.join(name), &value)?;
    }
    if let Some(log) = container.log_path.clone() {
        let to = archive.join("container.log");
        let copy = blocking(move || match std::fs::copy(&log, to) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("copy {log}"), e)),
            _ => Ok(()),
        });
        copy.await?;
    }
    if !wanted() {
        return Err(Error::new(Kind::DeadlineExceeded, "nobody waits for it any more"));
    }
    publish(folder, &archive, location, wanted).await
}

/// Writes the archive beside `location` and gives it that name when it is whole.
async fn publish(
    folder: &Utf8Path,
    archive: &Utf8Path,
    location: &Utf8Path,
    wanted: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    // Not longer than the name itself may be: that one can be as long as a name gets.
    let temp = location.with_file_name(format!(".checkpoint-{}", uuid::Uuid::new_v4().simple()));
    let note = folder.join(UNFINISHED);
    atomic::write(note.as_std_path(), temp.as_str().as_bytes(), 0o600, Durability::Process)
        .map_err(|e| Error::io(format!("write {note}"), e))?;
    let done = async {
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&temp);
        let file = file.map_err(|e| Error::io(format!("make {temp}"), e))?;
        let names = members(archive)?;
        let written = tar::create(temp.as_std_path(), archive.as_std_path(), &names, Files::Ours, ARCHIVE).await;
        written.map_err(|e| unwritten(location.as_str(), e))?;
        if !wanted() {
            return Err(Error::new(Kind::DeadlineExceeded, "nobody waits for it any more"));
        }
        let (from, to) = (temp.clone(), location.to_owned());
        blocking(move || {
            let done = file.sync_all().and_then(|()| std::fs::rename(&from, &to));
            done.map_err(|e| Error::io(format!("write {to}"), e))
        })
        .await
    };
    let result = done.await;
    if result.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    result
}

/// All files, a folder before what is in it.
fn members(archive: &Utf8Path) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for folder in ["", "checkpoint"] {
        let path = archive.join(folder);
        for entry in path.read_dir_utf8().map_err(|e| Error::io(format!("list {path}"), e))? {
            let entry = entry.map_err(|e| Error::io(format!("list {path}"), e))?;
            names.push(Utf8Path::new(folder).join(entry.file_name()).into_string().into_bytes());
        }
    }
    names.sort();
    Ok(names)
}

/// What says which container it was, as checkpointctl reads it.
fn descriptions(pod: &PodRecord, container: &ContainerRecord, begun: i64) -> [(&'static str, Value); 4] {
    let time = |ns: i64| {
        prost_types::Timestamp { seconds: ns / 1_000_000_000, nanos: (ns % 1_000_000_000) as i32 }.to_string()
    };
    let image = &container.config.image;
    let name = if image.user_specified_image.is_empty() { &image.image } else { &image.user_specified_image };
    let config = json!({
        "id": container.id.as_str(),
        "name": container.config.name,
        "rootfsImage": name,
        "rootfsImageRef": container.image_ref,
        "rootfsImageName": name,
        "runtime": pod.handler,
        "createdTime": time(container.created_at),
        "checkpointedTime": time(begun),
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": false,
    });
    let status = json!({
        "Pid": container.pid,
        "CreatedAt": container.created_at,
        "StartedAt": container.started_at,
        "FinishedAt": 0,
        "ExitCode": 0,
        "Reason": "",
        "Message": "",
    });
    let mounts = container.config.mounts.iter().filter(|m| m.image.is_none()).map(|m| {
        let folder = Utf8Path::new(&m.host_path).is_dir();
        json!({
            "source": m.host_path,
            "destination": m.container_path,
            "file_type": if folder { "directory" } else { "file" },
            "permissions": if folder { 0o755 } else { 0o644 },
        })
    });
    let addresses = pod
        .facts
        .iter()
        .flat_map(|f| &f.network.ips)
        .map(|ip| json!({"ipnet": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })}));
    let network = json!({"pod": {"interfaces": {"eth0": {"subnets": addresses.collect::<Vec<_>>()}}}});
    [
        ("config.dump", config),
        ("status.dump", status),
        ("bind.mounts", json!(mounts.collect::<Vec<_>>())),
        ("network.status", network),
    ]
}

pub(super) fn make_folder(path: &Utf8Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|e| Error::io(format!("make {path}"), e))
}

fn write(path: &Utf8Path, value: &Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::because(Kind::Internal, "encode JSON", e))?;
    atomic::write(path.as_std_path(), &text, 0o600, Durability::Process)
        .map_err(|e| Error::io(format!("write {path}"), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_files_in_folders_that_are_there() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("{}/{name}", temp.path().display());
        assert!(check_location(&at("c.tar")).is_ok());
        for bad in ["", "/", "c.tar", "a/c.tar", "/no/such/c.tar", &at(""), &at("none/c.tar"), &at("..")] {
            assert_eq!(check_location(bad).map_err(|e| e.kind()), Err(Kind::InvalidArgument), "{bad}");
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), rustix::fs::Mode::RUSR).unwrap();
        std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
        std::fs::File::create(at("file")).unwrap();
        assert!(check_location(&at("file")).is_ok());
        for bad in ["/dev/null", &at("fifo"), &at("link")] {
            assert_eq!(check_location(bad).map_err(|e| e.kind()), Err(Kind::InvalidArgument), "{bad}");
        }
    }
}
