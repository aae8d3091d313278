//! The node's own credentials: an `auth.json` as Docker, Podman and Skopeo write it, and the credential helpers it names.
//!
//! Asked when a host wants to know who we are and the caller of the pull gave nothing for it. The file is read each time, so
//! that changes count at once, and a helper runs with a deadline. What can't be used is an error that names file or helper, and
//! never what is in it. Formats: containers-auth.json(5), <https://github.com/docker/docker-credential-helpers>.

use std::collections::BTreeMap;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;

use super::auth::{Credentials, canonical, server_host};
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::RegistryAuth;
use crate::core::reference::DOCKER_HUB;
use crate::utils::process::{Spawn, SpawnError};
use crate::utils::secret_file;

/// Largest `auth.json` in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Largest answer of a helper in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// Under this address Docker keeps what is for its hub.
const HUB_ADDRESS: &str = "https://index.docker.io/v1/";
/// A helper's words for "there are none", on its standard output.
const NOT_FOUND: &str = "credentials not found in native keychain";
/// A helper's name of the user where the secret is an OAuth2 refresh token.
const TOKEN_USER: &str = "<token>";
/// Helpers keep their own files below their user's home.
const HELPER_ENV: [(&str, &str); 2] =
    [("HOME", "/root"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")];

/// Where the node's credentials are.
#[derive(Debug, Clone, Default)]
pub struct Keychain {
    /// `auth.json`; None: the node has none.
    pub file: Option<Utf8PathBuf>,
    /// Folders with programs `docker-credential-<name>`, first match counts.
    pub helper_dirs: Vec<Utf8PathBuf>,
    /// Longest run of a helper.
    pub helper_timeout: Duration,
}

/// Where the credentials for a host are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An entry of the file.
    Entry(String),
    /// A helper, and what it is asked for.
    Helper {
        /// Its name, without `docker-credential-`.
        name: String,
        /// Server.
        server: String,
    },
}

/// What we know of; Docker keeps other settings in the same file.
#[derive(Deserialize, Default)]
#[serde(default)]
struct File {
    auths: BTreeMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl Entry {
    /// With a helper, Docker leaves an empty entry behind.
    fn is_empty(&self) -> bool {
        [&self.auth, &self.username, &self.identitytoken, &self.registrytoken].iter().all(|s| s.is_empty())
    }

    fn credentials(self) -> Credentials {
        Credentials::of(&RegistryAuth {
            username: self.username,
            password: self.password,
            auth: self.auth,
            identity_token: self.identitytoken,
            registry_token: self.registrytoken,
            server_address: String::new(),
        })
    }
}

impl File {
    fn place(&self, host: &str, repository: &str) -> Option<Place> {
        let host = canonical(host);
        let helper = |name: &String, server: &str| Place::Helper { name: name.clone(), server: server.to_owned() };
        if let Some((server, name)) = self.helpers.iter().find(|(server, _)| canonical(server_host(server)) == host) {
            return Some(helper(name, server));
        }
        let fits = |key: &str| {
            let path = path_of(key);
            let rest = repository.strip_prefix(path)?;
            let whole = path.is_empty() || rest.is_empty() || rest.starts_with('/');
            (canonical(server_host(key)) == host && whole).then_some(path.len())
        };
        let entries = self.auths.iter().filter(|(_, entry)| !entry.is_empty());
        let best = entries.filter_map(|(key, _)| Some((fits(key)?, key))).max_by_key(|(length, _)| *length);
        if let Some((_, key)) = best {
            return Some(Place::Entry(key.clone()));
        }
        let hub = canonical(DOCKER_HUB) == host;
        (!self.store.is_empty()).then(|| helper(&self.store, if hub { HUB_ADDRESS } else { host }))
    }
}

/// Path in a key such as `quay.io/team/app`; "" for whole registries, also in Docker's spelling `https://host/v1/`.
fn path_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    match rest.split_once('/').map_or("", |(_, path)| path.trim_matches('/')) {
        "v1" | "v2" => "",
        path => path,
    }
}

impl Keychain {
    async fn read(&self) -> Result<Option<File>> {
        let Some(path) = self.file.clone() else { return Ok(None) };
        blocking(move || read(&path).map(Some)).await
    }

    /// Where the credentials are with which `host` is asked for `repository`. Runs no helper.
    pub async fn place(&self, host: &str, repository: &str) -> Result<Option<Place>> {
        Ok(self.read().await?.and_then(|file| file.place(host, repository)))
    }

    /// The credentials with which `host` is asked for `repository`; empty ones if there are none.
    pub async fn credentials(&self, host: &str, repository: &str) -> Result<Credentials> {
        let Some(mut file) = self.read().await? else { return Ok(Credentials::default()) };
        match file.place(host, repository) {
            None => Ok(Credentials::default()),
            Some(Place::Entry(key)) => Ok(file.auths.remove(&key).unwrap_or_default().credentials()),
            Some(Place::Helper { name, server }) => self.ask(&name, &server).await,
        }
    }

    async fn ask(&self, name: &str, server: &str) -> Result<Credentials> {
        let program = self.program(name).await?;
        let mut call = Spawn::new(program.as_str(), ["get"]).stdin(server).stdout_cap(MAX_ANSWER);
        for (key, value) in HELPER_ENV {
            call = call.env(key, value);
        }
        // Its words may hold what it was to give, so none of them are shown.
        let output = call.deadline(self.helper_timeout).stderr_cap(0).run().await.map_err(|e| {
            let kind = match e {
                SpawnError::Deadline { .. } => Kind::DeadlineExceeded,
                _ => Kind::FailedPrecondition,
            };
            Error::because(kind, format!("credential helper {name} for {server}"), e)
        })?;
        if !output.success() {
            if String::from_utf8_lossy(&output.stdout).contains(NOT_FOUND) {
                return Ok(Credentials::default());
            }
            let status = output.status;
            let message =
                format!("credential helper {name} for {server}: {status}; \"echo {server} | {program} get\" tells why");
            return Err(Error::precondition(message));
        }
        #[derive(Deserialize)]
        struct Answer {
            #[serde(rename = "Username", default)]
            user: String,
            #[serde(rename = "Secret", default)]
            secret: String,
        }
        let answer: Answer = serde_json::from_slice(&output.stdout).map_err(|_| {
            Error::precondition(format!("credential helper {name} for {server}: an answer that is not its protocol's"))
        })?;
        Ok(match answer.user.as_str() {
            "" => Credentials::default(),
            TOKEN_USER => Credentials { identity: Some(answer.secret), ..Credentials::default() },
            _ => Credentials { basic: Some((answer.user, answer.secret)), ..Credentials::default() },
        })
    }

    async fn program(&self, name: &str) -> Result<Utf8PathBuf> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Error::precondition(format!("credential helper {name:?}: not a name of a program")));
        }
        let file = format!("docker-credential-{name}");
        let (name, dirs) = (name.to_owned(), self.helper_dirs.clone());
        blocking(move || {
            let found = dirs.iter().map(|dir| dir.join(&file)).find(|path| path.is_file());
            let missing = || {
                let dirs = dirs.iter().map(|d| d.as_str()).collect::<Vec<_>>().join(", ");
                Error::precondition(format!("credential helper {name}: no {file} in {dirs}"))
            };
            found.ok_or_else(missing)
        })
        .await
    }
}

