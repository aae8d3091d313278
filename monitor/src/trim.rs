//! Gives the memory of this program's own code back while nothing happens.
//!
//! Called by [`crate::poll`] when the pod has been quiet for a while. Code is mapped from the program's file: the pages
//! stay in the page cache and come back by themselves, but they do not count for this process any more. With one
//! monitor on a node they are most of what it takes; with many they are shared anyway. Fails by doing nothing.
#![allow(unsafe_code)] // madvise

use std::io::BufRead;
use std::os::fd::BorrowedFd;

use rustix::event::epoll;
use rustix::mm::Advice;
use rustix::time::Timespec;

/// Where the program's code and constants are: start and length of each mapping, in bytes. Unused places are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Code {
    mappings: [(usize, usize); 4],
}

impl Code {
    /// Finds them in /proc/self/smaps.
    pub fn find() -> Self {
        let here = Self::find as fn() -> Self as usize;
        let file = std::fs::File::open("/proc/self/smaps");
        // Line by line through a small buffer: the heap shall not grow for this.
        file.map_or_else(|_| Self::default(), |f| parse(std::io::BufReader::with_capacity(512, f), here))
    }

    /// Gives them back and sleeps at once. Both in one function, so that little of it is back while we sleep.
    #[inline(never)]
    pub fn sleep<'a>(
        &self,
        epoll: BorrowedFd<'_>,
        events: &'a mut [std::mem::MaybeUninit<epoll::Event>],
        timeout: Option<&Timespec>,
    ) -> rustix::io::Result<&'a mut [epoll::Event]> {
        for (start, length) in self.mappings {
            if length > 0 {
                // SAFETY: the range is a mapping of the program's file that is not writable and in which no page
                // differs from the file's: all that is dropped is read again when it is needed.
                let _ = unsafe { rustix::mm::madvise(start as *mut _, length, Advice::LinuxDontNeed) };
            }
        }
        epoll::wait(epoll, events, timeout).map(|(ready, _)| ready)
    }
}

/// The mappings of the file that `address` is in, if they are not writable and have no pages of their own (those that
/// were relocated before they were made read-only do).
fn parse(smaps: impl BufRead, address: usize) -> Code {
    let mut found: Vec<(usize, usize, String)> = Vec::new();
    let mut path = None;
    let mut current = None;
    for line in smaps.lines().map_while(Result::ok) {
        if let Some((start, end, perms, file)) = header(&line) {
            if (start..end).contains(&address) && file.starts_with('/') {
                path = Some(file.to_owned());
            }
            current = (matches!(perms, "r-xp" | "r--p") && file.starts_with('/'))
                .then(|| (start, end - start, file.to_owned()));
        } else if let Some(kib) = line.strip_prefix("Anonymous:")
            && kib.trim() == "0 kB"
        {
            found.extend(current.take());
        }
    }
    let mut code = Code::default();
    let own = found.into_iter().filter(|(_, _, file)| Some(file) == path.as_ref());
    for (place, (start, length, _)) in code.mappings.iter_mut().zip(own) {
        *place = (start, length);
    }
    code
}

/// Start, end, permissions and file of a mapping, if the line begins one.
fn header(line: &str) -> Option<(usize, usize, &str, &str)> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let perms = fields.next()?;
    Some((start, end, perms, fields.nth(3)?.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_in_the_file() {
        let smaps = "00400000-00401000 r--p 00000000 fe:00 12     /x/y z\nSize: 4 kB\nAnonymous:             0 kB\n\
                     00401000-0048c000 r-xp 00001000 fe:00 12     /x/y z\nAnonymous:             0 kB\nVmFlags: rd\n\
                     0048c000-0048d000 r--p 00001000 fe:00 12     /x/y z\nAnonymous:             4 kB\n\
                     0048d000-0048e000 rw-p 00001000 fe:00 12     /x/y z\nAnonymous:             0 kB\n\
                     0048e000-0048f000 r-xp 00000000 00:00 0 \nAnonymous:             0 kB\n\
                     0048f000-00490000 r-xp 00000000 fe:00 13     /other\nAnonymous:             0 kB\n\nnonsense\n";
        let want = Code { mappings: [(0x400000, 0x1000), (0x401000, 0x8b000), (0, 0), (0, 0)] };
        assert_eq!(parse(smaps.as_bytes(), 0x401234), want);
        assert_eq!(parse(smaps.as_bytes(), 0x48e000), Code::default());
        assert_ne!(Code::find(), Code::default());
    }
}
