//! The daemon's memory: few arenas for its heap, and what a burst of work has needed given back to the kernel once it is over.
//!
//! glibc gives each thread an arena of its own and keeps what was freed; a daemon whose blocking threads come and go
//! would hold many times what it uses. Called by `main` and `daemon`; can't fail.
// Calls of the C library, for its allocator and for where the program is.
#![allow(unsafe_code)]

/// Sets the allocator up. To be called before any thread is started.
pub fn tune() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) changes a number inside the allocator; no thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives free memory back, and the mapping of code that ran: what is needed of it again comes out of the page cache. Takes a few
/// milliseconds on a large heap.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) locks the allocator's arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: the callback has the type that is asked for, and data is not used.
    unsafe {
        libc::dl_iterate_phdr(Some(unmap_code), std::ptr::null_mut());
    }
}

/// Of the program itself, which the loader lists first: code and constants, that are as the file has them.
///
/// # Safety
/// For dl_iterate_phdr(3) alone: `info` is valid, with as many headers as it says.
unsafe extern "C" fn unmap_code(info: *mut libc::dl_phdr_info, _: libc::size_t, _: *mut libc::c_void) -> libc::c_int {
    // SAFETY: by this function's contract.
    let (base, headers) = unsafe {
        let info = &*info;
        (info.dlpi_addr, std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)))
    };
    // SAFETY: sysconf(3) takes any number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs();
    for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
        let start = (base + header.p_vaddr) & !(page - 1);
        let length = base + header.p_vaddr + header.p_memsz - start;
        // SAFETY: a mapping of a file, private and never written: whoever touches it gets the same bytes again. Should the kernel
        // refuse it, nothing has changed.
        unsafe {
            libc::madvise(start as *mut libc::c_void, length as usize, libc::MADV_DONTNEED);
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of code and constants that this program has in memory.
    fn resident() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let mut counts = false;
        let mut sum = 0;
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            match (words.next(), words.next()) {
                (Some(range), Some(rights)) if range.contains('-') => {
                    counts = rights.starts_with("r-") && line.contains("proxmox_lxcri-");
                }
                (Some("Rss:"), Some(kib)) if counts => sum += kib.parse::<u64>().expect("a number"),
                _ => {}
            }
        }
        sum
    }

    /// In a process of its own: tests beside it need code.
    #[test]
    #[allow(clippy::disallowed_methods)] // the test itself, again
    fn code_that_is_not_needed_is_not_in_memory() {
        const ALONE: &str = "LXCRI_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let name = "utils::memory::tests::code_that_is_not_needed_is_not_in_memory";
            let this = std::env::current_exe().expect("this program");
            let again = std::process::Command::new(this).args(["--exact", name]).env(ALONE, "1").output();
            let again = again.expect("this program runs");
            assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
            return;
        }
        let before = resident();
        trim();
        let after = resident();
        assert!(after < before / 2, "{after} KiB of {before} KiB");
    }
}
