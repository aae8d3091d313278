//! Containers that people make by hand, beside those of pods: create, start, stop, delete, list, info and exec.
//!
//! Called by `backend lxc ...` and by whoever uses this crate as a library; no daemon is needed, and none touches these
//! containers. Made of a template of liblxc's, or of a folder that holds a root file system, which stays its owner's. They
//! live below `<root>/lxc` and are liblxc's own in every way: `lxc-start -P` and the like work. Containers of pods are listed
//! and shown, and all else is refused by name: they belong to their pods. A crash leaves what liblxc's own call leaves.

use std::fs::DirBuilder;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags, memfd_create};
use serde::Serialize;

use super::{LxcConfig, PATH};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::ContainerId;
use crate::integrations::netns;
use crate::utils::atomic::{self, Durability};
use crate::utils::process::{Output, Spawn, SpawnError};

/// A template may fetch a distribution.
const CREATE: Duration = Duration::from_secs(1800);
/// Longest name; it is a cgroup's and a host's, too.
const NAME_MAX: usize = 63;
/// In the folder of a container whose root file system is somebody else's.
const FOREIGN_ROOT: &str = "lxcri-root";
const CONFIG: &str = "config";
/// Most bytes of a call's log that are looked at.
const LOG_MAX: u64 = 1 << 20;
/// Where a root file system is.
const ROOT: &str = "lxc.rootfs.path";
/// What a root file system of somebody's own decides, and nobody else: with other values liblxc would remove it.
const ROOTS: [&str; 3] = [ROOT, "lxc.rootfs.managed", "lxc.ephemeral"];

/// What a container is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A template of liblxc's, by name or path, and its arguments.
    Template(String, Vec<String>),
    /// A folder with a root file system. It is neither copied nor ever removed.
    Root(Utf8PathBuf),
}

/// A container to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct New {
    /// Letters, digits and `-_.`.
    pub name: String,
    /// What of.
    pub source: Source,
    /// Configuration to begin with; None: the node's default for liblxc, if there is one.
    pub config: Option<Utf8PathBuf>,
    /// More lines of it.
    pub set: Vec<(String, String)>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Info {
    /// Its name; of a pod's container the id.
    pub name: String,
    /// As liblxc has it: RUNNING, STOPPED, FROZEN, ...
    pub state: String,
    /// Pid of its init; 0: it does not run.
    pub pid: i32,
    /// It is a pod's.
    pub of_pod: bool,
    /// Where its configuration is.
    pub config: Utf8PathBuf,
}

/// The containers of a node.
#[derive(Debug, Clone)]
pub struct ByHand {
    config: LxcConfig,
    folder: Utf8PathBuf,
    pods: Utf8PathBuf,
}

impl ByHand {
    /// `root` and `state`: the daemon's folders.
    pub fn new(config: LxcConfig, root: &Utf8Path, state: &Utf8Path) -> Self {
        Self { config, folder: root.join("lxc"), pods: state.join("lxc") }
    }

    /// Makes one.
    pub async fn create(&self, new: &New) -> Result<()> {
        check_name(&new.name)?;
        if self.at(&self.folder, &new.name)?.is_some() {
            return Err(Error::new(Kind::AlreadyExists, format!("container {:?} is there already", new.name)));
        }
        if self.at(&self.pods, &new.name)?.is_some() {
            return Err(Error::new(Kind::AlreadyExists, format!("a pod's container has the name {:?}", new.name)));
        }
        let mut more = Vec::new();
        if let Some(path) = &new.config {
            if !path.is_absolute() || !path.is_file() {
                return Err(Error::invalid(format!("configuration {path} is no file with an absolute path")));
            }
            more.extend(["--config".to_owned(), path.to_string()]);
        }
        for (key, value) in &new.set {
            if matches!(new.source, Source::Root(_)) && ROOTS.contains(&key.trim()) {
                return Err(Error::invalid(format!("{key} is not to be set beside a root file system of your own")));
            }
            if key.trim() == ROOT {
                return Err(Error::invalid(format!("{key} is not to be set beside a template, which makes it")));
            }
            more.extend(["--set".to_owned(), line(key, value)?]);
        }
        let mut root = None;
        match &new.source {
            Source::Root(path) => {
                let path = self.real_folder(path)?;
                more.extend(["--root".to_owned(), path.to_string()]);
                root = Some(path);
            }
            Source::Template(name, arguments) => {
                if name.is_empty() || name.chars().any(char::is_control) {
                    return Err(Error::invalid(format!("template {name:?}: no name of one")));
                }
                more.extend(["--".to_owned(), name.clone()]);
                more.extend(arguments.iter().cloned());
            }
        }
        self.has_helper()?;
        let folder = self.folder.join(&new.name);
        let (at, template) = (folder.clone(), root.is_none());
        let claimed = blocking(move || claim(&at)).await?;
        if self.at(&self.folder, &new.name)?.is_some() {
            return Err(Error::new(Kind::AlreadyExists, format!("container {:?} is there already", new.name)));
        }
        let at = folder.clone();
        // Before there is a configuration: no crash may make it look like a container whose root file system goes with it.
        let mut made = blocking(move || note(&at, root.as_deref())).await;
        if made.is_ok() {
            made = self.call("make", &new.name, more, CREATE).await.map(drop);
        }
        if made.is_err() {
            let removed = blocking(move || {
                // liblxc removes it itself when a template fails: then it may be somebody else's by now.
                if !is_at(&claimed, &folder) {
                    return Ok(());
                }
                // A whole one, or a template's, goes with `delete`.
                match std::fs::read_to_string(folder.join(CONFIG)) {
                    Ok(text) if template || text.contains(ROOT) => return Ok(()),
                    _ => {}
                }
                // What is not empty then is liblxc's to tell of. The note goes last.
                for file in [CONFIG, FOREIGN_ROOT] {
                    let _ = std::fs::remove_file(folder.join(file));
                }
                let _ = std::fs::remove_dir(&folder);
                Ok(())
            });
            removed.await?;
        }
        made
    }

