//! The agent in a pod's virtual machine: carries what its node and the guest's containers have to say to each other.
//!
//! As the guest's first process it is its init ([`init`]), which starts the agent, and again whenever it dies: all that has to last is
//! the monitor's, which is a process of its own (this program under another name), or in files. A crash ends the connection, and with it the execs that came by it; the node
//! connects again, and asks for every container's output from where it has it.

mod agent;
mod beneath;
mod config;
mod files;
mod init;
mod keeper;
mod logs;
mod monitor;
mod pump;
mod roots;
mod session;
mod settings;
mod volumes;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    if proxmox_lxcri_monitor::is_init() || std::env::args_os().next().is_some_and(|name| name == monitor::NAME) {
        return proxmox_lxcri_monitor::main();
    }
    if std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == "/init" || name == "/sbin/init")
    {
        let Err(message) = init::run() else { return ExitCode::SUCCESS };
        let _ = writeln!(std::io::stderr(), "lxcri: {message}");
        return ExitCode::FAILURE;
    }
    let done = settings::Settings::from_arguments(std::env::args_os().skip(1)).and_then(agent::run);
    if let Err(message) = done {
        let _ = writeln!(std::io::stderr(), "proxmox-lxcri-guest-agent: {message}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
