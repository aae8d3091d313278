//! Pinned namespaces of a pod without a pause process: made by a short-lived thread, kept by bind mounts.
//!
//! Called by the crun and lxc backends. The network namespace is pinned at `<netns folder>/cni-<uuid>` (where other
//! tools look), the others at `<run>/pods/<pod>/ns/{user,ipc,uts,pid}`, where `net` links to the first. The uuid is
//! made of the pod id's first half, so every path is known before it exists and a repeated call finds what an earlier
//! one made. A crash leaves pinned namespaces of a known name: [`NamespacePins::list`] finds them for garbage
//! collection, [`NamespacePins::create`] goes on where it ended.
//!
//! Namespaces belong to threads: whatever enters one runs on a thread of its own that ends there. Fails with
//! [`NetnsError`].
#![allow(unsafe_code)] // unshare(2), which rustix marks unsafe because of CLONE_FILES, and the fork in `userns`

mod addresses;
mod lo;
mod sysctl;
mod traffic;
mod types;
mod userns;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

pub use addresses::addresses;
pub use sysctl::sysctl_path;
pub use traffic::traffic;
pub use types::{NetnsError, Pinned, Wanted, Which};

use self::lo::set_lo_up;
use self::sysctl::{Setting, check_sysctls};
use self::userns::Holder;
use super::mounts;
use crate::core::error::Error;
use crate::core::ids::PodId;
use crate::core::spec::UserNamespace;

/// Makes, finds and removes the pinned namespaces of pods.
#[derive(Debug, Clone)]
pub struct NamespacePins {
    netns: Utf8PathBuf,
    pods: Utf8PathBuf,
}

impl NamespacePins {
    /// Network namespaces go to `netns_folder` (a node: `/run/netns`), the others below `<run>/pods`.
    pub fn new(netns_folder: impl Into<Utf8PathBuf>, run: &Utf8Path) -> Self {
        Self { netns: netns_folder.into(), pods: run.join("pods") }
    }

