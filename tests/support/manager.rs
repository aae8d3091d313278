//! A stand-in for systemd's side of sd_notify(3): keeps the descriptors that a daemon parks, and passes them to the next one.
#![allow(unsafe_code)] // descriptors under the numbers that the protocol wants

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// The manager, with what is parked. Its thread ends with the test's process.
pub struct Manager {
    socket: PathBuf,
    store: Store,
    alive: Arc<AtomicUsize>,
}

/// How often a daemon has to tell that it lives; nothing comes of it where it does not.
const WATCHDOG: Duration = Duration::from_millis(1500);

impl Manager {
    /// Listens at `socket`.
    pub fn start(socket: &Path) -> Self {
        let listener = UnixDatagram::bind(socket).expect("the manager's socket");
        let store = Store::default();
        let alive = Arc::new(AtomicUsize::new(0));
        let (shared, told) = (store.clone(), alive.clone());
        std::thread::spawn(move || {
            while let Some((text, fd)) = receive(&listener) {
                if text.lines().any(|l| l == "WATCHDOG=1") {
                    told.fetch_add(1, Ordering::Relaxed);
                }
                obey(&shared, &text, fd);
            }
        });
        Self { socket: socket.to_owned(), store, alive }
    }

    /// How often daemons have told that they live.
    pub fn told_alive(&self) -> usize {
        self.alive.load(Ordering::Relaxed)
    }

    /// Names of what is parked.
    pub fn parked(&self) -> Vec<String> {
        self.store.lock().expect("the store").iter().map(|(name, _)| name.clone()).collect()
    }

    /// A command that starts `program` as systemd does.
    pub fn command(&self, program: &Path) -> Command {
        let store = self.store.lock().expect("the store");
        let names: Vec<&str> = store.iter().map(|(name, _)| name.as_str()).collect();
        // Above all numbers under which they are passed.
        let high: Vec<OwnedFd> =
            store.iter().map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, 500).expect("a duplicate")).collect();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "export LISTEN_PID=$$ WATCHDOG_PID=$$; exec \"$@\"", "sh"]).arg(program);
        command.env("NOTIFY_SOCKET", &self.socket);
        command.env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        // SAFETY: dup2 only, on numbers that the closure keeps open.
        unsafe {
            command.pre_exec(move || {
                for (to, fd) in (3..).zip(&high) {
                    if libc::dup2(fd.as_raw_fd(), to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
    }
}

fn obey(store: &Store, text: &str, fd: Option<OwnedFd>) {
    let mut store = store.lock().expect("the store");
    let Some(name) = text.lines().find_map(|l| l.strip_prefix("FDNAME=")) else { return };
    if text.lines().any(|l| l == "FDSTOREREMOVE=1") {
        store.retain(|(n, _)| n != name);
    } else if let Some(fd) = fd {
        store.push((name.to_owned(), fd));
    }
}

fn receive(listener: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
    let mut bytes = [0u8; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(listener, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let mut fd = None;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = part {
            fd = fds.next();
        }
    }
    Some((String::from_utf8_lossy(&bytes[..got.bytes]).into_owned(), fd))
}