    /// Starts it; one that runs is refused.
    pub async fn start(&self, name: &str) -> Result<()> {
        let info = self.own(name).await?;
        if info.state != "STOPPED" {
            return Err(Error::precondition(format!("container {name:?} is {}", info.state)));
        }
        let note = self.folder.join(name).join(FOREIGN_ROOT);
        let root = blocking(move || match std::fs::read_to_string(&note) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(Error::io(format!("read {note}"), e)),
            Ok(root) => {
                let real = Utf8Path::new(&root).canonicalize_utf8();
                let real =
                    real.map_err(|e| Error::because(Kind::FailedPrecondition, format!("root file system {root}"), e))?;
                Ok(vec!["--root".to_owned(), real.into_string()])
            }
        });
        self.call("run", name, root.await?, self.config.timeout).await.map(drop)
    }

    /// Asks its init to end and kills it after `grace`. One that does not run is success.
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<()> {
        if self.own(name).await?.state == "STOPPED" {
            return Ok(());
        }
        let seconds = i32::try_from(grace.as_secs()).map_err(|_| Error::invalid("a grace period of years"))?;
        self.call("halt", name, vec![seconds.to_string()], self.config.timeout + grace).await.map(drop)
    }

    /// Removes it, and its root file system if a template made that. One that runs is refused, unless `force`: then it is
    /// killed.
    pub async fn delete(&self, name: &str, force: bool) -> Result<()> {
        let info = self.own(name).await?;
        if info.state != "STOPPED" && info.state != "BROKEN" {
            if !force {
                return Err(Error::precondition(format!("container {name:?} is {}: stop it first", info.state)));
            }
            self.stop(name, Duration::ZERO).await?;
        }
        let folder = self.folder.join(name);
        let note = folder.join(FOREIGN_ROOT);
        if !note.try_exists().map_err(|e| Error::io(format!("look at {note}"), e))? {
            self.call("destroy", name, Vec::new(), CREATE).await?;
        }
        // Of one whose root file system is not its own (`lxc.rootfs.managed = 0`) liblxc removes nothing, and calls that success.
        if folder.try_exists().map_err(|e| Error::io(format!("look at {folder}"), e))? {
            self.remove_all_but_its_root(folder).await?;
        }
        // liblxc never takes away its locks; one that stays is no harm.
        let _ = std::fs::remove_file(lxcri_lxc::lock_file(self.folder.as_str(), name));
        Ok(())
    }

    async fn remove_all_but_its_root(&self, folder: Utf8PathBuf) -> Result<()> {
        blocking(move || {
            // The root file system is not in it: what is there is liblxc's, files and empty folders. The note goes last.
            let failed = |e| Error::io(format!("remove {folder}"), e);
            let (mut files, mut folders) = (Vec::new(), Vec::new());
            for entry in folder.read_dir_utf8().map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if !entry.file_type().map_err(failed)?.is_dir() {
                    files.push(entry.into_path());
                } else if entry.path().read_dir_utf8().map_err(failed)?.next().is_none() {
                    folders.push(entry.into_path());
                } else {
                    let path = entry.path();
                    return Err(Error::precondition(format!(
                        "{path} is not empty (snapshots, a root file system that liblxc does not manage?): remove what is in it \
                         first"
                    )));
                }
            }
            folders.iter().try_for_each(std::fs::remove_dir).map_err(failed)?;
            files.retain(|path| path.file_name() != Some(FOREIGN_ROOT));
            files.iter().try_for_each(std::fs::remove_file).map_err(failed)?;
            match std::fs::remove_file(folder.join(FOREIGN_ROOT)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
                _ => {}
            }
            std::fs::remove_dir(&folder).map_err(|e| Error::io(format!("remove {folder}"), e))
        })
        .await
    }

    /// All of them, by name, and those of pods.
    pub async fn list(&self) -> Result<Vec<Info>> {
        let mut all = Vec::new();
        for (folder, of_pod) in [(&self.folder, false), (&self.pods, true)] {
            let names = names(folder.clone()).await?;
            all.extend(self.states(folder, names, of_pod).await?);
        }
        Ok(all)
    }

    /// One of them.
    pub async fn info(&self, name: &str) -> Result<Info> {
        check_name(name)?;
        for (folder, of_pod) in [(&self.folder, false), (&self.pods, true)] {
            if self.at(folder, name)?.is_some() {
                let mut found = self.states(folder, vec![name.to_owned()], of_pod).await?;
                // None: it has been removed this moment.
                if let Some(found) = found.pop() {
                    return Ok(found);
                }
            }
        }
        Err(Error::not_found(format!("container {name:?}: there is none")))
    }

    /// Program and arguments that run `command` in it, with the streams, terminal and signals of whoever runs them; their exit
    /// code is the command's own.
    pub async fn exec(&self, name: &str, command: &[String], env: &[String]) -> Result<(Utf8PathBuf, Vec<String>)> {
        let info = self.own(name).await?;
        if info.state != "RUNNING" {
            return Err(Error::precondition(format!("container {name:?} is {}", info.state)));
        }
        if command.is_empty() {
            return Err(Error::invalid("no command"));
        }
        let mut arguments = self.arguments("attach", name);
        let path = (!env.iter().any(|line| line.starts_with("PATH="))).then(default_path);
        for line in env.iter().map(String::as_str).chain(path) {
            if !line.contains('=') || line.contains('\0') {
                return Err(Error::invalid("environment: not of the form KEY=VALUE"));
            }
            arguments.extend(["--env".to_owned(), line.to_owned()]);
        }
        arguments.push("--".to_owned());
        arguments.extend(command.iter().cloned());
        Ok((self.config.helper.clone(), arguments))
    }

    /// One that people made; a pod's is refused by name.
    async fn own(&self, name: &str) -> Result<Info> {
        match self.info(name).await? {
            info if !info.of_pod => Ok(info),
            _ => Err(Error::precondition(format!(
                "container {name} is a pod's: use the verbs stop, rm and exec, or its kubelet"
            ))),
        }
    }

    fn at(&self, folder: &Utf8Path, name: &str) -> Result<Option<Utf8PathBuf>> {
        let file = folder.join(name).join(CONFIG);
        let there = file.try_exists().map_err(|e| Error::io(format!("look at {file}"), e))?;
        Ok(there.then_some(file))
    }

    async fn states(&self, folder: &Utf8Path, names: Vec<String>, of_pod: bool) -> Result<Vec<Info>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut arguments = vec!["states".to_owned(), "--lxcpath".to_owned(), folder.to_string()];
        self.library(&mut arguments);
        let net = super::hidden_net(folder);
        if of_pod && netns::is_pinned(&net)? {
            arguments.extend(["--net".to_owned(), net.into_string()]);
        }
        arguments.extend(names);
        let output = self.spawn(arguments, self.config.timeout)?.run_ok().await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let of = |line: &str| {
            let mut words = line.split(' ');
            let (name, state, pid) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
            let config = folder.join(name).join(CONFIG);
            Some(Info { name: name.to_owned(), state: state.to_owned(), pid, of_pod, config })
        };
        text.lines()
            .map(|line| of(line).ok_or_else(|| Error::internal(format!("the helper's answer {line:?}"))))
            .collect()
    }

    fn library(&self, arguments: &mut Vec<String>) {
        if !self.config.library.is_empty() {
            arguments.extend(["--library".to_owned(), self.config.library.clone()]);
        }
    }

    fn arguments(&self, verb: &str, name: &str) -> Vec<String> {
        let mut arguments = [verb, "--lxcpath", self.folder.as_str(), "--name", name].map(String::from).to_vec();
        self.library(&mut arguments);
        arguments
    }

    async fn call(&self, verb: &str, name: &str, more: Vec<String>, deadline: Duration) -> Result<Output> {
        let mut arguments = self.arguments(verb, name);
        // In memory, so that nothing of it is left whoever is killed.
        let log = memfd_create(c"log", MemfdFlags::CLOEXEC).map_err(|e| Error::io("a file in memory", e.into()))?;
        arguments.extend(["--log".to_owned(), format!("/proc/self/fd/{}", log.as_raw_fd())]);
        arguments.extend(more);
        let copy = log.try_clone().map_err(|e| Error::io("duplicate a descriptor", e))?;
        let done = self.spawn(arguments, deadline)?.pass(log).run_ok().await;
        done.map_err(|e| match (tail(copy), e) {
            // In its own words, which name what was asked for; the command line would add nothing.
            (said, SpawnError::Failed { .. }) if !said.is_empty() => {
                Error::precondition(format!("{verb} container {name:?}: {said}"))
            }
            (said, e) => Error::from(e).context(format!("{verb} container {name:?}: {said}")),
        })
    }

    fn has_helper(&self) -> Result<()> {
        let helper = &self.config.helper;
        match helper.try_exists().unwrap_or(false) {
            true => Ok(()),
            false => Err(Error::precondition(format!("helper {helper} (handlers.lxc) is not there"))),
        }
    }

    fn spawn(&self, arguments: Vec<String>, deadline: Duration) -> Result<Spawn> {
        self.has_helper()?;
        let helper = &self.config.helper;
        Ok(Spawn::new(helper.as_str(), arguments).env("PATH", PATH).env("HOME", "/root").deadline(deadline))
    }

    /// The folder itself, whose containers' root file system it may be.
    fn real_folder(&self, path: &Utf8Path) -> Result<Utf8PathBuf> {
        let real = real_folder(path)?;
        // As they are named, or where that leads.
        let ours = [&self.folder, &self.pods].map(|f| [f.canonicalize_utf8().unwrap_or_else(|_| f.clone()), f.clone()]);
        match ours.iter().flatten().find(|f| f.starts_with(&real) || real.starts_with(f)) {
            Some(ours) => Err(Error::invalid(format!("root file system {path}: containers are kept in {ours}"))),
            None => Ok(real),
        }
    }
}

