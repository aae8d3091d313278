//! A network configuration made from a template and the node's pod networks, for networks that bring no file of their own.
//!
//! Called by [`super::Cni`] when the kubelet tells the pod networks. The template's language is the part of Go's that
//! containerd's templates use, so that those can be taken as they are: `{{.PodCIDR}}`, `{{range $i, $r := .PodCIDRRanges}}`
//! and `.Routes`, `{{if $i}}`, `{{$r}}`, `{{end}}`, and `-` to trim. Anything else is refused by name. Nothing is written
//! when the folder has a configuration of somebody else, or when what was made is not one; the file appears whole.

use std::io;

use camino::Utf8Path;

use super::conf::{Fingerprint, NetworkConf};
use crate::core::error::{Error, Kind, Result};
use crate::utils::atomic::{self, Durability};

/// Our file in the folder of configurations.
const FILE: &str = "10-proxmox-lxcri.conflist";
/// Largest template in bytes.
const TEMPLATE_MAX: u64 = 1 << 20;
/// Blocks within blocks.
const DEPTH_MAX: usize = 16;

/// Writes the configuration, if the folder has none but ours. False: another one is there.
pub(super) fn write(template: &Utf8Path, folder: &Utf8Path, cidrs: &[String]) -> Result<bool> {
    let ours = folder.join(FILE);
    let found = Fingerprint::take(std::slice::from_ref(&folder.to_owned()))
        .map_err(|e| Error::io(format!("list {folder}"), e))?;
    if found.files().iter().any(|(path, ..)| *path != ours) {
        return Ok(false);
    }
    let named = |e: io::Error| Error::io(format!("the network's template {template}"), e);
    if std::fs::metadata(template).map_err(named)?.len() > TEMPLATE_MAX {
        return Err(Error::precondition(format!(
            "the network's template {template} is larger than {TEMPLATE_MAX} bytes"
        )));
    }
    let text = std::fs::read_to_string(template).map_err(named)?;
    let refused =
        |why: String| Error::new(Kind::FailedPrecondition, format!("the network's template {template}: {why}"));
    let made = render(&text, cidrs).map_err(refused)?;
    NetworkConf::parse(made.as_bytes(), true, ours.as_str())
        .map_err(|why| refused(format!("with the pod networks it is no network list: {why}")))?;
    if std::fs::read(&ours).is_ok_and(|there| there == made.as_bytes()) {
        return Ok(true);
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io(format!("make folder {folder}"), e))?;
    atomic::write(ours.as_std_path(), made.as_bytes(), 0o644, Durability::Machine)
        .map_err(|e| Error::io(format!("write {ours}"), e))?;
    tracing::info!(file = %ours, pod_networks = cidrs.join(","), "network configuration written");
    Ok(true)
}

/// A piece of a template.
#[derive(Debug, PartialEq)]
enum Piece<'a> {
    Text(&'a str),
    Action(&'a str),
}

fn pieces(mut text: &str) -> Result<Vec<Piece<'_>>, String> {
    let mut all = Vec::new();
    while let Some(begin) = text.find("{{") {
        let (before, rest) = text.split_at(begin);
        let end = rest.find("}}").ok_or("{{ without }}")?;
        let (inner, after) = (&rest[2..end], &rest[end + 2..]);
        let trim_left = inner.starts_with("- ");
        let trim_right = inner.ends_with(" -");
        all.push(Piece::Text(if trim_left { before.trim_end() } else { before }));
        let inner = if trim_left { &inner[1..] } else { inner };
        let inner = if trim_right { &inner[..inner.len() - 1] } else { inner };
        all.push(Piece::Action(inner.trim()));
        text = if trim_right { after.trim_start() } else { after };
    }
    all.push(Piece::Text(text));
    Ok(all)
}

/// Names that ranges give to numbers and values.
#[derive(Clone, Default)]
struct Scope<'a> {
    numbers: Vec<(&'a str, usize)>,
    values: Vec<(&'a str, &'a str)>,
}

struct Values<'a> {
    cidrs: &'a [String],
    routes: Vec<&'static str>,
}

