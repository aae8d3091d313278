//! Device nodes of the host that a container is to have: asked for by path, all of them (privileged), or by CDI name.
//!
//! Called by `launch` on a blocking thread. Fails by the path or the device's name; changes nothing.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};

use crate::backends::oci::{self, cdi::DeviceEdits};
use crate::core::error::{Error, Kind, Result};
use crate::core::spec::Device;
use crate::integrations::cdi;

/// What the named devices change in the container, their nodes looked up.
pub(in crate::backends) fn cdi(folders: &[Utf8PathBuf], names: &[cdi::DeviceName]) -> Result<Vec<DeviceEdits>> {
    let edits = cdi::resolve(folders, names)?;
    let with_nodes = |edits: cdi::Edits| {
        let nodes = edits.device_nodes.iter().map(cdi_node).collect::<Result<_>>()?;
        Ok(DeviceEdits { edits, nodes })
    };
    edits.into_iter().map(with_nodes).collect()
}

/// A node as its file describes it; what that leaves out is the host's.
fn cdi_node(d: &cdi::DeviceNode) -> Result<(LinuxDevice, String)> {
    let source = d.host_path.as_deref().unwrap_or(&d.path);
    let kind = match d.r#type.as_deref().unwrap_or_default() {
        "" => None,
        "b" => Some(LinuxDeviceType::B),
        "p" => Some(LinuxDeviceType::P),
        _ => Some(LinuxDeviceType::C),
    };
    let complete = kind == Some(LinuxDeviceType::P) || kind.is_some() && d.major.is_some() && d.minor.is_some();
    let mut node = if complete {
        let (kind, number) = (kind.unwrap_or(LinuxDeviceType::C), |n: Option<i64>| n.unwrap_or(0));
        let built = LinuxDeviceBuilder::default().path(&d.path).typ(kind).major(number(d.major)).minor(number(d.minor));
        oci::built(built.build())?
    } else {
        let failed = |e| Error::because(Kind::FailedPrecondition, format!("CDI device node {source:?}"), e);
        let meta = std::fs::metadata(source).map_err(failed)?;
        let mut node = device(Utf8Path::new(&d.path), &meta)?
            .ok_or_else(|| Error::precondition(format!("CDI device node {source:?} is no device")))?;
        if kind.is_some_and(|kind| kind != node.typ()) {
            return Err(Error::precondition(format!("CDI device node {source:?} is not of type {:?}", d.r#type)));
        }
        // Its owner in the container is the container's user.
        node.set_uid(None);
        node.set_gid(None);
        node
    };
    if d.uid.is_some() {
        node.set_uid(d.uid);
    }
    if d.gid.is_some() {
        node.set_gid(d.gid);
    }
    if d.file_mode.is_some() {
        node.set_file_mode(d.file_mode);
    }
    let access = match d.permissions.as_deref().unwrap_or_default() {
        "" => "rwm",
        "none" => "",
        access => access,
    };
    Ok((node, access.to_owned()))
}

pub(in crate::backends) fn requested_device(d: &Device, found: &mut Vec<(LinuxDevice, String)>) -> Result<()> {
    let path = Utf8Path::new(&d.host_path)
        .canonicalize_utf8()
        .map_err(|e| Error::because(Kind::InvalidArgument, format!("device {:?}", d.host_path), e))?;
    let meta = std::fs::metadata(&path).map_err(|e| Error::io(format!("device {path}"), e))?;
    let to = if d.container_path.is_empty() { path.clone() } else { Utf8PathBuf::from(&d.container_path) };
    if meta.is_dir() {
        return host_devices(&path, &to, &d.permissions, found);
    }
    match device(&to, &meta)? {
        Some(device) => {
            found.push((device, d.permissions.clone()));
            Ok(())
        }
        None => Err(Error::invalid(format!("device {:?} is no device", d.host_path))),
    }
}

/// All device nodes below a folder, but terminals and what every container has of its own.
pub(in crate::backends) fn host_devices(
    folder: &Utf8Path,
    to: &Utf8Path,
    permissions: &str,
    found: &mut Vec<(LinuxDevice, String)>,
) -> Result<()> {
    const OWN: [&str; 11] =
        ["pts", "shm", "fd", "mqueue", "console", "null", "zero", "full", "random", "urandom", "tty"];
    let entries = folder.read_dir_utf8().map_err(|e| Error::io(format!("list {folder}"), e))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if folder == "/dev" && (OWN.contains(&name) || name == "ptmx" || name == ".udev" || name == "lxc") {
            continue;
        }
        // Nodes come and go while we look.
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            host_devices(entry.path(), &to.join(name), permissions, found)?;
        } else if let Some(device) = device(&to.join(name), &meta)? {
            found.push((device, permissions.to_string()));
        }
    }
    Ok(())
}

fn device(path: &Utf8Path, meta: &std::fs::Metadata) -> Result<Option<LinuxDevice>> {
    let kind = match meta.file_type() {
        t if t.is_char_device() => LinuxDeviceType::C,
        t if t.is_block_device() => LinuxDeviceType::B,
        _ => return Ok(None),
    };
    let device = LinuxDeviceBuilder::default()
        .path(path.as_std_path())
        .typ(kind)
        .major(i64::from(rustix::fs::major(meta.rdev())))
        .minor(i64::from(rustix::fs::minor(meta.rdev())))
        .file_mode(meta.mode() & 0o7777)
        .uid(meta.uid())
        .gid(meta.gid())
        .build();
    oci::built(device).map(Some)
}
