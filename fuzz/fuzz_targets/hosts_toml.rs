//! hosts.toml, for a name with a port and one without: the hosts that come out can be asked.
#![no_main]

use camino::Utf8Path;
use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::core::reference::Reference;
use proxmox_lxcri::integrations::registry::hosts::parse;

fuzz_target!(|input: &str| {
    for name in ["registry.example/a/b:1", "localhost:5000/x", "busybox"] {
        let reference = Reference::parse(name, "docker.io").expect("a name");
        if let Ok(hosts) = parse(Utf8Path::new("/etc/certs.d/x/hosts.toml"), input, &reference) {
            for host in hosts {
                assert!(!host.name().is_empty() && matches!(host.base.scheme(), "http" | "https"));
            }
        }
    }
});
