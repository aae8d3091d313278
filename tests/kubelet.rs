//! The real kubelet, and whole Kubernetes clusters, on the daemon: what pods use, tried through kubectl.
//!
//! Run by `cargo test --test kubelet [GROUP|PART OF A SCENARIO'S NAME]`, as root; `make test-kubelet` does. It has no harness
//! but its own: a cluster is started once for a group of scenarios, which run side by side in namespaces of their own. Each
//! group runs in the tests' environment (`tests/env/enter`), with which everything that it started ends. The clusters'
//! parts are in `tests/real/kubelet`. A group that fails leaves its logs in `target/test-logs/kubelet-<group>/`.
//!
//! `KUBELET_LONG=1` (`make soak`) makes the waits long that are short in `make test`; `KUBELET_KEEP=1` keeps a cluster up after
//! its scenarios until the environment is ended, for looking into it.

#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::print_stderr, clippy::exit)]
#![allow(missing_docs)]

mod support;

#[path = "real/kubelet/mod.rs"]
mod real;

fn main() {
    std::process::exit(real::harness::main());
}
