//! Where the guest is: `guest.json` in the pod's run folder.
//!
//! Written by the backend as soon as it knows, and again when that changes; read for each request and each connection. Fails with
//! what is wrong with the file, never with what is in it.
//!
//! ```json
//! {"address": "192.0.2.7:10750", "secret": "<64 hexadecimal digits>", "log_dir": "/absolute", "gone": "why"}
//! ```
//! `gone` is for a machine that does not run and that nobody has to wait for: all that was in it has ended with this reason.

use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lxcri_guest_proto::Secret;
use zeroize::Zeroizing;

/// The file's name.
pub const NAME: &str = "guest.json";
/// It is not longer, in bytes.
const MAX: u64 = 16 * 1024;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    address: SocketAddr,
    secret: String,
    log_dir: PathBuf,
    #[serde(default)]
    gone: Option<String>,
}

/// What it says.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where the agent listens.
    pub address: SocketAddr,
    /// What node and guest have in common.
    pub secret: Secret,
    /// Folder for what the relay keeps of containers and their logs.
    pub log_dir: PathBuf,
    /// The machine does not run, and why.
    pub gone: Option<String>,
    bytes: Bytes,
}

/// The file's, with the secret.
#[derive(Clone, PartialEq, Eq)]
struct Bytes(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bytes")
    }
}

impl Target {
    /// Of the file in `run_dir`; None: it is not there (yet).
    pub fn read(run_dir: &Path) -> Result<Option<Self>, String> {
        let path = run_dir.join(NAME);
        let failed = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW).bits() as i32;
        let file = match std::fs::File::options().read(true).custom_flags(flags).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(&e)),
        };
        let meta = file.metadata().map_err(|e| failed(&e))?;
        if !meta.is_file() || meta.mode() & 0o077 != 0 {
            return Err(failed(&"not a file that its owner alone may read"));
        }
        let mut bytes =
            Zeroizing::new(Vec::with_capacity(usize::try_from(meta.len().min(MAX)).unwrap_or_default() + 1));
        file.take(MAX).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
        Self::parse(bytes).map(Some).map_err(|e| failed(&e))
    }

    /// Of what is in the file.
    pub fn parse(bytes: Zeroizing<Vec<u8>>) -> Result<Self, String> {
        // The library's own words may have a value in them.
        let text: Text = serde_json::from_slice(&bytes)
            .map_err(|e| format!("not as it has to be, in line {} at {}", e.line(), e.column()))?;
        let digits = Zeroizing::new(text.secret);
        let secret = hexadecimal(&digits).ok_or("the secret is not 64 hexadecimal digits")?;
        if !text.log_dir.is_absolute() {
            return Err(format!("log_dir: {} is no absolute path", text.log_dir.display()));
        }
        let Text { address, log_dir, gone, .. } = Text { secret: String::new(), ..text };
        Ok(Self { address, secret: Secret::new(secret), log_dir, gone, bytes: Bytes(bytes) })
    }

    /// Whether the file is still the same.
    pub fn is(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

fn hexadecimal(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (place, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |b: u8| char::from(b).to_digit(16);
        *place = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_in_the_file() {
        let secret = "ab".repeat(32);
        let good = format!(r#"{{"address":"192.0.2.7:10750","secret":"{secret}","log_dir":"/var/x"}}"#);
        let parse = |text: &str| Target::parse(Zeroizing::new(text.as_bytes().to_vec()));
        let target = parse(&good).expect("a target");
        assert_eq!(
            (target.address.port(), target.log_dir.to_str(), target.gone.clone()),
            (10750, Some("/var/x"), None)
        );
        assert!(!format!("{target:?}").contains("ab"), "{target:?}");
        let gone = parse(&good.replace("/var/x\"", "/var/x\",\"gone\":\"it was stopped\"")).expect("a target");
        assert_eq!(gone.gone.as_deref(), Some("it was stopped"));
        assert!(target.is(&target.clone()) && !target.is(&gone));
        for (from, to, why) in [
            (secret.as_str(), "abab", "64 hexadecimal"),
            (&format!("\"{secret}\""), "7171717171", "not as it has to be"),
            ("192.0.2.7:10750", "here", "not as it has to be"),
            ("/var/x", "x", "log_dir: x is no absolute path"),
            ("log_dir", "other", "not as it has to be"),
            ("}", "", "not as it has to be"),
        ] {
            let error = parse(&good.replace(from, to)).expect_err(to);
            assert!(error.contains(why) && !error.contains("abab") && !error.contains("7171"), "{error}");
        }
    }

    #[test]
    fn it_is_its_owners_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(Target::read(dir.path()).expect("not there").is_none());
        let path = dir.path().join(NAME);
        let text = format!(r#"{{"address":"[::1]:1","secret":"{}","log_dir":"/l"}}"#, "0f".repeat(32));
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).expect("its mode");
        assert!(Target::read(dir.path()).expect_err("refused").contains("its owner alone"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("its mode");
        assert!(Target::read(dir.path()).expect("read").is_some());
        std::fs::rename(&path, dir.path().join("else")).expect("renamed");
        std::os::unix::fs::symlink("else", &path).expect("a link");
        assert!(Target::read(dir.path()).is_err());
    }
}
