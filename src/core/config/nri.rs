//! `[nri]`: plugins of the node that are told of pods and containers and change them (Node Resource Interface).
//!
//! Plain data; checked with the rest of the configuration.

use std::time::Duration;

use camino::Utf8PathBuf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::faults::Faults;
use super::stream::Span;

/// Longest path of a unix socket, in bytes.
const SOCKET_PATH_MAX: usize = 107;

/// Plugins of the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Nri {
    /// Whether there are plugins. They run as root and change every container of the handlers `crun` and `lxc`.
    pub enabled: bool,
    /// Folder of plugins that the daemon starts: programs named `NN-NAME`, asked in the order of NN.
    #[schemars(with = "String")]
    pub plugin_dir: Utf8PathBuf,
    /// Folder of their own settings: `NN-NAME.conf`, else `NAME.conf`, handed over as they are.
    #[schemars(with = "String")]
    pub plugin_config_dir: Utf8PathBuf,
    /// Whether other plugins may connect to `socket`.
    pub connecting_plugins: bool,
    /// Where they connect; for root alone.
    #[schemars(with = "String")]
    pub socket: Utf8PathBuf,
    /// A plugin that has not registered within this time is ended; the daemon's start waits as long for those of the folder.
    pub registration_timeout: Span,
    /// A plugin that does not answer within this time is ended, and the request goes on without it.
    pub request_timeout: Span,
    /// Plugins ("NN-NAME" or "NAME") without which no container is made.
    pub required_plugins: Vec<String>,
}

impl Default for Nri {
    fn default() -> Self {
        Self {
            enabled: false,
            plugin_dir: "/opt/nri/plugins".into(),
            plugin_config_dir: "/etc/nri/conf.d".into(),
            connecting_plugins: false,
            socket: "/var/run/nri/nri.sock".into(),
            registration_timeout: Span::from(Duration::from_secs(5)),
            request_timeout: Span::from(Duration::from_secs(2)),
            required_plugins: Vec::new(),
        }
    }
}

impl Nri {
    pub(super) fn check(&self, faults: &mut Faults) {
        faults.absolute("nri.plugin_dir", [&self.plugin_dir]);
        faults.absolute("nri.plugin_config_dir", [&self.plugin_config_dir]);
        faults.absolute("nri.socket", [&self.socket]);
        if self.socket.as_str().len() > SOCKET_PATH_MAX {
            faults.add("nri.socket", format!("{}: a socket's path has at most {SOCKET_PATH_MAX} bytes", self.socket));
        }
        for (key, span) in
            [("nri.registration_timeout", self.registration_timeout), ("nri.request_timeout", self.request_timeout)]
        {
            let (least, most) = (Duration::from_millis(10), Duration::from_secs(60));
            if !(least..=most).contains(&span.get()) {
                faults.add(key, "10ms to 60s");
            }
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
        for name in self.required_plugins.iter().filter(|n| n.is_empty() || !n.chars().all(fits)) {
            faults.add("nri.required_plugins", format!("{name:?} is no plugin's name, such as \"10-pinning\""));
        }
        if self.connecting_plugins && !self.enabled {
            faults.with("nri.connecting_plugins", "nri.enabled", "nri.enabled says that there are no plugins");
        }
        if !self.required_plugins.is_empty() && !self.enabled {
            faults.with("nri.required_plugins", "nri.enabled", "nri.enabled says that there are no plugins");
        }
    }
}
