//! The OCI runtime as a copy in memory, lent to every monitor: one that runs from there does not copy itself at each start, as it
//! otherwise has to before it enters a container.
//!
//! Asked by the supervisor for each connection; the copy is made when the first one needs it, and anew when the file has
//! changed. Nothing here fails: without a copy a monitor starts the file itself, which takes longer. Goes with the daemon and the
//! last monitor that has it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use camino::{Utf8Path, Utf8PathBuf};
use lxcri_monitor_proto::sealed::{self, Stamp};
use lxcri_monitor_proto::v1::KeepProgram;

/// A larger program is not copied: this is memory of the node.
const MAX: u64 = 32 << 20;

/// What a monitor is told, with its descriptor.
type Copy = (KeepProgram, Arc<OwnedFd>);

/// See the module's words.
#[derive(Debug)]
pub(super) struct RuntimeCopy {
    program: Utf8PathBuf,
    copy: Mutex<Option<Copy>>,
}

impl RuntimeCopy {
    pub(super) fn new(program: Utf8PathBuf) -> Arc<Self> {
        Arc::new(Self { program, copy: Mutex::default() })
    }

    fn copy(&self) -> MutexGuard<'_, Option<Copy>> {
        self.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The copy of what the file is now; None where there can't be one.
    pub(super) async fn now(self: &Arc<Self>) -> Option<Copy> {
        let stamp = Stamp::of(self.program.as_std_path()).ok()?;
        if let Some((request, copy)) = &*self.copy()
            && stamp_of(request) == stamp
        {
            return Some((request.clone(), copy.clone()));
        }
        let this = self.clone();
        let made = tokio::task::spawn_blocking(move || make(&this.program)).await.ok()?;
        match made {
            Ok(Some(made)) => Some(self.copy().insert(made).clone()),
            Ok(None) => None,
            Err(error) => {
                tracing::debug!(program = %self.program, %error, "no copy in memory can be made");
                None
            }
        }
    }
}

fn stamp_of(request: &KeepProgram) -> Stamp {
    Stamp { device: request.device, inode: request.inode, size: request.size, changed: request.changed }
}

/// None: the file is no program of its own (a script would be looked for by its path), or a very large one.
fn make(program: &Utf8Path) -> std::io::Result<Option<Copy>> {
    let mut file = File::open(program)?;
    let Stamp { device, inode, size, changed } = Stamp::of_file(&file)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    if &magic != b"\x7fELF" || size > MAX {
        return Ok(None);
    }
    let copy = sealed::copy(program.file_name().unwrap_or("program"), file)?;
    // One that was written to meanwhile may be half of the old and half of the new.
    if Stamp::of(program.as_std_path())? != (Stamp { device, inode, size, changed }) {
        return Ok(None);
    }
    Ok(Some((KeepProgram { path: program.to_string(), device, inode, size, changed }, Arc::new(copy))))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_is_copied_once_and_a_script_is_not() {
        let folder = std::env::temp_dir().join(format!("lxcri-copy-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = Utf8PathBuf::from_path_buf(folder.join("crun")).expect("a path");
        let runtime = RuntimeCopy::new(path.clone());
        assert!(runtime.now().await.is_none());
        std::fs::write(&path, "#!/bin/sh\n").expect("a script");
        assert!(runtime.now().await.is_none());
        std::fs::copy("/bin/true", &path).expect("a program");
        let (request, one) = runtime.now().await.expect("a copy");
        assert_eq!(request.path, path.as_str());
        assert!(sealed::is_sealed(&one));
        assert!(Arc::ptr_eq(&one, &runtime.now().await.expect("the same").1));
        std::fs::copy("/bin/false", &path).expect("another program");
        assert!(!Arc::ptr_eq(&one, &runtime.now().await.expect("another").1));
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
