//! What a pull would ask, in its order: which hosts, with which TLS and whose credentials. Nothing is asked, no helper runs.
//!
//! Called by the command line. Names of headers and places of credentials are told, what is in them never.

use serde::Serialize;

use camino::Utf8PathBuf;

use super::hosts::{self, Host, Tls};
use super::keychain::{Keychain, Place};
use super::proxy::Proxies;
use crate::core::error::Result;
use crate::core::reference::Reference;

/// How an image's registry is asked.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The image's whole name.
    pub image: String,
    /// The hosts.toml that counts; None: there is none for this registry.
    pub hosts_file: Option<Utf8PathBuf>,
    /// First to last: the next one is asked when one fails.
    pub hosts: Vec<Asked>,
}

/// A host that is asked.
#[derive(Debug, Serialize)]
pub struct Asked {
    /// Base of its API.
    pub url: String,
    /// What tags mean.
    pub resolve: bool,
    /// Content by digest.
    pub pull: bool,
    /// Asked only where the host before it does not speak the other's protocol.
    pub fallback: bool,
    /// The image's own registry, which gets the credentials of the pull (the kubelet's pull secrets).
    pub upstream: bool,
    /// The way to it.
    pub reached: String,
    /// TLS: how it is verified, and who we are.
    pub tls: String,
    /// Names of the headers that are sent along.
    pub headers: Vec<String>,
    /// Where the node's own credentials for it are.
    pub credentials: String,
}

/// See the module's words. What a pull would fail of is an error here, too.
pub async fn explain(
    reference: &Reference,
    dirs: &[Utf8PathBuf],
    keychain: &Keychain,
    proxies: &Proxies,
) -> Result<Explanation> {
    let mut asked = Vec::new();
    for host in hosts::hosts_for(reference, dirs)? {
        let place = keychain.place(&host.name(), reference.repository()).await?;
        asked.push(Asked { reached: proxies.way(&host.base).to_string(), ..of(&host, keychain, place) });
    }
    Ok(Explanation { image: reference.to_string(), hosts_file: hosts::file_for(reference, dirs)?, hosts: asked })
}

fn of(host: &Host, keychain: &Keychain, place: Option<Place>) -> Asked {
    let credentials = match (place, &keychain.file) {
        (Some(Place::Entry(key)), Some(file)) => format!("{file}, entry {key:?}"),
        (Some(Place::Helper { name, server }), _) => format!("docker-credential-{name}, asked for {server:?}"),
        _ => "none of the node's".into(),
    };
    Asked {
        url: host.base.to_string(),
        resolve: host.resolve,
        pull: host.pull,
        fallback: host.fallback,
        upstream: host.upstream,
        reached: String::new(),
        tls: if host.base.scheme() == "http" { "none (plain HTTP)".into() } else { tls(&host.tls) },
        headers: host.headers.iter().map(|(name, _)| name.clone()).collect(),
        credentials,
    }
}

fn tls(tls: &Tls) -> String {
    let mut text = match (tls.skip_verify, tls.ca.is_empty()) {
        (true, _) => "NOT verified (skip_verify)".to_owned(),
        (false, true) => "verified by the system's CAs".to_owned(),
        (false, false) => {
            let files = tls.ca.iter().map(|p| p.as_str()).collect::<Vec<_>>().join(", ");
            format!("verified by the system's CAs and {files}")
        }
    };
    if let Some((certificate, _)) = &tls.client {
        text.push_str(&format!(", with the client certificate {certificate}"));
    }
    text
}
