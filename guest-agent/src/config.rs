//! What the node tells a guest before there is a connection: text on a small disk.
//!
//! ```text
//! lxcri-guest 1
//! secret=<64 hexadecimal digits>
//! listen=0.0.0.0:10750
//! address=192.0.2.7/24        any number of these
//! gateway=192.0.2.1
//! ```
//! It ends at the first zero byte, or with the disk. Read by [`crate::init`]. Fails with the line, never with what is in it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use zeroize::Zeroizing;

/// So much of the disk is read, in bytes.
pub const MAX: u64 = 64 * 1024;
const FIRST: &str = "lxcri-guest 1";

/// The configuration.
#[derive(Clone, PartialEq, Eq)]
pub struct Config {
    /// What node and guest have in common.
    pub secret: Zeroizing<[u8; 32]>,
    /// Where the agent listens.
    pub listen: SocketAddr,
    /// `ADDRESS/PREFIX`.
    pub addresses: Vec<String>,
    /// Of default routes.
    pub gateways: Vec<String>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { secret: _, listen, addresses, gateways } = self;
        write!(f, "Config {{ {listen}, {addresses:?}, {gateways:?} }}")
    }
}

impl Config {
    /// Of a disk's first bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        let text = std::str::from_utf8(&bytes[..end]).map_err(|_| "not text")?;
        let mut lines = text.lines().enumerate();
        if lines.next().is_none_or(|(_, line)| line != FIRST) {
            return Err(format!("does not begin with {FIRST:?}"));
        }
        let (mut secret, mut listen, mut addresses, mut gateways) = (None, None, Vec::new(), Vec::new());
        for (number, line) in lines {
            let bad = |what: &str| format!("line {}: {what}", number + 1);
            let (key, value) = line.split_once('=').ok_or_else(|| bad("no key=value"))?;
            match key {
                "secret" => secret = Some(hexadecimal(value).ok_or_else(|| bad("not 64 hexadecimal digits"))?),
                "listen" => listen = Some(value.parse().map_err(|_| bad("not ADDRESS:PORT"))?),
                "address" => {
                    let parts = value
                        .split_once('/')
                        .and_then(|(a, n)| Some((a.parse::<IpAddr>().ok()?, n.parse::<u8>().ok()?)));
                    let fits = |(address, prefix): (IpAddr, u8)| prefix <= if address.is_ipv4() { 32 } else { 128 };
                    if !parts.is_some_and(fits) {
                        return Err(bad("not ADDRESS/PREFIX"));
                    }
                    addresses.push(value.to_owned());
                }
                "gateway" => {
                    value.parse::<IpAddr>().map_err(|_| bad("not an address"))?;
                    gateways.push(value.to_owned());
                }
                _ => return Err(bad("a key that this agent does not know")),
            }
        }
        Ok(Self { secret: secret.ok_or("no secret")?, listen: listen.ok_or("no listen")?, addresses, gateways })
    }
}

fn hexadecimal(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let mut bytes = Zeroizing::new([0; 32]);
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (place, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |b: u8| char::from(b).to_digit(16);
        *place = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_disk() {
        let secret = "ab".repeat(32);
        let good = format!(
            "lxcri-guest 1\nsecret={secret}\nlisten=0.0.0.0:10750\naddress=192.0.2.7/24\naddress=2001:db8::7/64\n\
                            gateway=192.0.2.1\n"
        );
        let mut disk = good.clone().into_bytes();
        disk.resize(4096, 0);
        let config = Config::parse(&disk).expect("a configuration");
        assert_eq!((*config.secret, config.listen.port(), config.addresses.len()), ([0xab; 32], 10750, 2));
        assert_eq!(config.gateways, ["192.0.2.1"]);
        assert!(!format!("{config:?}").contains("ab"), "{config:?}");
        for (from, to, why) in [
            ("lxcri-guest 1", "lxcri-guest 2", "does not begin"),
            (secret.as_str(), "ab", "line 2: not 64"),
            ("0.0.0.0:10750", "here", "line 3: not ADDRESS:PORT"),
            ("192.0.2.7/24", "192.0.2.7/33", "line 4: not ADDRESS/PREFIX"),
            ("192.0.2.1\n", "x; reboot\n", "line 6: not an address"),
            ("gateway", "else", "line 6: a key"),
            ("listen=0.0.0.0:10750\n", "", "no listen"),
        ] {
            let error = Config::parse(good.replace(from, to).as_bytes()).expect_err(to);
            assert!(error.contains(why) && !error.contains(&secret), "{error}");
        }
    }
}
