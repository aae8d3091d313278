//! Messages of the WebSocket subprotocols, binary and base64.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::cri::streaming::websocket::protocol::{PORT_FORWARD, REMOTE_COMMAND, Said};

fuzz_target!(|input: &[u8]| {
    for protocol in REMOTE_COMMAND.iter().chain(&PORT_FORWARD) {
        if let Some(Said::Data(channel, data)) = protocol.decode(Bytes::copy_from_slice(input)) {
            let again = protocol.encode(channel, &data).into_data();
            assert_eq!(protocol.decode(again), Some(Said::Data(channel, data)));
        }
    }
});
