//! Overlay mounts that are attached nowhere yet: fsopen, fsconfig, fsmount; the old mount(2) on older kernels.
//!
//! Called by the store on a blocking thread. The result is a descriptor for move_mount(2); dropped, the mount is gone.
//! Fails with [`MountError`] carrying the kernel's own words where it has some. A crash leaves at most a folder of links
//! in the store's `tmp/`.
#![allow(unsafe_code)] // unshare(2) of the thread that mounts the old way

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount as mount_now, mount_change,
    open_tree, unmount,
};

use crate::core::error::Error;
use crate::utils::beneath;

/// Longest value that fsconfig(2) takes.
const MAX_VALUE: usize = 255;

/// What is to be mounted.
pub(super) struct Request {
    /// Top first.
    pub lowers: Vec<Utf8PathBuf>,
    /// What is written, and where; None: read-only, and nothing in it runs, is a device or has privileges.
    pub writable: Option<Writable>,
    /// Where a folder for the time of the call may be made.
    pub scratch: Utf8PathBuf,
    /// The old way at once.
    pub legacy: bool,
}

/// Folders of a mount that can be written.
pub(super) struct Writable {
    /// What the container writes.
    pub upper: Utf8PathBuf,
    /// overlayfs's own work folder beside it.
    pub work: Utf8PathBuf,
}

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
#[error("overlay mount: {step} failed{words}")]
pub(super) struct MountError {
    step: &'static str,
    /// "" or what the kernel said, after ": ".
    words: String,
    #[source]
    source: io::Error,
}

impl From<MountError> for Error {
    fn from(e: MountError) -> Self {
        let kind = Error::io("", io::Error::from_raw_os_error(e.source.raw_os_error().unwrap_or(0))).kind();
        Error::because(kind, e.to_string(), e.source)
    }
}

fn failed(step: &'static str) -> impl Fn(Errno) -> MountError {
    move |e| MountError { step, words: String::new(), source: e.into() }
}

/// Mounts; see the module's words.
pub(super) fn mount(request: &Request) -> Result<OwnedFd, MountError> {
    if let Some(writable) = &request.writable {
        // A volatile overlay refuses to be mounted again lest a crash lost writes; the store knows there was none.
        let mark = writable.work.join("work/incompat");
        beneath::remove_tree(mark.as_std_path()).map_err(|source| MountError {
            step: "clearing the last mount's mark",
            words: String::new(),
            source,
        })?;
    }
    if request.legacy || request.lowers.iter().any(|l| l.as_str().len() > MAX_VALUE) {
        return legacy(request);
    }
    match modern(request) {
        Err(e) if e.step == ADD_LAYER && matches!(e.source.raw_os_error(), Some(libc::EINVAL)) => legacy(request),
        done => done,
    }
}

const ADD_LAYER: &str = "adding a layer";

fn modern(request: &Request) -> Result<OwnedFd, MountError> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    let explained = |step: &'static str| {
        let fs = &fs;
        move |e: Errno| MountError { step, words: kernel_words(fs), source: e.into() }
    };
    fsconfig_set_string(&fs, "source", "lxcri").map_err(explained("naming it"))?;
    for lower in &request.lowers {
        fsconfig_set_string(&fs, "lowerdir+", lower.as_std_path()).map_err(explained(ADD_LAYER))?;
    }
    if let Some(Writable { upper, work }) = &request.writable {
        fsconfig_set_string(&fs, "upperdir", upper.as_std_path()).map_err(explained("setting the upper folder"))?;
        fsconfig_set_string(&fs, "workdir", work.as_std_path()).map_err(explained("setting the work folder"))?;
    }
    // Lower layers are shared and never change: no index of them is needed, and none may outlive the mount.
    for (key, value) in [("index", "off"), ("metacopy", "off")] {
        fsconfig_set_string(&fs, key, value).map_err(explained("setting an option"))?;
    }
    let attributes = match request.writable {
        Some(_) => {
            fsconfig_set_flag(&fs, "volatile").map_err(explained("setting volatile"))?;
            MountAttrFlags::empty()
        }
        None => {
            MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC
        }
    };
    fsconfig_create(&fs).map_err(explained("creating it"))?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(explained("fsmount"))
}

/// What the kernel has to say about the last failure of `fs`.
fn kernel_words(fs: &OwnedFd) -> String {
    let mut words = String::new();
    let mut buffer = [0; 1024];
    while let Ok(n) = rustix::io::read(fs, &mut buffer) {
        if n == 0 || words.len() > 2000 {
            break;
        }
        words.push_str(": ");
        words.push_str(String::from_utf8_lossy(&buffer[..n]).trim_start_matches("e ").trim());
    }
    words
}

/// mount(2) in a mount namespace of a thread of its own, so that nobody sees it, then a detached copy. Options have to
/// fit into one page: layers are named by short links in a folder that the thread stands in.
fn legacy(request: &Request) -> Result<OwnedFd, MountError> {
    let folder = request.scratch.join(format!("mount-{}", uuid::Uuid::new_v4().simple()));
    let io = |step| move |source| MountError { step, words: String::new(), source };
    std::fs::create_dir(&folder).map_err(io("making a folder of links"))?;
    let done = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("overlay-mount".into());
        let thread = thread.spawn_scoped(scope, || legacy_thread(request, &folder)).map_err(io("starting a thread"))?;
        thread.join().unwrap_or_else(|_| Err(io("the mounting thread")(io::Error::other("it panicked"))))
    });
    if let Err(error) = beneath::remove_tree(folder.as_std_path()) {
        tracing::warn!(%folder, %error, "a folder of links can't be removed");
    }
    done
}

fn legacy_thread(request: &Request, folder: &Utf8Path) -> Result<OwnedFd, MountError> {
    let io = |step| move |source| MountError { step, words: String::new(), source };
    let links = request.lowers.iter().chain(request.writable.iter().flat_map(|w| [&w.upper, &w.work]));
    for (n, target) in links.enumerate() {
        std::os::unix::fs::symlink(target, folder.join(format!("{n}"))).map_err(io("making a link"))?;
    }
    let target = folder.join("m");
    std::fs::create_dir(&target).map_err(io("making a folder"))?;
    // SAFETY: this thread was made for this call and ends after it; it shares nothing that depends on its mount
    // namespace or working folder.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::FS) }
        .map_err(failed("a mount namespace of its own"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("making its mounts private"))?;
    rustix::process::chdir(folder.as_std_path()).map_err(failed("entering the folder of links"))?;
    let count = request.lowers.len();
    let lowers: Vec<String> = (0..count).map(|n| n.to_string()).collect();
    let mut options = format!("lowerdir={},index=off,metacopy=off", lowers.join(":"));
    let mut flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if request.writable.is_some() {
        options += &format!(",upperdir={count},workdir={},volatile", count + 1);
        flags = MountFlags::empty();
    }
    let options = CString::new(options).map_err(|e| io("its options")(e.into()))?;
    mount_now("lxcri", "m", "overlay", flags, Some(options.as_c_str())).map_err(failed("mount(2)"))?;
    let fd = open_tree(CWD, "m", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .map_err(failed("open_tree"));
    let _ = unmount("m", UnmountFlags::DETACH);
    fd
}
