//! Network configuration: finding the file that counts, checking it, and what each plugin is given of it.
//!
//! Called by `cni` alone. Reading blocks shortly (a few small files). A file that can't be used is skipped and told
//! with its reason; the first usable one in lexical order wins, as everywhere else where CNI is used. Pure but for
//! [`scan`]; holds no state. Format: the CNI specification 1.1.0, section 1.

use std::io;
use std::time::SystemTime;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::core::ports::NetworkRequest;
use crate::core::spec::Protocol;

/// Versions of the specification that we speak, oldest first.
pub(super) const SUPPORTED: [Version; 5] =
    [Version(0, 3, 0), Version(0, 3, 1), Version(0, 4, 0), Version(1, 0, 0), Version(1, 1, 0)];
/// Largest configuration file in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(pub u16, pub u16, pub u16);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl TryFrom<String> for Version {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let mut parts = text.split('.').map(str::parse::<u16>);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Ok(a)), Some(Ok(b)), Some(Ok(c)), None) => Ok(Self(a, b, c)),
            _ => Err(format!("{text:?} is not a version")),
        }
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.to_string()
    }
}

/// A network: a chain of plugins, as configured. Stored with each attachment so that DEL sees what ADD saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct NetworkConf {
    pub name: String,
    pub version: Version,
    /// The plugins' own objects, in the order of ADD.
    pub plugins: Vec<Map<String, Value>>,
    #[serde(default)]
    pub disable_check: bool,
    #[serde(default)]
    pub disable_gc: bool,
    /// File it came from.
    pub source: String,
}

impl NetworkConf {
    /// Parses a file; `list`: a .conflist, else the object of a single plugin.
    pub fn parse(text: &[u8], list: bool, source: &str) -> Result<Self, String> {
        let Value::Object(mut top) = serde_json::from_slice(text).map_err(|e| format!("not JSON: {e}"))? else {
            return Err("not a JSON object".into());
        };
        let name = top.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !valid_name(&name) {
            return Err(format!("{name:?} is not the name of a network"));
        }
        let version = negotiate(&top)?;
        let flag = |key: &str| match top.get(key) {
            // The specification says boolean; strings are found in the field.
            Some(Value::String(s)) => s.eq_ignore_ascii_case("true"),
            Some(value) => value.as_bool().unwrap_or(false),
            None => false,
        };
        let (disable_check, disable_gc) = (flag("disableCheck"), flag("disableGC"));
        let objects = match list {
            false => vec![Value::Object(top)],
            true => match top.remove("plugins") {
                Some(Value::Array(objects)) if !objects.is_empty() => objects,
                _ => return Err("no plugins in the list".into()),
            },
        };
        let plugins = objects.into_iter().map(check_plugin).collect::<Result<_, _>>()?;
        Ok(Self { name, version, plugins, disable_check, disable_gc, source: source.to_owned() })
    }

    /// What a plugin reads on its standard input: its own object and what the runtime adds (section 3, "deriving
    /// execution configuration"). `request` brings the runtime configuration for the capabilities it declares.
    pub fn input(
        &self,
        plugin: usize,
        request: Option<&NetworkRequest>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let mut input = self.plugins.get(plugin).cloned().unwrap_or_default();
        let capabilities = input.remove("capabilities");
        input.retain(|key, _| !key.starts_with("cni.dev/"));
        for key in ["runtimeConfig", "prevResult"] {
            input.remove(key);
        }
        input.insert("name".into(), json!(self.name));
        input.insert("cniVersion".into(), json!(self.version));
        if let (Some(request), Some(Value::Object(capabilities))) = (request, capabilities) {
            let mut runtime = runtime_config(request);
            runtime.retain(|key, _| capabilities.get(key).and_then(Value::as_bool) == Some(true));
            if !runtime.is_empty() {
                input.insert("runtimeConfig".into(), Value::Object(runtime));
            }
        }
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.clone());
        }
        input
    }

    /// Programs of the chain, address managers included.
    pub fn programs(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().flat_map(|plugin| {
            let ipam = plugin.get("ipam").and_then(|ipam| ipam.get("type"));
            [plugin.get("type"), ipam].into_iter().flatten().filter_map(Value::as_str).filter(|name| !name.is_empty())
        })
    }

    /// Program of one plugin.
    pub fn program(&self, plugin: usize) -> &str {
        self.plugins.get(plugin).and_then(|p| p.get("type")).and_then(Value::as_str).unwrap_or_default()
    }
}

