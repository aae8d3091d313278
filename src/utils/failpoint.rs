//! Named points at which a test may have the process killed, as a power cut or the OOM killer would.
//!
//! `fail_point!("zfs.layer.after_create")` is nothing unless the crate is built with the feature `failpoints`, which only
//! tests turn on. Then the variable `LXCRI_FAILPOINT` names the point (`name`, or `name:3` for its third hit) at which
//! the process kills itself with SIGKILL: no destructor runs, nothing is flushed. Nothing here can fail.

/// Kills the process here if a test says so; see [`crate::utils::failpoint`].
#[macro_export]
macro_rules! fail_point {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::utils::failpoint::hit($name);
    };
}

/// What the macro calls.
#[cfg(feature = "failpoints")]
pub fn hit(name: &str) {
    use std::collections::HashMap;
    use std::sync::{Mutex, OnceLock, PoisonError};

    static WANTED: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static HITS: Mutex<Option<HashMap<String, u32>>> = Mutex::new(None);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("LXCRI_FAILPOINT").ok()?;
        Some(match text.rsplit_once(':').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?))) {
            Some(counted) => counted,
            None => (text, 1),
        })
    });
    let Some((point, count)) = wanted else { return };
    if point != name {
        return;
    }
    let mut hits = HITS.lock().unwrap_or_else(PoisonError::into_inner);
    let hits = hits.get_or_insert_default().entry(name.to_owned()).or_default();
    *hits += 1;
    if *hits == *count {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal is delivered before this thread goes on; another one may have to be waited for.
        std::thread::park();
    }
}
