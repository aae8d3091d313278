//! The CRI v1 wire types, generated from `proto/cri.proto` and `proto/local.proto`; used by `cri` (server) and `cli` (client).
//!
//! Nothing here can fail or leave anything behind.

/// Messages and services of package `runtime.v1`; the proto file documents them.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// Messages and service of package `lxcri.local.v1`; the proto file documents them.
#[allow(missing_docs, clippy::all)]
pub mod local {
    tonic::include_proto!("lxcri.local.v1");
}

impl std::fmt::Debug for v1::AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}
