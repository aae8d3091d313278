//! Addresses of an interface inside a pinned network namespace.
//!
//! Called for pods whose network is set up by somebody else. Nothing is changed, nothing is left behind.
#![allow(unsafe_code)] // getifaddrs(3)

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use camino::Utf8Path;

use super::{NetnsError, in_netns};

/// Addresses of `interface` in the namespace pinned at `netns`, IPv4 first, without those of the link alone; None: it has no such
/// interface.
pub async fn addresses(netns: &Utf8Path, interface: &str) -> Result<Option<Vec<IpAddr>>, NetnsError> {
    let name = interface.to_owned();
    let read = in_netns(netns, move || read(&name)).await?;
    read.map_err(|e| NetnsError::system(format!("read the addresses of {interface} in {netns}"), e))
}

/// Of the calling thread's namespace.
fn read(interface: &str) -> io::Result<Option<Vec<IpAddr>>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` is a valid place for the result.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (mut there, mut found, mut at) = (false, Vec::new(), list);
    while !at.is_null() {
        // SAFETY: a node of the list, which is freed below and not before.
        let node = unsafe { &*at };
        // SAFETY: its name is a string that lives as long as the list.
        if unsafe { CStr::from_ptr(node.ifa_name) }.to_bytes() == interface.as_bytes() {
            there = true;
            // SAFETY: null, or an address of the list.
            found.extend(unsafe { address(node.ifa_addr) });
        }
        at = node.ifa_next;
    }
    // SAFETY: the list came from getifaddrs and is used no more.
    unsafe { libc::freeifaddrs(list) };
    found.retain(|a| !is_of_the_link(a));
    found.sort_by_key(IpAddr::is_ipv6);
    Ok(there.then_some(found))
}

fn is_of_the_link(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// # Safety
/// `at` is null or points to a socket address whose family says what it is.
unsafe fn address(at: *const libc::sockaddr) -> Option<IpAddr> {
    if at.is_null() {
        return None;
    }
    // SAFETY: as the caller says; only the fields of the family that is there are read.
    unsafe {
        match i32::from((*at).sa_family) {
            libc::AF_INET => {
                let v4 = at.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                Some(Ipv6Addr::from(at.cast::<libc::sockaddr_in6>().read_unaligned().sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_has_its_own() {
        let lo = read("lo").expect("addresses").expect("lo");
        assert_eq!(lo.first(), Some(&Ipv4Addr::LOCALHOST.into()));
        assert_eq!(read("nosuch0").expect("no failure"), None);
    }
}