    /// Where the pod's network namespace is or would be pinned.
    pub fn netns_path(&self, pod: &PodId) -> Utf8PathBuf {
        let id = pod.as_str();
        self.netns.join(format!("cni-{}-{}-{}-{}-{}", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..32]))
    }

    /// Where the pod's namespace is or would be pinned.
    pub fn path(&self, pod: &PodId, which: Which) -> Utf8PathBuf {
        match which {
            Which::Net => self.netns_path(pod),
            other => self.folder(pod).join(other.file()),
        }
    }

    fn folder(&self, pod: &PodId) -> Utf8PathBuf {
        self.pods.join(pod.as_str()).join("ns")
    }

    /// Makes and pins what the pod wants, sets its hostname and sysctls and brings `lo` up. What is pinned already
    /// is kept and set up again. On failure what this call made is taken back.
    pub async fn create(&self, pod: &PodId, wanted: Wanted) -> Result<Pinned, NetnsError> {
        let settings = check_sysctls(&wanted)?;
        if wanted.hostname.len() > 64 || wanted.hostname.contains('\0') {
            return Err(NetnsError::Hostname(wanted.hostname));
        }
        let (this, pod) = (self.clone(), pod.clone());
        in_thread(move || this.create_here(&pod, &wanted, &settings)).await
    }

    /// On a thread of its own, which ends with the namespaces that it made or entered.
    fn create_here(&self, pod: &PodId, wanted: &Wanted, settings: &[Setting]) -> Result<Pinned, NetnsError> {
        let list: Vec<Which> = wanted.list();
        let (mut there, mut missing) = (Vec::new(), Vec::new());
        for which in &list {
            match is_pinned(&self.path(pod, *which))? {
                true => there.push(*which),
                false => missing.push(*which),
            }
        }
        if wanted.user.is_some() && !missing.is_empty() {
            // They belong to one user namespace: half of them is as good as none.
            for which in there.drain(..) {
                self.unpin_one(pod, which)?;
            }
            missing = list.clone();
        }
        if !list.is_empty() {
            let folder = self.folder(pod);
            std::fs::create_dir_all(&folder).map_err(|e| NetnsError::system(format!("create {folder}"), e))?;
        }
        if missing.contains(&Which::Net) {
            mounts::make_shared(self.netns.as_std_path())?;
            // The link first: it is what garbage collection finds the netns by.
            self.link_netns(pod)?;
        }
        for which in there.iter().filter(|which| **which != Which::User) {
            enter(&self.path(pod, *which), *which)?;
        }
        let inner = missing.iter().filter(|which| **which != Which::User);
        let flags = inner.clone().fold(UnshareFlags::empty(), |all, which| all | which.flag());
        let holder = match &wanted.user {
            Some(user) if !missing.is_empty() => Some(Holder::start(user, flags)?),
            _ => None,
        };
        let namespaces = match &holder {
            Some(holder) => {
                let folder = holder.namespaces();
                for which in inner {
                    enter(&folder.join(which.file()), *which)?;
                }
                folder
            }
            None => {
                unshare_thread(flags).map_err(|e| NetnsError::system("unshare namespaces", e))?;
                "/proc/thread-self/ns".into()
            }
        };
        let done = self.set_up_and_pin(pod, wanted, settings, &missing, &namespaces);
        if done.is_err() {
            for which in missing {
                if let Err(e) = self.unpin_one(pod, which) {
                    tracing::warn!(%pod, error = %Error::from(e).chain(), "a namespace stays pinned after a failed create");
                }
            }
        }
        done
    }

    /// Everything is set before it is pinned: a namespace that can be found is complete.
    fn set_up_and_pin(
        &self,
        pod: &PodId,
        wanted: &Wanted,
        settings: &[Setting],
        missing: &[Which],
        namespaces: &Utf8Path,
    ) -> Result<Pinned, NetnsError> {
        if wanted.net {
            set_lo_up().map_err(|e| NetnsError::system("bring lo up", e))?;
        }
        if wanted.uts && !wanted.hostname.is_empty() {
            rustix::system::sethostname(wanted.hostname.as_bytes())
                .map_err(|e| NetnsError::system(format!("set the hostname {}", wanted.hostname), e))?;
        }
        let maps = wanted.user.iter().flat_map(|user| &user.uids);
        let root = maps.filter(|map| map.container_id == 0).map(|map| map.host_id).next();
        settings.iter().try_for_each(|setting| setting.write(root))?;
        for which in missing {
            pin(namespaces.join(which.file()).as_std_path(), &self.path(pod, *which))?;
        }
        let path = |which, wanted: bool| wanted.then(|| self.path(pod, which));
        Ok(Pinned {
            net: path(Which::Net, wanted.net),
            ipc: path(Which::Ipc, wanted.ipc),
            uts: path(Which::Uts, wanted.uts),
            pid: None,
            user: path(Which::User, wanted.user.is_some()),
        })
    }

    fn link_netns(&self, pod: &PodId) -> Result<(), NetnsError> {
        let (target, link) = (self.netns_path(pod), self.folder(pod).join(Which::Net.file()));
        match std::os::unix::fs::symlink(&target, &link) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(NetnsError::system(format!("link {link}"), e)),
            _ => Ok(()),
        }
    }

    /// Pins namespaces that `pid` has, in place of older ones.
    pub async fn pin_of(&self, pod: &PodId, pid: i32, list: &[Which]) -> Result<Pinned, NetnsError> {
        let (this, pod, list) = (self.clone(), pod.clone(), list.to_vec());
        in_thread(move || {
            let folder = this.folder(&pod);
            std::fs::create_dir_all(&folder).map_err(|e| NetnsError::system(format!("create {folder}"), e))?;
            mounts::make_shared(this.netns.as_std_path())?;
            // The link first: it is what garbage collection finds the netns by.
            this.link_netns(&pod)?;
            for which in &list {
                this.unpin_one(&pod, *which)?;
                pin(Path::new(&format!("/proc/{pid}/ns/{}", which.file())), &this.path(&pod, *which))?;
            }
            let path = |which| list.contains(&which).then(|| this.path(&pod, which));
            Ok(Pinned {
                net: path(Which::Net),
                ipc: path(Which::Ipc),
                uts: path(Which::Uts),
                pid: path(Which::Pid),
                user: path(Which::User),
            })
        })
        .await
    }

    /// Pins the PID namespace of `pid` (the pod's init) for containers to join. Replaces an older one.
    pub async fn pin_pid(&self, pod: &PodId, pid: i32) -> Result<Utf8PathBuf, NetnsError> {
        let (folder, path) = (self.folder(pod), self.path(pod, Which::Pid));
        in_thread(move || {
            std::fs::create_dir_all(&folder).map_err(|e| NetnsError::system(format!("create {folder}"), e))?;
            mounts::unmount(path.as_std_path())?;
            pin(Path::new(&format!("/proc/{pid}/ns/pid")), &path)?;
            Ok(path)
        })
        .await
    }

    /// Lets go of all of the pod's namespaces. Nothing there is success. A namespace lives on as long as a process
    /// is in it.
    pub async fn unpin(&self, pod: &PodId) -> Result<(), NetnsError> {
        let (this, pod) = (self.clone(), pod.clone());
        in_thread(move || {
            for which in Which::ALL {
                this.unpin_one(&pod, which)?;
            }
            let folder = this.folder(&pod);
            remove_file(&folder.join(Which::Net.file()))?;
            match std::fs::remove_dir(&folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(NetnsError::system(format!("remove {folder}"), e)),
                _ => Ok(()),
            }
        })
        .await
    }

    fn unpin_one(&self, pod: &PodId, which: Which) -> Result<(), NetnsError> {
        let path = self.path(pod, which);
        mounts::unmount(path.as_std_path())?;
        remove_file(&path)
    }

    /// Pods that have, or began to have, pinned namespaces, and which are truly pinned now.
    pub async fn list(&self) -> Result<Vec<(PodId, Pinned)>, NetnsError> {
        let this = self.clone();
        in_thread(move || {
            let failed = |e| NetnsError::system(format!("list {}", this.pods), e);
            let entries = match std::fs::read_dir(&this.pods) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries.map_err(failed)?,
            };
            let mut found = Vec::new();
            for entry in entries {
                let Some(pod) = entry.map_err(failed)?.file_name().to_str().and_then(|n| n.parse::<PodId>().ok())
                else {
                    continue;
                };
                let folder = this.folder(&pod);
                if folder.try_exists().map_err(|e| NetnsError::system(format!("look at {folder}"), e))? {
                    let pinned = this.pinned_here(&pod)?;
                    found.push((pod, pinned));
                }
            }
            found.sort_by(|a: &(PodId, Pinned), b| a.0.cmp(&b.0));
            Ok(found)
        })
        .await
    }

    /// Which of the pod's namespaces are pinned now.
    pub async fn pinned(&self, pod: &PodId) -> Result<Pinned, NetnsError> {
        let (this, pod) = (self.clone(), pod.clone());
        in_thread(move || this.pinned_here(&pod)).await
    }

    fn pinned_here(&self, pod: &PodId) -> Result<Pinned, NetnsError> {
        let one = |which| {
            let path = self.path(pod, which);
            Ok::<_, NetnsError>(is_pinned(&path)?.then_some(path))
        };
        Ok(Pinned {
            net: one(Which::Net)?,
            ipc: one(Which::Ipc)?,
            uts: one(Which::Uts)?,
            pid: one(Which::Pid)?,
            user: one(Which::User)?,
        })
    }
}

