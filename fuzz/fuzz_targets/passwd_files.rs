//! /etc/passwd and /etc/group of an image, and the user that the image or a request names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::backends::oci::users::resolve;
use proxmox_lxcri::core::spec::ContainerSecurity;

fuzz_target!(|input: (&str, &str, &str, Option<i64>)| {
    let (user, passwd, group, number) = input;
    for request in [
        ContainerSecurity::default(),
        ContainerSecurity { run_as_user: number, run_as_group: number, ..Default::default() },
        ContainerSecurity { run_as_username: user.into(), ..Default::default() },
    ] {
        if let Ok(found) = resolve(&request, user, passwd, group) {
            assert!(found.uid <= i32::MAX as u32 && found.gid <= i32::MAX as u32);
        }
    }
});
