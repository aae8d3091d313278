//! Checkpoints: criu's images of a container's processes, by the OCI runtime's `checkpoint`. The container runs on.
//!
//! Called by the engine. A container's streams are FIFOs whose mount is not in its mount namespace; criu takes them as
//! external files, `file[<mount id>:<inode>]` (hexadecimal), which its configuration file names: a restore has to give it
//! descriptors under the same names (`--inherit-fd`). Configuration reaches criu by the environment, since the library
//! that crun uses has no call for it before 4.2. Fails by name when the node lacks criu, its library, or a runtime that
//! knows the verb. A failed dump leaves the container running. A crash of the daemon leaves the dump to its own end.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

use super::{CrunBackend, PATH};
use crate::core::backend::CheckpointContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::integrations::cgroup::Driver;
use crate::utils::atomic::{self, Durability};
use crate::utils::process::{Spawn, SpawnError};

/// How long a dump under way is let go on when the daemon ends.
const LAST: Duration = Duration::from_secs(5);
/// How long it may take to tell what it can do.
const TELL: Duration = Duration::from_secs(10);
/// Lines of criu's log in an error.
const WORDS: usize = 5;
/// How often a container's streams are looked for among what its processes have open.
const LOOKS: usize = 20;

impl CrunBackend {
    pub(super) async fn dump(&self, context: CheckpointContext<'_>) -> Result<()> {
        let CheckpointContext { pod, container, run_dir, folder, archive, groups } = context;
        tokio::select! {
            can = self.can_checkpoint() => can?,
            () = self.pods.tasks.overdue(Duration::ZERO) => return Err(Error::new(Kind::Aborted, "the daemon ends")),
        }
        let (work, config, log) = (folder.join("work"), folder.join("criu.conf"), folder.join("crun.log"));
        std::fs::create_dir(&work).map_err(|e| Error::io(format!("make {work}"), e))?;
        let parent = self.pods.parent(pod)?;
        let group = self.pods.hierarchy.container(&parent, &container.id).kill;
        let streams: Vec<_> = ["stdin", "stdout", "stderr"].iter().map(|name| run_dir.join(name)).collect();
        let text = blocking(move || external_files(&group, &streams)).await?;
        atomic::write(config.as_std_path(), text.as_bytes(), 0o600, Durability::Process)
            .map_err(|e| Error::io(format!("write {config}"), e))?;
        let (images, root) = (archive.join("checkpoint"), self.root());
        let mut args = vec!["--root", root.as_str(), "--log", log.as_str()];
        if self.pods.config.driver == Driver::Systemd {
            args.push("--systemd-cgroup");
        }
        args.extend(["checkpoint", "--image-path", images.as_str(), "--work-path", work.as_str(), "--leave-running"]);
        // Whoever restores an archive has cgroups of his own, and criu would want the old ones' properties there. Ours are taken out
        // before a restore.
        let mode = if groups { "soft" } else { "ignore" };
        args.extend(["--manage-cgroups-mode", mode, "--tcp-established", "--file-locks", "--ext-unix-sk"]);
        if container.config.tty {
            args.push("--shell-job");
        }
        args.push(container.id.as_str());
        let spawn = Spawn::new(self.config.program.as_str(), args)
            .env("PATH", PATH)
            .env("CRIU_CONFIG_FILE", config.as_str())
            .deadline(self.config.checkpoint_timeout);
        let dumped = tokio::select! {
            dumped = spawn.run_ok() => Some(dumped),
            () = self.pods.tasks.overdue(LAST) => None,
        };
        if !matches!(dumped, Some(Ok(_))) {
            // criu thaws what it froze, unless it was killed.
            let (hierarchy, id) = (self.pods.hierarchy.clone(), container.id.clone());
            blocking(move || Ok(hierarchy.thaw(&parent, &id)?)).await?;
        }
        let Some(dumped) = dumped else {
            return Err(Error::new(Kind::Aborted, "the daemon ends, and the dump is not done: it was killed"));
        };
        dumped.map_err(|e| refusal(e, &log, &work.join("dump.log")))?;
        for (from, name) in
            [(work.join("dump.log"), "dump.log"), (config, "criu.conf"), (run_dir.join("config.json"), "spec.dump")]
        {
            std::fs::copy(&from, archive.join(name)).map_err(|e| Error::io(format!("copy {from}"), e))?;
        }
        let stats = work.join("stats-dump");
        if stats.is_file() {
            std::fs::copy(&stats, archive.join("stats-dump")).map_err(|e| Error::io(format!("copy {stats}"), e))?;
        }
        Ok(())
    }

    /// Whether the node has what it takes; asked at each call, since packages come and go.
    pub(super) async fn can_checkpoint(&self) -> Result<()> {
        let program = &self.config.program;
        let help =
            Spawn::new(program.as_str(), ["checkpoint", "--help"]).env("PATH", PATH).deadline(TELL).run_ok().await;
        // One that hangs has not said that it can't.
        if let Err(e @ SpawnError::Deadline { .. }) = help {
            return Err(e.into());
        }
        let help = help.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        if !help.contains("--image-path") || !help.contains("--manage-cgroups-mode") {
            let message = format!("{program} has no support for checkpoints (crun 1.21 as in Debian 13 has)");
            return Err(Error::new(Kind::Unimplemented, message));
        }
        if !PATH.split(':').any(|folder| Utf8Path::new(folder).join("criu").is_file()) {
            return Err(Error::precondition("criu is not installed (Debian's package criu, and libcriu2 for crun)"));
        }
        Ok(())
    }
}

