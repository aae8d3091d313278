//! Container Device Interface: devices that files in the administrator's folders describe, by name.
//!
//! Called by the backends while they plan a container that asks for devices; the folders are read then, so that a device
//! plugin may write its file at any time. **Blocks on the disk.** A file that can't be used takes only its own devices
//! away, and is named when one of them might have been meant. Nothing is kept, nothing is changed.

pub mod names;
pub mod spec;

use std::io::Read;

use camino::{Utf8Path, Utf8PathBuf};

pub use names::{DeviceName, wanted};
pub use spec::{DeviceNode, Edits, HOOKS, Hook, IntelRdt, Mount};

use crate::core::error::{Error, Kind};

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 8 << 20;

/// A device that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// Not a name.
    #[error("CDI device {given:?}: {why}")]
    Name {
        /// As given.
        given: String,
        /// For a human.
        why: &'static str,
    },
    /// No file has it.
    #[error("CDI device {name}: no file in {folders} has it{broken}")]
    Unknown {
        /// The device.
        name: DeviceName,
        /// Where was looked.
        folders: String,
        /// "" or what could not be read, after "; ".
        broken: String,
    },
    /// Several files of one folder have it.
    #[error("CDI device {name}: {first} and {second} both have it")]
    Conflict {
        /// The device.
        name: DeviceName,
        /// One file.
        first: Utf8PathBuf,
        /// Another.
        second: Utf8PathBuf,
    },
    /// It wants something that we don't do.
    #[error("CDI device {name}: {what} is not supported")]
    Unsupported {
        /// The device.
        name: DeviceName,
        /// For a human.
        what: &'static str,
    },
}

impl From<CdiError> for Error {
    fn from(e: CdiError) -> Self {
        let kind = match &e {
            CdiError::Name { .. } => Kind::InvalidArgument,
            CdiError::Unknown { .. } | CdiError::Conflict { .. } => Kind::FailedPrecondition,
            CdiError::Unsupported { .. } => Kind::Unimplemented,
        };
        Error::new(kind, e.to_string())
    }
}

/// A file that could be read.
struct Loaded {
    file: Utf8PathBuf,
    /// Place of its folder: a later one wins.
    priority: usize,
    spec: spec::Spec,
}

/// What the devices take, in their order; what a file says of all its devices comes before its first one's.
pub fn resolve(folders: &[Utf8PathBuf], devices: &[DeviceName]) -> Result<Vec<Edits>, CdiError> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let (loaded, broken) = load(folders);
    let (mut edits, mut common): (Vec<Edits>, Vec<&Utf8Path>) = (Vec::new(), Vec::new());
    for name in devices {
        let (from, device) = find(&loaded, name)?.ok_or_else(|| CdiError::Unknown {
            name: name.clone(),
            folders: folders.iter().map(|f| f.as_str()).collect::<Vec<_>>().join(", "),
            broken: broken.iter().map(|why| format!("; {why}")).collect(),
        })?;
        for one in [&from.spec.container_edits, &device.container_edits] {
            if !one.net_devices.is_empty() {
                return Err(CdiError::Unsupported {
                    name: name.clone(),
                    what: "moving a network interface (netDevices)",
                });
            }
        }
        if !common.contains(&from.file.as_path()) {
            common.push(&from.file);
            edits.push(from.spec.container_edits.clone());
        }
        edits.push(device.container_edits.clone());
    }
    Ok(edits)
}

fn find<'a>(loaded: &'a [Loaded], name: &DeviceName) -> Result<Option<(&'a Loaded, &'a spec::Device)>, CdiError> {
    let mut best: Option<(&Loaded, &spec::Device)> = None;
    for from in loaded.iter().filter(|l| l.spec.kind == name.kind) {
        let Some(device) = from.spec.devices.iter().find(|d| d.name == name.name) else { continue };
        match &best {
            Some((other, _)) if other.priority == from.priority => {
                let (first, second) = (other.file.clone(), from.file.clone());
                return Err(CdiError::Conflict { name: name.clone(), first, second });
            }
            Some((other, _)) if other.priority > from.priority => {}
            _ => best = Some((from, device)),
        }
    }
    Ok(best)
}

