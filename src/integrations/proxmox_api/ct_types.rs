//! Containers of Proxmox as types: what a configuration holds, and what a new container is to be like.
//!
//! Pure; `ct` and `guest` have what can be done with them.

use super::guest_types::{GuestConfig, GuestKind, GuestNet, NewGuest, pairs};
use super::ids::Vmid;
use super::property::{Features, Net, PropertyError, Volume};
use super::transport::Form;

/// A container's configuration.
pub type CtConfig = GuestConfig<Net>;

impl GuestNet for Net {
    const KIND: GuestKind = GuestKind::Ct;

    fn is_volume(name: &str, n: Option<u32>) -> bool {
        matches!((name, n), ("rootfs", None) | ("mp", Some(_)))
    }

    fn write(&self) -> Result<String, PropertyError> {
        Self::write(self)
    }
}

/// What a new container is like. What is None or empty is left to Proxmox, except that it is unprivileged and not started
/// at boot.
#[derive(Debug, Clone, Default)]
pub struct CtSpec {
    /// What every guest has.
    pub guest: NewGuest<Net>,
    /// Template: `STORAGE:vztmpl/NAME`.
    pub ostemplate: String,
    /// Root file system.
    pub rootfs: Option<Volume>,
    /// Host name.
    pub hostname: Option<String>,
    /// MiB.
    pub swap: Option<u64>,
    /// Mount points.
    pub mounts: Vec<Volume>,
    /// What it may beyond the usual.
    pub features: Features,
    /// "debian" and so on; "unmanaged": nothing is written into it.
    pub ostype: Option<String>,
    /// Its root is root of the node. Needs Sys.Modify.
    pub privileged: bool,
}

impl CtSpec {
    /// The parameters of the call.
    pub fn form(&self, vmid: Vmid) -> Result<Form, PropertyError> {
        let mut form = self.guest.form(vmid)?;
        form.extend(pairs([
            ("ostemplate", Some(self.ostemplate.clone())),
            ("unprivileged", Some(u8::from(!self.privileged).to_string())),
            ("rootfs", self.rootfs.as_ref().map(Volume::write).transpose()?),
            ("hostname", self.hostname.clone()),
            ("swap", self.swap.map(|n| n.to_string())),
            ("features", Some(self.features.write()?).filter(|t| !t.is_empty())),
            ("ostype", self.ostype.clone()),
            ("onboot", (!self.guest.extra.contains_key("onboot")).then(|| "0".into())),
        ]));
        for (n, mount) in self.mounts.iter().enumerate() {
            form.push((format!("mp{n}"), mount.write()?));
        }
        form.extend(self.guest.extra.clone());
        Ok(form)
    }

    /// Storage of the root file system.
    pub fn storage(&self) -> &str {
        self.guest.storage(self.rootfs.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

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
        assert_eq!((c.nets[&0].name.as_str(), c.volumes["mp12"].mp.as_deref()), ("eth0", Some("/data")));
        assert!(c.features.nesting && c.tags.has("k8s") && c.description() == "notes\n");
        assert!(CtConfig::parse(&Value::Null).is_err());
        assert!(CtConfig::parse(&serde_json::json!({ "description": "no digest" })).is_err());
    }

    #[test]
    fn a_new_container_is_unprivileged_and_stays_off_at_boot() {
        let spec = CtSpec {
            ostemplate: "local:vztmpl/a.tar".into(),
            rootfs: Some(Volume::allocate("tank", 1024)),
            guest: NewGuest {
                nets: vec![Net { name: "eth0".into(), bridge: Some("vmbr0".into()), ..Net::default() }],
                tags: "b;a".parse().unwrap(),
                ..NewGuest::default()
            },
            ..CtSpec::default()
        };
        let form: BTreeMap<_, _> = spec.form(Vmid::new(100).unwrap()).unwrap().into_iter().collect();
        assert_eq!((form["unprivileged"].as_str(), form["onboot"].as_str(), form["tags"].as_str()), ("1", "0", "a;b"));
        assert_eq!((form["net0"].as_str(), form["rootfs"].as_str()), ("bridge=vmbr0,name=eth0", "volume=tank:1"));
        assert!(!form.contains_key("memory") && !form.contains_key("features"));
        assert_eq!(spec.storage(), "tank");
        let mut told = spec.clone();
        told.guest.extra.insert("password".into(), "hunter22".into());
        assert!(format!("{told:?}").contains("password") && !format!("{told:?}").contains("hunter22"));
        let evil = CtSpec { rootfs: Some(Volume { volume: "a:1,ro=1".into(), ..Volume::default() }), ..spec };
        assert!(evil.form(Vmid::new(100).unwrap()).is_err());
    }
}
