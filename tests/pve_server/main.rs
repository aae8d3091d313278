//! The tests' Proxmox as a program of its own, for what starts a daemon without our harness: `pve_server CONFIG` adds to a daemon's
//! configuration what it has to know of it, and serves until its standard input ends.

#![allow(dead_code, clippy::disallowed_methods, clippy::print_stdout)] // the harness is not all used here

#[path = "../support/mod.rs"]
mod support;

use std::io::{Read as _, Write as _};

fn main() {
    let Some(path) = std::env::args().nth(1).filter(|a| a.starts_with('/')) else { return };
    let mut text = String::new();
    let pve = support::node::start_proxmox(&mut text, &Default::default());
    let mut file = std::fs::File::options().append(true).open(&path).expect("the configuration");
    file.write_all(text.as_bytes()).expect("the configuration");
    println!("{}", pve.url());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
