//! Named points at which a test may have the monitor killed; nothing in what is shipped (feature `failpoints`).
//!
//! As `src/utils/failpoint.rs` of the daemon: the file that `LXCRI_FAILPOINT_FILE` names says which point, at which hit,
//! and who dies with it. Nothing here can fail.

/// Kills the process here if a test says so.
#[macro_export]
macro_rules! fail_point {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::hit($name);
    };
}

/// What the macro calls.
#[cfg(feature = "failpoints")]
pub fn hit(name: &str) {
    use std::sync::{Mutex, PoisonError};

    use rustix::process::{Pid, Signal, getpid, kill_process};

    static HITS: Mutex<(String, u32)> = Mutex::new((String::new(), 0));
    let Some(file) = std::env::var_os("LXCRI_FAILPOINT_FILE") else { return };
    let Ok(text) = std::fs::read_to_string(&file) else { return };
    let mut words = text.split_whitespace();
    if words.next() != Some(name) {
        return;
    }
    let count: u32 = words.next().and_then(|n| n.parse().ok()).unwrap_or(1);
    let mut hits = HITS.lock().unwrap_or_else(PoisonError::into_inner);
    // Counted anew each time that a test writes the file.
    if hits.0 != text {
        *hits = (text.clone(), 0);
    }
    hits.1 += 1;
    if hits.1 != count || std::fs::remove_file(&file).is_err() {
        return;
    }
    for pid in words.filter_map(|w| w.parse().ok()).filter_map(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
    let _ = kill_process(getpid(), Signal::KILL);
    std::thread::park();
}
