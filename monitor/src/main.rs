//! The monitor of one pod as a program of its own; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxmox_lxcri_monitor::main()
}
