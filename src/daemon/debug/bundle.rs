//! What `debug bundle` collects: the daemon's view, the doctor's, the configuration, the log, the node. Each part that can't be had
//! is named with the reason, and the others are there.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use base64::Engine as _;
use camino::Utf8Path;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::redact::Redactor;
use crate::api::{local, v1};
use crate::cli::Context;
use crate::cli::client::{Client, called};
use crate::core::config::{Config, Entry, LayerDriver, dump};
use crate::daemon::doctor::{self, Host};
use crate::utils::process::Spawn;
use crate::utils::time::rfc3339;

/// How long a program, or the daemon, may take for its part.
const TELL: Duration = Duration::from_secs(15);
/// Most that is taken of one part, in bytes; the end of it.
const PART_MAX: u64 = 16 << 20;
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the log is from.
pub(super) enum Log {
    /// The unit's journal.
    Journal,
    /// A file that the daemon writes to.
    File(camino::Utf8PathBuf),
}

/// Parts by their file names, as they are.
pub(super) struct Parts {
    there: BTreeMap<String, String>,
    missing: BTreeMap<String, String>,
    secrets: Vec<String>,
}

impl Parts {
    fn add(&mut self, name: &str, part: Result<String>) {
        match part {
            Ok(text) => drop(self.there.insert(name.into(), text)),
            Err(e) => drop(self.missing.insert(name.into(), format!("{e:#}"))),
        }
    }

    /// Names of what could not be had, with the reasons.
    pub(super) fn missing(&self) -> &BTreeMap<String, String> {
        &self.missing
    }

    /// The archive, with nothing in it that is known to be a secret or looks like one.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let redactor = Redactor::new(self.secrets.iter().cloned());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let missing: BTreeMap<_, _> = self.missing.iter().map(|(name, why)| (name, redactor.clean(why))).collect();
        let about = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "made": rfc3339(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
            "parts": self.there.keys().collect::<Vec<_>>(),
            "missing": missing,
        });
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
        let mut add = |name: &str, text: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(now.as_secs());
            tar.append_data(&mut header, format!("proxmox-lxcri-debug/{name}"), text.as_bytes())
        };
        add("about.json", &serde_json::to_string_pretty(&about)?)?;
        for (name, text) in &self.there {
            add(name, &redactor.clean(text))?;
        }
        Ok(tar.into_inner()?.finish()?)
    }
}

/// Asks everything.
pub(super) async fn collect(context: &Context, log: Log, lines: u64) -> Parts {
    let mut parts = Parts { there: BTreeMap::new(), missing: BTreeMap::new(), secrets: Vec::new() };
    let config = match context.sources.load() {
        Ok(loaded) => {
            parts.add("config.toml", Ok(Entry::file(&dump(&loaded))));
            loaded.config
        }
        Err(e) => {
            parts.add("config.toml", Err(anyhow!("{e}")));
            Config::default()
        }
    };
    for (path, found) in secrets(&config) {
        match found {
            Ok(found) => parts.secrets.extend(found),
            // What it holds can't be looked for then.
            Err(e) => parts.add(
                path.as_str(),
                Err(e.context("a file of secrets can't be read: what it holds is not known to be one")),
            ),
        }
    }
    daemon(&mut parts, &context.local_socket).await;
    let found = doctor::examine(&Host::this(), &config).await;
    parts.add("doctor.json", serde_json::to_string_pretty(&found).map_err(Into::into));
    let lines = lines.to_string();
    parts.add(
        "log.txt",
        match log {
            Log::Journal => {
                let unit =
                    ["--unit", "proxmox-lxcri", "--no-pager", "--output", "short-iso-precise", "--lines", &lines];
                told("/usr/bin/journalctl", &unit).await
            }
            Log::File(path) => file(&path).map(|text| last_lines(&text, &lines)),
        },
    );
    node(&mut parts, &config).await;
    parts
}

