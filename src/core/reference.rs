//! Image references, parsed once at the edge: registry, repository, tag and digest.
//!
//! Called by the image store and by whoever compares what callers name an image. Grammar and normalisation are
//! those of the Docker reference grammar: "busybox" is `docker.io/library/busybox:latest`. Parsing is pure and
//! fails with InvalidArgument naming the reference and the part that does not fit.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use super::error::{Error, Result};
use super::ids::Digest;

/// Longest accepted reference in bytes.
pub const MAX_REFERENCE: usize = 1024;
/// Longest repository with its registry in bytes.
pub const MAX_NAME: usize = 255;
/// Longest tag in bytes.
pub const MAX_TAG: usize = 128;
/// The registry of names without one.
pub const DOCKER_HUB: &str = "docker.io";

/// A full image reference. Has a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses `text`; names without a registry belong to `default_registry`.
    pub fn parse(text: &str, default_registry: &str) -> Result<Self> {
        let bad = |why: &str| {
            let shown: String = text.chars().take(200).collect();
            Error::invalid(format!("image reference {shown:?}: {why}"))
        };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        if text.len() > MAX_REFERENCE {
            return Err(bad("it is longer than 1024 bytes"));
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                (rest, Some(digest.parse::<Digest>().map_err(|_| bad("what follows @ is not a sha256 digest"))?))
            }
        };
        let (name, tag) = match rest.rfind(':') {
            Some(at) if !rest[at..].contains('/') => (&rest[..at], Some(&rest[at + 1..])),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(bad(
                "the tag has to be 1 to 128 letters, digits, '_', '.' or '-', not starting with '.' or '-'",
            ));
        }
        if name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad("64 hexadecimal digits are an image id and not a name"));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if names_a_registry(first) => (first, rest),
            _ => (default_registry, name),
        };
        let registry = if registry == "index.docker.io" { DOCKER_HUB } else { registry };
        if !is_registry(registry) {
            return Err(bad("the registry is not a host name or address with an optional port"));
        }
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad("the repository has to be lower case"));
        }
        if path.is_empty() || !path.split('/').all(is_component) {
            return Err(bad("the repository has to be lower-case letters and digits, with single separators between"));
        }
        let repository =
            if registry == DOCKER_HUB && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(bad("registry and repository are longer than 255 bytes"));
        }
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }

    /// Registry as named, with its port: "docker.io", "localhost:5000".
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Repository within the registry: "library/busybox".
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; "latest" when the text named neither tag nor digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if named.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and repository: "docker.io/library/busybox".
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Name and tag, if there is a tag.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}/{}:{tag}", self.registry, self.repository))
    }

    /// Name and `digest`.
    pub fn digested(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }

    /// Host that serves the registry's API: `registry-1.docker.io` for Docker Hub.
    pub fn api_host(&self) -> &str {
        if self.registry == DOCKER_HUB { "registry-1.docker.io" } else { &self.registry }
    }
}

impl FromStr for Reference {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::parse(s, DOCKER_HUB)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Whether traffic to `host` ("name", "name:port", "[::1]:port") stays on this machine.
pub fn is_loopback(host: &str) -> bool {
    let (name, _) = split_port(host);
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Splits "host:port"; brackets stay with an IPv6 host.
pub fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rfind(':') {
        Some(at) if !host[at..].contains(']') => (&host[..at], Some(&host[at + 1..])),
        _ => (host, None),
    }
}

fn names_a_registry(first: &str) -> bool {
    first.contains(['.', ':', '[']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_registry(host: &str) -> bool {
    let (name, port) = split_port(host);
    if port.is_some_and(|p| p.is_empty() || !p.bytes().all(|b| b.is_ascii_digit()) || p.parse::<u16>().is_err()) {
        return false;
    }
    if let Some(inner) = name.strip_prefix('[') {
        return inner.strip_suffix(']').is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok());
    }
    !name.is_empty()
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

fn is_tag(tag: &str) -> bool {
    (1..=MAX_TAG).contains(&tag.len())
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        && !tag.starts_with(['.', '-'])
}

/// Letters and digits, between them one '.', one or two '_', or any number of '-'.
fn is_component(part: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !alnum(*first) || !alnum(*last) {
        return false;
    }
    bytes.split(|b| alnum(*b)).all(|separator| match separator {
        [] | [b'.'] | [b'_'] | [b'_', b'_'] => true,
        other => other.iter().all(|b| *b == b'-'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const D: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn full_forms() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1", "docker.io/library/busybox:1"),
            ("a/b", "docker.io/a/b:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
            ("host:5000/a", "host:5000/a:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t"),
            ("[::1]:5000/a:t", "[::1]:5000/a:t"),
            ("[fe80::1]/a", "[fe80::1]/a:latest"),
            ("GHCR.io/a", "GHCR.io/a:latest"),
            ("a__b/c--d.e_f", "docker.io/a__b/c--d.e_f:latest"),
        ] {
            assert_eq!(text.parse::<Reference>().expect(text).to_string(), full);
        }
        let by_digest: Reference = format!("busybox@{D}").parse().expect("digest");
        assert_eq!(by_digest.to_string(), format!("docker.io/library/busybox@{D}"));
        assert_eq!((by_digest.tag(), by_digest.tagged()), (None, None));
        let both: Reference = format!("r.io/a:t@{D}").parse().expect("both");
        assert_eq!(both.to_string(), format!("r.io/a:t@{D}"));
    }

    #[test]
    fn refused() {
        let long = format!("r.io/{}", "a".repeat(300));
        let tag = format!("a:{}", "t".repeat(129));
        for text in [
            "",
            " ",
            "a b",
            "Busybox",
            "r.io/A",
            "r.io/",
            "/a",
            "a//b",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a:",
            "a:.x",
            "a:-x",
            "a@",
            "a@sha256:12",
            "a@md5:0",
            "host:port/a",
            "host:99999/a",
            "[::g]/a",
            "[::1/a",
            "ex_ample.com:1/a",
            "a:b:c",
            "https://r.io/a",
            "../a",
            "a/../b",
            &long,
            &tag,
            &D[7..],
        ] {
            let e = text.parse::<Reference>().expect_err(text);
            assert_eq!(e.kind(), crate::core::error::Kind::InvalidArgument, "{text}");
        }
    }

    #[test]
    fn another_default_registry_has_no_library() {
        assert_eq!(Reference::parse("a", "r.example:5000").expect("a").to_string(), "r.example:5000/a:latest");
        assert_eq!("busybox".parse::<Reference>().expect("a").api_host(), "registry-1.docker.io");
    }

    #[test]
    fn loopback_hosts() {
        for host in ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["example.com", "127.0.0.1.example.com", "10.0.0.1:5000", "[::2]:1", "localhost.example.com"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_full_form_is_stable(text in "\\PC{0,80}") {
            if let Ok(r) = text.parse::<Reference>() {
                prop_assert_eq!(r.to_string().parse::<Reference>().expect("own form"), r);
            }
        }

        #[test]
        fn well_formed_names_parse(
            host in prop::option::of("[a-z]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?"),
            path in "[a-z0-9]{1,6}([_-][a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,6}){0,2}",
            tag in prop::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,12}"),
        ) {
            let text = format!("{}{path}{}", host.as_ref().map(|h| format!("{h}/")).unwrap_or_default(),
                tag.as_ref().map(|t| format!(":{t}")).unwrap_or_default());
            let r: Reference = text.parse().expect("well formed");
            prop_assert_eq!(r.tag(), Some(tag.as_deref().unwrap_or("latest")));
            prop_assert_eq!(r.to_string().parse::<Reference>().expect("own form"), r);
        }
    }
}
