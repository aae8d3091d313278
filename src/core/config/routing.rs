//! `[[routing]]`: which handler a pod gets that names none, by what is known of it when it is made.
//!
//! Patterns are regular expressions that have to fit the whole text; they are compiled once, at the start. The first rule
//! that fits decides. Asked by the engine; patterns that make no sense are refused with the rest of the configuration.

use std::collections::BTreeMap;

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::faults::Fault;
use crate::core::error::Result;

/// A rule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Route {
    /// What a pod has to be like, all of it. Values are regular expressions that fit the whole text.
    #[serde(rename = "match")]
    pub when: Condition,
    /// The handler that it gets then.
    pub handler: String,
}

/// What a pod has to be like.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Condition {
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its labels: each of these is there, with a value that fits.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its annotations, likewise.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Condition {
    /// Keys below `match` with their patterns.
    fn patterns(&self) -> Vec<(String, &str)> {
        let mut all = Vec::new();
        for (key, pattern) in [("namespace", &self.namespace), ("name", &self.name)] {
            all.extend(pattern.as_deref().map(|p| (key.to_owned(), p)));
        }
        for (key, map) in [("labels", &self.labels), ("annotations", &self.annotations)] {
            all.extend(map.iter().map(|(k, p)| (format!("{key}.{}", super::keys::quoted(k)), p.as_str())));
        }
        all
    }
}

/// What decides.
#[derive(Debug, Clone, Default)]
pub struct Router(Vec<Compiled>);

#[derive(Debug, Clone)]
struct Compiled {
    namespace: Option<Regex>,
    name: Option<Regex>,
    labels: Vec<(String, Regex)>,
    annotations: Vec<(String, Regex)>,
    handler: String,
}

/// The whole text has to fit. By itself, too, so that a stray parenthesis is not closed by ours.
fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(pattern)?;
    Regex::new(&format!("^(?:{pattern})$"))
}

impl Router {
    /// Compiles the rules of a configuration that was checked.
    pub fn new(routes: &[Route]) -> Result<Self> {
        if let Some(fault) = Self::faults(routes).into_iter().next() {
            return Err(fault.into());
        }
        let one = |p: &Option<String>| p.as_deref().and_then(|p| whole(p).ok());
        let many = |map: &BTreeMap<String, String>| {
            map.iter().filter_map(|(k, v)| Some((k.clone(), whole(v).ok()?))).collect()
        };
        let compiled = routes.iter().map(|route| Compiled {
            namespace: one(&route.when.namespace),
            name: one(&route.when.name),
            labels: many(&route.when.labels),
            annotations: many(&route.when.annotations),
            handler: route.handler.clone(),
        });
        Ok(Self(compiled.collect()))
    }

    pub(super) fn faults(routes: &[Route]) -> Vec<Fault> {
        let mut faults = Vec::new();
        for (n, route) in routes.iter().enumerate() {
            let patterns = route.when.patterns();
            if patterns.is_empty() {
                let why = "fits every pod: runtime.default_handler is the key for that";
                faults.push(Fault::new(format!("routing[{n}].match"), why));
            }
            for (key, pattern) in patterns {
                if let Err(e) = whole(pattern) {
                    // Over several lines, with a mark below the place: the last says what it is.
                    let text = e.to_string();
                    let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
                    let why = format!("{pattern:?} is no regular expression: {why}");
                    faults.push(Fault::new(format!("routing[{n}].match.{key}"), why));
                }
            }
        }
        faults
    }

    /// The handler of the first rule that fits; None: no rule does.
    pub fn handler(
        &self,
        (namespace, name): (&str, &str),
        labels: &BTreeMap<String, String>,
        annotations: &BTreeMap<String, String>,
    ) -> Option<&str> {
        let one = |pattern: &Option<Regex>, text: &str| pattern.as_ref().is_none_or(|p| p.is_match(text));
        let many = |patterns: &[(String, Regex)], map: &BTreeMap<String, String>| {
            patterns.iter().all(|(key, pattern)| map.get(key).is_some_and(|text| pattern.is_match(text)))
        };
        let fits = |rule: &&Compiled| {
            one(&rule.namespace, namespace)
                && one(&rule.name, name)
                && many(&rule.labels, labels)
                && many(&rule.annotations, annotations)
        };
        self.0.iter().find(fits).map(|rule| rule.handler.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let text = r#"
            [[routing]]
            match = { namespace = "kube-system", name = "(kube-ovn|cilium)-.*" }
            handler = "crun"
            [[routing]]
            handler = "lxc"
            [routing.match]
            labels = { "example.com/init" = "yes|true" }
            [[routing]]
            match = { annotations = { a = ".*" }, namespace = "x" }
            handler = "crun"
        "#;
        let config = Config::parse(text, "c.toml").expect("rules");
        let router = Router::new(&config.routing).expect("rules");
        let none = BTreeMap::new();
        let init = map(&[("example.com/init", "yes")]);
        assert_eq!(router.handler(("kube-system", "cilium-x"), &init, &none), Some("crun"));
        assert_eq!(router.handler(("kube-system", "my-cilium-x"), &none, &none), None, "the whole name has to fit");
        assert_eq!(router.handler(("default", "x"), &init, &none), Some("lxc"));
        assert_eq!(router.handler(("default", "x"), &map(&[("example.com/init", "yes!")]), &none), None);
        assert_eq!(router.handler(("x", "x"), &none, &map(&[("a", "")])), Some("crun"));
        assert_eq!(router.handler(("x", "x"), &none, &none), None, "an annotation that is not there");
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        for (rule, what) in [
            ("handler = \"crun\"", "c.toml:2: routing[0].match: fits every pod"),
            ("match = { name = \"(\" }\nhandler = \"crun\"", "routing[0].match.name"),
            ("match = { name = \"a)|(b\" }\nhandler = \"crun\"", "routing[0].match.name"),
            ("match = { labels = { \"a.b/c\" = \"[\" } }\nhandler = \"crun\"", "routing[0].match.labels.\"a.b/c\""),
            ("match = { name = \"a\" }\nhandler = \"runc\"", "routing[0].handler: \"runc\" is not a handler"),
            ("match = { name = \"a\" }", "routing[0].handler"),
            (
                "match = { nam = \"a\" }\nhandler = \"crun\"",
                "c.toml:3: routing[0].match.nam: there is no such key; did you mean routing[0].match.name?",
            ),
            ("match = { name = 1 }\nhandler = \"crun\"", "routing[0]"),
        ] {
            let e = Config::parse(&format!("\n[[routing]]\n{rule}\n"), "c.toml").expect_err(rule).chain();
            assert!(e.contains(what), "{rule}: {e}");
        }
    }
}
