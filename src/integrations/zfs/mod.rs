//! `zfs` and `zpool`, typed: one method per operation, no policy. OpenZFS 2.1 and later, and zfs-fuse.
//!
//! Called by the ZFS layer store. Which ZFS it is, is asked once ([`Zfs::probe`]). Programs run by absolute path with an
//! argument list, never a shell; names are checked types. All go through a queue: a few at a time, a bounded number
//! waiting, [`ZfsError::QueueFull`] beyond, and [`ZfsError::Busy`] for who waited too long. Streams, which take long, have a
//! queue of their own. Each operation has a deadline, and waits within it. Fails with [`ZfsError`]. A crash leaves the program
//! running to its end: every operation of ZFS is all or nothing.

mod error;
mod name;
pub mod parse;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::utils::process::Spawn;

pub use error::{Reason, ZfsError};
pub use name::{BadName, Dataset, Property, ResumeToken, Snapshot, Tag};
pub use parse::{Change, PoolState, Properties, Source, TokenContents, Value};

/// Operations at once. ZFS commits its changes in groups; more at a time only hold memory.
const AT_ONCE: usize = 4;
/// Streams at once.
const STREAMS_AT_ONCE: usize = 4;
/// Operations that may wait.
const MAX_WAITING: usize = 64;
/// Output of one listing: some 100,000 datasets.
const MAX_OUTPUT: usize = 128 << 20;
/// The property that tells where a stream was cut. Unknown to zfs-fuse.
pub const RESUME_TOKEN: &str = "receive_resume_token";
/// Where the kernel module tells the state of imported pools.
const KSTAT: &str = "/proc/spl/kstat/zfs";

/// Which ZFS it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// OpenZFS with its kernel module, of this version.
    Kernel(u32, u32),
    /// zfs-fuse: mounts by its own daemon, no `diff`, no resumable streams.
    Fuse,
}

impl Flavor {
    /// For messages.
    pub fn describe(self) -> String {
        match self {
            Self::Kernel(major, minor) => format!("OpenZFS {major}.{minor}"),
            Self::Fuse => "zfs-fuse".into(),
        }
    }
}

/// Where the programs are and how long they may take.
#[derive(Debug, Clone)]
pub struct ZfsConfig {
    /// Absolute path of `zfs`.
    pub zfs: Utf8PathBuf,
    /// Absolute path of `zpool`.
    pub zpool: Utf8PathBuf,
    /// Longest time for one operation, and for a stream to wait for its turn.
    pub deadline: Duration,
    /// Longest time for one stream to be sent or received.
    pub stream_deadline: Duration,
}

impl Default for ZfsConfig {
    fn default() -> Self {
        Self {
            zfs: "/usr/sbin/zfs".into(),
            zpool: "/usr/sbin/zpool".into(),
            deadline: Duration::from_secs(60),
            stream_deadline: Duration::from_secs(4 * 60 * 60),
        }
    }
}

#[derive(Debug)]
struct Queue {
    running: Semaphore,
    waiting: AtomicUsize,
}

/// Takes one off the count of those that wait.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Queue {
    fn new(at_once: usize) -> Arc<Self> {
        Arc::new(Self { running: Semaphore::new(at_once), waiting: AtomicUsize::new(0) })
    }

    async fn enter(&self, what: &str, longest: Duration) -> Result<SemaphorePermit<'_>, ZfsError> {
        let waiting = self.waiting.fetch_add(1, Ordering::AcqRel);
        let _here = Waiting(&self.waiting);
        if waiting >= MAX_WAITING {
            return Err(ZfsError::QueueFull { what: what.into(), waiting });
        }
        match tokio::time::timeout(longest, self.running.acquire()).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) => Err(ZfsError::QueueFull { what: what.into(), waiting }),
            Err(_) => Err(ZfsError::Busy { what: what.into(), waited: longest }),
        }
    }
}