/// The newest version that the configuration offers and that we speak.
fn negotiate(top: &Map<String, Value>) -> Result<Version, String> {
    let parse = |value: &Value| Version::try_from(value.as_str().unwrap_or_default().to_owned());
    let mut offered = Vec::new();
    if let Some(version) = top.get("cniVersion") {
        offered.push(parse(version)?);
    }
    if let Some(Value::Array(versions)) = top.get("cniVersions") {
        for version in versions {
            offered.push(parse(version)?);
        }
    }
    if offered.is_empty() {
        return Err("no cniVersion".into());
    }
    offered.iter().filter(|v| SUPPORTED.contains(v)).max().copied().ok_or_else(|| {
        let list = |all: &[Version]| all.iter().map(Version::to_string).collect::<Vec<_>>().join(", ");
        format!("cniVersion {} is not supported (only {})", list(&offered), list(&SUPPORTED))
    })
}

fn check_plugin(object: Value) -> Result<Map<String, Value>, String> {
    let Value::Object(plugin) = object else { return Err("a plugin is not a JSON object".into()) };
    let ipam = plugin.get("ipam").and_then(|ipam| ipam.get("type")).and_then(Value::as_str).unwrap_or_default();
    match plugin.get("type").and_then(Value::as_str) {
        None | Some("") => Err("a plugin has no type".into()),
        // The type is a file name in the plugin folders; anything else would run programs from elsewhere.
        Some(name) if [name, ipam].iter().any(|n| n.contains(['/', '\0']) || *n == "." || *n == "..") => {
            Err(format!("the plugin type {name:?} is not a plain file name"))
        }
        Some(_) => Ok(plugin),
    }
}

fn valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Everything a plugin can ask for by a capability (CNI conventions: "dynamic plugin specific fields").
fn runtime_config(request: &NetworkRequest) -> Map<String, Value> {
    let mut all = Map::new();
    let ports: Vec<Value> = request
        .port_mappings
        .iter()
        .filter(|p| p.host_port != 0)
        .map(|p| {
            let protocol = match p.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
            };
            let mut port = json!({"hostPort": p.host_port, "containerPort": p.container_port, "protocol": protocol});
            // An unspecified address means all, which plugins read from its absence.
            if let Some(ip) = p.host_ip.filter(|ip| !ip.is_unspecified()) {
                port["hostIP"] = json!(ip.to_string());
            }
            port
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".into(), Value::Array(ports));
    }
    let mut bandwidth = Map::new();
    for (rate, burst, bps) in
        [("ingressRate", "ingressBurst", request.ingress_bps), ("egressRate", "egressBurst", request.egress_bps)]
    {
        if bps > 0 {
            bandwidth.insert(rate.into(), json!(bps));
            // A rate without a burst is refused; the annotations have none, so it does not limit.
            bandwidth.insert(burst.into(), json!(i32::MAX));
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".into(), Value::Object(bandwidth));
    }
    if let Some(dns) = &request.dns {
        let value = json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options});
        all.insert("dns".into(), value);
    }
    if !request.cgroup_path.is_empty() {
        all.insert("cgroupPath".into(), json!(request.cgroup_path));
    }
    all
}

/// What the configuration folders look like; when it is unchanged, so is the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Fingerprint(Vec<FileFingerprint>);

