//! The program: all commands there are, and nothing else.

use std::process::ExitCode;

use proxmox_lxcri::daemon::program;

fn main() -> ExitCode {
    program::run(&program::commands())
}
