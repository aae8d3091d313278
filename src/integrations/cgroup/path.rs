//! Names of cgroups: what a caller's `cgroup_parent` means, what the OCI runtime is told, where that ends up.
//!
//! Called by the backends (and by `cgroup` itself). Pure: nothing here touches the file system. A parent that is not
//! what the driver needs is InvalidArgument and named.

use std::str::FromStr;

use camino::{Utf8Path, Utf8PathBuf};

use super::CgroupError;
use crate::core::ids::{ContainerId, PodId};

/// Folder of pods whose maker named no parent (cgroupfs driver).
const DEFAULT_FOLDER: &str = "/proxmox-lxcri";
/// Slice of containers whose maker named no parent (systemd driver).
const DEFAULT_SLICE: &str = "lxcri.slice";
/// Prefix of the scopes that the OCI runtime asks systemd for.
const SCOPE_PREFIX: &str = "lxcri";

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// The OCI runtime makes folders itself.
    Cgroupfs,
    /// systemd makes slices and scopes (a Proxmox node).
    Systemd,
}

impl FromStr for Driver {
    type Err = CgroupError;
    fn from_str(text: &str) -> Result<Self, CgroupError> {
        match text {
            "cgroupfs" => Ok(Self::Cgroupfs),
            "systemd" => Ok(Self::Systemd),
            _ => Err(CgroupError::Driver(text.to_owned())),
        }
    }
}

/// The cgroup that a pod's containers are made in, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    driver: Driver,
    /// cgroupfs: absolute path within the hierarchy. systemd: name of the slice.
    name: String,
    /// From the hierarchy's root, without a leading slash.
    relative: Utf8PathBuf,
    default: bool,
}

impl Parent {
    /// Checks what the caller gave: an absolute path for cgroupfs; for systemd a slice, by name or (as the kubelet
    /// writes it) by its whole path. "" is `/proxmox-lxcri/<pod>` or `lxcri.slice`.
    pub fn new(driver: Driver, cgroup_parent: &str, pod: &PodId) -> Result<Self, CgroupError> {
        let refuse = |why: &str| CgroupError::Parent { given: cgroup_parent.to_owned(), why: why.to_owned() };
        let default = cgroup_parent.is_empty();
        let given = match (default, driver) {
            (false, _) => cgroup_parent.to_owned(),
            (true, Driver::Cgroupfs) => format!("{DEFAULT_FOLDER}/{pod}"),
            (true, Driver::Systemd) => DEFAULT_SLICE.to_owned(),
        };
        let parts: Vec<&str> = given.split('/').filter(|part| !part.is_empty()).collect();
        if parts.iter().any(|part| matches!(*part, "." | "..") || part.len() > 255) {
            return Err(refuse("\".\", \"..\" and names of more than 255 bytes are not allowed"));
        }
        if given.chars().any(|c| c.is_control() || c == ':') {
            return Err(refuse("control characters and colons are not allowed"));
        }
        let (name, relative) = match driver {
            Driver::Cgroupfs if !given.starts_with('/') && given.ends_with(".slice") => {
                return Err(refuse("this is a systemd slice, and the cgroup driver is cgroupfs"));
            }
            Driver::Cgroupfs if !given.starts_with('/') => return Err(refuse("not an absolute path")),
            Driver::Cgroupfs => {
                let relative = parts.join("/");
                (format!("/{relative}"), Utf8PathBuf::from(relative))
            }
            Driver::Systemd => {
                let slice = parts.last().copied().unwrap_or_default();
                let expanded = expand_slice(slice).ok_or_else(|| {
                    refuse("not a systemd slice (\"a-b.slice\"), which the cgroup driver systemd needs")
                })?;
                if parts.len() > 1 && parts.join("/") != expanded {
                    return Err(refuse(&format!("the path of {slice} would be /{expanded}")));
                }
                (slice.to_owned(), Utf8PathBuf::from(expanded))
            }
        };
        Ok(Self { driver, name, relative, default })
    }

    /// Driver it is for.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// Nobody named a parent: with cgroupfs the folder is the pod's alone, with systemd the slice is shared by all.
    pub fn is_default(&self) -> bool {
        self.default
    }

    /// `linux.cgroupsPath` for the OCI runtime.
    pub fn oci_path(&self, container: &ContainerId) -> String {
        match self.driver {
            Driver::Cgroupfs if self.name == "/" => format!("/{container}"),
            Driver::Cgroupfs => format!("{}/{container}", self.name),
            Driver::Systemd => format!("{}:{SCOPE_PREFIX}:{container}", self.name),
        }
    }