/// Path, time of the last change, length and inode of a file.
pub(super) type FileFingerprint = (Utf8PathBuf, Option<SystemTime>, u64, u64);

impl Fingerprint {
    /// Configuration files of the folders in the order in which they are tried. Blocks shortly.
    pub fn take(folders: &[Utf8PathBuf]) -> io::Result<Self> {
        let mut all = Vec::new();
        for folder in folders {
            let mut files = Vec::new();
            let entries = match std::fs::read_dir(folder) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let Ok(path) = Utf8PathBuf::try_from(entry?.path()) else { continue };
                if !matches!(path.extension(), Some("conf" | "conflist" | "json")) {
                    continue;
                }
                // Follows links (config maps are links); a file that is gone by now is not there.
                let Ok(meta) = std::fs::metadata(&path) else { continue };
                if meta.is_file() {
                    let inode = std::os::unix::fs::MetadataExt::ino(&meta);
                    files.push((path, meta.modified().ok(), meta.len(), inode));
                }
            }
            files.sort();
            all.append(&mut files);
        }
        Ok(Self(all))
    }

    /// The files, in the order in which they are tried.
    pub fn files(&self) -> &[FileFingerprint] {
        &self.0
    }

    /// Reads the files until one is usable; also gives those that are not, each with its reason. Blocks shortly.
    pub fn first_usable(&self) -> (Option<NetworkConf>, Vec<String>) {
        let mut refused = Vec::new();
        for (path, _, len, _) in &self.0 {
            match read(path, *len) {
                Ok(conf) => return (Some(conf), refused),
                Err(why) => refused.push(format!("{path}: {why}")),
            }
        }
        (None, refused)
    }
}

