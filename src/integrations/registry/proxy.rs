//! How a registry's host is reached: by itself, through a proxy, over a unix socket, or as the environment says.
//!
//! Asked for each request by the URL that it goes to, so that a redirect's host and a token server have ways of their own. Fails
//! at the daemon's start with the key that makes no sense; nothing is tried there.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use camino::Utf8PathBuf;
use reqwest::{Client, Url};

use super::error::RegistryError;
use super::hosts::{Tls, authority};
use super::transport;
use crate::core::error::{Error, Result};

/// A way to a host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Way {
    /// HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the daemon.
    Environment,
    /// No proxy, whatever the environment says.
    Direct,
    /// An HTTP proxy: asked to connect for https, given the request for http.
    Proxy(Url),
    /// A unix socket in place of a connection to the host: TLS, where it is spoken, is spoken through it.
    Socket(Utf8PathBuf),
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Environment => f.write_str("as the daemon's environment says (HTTPS_PROXY, HTTP_PROXY, NO_PROXY)"),
            Self::Direct => f.write_str("directly"),
            Self::Proxy(url) => write!(f, "the proxy {url}"),
            Self::Socket(path) => write!(f, "the socket {path}"),
        }
    }
}

/// Which way is taken to which host (`images.proxies`).
#[derive(Debug, Clone, Default)]
pub struct Proxies(Vec<(String, Way)>);

impl Proxies {
    /// Parses host patterns ("host", "host:port", "*.domain", "*") and ways ("direct", "http://...", "https://...",
    /// "unix:/path").
    pub fn parse(settings: &BTreeMap<String, String>) -> Result<Self> {
        let mut list = Vec::new();
        for (pattern, way) in settings {
            let bad = |why: &str| Error::precondition(format!("images.proxies.{pattern:?}: {why}"));
            let host = pattern.strip_prefix("*.").unwrap_or(pattern);
            if host.is_empty() || host.contains(['/', '@']) || (host.contains('*') && pattern != "*") {
                return Err(bad("not a host, host:port, *.domain or *"));
            }
            let way = match way.as_str() {
                "direct" => Way::Direct,
                text => match text.strip_prefix("unix:").map(|p| p.strip_prefix("//").unwrap_or(p)) {
                    Some(path) if path.starts_with('/') => Way::Socket(path.into()),
                    Some(_) => return Err(bad("a socket's path is absolute: unix:/run/proxy.sock")),
                    None => Way::Proxy(proxy(text).map_err(bad)?),
                },
            };
            list.push((pattern.to_ascii_lowercase(), way));
        }
        Ok(Self(list))
    }

    /// The way to `url`: that of host and port, of the host, of the longest domain, of "*".
    pub fn way(&self, url: &Url) -> Way {
        let (full, host) = (authority(url), url.host_str().unwrap_or(""));
        let fits = |pattern: &str| match pattern.strip_prefix('*') {
            _ if pattern == full => Some(usize::MAX),
            _ if pattern == host => Some(usize::MAX - 1),
            Some(domain) if host.ends_with(domain) => Some(domain.len()),
            _ => None,
        };
        let best = self.0.iter().filter_map(|(pattern, way)| Some((fits(pattern)?, way))).max_by_key(|(rank, _)| *rank);
        best.map_or(Way::Environment, |(_, way)| way.clone())
    }
}

fn proxy(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).map_err(|_| "not \"direct\", http://HOST:PORT, https://HOST:PORT or unix:/PATH")?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err("not \"direct\", http://HOST:PORT, https://HOST:PORT or unix:/PATH");
    }
    // The configuration is shown in Status and logs.
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a password has no place here: the daemon's environment (HTTPS_PROXY) can have one");
    }
    Ok(url)
}

/// HTTP clients with one host's TLS settings, one for each way.
pub(super) struct Clients {
    tls: Tls,
    /// For messages.
    host: String,
    connect: Duration,
    proxies: Proxies,
    made: Mutex<HashMap<Way, Client>>,
}

impl Clients {
    pub(super) fn new(tls: Tls, host: String, connect: Duration, proxies: Proxies) -> Self {
        Self { tls, host, connect, proxies, made: Mutex::default() }
    }

    /// The client for a request to `url`.
    pub(super) fn to(&self, url: &Url) -> Result<Client, RegistryError> {
        let way = self.proxies.way(url);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&way) {
            return Ok(client.clone());
        }
        let client = transport::client(&self.tls, &self.host, self.connect, &way)?;
        made.insert(way, client.clone());
        Ok(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(pairs: &[(&str, &str)]) -> Result<Proxies> {
        Proxies::parse(&pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect())
    }

    #[test]
    fn the_closest_pattern_counts() {
        let proxies = parsed(&[
            ("*", "http://all:1"),
            ("*.example", "http://domain:2"),
            ("*.team.example", "direct"),
            ("r.example", "unix:/run/r.sock"),
            ("r.example:5000", "https://port:3"),
        ])
        .expect("proxies");
        let way = |url: &str| proxies.way(&Url::parse(url).expect("URL")).to_string();
        assert_eq!(way("https://quay.io/v2"), "the proxy http://all:1/");
        assert_eq!(way("https://x.example"), "the proxy http://domain:2/");
        assert_eq!(way("https://a.team.example"), "directly");
        assert_eq!(way("https://r.example"), "the socket /run/r.sock");
        assert_eq!(way("http://r.example:5000/x"), "the proxy https://port:3/");
        assert_eq!(way("https://evilexample"), "the proxy http://all:1/");
        let none = Proxies::default().way(&Url::parse("https://a").expect("URL"));
        assert_eq!(none, Way::Environment);
    }

    #[test]
    fn mistakes_are_told_without_secrets() {
        for (pattern, way, part) in [
            ("a/b", "direct", "not a host"),
            ("a*", "direct", "not a host"),
            ("", "direct", "not a host"),
            ("a", "socks5://x:1", "not \"direct\""),
            ("a", "proxy:3128", "not \"direct\""),
            ("a", "unix:run/x", "absolute"),
            ("a", "http://u:hunter2@x:1", "a password has no place"),
        ] {
            let said = parsed(&[(pattern, way)]).expect_err(part).chain();
            assert!(said.contains("images.proxies") && said.contains(part) && !said.contains("hunter2"), "{said}");
        }
    }
}