/// Runs `work` on a thread inside the network namespace pinned at `netns`: for sockets into a pod (port-forward),
/// which keep their namespace when they leave the thread.
pub async fn in_netns<T: Send + 'static>(
    netns: &Utf8Path,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NetnsError> {
    let netns = netns.to_owned();
    in_thread(move || {
        enter(&netns, Which::Net)?;
        Ok(work())
    })
    .await
}

/// Brings the loopback interface of the namespace pinned at `netns` up. Repeatable.
pub async fn lo_up(netns: &Utf8Path) -> Result<(), NetnsError> {
    in_netns(netns, set_lo_up).await?.map_err(|e| NetnsError::system(format!("bring lo up in {netns}"), e))
}

/// Pins a network namespace that nothing is in at `path`, unless one is there.
pub async fn pin_empty_net(path: &Utf8Path) -> Result<(), NetnsError> {
    let path = path.to_owned();
    in_thread(move || {
        if is_pinned(&path)? {
            return Ok(());
        }
        unshare_thread(UnshareFlags::NEWNET).map_err(|e| NetnsError::system("unshare namespaces", e))?;
        pin(Path::new("/proc/thread-self/ns/net"), &path)
    })
    .await
}

/// Whether a namespace is pinned at `path`: a file of nsfs, not the empty file below it. Blocks shortly.
pub fn is_pinned(path: &Utf8Path) -> Result<bool, NetnsError> {
    const NSFS_MAGIC: u64 = 0x6e73_6673; // linux/magic.h
    match rustix::fs::statfs(path.as_std_path()) {
        Ok(stat) => Ok(u64::try_from(stat.f_type).unwrap_or_default() == NSFS_MAGIC),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(e) => Err(NetnsError::system(format!("look at {path}"), e)),
    }
}

/// Namespaces make a thread unfit for anything else, so it is never one of a pool.
async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetnsError> + Send + 'static,
) -> Result<T, NetnsError> {
    let (send, receive) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("namespace".into())
        .spawn(move || {
            let _ = send.send(work());
        })
        .map_err(|e| NetnsError::system("start a thread for namespaces", e))?;
    match receive.await {
        Ok(result) => result,
        Err(_) => Err(NetnsError::system("work inside namespaces", io::Error::other("its thread panicked"))),
    }
}

