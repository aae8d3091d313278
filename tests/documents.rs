//! Every command line of ours in README.md and docs/ is one that the program takes: each is taken out of the documents' blocks, its
//! placeholders are filled, and it is parsed by the program's own command line, which knows every verb and option.
//!
//! What they do is tested where it is done. Run by `make test`; reads files alone.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests read files plainly

use std::path::{Path, PathBuf};

use proxmox_lxcri::cli::clap::{Error, error::ErrorKind};
use proxmox_lxcri::daemon::program::commands;

const PROGRAM: &str = "proxmox-lxcri";

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|e| e.unwrap().path());
    // cli.md is made by the program itself.
    let docs = docs.filter(|p| p.extension().is_some_and(|e| e == "md") && !p.ends_with("cli.md"));
    let mut all: Vec<PathBuf> = docs.chain([root.join("README.md")]).collect();
    all.sort();
    all
}

/// Lines of a document's blocks, those that go on (`\` at the end) as one, each with its number.
fn lines(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let (mut fenced, mut goes_on) = (false, false);
    for (n, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if !fenced && !line.starts_with("    ") {
            goes_on = false;
            continue;
        }
        let text = line.trim();
        let whole = text.trim_end_matches('\\').trim_end();
        match found.last_mut().filter(|_| goes_on) {
            Some((_, before)) => *before = format!("{before} {whole}"),
            None => found.push((n + 1, whole.to_owned())),
        }
        goes_on = text.ends_with('\\');
    }
    found
}

/// The commands of ours in a line: without what is said of them, what they are joined with, and who runs them.
fn ours(line: &str) -> Vec<String> {
    // A drawing.
    if line.contains('─') {
        return Vec::new();
    }
    let line = line.split(" #").next().unwrap();
    // Two blanks and more: what follows is for people.
    let line = line.split("  ").next().unwrap().trim();
    let parts = line.split([';', '>']).flat_map(|p| p.split(" | ")).flat_map(|p| p.split("&&"));
    let command = |part: &str| {
        let words: Vec<&str> = part.split_whitespace().collect();
        let at = words.iter().position(|w| *w == PROGRAM || w.ends_with("/proxmox-lxcri"))?;
        let before = &words[..at];
        let starts = before.is_empty()
            || before[0] == "ssh"
            || before.iter().all(|w| *w == "sudo" || *w == "$" || w.contains('='));
        starts.then(|| words[at..].join(" "))
    };
    parts.filter_map(command).collect()
}

/// The same with each of `a|b|c` in turn, and placeholders filled.
fn filled(command: &str) -> Vec<Vec<String>> {
    let mut all: Vec<Vec<String>> = vec![Vec::new()];
    let mut quoted: Option<String> = None;
    for word in command.split(' ') {
        // A text with blanks is one word.
        let word = match quoted.take() {
            Some(begin) => format!("{begin} {word}"),
            None => word.to_owned(),
        };
        if word.matches('\'').count() % 2 == 1 || word.matches('"').count() % 2 == 1 {
            quoted = Some(word);
            continue;
        }
        let word = word.trim_start_matches('[').trim_end_matches(']').trim_end_matches("...").trim_end_matches(']');
        if word.is_empty() {
            continue;
        }
        let choices: Vec<&str> = word.split('|').collect();
        all = all
            .iter()
            .flat_map(|begin| {
                choices.iter().map(|choice| {
                    let number = matches!(*choice, "VMID" | "N" | "SECONDS");
                    let choice = if number { "100" } else { choice.trim_matches(['\'', '"']) };
                    begin.iter().cloned().chain([choice.to_owned()]).collect()
                })
            })
            .collect();
    }
    all
}

#[test]
fn every_command_in_the_documents_is_one() {
    let (mut count, mut wrong) = (0, Vec::new());
    for path in documents() {
        let text = std::fs::read_to_string(&path).unwrap();
        for (n, line) in lines(&text) {
            for command in ours(&line) {
                for words in filled(&command) {
                    count += 1;
                    let parsed = commands().clap().try_get_matches_from(&words);
                    // Where several are named as one, what each of them needs is not.
                    let named = |e: &Error| command.contains('|') && e.kind() == ErrorKind::MissingRequiredArgument;
                    let fits = |e: &Error| !e.use_stderr() || named(e);
                    if let Err(e) = parsed.as_ref()
                        && !fits(e)
                    {
                        let why = e.to_string().lines().next().unwrap_or_default().to_owned();
                        wrong.push(format!("{}:{n}: {}: {why}", path.file_name().unwrap().display(), words.join(" ")));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert!(count > 50, "only {count} commands were found");
}

#[test]
fn commands_are_found_and_placeholders_filled() {
    let of = |line: &str| ours(line).iter().flat_map(|c| filled(c)).map(|w| w.join(" ")).collect::<Vec<_>>();
    assert_eq!(
        of("proxmox-lxcri doctor; proxmox-lxcri status  # both"),
        ["proxmox-lxcri doctor", "proxmox-lxcri status"]
    );
    assert_eq!(of("systemctl stop proxmox-lxcri"), Vec::<String>::new());
    assert_eq!(of("ssh NODE proxmox-lxcri image have > FILE"), ["proxmox-lxcri image have"]);
    assert_eq!(of("proxmox-lxcri a start|stop VMID"), ["proxmox-lxcri a start 100", "proxmox-lxcri a stop 100"]);
    assert_eq!(of("proxmox-lxcri pod diff POD [NAME]    words"), ["proxmox-lxcri pod diff POD NAME"]);
    assert_eq!(filled("proxmox-lxcri x 'a b' c"), [["proxmox-lxcri", "x", "a b", "c"]]);
}
