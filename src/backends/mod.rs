//! The backends: each turns pods and containers into its own kind of unit. `oci` is shared by those that run
//! OCI containers.

pub mod crun;
pub mod oci;
