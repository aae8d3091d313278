//! Containers of Proxmox as types: what a configuration holds, and what a new container is to be like.
//!
//! Pure; `ct` and `guest` have what can be done with them.

use std::collections::BTreeMap;

use serde_json::Value;

use super::guest_types::numbered;
use super::ids::Vmid;
use super::lenient;
use super::property::{Features, Net, PropertyError, Tags, Volume};
use super::transport::Form;

/// A container's configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CtConfig {
    /// Changes with every change; a change that names it fails if another came between.
    pub digest: String,
    /// Networks by number.
    pub nets: BTreeMap<u32, Net>,
    /// The root file system.
    pub rootfs: Option<Volume>,
    /// Mount points by number.
    pub mounts: BTreeMap<u32, Volume>,
    /// Tags.
    pub tags: Tags,
    /// What it may beyond the usual.
    pub features: Features,
    /// Everything else: "memory", "hostname", "lock".
    pub other: BTreeMap<String, String>,
}

impl CtConfig {
    /// From the API's answer, which has a digest: one without it is something else, and no configuration that has nothing in it.
    pub fn parse(answer: &Value) -> Result<Self, PropertyError> {
        let Value::Object(keys) = answer else {
            return Err(PropertyError::new("configuration", "the answer is no object"));
        };
        let mut config = Self::default();
        for (key, value) in keys {
            let text = lenient::as_string(value);
            match (key.as_str(), numbered(key)) {
                ("digest", _) => config.digest = text,
                ("rootfs", _) => config.rootfs = Some(text.parse()?),
                ("tags", _) => config.tags = text.parse()?,
                ("features", _) => config.features = text.parse()?,
                (_, Some(("net", n))) => drop(config.nets.insert(n, text.parse()?)),
                (_, Some(("mp", n))) => drop(config.mounts.insert(n, text.parse()?)),
                _ => drop(config.other.insert(key.clone(), text)),
            }
        }
        if config.digest.is_empty() {
            return Err(PropertyError::new("configuration", "the answer has no digest"));
        }
        Ok(config)
    }

    /// A value as text.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.other.get(key).map(String::as_str)
    }

    /// Everything as the API writes it, sorted.
    pub fn keys(&self) -> Result<BTreeMap<String, String>, PropertyError> {
        let mut keys = self.other.clone();
        keys.insert("digest".into(), self.digest.clone());
        for (n, net) in &self.nets {
            keys.insert(format!("net{n}"), net.write()?);
        }
        for (n, mount) in &self.mounts {
            keys.insert(format!("mp{n}"), mount.write()?);
        }
        let rootfs = self.rootfs.as_ref().map(Volume::write).transpose()?.unwrap_or_default();
        for (key, value) in [("rootfs", rootfs), ("tags", self.tags.to_string()), ("features", self.features.write()?)]
        {
            if !value.is_empty() {
                keys.insert(key.into(), value);
            }
        }
        Ok(keys)
    }

    /// The notes.
    pub fn description(&self) -> &str {
        self.get("description").unwrap_or_default()
    }
}

/// What a new container is like. What is None or empty is left to Proxmox, except that it is unprivileged and not started
/// at boot.
#[derive(Debug, Clone, Default)]
pub struct CtSpec {
    /// Template: `STORAGE:vztmpl/NAME`.
    pub ostemplate: String,
    /// Root file system.
    pub rootfs: Option<Volume>,
    /// Host name.
    pub hostname: Option<String>,
    /// MiB; Proxmox's own default is 512.
    pub memory: Option<u64>,
    /// MiB.
    pub swap: Option<u64>,
    /// CPUs that it sees.
    pub cores: Option<u32>,
    /// CPU time; 0: no limit.
    pub cpulimit: Option<f64>,
    /// Networks.
    pub nets: Vec<Net>,
    /// Mount points.
    pub mounts: Vec<Volume>,
    /// Tags.
    pub tags: Tags,
    /// Notes; at most 8 KiB.
    pub description: Option<String>,
    /// Pool.
    pub pool: Option<String>,
    /// What it may beyond the usual.
    pub features: Features,
    /// "debian" and so on; "unmanaged": nothing is written into it.
    pub ostype: Option<String>,
    /// Its root is root of the node. Needs Sys.Modify.
    pub privileged: bool,
    /// Further keys as the API names them.
    pub extra: BTreeMap<String, String>,
}

