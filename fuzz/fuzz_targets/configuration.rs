//! The node's configuration: what is taken is written and taken to be the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::core::config::Config;

fuzz_target!(|input: &str| {
    let Ok(config) = Config::parse(input, "fuzz") else { return };
    let text = toml::to_string(&config).expect("a configuration as text");
    assert_eq!(Config::parse(&text, "again").expect("our own text"), config);
});
