//! The OCI runtime's program: whether it answers, and what it can do.
//!
//! Asked at the start, and again when the file changes or while it has not answered: an upgraded runtime's abilities count
//! from the next Status on, and one that hangs keeps neither the daemon's start nor a Status waiting for long. Fails by
//! name. Nothing of it is on disk.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use camino::Utf8PathBuf;
use serde_json::Value;

use super::PATH;
use crate::core::error::{Error, Kind, Result};
use crate::utils::inquiry::Inquiry;
use crate::utils::process::{Output, Spawn, SpawnError};
use crate::utils::tasks::TaskSet;

/// How long a call that only tells may take.
const TELL: Duration = Duration::from_secs(10);
/// How long whoever wants to know waits for it.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the program can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Abilities {
    /// Pods can have user namespaces, or why not.
    pub(super) user_namespaces: Result<(), String>,
    /// It puts execs into cgroups of their own.
    pub(super) exec_cgroup: bool,
    /// It knows recursive read-only mounts.
    pub(super) recursive_read_only: bool,
}

/// A file's size and time: another one is another program.
type Identity = (u64, SystemTime);

struct Known {
    /// None: it has not answered yet.
    identity: Option<Identity>,
    abilities: Abilities,
}

/// See the module's words.
pub(super) struct Program {
    path: Utf8PathBuf,
    /// Whether the store can idmap root file systems, or why not.
    idmapped_rootfs: Result<(), String>,
    known: RwLock<Known>,
    inquiry: Inquiry<Result<(), Arc<Error>>>,
}

impl Program {
    /// Nothing is asked yet: it can do nothing.
    pub(super) fn new(path: Utf8PathBuf, idmapped_rootfs: Result<(), String>, tasks: TaskSet) -> Arc<Self> {
        let user_namespaces = Err(format!("{path} has not answered yet"));
        let abilities = Abilities { user_namespaces, exec_cgroup: false, recursive_read_only: false };
        let known = RwLock::new(Known { identity: None, abilities });
        Arc::new(Self { path, idmapped_rootfs, known, inquiry: Inquiry::new("ask the OCI runtime", tasks) })
    }

    /// What it could do when it was last asked.
    pub(super) fn abilities(&self) -> Abilities {
        self.known.read().unwrap_or_else(PoisonError::into_inner).abilities.clone()
    }