/// unshare(2) for the calling thread alone.
pub(crate) fn unshare_thread(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES), which is all that rustix asks for.
    unsafe { rustix::thread::unshare_unsafe(flags.difference(UnshareFlags::FILES)) }.map_err(Into::into)
}

/// An open user namespace with these maps that nothing lives in: what mount_setattr(2) takes id maps from. Forks.
pub(crate) fn maps_holder(user: &UserNamespace) -> Result<File, NetnsError> {
    let holder = Holder::start(user, UnshareFlags::empty())?;
    let path = holder.namespaces().join(Which::User.file());
    File::open(&path).map_err(|e| NetnsError::system(format!("open {path}"), e))
}

fn enter(path: &Utf8Path, which: Which) -> Result<(), NetnsError> {
    let file = File::open(path).map_err(|e| NetnsError::system(format!("open the namespace {path}"), e))?;
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(which.link_type()))
        .map_err(|e| NetnsError::system(format!("enter the namespace {path}"), e))
}

fn pin(namespace: &Path, target: &Utf8Path) -> Result<(), NetnsError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(target)
        .map_err(|e| NetnsError::system(format!("create {target}"), e))?;
    Ok(mounts::bind(namespace, target.as_std_path())?)
}

fn remove_file(path: &Utf8Path) -> Result<(), NetnsError> {
    match std::fs::remove_file(path) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(NetnsError::system(format!("remove {path}"), e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::error::Kind;
    use crate::integrations::mounts::tests::in_private_mounts;
    use std::os::unix::fs::MetadataExt;

    /// A test in a private mount namespace with pins below a tmpfs.
    fn with_pins<F: Future<Output = ()>>(body: impl FnOnce(NamespacePins, PodId) -> F + Send + 'static) {
        in_private_mounts(|dir| {
            let run = Utf8PathBuf::try_from(dir.to_path_buf()).unwrap();
            let pins = NamespacePins::new(run.join("netns"), &run);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(body(pins, PodId::new()));
        });
    }

    fn all(sysctls: &[(&str, &str)]) -> Wanted {
        let sysctls = sysctls.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Wanted { net: true, ipc: true, uts: true, hostname: "pod-one".into(), sysctls, user: None }
    }

    #[test]
    fn namespaces_are_made_set_up_found_and_removed() {
        let host = (
            std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(),
            std::fs::read("/proc/sys/kernel/msgmax").unwrap(),
        );
        with_pins(|pins, pod| async move {
            let wanted = all(&[("kernel.msgmax", "4321"), ("net.ipv4.ip_unprivileged_port_start", "7")]);
            let made = pins.create(&pod, wanted.clone()).await.unwrap();
            let net = made.net.clone().unwrap();
            let inode = |p: &Utf8Path| std::fs::metadata(p).unwrap().ino();
            let before = inode(&net);
            assert_eq!(std::fs::metadata(pins.folder(&pod).join("net")).unwrap().ino(), before);
            assert_ne!(before, std::fs::metadata("/proc/self/ns/net").unwrap().ino());
            let seen = in_thread({
                let (ipc, uts) = (made.ipc.clone().unwrap(), made.uts.clone().unwrap());
                move || {
                    enter(&ipc, Which::Ipc)?;
                    enter(&uts, Which::Uts)?;
                    let read = |p| std::fs::read_to_string(p).unwrap();
                    Ok((read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/msgmax")))
                }
            });
            assert_eq!(seen.await.unwrap(), ("pod-one\n".into(), "4321\n".into()));
            let flags = in_netns(&net, || {
                // lo takes connections only when it is up.
                let listener = std::net::TcpListener::bind("127.0.0.1:7").unwrap();
                std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap()
            });
            assert_eq!(flags.await.unwrap(), "7\n");
            lo_up(&net).await.unwrap();

            // Again: the same namespaces. After half a loss: only that half is new.
            assert_eq!(pins.create(&pod, wanted.clone()).await.unwrap(), made);
            assert_eq!(inode(&net), before);
            pins.unpin_one(&pod, Which::Ipc).unwrap();
            pins.create(&pod, wanted).await.unwrap();
            assert_eq!(inode(&net), before);
            assert_eq!(pins.list().await.unwrap(), [(pod.clone(), made)]);

            let pid = pins.pin_pid(&pod, std::process::id() as i32).await.unwrap();
            assert_eq!(pins.pinned(&pod).await.unwrap().pid, Some(pid));
            pins.unpin(&pod).await.unwrap();
            pins.unpin(&pod).await.unwrap();
            assert_eq!(pins.list().await.unwrap(), []);
            assert_eq!(std::fs::read_dir(&pins.netns).unwrap().count(), 0);
            // The folder stays a shared mount point, nothing else is left.
            assert_eq!(mounts::below(pins.netns.as_std_path()).unwrap().len(), 1);
        });
        let now = (
            std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(),
            std::fs::read("/proc/sys/kernel/msgmax").unwrap(),
        );
        assert_eq!(now, host);
    }

    #[test]
    fn a_user_namespace_owns_the_others() {
        with_pins(|pins, pod| async move {
            let map = |host_id| vec![crate::core::spec::IdMapping { host_id, container_id: 0, length: 65536 }];
            let user = Some(UserNamespace { uids: map(231_072), gids: map(231_072) });
            let wanted = Wanted { user, ..all(&[("kernel.msgmax", "4321"), ("net.ipv4.ip_forward", "1")]) };
            let made = pins.create(&pod, wanted.clone()).await.unwrap();
            let inode = |p: &Option<Utf8PathBuf>| std::fs::metadata(p.as_ref().unwrap()).unwrap().ino();
            let (user, net) = (inode(&made.user), inode(&made.net));
            for path in [&made.net, &made.ipc, &made.uts] {
                let file = File::open(path.as_ref().unwrap()).unwrap();
                // SAFETY: NS_GET_USERNS (ioctl_nsfs(2)) takes no argument and gives a new descriptor.
                let owner = unsafe {
                    let fd = libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), 0xb701);
                    assert!(fd >= 0, "{}", io::Error::last_os_error());
                    <File as std::os::fd::FromRawFd>::from_raw_fd(fd)
                };
                assert_eq!(owner.metadata().unwrap().ino(), user);
            }
            let forward =
                in_netns(made.net.as_ref().unwrap(), || std::fs::read("/proc/sys/net/ipv4/ip_forward").unwrap());
            assert_eq!(forward.await.unwrap(), b"1\n");
            assert_eq!(pins.create(&pod, wanted.clone()).await.unwrap(), made);
            assert_eq!((inode(&made.user), inode(&made.net)), (user, net));
            // A lost half: all are new, and belong together.
            pins.unpin_one(&pod, Which::User).unwrap();
            pins.create(&pod, wanted.clone()).await.unwrap();
            assert_ne!(inode(&made.net), net);
            pins.unpin(&pod).await.unwrap();

            for uids in [vec![], map(u32::MAX), [map(1), map(2)].concat()] {
                let bad = Wanted { user: Some(UserNamespace { uids, gids: map(1) }), ..wanted.clone() };
                let e = Error::from(pins.create(&pod, bad).await.unwrap_err());
                assert_eq!(e.kind(), Kind::InvalidArgument, "{e:?}");
            }
            assert_eq!(pins.pinned(&pod).await.unwrap(), Pinned::default());
        });
    }

    #[test]
    fn failures_leave_nothing_pinned_and_name_the_sysctl() {
        with_pins(|pins, pod| async move {
            for (name, value) in [("kernel.panic", "1"), ("net.no_such.thing", "1"), ("net.ipv4.ip_forward", "banana")]
            {
                let e = Error::from(pins.create(&pod, all(&[(name, value)])).await.unwrap_err());
                assert!(e.kind() == Kind::InvalidArgument && e.chain().contains(name), "{e:?}");
            }
            let shared = Wanted { net: false, ..all(&[("net.ipv4.ip_forward", "1")]) };
            let e = Error::from(pins.create(&pod, shared).await.unwrap_err());
            assert!(e.kind() == Kind::InvalidArgument && e.chain().contains("host's net namespace"), "{e:?}");
            let long = Wanted { hostname: "x".repeat(65), ..all(&[]) };
            assert_eq!(Error::from(pins.create(&pod, long).await.unwrap_err()).kind(), Kind::InvalidArgument);
            assert_eq!(pins.pinned(&pod).await.unwrap(), Pinned::default());
            assert_eq!(pins.create(&pod, Wanted::default()).await.unwrap(), Pinned::default());
            assert!(in_netns(&pins.netns_path(&pod), || ()).await.is_err());
            assert!(pins.pin_pid(&pod, i32::MAX).await.is_err());
            pins.unpin(&pod).await.unwrap();
            assert_eq!(mounts::below(pins.netns.as_std_path()).unwrap().len(), 1);
        });
    }
}
