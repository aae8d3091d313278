//! The configuration out of its sources, each over the one before: `config.toml`, `conf.d/*.toml` by name, the environment
//! (`PROXMOX_LXCRI__SECTION__KEY`), flags. Tables are merged, values and lists replaced.
//!
//! Every value is looked at by itself, so that all that is wrong is said at once and with its place. Never reads below the
//! working directory: whoever starts us there would decide how pods run.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::ops::Range;

use camino::{Utf8Path, Utf8PathBuf};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::de::{DeTable, DeValue};

use super::faults::Fault;
use super::keys::{self, Node, quoted};
use super::{Config, legacy};
use crate::core::error::{Error, Result};

/// The file that is read when nothing else is said.
const FILE: &str = "/etc/proxmox-lxcri/config.toml";
/// The folder whose files are read after it.
const FOLDER: &str = "/etc/proxmox-lxcri/conf.d";
/// What names of variables begin with.
const PREFIX: &str = "PROXMOX_LXCRI__";

/// Where a value is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A line of a file, counted from 1.
    File(String, usize),
    /// A variable of the environment.
    Variable(String),
    /// A flag of the command line.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{path}:{line}"),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Flag => f.write_str("--config-set"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was written; None: nowhere, it is missing.
    pub origin: Option<Origin>,
    /// The key; "" where a file as a whole is meant.
    pub key: String,
    /// What is wrong, and what may be meant.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)
    }
}

/// All that is wrong, in the order of the sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => write!(f, "configuration: {one}"),
            more => {
                write!(f, "configuration: {} problems", more.len())?;
                more.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}

impl From<Problems> for Error {
    fn from(problems: Problems) -> Self {
        Error::invalid(problems.to_string())
    }
}

/// Where the configuration is read from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The first file.
    pub file: Utf8PathBuf,
    /// Whether it has to be there.
    pub required: bool,
    /// A folder with more (`*.toml`), which need not be there.
    pub folder: Option<Utf8PathBuf>,
    /// The environment.
    pub environment: Vec<(OsString, OsString)>,
    /// `section.key=value`, of flags.
    pub set: Vec<String>,
}

impl Sources {
    /// Those of this process: `file` in place of the node's own files, `folder` after it, `set` on top.
    pub fn of_process(file: Option<Utf8PathBuf>, folder: Option<Utf8PathBuf>, set: Vec<String>) -> Self {
        let own = file.as_ref().is_none_or(|f| f == FILE);
        Self {
            required: file.is_some(),
            file: file.unwrap_or_else(|| FILE.into()),
            folder: folder.or_else(|| own.then(|| FOLDER.into())),
            environment: std::env::vars_os().collect(),
            set,
        }
    }

    /// Reads them all.
    pub fn load(&self) -> Result<Loaded, Problems> {
        let mut loader = Loader::default();
        loader.file(&self.file, self.required);
        for file in loader.files_of(self.folder.as_deref()) {
            loader.file(&file, true);
        }
        loader.legacy_environment(&self.environment);
        loader.environment(&self.environment);
        loader.flags(&self.set);
        loader.finish()
    }
}

/// A configuration that fits.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// It.
    pub config: Config,
    /// What should be changed some time.
    pub warnings: Vec<String>,
    origins: BTreeMap<String, Origin>,
}

impl Loaded {
    /// Where the value of a key is from; of a table or list: where its parts are from.
    pub fn origins(&self, key: &str) -> Vec<Origin> {
        let of =
            |name: &str| name.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
        let mut found: Vec<Origin> = Vec::new();
        for (_, origin) in self.origins.iter().filter(|(name, _)| of(name)) {
            if !found.contains(origin) {
                found.push(origin.clone());
            }
        }
        if found.is_empty() { vec![Origin::Default] } else { found }
    }
}

impl Config {
    /// Parses and checks the text of a file that errors call `name`; asks neither the environment nor other files.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let mut loader = Loader::default();
        loader.text(text, name);
        Ok(loader.finish()?.config)
    }
}

