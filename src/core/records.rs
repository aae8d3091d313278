//! Records: what is known of each pod and container, in memory and on disk.
//!
//! On disk a pod is the folder `<root>/pods/<id>/` with `pod.json` and `containers/<id>.json`, each a versioned
//! envelope, replaced whole. They survive a reboot. An unreadable one is moved to `<root>/quarantine/` and
//! reported, never taken for "no pod". Environment values are not in them.
//!
//! A record is not synced when it is written, so that no pod waits for a disk: [`RecordStore::sync`] does it for all that
//! was written since the last time, every few seconds. A power cut in between loses the last changes, not the file.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use camino::{Utf8Path, Utf8PathBuf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::ids::{ContainerId, Digest, PodId};
use super::ports::NetworkResult;
use super::spec::{ContainerConfig, Owner, SandboxConfig};
use super::state::{ContainerPhase, PodPhase};
use crate::fail_point;
use crate::utils::atomic::{self, Durability};

/// Version of the envelopes that this build writes.
const VERSION: u32 = 1;

/// A thing outside that a pod owns, noted before it is made; the backend that noted it takes it down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resource {
    /// What it is, in the backend's words ("netns", "network", "mount", "cgroup").
    pub kind: String,
    /// Its path or name.
    pub name: String,
}

/// What a backend's unit turned out to be.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SandboxFacts {
    /// Pinned network namespace; None: the host's.
    pub netns: Option<Utf8PathBuf>,
    /// Pinned IPC namespace; None: the host's.
    pub ipcns: Option<Utf8PathBuf>,
    /// Pinned UTS namespace; None: the host's.
    pub utsns: Option<Utf8PathBuf>,
    /// Pinned PID namespace shared by the containers; None: each its own, or the host's.
    pub pidns: Option<Utf8PathBuf>,
    /// Pinned user namespace, which owns the others; None: the host's.
    #[serde(default)]
    pub userns: Option<Utf8PathBuf>,
    /// The init of that PID namespace; None: there is none, or an older version made the pod.
    #[serde(default)]
    pub init: Option<crate::utils::pidfd::ProcessId>,
    /// Folder that is the containers' /dev/shm; None: the host's.
    pub shm: Option<Utf8PathBuf>,
    /// Parent of the containers' cgroups, as the driver names it.
    pub cgroup_parent: String,
    /// Addresses and so on; default with the host's network.
    pub network: NetworkResult,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Id.
    pub id: PodId,
    /// Who made it.
    pub owner: Owner,
    /// Handler, chosen once.
    pub handler: String,
    /// As asked for.
    pub config: SandboxConfig,
    /// Unix time in nanoseconds.
    pub created_at: i64,
    /// Boot in which it was made.
    pub boot_id: String,
    /// Where it is in its life.
    pub phase: PodPhase,
    /// What it owns outside, in the order it was noted.
    pub resources: Vec<Resource>,
    /// What came of it; None while it is made.
    pub facts: Option<SandboxFacts>,
}

/// The user a container runs as, resolved against its image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ResolvedUser {
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// All supplementary groups.
    pub groups: Vec<u32>,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitInfo {
    /// 0..255.
    pub code: i32,
    /// "Completed", "Error", "OOMKilled", "Unknown".
    pub reason: String,
    /// More words, or "".
    pub message: String,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Id.
    pub id: ContainerId,
    /// Its pod.
    pub pod: PodId,
    /// As asked for (without environment values).
    pub config: ContainerConfig,
    /// Image id.
    pub image_id: Digest,
    /// A digest reference of the image, else its id.
    pub image_ref: String,
    /// Where it is in its life.
    pub phase: ContainerPhase,
    /// Unix time in nanoseconds.
    pub created_at: i64,
    /// Unix time in nanoseconds; 0: never.
    pub started_at: i64,
    /// Unix time in nanoseconds; 0: not yet.
    pub finished_at: i64,
    /// How it ended.
    pub exit: Option<ExitInfo>,
    /// Whom it runs as.
    pub user: ResolvedUser,
    /// Absolute path of the log; None: no log.
    pub log_path: Option<Utf8PathBuf>,
    /// Signal that asks it to end.
    pub stop_signal: i32,
    /// Init in the host's PID namespace with its start time (ticks since boot); 0: none.
    pub pid: i32,
    /// See `pid`.
    pub pid_start_time: u64,
    /// Why its program can't run, told by StartContainer: the runtime never made the container.
    #[serde(default)]
    pub cannot_run: Option<String>,
    /// Bytes that it may write into its root file system; 0: no limit.
    #[serde(default)]
    pub quota: u64,
    /// It is of a checkpoint, and its processes are made when it is started.
    #[serde(default)]
    pub restore: bool,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    record: T,
}

