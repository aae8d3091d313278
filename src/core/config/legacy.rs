//! The legacy program's configuration (JSON) and variables as ours: what goes where, what is dropped and why, what somebody has to
//! decide.
//!
//! Pure. Called by `config migrate` and, for the two variables that set the level of the log, by the loader. Every key of the old
//! file is in the report, known or not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::Value;

use super::Config;
use crate::core::error::{Error, Kind, Result};

/// What became of an old key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is these new keys.
    Taken(String),
    /// It has no place here.
    Dropped(String),
    /// It asks for something that is not done: somebody has to decide.
    Decide(String),
}

/// An old key and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Its name in the old file: `proxmox.hosts`.
    pub key: String,
    /// What became of it.
    pub fate: Fate,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fate {
            Fate::Taken(new) => write!(f, "taken    {} -> {new}", self.key),
            Fate::Dropped(why) => write!(f, "dropped  {}: {why}", self.key),
            Fate::Decide(why) => write!(f, "decide   {}: {why}", self.key),
        }
    }
}

/// A new file, and what is to be known of it.
#[derive(Clone)]
pub struct Migrated {
    /// The file's text (TOML).
    pub text: String,
    /// Each key of the old one, by name.
    pub notes: Vec<Note>,
    /// The API token's secret, which belongs into `proxmox.token_file`.
    pub secret: Option<String>,
}

impl Migrated {
    /// Whether something was asked for that somebody has to decide.
    pub fn undecided(&self) -> bool {
        self.notes.iter().any(|n| matches!(n.fate, Fate::Decide(_)))
    }
}

/// The level that a variable of the legacy program asks for; None: it is none of those.
pub(super) fn level_of_variable(name: &str, value: &str) -> Option<&'static str> {
    match name {
        "NEXCAGE_LOG_LEVEL" => level(value),
        "NEXCAGE_DEBUG" if matches!(value, "1" | "true" | "yes") => Some("debug"),
        _ => None,
    }
}

fn level(old: &str) -> Option<&'static str> {
    Some(match old.to_ascii_lowercase().as_str() {
        "trace" => "trace",
        "debug" => "debug",
        "info" => "info",
        "warn" | "warning" => "warn",
        "err" | "error" | "fatal" | "critical" => "error",
        _ => return None,
    })
}

/// Makes a file of the text of the old one.
pub fn migrate(json: &str) -> Result<Migrated> {
    let old: Value = serde_json::from_str(json)
        .map_err(|e| Error::because(Kind::InvalidArgument, "the old configuration is no JSON", e))?;
    let root = old.as_object().ok_or_else(|| Error::invalid("the old configuration is no JSON object"))?;
    let mut work = Work::default();
    for (key, value) in root {
        work.flatten(key, value);
    }
    work.all();
    let keys: Vec<String> = work.old.keys().filter(|k| !work.seen.contains(*k)).cloned().collect();
    for key in keys {
        work.note(&key, Fate::Dropped("no such key was ever read by the legacy program".into()));
    }
    work.notes.sort_by(|a, b| a.key.cmp(&b.key));
    let body =
        toml::to_string(&work.new).map_err(|e| Error::internal(format!("writing the new configuration: {e}")))?;
    let text = format!(
        "# Made of the legacy program's configuration by `proxmox-lxcri config migrate`.\nversion = 1\n\n{body}"
    );
    // What is written has to be taken; what is not is said where somebody sees it.
    if let Err(e) = Config::parse(&text, "the new configuration") {
        work.note("(the whole)", Fate::Decide(e.chain()));
    }
    Ok(Migrated { text, notes: work.notes, secret: work.secret })
}

/// What security flags ask for, of which each was parsed and none applied.
const SECURITY: &[&str] =
    &["seccomp", "apparmor", "no_new_privileges", "read_only", "readonly_rootfs", "capabilities", "user_namespace"];

