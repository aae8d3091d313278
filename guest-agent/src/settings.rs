//! What the agent is told by whoever starts it.
//!
//! Called by `main`. Fails with what is wrong with the arguments, or with the secret's file.

use std::ffi::OsString;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use lxcri_guest_proto::Secret;
use zeroize::Zeroizing;

/// Where the kernel tells of block devices.
const BLOCK_DEVICES: &str = "/sys/class/block";

/// The arguments.
#[derive(Debug)]
pub struct Settings {
    /// `--listen ADDRESS:PORT`.
    pub listen: SocketAddr,
    /// `--secret FILE`: 32 bytes; read for each connection, so that it may come later than the agent.
    pub secret: PathBuf,
    /// `--run-dir FOLDER`: what ends with the guest's run.
    pub run_dir: PathBuf,
    /// `--data-dir FOLDER`: on the guest's own disk.
    pub data_dir: PathBuf,
    /// `--block-devices FOLDER`: a folder for each, with its serial number.
    pub block_devices: PathBuf,
}

impl Settings {
    /// Of `--name value` pairs.
    pub fn from_arguments(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let (mut listen, mut secret, mut run_dir, mut data_dir) = (None, None, None, None);
        let mut block_devices = PathBuf::from(BLOCK_DEVICES);
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{}: no value", name.display()))?;
            let path = || match PathBuf::from(&value) {
                path if path.is_absolute() => Ok(path),
                path => Err(format!("{}: {} is no absolute path", name.display(), path.display())),
            };
            match name.to_str() {
                Some("--listen") => {
                    let address = value.to_str().and_then(|v| v.parse().ok());
                    listen = Some(address.ok_or_else(|| format!("--listen: {}: not ADDRESS:PORT", value.display()))?);
                }
                Some("--secret") => secret = Some(path()?),
                Some("--run-dir") => run_dir = Some(path()?),
                Some("--data-dir") => data_dir = Some(path()?),
                Some("--block-devices") => block_devices = path()?,
                _ => return Err(format!("{}: unknown argument", name.display())),
            }
        }
        Ok(Self {
            listen: listen.ok_or("--listen is missing")?,
            secret: secret.ok_or("--secret is missing")?,
            run_dir: run_dir.ok_or("--run-dir is missing")?,
            data_dir: data_dir.ok_or("--data-dir is missing")?,
            block_devices,
        })
    }

    /// What node and guest have in common.
    pub fn read_secret(&self) -> Result<Secret, String> {
        let failed = |what: &dyn std::fmt::Display| format!("{}: {what}", self.secret.display());
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let mut file =
            std::fs::File::options().read(true).custom_flags(flags).open(&self.secret).map_err(|e| failed(&e))?;
        let meta = file.metadata().map_err(|e| failed(&e))?;
        if !meta.is_file() || meta.mode() & 0o077 != 0 {
            return Err(failed(&"not a file that its owner alone may read"));
        }
        if meta.len() != 32 {
            return Err(failed(&"not 32 bytes"));
        }
        let mut bytes = Zeroizing::new([0; 32]);
        file.read_exact(bytes.as_mut()).map_err(|e| failed(&e))?;
        Ok(Secret::new(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(words: &str) -> Result<Settings, String> {
        Settings::from_arguments(words.split_whitespace().map(OsString::from))
    }

    #[test]
    fn arguments() {
        let all = "--listen 0.0.0.0:7 --secret /s --run-dir /r --data-dir /d";
        let read = settings(all).expect("all of them");
        assert_eq!((read.listen.port(), read.block_devices.to_str()), (7, Some(BLOCK_DEVICES)));
        assert_eq!(
            settings(&format!("{all} --block-devices /b")).expect("one more").block_devices.to_str(),
            Some("/b")
        );
        for (bad, why) in [
            ("--listen", "--listen: no value"),
            ("--listen here", "--listen: here: not ADDRESS:PORT"),
            ("--secret s", "--secret: s is no absolute path"),
            ("--else x", "--else: unknown argument"),
            ("--listen 0.0.0.0:7 --secret /s --run-dir /r", "--data-dir is missing"),
        ] {
            assert_eq!(settings(bad).expect_err(bad), why);
        }
    }

    #[test]
    fn a_secret_is_32_bytes_that_nobody_else_reads() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a folder");
        let mut all = settings("--listen 0.0.0.0:7 --secret /s --run-dir /r --data-dir /d").expect("settings");
        all.secret = dir.path().join("secret");
        let is = |text: &str| all.read_secret().expect_err("refused").contains(text);
        assert!(is("No such file"));
        let write = |length: usize, mode: u32| {
            let _ = std::fs::remove_file(&all.secret);
            let mut file = std::fs::File::create(&all.secret).expect("a file");
            std::io::Write::write_all(&mut file, &vec![1; length]).expect("written");
            file.set_permissions(std::fs::Permissions::from_mode(mode)).expect("its mode");
        };
        write(31, 0o600);
        assert!(is("not 32 bytes"));
        write(32, 0o640);
        assert!(is("its owner alone"));
        write(32, 0o400);
        assert!(all.read_secret().is_ok());
    }
}
