//! Folders of OCI hooks: files that say which program the OCI runtime calls for which containers, at which point of their lives.
//!
//! Format: oci-hooks(5), version 1.0.0, as other runtimes read it. Read anew for each container by `backends::pods`. A file that
//! can't be read or understood fails the container with its name: it may be there to forbid something.

use std::collections::BTreeMap;
use std::ffi::OsStr;

use camino::{Utf8Path, Utf8PathBuf};
use regex::Regex;
use serde::Deserialize;

use super::cdi;
use crate::core::error::{Error, Result};

const VERSION: &str = "1.0.0";
/// Points of a container's life; the runtime's names.
const STAGES: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// What is known of a container.
#[derive(Debug, Clone, Copy)]
pub struct Container<'a> {
    /// Its annotations, and its pod's that it does not have itself.
    pub annotations: &'a BTreeMap<String, String>,
    /// argv[0] of its first process.
    pub command: &'a str,
    /// Whether somebody asked for something of the node's to be mounted.
    pub has_bind_mounts: bool,
}

/// A file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: String,
    hook: Program,
    when: When,
    stages: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    path: Utf8PathBuf,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    timeout: Option<i64>,
}

/// Conditions; every one that is given has to be met, and one has to be given.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
struct When {
    always: Option<bool>,
    /// Patterns of names and of their values: each pair fits an annotation.
    annotations: BTreeMap<String, String>,
    /// Patterns, one of which fits the command.
    commands: Vec<String>,
    has_bind_mounts: Option<bool>,
}

/// A hook that was read.
#[derive(Debug)]
pub struct OciHook {
    always: Option<bool>,
    annotations: Vec<(Regex, Regex)>,
    commands: Vec<Regex>,
    has_bind_mounts: Option<bool>,
    hooks: Vec<cdi::Hook>,
}

impl OciHook {
    fn of(file: File) -> std::result::Result<Self, String> {
        let File { version, hook, when, stages } = file;
        if version != VERSION {
            return Err(format!("version {version:?}, known is {VERSION}"));
        }
        if !hook.path.is_absolute() {
            return Err(format!("hook.path {:?} is not absolute", hook.path));
        }
        if let Some(stage) = stages.iter().find(|s| !STAGES.contains(&s.as_str())) {
            return Err(format!("stage {stage:?} is not one of {}", STAGES.join(", ")));
        }
        if hook.timeout.is_some_and(|seconds| seconds <= 0) {
            return Err("hook.timeout is to be above 0 seconds".into());
        }
        if when == When::default() || stages.is_empty() {
            return Err("no condition, or no stage: it would never run".into());
        }
        let pattern = |text: &String| Regex::new(text).map_err(|e| e.to_string());
        let pair = |(name, value): (&String, &String)| Ok::<_, String>((pattern(name)?, pattern(value)?));
        let made = |stage: String| cdi::Hook {
            hook_name: stage,
            path: hook.path.to_string(),
            args: hook.args.clone(),
            env: hook.env.clone(),
            timeout: hook.timeout,
        };
        Ok(Self {
            always: when.always,
            annotations: when.annotations.iter().map(pair).collect::<std::result::Result<_, _>>()?,
            commands: when.commands.iter().map(pattern).collect::<std::result::Result<_, _>>()?,
            has_bind_mounts: when.has_bind_mounts,
            hooks: stages.into_iter().map(made).collect(),
        })
    }

    fn is_for(&self, container: Container<'_>) -> bool {
        let annotated = |(name, value): &(Regex, Regex)| {
            container.annotations.iter().any(|(n, v)| name.is_match(n) && value.is_match(v))
        };
        self.always != Some(false)
            && self.has_bind_mounts.is_none_or(|wanted| wanted && container.has_bind_mounts)
            && self.annotations.iter().all(annotated)
            && (self.commands.is_empty() || self.commands.iter().any(|c| c.is_match(container.command)))
            // `false` forbids nothing by itself; without another condition nothing asks for it.
            && (self.always.is_some()
                || self.has_bind_mounts.is_some()
                || !self.annotations.is_empty()
                || !self.commands.is_empty())
    }
}

/// The hooks of all folders, in the order of their files' names. A file in a later folder takes the place of one of the same name; a
/// folder that is not there is empty. Blocks.
pub fn read(folders: &[Utf8PathBuf]) -> Result<Vec<OciHook>> {
    let mut files = BTreeMap::new();
    for folder in folders {
        let entries = match folder.read_dir_utf8() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(|e| Error::io(format!("read the OCI hooks in {folder}"), e))?,
        };
        for entry in entries {
            let path = entry.map_err(|e| Error::io(format!("read the OCI hooks in {folder}"), e))?.into_path();
            if path.extension() == Some("json") {
                files.insert(path.file_name().map(OsStr::new).map(OsStr::to_owned), path);
            }
        }
    }
    files.into_values().map(|path| read_one(&path)).collect()
}