/// Makes a container's folder, which is the caller's as long as the descriptor is open: two that make one of the same name must not
/// take each other's notes for theirs.
fn claim(folder: &Utf8Path) -> Result<OwnedFd> {
    let failed = |e| Error::io(format!("make {folder}"), e);
    let all = folder.parent().unwrap_or(folder);
    // As the daemon makes its own, if it has not run yet.
    if let Some(root) = all.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
    }
    std::fs::create_dir_all(all).map_err(failed)?;
    loop {
        match DirBuilder::new().mode(0o770).create(folder) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = match rustix::fs::open(folder.as_std_path(), flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => continue,
            opened => opened.map_err(|e| failed(e.into()))?,
        };
        match rustix::fs::flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let name = folder.file_name().unwrap_or_default();
                return Err(Error::new(Kind::AlreadyExists, format!("container {name:?} is being made")));
            }
            locked => locked.map_err(|e| failed(e.into()))?,
        }
        if is_at(&opened, folder) {
            return Ok(opened);
        }
    }
}

/// Whether a folder has that path still.
fn is_at(folder: &OwnedFd, path: &Utf8Path) -> bool {
    let there = rustix::fs::lstat(path.as_std_path());
    rustix::fs::fstat(folder).is_ok_and(|f| there.is_ok_and(|t| (t.st_dev, t.st_ino) == (f.st_dev, f.st_ino)))
}

