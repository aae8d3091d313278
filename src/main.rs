//! The program: the registry's commands, and `serve` from the daemon.

use std::process::ExitCode;

use proxmox_lxcri::cli::Registry;
use proxmox_lxcri::daemon::command::Serve;

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let mut registry = Registry::builtin();
    registry.register(Serve);
    ExitCode::from(registry.main(std::env::args_os()).await)
}
