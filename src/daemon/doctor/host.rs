//! What `doctor` looks at: files below a root, which tests make their own, and the clock.

use std::io;
use std::time::SystemTime;

use camino::{Utf8Path, Utf8PathBuf};

/// A host.
pub struct Host {
    root: Utf8PathBuf,
    /// What time it thinks it is.
    pub now: SystemTime,
    /// Whether something keeps its clock right; None: not known.
    pub synchronized: Option<bool>,
    /// Release of the kernel: "6.17.2-1-pve".
    pub release: String,
}

impl Host {
    /// The one that we run on.
    pub fn this() -> Self {
        Self {
            root: "/".into(),
            now: SystemTime::now(),
            synchronized: synchronized(),
            release: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }

    /// One whose files are below `root`, all else as it should be: what tests plant faults in.
    pub fn at(root: &Utf8Path) -> Self {
        let release = "6.17.2-1-pve".into();
        Self { root: root.to_owned(), now: SystemTime::now(), synchronized: Some(true), release }
    }

    /// Where a path of the host is.
    pub fn path(&self, path: impl AsRef<Utf8Path>) -> Utf8PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A small file's text.
    pub fn read(&self, path: &str) -> io::Result<String> {
        std::fs::read_to_string(self.path(path))
    }

    /// A file's number, as those of /proc/sys are.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.read(path).ok()?.trim().parse().ok()
    }

    /// Whether something is there.
    pub fn has(&self, path: impl AsRef<Utf8Path>) -> bool {
        self.path(path).try_exists().unwrap_or(false)
    }
}

/// What the kernel was told of its clock (adjtimex(2)).
#[allow(unsafe_code)] // no crate that we have wraps it
fn synchronized() -> Option<bool> {
    // SAFETY: all zeros is a timex that asks and sets nothing; the kernel writes within it.
    let state = unsafe {
        let mut asked: libc::timex = std::mem::zeroed();
        libc::adjtimex(&mut asked)
    };
    match state {
        -1 => None,
        state => Some(state != libc::TIME_ERROR),
    }
}
