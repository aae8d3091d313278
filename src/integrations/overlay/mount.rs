//! Overlay mounts that are attached nowhere yet: fsopen, fsconfig, fsmount; the old mount(2) on older kernels. For a pod
//! with a user namespace the lower layers are idmapped, since an overlay as a whole can't be.
//!
//! Called by the store on a blocking thread. The result is a descriptor for move_mount(2); dropped, the mount is gone.
//! Fails with [`MountError`] carrying the kernel's own words where it has some. A crash leaves at most a folder of links
//! in the store's `tmp/`.
#![allow(unsafe_code)] // unshare(2) of the thread that mounts the old way

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount as mount_now, mount_change,
    open_tree, unmount,
};

use crate::core::error::Error;
use crate::core::spec::UserNamespace;
use crate::integrations::idmap::{self, IdmapError, Maps};
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
    /// Id maps of the lower layers; what the upper folder holds has the ids on the other side already.
    pub user: Option<UserNamespace>,
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
        if e.source.get_ref().is_some_and(|inner| inner.is::<IdmapError>()) {
            let MountError { step, source, .. } = e;
            let inner = source.into_inner().and_then(|inner| inner.downcast::<IdmapError>().ok());
            return inner
                .map_or_else(|| Error::internal(step), |e| Error::from(*e).context(format!("overlay mount: {step}")));
        }
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
        beneath::remove_tree(mark.as_std_path()).map_err(io("clearing the last mount's mark"))?;
    }
    if let Some(user) = &request.user {
        return idmapped(request, user);
    }
    if request.legacy || request.lowers.iter().any(|l| l.as_str().len() > MAX_VALUE) {
        return legacy(request);
    }
    match modern(request, request.lowers.iter().map(|l| l.as_str())) {
        Err(e) if e.lacks_way() => legacy(request),
        done => done,
    }
}

impl MountError {
    /// The kernel does not take layers one by one.
    fn lacks_way(&self) -> bool {
        self.step == ADD_LAYER && self.source.raw_os_error() == Some(libc::EINVAL)
    }
}

const ADD_LAYER: &str = "adding a layer";

fn modern<'a>(request: &Request, lowers: impl Iterator<Item = &'a str>) -> Result<OwnedFd, MountError> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    let explained = |step: &'static str| {
        let fs = &fs;
        move |e: Errno| MountError { step, words: kernel_words(fs), source: e.into() }
    };
    fsconfig_set_string(&fs, "source", "lxcri").map_err(explained("naming it"))?;
    for lower in lowers {
        fsconfig_set_string(&fs, "lowerdir+", lower).map_err(explained(ADD_LAYER))?;
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
    std::fs::create_dir(&folder).map_err(io("making a folder of links"))?;
    let done = in_thread(|| {
        own_namespace()?;
        enter(&folder)?;
        for (n, lower) in request.lowers.iter().enumerate() {
            rustix::fs::symlink(lower.as_std_path(), n.to_string()).map_err(failed("making a link"))?;
        }
        by_options(request)
    });
    if let Err(error) = beneath::remove_tree(folder.as_std_path()) {
        tracing::warn!(%folder, %error, "a folder of links can't be removed");
    }
    done
}

/// The lower layers as idmapped mounts in a mount namespace of a thread of its own, on a tmpfs that is seen there only:
/// kernels before 6.15 take no layers that are attached nowhere. The overlay keeps copies of them; all else ends with
/// the thread.
fn idmapped(request: &Request, user: &UserNamespace) -> Result<OwnedFd, MountError> {
    in_thread(|| {
        let other = |e: IdmapError| io("idmapping a layer")(io::Error::other(e));
        let maps = Maps::new(user).map_err(other)?;
        own_namespace()?;
        // Copies first: the tmpfs may hide what the layers are reached by.
        let mounts = request.lowers.iter().map(|lower| maps.mount(lower.as_std_path(), false));
        let mounts = mounts.collect::<Result<Vec<_>, _>>().map_err(other)?;
        mount_now("lxcri", request.scratch.as_std_path(), "tmpfs", MountFlags::empty(), None)
            .map_err(failed("a tmpfs for the layers"))?;
        enter(&request.scratch)?;
        for (n, mount) in mounts.into_iter().enumerate() {
            let name = n.to_string();
            rustix::fs::mkdir(name.as_str(), Mode::RWXU).map_err(failed("making a folder"))?;
            idmap::attach(mount, CWD, &name).map_err(other)?;
        }
        let names: Vec<String> = (0..request.lowers.len()).map(|n| n.to_string()).collect();
        if request.legacy {
            return by_options(request);
        }
        match modern(request, names.iter().map(String::as_str)) {
            Err(e) if e.lacks_way() => by_options(request),
            done => done,
        }
    })
}

fn io(step: &'static str) -> impl Fn(io::Error) -> MountError {
    move |source| MountError { step, words: String::new(), source }
}

/// A thread's mount namespace and working folder are changed by `work`, so it is never one of a pool.
fn in_thread(work: impl FnOnce() -> Result<OwnedFd, MountError> + Send) -> Result<OwnedFd, MountError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("overlay-mount".into());
        let thread = thread.spawn_scoped(scope, work).map_err(io("starting a thread"))?;
        thread.join().unwrap_or_else(|_| Err(io("the mounting thread")(io::Error::other("it panicked"))))
    })
}

fn own_namespace() -> Result<(), MountError> {
    // SAFETY: the calling thread was made for one mount and ends after it; it shares nothing that depends on its mount
    // namespace or working folder.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::FS) }
        .map_err(failed("a mount namespace of its own"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("making its mounts private"))
}

fn enter(folder: &Utf8Path) -> Result<(), MountError> {
    rustix::process::chdir(folder.as_std_path()).map_err(failed("entering a folder"))
}

/// In the thread's working folder, where the lower layers are named 0, 1 and so on.
fn by_options(request: &Request) -> Result<OwnedFd, MountError> {
    let count = request.lowers.len();
    if let Some(Writable { upper, work }) = &request.writable {
        for (n, target) in [(count, upper), (count + 1, work)] {
            rustix::fs::symlink(target.as_std_path(), n.to_string()).map_err(failed("making a link"))?;
        }
    }
    rustix::fs::mkdir("m", Mode::RWXU).map_err(failed("making a folder"))?;
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