    /// The parent itself, from the hierarchy's root and without a leading slash.
    pub fn relative(&self) -> &Utf8Path {
        &self.relative
    }

    /// The container's cgroup, as [`Parent::relative`]. With systemd this is the scope; the runtime may put the
    /// processes into a group below it.
    pub fn container(&self, container: &ContainerId) -> Utf8PathBuf {
        match self.driver {
            Driver::Cgroupfs => self.relative.join(container.as_str()),
            Driver::Systemd => self.relative.join(format!("{SCOPE_PREFIX}-{container}.scope")),
        }
    }

    /// Cgroup for the pod's own init, as [`Parent::relative`]: a leaf, because on v2 a group that gives controllers
    /// to its children holds no processes. None with systemd, whose slices are not ours to make folders in: there the
    /// init stays with its monitor.
    pub fn init(&self, pod: &PodId) -> Option<Utf8PathBuf> {
        (self.driver == Driver::Cgroupfs).then(|| self.relative.join(format!("init-{pod}")))
    }
}

/// Path of a slice: "a-b.slice" lies in "a.slice" (systemd.slice(5)). None: not the name of a slice.
pub fn expand_slice(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice").filter(|name| !name.contains('/'))?;
    if name == "-" {
        return Some(String::new());
    }
    let mut path = String::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !path.is_empty() {
            path.push('/');
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push_str(&prefix);
        path.push_str(".slice");
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_expand_as_in_systemd() {
        let is = |slice, path: &str| assert_eq!(expand_slice(slice).as_deref(), Some(path), "{slice}");
        is("a.slice", "a.slice");
        is(
            "kubepods-burstable-podX_1.slice",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX_1.slice",
        );
        is("-.slice", "");
        for bad in ["", "a", ".slice", "a-.slice", "-a.slice", "a--b.slice", "a/b.slice", "a.scope"] {
            assert_eq!(expand_slice(bad), None, "{bad}");
        }
    }

    #[test]
    fn parents_and_containers() {
        let (pod, cid) = (PodId::new(), ContainerId::new());
        let fs = Parent::new(Driver::Cgroupfs, "/kubepods//burstable/podX/", &pod).unwrap();
        assert_eq!(fs.oci_path(&cid), format!("/kubepods/burstable/podX/{cid}"));
        assert_eq!(fs.container(&cid), format!("kubepods/burstable/podX/{cid}"));
        assert_eq!(fs.init(&pod).unwrap(), format!("kubepods/burstable/podX/init-{pod}"));
        let root = Parent::new(Driver::Cgroupfs, "/", &pod).unwrap();
        assert_eq!((root.oci_path(&cid), root.relative().as_str()), (format!("/{cid}"), ""));
        let own = Parent::new(Driver::Cgroupfs, "", &pod).unwrap();
        assert!(own.is_default() && own.relative() == format!("proxmox-lxcri/{pod}"));

        for given in
            ["kubepods-podX.slice", "/kubepods.slice/kubepods-podX.slice", "kubepods.slice/kubepods-podX.slice"]
        {
            let sd = Parent::new(Driver::Systemd, given, &pod).unwrap();
            assert_eq!(sd.oci_path(&cid), format!("kubepods-podX.slice:lxcri:{cid}"));
            assert_eq!(sd.container(&cid), format!("kubepods.slice/kubepods-podX.slice/lxcri-{cid}.scope"));
            assert_eq!(sd.init(&pod), None);
        }
        assert_eq!(Parent::new(Driver::Systemd, "", &pod).unwrap().relative(), "lxcri.slice");
    }

    #[test]
    fn bad_parents_are_invalid_and_named() {
        let pod = PodId::new();
        for (driver, given) in [
            (Driver::Cgroupfs, "kubepods/x"),
            (Driver::Cgroupfs, "a-b.slice"),
            (Driver::Cgroupfs, "/a/../../b"),
            (Driver::Cgroupfs, "/a/./b"),
            (Driver::Cgroupfs, "/a\n/b"),
            (Driver::Systemd, "/kubepods/x"),
            (Driver::Systemd, "a:b.slice"),
            (Driver::Systemd, "/other.slice/a-b.slice"),
            (Driver::Systemd, "/../a.slice"),
            (Driver::Systemd, "/"),
        ] {
            let e = crate::core::error::Error::from(Parent::new(driver, given, &pod).unwrap_err());
            assert_eq!(e.kind(), crate::core::error::Kind::InvalidArgument);
            assert!(e.to_string().contains(&format!("{given:?}")), "{e}");
        }
        assert!("docker".parse::<Driver>().is_err() && "systemd".parse::<Driver>().is_ok());
    }
}