/// A record as bytes in its envelope.
pub fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(&Envelope { version: VERSION, record })
        .map_err(|e| Error::because(super::error::Kind::Internal, "encode a record", e))
}

/// A record from its envelope; an unknown version is refused before its content is looked at.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let v: Version = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if v.version != VERSION {
        return Err(format!("version {} is not known", v.version));
    }
    Ok(serde_json::from_slice::<Envelope<T>>(bytes).map_err(|e| e.to_string())?.record)
}

/// A pod with its containers, as found on disk.
pub type Stored = (PodRecord, Vec<ContainerRecord>);

/// The folder of all records.
#[derive(Debug, Clone)]
pub struct RecordStore {
    pods: Utf8PathBuf,
    quarantine: Utf8PathBuf,
    /// Something was written since the last sync.
    unsynced: Arc<AtomicBool>,
}

impl RecordStore {
    /// Opens (or makes) `<root>/pods`.
    pub fn open(root: &Utf8Path) -> Result<Self> {
        let store = Self { pods: root.join("pods"), quarantine: root.join("quarantine"), unsynced: Arc::default() };
        std::fs::create_dir_all(&store.pods).map_err(|e| Error::io(format!("make {}", store.pods), e))?;
        Ok(store)
    }

    /// Folder, beside the records and perhaps not there, for checkpoints while they are made.
    pub fn checkpoints(&self) -> Utf8PathBuf {
        self.pods.with_file_name("checkpoints")
    }

    /// Folder, as [`RecordStore::checkpoints`], for the processes of containers that are restored at their start.
    pub fn restores(&self) -> Utf8PathBuf {
        self.pods.with_file_name("restores")
    }

    /// Writes a pod's record.
    pub fn save_pod(&self, pod: &PodRecord) -> Result<()> {
        let folder = self.pods.join(pod.id.as_str());
        std::fs::create_dir_all(folder.join("containers")).map_err(|e| Error::io(format!("make {folder}"), e))?;
        self.put(&folder.join("pod.json"), pod)
    }

    /// Writes a container's record; its pod's is there already.
    pub fn save_container(&self, container: &ContainerRecord) -> Result<()> {
        self.put(&self.container_path(&container.pod, &container.id), container)
    }

