//! Calls to the agent in a pod's VM, which the pod's relay carries out (`Monitor::guest`).
//!
//! Called by the rest of the backend. Fails with the guest's own words, with DeadlineExceeded when it can't be reached, and with
//! Internal when it answers something else than what was asked.

use lxcri_guest_proto::v1::{self, answer::Answer as Body, call::Call as Op};
use prost::Message;

use crate::core::error::{Error, Kind, Result};
use crate::core::ports::Monitor;

/// Folder in the guest of what ends with its run; see guest-agent/src/init.rs.
pub const RUN: &str = "/run/lxcri";
/// Folder on the guest's own disk.
pub const DATA: &str = "/var/lib/lxcri";
/// Parent of containers' cgroups in the guest, from the hierarchy's root.
pub const CGROUP: &str = "/lxcri";
/// Where the guest has its hierarchy.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// A container's bundle in the run folder.
pub fn bundle(container: &str) -> String {
    format!("bundles/{container}")
}

async fn call(monitor: &dyn Monitor, op: Op) -> Result<Body> {
    let answer = monitor.guest(v1::Call { id: 1, call: Some(op) }.encode_to_vec()).await?;
    let answer = v1::Answer::decode(answer.as_slice())
        .map_err(|e| Error::because(Kind::Internal, "the guest's answer is no message", e))?;
    match answer.answer {
        Some(Body::Error(e)) => Err(Error::internal(format!("the guest refuses: {}", e.message))),
        Some(body) => Ok(body),
        None => Err(Error::internal("the guest's answer is empty")),
    }
}

async fn done(monitor: &dyn Monitor, op: Op) -> Result<()> {
    call(monitor, op).await.map(drop)
}

fn other<T>() -> Result<T> {
    Err(Error::internal("the guest answers something else than what it was asked"))
}

/// Whether it answers.
pub async fn hello(monitor: &dyn Monitor) -> Result<v1::HelloAnswer> {
    match call(monitor, Op::Hello(v1::Hello {})).await? {
        Body::Hello(hello) => Ok(hello),
        _ => other(),
    }
}

/// Makes a container's root file system on the image's disk; NotFound as long as the disk is not there.
pub async fn make_root(monitor: &dyn Monitor, container: &str, serial: &str) -> Result<v1::Root> {
    let root = v1::MakeRoot { container_id: container.into(), serial: serial.into(), fs_type: "ext4".into() };
    match call(monitor, Op::MakeRoot(root)).await? {
        Body::Root(root) => Ok(root),
        _ => other(),
    }
}

/// Removes it.
pub async fn remove_root(monitor: &dyn Monitor, container: &str) -> Result<()> {
    done(monitor, Op::RemoveRoot(v1::RemoveRoot { container_id: container.into() })).await
}

/// Owner and group of what is the agent's.
pub const ROOT: (u32, u32) = (0, 0);

/// A file in the run folder, with its owner and group.
pub async fn write(
    monitor: &dyn Monitor,
    path: String,
    content: Vec<u8>,
    mode: u32,
    (uid, gid): (u32, u32),
) -> Result<()> {
    done(monitor, Op::Write(v1::Write { path, content, mode, uid, gid })).await
}

/// Removes a file or folder of the run folder.
pub async fn remove(monitor: &dyn Monitor, path: String) -> Result<()> {
    done(monitor, Op::Remove(v1::Remove { what: Some(v1::remove::What::Run(path)) })).await
}

/// Brings a volume to a new state.
pub async fn sync(monitor: &dyn Monitor, call: v1::Sync) -> Result<()> {
    done(monitor, Op::Sync(call)).await
}

/// Files of the kernel and of the run folder, in the order of `paths`.
pub async fn read(monitor: &dyn Monitor, paths: Vec<String>) -> Result<Vec<v1::Content>> {
    let count = paths.len();
    match call(monitor, Op::Read(v1::Read { paths })).await? {
        Body::Contents(read) if read.contents.len() == count => Ok(read.contents),
        _ => other(),
    }
}
