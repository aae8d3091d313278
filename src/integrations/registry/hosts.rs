//! Which hosts serve a registry's images, and how they are talked to: containerd's `certs.d/<host>/hosts.toml`.
//!
//! Called at the start of every pull, so that changes count at once. A file that can't be understood is an error naming
//! file and key, never "no file": a mirror silently left out is hard to find. Format:
//! <https://github.com/containerd/containerd/blob/main/docs/hosts.md>.

use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use reqwest::Url;
use serde::Deserialize;

use crate::core::error::{Error, Kind};
use crate::core::reference::{Reference, is_loopback};

/// Largest hosts.toml in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// The file can't be read.
    #[error("{path} can't be read")]
    Io {
        /// The file.
        path: Utf8PathBuf,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// It is not TOML, or a key is unknown or of the wrong type.
    #[error("{path} can't be understood")]
    Parse {
        /// The file.
        path: Utf8PathBuf,
        /// What and where.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{path}: {key}: {why}")]
    Value {
        /// The file.
        path: Utf8PathBuf,
        /// Its key.
        key: String,
        /// What is wrong.
        why: String,
    },
}

impl From<HostsError> for Error {
    fn from(e: HostsError) -> Self {
        let message = e.to_string();
        match e {
            HostsError::Io { source, .. } => Error::io(message, source),
            HostsError::Parse { source, .. } => Error::because(Kind::FailedPrecondition, message, source),
            HostsError::Value { .. } => Error::new(Kind::FailedPrecondition, message),
        }
    }
}

/// How TLS is spoken with a host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tls {
    /// Files with more CA certificates (PEM).
    pub ca: Vec<Utf8PathBuf>,
    /// Client certificate and key (PEM); the key may be in the certificate's file.
    pub client: Option<(Utf8PathBuf, Option<Utf8PathBuf>)>,
    /// Any certificate will do.
    pub skip_verify: bool,
}

/// One place to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Base of the API, with the path that ends in `/v2` (or as overridden) and no final slash.
    pub base: Url,
    /// May be asked for content by digest.
    pub pull: bool,
    /// May be asked what a tag means.
    pub resolve: bool,
    /// May be pushed to.
    pub push: bool,
    /// TLS settings.
    pub tls: Tls,
    /// Headers for each request; their values may be secrets.
    pub headers: Vec<(String, String)>,
    /// The registry of the image's name, asked with the caller's credentials. False for mirrors.
    pub upstream: bool,
    /// Only another way to speak with the host before it.
    pub fallback: bool,
}

impl Host {
    /// Host and port for messages and for comparing.
    pub fn name(&self) -> String {
        authority(&self.base)
    }
}