fn read_one(path: &Utf8Path) -> Result<OciHook> {
    let text = std::fs::read(path).map_err(|e| Error::io(format!("read the OCI hook {path}"), e))?;
    serde_json::from_slice(&text)
        .map_err(|e| e.to_string())
        .and_then(OciHook::of)
        .map_err(|why| Error::precondition(format!("OCI hook {path}: {why}")))
}

/// Those of a container, by stages.
pub fn of(hooks: &[OciHook], container: Container<'_>) -> Vec<cdi::Hook> {
    hooks.iter().filter(|h| h.is_for(container)).flat_map(|h| h.hooks.clone()).collect()
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // files of a test
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("a file");
        }
        let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).expect("UTF-8");
        (dir, path)
    }

    fn file(path: &str, when: &str) -> String {
        format!(
            r#"{{"version": "1.0.0", "hook": {{"path": "{path}"}}, "when": {when}, "stages": ["createContainer"]}}"#
        )
    }

    #[test]
    fn a_container_gets_those_whose_conditions_it_meets() {
        let annotations = BTreeMap::from([("com.example.gpu".to_owned(), "two".to_owned())]);
        let container = Container { annotations: &annotations, command: "/usr/bin/python3", has_bind_mounts: true };
        let none = Container { annotations: &BTreeMap::new(), command: "/bin/sh", has_bind_mounts: false };
        for (when, is, is_not) in [
            (r#"{"always": true}"#, true, true),
            (r#"{"always": false}"#, false, false),
            (r#"{"always": true, "commands": ["python"]}"#, true, false),
            (r#"{"annotations": {"\\.gpu$": "^two$"}}"#, true, false),
            (r#"{"annotations": {"\\.gpu$": "^three$"}}"#, false, false),
            (r#"{"commands": ["^/bin/", "python"]}"#, true, true),
            (r#"{"hasBindMounts": true}"#, true, false),
            (r#"{"hasBindMounts": false}"#, false, false),
            (r#"{"hasBindMounts": false, "commands": ["^/bin/"]}"#, false, false),
            (r#"{"hasBindMounts": true, "commands": ["^/bin/"]}"#, false, false),
        ] {
            let (_dir, path) = folder(&[("a.json", &file("/bin/a", when))]);
            let hooks = read(&[path]).expect(when);
            let found = |c| !of(&hooks, c).is_empty();
            assert_eq!((found(container), found(none)), (is, is_not), "{when}");
        }
    }

    #[test]
    fn files_have_an_order_and_replace_each_other() {
        let always = r#"{"always": true}"#;
        let (_first, first) = folder(&[
            ("20-b.json", &file("/bin/b", always)),
            ("10-a.json", &file("/bin/a", always)),
            ("note.txt", "not a hook"),
        ]);
        let (_second, second) = folder(&[("10-a.json", &file("/opt/a", always))]);
        let hooks = read(&[first, "/not/there".into(), second]).expect("hooks");
        let none = Container { annotations: &BTreeMap::new(), command: "", has_bind_mounts: false };
        let paths: Vec<_> = of(&hooks, none).into_iter().map(|h| h.path).collect();
        assert_eq!(paths, ["/opt/a", "/bin/b"]);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let always = r#"{"always": true}"#;
        for (text, why) in [
            ("{", "EOF"),
            (&file("/bin/a", always).replace("1.0.0", "9"), "version \"9\""),
            (&file("bin/a", always), "not absolute"),
            (&file("/bin/a", always).replace("createContainer", "never"), "stage \"never\""),
            (&file("/bin/a", "{}"), "no condition"),
            (&file("/bin/a", r#"{"commands": ["("]}"#), "unclosed group"),
            (&file("/bin/a", r#"{"sometimes": true}"#), "unknown field"),
            (&file("/bin/a", always).replace("/bin/a\"", "/bin/a\", \"timeout\": 0"), "timeout"),
        ] {
            let (_dir, path) = folder(&[("a.json", text)]);
            let told = read(std::slice::from_ref(&path)).expect_err(text).chain();
            assert!(told.contains(why) && told.contains("a.json"), "{told}");
        }
    }
}
