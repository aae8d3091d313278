//! SPDY frames, in pieces whose lengths come from the input: no panic, nothing held back beyond the longest control
//! frame, and what was parsed is written and parsed to the same again.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proxmox_lxcri::cri::streaming::spdy::frame::{Decoder, Event, HEADER, MAX_CONTROL, encode};

fuzz_target!(|input: &[u8]| {
    let (mut decoder, mut buffer, mut rest) = (Decoder::default(), BytesMut::new(), input);
    while let Some((length, tail)) = rest.split_first() {
        let n = usize::from(*length).min(tail.len());
        buffer.extend_from_slice(&tail[..n]);
        rest = &tail[n..];
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(Event::Control(control))) => {
                    let mut again = BytesMut::new();
                    encode(&control, &mut again);
                    let parsed = Decoder::default().next(&mut again).expect("our own frame");
                    assert_eq!(parsed, Some(Event::Control(control)));
                }
                Ok(Some(Event::Data { stream, .. })) => assert_ne!(stream, 0),
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(buffer.len() <= HEADER + MAX_CONTROL);
    }
});