/// All files, the most important folder first, and what was wrong with others.
fn load(folders: &[Utf8PathBuf]) -> (Vec<Loaded>, Vec<String>) {
    let (mut loaded, mut broken) = (Vec::new(), Vec::new());
    for (priority, folder) in folders.iter().enumerate().rev() {
        let entries = match folder.read_dir_utf8() {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => {
                broken.push(format!("{folder}: {e}"));
                continue;
            }
        };
        let mut files: Vec<Utf8PathBuf> = entries.flatten().map(|e| e.into_path()).collect();
        files.sort();
        for file in files {
            let json = match file.extension() {
                Some("json") => true,
                Some("yaml") => false,
                _ => continue,
            };
            match read(&file).and_then(|text| spec::parse(&text, json)) {
                Ok(spec) => loaded.push(Loaded { file, priority, spec }),
                Err(why) => broken.push(format!("{file}: {why}")),
            }
        }
    }
    (loaded, broken)
}

fn read(file: &Utf8Path) -> Result<String, String> {
    // NONBLOCK: a FIFO among the files must not stop us.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
    let fd = rustix::fs::open(file.as_std_path(), flags, rustix::fs::Mode::empty()).map_err(|e| e.to_string())?;
    let mut text = String::new();
    std::fs::File::from(fd).take(FILE_MAX + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > FILE_MAX { Err(format!("larger than {FILE_MAX} bytes")) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::utils::atomic::{self, Durability};

    struct Folders {
        _dir: tempfile::TempDir,
        list: Vec<Utf8PathBuf>,
    }

    impl Folders {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("tempdir");
            let base = Utf8PathBuf::from_path_buf(dir.path().to_owned()).expect("UTF-8");
            let list: Vec<_> = ["low", "high", "absent"].iter().map(|n| base.join(n)).collect();
            list[..2].iter().for_each(|f| std::fs::create_dir(f).expect("folder"));
            Self { _dir: dir, list }
        }
        fn put(&self, folder: usize, file: &str, text: &str) {
            let path = self.list[folder].join(file);
            atomic::write(path.as_std_path(), text.as_bytes(), 0o644, Durability::Process).expect("file");
        }
        fn device(&self, folder: usize, file: &str, device: &str, env: &str) {
            let text = format!(
                r#"{{"cdiVersion":"1.0.0","kind":"v/c","containerEdits":{{"env":["ALL={file}"]}},"devices":[{{"name":"{device}","containerEdits":{{"env":["{env}"]}}}},{{"name":"{device}x","containerEdits":{{"env":["X=1"]}}}}]}}"#
            );
            self.put(folder, file, &text);
        }
        fn env(&self, names: &[&str]) -> Result<Vec<String>, CdiError> {
            let names: Vec<_> = names.iter().map(|n| n.parse().expect("a name")).collect();
            Ok(resolve(&self.list, &names)?.into_iter().flat_map(|e| e.env).collect())
        }
    }

    #[test]
    fn later_folders_win_and_equals_conflict() {
        let f = Folders::new();
        f.device(0, "a.json", "d", "FROM=low");
        assert_eq!(f.env(&["v/c=d", "v/c=dx"]).expect("one"), ["ALL=a.json", "FROM=low", "X=1"]);
        f.device(1, "b.json", "d", "FROM=high");
        assert_eq!(f.env(&["v/c=d"]).expect("higher"), ["ALL=b.json", "FROM=high"]);
        f.device(1, "c.json", "d", "FROM=high too");
        let e = f.env(&["v/c=d"]).expect_err("two");
        assert!(matches!(e, CdiError::Conflict { .. }), "{e}");
        assert_eq!(f.env(&[]).expect("none"), Vec::<String>::new());
    }

    #[test]
    fn unknown_devices_and_broken_files_are_named() {
        let f = Folders::new();
        f.device(0, "a.json", "d", "A=1");
        f.put(0, "broken.yaml", "cdiVersion: [");
        f.put(0, "README.md", "not one");
        assert_eq!(f.env(&["v/c=d"]).expect("in spite of it"), ["ALL=a.json", "A=1"]);
        let e = f.env(&["v/c=other"]).expect_err("unknown").to_string();
        assert!(e.contains("v/c=other") && e.contains("broken.yaml") && !e.contains("README"), "{e}");
        f.put(0, "net.json", r#"{"cdiVersion":"1.1.0","kind":"v/n","devices":[{"name":"n","containerEdits":{"netDevices":[{"hostInterfaceName":"eth1","name":"eth1"}]}}]}"#);
        let e = Error::from(f.env(&["v/n=n"]).expect_err("refused"));
        assert!(e.kind() == Kind::Unimplemented && e.chain().contains("netDevices"), "{}", e.chain());
    }
}