/// The wrapper; clones share the queues.
#[derive(Debug, Clone)]
pub struct Zfs {
    config: ZfsConfig,
    flavor: Flavor,
    queue: Arc<Queue>,
    streams: Arc<Queue>,
    /// Of the pool's state, which is asked for when nothing else gets on.
    health: Arc<Queue>,
}

impl Zfs {
    /// Asks which ZFS this is.
    pub async fn probe(config: ZfsConfig) -> Result<Self, ZfsError> {
        let (queue, streams, health) = (Queue::new(AT_ONCE), Queue::new(STREAMS_AT_ONCE), Queue::new(1));
        let mut zfs = Self { config, flavor: Flavor::Fuse, queue, streams, health };
        zfs.flavor = match zfs.zfs(["version"]).await {
            Ok(text) => match parse::version(&text) {
                Some((major, minor)) => Flavor::Kernel(major, minor),
                None => {
                    return Err(ZfsError::Output {
                        what: "zfs version".into(),
                        line: text.chars().take(200).collect(),
                    });
                }
            },
            // OpenZFS has it since 0.8; zfs-fuse has not.
            Err(e) if e.reason() == Reason::Unsupported => Flavor::Fuse,
            Err(e) => return Err(e),
        };
        Ok(zfs)
    }

    /// Which ZFS it is.
    pub fn flavor(&self) -> Flavor {
        self.flavor
    }