fn read(path: &Utf8Path, len: u64) -> Result<NetworkConf, String> {
    if len > FILE_MAX {
        return Err(format!("larger than {FILE_MAX} bytes"));
    }
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    NetworkConf::parse(&text, path.extension() == Some("conflist"), path.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::PodId;
    use crate::core::spec::{DnsConfig, PortMapping};

    fn request() -> NetworkRequest {
        let port = |host_ip: &str| PortMapping {
            protocol: Protocol::Udp,
            container_port: 53,
            host_port: 5353,
            host_ip: Some(host_ip.parse().unwrap()),
        };
        NetworkRequest {
            pod: PodId::new(),
            name: "web-0".into(),
            namespace: "default".into(),
            uid: "u1".into(),
            netns: "/run/netns/cni-x".into(),
            port_mappings: vec![port("10.0.0.1"), port("0.0.0.0"), PortMapping { host_port: 0, ..port("::") }],
            ingress_bps: 1_000_000,
            egress_bps: 0,
            dns: Some(DnsConfig { servers: vec!["10.96.0.10".into()], ..DnsConfig::default() }),
            cgroup_path: "/kubepods/x".into(),
        }
    }

    #[test]
    fn lists_single_files_and_versions() {
        let parse = |text: &str, list| NetworkConf::parse(text.as_bytes(), list, "f");
        let single =
            parse(r#"{"cniVersion":"0.3.1","name":"a","type":"bridge","ipam":{"type":"host-local"}}"#, false).unwrap();
        assert_eq!(single.programs().collect::<Vec<_>>(), ["bridge", "host-local"]);
        let list = r#"{"cniVersion":"0.4.0","cniVersions":["1.0.0","9.9.9"],"name":"n","disableCheck":"true","plugins":[{"type":"x"}]}"#;
        let list = parse(list, true).unwrap();
        assert_eq!((list.version, list.disable_check, list.disable_gc), (Version(1, 0, 0), true, false));
        for (text, list, why) in [
            ("[]", true, "object"),
            ("{", true, "JSON"),
            (r#"{"name":"a","type":"b"}"#, false, "no cniVersion"),
            (r#"{"cniVersion":"0.2.0","name":"a","type":"b"}"#, false, "0.2.0 is not supported"),
            (r#"{"cniVersion":"2.0.0","name":"a","type":"b"}"#, false, "only 0.3.0"),
            (r#"{"cniVersion":"x","name":"a","type":"b"}"#, false, "version"),
            (r#"{"cniVersion":"1.0.0","name":"../a","type":"b"}"#, false, "name"),
            (r#"{"cniVersion":"1.0.0","name":"a","type":"../b"}"#, false, "file name"),
            (r#"{"cniVersion":"1.0.0","name":"a","type":"b","ipam":{"type":"/c"}}"#, false, "file name"),
            (r#"{"cniVersion":"1.0.0","name":"a"}"#, false, "no type"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#, true, "no plugins"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[1]}"#, true, "not a JSON object"),
        ] {
            let e = parse(text, list).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn plugins_get_what_they_declare_and_nothing_else() {
        let text = r#"{"cniVersion":"1.0.0","name":"n","plugins":[
            {"type":"a","capabilities":{"portMappings":true,"dns":false,"ips":true},"cni.dev/x":1,"own":2,"prevResult":{}},
            {"type":"b","capabilities":{"bandwidth":true,"cgroupPath":true,"dns":true}},
            {"type":"c"}]}"#;
        let conf = NetworkConf::parse(text.as_bytes(), true, "f").unwrap();
        let request = request();
        let a = Value::Object(conf.input(0, Some(&request), None));
        assert_eq!(
            a,
            json!({"type":"a","own":2,"name":"n","cniVersion":"1.0.0","runtimeConfig":{"portMappings":[
                {"hostPort":5353,"containerPort":53,"protocol":"udp","hostIP":"10.0.0.1"},
                {"hostPort":5353,"containerPort":53,"protocol":"udp"}]}})
        );
        let b = Value::Object(conf.input(1, Some(&request), Some(&json!({"ips":[]}))));
        assert_eq!(b["prevResult"], json!({"ips":[]}));
        assert_eq!(b["runtimeConfig"]["bandwidth"], json!({"ingressRate":1_000_000,"ingressBurst":i32::MAX}));
        assert_eq!(b["runtimeConfig"]["cgroupPath"], "/kubepods/x");
        assert_eq!(b["runtimeConfig"]["dns"]["servers"][0], "10.96.0.10");
        assert_eq!(
            Value::Object(conf.input(2, Some(&request), None)),
            json!({"type":"c","name":"n","cniVersion":"1.0.0"})
        );
    }

    #[test]
    fn the_first_usable_file_counts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Utf8PathBuf::try_from(dir.path().to_path_buf()).unwrap();
        let folders = [folder.join("absent"), folder.clone()];
        assert_eq!(Fingerprint::take(&folders).unwrap(), Fingerprint::default());
        let write = |name: &str, text: &str| {
            crate::utils::atomic::write(
                folder.join(name).as_std_path(),
                text.as_bytes(),
                0o600,
                crate::utils::atomic::Durability::Process,
            )
            .unwrap()
        };
        write("00-notes.txt", "no");
        write("10-broken.conflist", "{");
        write("30-late.json", r#"{"cniVersion":"1.0.0","name":"late","type":"b"}"#);
        let before = Fingerprint::take(&folders).unwrap();
        let (conf, refused) = before.first_usable();
        assert_eq!(conf.unwrap().name, "late");
        assert!(refused.len() == 1 && refused[0].contains("10-broken.conflist: not JSON"), "{refused:?}");
        write("20-early.conf", r#"{"cniVersion":"1.0.0","name":"early","type":"b"}"#);
        let after = Fingerprint::take(&folders).unwrap();
        assert_ne!(before, after);
        assert_eq!(after.first_usable().0.unwrap().name, "early");
        write("20-early.conf", r#"{"cniVersion":"1.0.0","name":"other","type":"b"}"#);
        assert_ne!(Fingerprint::take(&folders).unwrap(), after);
    }
}
