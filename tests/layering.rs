//! The rules of the house that the compiler does not hold: layers (an arrow may only point left), a theory of operation
//! at the top of each file, files of a readable length, nothing left to be done.
//!
//! Run by `cargo test --test layering`; reads the sources as text. A failure names file, line and rule.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Each folder (or file) of `src` and what it may name. What is not listed here has no layer, which is an error.
const LAYERS: &[(&str, &[&str])] = &[
    ("utils", &[]),
    ("api", &[]),
    ("core", &["utils"]),
    ("integrations", &["utils", "core"]),
    ("backends", &["utils", "core", "integrations"]),
    ("cri", &["utils", "core", "api"]),
    ("cli", &["utils", "core", "api"]),
    // These put everything together.
    ("daemon", &["utils", "api", "core", "integrations", "backends", "cri", "cli"]),
    ("main", &["utils", "api", "core", "integrations", "backends", "cri", "cli", "daemon"]),
    ("lib", &["utils", "api", "core", "integrations", "backends", "cri", "cli", "daemon"]),
];

/// Lines of a file, its tests included.
const HARD_CAP: usize = 800;
/// Lines of a file without its tests: over it the file is named, not failed.
const SOFT_CAP: usize = 400;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `folder`, sorted.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("a folder's entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The text with comments, strings and character literals blanked out, line by line as before.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    let mut i = 0;
    while i < chars.len() {
        let word_before = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
        let end = if at(i) == '/' && at(i + 1) == '/' {
            (i..).find(|&j| matches!(at(j), '\n' | '\0')).unwrap_or(chars.len())
        } else if at(i) == '/' && at(i + 1) == '*' {
            end_of_block_comment(&chars, i)
        } else if at(i) == '"' || (!word_before && matches!((at(i), at(i + 1)), ('b' | 'c', '"'))) {
            let start = if at(i) == '"' { i + 1 } else { i + 2 };
            end_of_string(&chars, start)
        } else if !word_before && raw_hashes(&chars, i).is_some() {
            let (start, hashes) = raw_hashes(&chars, i).unwrap_or((i, 0));
            let close = |j: usize| at(j) == '"' && (1..=hashes).all(|n| at(j + n) == '#');
            (start..chars.len()).find(|&j| close(j)).map_or(chars.len(), |j| j + 1 + hashes)
        } else if at(i) == '\'' && at(i + 1) == '\\' {
            (i + 3..chars.len()).find(|&j| at(j) == '\'').map_or(chars.len(), |j| j + 1)
        } else if at(i) == '\'' && at(i + 2) == '\'' {
            i + 3
        } else {
            out.push(at(i));
            i += 1;
            continue;
        };
        while i < end.min(chars.len()) {
            blank(&mut out, at(i));
            i += 1;
        }
    }
    out
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut j = start;
    while j < chars.len() && chars[j] != '"' {
        j += if chars[j] == '\\' { 2 } else { 1 };
    }
    j + 1
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut j, mut depth) = (start, 0);
    while j < chars.len() {
        match (chars[j], chars.get(j + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                j += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                j += 2;
                if depth == 0 {
                    return j;
                }
            }
            _ => j += 1,
        }
    }
    j
}

/// Where the content of a raw string that begins at `i` begins, and its number of `#`.
fn raw_hashes(chars: &[char], i: usize) -> Option<(usize, usize)> {
    let mut j = i;
    if matches!(chars.get(j), Some('b' | 'c')) {
        j += 1;
    }
    if chars.get(j) != Some(&'r') {
        return None;
    }
    let hashes = chars[j + 1..].iter().take_while(|c| **c == '#').count();
    (chars.get(j + 1 + hashes) == Some(&'"')).then_some((j + 2 + hashes, hashes))
}

/// The part before the unit tests, which stand at a file's end.
fn without_tests(code: &str) -> &str {
    code.find("\n#[cfg(test)]\nmod ").map_or(code, |end| &code[..end + 1])
}

/// Names that follow `crate::` (or as many `super::` as lead to the crate's root), with their lines.
fn named_layers(code: &str, depth: usize) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    for (i, _) in code.match_indices("::") {
        let before = &code[..i];
        let head = before.rfind(|c: char| !is_word(c)).map_or(before, |j| &before[j + 1..]);
        let climbs = match head {
            "crate" | "proxmox_lxcri" => true,
            "super" => supers_before(before) == depth,
            _ => false,
        };
        if !climbs {
            continue;
        }
        let line = code[..i].matches('\n').count() + 1;
        let rest = code[i + 2..].trim_start();
        if let Some(group) = rest.strip_prefix('{') {
            let (mut level, mut word) = (0, String::new());
            for c in group.chars() {
                match c {
                    '{' => level += 1,
                    '}' if level == 0 => break,
                    '}' => level -= 1,
                    _ if level > 0 => {}
                    ',' => found.push((line, std::mem::take(&mut word))),
                    c => word.push(c),
                }
            }
            found.push((line, word));
        } else {
            found.push((line, rest.chars().take_while(|c| is_word(*c)).collect()));
        }
    }
    let first = |name: String| name.trim().split(|c: char| !is_word(c)).next().unwrap_or_default().to_owned();
    found.into_iter().map(|(line, name)| (line, first(name))).filter(|(_, name)| !name.is_empty()).collect()
}

