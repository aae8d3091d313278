//! SELinux labels from the parts that a request gives. Pure.
//!
//! On a node without SELinux what says nothing beyond the defaults, or wants to be left alone (`spc_t`), is met anyway;
//! a demand for a domain or for categories is refused by name.

use crate::core::error::{Error, Result};
use crate::core::spec::SelinuxOptions;

/// A container that SELinux does not confine.
const UNCONFINED: [&str; 2] = ["spc_t", "unconfined_t"];
/// What containers get when nothing is asked for.
const DEFAULT: &str = "container_t";

/// Labels of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Of its processes.
    pub process: String,
    /// Of its files.
    pub mount: String,
}

/// The container's labels; None: it gets none.
pub fn labels(asked: Option<&SelinuxOptions>, enabled: bool) -> Result<Option<Labels>> {
    let Some(asked) = asked.filter(|o| **o != SelinuxOptions::default()) else { return Ok(None) };
    for part in [&asked.user, &asked.role, &asked.kind, &asked.level] {
        if part.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Error::invalid(format!("SELinux label part {part:?} has white space in it")));
        }
    }
    for part in [&asked.user, &asked.role, &asked.kind] {
        if part.contains(':') {
            return Err(Error::invalid(format!("SELinux label part {part:?} has a colon in it")));
        }
    }
    if !enabled {
        let confined = asked.kind != DEFAULT && !asked.kind.is_empty() && !UNCONFINED.contains(&asked.kind.as_str());
        let level = !is_unconfined(asked) && !matches!(asked.level.as_str(), "" | "s0" | "s0-s0:c0.c1023");
        return match (confined, level) {
            (true, _) => Err(refused("type", &asked.kind)),
            (_, true) => Err(refused("level", &asked.level)),
            _ => Ok(None),
        };
    }
    let or = |part: &str, default: &str| if part.is_empty() { default.to_owned() } else { part.to_owned() };
    let (user, level) = (or(&asked.user, "system_u"), or(&asked.level, "s0"));
    Ok(Some(Labels {
        process: format!("{user}:{}:{}:{level}", or(&asked.role, "system_r"), or(&asked.kind, DEFAULT)),
        mount: format!("{user}:object_r:container_file_t:{level}"),
    }))
}

/// Whether files need no label for the container to reach them.
pub fn is_unconfined(asked: &SelinuxOptions) -> bool {
    UNCONFINED.contains(&asked.kind.as_str())
}

fn refused(part: &str, value: &str) -> Error {
    Error::precondition(format!("SELinux {part} {value:?} is asked for, but this kernel has SELinux off"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::error::Kind;

    fn of(kind: &str, level: &str) -> SelinuxOptions {
        SelinuxOptions { kind: kind.into(), level: level.into(), ..Default::default() }
    }

    #[test]
    fn without_selinux_only_a_real_demand_is_refused() {
        for fits in [of("", ""), of("spc_t", ""), of("spc_t", "s0:c1,c2"), of("container_t", "s0"), of("", "s0")] {
            assert_eq!(labels(Some(&fits), false).expect("fits"), None, "{fits:?}");
        }
        for (asked, word) in [(of("my_t", ""), "my_t"), (of("", "s0:c1,c2"), "s0:c1,c2")] {
            let e = labels(Some(&asked), false).expect_err("refused");
            assert!(e.kind() == Kind::FailedPrecondition && e.chain().contains(word), "{}", e.chain());
        }
    }

    #[test]
    fn missing_parts_have_defaults() {
        let l = labels(Some(&of("", "s0:c1,c2")), true).expect("fits").expect("labels");
        assert_eq!(l.process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(l.mount, "system_u:object_r:container_file_t:s0:c1,c2");
        assert_eq!(labels(None, true).expect("fits"), None);
        for bad in [of("a:b", ""), of("a b", ""), of("", "s0\n")] {
            assert_eq!(labels(Some(&bad), true).expect_err("refused").kind(), Kind::InvalidArgument);
        }
    }
}
