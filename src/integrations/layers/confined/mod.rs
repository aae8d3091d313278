//! Decompressing and unpacking in processes of their own that can touch nothing but the layer.
//!
//! Layers are made by strangers and read by code that has to be fast: whoever finds a hole in it must gain nothing. So
//! the daemon only copies and hashes the bytes. One process decompresses (it sees a pipe on either side and nothing
//! else), another one unpacks into a view of the layer's folder, which is its root and in which no device opens;
//! [`walls`] has what they give up before they read the first byte. The daemon compares both digests itself, so that
//! neither process can pass off one layer as another.
//!
//! Called by the layer stores (unpack), the pipeline and the archive loader (decompress), on blocking threads. Fails by
//! name: what the layer did wrong as the unpacker tells it, a process that died with its signal, one that took nothing
//! for [`Confined::patience`] as DeadlineExceeded, after killing it. A crash of the daemon ends both at their pipes' end.

mod child;
mod feed;
mod report;
pub mod walls;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message;
use rustix::fs::OFlags;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::feed::{Fed, feed};
use self::report::Report;
use super::pipeline::{Compression, decode};
use super::unpack::{Limits, Unpacked, Whiteouts, unpack};
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::StorageTrouble;
use crate::integrations::mountattr;
use crate::utils::process::{Output, Spawn, SpawnError};
use crate::utils::tasks::TaskSet;

pub use self::child::entry;
pub use self::walls::Landlock;

/// This program under a name that an upgrade does not change.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// Longest report of an unpacker in bytes: names of folders without an entry of their own, for the most part.
const MAX_REPORT: usize = 40 << 20;
/// Bytes that may wait in a pipe.
const PIPE: usize = 1 << 20;
/// No layer takes so long; that one goes on is seen by its progress.
const WHOLE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a process may take nothing before it is killed: a pool may well stop for a minute.
const PATIENCE: Duration = Duration::from_secs(300);

/// Set by [`entry`]: this program can be started as an unpacker.
static ANSWERS: AtomicBool = AtomicBool::new(false);

/// Who unpacks.
#[derive(Debug, Clone, Default)]
pub enum Unpacker {
    /// The calling thread, with all that this process may do.
    #[default]
    Here,
    /// Processes of their own.
    Confined(Arc<Confined>),
}

/// How those processes are started.
#[derive(Debug)]
pub struct Confined {
    /// The program, absolute: one whose `main` calls [`entry`].
    pub program: String,
    /// Unpack nothing where the kernel lacks Landlock.
    pub require_landlock: bool,
    /// What the kernel has of it, as a probe found.
    pub landlock: Landlock,
    /// How long one may take nothing.
    pub patience: Duration,
    /// Owns them.
    pub tasks: TaskSet,
}

/// Where a layer is unpacked.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// A folder.
    Folder(&'a Path),
    /// The root of a mount that is attached nowhere, and of this unpacking alone.
    Mount(&'a OwnedFd),
}

impl Place<'_> {
    /// The folder, in a view in which no device opens, no program is privileged and none starts.
    fn view(self) -> io::Result<OwnedFd> {
        let closed = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
        let view = match self {
            Place::Folder(path) => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                open_tree(rustix::fs::CWD, path, flags)?
            }
            // Kernels before 6.15 can't copy a mount that is attached nowhere.
            Place::Mount(mount) => mount.as_fd().try_clone_to_owned()?,
        };
        mountattr::set(&view, closed, None, false)?;
        Ok(view)
    }
}

