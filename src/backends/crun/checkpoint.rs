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

/// A dump that is not done after this time is given up; it would be much memory and a slow disk.
const DUMP: Duration = Duration::from_secs(1800);
/// Lines of criu's log in an error.
const WORDS: usize = 5;

impl CrunBackend {
    pub(super) async fn dump(&self, context: CheckpointContext<'_>) -> Result<()> {
        let CheckpointContext { pod, container, run_dir, folder, archive } = context;
        self.can_checkpoint().await?;
        let (work, config, log) = (folder.join("work"), folder.join("criu.conf"), folder.join("crun.log"));
        std::fs::create_dir(&work).map_err(|e| Error::io(format!("make {work}"), e))?;
        let parent = self.parent(pod)?;
        let group = self.hierarchy.container(&parent, &container.id).kill;
        let streams: Vec<_> = ["stdin", "stdout", "stderr"].iter().map(|name| run_dir.join(name)).collect();
        let text = blocking(move || external_files(&group, &streams)).await?;
        atomic::write(config.as_std_path(), text.as_bytes(), 0o600, Durability::Process)
            .map_err(|e| Error::io(format!("write {config}"), e))?;
        let (images, root) = (archive.join("checkpoint"), self.root());
        let mut args = vec!["--root", root.as_str(), "--log", log.as_str()];
        if self.config.driver == Driver::Systemd {
            args.push("--systemd-cgroup");
        }
        args.extend(["checkpoint", "--image-path", images.as_str(), "--work-path", work.as_str(), "--leave-running"]);
        // A restored container gets cgroups of its own.
        args.extend(["--manage-cgroups-mode", "ignore", "--tcp-established", "--file-locks", "--ext-unix-sk"]);
        if container.config.tty {
            args.push("--shell-job");
        }
        args.push(container.id.as_str());
        let spawn = Spawn::new(self.config.program.as_str(), args)
            .env("PATH", PATH)
            .env("CRIU_CONFIG_FILE", config.as_str())
            .deadline(DUMP);
        let dumped = spawn.run_ok().await;
        if dumped.is_err() {
            // criu thaws what it froze, unless it was killed.
            let (hierarchy, id) = (self.hierarchy.clone(), container.id.clone());
            blocking(move || Ok(hierarchy.thaw(&parent, &id)?)).await?;
        }
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
    async fn can_checkpoint(&self) -> Result<()> {
        let program = &self.config.program;
        let help = Spawn::new(program.as_str(), ["checkpoint", "--help"]).env("PATH", PATH).run_ok().await;
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

/// criu's configuration: what a container's processes have open of its streams. Blocks shortly.
fn external_files(group: &Utf8Path, streams: &[Utf8PathBuf]) -> Result<String> {
    let identity = |path: &Utf8PathBuf| {
        let meta = std::fs::metadata(path).ok()?;
        Some(((meta.dev(), meta.ino()), path.file_name().unwrap_or_default().to_owned()))
    };
    let inodes: BTreeMap<_, _> = streams.iter().filter_map(identity).collect();
    let mut lines = BTreeSet::new();
    let mut folders = vec![group.to_owned()];
    while let Some(folder) = folders.pop() {
        // Groups and processes come and go.
        let pids = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            lines.extend(external_files_of(Utf8Path::new("/proc").join(pid), &inodes));
        }
        let below = folder.read_dir_utf8().into_iter().flatten().flatten();
        folders.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path().to_owned()));
    }
    Ok(lines.into_iter().collect())
}

fn external_files_of(process: Utf8PathBuf, inodes: &BTreeMap<(u64, u64), String>) -> Vec<String> {
    let entries = process.join("fd").read_dir_utf8().into_iter().flatten().flatten();
    let line = |fd: &str| {
        let meta = std::fs::metadata(process.join("fd").join(fd)).ok()?;
        let stream = inodes.get(&(meta.dev(), meta.ino())).filter(|_| meta.file_type().is_fifo())?;
        let info = std::fs::read_to_string(process.join("fdinfo").join(fd)).ok()?;
        let mount: u64 = info.lines().find_map(|l| l.strip_prefix("mnt_id:"))?.trim().parse().ok()?;
        Some(format!("external file[{mount:x}:{:x}] # {stream}\n", meta.ino()))
    };
    entries.filter_map(|e| line(e.file_name())).collect()
}

/// What a failed dump means, with the words of both programs.
fn refusal(error: SpawnError, crun_log: &Utf8Path, criu_log: &Utf8Path) -> Error {
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
    fn a_fifo_that_a_process_has_open_is_external() {
        let temp = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::try_from(temp.path().join("out")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path.as_std_path(), rustix::fs::Mode::RUSR).unwrap();
        let _open = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        let found = external_files_of("/proc/self".into(), &[((meta.dev(), meta.ino()), "stdout".to_owned())].into());
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with("external file[") && found[0].ends_with(&format!(":{:x}] # stdout\n", meta.ino())),
            "{found:?}"
        );
    }
}