async fn daemon(parts: &mut Parts, socket: &Utf8Path) {
    let asked = tokio::time::timeout(TELL, async {
        let mut client = Client::connect(socket).await?;
        let dump = called(client.local.dump(local::DumpRequest {}).await)?.json;
        let status = called(client.runtime.status(v1::StatusRequest { verbose: false }).await)?.status;
        let conditions = status.unwrap_or_default().conditions.into_iter();
        let conditions: Vec<Value> = conditions
            .map(|c| json!({"type": c.r#type, "status": c.status, "reason": c.reason, "message": c.message}))
            .collect();
        let images = called(client.image.list_images(v1::ListImagesRequest::default()).await)?.images.into_iter();
        let images: Vec<Value> =
            images.map(|i| json!({"id": i.id, "tags": i.repo_tags, "size": i.size, "pinned": i.pinned})).collect();
        let dump: Value = serde_json::from_str(&dump)?;
        Ok::<_, anyhow::Error>([
            ("dump.json", dump),
            ("status.json", json!(conditions)),
            ("images.json", json!(images)),
        ])
    });
    match asked.await.unwrap_or_else(|_| Err(anyhow!("the daemon has not answered within {TELL:?}"))) {
        Ok(told) => {
            for (name, value) in told {
                parts.add(name, serde_json::to_string_pretty(&value).map_err(Into::into));
            }
        }
        Err(e) => parts.add("dump.json", Err(e)),
    }
}

/// What the node is.
async fn node(parts: &mut Parts, config: &Config) {
    for path in [
        "/etc/os-release",
        "/proc/version",
        "/proc/uptime",
        "/proc/loadavg",
        "/proc/meminfo",
        "/proc/self/mountinfo",
        "/proc/filesystems",
        "/proc/pressure/cpu",
        "/proc/pressure/io",
        "/proc/pressure/memory",
        "/sys/fs/cgroup/cgroup.controllers",
    ] {
        parts.add(&format!("node{path}"), file(path.into()));
    }
    let unit = [
        "show",
        "proxmox-lxcri.service",
        "--property",
        "ActiveState,SubState,NRestarts,MainPID,MemoryCurrent,TasksCurrent,DropInPaths",
    ];
    parts.add("node/unit.txt", told("/usr/bin/systemctl", &unit).await);
    parts.add("node/crun.txt", told(config.handlers.crun.path.as_str(), &["--version"]).await);
    if config.images.driver == LayerDriver::Zfs {
        parts.add("node/zpool.txt", told(config.images.zfs.zpool_path.as_str(), &["status"]).await);
        let list = ["list", "-o", "space", "-r", config.images.zfs.dataset.as_str()];
        parts.add("node/zfs.txt", told(config.images.zfs.zfs_path.as_str(), &list).await);
    }
}

async fn told(program: &str, args: &[&str]) -> Result<String> {
    let spawn = Spawn::new(program, args.iter().copied()).env("PATH", PATH).env("LC_ALL", "C.UTF-8").deadline(TELL);
    let output = spawn.stdout_cap(usize::try_from(PART_MAX)?).run_ok().await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The end of a file; those in /proc have no length.
fn file(path: &Utf8Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| path.to_string())?;
    let length = file.metadata().with_context(|| path.to_string())?.len();
    if length > PART_MAX {
        file.seek(SeekFrom::End(-i64::try_from(PART_MAX)?)).with_context(|| path.to_string())?;
    }
    let mut bytes = Vec::new();
    file.take(PART_MAX).read_to_end(&mut bytes).with_context(|| path.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn last_lines(text: &str, number: &str) -> String {
    let number = number.parse().unwrap_or(usize::MAX);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(number)..].iter().map(|l| format!("{l}\n")).collect()
}

/// Files of secrets that the configuration names, and what each holds.
fn secrets(config: &Config) -> Vec<(String, Result<Vec<String>>)> {
    let read = |path: &Utf8Path| std::fs::read(path).with_context(|| path.to_string());
    // A key of bytes that are no text is in no text.
    let whole = |path: &Utf8Path| {
        (path.to_string(), read(path).map(|bytes| String::from_utf8(bytes).map(|t| words(&t)).unwrap_or_default()))
    };
    let mut all = Vec::new();
    if !config.proxmox.endpoints.is_empty() {
        if config.proxmox.password_file.is_none() {
            all.push(whole(&config.proxmox.token_file));
        }
        all.extend(config.proxmox.password_file.as_deref().map(whole));
    }
    all.extend(config.server.stream.tls_key_file.as_deref().map(whole));
    all.extend(config.images.bfc.key_file.as_deref().map(whole));
    if let Some(path) = &config.images.auth_file {
        let parsed = read(path).and_then(|text| {
            let value: Value = serde_json::from_slice(&text).map_err(|e| anyhow!("{path}: line {}", e.line()))?;
            Ok(credentials(&value))
        });
        all.push((path.to_string(), parsed));
    }
    all
}

/// Each line, and the whole.
fn words(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|l| !l.starts_with("-----"));
    lines.map(String::from).chain([text.trim().to_owned()]).collect()
}

/// Every string of the entries, and what is within those in base64.
fn credentials(value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo: Vec<&Value> = value.get("auths").into_iter().collect();
    while let Some(value) = todo.pop() {
        match value {
            Value::Object(fields) => todo.extend(fields.values()),
            Value::Array(items) => todo.extend(items),
            Value::String(text) => {
                found.push(text.clone());
                let decoded = base64::engine::general_purpose::STANDARD.decode(text).ok();
                if let Some(text) = decoded.and_then(|bytes| String::from_utf8(bytes).ok()) {
                    found.extend(text.split_once(':').map(|(_, password)| password.to_owned()));
                    found.push(text);
                }
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_also_within_base64() {
        // "user:hunter2"
        let auths = json!({"auths": {"r.example": {"auth": "dXNlcjpodW50ZXIy", "identitytoken": "t0ken"}}, "credsStore": "pass"});
        let mut found = credentials(&auths);
        found.sort();
        assert_eq!(found, ["dXNlcjpodW50ZXIy", "hunter2", "t0ken", "user:hunter2"]);
        assert_eq!(words("a\n b \n"), ["a", "b", "a\n b"]);
        assert_eq!(last_lines("a\nb\nc", "2"), "b\nc\n");
    }
}
