//! Our own terminal while a container's is shown in it: raw, and its size told on.
//!
//! Given back as it was when [`Raw`] is dropped, also on the way out of a failure.

use std::io::IsTerminal;

use anyhow::{Context as _, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// stdin as a terminal that gives every key as it is.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Fails when stdin is no terminal.
    pub fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            bail!("-t: stdin is no terminal");
        }
        let before = tcgetattr(&stdin).context("the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("the terminal's settings")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Columns and rows of our terminal.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Finds the keys that detach from a container's terminal, Ctrl-P Ctrl-Q, in what is typed.
#[derive(Debug, Default)]
pub struct DetachKeys {
    half: bool,
}

impl DetachKeys {
    /// What is to be sent of `typed`, and whether the keys were pressed after it. A Ctrl-P waits for the next key.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        const FIRST: u8 = 0x10;
        const SECOND: u8 = 0x11;
        let mut send = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            if std::mem::take(&mut self.half) {
                if key == SECOND {
                    return (send, true);
                }
                send.push(FIRST);
            }
            if key == FIRST {
                self.half = true;
            } else {
                send.push(key);
            }
        }
        (send, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_detach() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(keys.filter(b"c\x10\x10"), (b"\x10c\x10".to_vec(), false));
        assert_eq!(keys.filter(b"\x11rest"), (b"".to_vec(), true));
        assert_eq!(DetachKeys::default().filter(b"\x11"), (b"\x11".to_vec(), false));
    }
}
