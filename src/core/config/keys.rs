//! What keys there are, by the types themselves: their JSON schema, read once. Everything that lists keys goes by it: the loader,
//! the reference, `config default` and `config dump`.
//!
//! Nothing here fails on what an operator writes.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::Config;

/// How alike two words are (0 to 1) before one is offered for the other.
const ALIKE: f64 = 0.6;

/// A key.
#[derive(Debug, Clone)]
pub struct Key {
    /// Full name: `server.listen`.
    pub path: String,
    /// What it is for.
    pub about: String,
    /// What may be written: "string", "one of ...".
    pub kind: String,
    /// What it is if nobody says; None: not set.
    pub default: Option<toml::Value>,
}

/// The JSON schema of the file.
pub fn schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Config>().to_value();
    if let Some(root) = schema.as_object_mut() {
        root.insert("title".into(), "proxmox-lxcri's configuration".into());
    }
    schema
}

/// A table, a key, or something that holds keys of the operator's.
#[derive(Debug)]
pub(super) enum Node {
    /// A table with these.
    Table(BTreeMap<String, Node>),
    /// A table with whatever keys.
    Map,
    /// A list of tables with these.
    List(BTreeMap<String, Node>),
    /// A value.
    Value {
        /// A text is taken as it is, without quotes.
        text: bool,
        /// Whether a list may be written.
        list: bool,
        /// All that it may be.
        choices: Vec<String>,
    },
}

struct All {
    root: Node,
    keys: Vec<Key>,
    tables: Vec<(String, String)>,
}

static ALL: LazyLock<All> = LazyLock::new(|| {
    let schema = schema();
    let defaults = toml::Value::try_from(Config::default()).unwrap_or(toml::Value::Boolean(false));
    let mut all = All { root: node(&schema), keys: Vec::new(), tables: Vec::new() };
    collect(&schema, "", Some(&defaults), &mut all);
    // A table's own keys come before the tables below it.
    all.keys.sort_by(|a, b| (table_of(&a.path), &a.path).cmp(&(table_of(&b.path), &b.path)));
    all
});

/// All keys, by table.
pub fn keys() -> &'static [Key] {
    &ALL.keys
}

/// Tables and what they are for.
pub(super) fn tables() -> &'static [(String, String)] {
    &ALL.tables
}

pub(super) fn root() -> &'static Node {
    &ALL.root
}

/// The table that a key stands in.
pub(super) fn table_of(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(table, _)| table)
}

fn properties(schema: &Value) -> Option<&serde_json::Map<String, Value>> {
    schema.get("properties")?.as_object()
}

fn item_properties(schema: &Value) -> Option<&serde_json::Map<String, Value>> {
    properties(schema.get("items")?)
}

fn is_map(schema: &Value) -> bool {
    properties(schema).is_none() && schema.get("additionalProperties").is_some_and(Value::is_object)
}

fn node(schema: &Value) -> Node {
    let nodes = |map: &serde_json::Map<String, Value>| map.iter().map(|(k, v)| (k.clone(), node(v))).collect();
    if let Some(map) = properties(schema) {
        Node::Table(nodes(map))
    } else if let Some(map) = item_properties(schema) {
        Node::List(nodes(map))
    } else if is_map(schema) {
        Node::Map
    } else {
        let types = types(schema);
        Node::Value { text: types.contains(&"string"), list: types.contains(&"array"), choices: choices(schema) }
    }
}

/// Names of JSON types that a value may have; null is none of them.
fn types(schema: &Value) -> Vec<&str> {
    let mut found: Vec<&str> = match schema.get("type") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(more)) => more.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    for part in ["anyOf", "oneOf"] {
        found.extend(schema.get(part).and_then(Value::as_array).into_iter().flatten().flat_map(types));
    }
    found.retain(|t| *t != "null");
    found
}

fn choices(schema: &Value) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let text = |v: &Value| v.as_str().map(str::to_owned);
    found.extend(schema.get("const").and_then(text));
    found.extend(schema.get("enum").and_then(Value::as_array).into_iter().flatten().filter_map(text));
    for part in ["anyOf", "oneOf"] {
        found.extend(schema.get(part).and_then(Value::as_array).into_iter().flatten().flat_map(choices));
    }
    found
}

fn kind(schema: &Value) -> String {
    let choices = choices(schema);
    if !choices.is_empty() {
        return choices.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join(", ");
    }
    if is_map(schema) {
        return "table of strings".into();
    }
    if item_properties(schema).is_some() {
        return "list of tables".into();
    }
    match types(schema).as_slice() {
        ["string"] if schema.get("pattern").is_some() => "span of time".into(),
        ["string"] if schema.get("format").is_some() => "IP address".into(),
        ["integer" | "number"] => "number".into(),
        ["boolean"] => "true or false".into(),
        ["array"] => "list of strings".into(),
        more => more
            .iter()
            .map(|t| if *t == "array" { "list of strings" } else { t })
            .rev()
            .collect::<Vec<_>>()
            .join(" or "),
    }
}

/// A doc comment's lines as one.
fn about(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn collect(schema: &Value, path: &str, default: Option<&toml::Value>, all: &mut All) {
    let (map, is_list) = match (properties(schema), item_properties(schema)) {
        (Some(map), _) => (map, false),
        (None, Some(map)) => (map, true),
        (None, None) => return,
    };
    if !is_list {
        all.tables.push((path.to_owned(), about(schema)));
    }
    for (name, child) in map {
        let path = match (path.is_empty(), is_list) {
            (true, _) => name.clone(),
            (false, false) => format!("{path}.{name}"),
            (false, true) => format!("{path}[].{name}"),
        };
        let default = default.and_then(|d| d.get(name));
        if properties(child).is_none() {
            all.keys.push(Key {
                path: path.clone(),
                about: about(child),
                kind: kind(child),
                default: default.cloned(),
            });
        }
        collect(child, &path, default, all);
    }
}

/// A part of a key as TOML has it.
pub(super) fn quoted(part: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let fits = !part.is_empty() && part.chars().all(bare);
    if fits { part.to_owned() } else { format!("{part:?}") }
}

/// The word that is most like `word`, if any is.
pub(super) fn nearest<'a>(word: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let alike = |w: &str| strsim::normalized_damerau_levenshtein(&word.to_ascii_lowercase(), w);
    let best = words.map(|w| (alike(w), w)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

/// The key that was meant by `name` in `table` (with a dot at its end, or ""), whose keys are `siblings`: one of them, one of that name
/// elsewhere, or one that is alike as a whole.
pub(super) fn meant<'a>(table: &str, name: &str, siblings: impl Iterator<Item = &'a str>) -> Option<String> {
    if let Some(near) = nearest(name, siblings) {
        return Some(format!("{table}{near}"));
    }
    let paths = || keys().iter().map(|k| k.path.as_str()).filter(|p| !p.contains("[]"));
    let mut same = paths().filter(|p| p.rsplit('.').next() == Some(name));
    if let (Some(only), None) = (same.next(), same.next()) {
        return Some(only.to_owned());
    }
    nearest(&format!("{table}{name}"), paths()).map(str::to_owned)
}
