//! The command line as a whole: its reference is current, manual pages and completions are of every command.
//!
//! Run by `make test`; needs no daemon and no root. Leaves nothing.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and read files plainly

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_proxmox-lxcri");

fn said(args: &[&str]) -> String {
    let out = Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Commands of the reference: "pod", "config migrate".
fn commands(reference: &str) -> BTreeSet<String> {
    let name = |l: &str| Some(l.trim_start_matches('#').strip_prefix(" `")?.strip_suffix('`')?.to_owned());
    reference.lines().filter(|l| l.starts_with("##")).filter_map(name).collect()
}

#[test]
fn the_reference_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    let written = std::fs::read_to_string(path).unwrap();
    assert!(written == said(&["man", "--markdown"]), "docs/cli.md: proxmox-lxcri man --markdown > docs/cli.md");
    for command in ["serve", "run", "pod", "image", "config migrate", "registry explain", "doctor"] {
        assert!(commands(&written).contains(command), "{command} is not in docs/cli.md");
    }
}

#[test]
fn every_command_has_its_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    said(&["man", "--to", folder.path().to_str().unwrap()]);
    let names = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let pages: BTreeSet<String> = names.collect();
    let page = |command: &str| format!("proxmox-lxcri-{}.1", command.replace(' ', "-"));
    let mut expected: BTreeSet<String> = commands(&said(&["man", "--markdown"])).iter().map(|c| page(c)).collect();
    expected.insert("proxmox-lxcri.1".into());
    assert_eq!(pages, expected);
    for page in pages {
        let text = std::fs::read_to_string(folder.path().join(&page)).unwrap();
        for section in [".TH", ".SH NAME", ".SH SYNOPSIS"] {
            assert!(text.contains(section), "{page} has no {section}");
        }
    }
    assert!(std::fs::read_to_string(folder.path().join("proxmox-lxcri.1")).unwrap().contains("Exit status"));
}

/// bash, asked as it asks itself when the key is pressed.
#[test]
fn bash_completes_commands_and_options() {
    let complete = |words: &str| {
        let script = format!(
            "source <({PROGRAM} completion bash); COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             $(complete -p proxmox-lxcri | sed 's/.* -F \\([^ ]*\\).*/\\1/') proxmox-lxcri \
             \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD - 1]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let out = Command::new("bash").args(["--norc", "-c", &script]).stdin(Stdio::null()).output().unwrap();
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().lines().map(String::from).collect::<BTreeSet<_>>()
    };
    let is = |words: &str, all: &[&str]| {
        assert_eq!(complete(words), all.iter().map(ToString::to_string).collect(), "{words}")
    };
    is("proxmox-lxcri imag", &["image", "images"]);
    is("proxmox-lxcri config mi", &["migrate"]);
    is("proxmox-lxcri status --output ''", &["json", "table", "yaml"]);
    assert!(complete("proxmox-lxcri config migrate --").contains("--partial"));
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let script = said(&["completion", shell]);
        assert!(script.contains("snapshot") && script.contains("local-socket"), "{shell}");
    }
    let out = Command::new(PROGRAM).args(["completion", "csh"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn a_program_on_the_path_is_a_command() {
    let folder = tempfile::tempdir().unwrap();
    let program = |name: &str, script: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    program(
        "proxmox-lxcri-hello",
        "echo \"$PROXMOX_LXCRI_SOCKET $PROXMOX_LXCRI_CONFIG\"; printf '<%s>' \"$@\"; \"$PROXMOX_LXCRI\" config default | head -n 1; exit 7",
    );
    program("proxmox-lxcri-version", "echo not this one");
    program("proxmox-lxcri-config", "echo nor this");
    let config = folder.path().join("config.toml");
    std::fs::write(&config, "[server]\nlocal_listen = \"/tmp/of-the-test.sock\"\n").unwrap();
    let call = |args: &[&str]| {
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        let mut command = Command::new(PROGRAM);
        let out =
            command.arg("--config").arg(&config).args(args).env("PATH", path).stdin(Stdio::null()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (code, told, errors) = call(&["hello", "a b", "--output", "-x", "--", "c"]);
    assert_eq!(code, Some(7), "{errors}");
    let expected = format!(
        "/tmp/of-the-test.sock {}\n<a b><--output><-x><--><c># proxmox-lxcri: every key with its default. A file needs those alone that differ.\n",
        config.display()
    );
    assert_eq!(told, expected);
    let (_, told, _) = call(&["--local-socket", "/other", "hello"]);
    assert!(told.starts_with("/other "), "{told}");
    // Ours are ours.
    assert!(call(&["version"]).1.starts_with("proxmox-lxcri "));
    assert_eq!(call(&["config", "check"]).0, Some(0));
    // A word that is nothing is told as before.
    for (words, hint) in
        [(["helo"], "unrecognized subcommand 'helo'"), (["statsu"], "'stats'"), (["../hello"], "unrecognized")]
    {
        let (code, _, errors) = call(&words);
        assert!(code == Some(2) && errors.contains(hint), "{words:?}: {code:?} {errors}");
    }
}