fn read(path: &Utf8Path) -> Result<File> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |e: std::io::Error| Error::because(Kind::FailedPrecondition, format!("images.auth_file: {path}"), e);
    let refused = |why: String| Error::precondition(format!("images.auth_file: {path}: {why}"));
    let mut options = std::fs::OpenOptions::new();
    // A FIFO in its place must not hang a pull.
    let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(refused("not a regular file".into()));
    }
    if let Some(why) = secret_file::known_to_others(&meta) {
        return Err(refused(why));
    }
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(refused("larger than 1 MiB".into()));
    }
    // The parser's words could hold a secret.
    serde_json::from_slice(&text)
        .map_err(|e| refused(format!("line {}, column {}: can't be understood", e.line(), e.column())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        serde_json::from_str(text).expect("JSON")
    }

    #[test]
    fn the_longest_path_wins_and_names_of_the_hub_are_one() {
        let f = file(
            r#"{"auths": {"quay.io": {"auth": "YTpi"}, "quay.io/team": {"auth": "Yzpk"}, "https://index.docker.io/v1/":
            {"auth": "ZTpm"}, "empty.example": {}, "r.example:5000": {"identitytoken": "x"}}, "HttpHeaders": {"a": "b"}}"#,
        );
        let entry = |key: &str| Some(Place::Entry(key.to_owned()));
        for (host, repository, place) in [
            ("quay.io", "other/app", entry("quay.io")),
            ("quay.io", "team/app", entry("quay.io/team")),
            ("quay.io", "team", entry("quay.io/team")),
            ("quay.io", "teammate/app", entry("quay.io")),
            ("registry-1.docker.io", "library/busybox", entry("https://index.docker.io/v1/")),
            ("r.example:5000", "a", entry("r.example:5000")),
            ("r.example", "a", None),
            ("empty.example", "a", None),
            ("evil-quay.io", "team/app", None),
        ] {
            assert_eq!(f.place(host, repository), place, "{host}/{repository}");
        }
        let credentials = f.auths["quay.io/team"].clone().credentials();
        assert_eq!(credentials.basic, Some(("c".into(), "d".into())));
    }

    #[test]
    fn helpers_of_one_registry_and_of_all() {
        let f = file(
            r#"{"auths": {"a.example": {"auth": "YTpi"}, "c.example": {"auth": "YTpi"}},
            "credHelpers": {"a.example": "one", "docker.io": "hub"}, "credsStore": "all"}"#,
        );
        let helper = |name: &str, server: &str| Some(Place::Helper { name: name.into(), server: server.into() });
        assert_eq!(f.place("a.example", "x"), helper("one", "a.example"));
        assert_eq!(f.place("registry-1.docker.io", "x"), helper("hub", "docker.io"));
        assert_eq!(f.place("b.example", "x"), helper("all", "b.example"));
        assert_eq!(f.place("c.example", "x"), Some(Place::Entry("c.example".into())));
        let f = file(r#"{"credsStore": "all"}"#);
        assert_eq!(f.place("registry-1.docker.io", "x"), helper("all", HUB_ADDRESS));
    }

    #[test]
    fn errors_show_nothing_of_the_file() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = Utf8PathBuf::from_path_buf(dir.path().join("auth.json")).expect("UTF-8");
        let durability = crate::utils::atomic::Durability::Process;
        let text = br#"{"auths": {"quay.io": "Hunter2"}}"#;
        crate::utils::atomic::write(path.as_std_path(), text, 0o600, durability).expect("write");
        let said = read(&path).err().expect("refused").chain();
        assert!(said.contains("line 1") && said.contains("auth.json") && !said.contains("unter"), "{said}");
        crate::utils::atomic::write(path.as_std_path(), b"{}", 0o644, durability).expect("write");
        let said = read(&path).err().expect("refused").chain();
        assert!(said.contains("chmod 600"), "{said}");
    }
}
