//! The program: every command, and the process around them. A library's user makes a program of his own with more commands
//! (`examples/custom_command.rs`).

use std::process::ExitCode;
use std::time::Duration;

use super::backend::BackendCommand;
use super::bfc::Bfc;
use super::command::Serve;
use super::debug::Debug;
use super::doctor::Doctor;
use super::migrate::Storage;
use super::proxmox::ProxmoxCommand;
use super::registry::RegistryCommand;
use crate::cli::Registry;
use crate::utils::memory;

/// Threads for files, mounts and namespaces: small, and gone soon after a burst of work. Each layer that is being unpacked
/// has one for as long as its registry takes, and so has every look at a dead mount: those must leave some to the others.
const BLOCKING_THREADS: usize = 512;
const THREAD_STACK: usize = 1 << 20;
/// How long file work under way may take when all else is done.
const LAST_WORK: Duration = Duration::from_secs(2);

/// All commands of `proxmox-lxcri`.
pub fn commands() -> Registry {
    let mut registry = Registry::builtin();
    registry.register(Serve);
    registry.register(Storage);
    registry.register(Doctor);
    registry.register(Debug);
    registry.register(Bfc);
    registry.register(ProxmoxCommand);
    registry.register(BackendCommand);
    registry.register(RegistryCommand);
    registry
}

/// Does what this process was started for: the whole of a `main`. Nothing may have been started before.
pub fn run(registry: &Registry) -> ExitCode {
    // Started by the daemon to unpack a layer: no thread may be there yet.
    if let Some(code) = super::entry() {
        return code;
    }
    memory::tune();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_stack_size(THREAD_STACK)
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(registry.main(std::env::args_os()));
            // A thread that waits for a dead disk or mount would keep the program from ending.
            runtime.shutdown_timeout(LAST_WORK);
            ExitCode::from(code)
        }
        Err(_) => ExitCode::FAILURE,
    }
}