#[derive(Default)]
struct Loader {
    /// What fits by itself, the last of each key.
    values: BTreeMap<Vec<String>, toml::Value>,
    /// Where each key was written last, also one that does not fit.
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

/// A key's full name.
fn name_of(path: &[String]) -> String {
    path.iter().map(|part| quoted(part)).collect::<Vec<_>>().join(".")
}

fn line_of(text: &str, span: Option<Range<usize>>) -> usize {
    let before = span.map_or(0, |s| s.start).min(text.len());
    1 + text.as_bytes()[..before].iter().filter(|b| **b == b'\n').count()
}

/// Only this value, as a whole file would have it.
fn alone(path: &[String], value: toml::Value) -> toml::Value {
    path.iter().rev().fold(value, |inner, part| toml::Value::Table([(part.clone(), inner)].into_iter().collect()))
}

/// What the type says to it.
fn refusal(path: &[String], value: toml::Value) -> Option<String> {
    Config::deserialize(alone(path, value)).err().map(|e| e.message().to_owned())
}

impl Loader {
    fn problem(&mut self, origin: Option<Origin>, key: impl Into<String>, what: impl Into<String>) {
        self.problems.push(Problem { origin, key: key.into(), what: what.into() });
    }

    fn file(&mut self, path: &Utf8Path, required: bool) {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                self.who_may_write(path);
                self.text(&text, path.as_str());
            }
            Err(e) if !required && e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => self.problem(None, "", format!("{path} can't be read: {e}")),
        }
    }

    /// Whoever may write it is root in effect.
    fn who_may_write(&mut self, path: &Utf8Path) {
        use std::os::unix::fs::MetadataExt;
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_file() && meta.mode() & 0o002 != 0 => {
                self.warnings.push(format!("{path} can be written by everybody: chmod o-w it"));
            }
            Ok(_) => {}
            Err(e) => self.problem(None, "", format!("{path} can't be looked at: {e}")),
        }
    }

    fn files_of(&mut self, folder: Option<&Utf8Path>) -> Vec<Utf8PathBuf> {
        let Some(folder) = folder else { return Vec::new() };
        let entries = folder.read_dir_utf8().and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        match entries {
            Ok(entries) => {
                let wanted = |p: &Utf8PathBuf| {
                    p.extension() == Some("toml") && !p.file_name().is_some_and(|n| n.starts_with('.'))
                };
                let mut files: Vec<_> =
                    entries.into_iter().map(camino::Utf8DirEntry::into_path).filter(wanted).collect();
                files.sort();
                files
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => {
                self.problem(None, "", format!("{folder} can't be read: {e}"));
                Vec::new()
            }
        }
    }

    fn text(&mut self, text: &str, name: &str) {
        let (table, errors) = DeTable::parse_recoverable(text);
        for e in &errors {
            self.problem(Some(Origin::File(name.to_owned(), line_of(text, e.span()))), "", e.message());
        }
        // Of a text that is no TOML the rest may mean anything.
        if errors.is_empty() {
            let at = |span| Origin::File(name.to_owned(), line_of(text, Some(span)));
            let Node::Table(nodes) = keys::root() else { return };
            self.table(table.get_ref(), nodes, &mut Vec::new(), &at);
        }
    }

    fn table(
        &mut self,
        table: &DeTable<'_>,
        nodes: &BTreeMap<String, Node>,
        path: &mut Vec<String>,
        at: &dyn Fn(Range<usize>) -> Origin,
    ) {
        for (key, value) in table {
            let origin = at(key.span());
            path.push(key.get_ref().to_string());
            match (nodes.get(key.get_ref().as_ref()), value.get_ref()) {
                (None, _) => self.unknown(path, nodes, origin),
                (Some(Node::Table(nodes)), DeValue::Table(inner)) => self.table(inner, nodes, path, at),
                (Some(Node::Map), DeValue::Table(inner)) => {
                    for (key, value) in inner {
                        path.push(key.get_ref().to_string());
                        self.spanned(path, value, at(key.span()), &[]);
                        path.pop();
                    }
                }
                (Some(Node::List(nodes)), DeValue::Array(list)) => self.list(list, nodes, path, at, origin),
                (Some(Node::Table(_) | Node::Map), _) => {
                    self.origins.insert(name_of(path), origin.clone());
                    self.problem(Some(origin), name_of(path), "is a table, not a value");
                }
                (Some(Node::Value { choices, .. }), _) => self.spanned(path, value, origin, choices),
                (Some(Node::List(_)), _) => self.spanned(path, value, origin, &[]),
            }
            path.pop();
        }
    }

    /// A list of tables: each is looked at by itself.
    fn list(
        &mut self,
        list: &toml::de::DeArray<'_>,
        nodes: &BTreeMap<String, Node>,
        path: &[String],
        at: &dyn Fn(Range<usize>) -> Origin,
        origin: Origin,
    ) {
        let name = name_of(path);
        // The one before is replaced, whatever it had more.
        self.origins.retain(|key, _| !key.strip_prefix(&name).is_some_and(|rest| rest.starts_with('[')));
        self.origins.insert(name.clone(), origin);
        let mut values = Vec::new();
        for (n, item) in list.iter().enumerate() {
            let (item_name, item_origin) = (format!("{name}[{n}]"), at(item.span()));
            self.origins.insert(item_name.clone(), item_origin.clone());
            let before = self.problems.len();
            if let DeValue::Table(table) = item.get_ref() {
                self.unknown_of_item(table, nodes, &item_name, at);
            }
            let Some(value) = self.value(item, &item_name, &item_origin) else { continue };
            let one = toml::Value::Array(vec![value.clone()]);
            match refusal(path, one) {
                None => values.push(value),
                Some(what) if self.problems.len() == before => self.problem(Some(item_origin), item_name, what),
                // It was said already, better.
                Some(_) => {}
            }
        }
        self.values.insert(path.to_vec(), toml::Value::Array(values));
    }

    fn unknown_of_item(
        &mut self,
        table: &DeTable<'_>,
        nodes: &BTreeMap<String, Node>,
        name: &str,
        at: &dyn Fn(Range<usize>) -> Origin,
    ) {
        for (key, value) in table {
            let full = format!("{name}.{}", quoted(key.get_ref()));
            self.origins.insert(full.clone(), at(key.span()));
            match (nodes.get(key.get_ref().as_ref()), value.get_ref()) {
                (None, _) => {
                    let near = keys::nearest(key.get_ref(), nodes.keys().map(String::as_str));
                    let near = near.map(|n| format!("{name}.{n}"));
                    self.problem(Some(at(key.span())), full, no_such_key(near));
                }
                (Some(Node::Table(nodes)), DeValue::Table(inner)) => self.unknown_of_item(inner, nodes, &full, at),
                _ => {}
            }
        }
    }

    fn unknown(&mut self, path: &[String], nodes: &BTreeMap<String, Node>, origin: Origin) {
        let (table, name) = path.split_at(path.len() - 1);
        let table = if table.is_empty() { String::new() } else { format!("{}.", name_of(table)) };
        let near = keys::meant(&table, &name[0], nodes.keys().map(String::as_str));
        self.problem(Some(origin), name_of(path), no_such_key(near));
    }

    fn value(&mut self, value: &toml::Spanned<DeValue<'_>>, name: &str, origin: &Origin) -> Option<toml::Value> {
        match toml::Value::deserialize(value.clone().into_deserializer()) {
            Ok(value) => Some(value),
            Err(e) => {
                self.problem(Some(origin.clone()), name, e.message());
                None
            }
        }
    }

    fn spanned(&mut self, path: &[String], value: &toml::Spanned<DeValue<'_>>, origin: Origin, choices: &[String]) {
        if let Some(value) = self.value(value, &name_of(path), &origin) {
            self.put(path, value, origin, choices);
        }
    }

    /// Takes a value that fits.
    fn put(&mut self, path: &[String], value: toml::Value, origin: Origin, choices: &[String]) {
        self.origins.insert(name_of(path), origin.clone());
        let near = value.as_str().and_then(|v| keys::nearest(v, choices.iter().map(String::as_str)));
        let near = near.map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
        match refusal(path, value.clone()) {
            Some(what) => self.problem(Some(origin), name_of(path), format!("{what}{near}")),
            None => {
                self.values.insert(path.to_vec(), value);
            }
        }
    }

    fn environment(&mut self, variables: &[(OsString, OsString)]) {
        let mut ours: Vec<_> = variables.iter().filter(|(n, _)| n.to_string_lossy().starts_with(PREFIX)).collect();
        ours.sort();
        for (name, value) in ours {
            let shown = name.to_string_lossy().into_owned();
            let origin = Origin::Variable(shown.clone());
            let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else {
                self.problem(Some(origin), "", "is not UTF-8");
                continue;
            };
            let parts: Vec<&str> = name[PREFIX.len()..].split("__").collect();
            match by_variable(&parts) {
                Some((path, node)) => self.written(&path, node, value, origin),
                None => {
                    let names: Vec<String> = keys::keys().iter().map(|k| variable(&k.path)).collect();
                    let near = keys::nearest(&name.to_ascii_lowercase(), names.iter().map(String::as_str));
                    self.problem(Some(origin), "", no_such_key(near.map(str::to_ascii_uppercase)));
                }
            }
        }
    }

    fn legacy_environment(&mut self, variables: &[(OsString, OsString)]) {
        for (name, value) in variables {
            let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
            let Some(level) = legacy::level_of_variable(name, value) else { continue };
            self.warnings.push(format!("{name} is the legacy program's: say PROXMOX_LXCRI__LOG__LEVEL={level}"));
            let path = ["log".to_owned(), "level".to_owned()];
            self.put(&path, toml::Value::String(level.to_owned()), Origin::Variable(name.to_owned()), &[]);
        }
    }

    fn flags(&mut self, set: &[String]) {
        for text in set {
            let Some((key, value)) = text.split_once('=') else {
                self.problem(Some(Origin::Flag), "", format!("{text:?} is not of the form section.key=value"));
                continue;
            };
            let Some(path) = split_key(key) else {
                self.problem(Some(Origin::Flag), "", format!("{key:?} is no key"));
                continue;
            };
            match by_path(&path) {
                Ok(node) => self.written(&path, node, value, Origin::Flag),
                Err(nodes) => self.unknown(&path, nodes, Origin::Flag),
            }
        }
    }

    /// A value of the environment or a flag: a text is taken as it is, anything else is TOML.
    fn written(&mut self, path: &[String], node: &Node, text: &str, origin: Origin) {
        let as_text = || toml::Value::String(text.to_owned());
        let value = match node {
            Node::Value { text: true, list, .. } if !(*list && text.trim_start().starts_with('[')) => Some(as_text()),
            _ => one_value(text),
        };
        let (value, choices) = match (value, node) {
            (Some(toml::Value::Table(entries)), Node::Map) => {
                for (key, value) in entries {
                    let path: Vec<String> = path.iter().cloned().chain([key]).collect();
                    self.put(&path, value, origin.clone(), &[]);
                }
                return;
            }
            (Some(value), Node::Value { choices, .. }) => (value, choices.as_slice()),
            (Some(value), Node::List(_)) => (value, [].as_slice()),
            (Some(_), Node::Table(_) | Node::Map) => {
                return self.problem(Some(origin), name_of(path), "is a table, not a value");
            }
            (None, _) => {
                let like = match node {
                    Node::Value { list: true, .. } => "a list is written as [\"a\", \"b\"]",
                    Node::Map => "a table is written as { a = \"b\" }",
                    _ => "a number, or true or false",
                };
                return self.problem(Some(origin), name_of(path), format!("{text:?} is not TOML: {like}"));
            }
        };
        self.put(path, value, origin, choices);
    }

    /// Where a key, or what it is a part of, was written.
    fn origin_of(&self, key: &str) -> Option<Origin> {
        let mut key = key;
        loop {
            if let Some(origin) = self.origins.get(key) {
                return Some(origin.clone());
            }
            // A table is written in many places: it has no origin, so that this ends at a list's item.
            key = &key[..key.rfind(['.', '['])?];
        }
    }

    fn finish(mut self) -> Result<Loaded, Problems> {
        let mut table = toml::Table::new();
        for (path, value) in std::mem::take(&mut self.values) {
            insert(&mut table, &path, value);
        }
        let config = match Config::deserialize(table) {
            Ok(config) => config,
            // Each value was taken by itself: this can't be, but must not be silent.
            Err(e) => {
                self.problem(None, "", e.message());
                return Err(Problems(self.problems));
            }
        };
        for Fault { key, other, why } in config.faults() {
            // What was refused by itself is the default here, and no news.
            let known = |k: &str| self.problems.iter().any(|p| p.key == k);
            if known(&key) || other.as_deref().is_some_and(known) {
                continue;
            }
            let origin = self.origin_of(&key).or_else(|| self.origin_of(other.as_deref()?));
            self.problem(origin, key, why);
        }
        if !self.problems.is_empty() {
            return Err(Problems(self.problems));
        }
        Ok(Loaded { config, warnings: self.warnings, origins: self.origins })
    }
}

