//! Verifier programs, by the contract that containerd's have
//! (<https://github.com/containerd/containerd/blob/main/docs/image-verification.md>): each gets `-name`, `-digest` and
//! `-stdin-media-type`, the image's descriptor on standard input, and says its reason on standard output; 0 is yes. All have to.
//!
//! Other than there, a folder that is missing or empty admits nothing, and none is left out for being one too many.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};

use super::Subject;
use super::policy::not_others;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Result};
use crate::utils::process::Spawn;

/// Longest reason in bytes.
const MAX_REASON: usize = 4 << 10;
/// Most programs.
const MAX_PLUGINS: usize = 50;
/// What a program finds on its standard input.
const DESCRIPTOR: &str = "application/vnd.oci.descriptor.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

pub(super) async fn ask(dir: &Utf8Path, timeout: Duration, subject: &Subject<'_>) -> Result<()> {
    let folder = dir.to_owned();
    let programs = blocking(move || list(&folder)).await?;
    let media_type = if subject.media_type.is_empty() { MANIFEST } else { subject.media_type };
    let descriptor =
        serde_json::json!({"mediaType": media_type, "digest": subject.digest, "size": subject.size}).to_string();
    let (name, digest) = (subject.reference.to_string(), subject.digest.to_string());
    for program in programs {
        let arguments = ["-name", &name, "-digest", &digest, "-stdin-media-type", DESCRIPTOR];
        let call = Spawn::new(program.as_str(), arguments).stdin(descriptor.clone()).deadline(timeout);
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let call = call.env("PATH", path).env("HOME", "/root").stdout_cap(MAX_REASON).stderr_cap(MAX_REASON);
        let output = call.run().await.map_err(|e| Error::from(e).context(format!("verifier {program}")))?;
        let reason: String =
            String::from_utf8_lossy(&output.stdout).trim().chars().filter(|c| !c.is_control()).collect();
        tracing::debug!(program = %program, image = name, status = %output.status, reason, "a verifier has judged");
        if !output.success() {
            return Err(Error::precondition(format!("verifier {program} says no ({}): {reason}", output.status)));
        }
    }
    Ok(())
}

/// The programs of the folder, by name.
fn list(dir: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let failed = |e| Error::io(format!("verifiers in {dir}"), e);
    not_others(dir, &std::fs::metadata(dir).map_err(failed)?)?;
    let mut programs = Vec::new();
    for entry in dir.read_dir_utf8().map_err(failed)? {
        let path = entry.map_err(failed)?.into_path();
        let meta = std::fs::metadata(&path).map_err(failed)?;
        if meta.is_dir() {
            continue;
        }
        if !meta.is_file() || meta.mode() & 0o111 == 0 {
            return Err(Error::precondition(format!("{path} is no program: all files in {dir} have to be verifiers")));
        }
        not_others(&path, &meta)?;
        programs.push(path);
    }
    programs.sort();
    match programs.len() {
        0 => Err(Error::precondition(format!("there is no verifier in {dir}"))),
        n if n > MAX_PLUGINS => Err(Error::precondition(format!("{n} verifiers in {dir} (at most {MAX_PLUGINS})"))),
        _ => Ok(programs),
    }
}