    fn put<T: Serialize>(&self, path: &Utf8Path, record: &T) -> Result<()> {
        atomic::write(path.as_std_path(), &encode(record)?, 0o600, Durability::Process)
            .map_err(|e| Error::io(format!("write record {path}"), e))?;
        self.unsynced.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether all that was written so far outlives the machine.
    pub fn is_synced(&self) -> bool {
        !self.unsynced.load(Ordering::Acquire)
    }

    /// Makes all that was written so far outlive the machine; nothing to do is no work. Blocks on the disk.
    pub fn sync(&self) -> Result<()> {
        if !self.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let done = std::fs::File::open(&self.pods).and_then(|folder| Ok(rustix::fs::syncfs(&folder)?));
        done.map_err(|e| {
            self.unsynced.store(true, Ordering::Release);
            Error::io(format!("sync the records in {}", self.pods), e)
        })
    }

    fn container_path(&self, pod: &PodId, container: &ContainerId) -> Utf8PathBuf {
        self.pods.join(pod.as_str()).join("containers").join(format!("{container}.json"))
    }

    /// Forgets a container; absent is success.
    pub fn delete_container(&self, pod: &PodId, container: &ContainerId) -> Result<()> {
        gone_is_fine(std::fs::remove_file(self.container_path(pod, container)))
            .map_err(|e| Error::io(format!("remove the record of container {container}"), e))
    }

    /// Forgets a pod and its containers; absent is success. The pod's own record goes first.
    pub fn delete_pod(&self, pod: &PodId) -> Result<()> {
        let folder = self.pods.join(pod.as_str());
        let done = (|| {
            gone_is_fine(std::fs::remove_file(folder.join("pod.json")))?;
            fail_point!("remove_pod.record");
            for sub in [folder.join("containers"), folder.clone()] {
                if let Ok(files) = std::fs::read_dir(&sub) {
                    for file in files {
                        let file = file?;
                        if !file.file_type()?.is_dir() {
                            gone_is_fine(std::fs::remove_file(file.path()))?;
                        }
                    }
                }
                gone_is_fine(std::fs::remove_dir(&sub))?;
            }
            Ok(())
        })();
        done.map_err(|e| Error::io(format!("remove the records of pod {pod}"), e))
    }

    /// Everything that can be read, and the ids of pods whose records can't: those were moved to quarantine.
    pub fn load(&self) -> Result<(Vec<Stored>, Vec<String>)> {
        let (mut found, mut bad) = (Vec::new(), Vec::new());
        let list = self.pods.read_dir_utf8().map_err(|e| Error::io(format!("list {}", self.pods), e))?;
        for entry in list {
            let entry = entry.map_err(|e| Error::io(format!("list {}", self.pods), e))?;
            let name = entry.file_name().to_string();
            match self.load_pod(&name) {
                Ok(Some(stored)) => found.push(stored),
                Ok(None) => {}
                Err(why) => {
                    let to = self.set_aside(entry.path(), &name);
                    tracing::error!(pod = name, why, kept_at = %to, "unreadable record: the pod is set aside");
                    bad.push(name);
                }
            }
        }
        Ok((found, bad))
    }

    /// One pod; None: there is no record of it.
    pub fn load_one(&self, id: &PodId) -> Result<Option<Stored>> {
        self.load_pod(id.as_str()).map_err(|why| Error::internal(format!("the record of pod {id}: {why}")))
    }

    fn load_pod(&self, name: &str) -> std::result::Result<Option<Stored>, String> {
        let folder = self.pods.join(name);
        let id: PodId = name.parse().map_err(|e: Error| e.to_string())?;
        let bytes = match std::fs::read(folder.join("pod.json")) {
            Ok(bytes) => bytes,
            // The record goes first on removal and comes last on creation: nothing else can be meant.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let _ = self.delete_pod(&id);
                return Ok(None);
            }
            Err(e) => return Err(e.to_string()),
        };
        let pod: PodRecord = decode(&bytes)?;
        if pod.id != id {
            return Err(format!("the record is of pod {}", pod.id));
        }
        let mut containers = Vec::new();
        for entry in folder.join("containers").read_dir_utf8().map_err(|e| e.to_string())? {
            let entry = entry.map_err(|e| e.to_string())?;
            if atomic::is_temporary(entry.file_name()) {
                let _ = std::fs::remove_file(entry.path());
                continue;
            }
            let bytes = std::fs::read(entry.path()).map_err(|e| e.to_string())?;
            match decode::<ContainerRecord>(&bytes) {
                Ok(container) => containers.push(container),
                Err(why) => return Err(format!("{}: {why}", entry.file_name())),
            }
        }
        Ok(Some((pod, containers)))
    }