impl Confined {
    /// Starts a process to see whether this works here. Fails with what does not.
    pub async fn probe(program: Option<String>, require_landlock: bool, tasks: TaskSet) -> Result<Self> {
        let program = match program {
            Some(program) => program,
            None if ANSWERS.load(Ordering::Relaxed) => OWN_PROGRAM.into(),
            None => {
                return Err(Error::precondition(
                    "this program can't unpack layers in a process of its own: its main has to call daemon::entry first, or \
                     images.unpacker_path has to name the program proxmox-lxcri",
                ));
            }
        };
        let output = Spawn::new(&program, [child::PROBE]).deadline(Duration::from_secs(30)).run_ok().await;
        let output = output.map_err(|e| Error::from(e).context("starting an unpacking process"))?;
        let report = Report::decode(output.stdout.as_slice())
            .map_err(|e| Error::because(Kind::FailedPrecondition, format!("{program} is no unpacker"), e))?;
        if let Some(failure) = report.failure {
            return Err(Error::because(Kind::FailedPrecondition, "confining an unpacking process", failure.message));
        }
        let landlock = Landlock::from_number(report.landlock);
        Ok(Self { program, require_landlock, landlock, patience: PATIENCE, tasks })
    }

    fn start(&self, spawn: Spawn) -> Result<(Running, OwnedFd)> {
        if self.require_landlock && self.landlock == Landlock::Absent {
            return Err(Error::precondition(
                "images.unpack_sandbox is \"required\" and this kernel has no Landlock: no layer is unpacked",
            ));
        }
        let (read, write) = pipe().map_err(|e| Error::io("making a pipe to an unpacking process", e))?;
        rustix::fs::fcntl_setfl(&write, OFlags::NONBLOCK)
            .map_err(|e| Error::io("making a pipe to an unpacking process", e.into()))?;
        let (tell, outcome) = oneshot::channel();
        let cancel = CancellationToken::new();
        let (cancelled, all) = (cancel.clone(), self.tasks.token().clone());
        let spawn = spawn.stdin_from(read).deadline(WHOLE).stdout_cap(MAX_REPORT);
        self.tasks.spawn("unpacking process", async move {
            let done = tokio::select! {
                done = spawn.run() => Some(done),
                () = cancelled.cancelled() => None,
                () = all.cancelled() => None,
            };
            // With it goes our copy of the pipes' other ends: their readers see the end only now, when it is known.
            drop(spawn);
            let _ = tell.send(done);
        });
        Ok((Running { outcome: Some(outcome), _end: cancel.drop_guard() }, write))
    }

    fn unpack(&self, place: Place<'_>, tar: &mut dyn Read, whiteouts: Whiteouts, limits: &Limits) -> Result<Unpacked> {
        let view = place.view().map_err(|e| Error::io("making a view of the layer's folder", e))?;
        let passed = view.as_fd().try_clone_to_owned().map_err(|e| Error::io("the layer's folder", e))?;
        let arguments = child::unpack_arguments(passed.as_raw_fd(), whiteouts, limits);
        let (mut running, input) = self.start(Spawn::new(&self.program, arguments).pass(passed))?;
        let fed = feed(tar, &input, self.patience, None);
        drop(input);
        match fed {
            Err(Fed::Source(source)) => {
                // Its input has ended, and so does it: until then it could still write where the caller removes.
                let _ = running.wait(self.patience);
                return Err(Error::because(Kind::Internal, "unpacking failed: layer can't be read", source));
            }
            Err(Fed::Stalled) => return Err(self.stalled()),
            // It has ended, and said why.
            Ok(()) | Err(Fed::Gone) => {}
        }
        let Some(done) = running.wait(self.patience) else { return Err(self.stalled()) };
        let report = Report::decode(ended(done)?.stdout.as_slice())
            .map_err(|e| Error::because(Kind::Internal, "an unpacking process gave no report", e))?;
        if matches!(fed, Err(Fed::Gone)) && report.failure.is_none() {
            return Err(Error::internal("an unpacking process ended before its layer did"));
        }
        report.accept(view)
    }

    fn decompress(
        &self,
        how: Compression,
        window: u32,
        source: Box<dyn Read + Send>,
    ) -> io::Result<Box<dyn Read + Send>> {
        let (read, write) = pipe()?;
        rustix::fs::fcntl_setfl(&read, OFlags::NONBLOCK)?;
        let spawn = Spawn::new(&self.program, child::decompress_arguments(how, window)).stdout_to(write);
        let (running, input) = self.start(spawn).map_err(io::Error::other)?;
        feed::Decompressed::new(source, input, read, running, self.patience).map(|d| Box::new(d) as _)
    }

