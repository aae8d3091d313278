//! The helper: loads liblxc, starts containers and execs with it, and stays as a container's parent until that ends.
//!
//! Started by a pod's monitor as a launch plan says. `create` leaves two processes: the container's first one, waiting
//! for `start`, and its parent, in which liblxc serves its own tools; the parent writes the first process' end into the
//! status file. Errors go to the log file that is named, as one line at its end; the exit status is 1 then. A crash of
//! the parent leaves the container running: the monitor is its reaper from then on.

mod by_hand;
mod create;
mod delete;
mod exec;
mod inherit;
mod kills;
mod liblxc;
mod options;
mod within;
mod words;

use std::io::Write;
use std::process::ExitCode;

use options::Options;

const USAGE: &str = "usage: proxmox-lxcri-lxc version [--library FILE]
       proxmox-lxcri-lxc create|exec|delete --lxcpath DIR --name NAME ... | start FIFO | kills GROUP FILE
       proxmox-lxcri-lxc within|keep|inherit|forget --init PID:START ... -- PROGRAM...
       proxmox-lxcri-lxc make|run|halt|destroy|attach --lxcpath DIR --name NAME ... | states --lxcpath DIR NAME...";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let verb = arguments.next().unwrap_or_default();
    let options = match Options::parse(arguments) {
        Ok(options) => options,
        Err(e) => return fail("", &format!("{e}\n{USAGE}")),
    };
    let done = match verb.as_str() {
        "version" => liblxc::Library::load(&options.library).map(|library| {
            let _ = writeln!(std::io::stdout(), "{}", library.version());
        }),
        "create" => create::create(&options),
        "start" => create::start(&options),
        "kills" => kills::note(&options),
        "exec" => create::out_of_reach().and_then(|()| exec::exec(&options)),
        "delete" => delete::delete(&options),
        "within" => within::within(&options),
        "keep" => within::keep(&options),
        "inherit" => inherit::inherit(&options),
        "forget" => within::forget(&options),
        "make" => by_hand::make(&options),
        "run" => by_hand::run(&options),
        "halt" => by_hand::halt(&options),
        "destroy" => by_hand::destroy(&options),
        "states" => by_hand::states(&options),
        "attach" => match create::out_of_reach().and_then(|()| by_hand::attach(&options)) {
            Ok(code) => return ExitCode::from(code),
            Err(e) => {
                // As shells have it: not the program's own code.
                fail(&options.log, &e);
                return ExitCode::from(127);
            }
        },
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&options.log, &e),
    }
}

/// Says why on stderr, unless that is a container's: then in the log.
fn fail(log: &str, why: &str) -> ExitCode {
    if log.is_empty() {
        let _ = writeln!(std::io::stderr(), "proxmox-lxcri-lxc: {why}");
    } else {
        let _ = words::make_plain(log);
        if let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(log) {
            let _ = writeln!(file, "{why}");
        }
    }
    ExitCode::FAILURE
}