/// Writes into a container's folder whose its root file system is; None: its own.
fn note(folder: &Utf8Path, root: Option<&Utf8Path>) -> Result<()> {
    let file = folder.join(FOREIGN_ROOT);
    match root {
        Some(root) => atomic::write(file.as_std_path(), root.as_str().as_bytes(), 0o600, Durability::Machine)
            .map_err(|e| Error::io(format!("write {file}"), e)),
        None => match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("remove {file}"), e)),
            _ => Ok(()),
        },
    }
}

fn default_path() -> &'static str {
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

/// The last lines of a log, as much as an error can have.
fn tail(log: OwnedFd) -> String {
    let mut text = Vec::new();
    let mut file = std::fs::File::from(log);
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(LOG_MAX).read_to_end(&mut text));
    if let Err(e) = read {
        return format!("its log can't be read: {e}");
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.trim().lines().collect();
    let from = lines.len().saturating_sub(8);
    lines[from..].join("; ").chars().take(1500).collect()
}

async fn names(folder: Utf8PathBuf) -> Result<Vec<String>> {
    blocking(move || {
        let entries = match folder.read_dir_utf8() {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("list {folder}"), e)),
        };
        let name = |entry: camino::Utf8DirEntry| {
            let name = entry.file_name().to_owned();
            (check_name(&name).is_ok() && entry.path().join(CONFIG).is_file()).then_some(name)
        };
        let mut names: Vec<String> = entries.flatten().filter_map(name).collect();
        names.sort();
        Ok(names)
    })
    .await
}