/// How many `super` end the text, joined by `::`.
fn supers_before(text: &str) -> usize {
    let mut rest = text;
    let mut n = 0;
    while let Some(shorter) = rest.strip_suffix("super") {
        n += 1;
        rest = shorter.strip_suffix("::").unwrap_or("");
    }
    n
}

/// What breaks the layers in a file at `path` (below `src`).
fn layer_faults(path: &Path, code: &str) -> Vec<String> {
    let parts: Vec<_> = path.components().map(|c| c.as_os_str().to_string_lossy()).collect();
    let layer = parts[0].trim_end_matches(".rs");
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
        return vec![format!("{}: `{layer}` has no layer: give it one in tests/layering.rs", path.display())];
    };
    let file = parts.last().map(|f| f.trim_end_matches(".rs")).unwrap_or_default();
    let depth = parts.len() - usize::from(matches!(file, "mod" | "main" | "lib"));
    let known = |name: &str| LAYERS.iter().any(|(l, _)| *l == name);
    named_layers(without_tests(code), depth)
        .into_iter()
        .filter(|(_, name)| known(name) && name != layer && !allowed.contains(&name.as_str()))
        .map(|(line, name)| format!("src/{}:{line}: `{layer}` may not name `{name}`", path.display()))
        .collect()
}

#[test]
fn arrows_point_left() {
    let src = root().join("src");
    let faults: Vec<_> = rust_files(&src)
        .iter()
        .flat_map(|f| layer_faults(f.strip_prefix(&src).expect("below src"), &code_only(&read(f))))
        .collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn the_layer_check_sees_every_spelling() {
    let see = |path: &str, code: &str| layer_faults(Path::new(path), &code_only(code)).len();
    assert_eq!(see("core/engine.rs", "use crate::integrations::cni;"), 1);
    assert_eq!(see("core/engine.rs", "use crate::{utils::x, backends::{crun, lxc}, core};"), 1);
    assert_eq!(see("core/engine.rs", "use super::super::cli;"), 1);
    assert_eq!(see("core/engine.rs", "use super::cli;"), 0, "core::cli, not the layer");
    assert_eq!(see("core/mod.rs", "use super::cli::Verb;"), 1);
    assert_eq!(see("core/engine/mod.rs", "fn f() { super::super::integrations::g() }"), 1);
    assert_eq!(see("backends/crun/plan.rs", "use super::super::super::cri::x;"), 1);
    assert_eq!(see("backends/crun/plan.rs", "use crate::integrations::crun;"), 0);
    assert_eq!(see("cli/run.rs", "fn f() { proxmox_lxcri::integrations::g() }"), 1);
    assert_eq!(
        see(
            "core/a.rs",
            "// crate::cli\n/* crate::cri /* */ crate::cli */ let s = \"crate::cli\"; let r = r#\"crate::cli\"#;"
        ),
        0
    );
    assert_eq!(see("core/a.rs", "fn f<'a>(c: char) { if c == '\"' { crate::cli::x() } }"), 1);
    assert_eq!(see("core/a.rs", "fn f() {}\n#[cfg(test)]\nmod tests { use crate::cli; }"), 0);
    assert_eq!(see("helpers/a.rs", ""), 1, "a folder without a layer");
}

/// Sources of the product and of the tests.
fn all_sources() -> Vec<PathBuf> {
    [
        "src",
        "guest-agent/src",
        "guest-proto/src",
        "guest-relay/src",
        "monitor/src",
        "monitor-proto/src",
        "tests",
        "examples",
    ]
    .iter()
    .map(|f| root().join(f))
    .filter(|f| f.is_dir())
    .flat_map(|f| rust_files(&f))
    .collect()
}

#[test]
fn files_say_what_they_are_and_stay_readable() {
    let mut faults = String::new();
    for path in all_sources() {
        let text = read(&path);
        let name = path.strip_prefix(root()).expect("in the repository").display().to_string();
        if !text.starts_with("//!") {
            let _ = writeln!(faults, "{name}: does not open with `//!` (what it owns, who calls it, what can fail)");
        }
        let lines = text.lines().count();
        if lines > HARD_CAP {
            let _ = writeln!(faults, "{name}: {lines} lines, over {HARD_CAP}: split it by noun");
        }
        let own = without_tests(&text).lines().count();
        if own > SOFT_CAP {
            println!("{name}: {own} lines without tests, over the soft cap of {SOFT_CAP}");
        }
    }
    assert!(faults.is_empty(), "\n{faults}");
}

#[test]
fn nothing_is_left_to_be_done() {
    // Written in two halves so that this file does not find itself.
    let words = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];
    let mut faults = String::new();
    for path in all_sources() {
        for (n, line) in code_only(&read(&path)).lines().enumerate() {
            for word in words.iter().filter(|w| line.contains(**w)) {
                let _ = writeln!(faults, "{}:{}: {word}", path.display(), n + 1);
            }
        }
    }
    assert!(faults.is_empty(), "finish it, refuse it by name, or list the test with its reason:\n{faults}");
}