    fn stalled(&self) -> Error {
        let waited = self.patience.as_secs_f32();
        Error::new(Kind::DeadlineExceeded, format!("an unpacking process took nothing for {waited} s, killed"))
    }
}

/// A process that was started; killed when this is dropped before its end.
struct Running {
    outcome: Option<oneshot::Receiver<Option<Result<Output, SpawnError>>>>,
    _end: DropGuard,
}

impl Running {
    /// How it ended: None if it does not, within `patience`.
    fn wait(&mut self, patience: Duration) -> Option<Result<Output>> {
        let outcome = self.outcome.take()?;
        let runtime = Handle::try_current().ok()?;
        let told = runtime.block_on(async { tokio::time::timeout(patience, outcome).await }).ok()?;
        Some(match told {
            Ok(Some(done)) => done.map_err(Error::from),
            Ok(None) | Err(_) => Err(Error::new(Kind::Aborted, "unpacking was ended")),
        })
    }
}

/// A process that ended as it should; what else became of it is an error.
fn ended(done: Result<Output>) -> Result<Output> {
    use std::os::unix::process::ExitStatusExt;
    let output = done?;
    if output.success() {
        return Ok(output);
    }
    let how = match output.status.signal() {
        Some(signal) => format!("was killed by signal {signal}"),
        None => format!("ended with status {}", output.code().unwrap_or(-1)),
    };
    let said = report::printable(&output.stderr);
    Err(Error::internal(format!("an unpacking process {how}{}{said}", if said.is_empty() { "" } else { ": " })))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Small ones are slower, not wrong.
    let _ = fcntl_setpipe_size(&write, PIPE);
    Ok((read, write))
}

impl Unpacker {
    /// Unpacks an uncompressed layer, read to its end, as [`unpack`] does.
    pub fn unpack(
        &self,
        place: Place<'_>,
        mut tar: impl Read,
        whiteouts: Whiteouts,
        limits: &Limits,
    ) -> Result<Unpacked> {
        match (self, place) {
            (Self::Confined(confined), _) => confined.unpack(place, &mut tar, whiteouts, limits),
            (Self::Here, Place::Folder(path)) => Ok(unpack(path, tar, whiteouts, limits)?),
            (Self::Here, Place::Mount(mount)) => {
                let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
                Ok(unpack(Path::new(&path), tar, whiteouts, limits)?)
            }
        }
    }

    /// What `source` is when decompressed. Reading fails with what the decoder, its process or the source says.
    /// `window`: the largest one of zstd, as a power of two.
    pub fn decompress(
        &self,
        how: Compression,
        window: u32,
        source: Box<dyn Read + Send>,
    ) -> io::Result<Box<dyn Read + Send>> {
        match self {
            Self::Confined(confined) => confined.decompress(how, window, source),
            Self::Here => decode(how, window, io::BufReader::with_capacity(128 << 10, source)),
        }
    }

    /// What is weaker than it could be; None: nothing.
    pub fn weakness(&self) -> Option<StorageTrouble> {
        match self {
            Self::Here => Some(StorageTrouble {
                reason: "SandboxOff".into(),
                message: "layers are unpacked by the daemon itself (images.unpack_sandbox is \"off\")".into(),
                blocks: false,
            }),
            Self::Confined(c) if c.landlock == Landlock::Absent => Some(StorageTrouble {
                reason: "NoLandlock".into(),
                message: format!(
                    "this kernel has no Landlock: layers are {}",
                    if c.require_landlock {
                        "not unpacked"
                    } else {
                        "unpacked with seccomp, chroot and few capabilities"
                    }
                ),
                blocks: c.require_landlock,
            }),
            Self::Confined(_) => None,
        }
    }
}