    /// Whether it works. Waits [`PATIENCE`] at most; it goes on being asked.
    pub(super) async fn probe(self: &Arc<Self>) -> Result<()> {
        let path = &self.path;
        let missing =
            |e| Error::because(Kind::FailedPrecondition, format!("OCI runtime {path} (handlers.crun.path)"), e);
        let meta = std::fs::metadata(path).map_err(missing)?;
        let identity = (meta.len(), meta.modified().map_err(missing)?);
        if self.known.read().unwrap_or_else(PoisonError::into_inner).identity == Some(identity) {
            return Ok(());
        }
        let this = self.clone();
        let answer = self.inquiry.ask(PATIENCE, || async move { this.learn(identity).await.map_err(Arc::new) }).await;
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(e)) => Err(Error::because(e.kind(), "the OCI runtime does not work", e.chain())),
            None => {
                let text = format!("the OCI runtime {path} has not answered within {PATIENCE:?}");
                Err(Error::new(Kind::DeadlineExceeded, text))
            }
        }
    }

    async fn learn(&self, identity: Identity) -> Result<()> {
        let (version, features, help) =
            tokio::join!(self.tell(&["--version"]), self.tell(&["features"]), self.tell(&["exec", "--help"]));
        version.map_err(|e| Error::because(Kind::FailedPrecondition, "its version", e))?;
        // One that has no such verb says so at once; one that hangs has told nothing.
        let late = |told: &Result<Output, SpawnError>| matches!(told, Err(SpawnError::Deadline { .. }));
        if late(&features) || late(&help) {
            return Err(Error::new(Kind::DeadlineExceeded, format!("{} does not tell what it can do", self.path)));
        }
        // crun from 1.8.5 on has `features`, as the OCI runtime spec's features.md has it.
        let features: Value = features.ok().and_then(|o| serde_json::from_slice(&o.stdout).ok()).unwrap_or_default();
        // `exec --cgroup` is crun's from 1.3 on, and runc's. Without it an exec is killed by its descendants and session.
        let exec_cgroup = help.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("--cgroup"));
        let abilities = self.read(&features, exec_cgroup);
        if !exec_cgroup {
            tracing::warn!(program = %self.path, "no `exec --cgroup`: daemons that an exec starts outlive its kill");
        }
        if let Err(why) = &abilities.user_namespaces {
            tracing::info!(why, "pods can't have user namespaces");
        }
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Known { identity: Some(identity), abilities };
        Ok(())
    }

    fn read(&self, features: &Value, exec_cgroup: bool) -> Abilities {
        let knows = |list: &Value, word| list.as_array().is_some_and(|l| l.iter().any(|v| v == word));
        let linux = &features["linux"];
        let idmaps = linux["mountExtensions"]["idmap"]["enabled"] == Value::Bool(true);
        let user_namespaces = match knows(&linux["namespaces"], "user") && idmaps {
            true => self.idmapped_rootfs.clone(),
            false => Err(format!("{} has none, or no idmapped mounts", self.path)),
        };
        Abilities { user_namespaces, exec_cgroup, recursive_read_only: knows(&features["mountOptions"], "rro") }
    }

    async fn tell(&self, args: &[&str]) -> Result<Output, SpawnError> {
        Spawn::new(self.path.as_str(), args.iter().copied()).env("PATH", PATH).deadline(TELL).run_ok().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt as _;

    fn script(path: &std::path::Path, text: &str) {
        use std::io::Write as _;
        let temporary = path.with_extension("new");
        let mut file = std::fs::OpenOptions::new();
        let mut file = file.write(true).create(true).truncate(true).mode(0o755).open(&temporary).unwrap();
        write!(file, "#!/bin/sh\n{text}\n").unwrap();
        drop(file);
        std::fs::rename(temporary, path).unwrap();
    }

    #[tokio::test]
    async fn what_a_runtime_can_do_is_learnt_when_it_answers_and_when_it_changes() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("runtime");
        let tasks = TaskSet::new("test");
        let program = Program::new(path.clone().try_into().unwrap(), Ok(()), tasks.clone());
        assert_eq!(program.probe().await.unwrap_err().kind(), Kind::FailedPrecondition);
        // Hangs once: nobody waits for the program's own deadline.
        script(&path, "exec sleep 60");
        let begun = std::time::Instant::now();
        assert_eq!(program.probe().await.unwrap_err().kind(), Kind::DeadlineExceeded);
        assert!(begun.elapsed() < TELL, "{:?}", begun.elapsed());
        assert!(program.abilities().user_namespaces.unwrap_err().contains("not answered yet"));
        tasks.shutdown().await;

        let program = Program::new(path.clone().try_into().unwrap(), Ok(()), TaskSet::new("test"));
        script(&path, "case $1 in features) echo '{\"mountOptions\":[\"rro\"]}' ;; exec) echo --cgroup ;; esac");
        program.probe().await.unwrap();
        let old = program.abilities();
        assert!(old.exec_cgroup && old.recursive_read_only && old.user_namespaces.is_err(), "{old:?}");
        let features = r#"{"linux":{"namespaces":["user"],"mountExtensions":{"idmap":{"enabled":true}}}}"#;
        script(&path, &format!("case $1 in features) echo '{features}' ;; esac"));
        program.probe().await.unwrap();
        let new = program.abilities();
        assert_eq!(new, Abilities { user_namespaces: Ok(()), exec_cgroup: false, recursive_read_only: false });
        script(&path, "exit 3");
        assert_eq!(program.probe().await.unwrap_err().kind(), Kind::FailedPrecondition);
    }
}