/// Host and port of a URL; the port only if it is not the scheme's.
pub fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or("");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Option<String>,
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMore>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    header: Option<toml::Table>,
    override_path: Option<bool>,
    dial_timeout: Option<toml::Value>,
    #[serde(default)]
    host: toml::Table,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Entry {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMore>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    header: Option<toml::Table>,
    override_path: Option<bool>,
    dial_timeout: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(Utf8PathBuf),
    More(Vec<Utf8PathBuf>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    One(Utf8PathBuf),
    Pairs(Vec<Pair>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pair {
    One(Utf8PathBuf),
    Two(Vec<Utf8PathBuf>),
}

/// The hosts for `reference`, in the order in which they are asked: those of the file, then its `server`, or without
/// one the registry itself. Plain HTTP only where a file says so, or on this machine.
pub fn hosts_for(reference: &Reference, directories: &[Utf8PathBuf]) -> Result<Vec<Host>, HostsError> {
    let Some(path) = file_for(reference, directories)? else { return Ok(upstream(reference)) };
    let text = std::fs::read_to_string(&path).map_err(|source| HostsError::Io { path: path.clone(), source })?;
    parse(&path, &text, reference)
}

/// The file that says how `reference`'s registry is asked.
pub fn file_for(reference: &Reference, directories: &[Utf8PathBuf]) -> Result<Option<Utf8PathBuf>, HostsError> {
    for directory in directories {
        for name in folder_names(reference.registry()) {
            let path = directory.join(name).join("hosts.toml");
            match std::fs::metadata(&path) {
                Ok(meta) if meta.len() > MAX_FILE => {
                    return Err(HostsError::Value { path, key: "file".into(), why: "larger than 1 MiB".into() });
                }
                Ok(_) => return Ok(Some(path)),
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(source) => return Err(HostsError::Io { path, source }),
            }
        }
    }
    Ok(None)
}

/// Names of the folder that may hold a registry's file, best first.
fn folder_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let (host, Some(port)) = crate::core::reference::split_port(registry) {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

/// The registry itself.
fn upstream(reference: &Reference) -> Vec<Host> {
    let name = reference.api_host();
    let host = |scheme: &str, fallback| {
        // A name that was parsed as a registry always makes a URL.
        Url::parse(&format!("{scheme}://{name}/v2")).ok().map(|base| Host {
            base,
            pull: true,
            resolve: true,
            push: true,
            tls: Tls::default(),
            headers: Vec::new(),
            upstream: true,
            fallback,
        })
    };
    let schemes: &[(&str, bool)] = match (is_loopback(name), crate::core::reference::split_port(name).1) {
        (false, _) | (true, Some("443")) => &[("https", false)],
        (true, Some("80")) => &[("http", false)],
        (true, _) => &[("http", false), ("https", true)],
    };
    schemes.iter().filter_map(|(scheme, fallback)| host(scheme, *fallback)).collect()
}

/// As [`hosts_for`] with the `text` of the file that is called `path`.
pub fn parse(path: &Utf8Path, text: &str, reference: &Reference) -> Result<Vec<Host>, HostsError> {
    let parse_error = |e: toml::de::Error| HostsError::Parse { path: path.to_owned(), source: Box::new(e) };
    let file: File = toml::from_str(text).map_err(parse_error)?;
    let mut hosts = Vec::new();
    for (url, value) in file.host {
        let key = format!("host.\"{url}\"");
        let entry: Entry = value.try_into().map_err(|e: toml::de::Error| HostsError::Value {
            path: path.to_owned(),
            key: key.clone(),
            why: e.message().to_owned(),
        })?;
        hosts.push(host(path, &key, &url, entry, reference)?);
    }
    let own = Entry {
        capabilities: file.capabilities,
        ca: file.ca,
        client: file.client,
        skip_verify: file.skip_verify,
        header: file.header,
        override_path: file.override_path,
        dial_timeout: file.dial_timeout,
    };
    match file.server.filter(|s| !s.is_empty()) {
        Some(server) => hosts.push(host(path, "server", &server, own, reference)?),
        None => {
            for upstream in upstream(reference) {
                let mut configured = host(
                    path,
                    "the registry itself",
                    upstream.base.as_str().trim_end_matches("/v2"),
                    Entry {
                        capabilities: own.capabilities.clone(),
                        ca: own.ca.as_ref().map(|ca| OneOrMore::More(ca.list().to_vec())),
                        client: own.client.as_ref().map(Client::again),
                        skip_verify: own.skip_verify,
                        header: own.header.clone(),
                        override_path: None,
                        dial_timeout: None,
                    },
                    reference,
                )?;
                configured.fallback = upstream.fallback;
                hosts.push(configured);
            }
        }
    }
    Ok(hosts)
}

impl OneOrMore {
    fn list(&self) -> &[Utf8PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::More(paths) => paths,
        }
    }
}

impl Client {
    fn again(&self) -> Self {
        match self {
            Self::One(path) => Self::One(path.clone()),
            Self::Pairs(pairs) => Self::Pairs(
                pairs
                    .iter()
                    .map(|pair| match pair {
                        Pair::One(path) => Pair::One(path.clone()),
                        Pair::Two(paths) => Pair::Two(paths.clone()),
                    })
                    .collect(),
            ),
        }
    }
}

fn host(path: &Utf8Path, key: &str, url: &str, entry: Entry, reference: &Reference) -> Result<Host, HostsError> {
    let bad = |part: &str, why: String| HostsError::Value {
        path: path.to_owned(),
        key: if part.is_empty() { key.to_owned() } else { format!("{key}.{part}") },
        why,
    };
    let full = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let mut base = Url::parse(&full).map_err(|e| bad("", format!("{url:?} is no URL: {e}")))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none_or(str::is_empty) {
        return Err(bad("", format!("{url:?} is not an http or https URL")));
    }
    if !base.username().is_empty() || base.password().is_some() || base.query().is_some() || base.fragment().is_some() {
        return Err(bad("", "a URL here has no user, query or fragment".into()));
    }
    let mut api = base.path().trim_end_matches('/').to_owned();
    if !entry.override_path.unwrap_or(false) && !api.ends_with("/v2") {
        api.push_str("/v2");
    }
    base.set_path(&api);
    let all = entry.capabilities.is_none();
    let (mut pull, mut resolve, mut push) = (all, all, all);
    for capability in entry.capabilities.iter().flatten() {
        match capability.as_str() {
            "pull" => pull = true,
            "resolve" => resolve = true,
            "push" => push = true,
            "referrers" => {}
            other => {
                return Err(bad("capabilities", format!("{other:?} is not one of pull, resolve, push, referrers")));
            }
        }
    }
    let near = |p: &Utf8PathBuf| path.parent().unwrap_or(Utf8Path::new("/")).join(p);
    let client = match &entry.client {
        None => None,
        Some(Client::One(file)) => Some((near(file), None)),
        Some(Client::Pairs(pairs)) => match pairs.as_slice() {
            [Pair::One(file)] => Some((near(file), None)),
            [Pair::One(cert), Pair::One(key)] => Some((near(cert), Some(near(key)))),
            [Pair::Two(files)] => match files.as_slice() {
                [cert] => Some((near(cert), None)),
                [cert, key] => Some((near(cert), Some(near(key)))),
                _ => return Err(bad("client", "a pair is a certificate and a key".into())),
            },
            _ => return Err(bad("client", "one client certificate can be used".into())),
        },
    };
    let mut headers = Vec::new();
    for (name, value) in entry.header.unwrap_or_default() {
        let values = match value {
            toml::Value::Array(values) => values,
            one => vec![one],
        };
        for value in values {
            let Some(value) = value.as_str() else {
                return Err(bad("header", format!("{name:?} is not a string or a list of strings")));
            };
            let valid = reqwest::header::HeaderName::from_bytes(name.as_bytes()).is_ok()
                && reqwest::header::HeaderValue::from_str(value).is_ok();
            if !valid {
                return Err(bad("header", format!("{name:?} is not a header")));
            }
            headers.push((name.clone(), value.to_owned()));
        }
    }
    if entry.dial_timeout.is_some() {
        tracing::debug!(%path, key, "dial_timeout is not used: connecting has a limit of its own");
    }
    let tls = Tls {
        ca: entry.ca.as_ref().map_or(Vec::new(), |ca| ca.list().iter().map(near).collect()),
        client,
        skip_verify: entry.skip_verify.unwrap_or(false),
    };
    let upstream = authority(&base) == reference.api_host();
    Ok(Host { base, pull, resolve, push, tls, headers, upstream, fallback: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str, image: &str) -> Result<Vec<Host>, HostsError> {
        parse(Utf8Path::new("/c/hosts.toml"), text, &image.parse().expect("reference"))
    }

    #[test]
    fn order_is_the_files_then_the_server() {
        let hosts = parsed(
            r#"
            server = "https://up.example"
            [host."http://z.example:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://a.example/prefix"]
              capabilities = ["pull"]
              ca = "ca.pem"
              client = [["c.pem", "/k.pem"]]
              skip_verify = true
              override_path = true
              [host."https://a.example/prefix".header]
                x-one = "1"
                x-two = ["2", "3"]
            "#,
            "docker.io/busybox",
        )
        .expect("hosts");
        let bases: Vec<&str> = hosts.iter().map(|h| h.base.as_str()).collect();
        assert_eq!(bases, ["http://z.example:5000/v2", "https://a.example/prefix", "https://up.example/v2"]);
        assert!(hosts[0].resolve && !hosts[1].resolve && hosts[1].pull && hosts[2].resolve);
        assert_eq!(hosts[1].tls.ca, ["/c/ca.pem"]);
        assert_eq!(hosts[1].tls.client, Some(("/c/c.pem".into(), Some("/k.pem".into()))));
        assert!(hosts[1].tls.skip_verify);
        assert_eq!(hosts[1].headers.len(), 3);
        assert!(hosts.iter().all(|h| !h.upstream));
    }

    #[test]
    fn without_a_server_the_registry_itself_comes_last() {
        let hosts = parsed("[host.\"https://m.example\"]", "busybox").expect("hosts");
        assert_eq!(hosts[1].base.as_str(), "https://registry-1.docker.io/v2");
        assert!(hosts[1].upstream);
        let hosts = hosts_for(&"127.0.0.1:5000/a".parse().expect("reference"), &[]).expect("hosts");
        assert_eq!(hosts.iter().map(|h| h.base.scheme()).collect::<Vec<_>>(), ["http", "https"]);
        let hosts = hosts_for(&"10.0.0.1:5000/a".parse().expect("reference"), &[]).expect("hosts");
        assert_eq!(hosts.iter().map(|h| h.base.scheme()).collect::<Vec<_>>(), ["https"]);
        let hosts = hosts_for(&"[::1]:5000/a".parse().expect("reference"), &[]).expect("hosts");
        assert_eq!(hosts[0].base.as_str(), "http://[::1]:5000/v2");
    }

    #[test]
    fn mistakes_name_file_and_key() {
        for (text, part) in [
            ("sever = 'x'", "sever"),
            ("server = 3", "server"),
            ("[host.\"https://a\"]\ncapabilites = []", "capabilites"),
            ("[host.\"https://a\"]\ncapabilities = ['fly']", "capabilities"),
            ("[host.\"ftp://a\"]", "ftp://a"),
            ("[host.\"https://u:p@a\"]", "no user"),
            ("[host.\"https://a\"]\nheader = {'a b' = 'c'}", "header"),
            ("[host.\"https://a\"]\nskip_verify = 'yes'", "https://a"),
            ("[[host]]", "host"),
            ("=", ""),
        ] {
            let e = Error::from(parsed(text, "busybox").expect_err(text)).chain();
            assert!(e.contains("/c/hosts.toml") && e.contains(part), "{text}: {e}");
        }
    }

    #[test]
    fn folders_are_searched_in_order() {
        let dir = tempfile::tempdir().expect("tempdir");
        let dirs = [Utf8PathBuf::from_path_buf(dir.path().to_path_buf()).expect("utf8")];
        let put = |name: &str, server: &str| {
            std::fs::create_dir(dir.path().join(name)).expect("mkdir");
            let path = dir.path().join(name).join("hosts.toml");
            crate::utils::atomic::write(
                &path,
                format!("server = 'https://{server}'").as_bytes(),
                0o600,
                crate::utils::atomic::Durability::Process,
            )
            .expect("write");
        };
        let first = |image: &str| hosts_for(&image.parse().expect("reference"), &dirs).expect("hosts")[0].name();
        put("_default", "default.example");
        assert_eq!(first("r.example:5000/a"), "default.example");
        put("r.example:5000", "colon.example");
        assert_eq!(first("r.example:5000/a"), "colon.example");
        put("r.example_5000_", "underscore.example");
        assert_eq!(first("r.example:5000/a"), "underscore.example");
        assert_eq!(first("busybox"), "default.example");
    }
}
