//! CDI files, which device plugins write, and the names of devices in annotations.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::integrations::cdi::names::wanted;
use proxmox_lxcri::integrations::cdi::spec::parse;

fuzz_target!(|input: &str| {
    let _ = parse(input, true);
    let _ = parse(input, false);
    let devices: Vec<String> = input.lines().map(String::from).collect();
    let annotations = BTreeMap::from([("cdi.k8s.io/fuzz".to_owned(), input.to_owned())]);
    let _ = wanted(&devices, &annotations);
});
