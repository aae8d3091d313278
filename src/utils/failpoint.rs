//! Named points at which a test may have the process killed, as a power cut or the OOM killer would.
//!
//! `fail_point!("zfs.layer.after_create")` is nothing unless the crate is built with the feature `failpoints`, which only
//! tests turn on. Then the variable `LXCRI_FAILPOINT` names the point (`name`, or `name:3` for its third hit) at which
//! the process kills itself with SIGKILL: no destructor runs, nothing is flushed. Or, for a process that goes on from test
//! to test, `LXCRI_FAILPOINT_FILE` names a file with `name hit [pid|monitors]...`: who else dies at that moment comes first,
//! and the file is removed as a sign that the point was met. Nothing here can fail.

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
    by_variable(name);
    by_file(name);
}

/// An I/O error instead of a death, at a point of which the file says `name 1 error`, for as long as it is there.
#[cfg(feature = "failpoints")]
pub fn io_error(name: &str) -> std::io::Result<()> {
    let text = std::env::var_os("LXCRI_FAILPOINT_FILE").and_then(|file| std::fs::read_to_string(file).ok());
    match text {
        Some(text) if text.split_whitespace().eq([name, "1", "error"]) => {
            Err(std::io::Error::from_raw_os_error(libc::EIO))
        }
        _ => Ok(()),
    }
}

#[cfg(feature = "failpoints")]
fn die() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    // The signal is delivered before this thread goes on; another one may have to be waited for.
    std::thread::park();
}

#[cfg(feature = "failpoints")]
fn by_variable(name: &str) {
    use std::sync::{Mutex, OnceLock, PoisonError};

    static WANTED: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static HITS: Mutex<u32> = Mutex::new(0);
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
    *hits += 1;
    if *hits == *count {
        die();
    }
}

#[cfg(feature = "failpoints")]
fn by_file(name: &str) {
    use rustix::process::{Pid, Signal, kill_process};
    use std::sync::{Mutex, PoisonError};

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
    for word in words {
        let pids = match word {
            "monitors" => monitors(),
            pid => pid.parse().into_iter().collect(),
        };
        for pid in pids.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    die();
}

/// All monitors of the machine, which is the test's own.
#[cfg(feature = "failpoints")]
fn monitors() -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::read(format!("/proc/{pid}/comm")).is_ok_and(|c| c == b"lxcri-monitor\n")).collect()
}
