//! Files of the Container Device Interface, versions up to 1.1.0: what they say, checked. Pure.
//!
//! Own code and not the `container-device-interface` crate: that one gives its failures as text without a kind, hides the
//! fields that we have to refuse by name, and brings an abandoned YAML parser.

use serde::Deserialize;

use super::{CdiError, names};

/// Versions of the format.
const VERSIONS: [&str; 10] = ["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];

/// A file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Spec {
    cdi_version: String,
    /// "vendor.com/class".
    pub kind: String,
    #[serde(default)]
    #[allow(dead_code)] // for people
    annotations: std::collections::BTreeMap<String, String>,
    /// Its devices.
    pub devices: Vec<Device>,
    /// What goes with every one of them.
    #[serde(default)]
    pub container_edits: Edits,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Device {
    /// "gpu0".
    pub name: String,
    #[serde(default)]
    #[allow(dead_code)]
    annotations: std::collections::BTreeMap<String, String>,
    /// What it takes.
    pub container_edits: Edits,
}

/// What changes in a container's specification.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Edits {
    /// NAME=value.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<DeviceNode>,
    /// Interfaces of the host that would move into the container.
    pub net_devices: Vec<NetDevice>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Programs that run on the host, as root, at points of the container's life.
    pub hooks: Vec<Hook>,
    /// Resource director of Intel CPUs.
    pub intel_rdt: Option<IntelRdt>,
    /// More groups of the process.
    #[serde(rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct DeviceNode {
    /// In the container.
    pub path: String,
    /// On the host; None: the same.
    pub host_path: Option<String>,
    /// "b", "c", "u", "p"; None: the host's.
    pub r#type: Option<String>,
    /// None: the host's.
    pub major: Option<i64>,
    /// None: the host's.
    pub minor: Option<i64>,
    /// None: the host's.
    pub file_mode: Option<u32>,
    /// Of "rwm"; "none": the node without access to it; "": all.
    pub permissions: Option<String>,
    /// None: that of the container's user.
    pub uid: Option<u32>,
    /// None: that of the container's user.
    pub gid: Option<u32>,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct NetDevice {
    /// On the host.
    pub host_interface_name: String,
    /// In the container.
    pub name: String,
}

/// A mount.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Mount {
    /// Source.
    pub host_path: String,
    /// Where.
    pub container_path: String,
    /// None: a bind mount.
    pub r#type: Option<String>,
    /// Options.
    pub options: Vec<String>,
}

/// A hook.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Hook {
    /// "createContainer" and so on.
    pub hook_name: String,
    /// Program, absolute.
    pub path: String,
    /// Its arguments, the program's name first.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<String>,
    /// Seconds; None: no limit.
    pub timeout: Option<i64>,
}

/// Settings of resctrl.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IntelRdt {
    /// Group.
    #[serde(rename = "closID")]
    pub clos_id: Option<String>,
    /// Cache lines.
    #[serde(rename = "l3CacheSchema")]
    pub l3_cache_schema: Option<String>,
    /// Memory bandwidth lines.
    #[serde(rename = "memBwSchema")]
    pub mem_bw_schema: Option<String>,
    /// Lines of the schemata file.
    pub schemata: Option<Vec<String>>,
    /// Monitoring.
    #[serde(rename = "enableMonitoring")]
    pub enable_monitoring: Option<bool>,
    /// Monitoring of caches.
    #[serde(rename = "enableCMT")]
    pub enable_cmt: Option<bool>,
    /// Monitoring of bandwidth.
    #[serde(rename = "enableMBM")]
    pub enable_mbm: Option<bool>,
}

/// Points at which hooks run.
pub const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// The content of `file`, JSON or YAML by its name; the reason is for whoever wrote it.
pub fn parse(text: &str, json: bool) -> Result<Spec, String> {
    let spec: Spec = match json {
        true => serde_json::from_str(text).map_err(|e| e.to_string())?,
        false => serde_saphyr::from_str(text).map_err(|e| e.to_string())?,
    };
    if !VERSIONS.contains(&spec.cdi_version.as_str()) {
        return Err(format!("cdiVersion {:?} is not known (up to {})", spec.cdi_version, VERSIONS[VERSIONS.len() - 1]));
    }
    names::check_kind(&spec.kind).map_err(|e: CdiError| e.to_string())?;
    if spec.devices.is_empty() {
        return Err("no devices".into());
    }
    check(&spec.container_edits)?;
    let mut seen = std::collections::BTreeSet::new();
    for device in &spec.devices {
        names::check_device(&device.name).map_err(|e| e.to_string())?;
        if !seen.insert(&device.name) {
            return Err(format!("device {:?} twice", device.name));
        }
        check(&device.container_edits).map_err(|why| format!("device {:?}: {why}", device.name))?;
    }
    Ok(spec)
}

