//! Credentials and tokens: what a registry's challenge asks for, and which credentials a host may see.
//!
//! Called by the client. Pure but for [`Credentials`], which holds secrets and therefore has no Debug.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::core::ports::RegistryAuth;
use crate::core::reference::{DOCKER_HUB, Reference};

/// What a WWW-Authenticate header asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// URL of the token server.
        realm: String,
        /// Name of the registry for the token server.
        service: Option<String>,
        /// What the token is for.
        scope: Option<String>,
    },
}

/// Parses one WWW-Authenticate header, which may hold several challenges; Bearer is preferred.
pub fn parse_challenge(header: &str) -> Option<Challenge> {
    let mut basic = false;
    let mut bearer: Option<Vec<(String, String)>> = None;
    let mut in_bearer = false;
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', ',', '\t']);
        if rest.is_empty() {
            break;
        }
        let end = rest.find([' ', '=', ',']).unwrap_or(rest.len());
        let word = &rest[..end];
        let after = rest[end..].trim_start();
        if let Some(value) = after.strip_prefix('=') {
            let (value, next) = parse_value(value.trim_start());
            if in_bearer && let Some(list) = &mut bearer {
                list.push((word.to_ascii_lowercase(), value));
            }
            rest = next;
        } else {
            in_bearer = word.eq_ignore_ascii_case("bearer");
            basic |= word.eq_ignore_ascii_case("basic");
            if in_bearer {
                bearer = Some(Vec::new());
            }
            rest = after;
        }
    }
    let find = |list: &[(String, String)], key: &str| list.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    if let Some(list) = bearer
        && let Some(realm) = find(&list, "realm")
    {
        return Some(Challenge::Bearer { realm, service: find(&list, "service"), scope: find(&list, "scope") });
    }
    basic.then_some(Challenge::Basic)
}

/// A token or a quoted string, and what follows it.
fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

/// Credentials for one host.
#[derive(Clone, Default)]
pub struct Credentials {
    /// User and password.
    pub basic: Option<(String, String)>,
    /// OAuth2 refresh token.
    pub identity: Option<String>,
    /// A bearer token as it is.
    pub token: Option<String>,
}

impl Credentials {
    /// What `auth` holds, if it is for `host` (with port), which serves `reference`. Mirrors get nothing unless named.
    pub fn for_host(auth: Option<&RegistryAuth>, reference: &Reference, host: &str) -> Self {
        let Some(auth) = auth else { return Self::default() };
        let server = server_host(&auth.server_address);
        let server = if server.is_empty() { reference.api_host() } else { canonical(server) };
        if server != canonical(host) && !(server_host(&auth.server_address).is_empty() && host == reference.api_host())
        {
            return Self::default();
        }
        Self::of(auth)
    }

    /// What `auth` holds, whomever it is for.
    pub(super) fn of(auth: &RegistryAuth) -> Self {
        let filled = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let basic = if auth.username.is_empty() && !auth.auth.is_empty() {
            STANDARD
                .decode(auth.auth.trim().trim_end_matches('\0'))
                .ok()
                .and_then(|text| String::from_utf8(text).ok())
                .and_then(|text| text.split_once(':').map(|(u, p)| (u.to_owned(), p.trim_end_matches('\0').to_owned())))
        } else {
            filled(&auth.username).map(|user| (user, auth.password.clone()))
        };
        Self { basic, identity: filled(&auth.identity_token), token: filled(&auth.registry_token) }
    }

    /// Whether there is nothing to offer.
    pub(super) fn is_empty(&self) -> bool {
        self.basic.is_none() && self.identity.is_none() && self.token.is_none()
    }

    /// Value of an Authorization header for basic authentication.
    pub fn basic_header(&self) -> Option<String> {
        self.basic.as_ref().map(|(user, password)| format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }
}

/// The host in "https://index.docker.io/v1/", "host:5000", ...
pub(super) fn server_host(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or("")
}

/// Docker Hub has several names.
pub(super) fn canonical(host: &str) -> &str {
    match host {
        DOCKER_HUB | "index.docker.io" | "registry-1.docker.io" => "registry-1.docker.io",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges() {
        assert_eq!(parse_challenge("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(
            parse_challenge(r#"Bearer realm="https://a/t",service="s, \"x\"",scope="repository:a/b:pull,push""#),
            Some(Challenge::Bearer {
                realm: "https://a/t".into(),
                service: Some("s, \"x\"".into()),
                scope: Some("repository:a/b:pull,push".into())
            })
        );
        assert_eq!(
            parse_challenge("Basic realm=\"x\", bearer realm=http://b/"),
            Some(Challenge::Bearer { realm: "http://b/".into(), service: None, scope: None })
        );
        for bad in ["", "Negotiate", "Bearer", "Bearer service=\"x\"", ",,,", "="] {
            assert_eq!(parse_challenge(bad), None, "{bad}");
        }
    }

    #[test]
    fn credentials_stay_with_their_host() {
        let hub: Reference = "busybox".parse().expect("reference");
        let auth =
            |server: &str| RegistryAuth { username: "u".into(), server_address: server.into(), ..Default::default() };
        let sees = |server: &str, host: &str| Credentials::for_host(Some(&auth(server)), &hub, host).basic.is_some();
        assert!(sees("", "registry-1.docker.io"));
        assert!(sees("https://index.docker.io/v1/", "registry-1.docker.io"));
        assert!(!sees("", "mirror.example"));
        assert!(sees("mirror.example", "mirror.example"));
        assert!(!sees("mirror.example", "registry-1.docker.io"));
        let encoded = RegistryAuth { auth: STANDARD.encode("a:b:c"), ..Default::default() };
        let got = Credentials::for_host(Some(&encoded), &hub, "registry-1.docker.io").basic;
        assert_eq!(got, Some(("a".into(), "b:c".into())));
    }

    proptest! {
        #[test]
        fn challenges_never_panic(text in "\\PC{0,100}") {
            let _ = parse_challenge(&text);
            let _ = parse_challenge(&format!("Bearer realm=\"{text}"));
        }
    }
}
