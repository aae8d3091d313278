//! Checks of parameters, with the real API's words: unknown names, missing ones, wrong types.
//!
//! A call's parameters are written as words: `name` text, `name:int`, `name:num`, `name:bool`, `name:id` (a VMID), a `!` behind
//! what must be there, a `#` for a number in the name (`net#`).

use super::http::Failure;
use super::state::Params;

/// Keys of a container's configuration.
pub const CONFIG: &str = "arch cmode console:bool cores:int cpulimit:num cpuunits:int debug:bool description dev# entrypoint env \
    features hookscript hostname lock memory:mem mp# nameserver net# onboot:bool ostype protection:bool rootfs searchdomain \
    startup swap:int tags template:bool timezone tty:int unused#";

/// Keys of a VM's configuration.
pub const VM_CONFIG: &str = "acpi:bool agent args balloon:int bios boot cicustom cipassword ciupgrade:bool ciuser cores:int cpu \
    cpulimit:num cpuunits:int description efidisk# hookscript hotplug ide# ipconfig# kvm:bool lock machine memory:mem name \
    nameserver net# numa:bool onboot:bool ostype protection:bool rng# sata# scsi# scsihw searchdomain serial# smbios# sockets:int \
    sshkeys startup tablet:bool tags template:bool unused# vga virtio# vmgenid";

/// What does not fit in `params`; keys of the path are not among them.
pub fn check(words: &str, params: &Params) -> Result<(), Failure> {
    let mut failure = Failure::new(400, "Parameter verification failed.");
    let specs: Vec<(&str, &str, bool)> = words
        .split_whitespace()
        .map(|w| {
            let must = w.ends_with('!');
            let w = w.trim_end_matches('!');
            let (name, kind) = w.split_once(':').unwrap_or((w, "text"));
            (name, kind, must)
        })
        .collect();
    for (name, value) in params {
        let numbered = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let fits = |spec: &str| spec == name || spec.strip_suffix('#').is_some_and(|s| s == numbered && s != name);
        let why = match specs.iter().find(|(spec, ..)| fits(spec)) {
            None => {
                Some("property is not defined in schema and the schema does not allow additional properties".into())
            }
            Some((_, kind, _)) => mistyped(kind, value),
        };
        if let Some(why) = why {
            failure.errors.insert(name.clone(), why);
        }
    }
    for (name, _, must) in specs {
        if must && !params.contains_key(name) {
            failure.errors.insert(name.into(), "property is missing and it is not optional".into());
        }
    }
    if failure.errors.is_empty() { Ok(()) } else { Err(failure) }
}

fn mistyped(kind: &str, value: &str) -> Option<String> {
    let int = value.parse::<i64>();
    let low = |min: i64| match int {
        Err(_) => Some(format!("type check ('integer') failed - got '{value}'")),
        Ok(n) if n < min => Some(format!("value must have a minimum value of {min}")),
        Ok(_) => None,
    };
    match kind {
        "int" => low(0),
        "mem" => low(16),
        "id" => low(100),
        "num" => value.parse::<f64>().is_err().then(|| format!("type check ('number') failed - got '{value}'")),
        "bool" => {
            let known = ["1", "0", "on", "off", "yes", "no", "true", "false"].contains(&value);
            (!known).then(|| format!("type check ('boolean') failed - got '{value}'"))
        }
        _ => None,
    }
}