    fn set_aside(&self, path: &Utf8Path, name: &str) -> Utf8PathBuf {
        let to = self.quarantine.join(format!("pod-{name}-{}", uuid::Uuid::new_v4().simple()));
        let moved = std::fs::create_dir_all(&self.quarantine).and_then(|()| std::fs::rename(path, &to));
        if let Err(e) = moved {
            tracing::error!(%path, error = %e, "can't move an unreadable record to quarantine");
        }
        to
    }

    /// Whether there is anything on disk of a pod's record.
    pub fn has_pod(&self, id: &PodId) -> Result<bool> {
        let folder = self.pods.join(id.as_str());
        folder.try_exists().map_err(|e| Error::io(format!("look at {folder}"), e))
    }

    /// Whether anything was ever set aside: then nothing unclaimed may be collected.
    pub fn has_quarantined_pods(&self) -> bool {
        self.quarantine.read_dir_utf8().is_ok_and(|d| d.flatten().any(|e| e.file_name().starts_with("pod-")))
    }
}

fn gone_is_fine(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::core::spec::PodMetadata;

    /// A pod's record with nothing special in it.
    pub(crate) fn pod(name: &str) -> PodRecord {
        PodRecord {
            id: PodId::new(),
            owner: Owner::Cri,
            handler: "crun".into(),
            config: SandboxConfig {
                metadata: PodMetadata { name: name.into(), uid: "u".into(), namespace: "ns".into(), attempt: 0 },
                hostname: name.into(),
                log_directory: None,
                dns: None,
                port_mappings: vec![],
                labels: Default::default(),
                annotations: Default::default(),
                cgroup_parent: String::new(),
                sysctls: Default::default(),
                security: Default::default(),
                overhead: Default::default(),
                resources: Default::default(),
            },
            created_at: 1,
            boot_id: "b".into(),
            phase: PodPhase::Ready,
            resources: vec![],
            facts: None,
        }
    }

    /// A running container's record.
    pub(crate) fn container(pod: &PodId, config: ContainerConfig) -> ContainerRecord {
        ContainerRecord {
            id: ContainerId::new(),
            pod: pod.clone(),
            config,
            image_id: Digest::from_sha256(&[1; 32]),
            image_ref: "ref".into(),
            phase: ContainerPhase::Running,
            created_at: 1,
            started_at: 2_000_000_000,
            finished_at: 0,
            exit: None,
            user: ResolvedUser::default(),
            log_path: None,
            stop_signal: 15,
            pid: 0,
            pid_start_time: 0,
            cannot_run: None,
            quota: 0,
            restore: false,
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_what_is_broken_is_set_aside() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = Utf8Path::from_path(dir.path()).expect("utf8");
        let store = RecordStore::open(root).expect("open");
        let (a, b) = (pod("a"), pod("b"));
        store.save_pod(&a).expect("a");
        store.save_pod(&b).expect("b");
        let file = root.join("pods").join(b.id.as_str()).join("pod.json");
        atomic::write(file.as_std_path(), b"{\"version\":1,\"record\":{", 0o600, Durability::Process)
            .expect("break it");
        let (found, bad) = store.load().expect("load");
        assert_eq!(found, vec![(a.clone(), vec![])]);
        assert_eq!(bad, vec![b.id.to_string()]);
        assert!(store.has_quarantined_pods());
        store.delete_pod(&a.id).expect("delete");
        store.delete_pod(&a.id).expect("again");
        assert!(store.load().expect("load").0.is_empty());
    }

    #[test]
    fn newer_versions_are_not_read() {
        let text = String::from_utf8(encode(&pod("a")).expect("encode")).expect("utf8");
        let newer = text.replace("\"version\":1", "\"version\":2");
        assert!(decode::<PodRecord>(newer.as_bytes()).expect_err("newer").contains("version 2"));
    }
}
