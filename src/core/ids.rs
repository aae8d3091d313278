//! Identities, parsed once at the edge: pods and containers (64 hexadecimal digits) and content digests.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

macro_rules! hex_id {
    ($name:ident, $what:literal) => {
        #[doc = concat!("Id of a ", $what, ": 64 lower-case hexadecimal digits, random.")]
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// A new random id.
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple()).into())
            }
            /// The 64 digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }
            /// The first 13 digits, as crictl shows them.
            pub fn short(&self) -> &str {
                &self.0[..13]
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                if s.len() == 64 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                    Ok(Self(s.into()))
                } else {
                    Err(Error::invalid(format!(concat!("{:?} is not the id of a ", $what), s)))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(s: String) -> Result<Self> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

hex_id!(PodId, "pod sandbox");
hex_id!(ContainerId, "container");

/// A sha256 digest, written `sha256:<64 hex digits>`: of a blob, a manifest, an uncompressed layer
/// (diff id), a chain of layers (chain id) or a config (image id).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(Box<str>);

impl Digest {
    /// From the 32 bytes of a sha256 sum.
    pub fn from_sha256(sum: &[u8; 32]) -> Self {
        use std::fmt::Write as _;
        let mut s = String::with_capacity(71);
        s.push_str("sha256:");
        for b in sum {
            let _ = write!(s, "{b:02x}");
        }
        Self(s.into())
    }
    /// `sha256:<hex>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The 64 hexadecimal digits alone.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl FromStr for Digest {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s.strip_prefix("sha256:") {
            Some(h) if h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) => Ok(Self(s.into())),
            _ => Err(Error::invalid(format!("{s:?} is not a sha256 digest"))),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> String {
        d.0.into()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_64_hex_digits() {
        let id = PodId::new();
        assert_eq!(id.as_str().parse::<PodId>().expect("own id"), id);
        for bad in ["", "abc", &"A".repeat(64), &"../".repeat(22), &"0".repeat(65)] {
            assert!(bad.parse::<PodId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_need_their_algorithm() {
        let d = Digest::from_sha256(&[0xab; 32]);
        assert_eq!(d.hex(), "ab".repeat(32));
        assert!(d.hex().parse::<Digest>().is_err());
        assert_eq!(d.as_str().parse::<Digest>().expect("own digest"), d);
    }
}
