//! The policy file: rules by repository, the first that fits counts.
//!
//! ```toml
//! default = "reject"                        # or "accept": what no rule is for
//!
//! [[rule]]
//! name = "ours"                             # told when it refuses
//! repositories = ["registry.example/team/*", "docker.io/library/busybox", "*"]
//! require = "cosign"                        # "accept", "reject", "cosign", "plugins"
//! keys = ["/etc/proxmox-lxcri/ours.pub"]    # cosign: one of them has signed it
//! dir = "/opt/image-verifier/bin"           # plugins: all of them say yes
//! timeout = 10                              # plugins: seconds for each
//! ```
//! Pure but for the reading. Unknown keys are refused: a rule that was misspelt must not admit.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;

use crate::core::error::{Error, Result};

/// Largest policy or key in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Seconds for a plugin if nobody says.
const TIMEOUT: u64 = 10;

/// What a rule asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Require {
    Accept,
    Reject,
    /// A signature by one of these keys (files).
    Cosign {
        keys: Vec<Utf8PathBuf>,
    },
    /// All programs of a folder.
    Plugins {
        dir: Utf8PathBuf,
        timeout: Duration,
    },
}

/// What counts for a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// For messages: `rule "ours"`, or `default`.
    pub name: String,
    pub require: Require,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default: Verdict,
    #[serde(default)]
    rule: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Accept,
    Reject,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    repositories: Vec<String>,
    require: String,
    #[serde(default)]
    keys: Vec<Utf8PathBuf>,
    dir: Option<Utf8PathBuf>,
    timeout: Option<u64>,
}

/// All rules.
#[derive(Debug)]
pub(super) struct Policy {
    default: Require,
    rules: Vec<(Vec<String>, Rule)>,
}

impl Policy {
    pub(super) fn read(path: &Utf8Path) -> Result<Self> {
        let text = trusted(path)?;
        let text = String::from_utf8(text).map_err(|_| Error::precondition("not UTF-8"))?;
        Self::parse(&text)
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let file: File =
            toml::from_str(text).map_err(|e| Error::precondition(e.to_string().trim_end().replace('\n', " ")))?;
        let rules = file.rule.into_iter().map(rule).collect::<Result<Vec<_>>>()?;
        let default = match file.default {
            Verdict::Accept => Require::Accept,
            Verdict::Reject => Require::Reject,
        };
        Ok(Self { default, rules })
    }

    /// The rule for the repository `name`, with its registry.
    pub(super) fn rule(&self, name: &str) -> Rule {
        let found = self.rules.iter().find(|(patterns, _)| patterns.iter().any(|p| fits(p, name)));
        found.map_or_else(|| Rule { name: "default".into(), require: self.default.clone() }, |(_, rule)| rule.clone())
    }
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

fn rule(entry: Entry) -> Result<(Vec<String>, Rule)> {
    let name = format!("rule {:?}", entry.name);
    let bad = |why: &str| Error::precondition(format!("{name}: {why}"));
    for pattern in &entry.repositories {
        let whole = pattern.strip_suffix("/*").unwrap_or(pattern);
        // "a*" would be a prefix of other people's names, "busybox" no repository's whole name.
        if pattern != "*"
            && (whole.contains('*') || whole.is_empty() || !(whole.contains('/') || pattern.ends_with("/*")))
        {
            return Err(bad(&format!("{pattern:?} is no REGISTRY/REPOSITORY, REGISTRY/PATH/* or *")));
        }
    }
    let only = |keys: bool, plugins: bool| {
        let superfluous =
            (!keys && !entry.keys.is_empty()) || (!plugins && (entry.dir.is_some() || entry.timeout.is_some()));
        if superfluous { Err(bad("keys are for cosign, dir and timeout for plugins")) } else { Ok(()) }
    };
    let require = match entry.require.as_str() {
        "accept" => only(false, false).map(|()| Require::Accept),
        "reject" => only(false, false).map(|()| Require::Reject),
        "cosign" if entry.keys.is_empty() => Err(bad("cosign needs keys")),
        "cosign" => only(true, false).map(|()| Require::Cosign { keys: entry.keys.clone() }),
        "plugins" => {
            only(false, true)?;
            let dir = entry
                .dir
                .clone()
                .filter(|d| d.is_absolute())
                .ok_or_else(|| bad("plugins need dir, an absolute path"))?;
            Ok(Require::Plugins { dir, timeout: Duration::from_secs(entry.timeout.unwrap_or(TIMEOUT).max(1)) })
        }
        other => Err(bad(&format!("require: {other:?} is not one of accept, reject, cosign, plugins"))),
    }?;
    Ok((entry.repositories, Rule { name, require }))
}

/// Reads a file that decides what is trusted: nobody but root and us may write it.
pub(super) fn trusted(path: &Utf8Path) -> Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |e: std::io::Error| Error::io(path, e);
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(Error::precondition(format!("{path}: not a regular file")));
    }
    not_others(path, &meta)?;
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(failed)?;
    match text.len() as u64 > MAX_FILE {
        true => Err(Error::precondition(format!("{path}: larger than 1 MiB"))),
        false => Ok(text),
    }
}

/// Refuses what others could have written.
pub(super) fn not_others(path: &Utf8Path, meta: &std::fs::Metadata) -> Result<()> {
    let us = rustix::process::geteuid().as_raw();
    match meta.mode() & 0o022 != 0 || (meta.uid() != 0 && meta.uid() != us) {
        true => Err(Error::precondition(format!("{path}: others than root can write it"))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_fits_counts() {
        let policy = Policy::parse(
            r#"
            default = "reject"
            [[rule]]
            name = "one"
            repositories = ["docker.io/library/busybox"]
            require = "accept"
            [[rule]]
            name = "ours"
            repositories = ["r.example/team/*", "r.example:5000/*"]
            require = "cosign"
            keys = ["/k.pub"]
            [[rule]]
            name = "programs"
            repositories = ["quay.io/*"]
            require = "plugins"
            dir = "/p"
            timeout = 3
            "#,
        )
        .expect("a policy");
        let rule = |name: &str| policy.rule(name);
        assert_eq!(rule("docker.io/library/busybox").require, Require::Accept);
        assert_eq!(rule("docker.io/library/busybox2").name, "default");
        assert_eq!(rule("r.example/team/a/b").name, "rule \"ours\"");
        assert_eq!(rule("r.example/teams/a").require, Require::Reject);
        assert_eq!(rule("r.example:5000/x").name, "rule \"ours\"");
        let programs = Require::Plugins { dir: "/p".into(), timeout: Duration::from_secs(3) };
        assert_eq!(rule("quay.io/x").require, programs);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let with = |line: &str| format!("default = 'accept'\n[[rule]]\nname = 'n'\nrepositories = ['a/*']\n{line}\n");
        for (text, part) in [
            (String::new(), "default"),
            ("default = 'maybe'".into(), "maybe"),
            ("default = 'accept'\nrules = []".into(), "rules"),
            (with(""), "require"),
            (with("require = 'sign'"), "not one of"),
            (with("require = 'cosign'"), "needs keys"),
            (with("require = 'plugins'"), "need dir"),
            (with("require = 'plugins'\ndir = 'x'"), "need dir"),
            (with("require = 'accept'\nkeys = ['/k']"), "keys are for cosign"),
            (with("require = 'accept'").replace("a/*", "busybox"), "is no REGISTRY/REPOSITORY"),
            (with("require = 'accept'").replace("a/*", "a/b*"), "is no REGISTRY/REPOSITORY"),
        ] {
            let said = Policy::parse(&text).expect_err(part).chain();
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}
