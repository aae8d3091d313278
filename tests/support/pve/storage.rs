//! Storages of the server: a folder `local` for templates, containers and disks, with uploads and a size that can be made small.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::guests::Kind;
use super::http::{Answer, Call, Failure};
use super::state::{Params, Server};

/// A storage.
#[derive(Debug, Clone)]
pub struct Store {
    pub kind: String,
    pub content: String,
    pub folder: PathBuf,
    /// Nothing more fits.
    pub full: bool,
}

/// A file that came with an upload.
#[derive(Debug, Clone)]
pub struct Upload {
    pub name: String,
    pub data: Vec<u8>,
}

impl Store {
    pub fn usual(folder: &Path) -> BTreeMap<String, Self> {
        let folder = folder.join("local");
        std::fs::create_dir_all(folder.join("template/cache")).expect("folders");
        std::fs::create_dir_all(folder.join("images")).expect("folders");
        std::fs::create_dir_all(folder.join("import")).expect("folders");
        let store =
            Self { kind: "dir".into(), content: "rootdir,vztmpl,snippets,images,import".into(), folder, full: false };
        [("local".to_owned(), store)].into()
    }

    /// The file of a template `STORE:vztmpl/NAME`.
    pub fn template(&self, volid: &str) -> Option<PathBuf> {
        let name = volid.split_once(":vztmpl/")?.1;
        let file = self.folder.join("template/cache").join(name);
        (!name.contains('/') && file.is_file()).then_some(file)
    }
}

/// Fields and the file of a multipart body; None where it is none, or where something follows the file.
pub fn parts(body: &[u8], boundary: &str) -> Option<(Params, Upload)> {
    let mark = format!("--{boundary}");
    let mut found = Params::new();
    let mut rest = body;
    let find = |data: &[u8], needle: &[u8]| data.windows(needle.len()).position(|w| w == needle);
    loop {
        rest = &rest[find(rest, mark.as_bytes())? + mark.len()..];
        let head_end = find(rest, b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&rest[..head_end]).into_owned();
        rest = &rest[head_end + 4..];
        let end = find(rest, format!("\r\n{mark}").as_bytes())?;
        let data = &rest[..end];
        let after = &rest[end + 2 + mark.len()..];
        let attribute = |name: &str| Some(head.split(&format!("{name}=\"")).nth(1)?.split('"').next()?.to_owned());
        let name = head.split("; name=\"").nth(1)?.split('"').next()?.to_owned();
        match attribute("filename") {
            Some(file) if name == "filename" => {
                return after.starts_with(b"--").then(|| (found, Upload { name: file, data: data.to_vec() }));
            }
            Some(_) => return None,
            None => found.insert(name, String::from_utf8_lossy(data).into_owned()),
        };
    }
}

