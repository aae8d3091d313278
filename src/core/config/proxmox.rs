//! `[proxmox]`: where the Proxmox API answers and who we are there.
//!
//! Plain data; checked with the rest of the configuration. Without endpoints the API is not used at all. Secrets are in
//! files of their own, never here.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::error::{Error, Result};
use super::Span;
use super::faults::Faults;

/// The node's own cluster CA: what is trusted when nothing else is said.
const CLUSTER_CA: &str = "/etc/pve/pve-root-ca.pem";

/// The Proxmox API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Proxmox {
    /// `https://host:port`, the preferred one first; the others are taken when it does not answer. Empty: not used.
    pub endpoints: Vec<String>,
    /// This node's name in the cluster; "": the host's name.
    pub node: String,
    /// Token: `user@realm!id`.
    pub token_id: String,
    /// File with the token's secret, readable by its owner alone.
    #[schemars(with = "String")]
    pub token_file: Utf8PathBuf,
    /// User of a ticket: `user@realm`; in place of a token.
    pub user: String,
    /// File with the user's password, readable by its owner alone.
    #[schemars(with = "Option<String>")]
    pub password_file: Option<Utf8PathBuf>,
    /// CA that the endpoints' certificates are from (PEM); not set: the cluster's own.
    #[schemars(with = "Option<String>")]
    pub ca_file: Option<Utf8PathBuf>,
    /// SHA-256 fingerprints (`AA:BB:...`), in place of a CA: an endpoint's certificate is one of these.
    pub fingerprint: OneOrMore,
    /// Longest time for one request.
    pub timeout: Span,
    /// Longest time for a task of the node: a create, a start.
    pub task_timeout: Span,
    /// Most changes under way on one node.
    pub max_parallel: usize,
    /// Most creates, clones and uploads under way on one storage.
    pub max_parallel_creates: usize,
    /// Where liblxc keeps the states of this node's containers.
    #[schemars(with = "String")]
    pub lxc_path: Utf8PathBuf,
}

impl Default for Proxmox {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            node: String::new(),
            token_id: String::new(),
            token_file: "/etc/proxmox-lxcri/token".into(),
            user: String::new(),
            password_file: None,
            ca_file: None,
            fingerprint: OneOrMore::default(),
            timeout: Span::from(Duration::from_secs(30)),
            task_timeout: Span::from(Duration::from_secs(300)),
            max_parallel: 8,
            max_parallel_creates: 2,
            lxc_path: "/var/lib/lxc".into(),
        }
    }
}

/// A string or a list of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Vec<String>")]
pub struct OneOrMore(pub Vec<String>);

impl JsonSchema for OneOrMore {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OneOrMore".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": ["array", "string"], "items": { "type": "string" } })
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    One(String),
    More(Vec<String>),
}

impl From<Written> for OneOrMore {
    fn from(written: Written) -> Self {
        Self(match written {
            Written::One(text) if text.is_empty() => Vec::new(),
            Written::One(text) => vec![text],
            Written::More(list) => list,
        })
    }
}

impl From<OneOrMore> for Vec<String> {
    fn from(list: OneOrMore) -> Self {
        list.0
    }
}

impl Proxmox {
    /// Whether the API is used.
    pub fn enabled(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// The CA that counts when there is no fingerprint.
    pub fn ca_file(&self) -> &Utf8Path {
        self.ca_file.as_deref().unwrap_or(Utf8Path::new(CLUSTER_CA))
    }

    /// The fingerprints as bytes.
    pub fn fingerprints(&self) -> Result<Vec<[u8; 32]>> {
        let bytes = |text: &String| {
            fingerprint(text).ok_or_else(|| Error::invalid(format!("proxmox.fingerprint: {}", not_a_fingerprint(text))))
        };
        self.fingerprint.0.iter().map(bytes).collect()
    }

    pub(super) fn check(&self, faults: &mut Faults) {
        if !self.enabled() {
            return;
        }
        for endpoint in &self.endpoints {
            let host = endpoint.strip_prefix("https://").map(|rest| rest.trim_end_matches('/'));
            let fits = |host: &str| !host.is_empty() && !host.contains(['/', '?', '#', '@', ' ']);
            if !host.is_some_and(fits) {
                faults.add("proxmox.endpoints", format!("{endpoint:?} is not of the form https://host:8006"));
            }
        }
        self.check_who(faults);
        faults.absolute("proxmox.token_file", [&self.token_file]);
        faults.absolute("proxmox.lxc_path", [&self.lxc_path]);
        faults.absolute("proxmox.password_file", &self.password_file);
        faults.absolute("proxmox.ca_file", &self.ca_file);
        if self.ca_file.is_some() && !self.fingerprint.0.is_empty() {
            faults.with("proxmox.fingerprint", "proxmox.ca_file", "a CA and fingerprints exclude each other");
        }
        for text in &self.fingerprint.0 {
            if fingerprint(text).is_none() {
                faults.add("proxmox.fingerprint", not_a_fingerprint(text));
            }
        }
        if !self.node.is_empty() && !self.node.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            faults.add("proxmox.node", format!("{:?} is not a node's name", self.node));
        }
        if self.timeout.get() < Duration::from_secs(1) {
            faults.add("proxmox.timeout", "at least 1s");
        }
        if self.task_timeout.get() < self.timeout.get() {
            faults.with("proxmox.task_timeout", "proxmox.timeout", "no shorter than proxmox.timeout");
        }
        faults.range("proxmox.max_parallel", self.max_parallel, 1..=64);
        faults.range("proxmox.max_parallel_creates", self.max_parallel_creates, 1..=64);
    }

