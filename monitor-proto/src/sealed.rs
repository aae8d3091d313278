//! Copies of programs in memory that nobody can change: what a container may be able to write to (by /proc/self/exe of what enters
//! it, CVE-2019-5736) is such a copy and not the node's file. OCI runtimes make one at each of their starts, unless they run from
//! one already.
//!
//! Used by the monitor for its pod's init, and by the daemon for the OCI runtime, of which it lends one copy to all monitors. A crash leaves
//! nothing: the memory goes with the last descriptor and process.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

/// All that can be forbidden.
const SEALS: SealFlags = SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);
/// How often sealing is tried again, and how long after the last time.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);
/// MFD_EXEC of memfd_create(2), which kernels before 6.3 do not know; where sysctl vm.memfd_noexec is set it is what permits execution.
const EXEC: MemfdFlags = MemfdFlags::from_bits_retain(0x10);

/// A copy of a program, open for reading and executing. `name` is what the kernel shows. Fails with the I/O error, also where the node forbids
/// executing memory (sysctl vm.memfd_noexec=2).
pub fn copy(name: &str, mut program: File) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = match rustix::fs::memfd_create(name, flags | EXEC) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        made => made,
    };
    let mut memory = File::from(memory?);
    program.seek(SeekFrom::Start(0))?;
    io::copy(&mut program, &mut memory)?;
    // The kernel may hold pages of it for a moment still.
    let mut tries = 0;
    loop {
        match rustix::fs::fcntl_add_seals(&memory, SEALS) {
            Err(Errno::BUSY) if tries < TRIES => tries += 1,
            done => break done?,
        }
        std::thread::sleep(PAUSE);
    }
    // Executing needs a descriptor that is not open for writing.
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Whether this is a copy that nobody can change.
pub fn is_sealed(fd: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SEALS))
}

/// Tells a state of a file from every later one: device, inode, bytes, and the time of its last change in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Of its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// ctime, nanoseconds.
    pub changed: i64,
}

impl Stamp {
    /// Of the file that the path leads to now.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(rustix::fs::stat(path)?.into())
    }

    /// Of an open file.
    pub fn of_file(file: impl AsFd) -> io::Result<Self> {
        Ok(rustix::fs::fstat(file)?.into())
    }
}

impl From<rustix::fs::Stat> for Stamp {
    fn from(s: rustix::fs::Stat) -> Self {
        let changed = s.st_ctime.wrapping_mul(1_000_000_000).wrapping_add(i64::try_from(s.st_ctime_nsec).unwrap_or(0));
        Self { device: s.st_dev, inode: s.st_ino, size: s.st_size.unsigned_abs(), changed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_runs_and_cannot_be_changed() {
        let program = File::open("/bin/true").expect("a program");
        let copy = copy("true", program).expect("a copy");
        assert!(is_sealed(&copy) && !is_sealed(File::open("/bin/true").expect("a file")));
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        assert!(std::fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(0)).is_err());
        assert!(std::process::Command::new(&path).status().expect("it runs").success());
    }

    #[test]
    fn a_file_that_was_replaced_has_another_stamp() {
        let path = std::env::temp_dir().join(format!("lxcri-stamp-{}", std::process::id()));
        std::fs::write(&path, "one").expect("written");
        let before = Stamp::of(&path).expect("there");
        assert_eq!(Stamp::of_file(File::open(&path).expect("open")).expect("open"), before);
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "two").expect("written");
        assert_ne!(Stamp::of(&path).expect("there"), before);
        std::fs::remove_file(&path).expect("removed");
    }
}