/// Old keys without a new one, and why. A dot at the end stands for all below.
const DROPPED: &[(&str, &str)] = &[
    ("runtime.log_path", "the log goes to journald (standard error)"),
    ("log_path", "the log goes to journald (standard error)"),
    ("log_file", "the log goes to journald (standard error)"),
    ("cache_dir", "everything is below server.root"),
    ("temp_dir", "everything is below server.root"),
    ("storage.image_path", "images are below server.root"),
    ("proxmox.pct_path", "the Proxmox API is used, not pct"),
    ("proxmox.node_cache_duration", "nothing of the cluster is cached for so long"),
    (
        "proxmox.rootfs_size_gb",
        "containers have clones of image layers; images.zfs.container_quota limits what they write",
    ),
    ("proxmox.ostype", "CTs are made of a template of ours, whatever the image is"),
    ("zfs.auto_detect", "images.driver says which storage is used; nothing is guessed"),
    ("zfs.compression", "a property of the dataset: zfs set compression=... DATASET"),
    ("zfs.snapshot_retention.", "snapshots of pods are made and removed by name, none by itself"),
    ("storage.", "no key here; images.driver and images.zfs say where images are kept"),
    ("network.name", "the interface in a pod is eth0"),
    ("network.type", "handlers.proxmox-lxc.network.kind says who connects pods"),
    ("network.dns_servers", "a pod's resolvers are the kubelet's to say (dnsPolicy, dnsConfig)"),
    ("networking.dns_servers", "a pod's resolvers are the kubelet's to say (dnsPolicy, dnsConfig)"),
    ("networking.vlan_aware", "a property of the node's bridge"),
    ("network.vlan_aware", "a property of the node's bridge"),
    ("resources.", "a container's limits are its pod's to say; `run` has flags for its own"),
    (
        "profiles.",
        "what all pods of a handler have to be like is in handlers.HANDLER.policy; the rest is the pods' to say",
    ),
];

#[derive(Default)]
struct Work {
    /// The old file's values by full name; lists are values.
    old: BTreeMap<String, Value>,
    seen: BTreeSet<String>,
    new: toml::Table,
    notes: Vec<Note>,
    secret: Option<String>,
}

impl Work {
    fn flatten(&mut self, key: &str, value: &Value) {
        match value.as_object() {
            Some(map) => map.iter().for_each(|(k, v)| self.flatten(&format!("{key}.{k}"), v)),
            None => {
                self.old.insert(key.to_owned(), value.clone());
            }
        }
    }

    fn note(&mut self, key: &str, fate: Fate) {
        self.seen.insert(key.to_owned());
        self.notes.push(Note { key: key.to_owned(), fate });
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        let value = self.old.get(key).cloned();
        if value.is_some() {
            self.seen.insert(key.to_owned());
        }
        value
    }