fn check(edits: &Edits) -> Result<(), String> {
    if let Some(bad) =
        edits.env.iter().find(|e| e.contains('\0') || e.split_once('=').is_none_or(|(n, _)| n.is_empty()))
    {
        return Err(format!("env {:?} is not NAME=value", bad.split('=').next().unwrap_or_default()));
    }
    for d in &edits.device_nodes {
        inside("deviceNodes: path", &d.path)?;
        d.host_path.as_deref().map_or(Ok(()), |p| absolute("deviceNodes: hostPath", p))?;
        if d.r#type.as_deref().is_some_and(|t| !matches!(t, "" | "b" | "c" | "u" | "p")) {
            return Err(format!("device node {:?}: type {:?} is none of b, c, u, p", d.path, d.r#type));
        }
        let access = d.permissions.as_deref().unwrap_or_default();
        if access != "none" && !access.chars().all(|c| "rwm".contains(c)) {
            return Err(format!("device node {:?}: permissions {access:?} are not of rwm", d.path));
        }
    }
    for m in &edits.mounts {
        inside("mounts: containerPath", &m.container_path)?;
        if m.host_path.is_empty() {
            return Err(format!("mount at {:?}: no hostPath", m.container_path));
        }
    }
    for h in &edits.hooks {
        absolute("hooks: path", &h.path)?;
        if !HOOKS.contains(&h.hook_name.as_str()) {
            return Err(format!("hook {:?} is none of {}", h.hook_name, HOOKS.join(", ")));
        }
    }
    Ok(())
}

fn absolute(what: &str, path: &str) -> Result<(), String> {
    let good = path.starts_with('/') && !path.contains('\0');
    if good { Ok(()) } else { Err(format!("{what} {path:?} is not absolute")) }
}

fn inside(what: &str, path: &str) -> Result<(), String> {
    absolute(what, path)?;
    let out = path.split('/').any(|p| p == "..") || path.split('/').all(str::is_empty);
    if out { Err(format!("{what} {path:?} leads out of the container")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_yaml_say_the_same() {
        let json = r#"{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","containerEdits":{"env":["A=1"]},
            "devices":[{"name":"gpu0","containerEdits":{"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/null",
            "permissions":"rw"}],"hooks":[{"hookName":"createContainer","path":"/bin/x","args":["x","-v"]}],
            "mounts":[{"hostPath":"/usr/lib/x","containerPath":"/usr/lib/x","options":["ro","bind"]}],
            "additionalGids":[44],"intelRdt":{"closID":"c"}}}]}"#;
        let yaml = "cdiVersion: 0.6.0\nkind: vendor.com/gpu\ncontainerEdits:\n  env: [A=1]\ndevices:\n- name: gpu0\n  containerEdits:\n    deviceNodes:\n    - path: /dev/gpu0\n      hostPath: /dev/null\n      permissions: rw\n    hooks:\n    - hookName: createContainer\n      path: /bin/x\n      args: [x, -v]\n    mounts:\n    - hostPath: /usr/lib/x\n      containerPath: /usr/lib/x\n      options: [ro, bind]\n    additionalGids: [44]\n    intelRdt:\n      closID: c\n";
        let spec = parse(json, true).expect("JSON");
        assert_eq!(parse(yaml, false).expect("YAML"), spec);
        assert_eq!(spec.devices[0].container_edits.additional_gids, [44]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |version: &str, kind: &str, edits: &str| {
            let text = format!(
                r#"{{"cdiVersion":"{version}","kind":"{kind}","devices":[{{"name":"d","containerEdits":{edits}}}]}}"#
            );
            parse(&text, true).expect_err("refused")
        };
        assert!(with("2.0.0", "v/c", "{}").contains("2.0.0"));
        assert!(with("1.0.0", "v", "{}").contains("vendor/class"));
        for (edits, word) in [
            (r#"{"env":["=x"]}"#, "env"),
            (r#"{"surprise":1}"#, "surprise"),
            (r#"{"deviceNodes":[{"path":"dev/x"}]}"#, "dev/x"),
            (r#"{"deviceNodes":[{"path":"/dev/../x"}]}"#, "leads out"),
            (r#"{"deviceNodes":[{"path":"/dev/x","permissions":"rx"}]}"#, "rx"),
            (r#"{"mounts":[{"hostPath":"/x","containerPath":"/"}]}"#, "leads out"),
            (r#"{"hooks":[{"hookName":"later","path":"/x"}]}"#, "later"),
            (r#"{"hooks":[{"hookName":"poststop","path":"x"}]}"#, "not absolute"),
        ] {
            assert!(with("1.0.0", "v/c", edits).contains(word), "{edits}");
        }
        assert!(parse(r#"{"cdiVersion":"1.0.0","kind":"v/c","devices":[]}"#, true).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in ".*", json in proptest::bool::ANY) {
            let _ = parse(&text, json);
        }
    }
}
