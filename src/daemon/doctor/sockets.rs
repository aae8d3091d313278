//! The daemon's sockets: whether they are free, ours, or somebody else's.

use std::time::Duration;

use camino::Utf8Path;
use tokio::net::UnixStream;

use super::Finding;
use crate::api::v1;
use crate::cli::client::Client;
use crate::core::config::Config;

/// How long whoever listens may take to say who he is.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn check(config: &Config) -> Vec<Finding> {
    let server = &config.server;
    let (cri, local) =
        tokio::join!(socket("server.listen", &server.listen), socket("server.local_listen", &server.local_listen));
    vec![cri, local]
}

async fn socket(key: &str, path: &Utf8Path) -> Finding {
    match path.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Finding::good("socket", format!("{path} is free: no daemon runs"));
        }
        Err(e) => return Finding::fault("socket", format!("{path}: {e}"), format!("mend the folder, or say {key}")),
        Ok(meta) if !std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
            return Finding::fault(
                "socket",
                format!("{path} is there and is no socket"),
                format!("remove it, or say {key}"),
            );
        }
        Ok(_) => {}
    }
    if let Err(e) = UnixStream::connect(path.as_std_path()).await {
        return match e.kind() {
            std::io::ErrorKind::ConnectionRefused => {
                Finding::good("socket", format!("{path} is left from a daemon that is gone; the next takes it over"))
            }
            _ => Finding::fault("socket", format!("{path}: {e}"), format!("mend its mode, or say {key}")),
        };
    }
    let who = async {
        let mut client = Client::connect(path).await.ok()?;
        Some(client.runtime.version(v1::VersionRequest::default()).await.ok()?.into_inner())
    };
    match tokio::time::timeout(PATIENCE, who).await {
        Ok(Some(v)) if v.runtime_name == "proxmox-lxcri" => {
            Finding::good("socket", format!("{path}: our daemon answers, version {}", v.runtime_version))
        }
        Ok(Some(v)) => Finding::fault(
            "socket",
            format!("{path} is occupied by {} {}", v.runtime_name, v.runtime_version),
            format!("stop and disable it, or say another path in {key} and the kubelet's containerRuntimeEndpoint"),
        ),
        Ok(None) | Err(_) => Finding::fault(
            "socket",
            format!("{path} is occupied by something that is no runtime, or hangs"),
            format!("ss -xlp | grep {path} says who it is; stop it, or say another path in {key}"),
        ),
    }
}