    fn spawn<'a>(&self, program: &Utf8PathBuf, args: impl IntoIterator<Item = &'a str>) -> Spawn {
        Spawn::new(program.as_str(), args)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .stdout_cap(MAX_OUTPUT)
    }

    async fn run(&self, spawn: Spawn) -> Result<String, ZfsError> {
        self.run_in(&self.queue, spawn, self.config.deadline).await
    }

    /// Sends or receives.
    async fn stream(&self, spawn: Spawn) -> Result<(), ZfsError> {
        self.run_in(&self.streams, spawn, self.config.stream_deadline).await.map(drop)
    }

    async fn run_in(&self, queue: &Queue, spawn: Spawn, deadline: Duration) -> Result<String, ZfsError> {
        let (what, asked) = (spawn.command(), Instant::now());
        let _turn = queue.enter(&what, deadline.min(self.config.deadline)).await?;
        let output = spawn.deadline(deadline.saturating_sub(asked.elapsed())).run().await?;
        if !output.success() {
            return Err(ZfsError::from_words(what, &output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn zfs<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<String, ZfsError> {
        self.run(self.spawn(&self.config.zfs, args)).await
    }

    async fn zpool<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<String, ZfsError> {
        self.run(self.spawn(&self.config.zpool, args)).await
    }

    /// `zfs create`: a new file system.
    pub async fn create(&self, dataset: &Dataset, properties: &[Property]) -> Result<(), ZfsError> {
        let properties = arguments(properties);
        let args = ["create"].into_iter().chain(options(&properties)).chain([dataset.as_str()]);
        self.zfs(args).await.map(drop)
    }

    /// `zfs snapshot`: of several file systems in one transaction where this ZFS can (zfs-fuse takes one only).
    pub async fn snapshot(&self, snapshots: &[Snapshot], properties: &[Property]) -> Result<(), ZfsError> {
        let properties = arguments(properties);
        let names: Vec<String> = snapshots.iter().map(ToString::to_string).collect();
        let groups: Vec<&[String]> = match self.flavor {
            Flavor::Kernel(..) => vec![&names],
            Flavor::Fuse => names.chunks(1).collect(),
        };
        for group in groups.into_iter().filter(|g| !g.is_empty()) {
            let names = group.iter().map(String::as_str);
            self.zfs(["snapshot"].into_iter().chain(options(&properties)).chain(names)).await?;
        }
        Ok(())
    }

    /// `zfs clone`: a file system that begins as `origin` is.
    pub async fn clone_snapshot(
        &self,
        origin: &Snapshot,
        to: &Dataset,
        properties: &[Property],
    ) -> Result<(), ZfsError> {
        let (properties, origin) = (arguments(properties), origin.to_string());
        let args = ["clone"].into_iter().chain(options(&properties)).chain([origin.as_str(), to.as_str()]);
        self.zfs(args).await.map(drop)
    }

    /// `zfs destroy` of a file system without snapshots and children.
    pub async fn destroy(&self, dataset: &Dataset) -> Result<(), ZfsError> {
        self.zfs(["destroy", dataset.as_str()]).await.map(drop)
    }

    /// `zfs destroy -r`: with its snapshots and children. Clones of these are dependents still.
    pub async fn destroy_with_snapshots(&self, dataset: &Dataset) -> Result<(), ZfsError> {
        self.zfs(["destroy", "-r", dataset.as_str()]).await.map(drop)
    }

    /// `zfs destroy` of a snapshot.
    pub async fn destroy_snapshot(&self, snapshot: &Snapshot) -> Result<(), ZfsError> {
        self.zfs(["destroy", &snapshot.to_string()]).await.map(drop)
    }

    /// `zfs destroy -d`: of a snapshot, at once or when its last clone and hold are gone.
    pub async fn destroy_snapshot_later(&self, snapshot: &Snapshot) -> Result<(), ZfsError> {
        self.zfs(["destroy", "-d", &snapshot.to_string()]).await.map(drop)
    }

    /// `zfs rename`. A mounted file system of zfs-fuse is Busy.
    pub async fn rename(&self, from: &Dataset, to: &Dataset) -> Result<(), ZfsError> {
        self.zfs(["rename", from.as_str(), to.as_str()]).await.map(drop)
    }

    /// `zfs promote`: the clone becomes the owner of the snapshot that it came from.
    pub async fn promote(&self, dataset: &Dataset) -> Result<(), ZfsError> {
        self.zfs(["promote", dataset.as_str()]).await.map(drop)
    }

    /// `zfs rollback` to the newest snapshot there is. A newer one is [`Reason::HasDependents`].
    pub async fn rollback(&self, snapshot: &Snapshot) -> Result<(), ZfsError> {
        self.zfs(["rollback", &snapshot.to_string()]).await.map(drop)
    }

    /// `zfs hold`: the snapshot can't be destroyed until the tag is released. Held by this tag already is success.
    pub async fn hold(&self, tag: &Tag, snapshot: &Snapshot) -> Result<(), ZfsError> {
        match self.zfs(["hold", tag.as_str(), &snapshot.to_string()]).await {
            Err(e) if e.reason() == Reason::Exists => Ok(()),
            done => done.map(drop),
        }
    }

    /// `zfs release`. Not held by this tag is NotFound.
    pub async fn release(&self, tag: &Tag, snapshot: &Snapshot) -> Result<(), ZfsError> {
        self.zfs(["release", tag.as_str(), &snapshot.to_string()]).await.map(drop)
    }

    /// `zfs holds`: tags of a snapshot. zfs-fuse needs a Python module for it that Debian has not.
    pub async fn holds(&self, snapshot: &Snapshot) -> Result<Vec<String>, ZfsError> {
        let text = self.zfs(["holds", "-H", &snapshot.to_string()]).await?;
        let read = parse::holds(&text).map_err(|line| ZfsError::Output { what: "zfs holds".into(), line })?;
        Ok(read.into_iter().map(|(_, tag)| tag).collect())
    }

    /// `zfs set`.
    pub async fn set(&self, dataset: &Dataset, property: &Property) -> Result<(), ZfsError> {
        self.zfs(["set", &property.argument(), dataset.as_str()]).await.map(drop)
    }

    /// `zfs set` of a user property of a snapshot.
    pub async fn set_snapshot(&self, snapshot: &Snapshot, property: &Property) -> Result<(), ZfsError> {
        self.zfs(["set", &property.argument(), &snapshot.to_string()]).await.map(drop)
    }

    /// `zfs get` of a file system alone. `names` are properties' names.
    pub async fn get(&self, dataset: &Dataset, names: &[&str]) -> Result<Properties, ZfsError> {
        self.zfs_get(dataset, names, false).await
    }

    /// `zfs get -r`: of it, everything below it, and all snapshots, in one call. Sizes are in bytes. (`zfs list -p` is
    /// missing in zfs-fuse; this both have.)
    pub async fn get_all(&self, dataset: &Dataset, names: &[&str]) -> Result<Properties, ZfsError> {
        self.zfs_get(dataset, names, true).await
    }

    async fn zfs_get(&self, dataset: &Dataset, names: &[&str], below: bool) -> Result<Properties, ZfsError> {
        let (how, names) = (if below { "-rHp" } else { "-Hp" }, names.join(","));
        let text = self.zfs(["get", how, "-o", "name,property,value,source", &names, dataset.as_str()]).await?;
        parse::properties(&text).map_err(|line| ZfsError::Output { what: format!("zfs get {names}"), line })
    }

    /// The name of a property that a stream has set on a file system, on something below it, or on a snapshot; none is None.
    pub async fn received_property(&self, dataset: &Dataset) -> Result<Option<String>, ZfsError> {
        let args = ["get", "-rH", "-s", "received", "-o", "property", "all", dataset.as_str()];
        Ok(self.zfs(args).await?.lines().next().map(str::to_owned))
    }

    /// `zfs mount`: where its mountpoint property says. Mounted already is success: `zfs clone` of zfs-fuse mounts, too,
    /// whatever canmount says.
    pub async fn mount(&self, dataset: &Dataset) -> Result<(), ZfsError> {
        match self.zfs(["mount", dataset.as_str()]).await {
            Err(e) if e.reason() == Reason::Mounted => Ok(()),
            done => done.map(drop),
        }
    }

    /// `zfs unmount`.
    pub async fn unmount(&self, dataset: &Dataset) -> Result<(), ZfsError> {
        self.zfs(["unmount", dataset.as_str()]).await.map(drop)
    }

    /// `zfs diff -FHt` between a snapshot and a later one, or the file system as it is. OpenZFS only; what is compared
    /// has to be mounted.
    pub async fn diff(&self, from: &Snapshot, to: &str) -> Result<Vec<(Change, char, std::path::PathBuf)>, ZfsError> {
        self.needs_kernel("zfs diff")?;
        let to: String = match to.contains('@') {
            true => to.parse::<Snapshot>()?.to_string(),
            false => to.parse::<Dataset>()?.to_string(),
        };
        let text = self.zfs(["diff", "-FHt", &from.to_string(), &to]).await?;
        parse::diff(&text).map_err(|line| ZfsError::Output { what: "zfs diff".into(), line })
    }

    fn needs_kernel(&self, what: &'static str) -> Result<(), ZfsError> {
        match self.flavor {
            Flavor::Kernel(..) => Ok(()),
            Flavor::Fuse => Err(ZfsError::Unsupported { what, version: self.flavor.describe() }),
        }
    }

    /// `zfs send` into `out`: all of the snapshot, or what is new since `base`.
    pub async fn send(&self, base: Option<&Snapshot>, snapshot: &Snapshot, out: OwnedFd) -> Result<(), ZfsError> {
        let (base, snapshot) = (base.map(ToString::to_string), snapshot.to_string());
        let since = base.iter().flat_map(|b| ["-i", b.as_str()]);
        let args = ["send"].into_iter().chain(since).chain([snapshot.as_str()]);
        self.stream(self.spawn(&self.config.zfs, args).stdout_to(out)).await
    }

    /// Whether streams into this pool can be gone on with where they were cut: OpenZFS, and the pool's feature is on.
    pub async fn resumes(&self, pool: &str) -> Result<bool, ZfsError> {
        if self.flavor == Flavor::Fuse {
            return Ok(false);
        }
        let text = self.zpool(["get", "-H", "-o", "value", "feature@extensible_dataset", pool]).await?;
        Ok(parse::feature_on(&text))
    }

    /// `receive_resume_token`: where the stream into this file system was cut. None: it is whole, or was never begun.
    pub async fn resume_token(&self, dataset: &Dataset) -> Result<Option<ResumeToken>, ZfsError> {
        let told = self.get(dataset, &[RESUME_TOKEN]).await?;
        let text = told.get(dataset.as_str()).and_then(|p| p.get(RESUME_TOKEN));
        text.map(|v| v.text.parse().map_err(ZfsError::from)).transpose()
    }

    /// `zfs send -nvt`: which snapshot a token is about. Fails when this pool can't go on with it: its snapshots are gone, or
    /// others by now.
    pub async fn read_token(&self, token: &ResumeToken) -> Result<TokenContents, ZfsError> {
        self.needs_kernel("resumable streams")?;
        let text = self.zfs(["send", "-nvt", token.as_str()]).await?;
        parse::token(&text).map_err(|line| ZfsError::Output { what: "zfs send -nvt".into(), line })
    }

    /// `zfs send -t` into `out`: the rest of a stream that was cut.
    pub async fn send_rest(&self, token: &ResumeToken, out: OwnedFd) -> Result<(), ZfsError> {
        self.needs_kernel("resumable streams")?;
        self.stream(self.spawn(&self.config.zfs, ["send", "-t", token.as_str()]).stdout_to(out)).await
    }

    /// `zfs receive` from `input`, not mounted. An incremental stream finds its base by itself. `keep`: what came before a
    /// stream is cut stays, and has a [`Self::resume_token`]; only where the pool [`Self::resumes`].
    pub async fn receive(&self, dataset: &Dataset, input: OwnedFd, keep: bool) -> Result<(), ZfsError> {
        let args = match self.flavor {
            Flavor::Kernel(..) if keep => vec!["receive", "-s", "-u", dataset.as_str()],
            Flavor::Kernel(..) => vec!["receive", "-u", dataset.as_str()],
            // It has no -u; with canmount=noauto it mounts nothing either.
            Flavor::Fuse => vec!["receive", dataset.as_str()],
        };
        self.stream(self.spawn(&self.config.zfs, args).stdin_from(input)).await
    }

    /// State of the pool; None: it is not imported. Of the kernel's pools it is read from a file, without a process and
    /// without waiting for a pool that hangs.
    pub async fn pool_state(&self, pool: &str) -> Result<Option<PoolState>, ZfsError> {
        let told = |text: &str| {
            parse::pool_state(text)
                .map(Some)
                .map_err(|line| ZfsError::Output { what: format!("state of pool {pool}"), line })
        };
        if let Flavor::Kernel(..) = self.flavor {
            match std::fs::read_to_string(format!("{KSTAT}/{pool}/state")) {
                Ok(text) => return told(&text),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && Utf8PathBuf::from(KSTAT).is_dir() => {
                    return Ok(None);
                }
                Err(_) => {}
            }
        }
        let asked = self.spawn(&self.config.zpool, ["list", "-H", "-o", "health", pool]);
        match self.run_in(&self.health, asked, self.config.deadline).await {
            Ok(text) => told(&text),
            Err(e) if e.reason() == Reason::NoPool => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn arguments(properties: &[Property]) -> Vec<String> {
    properties.iter().map(Property::argument).collect()
}

/// `-o` before each.
fn options(properties: &[String]) -> impl Iterator<Item = &str> {
    properties.iter().flat_map(|p| ["-o", p.as_str()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    async fn zfs(script: &str) -> (tempfile::TempDir, Zfs) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = Utf8PathBuf::from_path_buf(dir.path().join("zfs")).expect("utf8");
        let version = "[ \"$1\" != version ] || { echo zfs-2.3.9-1; echo zfs-kmod-2.3.9-1; exit; }";
        let text = format!("#!/bin/sh\n{version}\n{script}\n");
        let durability = crate::utils::atomic::Durability::Process;
        crate::utils::atomic::write(path.as_std_path(), text.as_bytes(), 0o755, durability).expect("a program");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("mode");
        let config =
            ZfsConfig { zfs: path.clone(), zpool: path, deadline: Duration::from_secs(2), ..Default::default() };
        let zfs = Zfs::probe(config).await.expect("probe");
        (dir, zfs)
    }

    #[tokio::test]
    async fn arguments_are_given_one_by_one() {
        let (_dir, zfs) = zfs("for a; do echo \"<$a>\"; done >&2; exit 1").await;
        assert_eq!(zfs.flavor(), Flavor::Kernel(2, 3));
        let origin = "t/a@ready".parse().expect("name");
        let property = Property::new("lxcri:x", "a b").expect("property");
        let e = zfs.clone_snapshot(&origin, &"t/c".parse().expect("name"), &[property]).await.expect_err("told");
        assert!(e.to_string().contains("clone -o \"lxcri:x=a b\" t/a@ready t/c: <clone>"), "{e}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_queue_is_bounded_and_a_hang_ends() {
        let (dir, zfs) = zfs("read x < \"${0%/*}/go\"; exit 0").await;
        let fifo = dir.path().join("go");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("fifo");
        let dataset: Dataset = "t/a".parse().expect("name");
        let mut calls: Vec<_> = (0..AT_ONCE + MAX_WAITING + 10).map(|_| Box::pin(zfs.destroy(&dataset))).collect();
        let mut refused = 0;
        for call in &mut calls {
            if let Some(Err(ZfsError::QueueFull { .. })) = futures::future::poll_immediate(call).await {
                refused += 1;
            }
        }
        assert_eq!(refused, 10);
        // Never written to: whoever runs is ended by the deadline.
        let e = calls.swap_remove(0).await.expect_err("a hang");
        assert!(matches!(e, ZfsError::Spawn(crate::utils::process::SpawnError::Deadline { .. })), "{e}");
        drop(calls);
    }
    #[tokio::test(flavor = "multi_thread")]
    async fn streams_leave_the_queue_to_others_and_waiting_ends() {
        let (_dir, zfs) = zfs("[ \"$1\" != send ] || exec sleep 1000; exit 0").await;
        let snapshot: Snapshot = "t/a@ready".parse().expect("name");
        let send = || {
            let out = std::fs::File::create("/dev/null").expect("a file");
            Box::pin(zfs.send(None, &snapshot, out.into()))
        };
        let mut streams: Vec<_> = (0..STREAMS_AT_ONCE).map(|_| send()).collect();
        for stream in &mut streams {
            assert!(futures::future::poll_immediate(stream).await.is_none());
        }
        zfs.destroy(&"t/b".parse().expect("name")).await.expect("a short operation beside them");
        let e = send().await.expect_err("no place");
        assert!(matches!(e, ZfsError::Busy { .. }), "{e}");
        assert_eq!(crate::core::error::Error::from(e).kind(), crate::core::error::Kind::ResourceExhausted);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_for_a_turn_waits_within_the_deadline() {
        let (_dir, zfs) = zfs("exec sleep 1000").await;
        let dataset: Dataset = "t/a".parse().expect("name");
        let mut first: Vec<_> = (0..AT_ONCE).map(|_| Box::pin(zfs.destroy(&dataset))).collect();
        for call in &mut first {
            assert!(futures::future::poll_immediate(call).await.is_none());
        }
        // Nobody polls those on: their places stay taken.
        let waited = tokio::time::timeout(Duration::from_secs(30), zfs.destroy(&dataset)).await.expect("an end");
        assert!(matches!(waited, Err(ZfsError::Busy { .. })), "{waited:?}");
        // Who gets a place late has what is left.
        let asked = Instant::now();
        let mut late = Box::pin(zfs.destroy(&dataset));
        assert!(futures::future::poll_immediate(&mut late).await.is_none());
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(first);
        let e = late.await.expect_err("a hang");
        assert!(matches!(e, ZfsError::Spawn(crate::utils::process::SpawnError::Deadline { .. })), "{e}");
        assert!(asked.elapsed() < Duration::from_millis(2800), "{:?}", asked.elapsed());
    }
}