impl Values<'_> {
    fn list(&self, name: &str) -> Option<Vec<&str>> {
        match name {
            ".PodCIDRRanges" => Some(self.cidrs.iter().map(String::as_str).collect()),
            ".Routes" => Some(self.routes.clone()),
            _ => None,
        }
    }
}

/// The template with the pod networks in it.
fn render(template: &str, cidrs: &[String]) -> Result<String, String> {
    let mut routes = Vec::new();
    for route in cidrs.iter().map(|c| if c.contains(':') { "::/0" } else { "0.0.0.0/0" }) {
        if !routes.contains(&route) {
            routes.push(route);
        }
    }
    let pieces = pieces(template)?;
    let mut out = String::with_capacity(template.len());
    let rest = block(&pieces, &Values { cidrs, routes }, &Scope::default(), 0, true, &mut out)?;
    if rest != pieces.len() { Err("{{end}} without a beginning".into()) } else { Ok(out) }
}

/// Runs to the block's `end` (or the template's); how many pieces that were. `on`: whether it says anything.
fn block(
    pieces: &[Piece<'_>],
    values: &Values<'_>,
    scope: &Scope<'_>,
    depth: usize,
    on: bool,
    out: &mut String,
) -> Result<usize, String> {
    if depth > DEPTH_MAX {
        return Err(format!("more than {DEPTH_MAX} blocks in one another"));
    }
    let mut i = 0;
    while let Some(piece) = pieces.get(i) {
        i += 1;
        let action = match piece {
            Piece::Text(text) => {
                if on {
                    out.push_str(text);
                }
                continue;
            }
            Piece::Action(action) => *action,
        };
        let unknown = || format!("{{{{{action}}}}} is not understood");
        let words: Vec<&str> = action.split([' ', '\t', '\n', ',']).filter(|w| !w.is_empty()).collect();
        match words.as_slice() {
            ["end"] => return if depth == 0 { Err("{{end}} without a beginning".into()) } else { Ok(i) },
            [".PodCIDR"] => {
                if on {
                    out.push_str(values.cidrs.first().map(String::as_str).unwrap_or_default());
                }
            }
            ["if", name] => {
                let number = scope.numbers.iter().rev().find(|(n, _)| n == name).map(|(_, n)| *n);
                let is = number.map(|n| n != 0).or_else(|| values.list(name).map(|l| !l.is_empty()));
                let is =
                    is.or_else(|| (*name == ".PodCIDR").then_some(!values.cidrs.is_empty())).ok_or_else(unknown)?;
                i += block(&pieces[i..], values, scope, depth + 1, on && is, out)?;
            }
            ["range", names @ .., list] => {
                let list = values.list(list).ok_or_else(unknown)?;
                let (number, value) = match names {
                    [] => (None, "."),
                    [value, ":="] => (None, *value),
                    [number, value, ":="] => (Some(*number), *value),
                    _ => return Err(unknown()),
                };
                if [number, Some(value)].into_iter().flatten().any(|n| n != "." && !n.starts_with('$')) {
                    return Err(unknown());
                }
                // An empty list's block is still read, to find its end.
                let mut taken = None;
                for (n, item) in list.iter().enumerate() {
                    let mut inner = scope.clone();
                    inner.numbers.extend(number.map(|name| (name, n)));
                    inner.values.push((value, item));
                    taken = Some(block(&pieces[i..], values, &inner, depth + 1, on, out)?);
                }
                i += match taken {
                    Some(taken) => taken,
                    None => {
                        let mut inner = scope.clone();
                        inner.numbers.extend(number.map(|name| (name, 0)));
                        inner.values.push((value, ""));
                        block(&pieces[i..], values, &inner, depth + 1, false, out)?
                    }
                };
            }
            [name] if *name == "." || name.starts_with('$') => {
                let value = scope.values.iter().rev().find(|(n, _)| n == name).map(|(_, v)| (*v).to_owned());
                let number = || scope.numbers.iter().rev().find(|(n, _)| n == name).map(|(_, n)| n.to_string());
                let value = value.or_else(number).ok_or_else(unknown)?;
                if on {
                    out.push_str(&value);
                }
            }
            _ => return Err(unknown()),
        }
    }
    if depth == 0 { Ok(i) } else { Err("a block without {{end}}".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In the way of containerd's documentation.
    const TEMPLATE: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge",
        "ipam": {"type": "host-local", "subnet": "{{.PodCIDR}}",
          "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
          "routes": [{{- range $i, $route := .Routes -}} {{if $i}}, {{end}}{"dst": "{{$route}}"} {{- end -}} ]}}]}"#;

    fn cidrs(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ranges_and_routes() {
        let made = render(TEMPLATE, &cidrs(&["10.1.0.0/24", "fd00::/64"])).expect("renders");
        let json: serde_json::Value = serde_json::from_str(&made).expect("JSON");
        let ipam = &json["plugins"][0]["ipam"];
        assert_eq!(ipam["subnet"], "10.1.0.0/24");
        assert_eq!(ipam["ranges"], serde_json::json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]));
        assert_eq!(ipam["routes"], serde_json::json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]));
        assert!(made.contains(r#""routes": [{"dst""#), "trimmed: {made}");
        assert_eq!(
            render("{{range .PodCIDRRanges}}<{{.}}>{{end}}", &cidrs(&["a/1", "b/2"])).expect("dot"),
            "<a/1><b/2>"
        );
        assert_eq!(
            render("{{range .Routes}}{{if .Routes}}x{{end}}{{end}}-{{if .PodCIDR}}y{{end}}", &[]).expect("empty"),
            "-"
        );
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (bad, why) in [
            ("{{.Other}}", ".Other"),
            ("{{$x}}", "$x"),
            ("{{range .X}}{{end}}", "range .X"),
            ("{{range x := .Routes}}{{end}}", "range x"),
            ("{{if .PodCIDR}}", "without {{end}}"),
            ("{{end}}", "without a beginning"),
            ("{{.PodCIDR", "without }}"),
            ("{{template \"x\"}}", "template"),
        ] {
            let e = render(bad, &cidrs(&["10.0.0.0/8"])).expect_err(bad);
            assert!(e.contains(why), "{bad}: {e}");
        }
    }

    #[test]
    fn only_into_a_folder_without_another_configuration() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = Utf8Path::from_path(dir.path()).expect("utf8");
        let (template, folder) = (root.join("template"), root.join("net.d"));
        let put = |path: &Utf8Path, text: &str| {
            atomic::write(path.as_std_path(), text.as_bytes(), 0o600, Durability::Process).expect("file");
        };
        put(&template, TEMPLATE);
        let ours = folder.join(FILE);
        assert!(write(&template, &folder, &cidrs(&["10.1.0.0/24"])).expect("written"));
        assert!(std::fs::read_to_string(&ours).expect("there").contains("10.1.0.0/24"));
        assert!(write(&template, &folder, &cidrs(&["10.2.0.0/24"])).expect("changed"));
        assert!(std::fs::read_to_string(&ours).expect("there").contains("10.2.0.0/24"));
        assert_eq!(std::fs::read_dir(&folder).expect("folder").count(), 1);

        put(&template, "{\"name\": \"{{.PodCIDR}}\"}");
        let e = write(&template, &folder, &cidrs(&["10.3.0.0/24"])).expect_err("no network list");
        assert_eq!(e.kind(), Kind::FailedPrecondition);
        assert!(std::fs::read_to_string(&ours).expect("there").contains("10.2.0.0/24"), "the old one stays");

        put(&folder.join("05-other.conf"), "{}");
        assert!(!write(&template, &folder, &cidrs(&["10.3.0.0/24"])).expect("not ours"));
        assert!(write(&root.join("gone"), &root.join("empty"), &cidrs(&["10.3.0.0/24"])).is_err());
    }

    proptest! {
        #[test]
        fn hostile_templates_never_panic(parts in proptest::collection::vec(
            prop_oneof!["(?s).{0,8}", Just("{{".into()), Just("}}".into()), Just("{{range .Routes}}".into()), Just("{{- end -}}".into()),
                Just("{{if $i}}".into()), Just("{{-}}".into()), Just("{{range $i, $r := .PodCIDRRanges}}".into())], 0..24)) {
            let _ = render(&parts.concat(), &cidrs(&["10.0.0.0/8", "fd00::/8"]));
        }
    }
}