impl Server {
    /// Calls below /nodes/N/storage.
    pub fn storage_call(self: &Arc<Self>, call: &Call, fault: Option<super::state::What>) -> Answer {
        let parts: Vec<&str> = call.parts.iter().skip(3).map(String::as_str).collect();
        let content = call.params.get("content").cloned().unwrap_or_default();
        let Some((&name, rest)) = parts.split_first() else {
            let state = self.lock();
            let sees = |name: &str| state.may(&call.user, &format!("/storage/{name}"), "Datastore.Audit");
            let holds = |s: &Store| content.is_empty() || s.content.split(',').any(|c| c == content);
            let list = state.stores.iter().filter(|(n, s)| sees(n) && holds(s)).map(|(n, s)| {
                // Numbers as strings, as some plug-ins send them.
                json!({ "storage": n, "type": s.kind, "content": s.content, "active": 1, "enabled": 1, "shared": 0,
                        "total": "107374182400", "used": 1073741824, "avail": 106300440576u64, "used_fraction": 0.01 })
            });
            return Ok(list.collect());
        };
        let state = self.lock();
        let Some(store) = state.stores.get(name).cloned() else {
            return Err(Failure::die(format!("storage '{name}' does not exist")));
        };
        let path = format!("/storage/{name}");
        match (call.method.as_str(), rest) {
            ("GET", ["content"]) => {
                state.need(&call.user, &path, "Datastore.Audit")?;
                let mut list = Vec::new();
                for entry in std::fs::read_dir(store.folder.join("template/cache")).expect("the cache").flatten() {
                    let file = entry.file_name().to_string_lossy().into_owned();
                    let size = entry.metadata().map(|m| m.len()).unwrap_or_default();
                    list.push(json!({ "volid": format!("{name}:vztmpl/{file}"), "content": "vztmpl", "format": "tar", "size": size }));
                }
                for entry in std::fs::read_dir(store.folder.join("import")).expect("the imports").flatten() {
                    let file = entry.file_name().to_string_lossy().into_owned();
                    list.push(json!({ "volid": format!("{name}:import/{file}"), "content": "import", "format": "raw", "size": 0 }));
                }
                for (vmid, guest) in state.guests.iter().filter(|(_, g)| g.kind == Kind::Vm) {
                    list.extend(super::disks::of(&guest.config).into_iter().map(|(_, disk)| {
                        let size = disk.size.as_deref().and_then(super::disks::bytes);
                        json!({ "volid": disk.volume, "content": "images", "format": disk.kind(), "size": size, "vmid": vmid })
                    }));
                }
                for (vmid, guest) in state.guests.iter().filter(|(_, g)| g.kind == Kind::Ct) {
                    let volume = guest.config.get("rootfs").and_then(|v| v.split(',').next()).unwrap_or_default();
                    list.push(json!({ "volid": volume, "content": "rootdir", "format": "subvol", "size": "0", "vmid": vmid.to_string() }));
                }
                Ok(list.into_iter().filter(|v| content.is_empty() || v["content"] == content.as_str()).collect())
            }
            ("GET", ["content", volid]) => {
                let disk = super::disks::Disk::parse(volid).unwrap_or_default();
                if let Some(owner) = disk.owner() {
                    state.need(&call.user, &path, "Datastore.Audit")?;
                    state.need(&call.user, &format!("/vms/{owner}"), "VM.Config.Disk")?;
                } else {
                    state.need(&call.user, &path, "Datastore.Allocate")?;
                }
                drop(state);
                let file = self.disk_file(volid).filter(|f| f.exists());
                let file = file.ok_or_else(|| Failure::die(format!("volume '{volid}' does not exist")))?;
                let size = file.metadata().map(|m| m.len()).unwrap_or_default();
                Ok(json!({ "path": file, "size": size.to_string(), "used": size, "format": disk.kind() }))
            }
            ("POST", ["upload"]) => {
                state.need(&call.user, &path, "Datastore.AllocateTemplate")?;
                drop(state);
                super::params::check("content! checksum checksum-algorithm", &call.params)?;
                let Some(upload) = self.lock().upload.take() else {
                    return Err(Failure::param("filename", "property is missing and it is not optional"));
                };
                let file = store.folder.join("template/cache").join(&upload.name);
                if content != "vztmpl" || !upload.name.contains(".tar") || upload.name.contains('/') {
                    return Err(Failure::param("filename", "wrong file extension"));
                }
                Ok(self.start(call, "imgcopy", "", fault, async move {
                    if store.full {
                        return Err(format!(
                            "import failed: cp: error writing '{}': No space left on device",
                            file.display()
                        ));
                    }
                    std::fs::write(&file, &upload.data).map_err(|e| e.to_string())
                }))
            }
            ("DELETE", ["content", volid]) => {
                state.need(&call.user, &path, "Datastore.Allocate")?;
                let Some(file) = store.template(volid) else {
                    return Err(Failure::die(format!("volume '{volid}' does not exist")));
                };
                drop(state);
                Ok(self.start(call, "imgdel", "", fault, async move {
                    std::fs::remove_file(file).map_err(|e| e.to_string())
                }))
            }
            _ => Err(Failure::new(501, format!("Method '{} {}' not implemented", call.method, call.path))),
        }
    }
}
