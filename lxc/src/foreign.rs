//! System calls of other architectures, for processes under a seccomp profile that does not name those.
//!
//! liblxc's policies let in all architectures that the machine can run: what they don't deny there by name has their default
//! action. libseccomp ends whoever makes a call of one that is not in the profile, and so does the small filter here, which is
//! put beside liblxc's. Called by processes that become a container's, while they may; what it fails by is the kernel's reason.
#![allow(unsafe_code)] // prctl

use std::io;

/// Whose system calls are let in, beside the machine's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Architectures {
    /// There is no profile, or no need to ask.
    #[default]
    All,
    /// These.
    Some {
        /// The one of 32 bits: i386, arm.
        compat: bool,
        /// x32 of amd64.
        x32: bool,
    },
}

#[cfg(target_arch = "x86_64")]
mod machine {
    pub const OWN: u32 = 0xc000_003e;
    pub const COMPAT: u32 = 0x4000_0003;
    /// Numbers from here on are x32's.
    pub const X32: Option<u32> = Some(0x4000_0000);
}

#[cfg(target_arch = "aarch64")]
mod machine {
    pub const OWN: u32 = 0xc000_00b7;
    pub const COMPAT: u32 = 0x4000_0028;
    pub const X32: Option<u32> = None;
}

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// The filter; None: there is nothing that it would have to do.
fn filter(which: Architectures) -> Option<Vec<libc::sock_filter>> {
    let Architectures::Some { compat, x32 } = which else { return None };
    let closes_x32 = machine::X32.filter(|_| !x32);
    if compat && closes_x32.is_none() {
        return None;
    }
    let one = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |offset| one(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let equal = |k, jt, jf| one(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k);
    let give = |k| one(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let (good, bad) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_KILL_THREAD);
    Some(vec![
        load(ARCHITECTURE),
        equal(machine::OWN, 2, 0),
        equal(machine::COMPAT, 0, 5),
        give(if compat { good } else { bad }),
        load(NUMBER),
        // Whoever traces a process may have a call left out by the number -1.
        equal(u32::MAX, 1, 0),
        one(
            libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K,
            u8::from(closes_x32.is_some()),
            0,
            machine::X32.unwrap_or(u32::MAX),
        ),
        give(good),
        give(bad),
    ])
}

/// Puts it over this process, which has CAP_SYS_ADMIN in its user namespace still.
pub fn close(which: Architectures) -> io::Result<()> {
    filter(which).map_or(Ok(()), |filter| set_filter(&filter))
}

/// Puts a filter over this process, which has CAP_SYS_ADMIN in its user namespace or can get no new privileges.
pub fn set_filter(filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and its filter outlive the call, which copies them.
    let done = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER as libc::c_ulong, &raw const program, 0, 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with it.
    fn verdict(which: Architectures, arch: u32, number: u32) -> u32 {
        let Some(filter) = filter(which) else { return libc::SECCOMP_RET_ALLOW };
        let (mut at, mut value) = (0, 0);
        loop {
            let one = &filter[at];
            at += 1;
            let jump = |yes| usize::from(if yes { one.jt } else { one.jf });
            match u32::from(one.code) {
                0x20 => value = if one.k == ARCHITECTURE { arch } else { number },
                0x15 => at += jump(value == one.k),
                0x35 => at += jump(value >= one.k),
                0x06 => return one.k,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn what_is_not_named_is_killed() {
        let (good, bad) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_KILL_THREAD);
        for (compat, x32) in [(false, false), (true, false), (false, true), (true, true)] {
            let which = Architectures::Some { compat, x32 };
            assert_eq!(verdict(which, machine::OWN, 1), good);
            assert_eq!(verdict(which, machine::OWN, u32::MAX), good);
            assert_eq!(verdict(which, machine::COMPAT, 102), if compat { good } else { bad });
            if let Some(first) = machine::X32 {
                assert_eq!(verdict(which, machine::OWN, first + 1), if x32 { good } else { bad });
            }
            assert_eq!(verdict(which, 8, 1), if filter(which).is_some() { bad } else { good });
        }
        assert!(filter(Architectures::All).is_none());
    }
}
