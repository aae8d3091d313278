//! The program: the registry's commands, and `serve` from the daemon.

use std::process::ExitCode;
use std::time::Duration;

use proxmox_lxcri::cli::Registry;
use proxmox_lxcri::daemon::command::Serve;
use proxmox_lxcri::utils::memory;

/// Threads for files, mounts and namespaces: small, and gone soon after a burst of work.
const BLOCKING_THREADS: usize = 32;
const THREAD_STACK: usize = 1 << 20;

fn main() -> ExitCode {
    memory::tune();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_stack_size(THREAD_STACK)
        .enable_all()
        .build();
    let mut registry = Registry::builtin();
    registry.register(Serve);
    match runtime {
        Ok(runtime) => ExitCode::from(runtime.block_on(registry.main(std::env::args_os()))),
        Err(_) => ExitCode::FAILURE,
    }
}