/// criu's configuration: what a container's processes may have open of its streams. They run: a shell that redirects a builtin
/// holds a stream by another number the moment after it was looked for. So each stream is named on every mount by which any was
/// seen, and they are looked for again when none was. Blocks shortly.
fn external_files(group: &Utf8Path, streams: &[Utf8PathBuf]) -> Result<String> {
    let identity = |path: &Utf8PathBuf| {
        let meta = std::fs::metadata(path).ok()?;
        Some(((meta.dev(), meta.ino()), path.file_name().unwrap_or_default().to_owned()))
    };
    let inodes: BTreeMap<_, _> = streams.iter().filter_map(identity).collect();
    let mut mounts = BTreeSet::new();
    for _ in 0..LOOKS {
        mounts.extend(mounts_of_streams(group, &inodes));
        if !mounts.is_empty() {
            break;
        }
    }
    let mut text = String::new();
    for mount in &mounts {
        for ((_, inode), stream) in &inodes {
            text += &format!("external file[{mount:x}:{inode:x}] # {stream}\n");
        }
    }
    Ok(text)
}

/// The mounts by which processes of the group hold one of the files.
fn mounts_of_streams(group: &Utf8Path, inodes: &BTreeMap<(u64, u64), String>) -> BTreeSet<u64> {
    let mut mounts = BTreeSet::new();
    let mut folders = vec![group.to_owned()];
    while let Some(folder) = folders.pop() {
        // Groups and processes come and go.
        let pids = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            mounts.extend(mounts_of_process(&Utf8Path::new("/proc").join(pid), inodes));
        }
        let below = folder.read_dir_utf8().into_iter().flatten().flatten();
        folders.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path().to_owned()));
    }
    mounts
}

fn mounts_of_process(process: &Utf8Path, inodes: &BTreeMap<(u64, u64), String>) -> Vec<u64> {
    let entries = process.join("fd").read_dir_utf8().into_iter().flatten().flatten();
    let mount = |fd: &str| {
        let meta = std::fs::metadata(process.join("fd").join(fd)).ok()?;
        if !meta.file_type().is_fifo() || !inodes.contains_key(&(meta.dev(), meta.ino())) {
            return None;
        }
        let info = std::fs::read_to_string(process.join("fdinfo").join(fd)).ok()?;
        info.lines().find_map(|l| l.strip_prefix("mnt_id:"))?.trim().parse().ok()
    };
    entries.filter_map(|e| mount(e.file_name())).collect()
}

/// What a failed dump means, with the words of both programs.
fn refusal(error: SpawnError, crun_log: &Utf8Path, criu_log: &Utf8Path) -> Error {
    if matches!(error, SpawnError::Deadline { .. }) {
        return Error::because(Kind::DeadlineExceeded, "criu was not done in time and was killed; it runs on", error);
    }
    let said = std::fs::read_to_string(crun_log).unwrap_or_default() + &error.to_string();
    if said.contains("libcriu") && said.contains("could not load") {
        return Error::because(Kind::FailedPrecondition, "the library of criu is missing (Debian's libcriu2)", error);
    }
    let log = std::fs::read_to_string(criu_log).unwrap_or_default();
    let words = errors_of(&log);
    let words = if words.is_empty() { said } else { words };
    Error::because(Kind::Internal, format!("criu could not dump it, and it runs on: {words}"), error)
}

/// The first complaints in criu's log, but for those that it goes on after.
fn errors_of(log: &str) -> String {
    let errors = log.lines().filter(|l| l.contains("Error (") && !l.contains("RLIMIT_NOFILE"));
    let text = |l: &str| l.split_once("): ").map_or(l, |(_, text)| text).to_owned();
    errors.map(text).take(WORDS).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_criu_complains_of() {
        let log = "(00.115898) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                   (00.2) Warn  (criu/x.c:1): no\n\
                   (00.289174) Error (criu/files-reg.c:1790): Can't lookup mount=100 for fd=1 path=/run/out\n\
                   (00.353436) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(errors_of(log), "Can't lookup mount=100 for fd=1 path=/run/out; Dumping FAILED.");
    }

    #[test]
    #[allow(clippy::disallowed_methods)] // tests write files as they like
    fn a_fifo_that_a_process_has_open_is_external() {
        let temp = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::try_from(temp.path().join("out")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path.as_std_path(), rustix::fs::Mode::RUSR).unwrap();
        let _open = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        let inodes = [((meta.dev(), meta.ino()), "stdout".to_owned())].into();
        assert_eq!(mounts_of_process("/proc/self".into(), &inodes).len(), 1);
        // One that nobody has open at the moment is named on the same mount.
        let other = Utf8PathBuf::try_from(temp.path().join("err")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, other.as_std_path(), rustix::fs::Mode::RUSR).unwrap();
        let group = Utf8PathBuf::try_from(temp.path().to_owned()).unwrap();
        std::fs::write(group.join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        let text = external_files(&group, &[path, other.clone()]).unwrap();
        let inode = std::fs::metadata(&other).unwrap().ino();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(
            text.lines().all(|l| l.starts_with("external file[")) && text.contains(&format!(":{inode:x}] # err\n"))
        );
    }
}