fn no_such_key(near: Option<String>) -> String {
    let near = near.map(|n| format!("; did you mean {n}?")).unwrap_or_default();
    format!("there is no such key{near}")
}

fn insert(table: &mut toml::Table, path: &[String], value: toml::Value) {
    match path {
        [] => {}
        [key] => {
            table.insert(key.clone(), value);
        }
        [key, rest @ ..] => {
            let inner = table.entry(key.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let toml::Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

/// A value by itself; None: it is no TOML, or more than one value.
fn one_value(text: &str) -> Option<toml::Value> {
    let text = format!("v = {text}");
    let mut table: toml::Table = text.parse().ok()?;
    (table.len() == 1).then(|| table.remove("v"))?
}

/// A key's parts, which TOML has in quotes where they are not plain.
fn split_key(key: &str) -> Option<Vec<String>> {
    let table: toml::Table = format!("{key} = 0").parse().ok()?;
    let (mut path, mut table) = (Vec::new(), &table);
    loop {
        let (name, value) = table.iter().next().filter(|_| table.len() == 1)?;
        path.push(name.clone());
        match value {
            toml::Value::Table(inner) => table = inner,
            _ => return Some(path),
        }
    }
}

/// The node at a path; or the keys that there are where it leaves what is known.
fn by_path(path: &[String]) -> Result<&'static Node, &'static BTreeMap<String, Node>> {
    static ANY: Node = Node::Value { text: true, list: false, choices: Vec::new() };
    static NONE: BTreeMap<String, Node> = BTreeMap::new();
    let mut node = keys::root();
    for part in path {
        node = match node {
            Node::Table(nodes) => nodes.get(part).ok_or(nodes)?,
            Node::Map => &ANY,
            Node::List(_) | Node::Value { .. } => return Err(&NONE),
        };
    }
    Ok(node)
}

/// A part of a variable's name: `PROXMOX_LXC` for `proxmox-lxc`.
fn variable_part(key: &str) -> String {
    key.to_ascii_lowercase().replace('-', "_")
}

/// The whole name in lower case.
fn variable(path: &str) -> String {
    let parts: Vec<String> = path.split('.').map(variable_part).collect();
    format!("{}{}", PREFIX.to_ascii_lowercase(), parts.join("__"))
}

fn by_variable(parts: &[&str]) -> Option<(Vec<String>, &'static Node)> {
    let (mut node, mut path) = (keys::root(), Vec::new());
    for part in parts {
        let Node::Table(nodes) = node else { return None };
        let (name, inner) = nodes.iter().find(|(name, _)| variable_part(name) == part.to_ascii_lowercase())?;
        path.push(name.clone());
        node = inner;
    }
    Some((path, node))
}