impl CtSpec {
    /// The parameters of the call.
    pub fn form(&self, vmid: Vmid) -> Result<Form, PropertyError> {
        let mut form = Form::new();
        let mut put = |key: &str, value: Option<String>| form.extend(value.map(|v| (key.to_owned(), v)));
        put("vmid", Some(vmid.to_string()));
        put("ostemplate", Some(self.ostemplate.clone()));
        put("unprivileged", Some(u8::from(!self.privileged).to_string()));
        put("rootfs", self.rootfs.as_ref().map(Volume::write).transpose()?);
        put("hostname", self.hostname.clone());
        put("memory", self.memory.map(|n| n.to_string()));
        put("swap", self.swap.map(|n| n.to_string()));
        put("cores", self.cores.map(|n| n.to_string()));
        put("cpulimit", self.cpulimit.map(|n| n.to_string()));
        for (n, net) in self.nets.iter().enumerate() {
            put(&format!("net{n}"), Some(net.write()?));
        }
        for (n, mount) in self.mounts.iter().enumerate() {
            put(&format!("mp{n}"), Some(mount.write()?));
        }
        put("tags", Some(self.tags.to_string()).filter(|t| !t.is_empty()));
        put("description", self.description.clone());
        put("pool", self.pool.clone());
        put("features", Some(self.features.write()?).filter(|t| !t.is_empty()));
        put("ostype", self.ostype.clone());
        if !self.extra.contains_key("onboot") {
            put("onboot", Some("0".into()));
        }
        for (key, value) in &self.extra {
            put(key, Some(value.clone()));
        }
        Ok(form)
    }

    /// Storage of the root file system.
    pub(super) fn storage(&self) -> &str {
        let named = self.rootfs.as_ref().and_then(Volume::storage);
        named.or_else(|| self.extra.get("storage").map(String::as_str)).unwrap_or("local")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_as_the_api_sends_it() {
        let answer = serde_json::json!({
            "digest": "abc", "hostname": "c1", "memory": 512, "cpulimit": "0.5", "unprivileged": 1, "tags": "k8s;a",
            "rootfs": "local:subvol-100-disk-0,size=8G", "net0": "name=eth0,bridge=vmbr0", "mp12": "local:1,mp=/data",
            "features": "nesting=1", "lxc": [["lxc.apparmor.profile", "x"]], "description": "notes\n",
        });
        let c = CtConfig::parse(&answer).unwrap();
        assert_eq!((c.digest.as_str(), c.get("memory"), c.get("cpulimit")), ("abc", Some("512"), Some("0.5")));
        assert_eq!((c.nets[&0].name.as_str(), c.mounts[&12].mp.as_deref()), ("eth0", Some("/data")));
        assert!(c.features.nesting && c.tags.has("k8s") && c.description() == "notes\n");
        assert!(CtConfig::parse(&Value::Null).is_err());
        assert!(CtConfig::parse(&serde_json::json!({ "description": "no digest" })).is_err());
    }

    #[test]
    fn a_new_container_is_unprivileged_and_stays_off_at_boot() {
        let spec = CtSpec {
            ostemplate: "local:vztmpl/a.tar".into(),
            rootfs: Some(Volume::allocate("tank", 1024)),
            nets: vec![Net { name: "eth0".into(), bridge: Some("vmbr0".into()), ..Net::default() }],
            tags: "b;a".parse().unwrap(),
            ..CtSpec::default()
        };
        let form: BTreeMap<_, _> = spec.form(Vmid::new(100).unwrap()).unwrap().into_iter().collect();
        assert_eq!((form["unprivileged"].as_str(), form["onboot"].as_str(), form["tags"].as_str()), ("1", "0", "a;b"));
        assert_eq!((form["net0"].as_str(), form["rootfs"].as_str()), ("bridge=vmbr0,name=eth0", "volume=tank:1"));
        assert!(!form.contains_key("memory") && !form.contains_key("features"));
        assert_eq!(spec.storage(), "tank");
        let evil = CtSpec { rootfs: Some(Volume { volume: "a:1,ro=1".into(), ..Volume::default() }), ..spec };
        assert!(evil.form(Vmid::new(100).unwrap()).is_err());
    }
}
