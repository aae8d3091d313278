//! The real API's schema, where it is at hand: every request of our client is held against it.
//!
//! It is not part of the repository. `LXCRI_PVE_API` names it, else `../shared/pve-api.json` is looked for; without it a test
//! that asks says so.

use std::path::PathBuf;

use serde_json::Value;

use super::state::Params;

/// The schema as data.
pub struct Schema(Value);

impl Schema {
    pub fn load() -> Option<Self> {
        let named = std::env::var_os("LXCRI_PVE_API").map(PathBuf::from);
        let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/pve-api.json"));
        let text = std::fs::read_to_string(named.unwrap_or(beside)).ok()?;
        let mut schema: Value = serde_json::from_str(&text).expect("the schema is JSON");
        Some(Self(schema["paths"].take()))
    }

    /// What in a request is not as it says.
    pub fn check(&self, method: &str, parts: &[String], params: &Params) -> Vec<String> {
        let call = format!("{method} /{}", parts.join("/"));
        let paths = self.0.as_object().expect("paths");
        let fits = |template: &str| {
            let words: Vec<_> = template.split('/').skip(1).collect();
            words.len() == parts.len() && words.iter().zip(parts).all(|(w, p)| w.starts_with('{') || w == p)
        };
        // A literal path is nearer than one with names to fill in.
        let found = paths.iter().filter(|(t, _)| fits(t)).min_by_key(|(t, _)| t.matches('{').count());
        let Some((template, methods)) = found else { return vec![format!("{call}: no such path")] };
        let Some(spec) = methods.get(method) else { return vec![format!("{call}: no such method")] };
        let mut faults = Vec::new();
        let none = serde_json::Map::new();
        let known = spec["parameters"]["properties"].as_object().unwrap_or(&none);
        for (name, value) in params {
            let generic = format!("{}[n]", name.trim_end_matches(|c: char| c.is_ascii_digit()));
            match known.get(name).or_else(|| known.get(&generic)) {
                None => faults.push(format!("{call}: {name} is not known")),
                Some(kind) => {
                    faults.extend(value_faults(kind, value).into_iter().map(|f| format!("{call}: {name}: {f}")))
                }
            }
        }
        for (name, kind) in known {
            let given = params.contains_key(name) || template.contains(&format!("{{{name}}}"));
            if kind["optional"] != 1 && !given && !name.ends_with("[n]") && !filled(method, template, name) {
                faults.push(format!("{call}: {name} is missing"));
            }
        }
        faults
    }
}

/// The file of an upload is a parameter that the server fills in.
fn filled(method: &str, template: &str, name: &str) -> bool {
    method == "POST" && template.ends_with("/upload") && name == "filename"
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

fn value_faults(kind: &Value, value: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let parsed = match kind["type"].as_str().unwrap_or("string") {
        "integer" => value.parse::<i64>().ok().map(|n| n as f64),
        "number" => value.parse::<f64>().ok(),
        "boolean" => ["0", "1"].contains(&value).then_some(0.0),
        _ => Some(value.chars().count() as f64),
    };
    let Some(n) = parsed else { return vec![format!("{value:?} is no {}", kind["type"])] };
    let (low, high) = if kind["type"] == "string" { ("minLength", "maxLength") } else { ("minimum", "maximum") };
    if number(&kind[low]).is_some_and(|min| n < min) || number(&kind[high]).is_some_and(|max| n > max) {
        faults.push(format!("{value:?} is out of range"));
    }
    if let Some(list) = kind["enum"].as_array()
        && !list.iter().any(|v| v.as_str() == Some(value))
    {
        faults.push(format!("{value:?} is not one of {list:?}"));
    }
    if let Some(keys) = kind["format"].as_object() {
        for part in value.split(',').filter(|p| !p.is_empty()) {
            match part.split_once('=') {
                None if keys.values().any(|k| k["default_key"] == 1) => {}
                None => faults.push(format!("{part:?} has no key")),
                Some((key, value)) => match keys.get(key) {
                    None => faults.push(format!("{key} is not known")),
                    Some(kind) => faults.extend(value_faults(kind, value)),
                },
            }
        }
    }
    faults
}