/// What is safe as a folder, a cgroup and an argument. The ids of pods' containers fit, too.
fn check_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let id = name.parse::<ContainerId>().is_ok();
    if name.is_empty() || name.len() > NAME_MAX && !id || !name.bytes().all(good) || name.starts_with(['.', '-']) {
        return Err(Error::invalid(format!(
            "container {name:?}: a name is up to {NAME_MAX} letters, digits, '-', '_' and '.', and begins with no '.' or '-'"
        )));
    }
    // liblxc takes numbers for pids.
    if name.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Error::invalid(format!("container {name:?}: a name of digits alone is a pid to liblxc")));
    }
    Ok(())
}

fn line(key: &str, value: &str) -> Result<String> {
    if !super::lines::is_key(key) || !key.starts_with("lxc.") {
        return Err(Error::invalid(format!("{key:?} is no key of a liblxc configuration")));
    }
    let mut lines = super::lines::Lines::default();
    lines.put(key, value)?;
    Ok(format!("{key}={value}"))
}

fn real_folder(path: &Utf8Path) -> Result<Utf8PathBuf> {
    if !path.is_absolute() {
        return Err(Error::invalid(format!("root file system {path} is not an absolute path")));
    }
    let named = |e| Error::because(Kind::InvalidArgument, format!("root file system {path}"), e);
    let real = path.canonicalize_utf8().map_err(named)?;
    if !real.is_dir() {
        return Err(Error::invalid(format!("root file system {path} is no folder")));
    }
    // A value of liblxc's configuration begins and ends with no blank.
    super::lines::Lines::default().put(ROOT, real.as_str())?;
    if real == "/" || real.as_str().chars().any(char::is_control) {
        return Err(Error::invalid(format!("root file system {path:?} can't be a container's")));
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_lines_that_would_do_harm_are_refused() {
        for bad in ["", ".", "..", "a/b", "-n", "a b", "a\nb", "123", "ä", &"x".repeat(64)] {
            assert_eq!(check_name(bad).unwrap_err().kind(), Kind::InvalidArgument, "{bad:?}");
        }
        for good in ["a", "web-1", "x.y_z", ContainerId::new().as_str()] {
            check_name(good).unwrap();
        }
        assert_eq!(line("lxc.uts.name", "x").unwrap(), "lxc.uts.name=x");
        for (key, value) in
            [("uts", "x"), ("lxc.a b", "x"), ("lxc.uts.name", "x\nlxc.hook.start = /x"), ("lxc.x=y", "z")]
        {
            assert!(line(key, value).is_err(), "{key} {value:?}");
        }
        for bad in ["relative", "/", "/etc/passwd", "/no/such"] {
            assert_eq!(real_folder(bad.into()).unwrap_err().kind(), Kind::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn a_folder_is_claimed_once_at_a_time() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(dir.path()).unwrap().join("fresh");
        let folder = root.join("lxc/one");
        let claimed = claim(&folder).unwrap();
        assert_eq!(root.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(claim(&folder).unwrap_err().kind(), Kind::AlreadyExists);
        std::fs::remove_dir(&folder).unwrap();
        assert!(!is_at(&claimed, &folder));
        let other = claim(&folder).unwrap();
        assert!(is_at(&other, &folder) && !is_at(&claimed, &folder));
        drop(other);
        claim(&folder).unwrap();
        let blank = root.join("blank ");
        std::fs::create_dir(&blank).unwrap();
        assert_eq!(real_folder(&blank).unwrap_err().kind(), Kind::InvalidArgument);
    }

    proptest! {
        #[test]
        fn no_name_leads_out_of_the_folder(name in "\\PC*") {
            if check_name(&name).is_ok() {
                let path = Utf8Path::new("/f").join(&name);
                prop_assert_eq!(path.parent().unwrap().as_str(), "/f");
                prop_assert_eq!(path.components().count(), 3);
            }
        }
    }
}