    fn check_who(&self, faults: &mut Faults) {
        let (token, user) = ("proxmox.token_id", "proxmox.user");
        match (self.token_id.is_empty(), self.user.is_empty()) {
            (true, true) => faults.with(token, "proxmox.endpoints", "there is neither a token nor a user"),
            (false, false) => faults.with(user, token, "a token and a user exclude each other"),
            (false, true) => {
                let parts = self.token_id.split_once('!');
                if !parts.is_some_and(|(user, id)| is_user(user) && id.len() >= 2 && id.chars().all(is_word)) {
                    faults.add(token, format!("{:?} is not of the form user@realm!id", self.token_id));
                }
            }
            (true, false) => {
                if !is_user(&self.user) {
                    faults.add(user, format!("{:?} is not of the form user@realm", self.user));
                }
                if self.password_file.is_none() {
                    faults.with("proxmox.password_file", user, "a user needs one");
                }
            }
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

fn is_user(text: &str) -> bool {
    text.split_once('@').is_some_and(|(name, realm)| {
        !name.is_empty() && !name.contains([':', '/', '!', ' ']) && !realm.is_empty() && realm.chars().all(is_word)
    })
}

fn not_a_fingerprint(text: &str) -> String {
    format!("{text:?} is not a SHA-256 fingerprint (AA:BB:...)")
}

/// 32 bytes as hexadecimal pairs, with or without colons.
fn fingerprint(text: &str) -> Option<[u8; 32]> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    if digits.len() != 64 || !digits.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn parse(body: &str) -> Result<Proxmox> {
        Config::parse(&format!("[proxmox]\n{body}"), "c.toml").map(|c| c.proxmox)
    }

    const BASE: &str = "endpoints = [\"https://127.0.0.1:8006\"]\ntoken_id = \"lxcri@pve!node1\"\n";

    #[test]
    fn what_fits() {
        assert!(!parse("").expect("empty").enabled());
        let p = parse(BASE).expect("base");
        assert_eq!((p.ca_file().as_str(), p.timeout.get().as_secs()), (CLUSTER_CA, 30));
        let print = vec!["ab"; 32].join(":");
        let p = parse(&format!("{BASE}fingerprint = \"{print}\"\n")).expect("one fingerprint");
        assert_eq!(p.fingerprints().expect("bytes"), [[0xab; 32]]);
        let p = parse(&format!("{BASE}fingerprint = [\"{print}\", \"{}\"]\n", "CD".repeat(32))).expect("two");
        assert_eq!(p.fingerprints().expect("bytes")[1], [0xcd; 32]);
    }

    #[test]
    fn refusals_name_the_key() {
        let print = vec!["ab"; 32].join(":");
        for (body, key) in [
            ("endpoints = [\"http://h:8006\"]\ntoken_id = \"a@pve!bb\"", "proxmox.endpoints"),
            ("endpoints = [\"https://h:8006/api2\"]\ntoken_id = \"a@pve!bb\"", "proxmox.endpoints"),
            ("endpoints = [\"https://h\"]", "proxmox.token_id"),
            ("endpoints = [\"https://h\"]\ntoken_id = \"a@pve\"", "proxmox.token_id"),
            ("endpoints = [\"https://h\"]\ntoken_id = \"a@pve!b\"", "proxmox.token_id"),
            ("endpoints = [\"https://h\"]\ntoken_id = \"a@pve!bb\"\nuser = \"a@pve\"", "proxmox.user"),
            ("endpoints = [\"https://h\"]\nuser = \"a@pve\"", "proxmox.password_file"),
            (&format!("{BASE}token_file = \"token\""), "proxmox.token_file"),
            (&format!("{BASE}fingerprint = \"ab:cd\""), "proxmox.fingerprint"),
            (&format!("{BASE}fingerprint = \"{print}\"\nca_file = \"/ca\""), "proxmox.fingerprint"),
            (&format!("{BASE}timeout = \"10ms\""), "proxmox.timeout"),
            (&format!("{BASE}task_timeout = \"5s\""), "proxmox.task_timeout"),
            (&format!("{BASE}max_parallel = 0"), "proxmox.max_parallel"),
            (&format!("{BASE}node = \"a/b\""), "proxmox.node"),
            (&format!("{BASE}verify_ssl = false"), "verify_ssl"),
        ] {
            let e = parse(body).expect_err(body).chain();
            assert!(e.contains(key), "{body}: {e}");
        }
    }
}
