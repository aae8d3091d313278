//! `[proxmox]`: where the Proxmox API answers and who we are there.
//!
//! Plain data; checked with the rest of the configuration. Without endpoints the API is not used at all. Secrets are in
//! files of their own, never here.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::super::error::{Error, Result};
use super::Span;

/// The node's own cluster CA: what is trusted when nothing else is said.
const CLUSTER_CA: &str = "/etc/pve/pve-root-ca.pem";

/// The Proxmox API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Proxmox {
    /// `https://host:port`, the preferred one first; the others are taken when it does not answer. Empty: not used.
    pub endpoints: Vec<String>,
    /// This node's name in the cluster; "": the host's name.
    pub node: String,
    /// Token: `user@realm!id`.
    pub token_id: String,
    /// File with the token's secret, readable by its owner alone.
    pub token_file: Utf8PathBuf,
    /// User of a ticket: `user@realm`; in place of a token.
    pub user: String,
    /// File with the user's password, readable by its owner alone.
    pub password_file: Option<Utf8PathBuf>,
    /// CA that the endpoints' certificates are from (PEM); None: the cluster's own.
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
        self.fingerprint.0.iter().map(|text| fingerprint(text)).collect()
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |key: &str, why: String| Err(Error::invalid(format!("proxmox.{key}: {why}")));
        if !self.enabled() {
            return Ok(());
        }
        for endpoint in &self.endpoints {
            let host = endpoint.strip_prefix("https://").map(|rest| rest.trim_end_matches('/'));
            let fits = |host: &str| !host.is_empty() && !host.contains(['/', '?', '#', '@', ' ']);
            if !host.is_some_and(fits) {
                return bad("endpoints", format!("{endpoint:?} is not of the form https://host:8006"));
            }
        }
        match (self.token_id.is_empty(), self.user.is_empty()) {
            (true, true) => return bad("token_id", "there is neither a token nor a user".into()),
            (false, false) => return bad("user", "a token and a user exclude each other".into()),
            (false, true) => {
                let parts = self.token_id.split_once('!');
                if !parts.is_some_and(|(user, id)| is_user(user) && id.len() >= 2 && id.chars().all(is_word)) {
                    return bad("token_id", format!("{:?} is not of the form user@realm!id", self.token_id));
                }
            }
            (true, false) if !is_user(&self.user) => {
                return bad("user", format!("{:?} is not of the form user@realm", self.user));
            }
            (true, false) if self.password_file.is_none() => {
                return bad("password_file", "a user needs one".into());
            }
            (true, false) => {}
        }
        let files = [
            ("token_file", Some(&self.token_file)),
            ("lxc_path", Some(&self.lxc_path)),
            ("password_file", self.password_file.as_ref()),
            ("ca_file", self.ca_file.as_ref()),
        ];
        for (key, path) in files {
            if let Some(path) = path.filter(|p| !p.is_absolute()) {
                return bad(key, format!("{path:?} is not an absolute path"));
            }
        }
        if self.ca_file.is_some() && !self.fingerprint.0.is_empty() {
            return bad("fingerprint", "a CA and fingerprints exclude each other".into());
        }
        self.fingerprints()?;
        if !self.node.is_empty() && !self.node.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return bad("node", format!("{:?} is not a node's name", self.node));
        }
        if self.timeout.get() < Duration::from_secs(1) {
            return bad("timeout", "at least 1s".into());
        }
        if self.task_timeout.get() < self.timeout.get() {
            return bad("task_timeout", "no shorter than proxmox.timeout".into());
        }
        for (key, n) in [("max_parallel", self.max_parallel), ("max_parallel_creates", self.max_parallel_creates)] {
            if !(1..=64).contains(&n) {
                return bad(key, format!("{n} is not in 1 to 64"));
            }
        }
        Ok(())
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

/// 32 bytes as hexadecimal pairs, with or without colons.
fn fingerprint(text: &str) -> Result<[u8; 32]> {
    let bad = || Error::invalid(format!("proxmox.fingerprint: {text:?} is not a SHA-256 fingerprint (AA:BB:...)"));
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    if digits.len() != 64 || !digits.is_ascii() {
        return Err(bad());
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
    }
    Ok(bytes)
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