    fn set(&mut self, path: &str, value: impl Into<toml::Value>) {
        let (mut table, mut parts) = (&mut self.new, path.split('.').peekable());
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                table.insert(part.to_owned(), value.into());
                return;
            }
            let inner = table.entry(part.to_owned()).or_insert_with(|| toml::Table::new().into());
            let toml::Value::Table(inner) = inner else { return };
            table = inner;
        }
    }

    /// Takes a text, or says that it is none.
    fn text(&mut self, key: &str, new: &str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) if text.is_empty() => {
                self.note(key, Fate::Dropped("empty".into()));
                None
            }
            Value::String(text) => {
                self.set(new, text.clone());
                self.note(key, Fate::Taken(new.to_owned()));
                Some(text)
            }
            other => {
                self.note(key, Fate::Decide(format!("{other} is no text")));
                None
            }
        }
    }

    fn all(&mut self) {
        self.proxmox("proxmox");
        self.proxmox("legacy_api");
        self.folders_and_log();
        self.storage();
        self.handler();
        self.routing();
        self.network();
        self.flags();
        for (key, why) in DROPPED {
            let of = |k: &String| if key.ends_with('.') { k.starts_with(key) } else { k == key };
            let found: Vec<String> = self.old.keys().filter(|k| of(k) && !self.seen.contains(*k)).cloned().collect();
            for key in found {
                self.note(&key, Fate::Dropped((*why).to_owned()));
            }
        }
    }

    fn proxmox(&mut self, table: &str) {
        let key = |name: &str| format!("{table}.{name}");
        let port = self.take(&key("port"));
        if let Some(port) = &port {
            let fate = match port.as_u64().filter(|p| (1..=65_535).contains(p)) {
                Some(_) => Fate::Taken("proxmox.endpoints".into()),
                None => Fate::Decide(format!("{port} is no port")),
            };
            self.note(&key("port"), fate);
        }
        let port = port.and_then(|p| p.as_u64()).unwrap_or(8006);
        for name in ["hosts", "host"] {
            let hosts: Vec<String> = match self.take(&key(name)) {
                Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                Some(Value::String(one)) => vec![one],
                Some(other) => {
                    self.note(&key(name), Fate::Decide(format!("{other} is no list of hosts")));
                    continue;
                }
                None => continue,
            };
            let endpoint = |h: &String| match h.contains("://") {
                true => h.clone(),
                false => format!("https://{h}:{port}"),
            };
            self.set("proxmox.endpoints", hosts.iter().map(endpoint).collect::<Vec<_>>());
            self.note(&key(name), Fate::Taken("proxmox.endpoints".into()));
        }
        self.token(&key("token"));
        self.text(&key("node"), "proxmox.node");
        self.text(&key("storage"), "handlers.proxmox-lxc.storage");
        match self.take(&key("timeout")) {
            Some(Value::Number(n)) if n.as_u64().is_some_and(|n| n > 0) => {
                self.set("proxmox.timeout", format!("{n}s"));
                self.note(&key("timeout"), Fate::Taken("proxmox.timeout".into()));
            }
            Some(other) => self.note(&key("timeout"), Fate::Decide(format!("{other} is no number of seconds"))),
            None => {}
        }
        self.flag(&key("verify_ssl"), true, "certificates are always verified", {
            "certificates are always verified: say proxmox.fingerprint (pvenode cert info) or proxmox.ca_file"
        });
        self.flag(&key("unprivileged"), true, "CTs are always unprivileged", "CTs are always unprivileged");
    }

    fn token(&mut self, key: &str) {
        match self.take(key) {
            Some(Value::String(text)) => {
                let bare = text.strip_prefix("PVEAPIToken=").unwrap_or(&text);
                // Not shown: if it is no token in that form it may be the secret alone.
                let Some((id, secret)) = bare.split_once('=').filter(|(id, _)| id.contains('!')) else {
                    let why = "not of the form user@realm!id=secret; say proxmox.token_id, the secret goes into proxmox.token_file";
                    return self.note(key, Fate::Decide(why.into()));
                };
                self.set("proxmox.token_id", id);
                self.secret = Some(secret.to_owned());
                self.note(key, Fate::Taken("proxmox.token_id, and the file proxmox.token_file for its secret".into()));
            }
            Some(_) => self.note(key, Fate::Decide("no text".into())),
            None => {}
        }
    }

    fn folders_and_log(&mut self) {
        self.text("data_dir", "server.root");
        self.text("runtime.root_path", "server.state");
        self.text("runtime.root", "server.state");
        for key in ["log_level", "runtime.log_level"] {
            match self.take(key) {
                Some(Value::String(old)) => match level(&old) {
                    Some(new) => {
                        self.set("log.level", new);
                        self.note(key, Fate::Taken("log.level".into()));
                    }
                    None => self.note(key, Fate::Decide(format!("{old:?} is no level"))),
                },
                Some(other) => self.note(key, Fate::Decide(format!("{other} is no level"))),
                None => {}
            }
        }
        for key in ["log_format", "runtime.log_format"] {
            match self.take(key).as_ref().map(|v| v.as_str().unwrap_or_default()) {
                Some(form @ ("text" | "json")) => {
                    self.set("log.format", form);
                    self.note(key, Fate::Taken("log.format".into()));
                }
                Some(other) => self.note(key, Fate::Decide(format!("{other:?} is neither \"text\" nor \"json\""))),
                None => {}
            }
        }
        match self.take("runtime.systemd_cgroup") {
            Some(Value::Bool(systemd)) => {
                self.set("runtime.cgroup_driver", if systemd { "systemd" } else { "cgroupfs" });
                self.note("runtime.systemd_cgroup", Fate::Taken("runtime.cgroup_driver".into()));
            }
            Some(other) => {
                self.note("runtime.systemd_cgroup", Fate::Decide(format!("{other} is neither true nor false")))
            }
            None => {}
        }
    }

    fn storage(&mut self) {
        let named = self.text("storage.zfs_dataset", "images.zfs.dataset");
        let named = self.text("zfs.base_dataset", "images.zfs.dataset").or(named);
        match self.take("zfs.enabled") {
            Some(Value::Bool(true)) if named.is_none() => {
                self.note(
                    "zfs.enabled",
                    Fate::Decide("there is no dataset: say images.zfs.dataset and images.driver = \"zfs\"".into()),
                );
            }
            Some(Value::Bool(enabled)) => {
                self.set("images.driver", if enabled { "zfs" } else { "overlay" });
                self.note("zfs.enabled", Fate::Taken("images.driver".into()));
            }
            Some(other) => self.note("zfs.enabled", Fate::Decide(format!("{other} is neither true nor false"))),
            None if named.is_some() => self.set("images.driver", "zfs"),
            None => {}
        }
        self.flag("zfs.deduplication", false, "it is off", {
            "deduplication costs much memory and is not turned on: clones share their layers' blocks without it"
        });
    }

    /// A handler's new name.
    fn renamed(old: &str) -> Result<&'static str, String> {
        match old.to_ascii_lowercase().as_str() {
            "crun" | "runc" | "oci" => Ok("crun"),
            "lxc" | "proxmox-lxc" | "proxmox_lxc" | "pct" => Ok("proxmox-lxc"),
            "vm" | "qemu" | "proxmox" | "proxmox-vm" => {
                Err(format!("{old:?}: there is no handler for virtual machines"))
            }
            _ => Err(format!("{old:?} is no runtime that was ever known")),
        }
    }

    /// Turns a handler on that has to be.
    fn enable(&mut self, handler: &str) {
        if handler == "proxmox-lxc" {
            self.set("handlers.proxmox-lxc.enabled", true);
        }
    }

    fn handler(&mut self) {
        let keys = [
            "default_runtime",
            "runtime_type",
            "container_config.default_runtime",
            "container_config.default_container_type",
        ];
        let mut chosen: Option<(&str, &str)> = None;
        for key in keys {
            let Some(value) = self.take(key) else { continue };
            match (Self::renamed(value.as_str().unwrap_or_default()), chosen) {
                (Err(why), _) => self.note(key, Fate::Decide(why)),
                (Ok(new), Some((first, other))) if other != new => {
                    self.note(key, Fate::Decide(format!("{new} here, {other} in {first}, which was taken")));
                }
                (Ok(new), _) => {
                    chosen = Some((key, new));
                    self.set("runtime.default_handler", new);
                    self.enable(new);
                    self.note(key, Fate::Taken(format!("runtime.default_handler = {new:?}")));
                }
            }
        }
    }

    fn routing(&mut self) {
        let mut rules: Vec<toml::Value> = Vec::new();
        let rule = |pattern: &str, handler: &str| -> toml::Value {
            let name: toml::Table = [("name".to_owned(), glob(pattern).into())].into_iter().collect();
            [("match".to_owned(), name.into()), ("handler".to_owned(), handler.into())]
                .into_iter()
                .collect::<toml::Table>()
                .into()
        };
        for key in ["runtime.routing", "container_config.routing"] {
            let Some(value) = self.take(key) else { continue };
            let mut bad = None;
            for entry in value.as_array().into_iter().flatten() {
                let text = |name: &str| entry.get(name).and_then(Value::as_str);
                match (text("pattern"), text("runtime").map(Self::renamed)) {
                    (Some(pattern), Some(Ok(handler))) => {
                        rules.push(rule(pattern, handler));
                        self.enable(handler);
                    }
                    (_, Some(Err(why))) => bad = Some(why),
                    _ => bad = Some(format!("{entry} has not both a pattern and a runtime")),
                }
            }
            let fate = bad.map_or_else(|| Fate::Taken("routing".into()), Fate::Decide);
            self.note(key, fate);
        }
        let key = "container_config.crun_name_patterns";
        if let Some(value) = self.take(key) {
            rules.extend(value.as_array().into_iter().flatten().filter_map(Value::as_str).map(|p| rule(p, "crun")));
            self.note(key, Fate::Taken("routing".into()));
        }
        if !rules.is_empty() {
            self.set("routing", rules);
        }
    }

    /// Whether pods are, or may be, Proxmox containers.
    fn has_cts(&self) -> bool {
        self.new.get("handlers").and_then(|h| h.get("proxmox-lxc")).and_then(|h| h.get("enabled")).is_some()
    }

    fn network(&mut self) {
        const NEW: &str = "handlers.proxmox-lxc.network";
        let tables = ["network", "networking"];
        let cts = self.has_cts() && tables.iter().any(|t| self.old.contains_key(&format!("{t}.bridge")));
        if !cts {
            for name in ["bridge", "tag", "vlan", "mtu", "rate", "firewall", "ip", "gw", "gateway"] {
                for table in tables {
                    let key = format!("{table}.{name}");
                    if self.take(&key).is_some() {
                        self.note(&key, Fate::Dropped("pods are connected by the node's CNI plugins".into()));
                    }
                }
            }
            return;
        }
        self.set(&format!("{NEW}.kind"), "pve");
        self.set(&format!("{NEW}.address"), "dhcp");
        for table in tables {
            self.text(&format!("{table}.bridge"), &format!("{NEW}.bridge"));
            for (old, new) in
                [("tag", "vlan"), ("vlan", "vlan"), ("mtu", "mtu"), ("rate", "rate"), ("firewall", "firewall")]
            {
                let key = format!("{table}.{old}");
                let value = match self.take(&key) {
                    Some(Value::Bool(on)) if new == "firewall" => toml::Value::Boolean(on),
                    Some(Value::Number(n)) if new == "rate" && n.as_f64().is_some() => {
                        n.as_f64().unwrap_or_default().into()
                    }
                    Some(Value::Number(n)) if n.as_u64().is_some_and(|n| n <= 65_535) => {
                        i64::try_from(n.as_u64().unwrap_or_default()).unwrap_or_default().into()
                    }
                    Some(other) => {
                        self.note(&key, Fate::Decide(format!("{other} is none for {NEW}.{new}")));
                        continue;
                    }
                    None => continue,
                };
                self.set(&format!("{NEW}.{new}"), value);
                self.note(&key, Fate::Taken(format!("{NEW}.{new}")));
            }
            for name in ["ip", "gw", "gateway"] {
                let key = format!("{table}.{name}");
                match self.take(&key) {
                    Some(Value::String(text)) if text == "dhcp" => {
                        self.note(&key, Fate::Taken(format!("{NEW}.address")));
                    }
                    Some(_) => {
                        let why = format!(
                            "one address can't be every pod's; {NEW}.address is \"dhcp\" now, or a range FIRST-LAST/PREFIX"
                        );
                        self.note(&key, Fate::Dropped(why));
                    }
                    None => {}
                }
            }
        }
    }

    /// A flag whose wanted value is what is done anyway.
    fn flag(&mut self, key: &str, wanted: bool, is_so: &str, else_why: &str) {
        match self.take(key) {
            Some(Value::Bool(value)) if value == wanted => self.note(key, Fate::Dropped(is_so.to_owned())),
            Some(_) => self.note(key, Fate::Decide(else_why.to_owned())),
            None => {}
        }
    }

    fn flags(&mut self) {
        for name in SECURITY {
            self.flag(
                &format!("security.{name}"),
                true,
                "what the pod's securityContext says counts; profiles are the defaults without",
                "it is not turned off for a whole node: a pod's securityContext can ask for it",
            );
        }
    }
}

/// A pattern with `*` and `?` as a regular expression that has to fit the whole name.
fn glob(pattern: &str) -> String {
    let mut out = String::new();
    for c in pattern.chars() {
        match c {
            '*' => out.push_str(".*"),
            '?' => out.push('.'),
            c => out.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    out
}
