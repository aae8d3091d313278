//! `exit.json`: how a container ended, for a daemon that was not there.
//!
//! Written by rename when the container's output is drained. Fails with the I/O error; a crash leaves at most a
//! `.tmp-` file beside the target.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use lxcri_monitor_proto::v1::Exit;

/// Replaces `path` by the record.
pub fn write(path: &Path, id: &str, started_at: i64, exit: &Exit) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let temporary = folder.join(format!(".tmp-{}-{}", std::process::id(), name.to_string_lossy()));
    let done = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(json(id, started_at, exit).as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, path));
    if done.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    done
}

fn json(id: &str, started_at: i64, exit: &Exit) -> String {
    let mut text = String::from("{\"version\":1,\"id\":");
    quote(id, &mut text);
    let _ = write!(
        text,
        ",\"exit_code\":{},\"signal\":{},\"started_at\":{started_at},\"finished_at\":{},\"oom\":{},\"note\":",
        exit.code, exit.signal, exit.finished_at, exit.oom
    );
    quote(&exit.note, &mut text);
    text.push_str("}\n");
    text
}

fn quote(value: &str, out: &mut String) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_valid_json_and_replaces_the_old_record() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("exit.json");
        for note in ["", "a \"b\" \\ \n\u{1}é"] {
            let exit = Exit { code: 137, signal: 9, finished_at: 6, oom: true, note: note.into() };
            write(&path, "c1", 5, &exit).expect("write");
            let got: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("valid JSON");
            let want = serde_json::json!({"version": 1, "id": "c1", "exit_code": 137, "signal": 9,
                "started_at": 5, "finished_at": 6, "oom": true, "note": note});
            assert_eq!(got, want);
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
    }
}
