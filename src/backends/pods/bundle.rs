//! What is read back from a container's bundle, which is on a tmpfs and root's alone: the only place that has the values of
//! environment variables.
//!
//! Called when a container is forked or committed. Fails with FailedPrecondition when the bundle is gone (the node was booted
//! since). Nothing is changed.

use camino::Utf8Path;
use serde::Deserialize;

use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};

#[derive(Deserialize)]
struct Bundle {
    process: Option<Process>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    env: Vec<String>,
}

/// The environment of the first process.
pub async fn environment(run_dir: &Utf8Path) -> Result<Vec<String>> {
    let folder = run_dir.to_owned();
    blocking(move || read(&folder)).await
}

fn read(run_dir: &Utf8Path) -> Result<Vec<String>> {
    let text = std::fs::read(run_dir.join("config.json")).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            let message = "its environment is not known any more: the node was booted since it was made";
            Error::because(Kind::FailedPrecondition, message, e)
        }
        _ => Error::io("read its bundle", e),
    })?;
    // What is wrong with it is not told: the text has secrets.
    let bundle: Bundle = serde_json::from_slice(&text).map_err(|_| Error::internal("its bundle can't be read"))?;
    Ok(bundle.process.map(|p| p.env).unwrap_or_default())
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_and_an_absent_bundle_is_told() {
        let temp = tempfile::tempdir().expect("a folder");
        let folder = Utf8Path::from_path(temp.path()).expect("UTF-8");
        let gone = read(folder).expect_err("nothing there");
        assert_eq!(gone.kind(), Kind::FailedPrecondition);
        let text = r#"{"ociVersion":"1.0.0","process":{"args":["x"],"env":["A=secret=1","B="]}}"#;
        std::fs::write(folder.join("config.json"), text).expect("a bundle");
        assert_eq!(read(folder).expect("read"), ["A=secret=1", "B="]);
        std::fs::write(folder.join("config.json"), "{\"process\":{\"env\":\"secret\"}}").expect("a bundle");
        assert!(!read(folder).expect_err("no list").chain().contains("secret"));
    }
}
