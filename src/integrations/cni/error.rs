//! What can go wrong between us and the plugins, and its class for the caller.

use std::io;

use camino::Utf8PathBuf;

use crate::core::error::{Error, Kind};
use crate::integrations::netns::NetnsError;
use crate::utils::process::SpawnError;

/// CNI error code "try again later" (section 5 of the specification).
const TRY_AGAIN: u32 = 11;

/// A network operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// There is no usable configuration (yet).
    #[error("{0}")]
    NotConfigured(String),
    /// The configuration folders can't be read.
    #[error("read the CNI configuration in {folders}")]
    Folders {
        /// All of them.
        folders: String,
        /// errno.
        source: io::Error,
    },
    /// A plugin of the chain is not installed (yet).
    #[error("network {network:?}: no plugin {plugin:?} in {folders}")]
    NoPlugin {
        /// Network name.
        network: String,
        /// Program.
        plugin: String,
        /// Where it was looked for.
        folders: String,
    },
    /// A plugin could not be run to its end.
    #[error("network {network:?}: {verb} of plugin {plugin:?}")]
    Run {
        /// Network name.
        network: String,
        /// Program.
        plugin: String,
        /// ADD, DEL, ...
        verb: &'static str,
        /// Deadline, start, ...
        source: Box<SpawnError>,
    },
    /// A plugin said no.
    #[error("network {network:?}: {verb} of plugin {plugin:?} failed: {text}")]
    Plugin {
        /// Network name.
        network: String,
        /// Program.
        plugin: String,
        /// ADD, DEL, ...
        verb: &'static str,
        /// Code of the specification (0: it gave none).
        code: u32,
        /// Its message and details, or its exit status and the tail of its standard error.
        text: String,
    },
    /// A plugin succeeded and wrote what is no result.
    #[error("network {network:?}: plugin {plugin:?} succeeded but its result can't be used: {why}")]
    Result {
        /// Network name.
        network: String,
        /// Program.
        plugin: String,
        /// For a human.
        why: String,
    },
    /// The chain ended well and the pod has no address.
    #[error("network {network:?} gave the pod no address")]
    NoAddress {
        /// Network name.
        network: String,
    },
    /// The pod's attachment is not known, so it can't be checked.
    #[error("pod {0} has no network attachment")]
    NotAttached(String),
    /// The attachment's file can't be read or written.
    #[error("network attachment {path}")]
    Cache {
        /// File or folder.
        path: Utf8PathBuf,
        /// errno.
        source: io::Error,
    },
    /// The subnet of the embedded network.
    #[error("{0:?} is not an IPv4 subnet with 8 to 29 bits")]
    Subnet(String),
    /// `lo` could not be brought up.
    #[error("loopback interface of {netns}")]
    Loopback {
        /// Network namespace.
        netns: Utf8PathBuf,
        /// Why.
        source: NetnsError,
    },
}

impl From<CniError> for Error {
    fn from(e: CniError) -> Self {
        let message = e.to_string();
        match e {
            CniError::NotConfigured(_) | CniError::NoPlugin { .. } | CniError::Plugin { code: TRY_AGAIN, .. } => {
                Error::new(Kind::Unavailable, message)
            }
            CniError::Folders { source, .. } | CniError::Cache { source, .. } => Error::io(message, source),
            CniError::Run { source, .. } => Error::from(*source).context(message),
            CniError::Loopback { source, .. } => Error::from(source).context(message),
            CniError::NotAttached(_) => Error::precondition(message),
            CniError::Subnet(_) => Error::invalid(message),
            CniError::Plugin { .. } | CniError::Result { .. } | CniError::NoAddress { .. } => Error::internal(message),
        }
    }
}
