//! containers' `registries.conf` (version 2) as containerd's `hosts.toml`, which is what is read here.
//!
//! Called by the command line; pure. What the one can say and the other can't is named and left to the caller: a mirror that is
//! silently left out is hard to find, and a registry that was blocked must not be open. Format: containers-registries.conf(5).

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::core::error::{Error, Result};

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Folders of registries, with the `hosts.toml` for each.
    pub files: BTreeMap<String, String>,
    /// What can't be said in a `hosts.toml`.
    pub left_out: Vec<String>,
    /// What is said elsewhere here.
    pub notes: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct File {
    unqualified_search_registries: Vec<String>,
    short_name_mode: Option<String>,
    credential_helpers: Vec<String>,
    additional_layer_store_auth_helper: Option<String>,
    aliases: BTreeMap<String, String>,
    registry: Vec<Registry>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Registry {
    prefix: String,
    location: String,
    insecure: bool,
    blocked: bool,
    mirror_by_digest_only: bool,
    mirror: Vec<Mirror>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Mirror {
    location: String,
    insecure: bool,
    pull_from_mirror: String,
}

/// Converts the text of a `registries.conf`. Fails with what is no such file.
pub fn convert(text: &str) -> Result<Converted> {
    let file: File = toml::from_str(text).map_err(|e| {
        Error::invalid(format!("not a registries.conf of version 2: {}", e.to_string().trim_end().replace('\n', " ")))
    })?;
    let mut done = Converted::default();
    for registry in &file.registry {
        if let Err(why) = one(registry, &mut done.files) {
            let name = if registry.prefix.is_empty() { &registry.location } else { &registry.prefix };
            done.left_out.push(format!("{name}: {why}"));
        }
    }
    match file.unqualified_search_registries.as_slice() {
        [] => {}
        [only] => done.notes.push(format!("names without a registry: images.default_registry = {only:?}")),
        several => done.left_out.push(format!(
            "unqualified-search-registries: names without a registry are of one (images.default_registry), not of {several:?}"
        )),
    }
    if !file.credential_helpers.is_empty() {
        let helpers = file.credential_helpers.join(", ");
        done.notes
            .push(format!("credential helpers are named in images.auth_file (credHelpers, credsStore): {helpers}"));
    }
    if !file.aliases.is_empty() {
        done.left_out.push(format!("{} aliases: an image is pulled by its whole name", file.aliases.len()));
    }
    if file.short_name_mode.is_some() {
        done.notes.push("short-name-mode has no meaning: nobody is asked which registry is meant".into());
    }
    if file.additional_layer_store_auth_helper.is_some() {
        done.left_out.push("additional-layer-store-auth-helper: there are no such stores".into());
    }
    Ok(done)
}

fn one(registry: &Registry, files: &mut BTreeMap<String, String>) -> Result<(), String> {
    let location = if registry.location.is_empty() { &registry.prefix } else { &registry.location };
    let prefix = if registry.prefix.is_empty() { location } else { &registry.prefix };
    if prefix.is_empty() {
        return Err("neither prefix nor location".into());
    }
    if prefix.starts_with("*.") {
        return Err("a hosts.toml is for one host, not for all of a domain".into());
    }
    if prefix.contains('/') {
        return Err("a hosts.toml is for a whole registry, not for a part of its repositories".into());
    }
    if registry.blocked {
        return Err("blocked: images.policy_file can reject it (require = \"reject\")".into());
    }
    let mut text = format!("server = {}\n", quoted(&url(location)?));
    settings(&mut text, location, registry.insecure);
    for mirror in &registry.mirror {
        let capabilities = match (mirror.pull_from_mirror.as_str(), registry.mirror_by_digest_only) {
            ("digest-only", _) | ("", true) => "[\"pull\"]",
            ("tag-only", false) => "[\"resolve\"]",
            ("" | "all", false) => "[\"pull\", \"resolve\"]",
            (other, _) => return Err(format!("mirror {}: pull-from-mirror {other:?} here", mirror.location)),
        };
        let table = format!("[host.{}]\n", quoted(&url(&mirror.location)?));
        if text.contains(&table) {
            return Err(format!("mirror {} twice", mirror.location));
        }
        text.push_str(&format!("\n{table}capabilities = {capabilities}\n"));
        settings(&mut text, &mirror.location, mirror.insecure);
    }
    match files.insert(prefix.clone(), text) {
        None => Ok(()),
        Some(_) => Err("twice".into()),
    }
}

/// The base of the API at a location; below a path its repositories are.
fn url(location: &str) -> Result<String, String> {
    let (host, path) = location.split_once('/').unwrap_or((location, ""));
    let odd = location.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '@' | '?' | '#' | '"'));
    if host.is_empty() || odd || host.contains("//") {
        return Err(format!("{location:?} is no HOST[:PORT][/PATH]"));
    }
    Ok(if path.is_empty() {
        format!("https://{host}")
    } else {
        format!("https://{host}/v2/{}", path.trim_end_matches('/'))
    })
}

