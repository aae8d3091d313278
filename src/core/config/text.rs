//! The configuration as text: the commented default file, what counts with where it is from, the reference, what two differ in.
//!
//! Made of [`super::keys`], so that no key can be missing in any of them. No key holds a secret: those are in files of their own,
//! whose paths alone are here.

use std::fmt::Write as _;

use serde::Serialize;

use super::keys::{self, Key, table_of};
use super::{Config, Loaded, Origin};

/// A key with what counts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Full name.
    pub key: String,
    /// Its value; None: not set.
    pub value: Option<toml::Value>,
    /// Where it is from, the last word of each part.
    pub origin: String,
}

fn value_of<'a>(tree: &'a toml::Value, key: &str) -> Option<&'a toml::Value> {
    key.split('.').try_fold(tree, |value, part| value.get(part))
}

fn tree(config: &Config) -> toml::Value {
    toml::Value::try_from(config).unwrap_or_else(|_| toml::Value::Table(toml::Table::new()))
}

/// Keys that have values: not those within a list of tables.
fn own_keys() -> impl Iterator<Item = &'static Key> {
    keys::keys().iter().filter(|k| !k.path.contains("[]"))
}

/// The name within its table.
fn name(key: &Key) -> &str {
    key.path.rsplit('.').next().unwrap_or(&key.path)
}

fn wrapped(text: &str) -> String {
    let mut lines = vec![String::from("#")];
    for word in text.split(' ') {
        if lines.last().is_some_and(|l| l.len() + word.len() > 100) {
            lines.push("#".into());
        }
        if let Some(line) = lines.last_mut() {
            let _ = write!(line, " {word}");
        }
    }
    lines.join("\n")
}

/// Every key with its default, as a file with comments.
pub fn default_text() -> String {
    let mut out = String::from(
        "# proxmox-lxcri: every key with its default. A file needs those alone that differ.\n\
         # Files in conf.d/ (*.toml, by name) come after this one, then PROXMOX_LXCRI__SECTION__KEY, then --config-set.\n",
    );
    let mut table = "";
    for key in own_keys() {
        if table_of(&key.path) != table {
            table = table_of(&key.path);
            let about = keys::tables().iter().find(|(t, _)| t == table).map_or("", |(_, about)| about);
            let _ = write!(out, "\n{}\n[{table}]\n", wrapped(about));
        }
        let _ = write!(out, "\n{}\n", wrapped(&key.about));
        let _ = match &key.default {
            Some(value) => writeln!(out, "{} = {value}", name(key)),
            None => writeln!(out, "#{} =", name(key)),
        };
    }
    out
}

/// What counts, key by key.
pub fn dump(loaded: &Loaded) -> Vec<Entry> {
    let tree = tree(&loaded.config);
    let origin = |key: &str| loaded.origins(key).iter().map(Origin::to_string).collect::<Vec<_>>().join(", ");
    own_keys()
        .map(|k| Entry { key: k.path.clone(), value: value_of(&tree, &k.path).cloned(), origin: origin(&k.path) })
        .collect()
}

impl Entry {
    /// The whole as a file that is read to the same, with the origins as comments.
    pub fn file(entries: &[Self]) -> String {
        let (mut out, mut table) = (String::new(), "");
        for entry in entries {
            if table_of(&entry.key) != table {
                table = table_of(&entry.key);
                let _ = write!(out, "\n[{table}]\n");
            }
            let name = entry.key.rsplit('.').next().unwrap_or_default();
            let _ = match &entry.value {
                Some(value) => writeln!(out, "{name} = {value}  # {}", entry.origin),
                None => writeln!(out, "#{name} =  # not set"),
            };
        }
        out
    }
}

/// Keys whose values are not the same.
pub fn differences(one: &Config, other: &Config) -> Vec<&'static str> {
    let (one, other) = (tree(one), tree(other));
    own_keys().map(|k| k.path.as_str()).filter(|k| value_of(&one, k) != value_of(&other, k)).collect()
}

/// The reference: `docs/configuration.md`.
pub fn reference() -> String {
    let mut out = String::from(INTRODUCTION);
    let mut table = None;
    for key in keys::keys() {
        if table != Some(table_of(&key.path)) {
            table = Some(table_of(&key.path));
            let path = table_of(&key.path);
            let title = match (path, path.strip_suffix("[]")) {
                ("", _) => "At the top".to_owned(),
                (_, Some(list)) => format!("`[[{list}]]`"),
                (path, None) => format!("`[{}]`", path.replace("[]", "")),
            };
            let about = keys::tables().iter().find(|(t, _)| t == path).map_or("", |(_, about)| about);
            let about = if path.is_empty() { "" } else { about };
            let _ = write!(out, "\n## {title}\n\n");
            if !about.is_empty() {
                let _ = write!(out, "{about}\n\n");
            }
            out.push_str("| key | value | default | meaning |\n|---|---|---|---|\n");
        }
        let default = key.default.as_ref().map_or("not set".to_owned(), |v| format!("`{v}`"));
        let default = if key.path.contains("[]") { String::new() } else { default };
        let row = [format!("`{}`", name(key)), key.kind.clone(), default, key.about.clone()];
        let _ = writeln!(out, "| {} |", row.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    out
}

const INTRODUCTION: &str = "\
# Configuration

This file is made by `proxmox-lxcri config reference`; a test holds it to be what the program takes.

Everything has a default, so that a node may have no file at all. What is read, each over the one before:

1. `/etc/proxmox-lxcri/config.toml`, or the file that `--config` names, which has to be there then;
2. `/etc/proxmox-lxcri/conf.d/*.toml` by name, or those of `--config-dir`. With `--config` alone no folder is read;
3. variables `PROXMOX_LXCRI__SECTION__KEY`: `PROXMOX_LXCRI__LOG__LEVEL=debug`, `PROXMOX_LXCRI__HANDLERS__PROXMOX_LXC__ENABLED=true`;
4. `--config-set section.key=value`, as often as wanted.

Tables are merged, values and lists replaced. In variables and flags a text stands without quotes; lists and tables are TOML:
`--config-set 'runtime.cdi_spec_dirs=[\"/etc/cdi\"]'`. Nothing is ever read from the working directory.

What does not fit is refused before anything starts, all of it at once, by file, line and key:

    configuration: 2 problems
      /etc/proxmox-lxcri/config.toml:3: server.listn: there is no such key; did you mean server.listen?
      /etc/proxmox-lxcri/conf.d/10-zfs.toml:2: images.zfs.dataset: the zfs driver needs one, such as \"rpool/lxcri\"

| command | for |
|---|---|
| `proxmox-lxcri config default` | a file with every key, its meaning and its default |
| `proxmox-lxcri config check` | whether what is there is taken; status 1 if not |
| `proxmox-lxcri config dump` | what counts, and where each value is from |
| `proxmox-lxcri config schema` | the JSON schema of the file, for editors |
| `proxmox-lxcri config migrate OLD.json` | a file out of the legacy program's, see [migration.md](migration.md) |

Secrets are never in these files: keys that end with `_file` name files that hold them, which their owner alone may read.

`systemctl reload proxmox-lxcri` (SIGHUP) reads it all again. `log.level` changes at once; the log names every other key that is
different, which counts from the next restart (no pod notices one). What does not fit changes nothing and is said in the log.

Times without a unit are in seconds, spans of time are numbers with units (`4h`, `1h30m`, `500ms`), sizes are in bytes where nothing else
is said.
";