fn settings(text: &mut String, location: &str, insecure: bool) {
    if location.contains('/') {
        text.push_str("override_path = true\n");
    }
    if insecure {
        text.push_str(
            "# was \"insecure\"; where the host speaks no TLS at all, say http:// above\nskip_verify = true\n",
        );
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrations::registry::hosts;

    const CONF: &str = r#"
        unqualified-search-registries = ["docker.io"]
        credential-helpers = ["secretservice"]
        [[registry]]
        prefix = "docker.io"
        location = "registry-1.docker.io"
        [[registry.mirror]]
        location = "mirror.example:5000/hub"
        insecure = true
        [[registry.mirror]]
        location = "second.example"
        pull-from-mirror = "digest-only"
        [[registry]]
        location = "old.example"
        insecure = true
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "m.example"
        [[registry]]
        prefix = "*.corp.example"
        location = "corp.example"
        [[registry]]
        prefix = "quay.io/team"
        location = "quay.example/x"
        [[registry]]
        location = "evil.example"
        blocked = true
    "#;

    #[test]
    fn mirrors_are_the_same_in_the_other_format() {
        let done = convert(CONF).expect("a conversion");
        assert_eq!(done.files.keys().collect::<Vec<_>>(), ["docker.io", "old.example"]);
        let parsed = |registry: &str, image: &str| {
            let path = camino::Utf8Path::new("/c/hosts.toml");
            hosts::parse(path, &done.files[registry], &image.parse().expect("reference")).expect("hosts.toml")
        };
        let hub = parsed("docker.io", "busybox");
        let bases: Vec<&str> = hub.iter().map(|h| h.base.as_str()).collect();
        assert_eq!(
            bases,
            ["https://mirror.example:5000/v2/hub", "https://second.example/v2", "https://registry-1.docker.io/v2"]
        );
        assert!(hub[0].tls.skip_verify && hub[0].resolve && hub[0].pull && !hub[2].tls.skip_verify && hub[2].upstream);
        assert!(hub[1].pull && !hub[1].resolve);
        let old = parsed("old.example", "old.example/a");
        assert!(!old[0].resolve && !old[0].tls.skip_verify && old[1].tls.skip_verify);
        for words in [
            "*.corp.example: a hosts.toml is for one host",
            "quay.io/team: a hosts.toml is for a whole",
            "evil.example: blocked",
        ] {
            assert!(done.left_out.iter().any(|l| l.starts_with(words)), "{words}: {:?}", done.left_out);
        }
        assert_eq!((done.left_out.len(), done.notes.len()), (3, 2), "{done:?}");
    }

    #[test]
    fn what_is_no_such_file_is_told() {
        for text in ["[registries.search]\nregistries = ['a']", "registry = 3", "[[registry]]\nlocaton = 'x'", "="] {
            assert!(convert(text).expect_err(text).to_string().contains("registries.conf"), "{text}");
        }
        for (text, part) in [
            ("[[registry]]", "neither prefix nor location"),
            ("[[registry]]\nlocation = 'a\"b'", "is no HOST"),
            ("[[registry]]\nlocation = 'a'\n[[registry]]\nlocation = 'a'", "twice"),
            ("[[registry]]\nlocation = 'a'\n[[registry.mirror]]\nlocation = 'b'\npull-from-mirror = 'never'", "never"),
        ] {
            let done = convert(text).expect("a conversion");
            assert!(done.left_out.iter().any(|l| l.contains(part)), "{text}: {done:?}");
        }
    }
}
