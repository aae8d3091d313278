//! How a process of a container is to be: everything that liblxc does not set, or not in all its versions.
//!
//! Written by the daemon into a file that only root reads (environment values may be secrets), read once by whoever
//! becomes the process. The format is `key NUL value NUL` again and again: nothing in a value can be taken for a key,
//! because what has a NUL in it can't be written. Both sides are of one build; what does not fit is an error.

use std::fmt;

use crate::foreign::Architectures;

/// A soft and a hard limit of a resource, by its number (setrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// RLIMIT_*.
    pub resource: u32,
    /// Soft.
    pub soft: u64,
    /// Hard.
    pub hard: u64,
}

/// A device node to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Absolute, in the container.
    pub path: String,
    /// S_IFCHR, S_IFBLK or S_IFIFO, and permissions.
    pub mode: u32,
    /// Number.
    pub major: u32,
    /// Number.
    pub minor: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The process.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Program and arguments.
    pub args: Vec<String>,
    /// KEY=value.
    pub env: Vec<String>,
    /// Working directory, made if it is not there.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capabilities, a bit each.
    pub bounding: u64,
    /// Permitted and effective.
    pub permitted: u64,
    /// Inheritable.
    pub inheritable: u64,
    /// Ambient.
    pub ambient: u64,
    /// prctl(PR_SET_NO_NEW_PRIVS).
    pub no_new_privs: bool,
    /// Whose system calls its seccomp profile lets in.
    pub architectures: Architectures,
    /// Limits.
    pub limits: Vec<Limit>,
    /// /proc/self/oom_score_adj.
    pub oom_score_adj: Option<i32>,
    /// Profile from exec on.
    pub apparmor: Option<String>,
    /// Label from exec on.
    pub selinux: Option<String>,
    /// Gets a terminal of its own for its three streams.
    pub terminal: bool,
    /// Device nodes.
    pub nodes: Vec<Node>,
}

// Arguments and environment may be secrets.
impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan").field("uid", &self.uid).field("terminal", &self.terminal).finish_non_exhaustive()
    }
}

impl Plan {
    /// As bytes; an error names the field that has a NUL in it.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        let mut put = |key: &str, value: &str| {
            if value.contains('\0') {
                return Err(format!("{key}: a NUL is in it"));
            }
            out.extend_from_slice(key.as_bytes());
            out.push(0);
            out.extend_from_slice(value.as_bytes());
            out.push(0);
            Ok(())
        };
        for arg in &self.args {
            put("arg", arg)?;
        }
        for line in &self.env {
            put("env", line)?;
        }
        put("cwd", &self.cwd)?;
        put("uid", &self.uid.to_string())?;
        put("gid", &self.gid.to_string())?;
        for group in &self.groups {
            put("group", &group.to_string())?;
        }
        put("bounding", &self.bounding.to_string())?;
        put("permitted", &self.permitted.to_string())?;
        put("inheritable", &self.inheritable.to_string())?;
        put("ambient", &self.ambient.to_string())?;
        put("no_new_privs", if self.no_new_privs { "1" } else { "0" })?;
        if let Architectures::Some { compat, x32 } = self.architectures {
            put("architectures", &format!("{} {}", u8::from(compat), u8::from(x32)))?;
        }
        for limit in &self.limits {
            put("limit", &format!("{} {} {}", limit.resource, limit.soft, limit.hard))?;
        }
        if let Some(score) = self.oom_score_adj {
            put("oom_score_adj", &score.to_string())?;
        }
        if let Some(profile) = &self.apparmor {
            put("apparmor", profile)?;
        }
        if let Some(label) = &self.selinux {
            put("selinux", label)?;
        }
        put("terminal", if self.terminal { "1" } else { "0" })?;
        for n in &self.nodes {
            put("node", &format!("{} {} {} {} {} {}", n.mode, n.major, n.minor, n.uid, n.gid, n.path))?;
        }
        Ok(out)
    }

    /// What [`Plan::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|e| format!("the plan: {e}"))?;
        let text = text.strip_suffix('\0').ok_or("the plan is cut off")?;
        let mut words = text.split('\0');
        let mut plan = Self::default();
        while let Some(key) = words.next() {
            let value = words.next().ok_or_else(|| format!("the plan: {key} has no value"))?;
            plan.take(key, value).ok_or_else(|| format!("the plan: {key} does not fit"))?;
        }
        Ok(plan)
    }

    fn take(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "arg" => self.args.push(value.to_owned()),
            "env" => self.env.push(value.to_owned()),
            "cwd" => self.cwd = value.to_owned(),
            "uid" => self.uid = value.parse().ok()?,
            "gid" => self.gid = value.parse().ok()?,
            "group" => self.groups.push(value.parse().ok()?),
            "bounding" => self.bounding = value.parse().ok()?,
            "permitted" => self.permitted = value.parse().ok()?,
            "inheritable" => self.inheritable = value.parse().ok()?,
            "ambient" => self.ambient = value.parse().ok()?,
            "no_new_privs" => self.no_new_privs = value == "1",
            "architectures" => {
                let (compat, x32) = value.split_once(' ')?;
                self.architectures = Architectures::Some { compat: compat == "1", x32: x32 == "1" };
            }
            "limit" => {
                let mut words = value.split(' ');
                let resource = words.next()?.parse().ok()?;
                let (soft, hard) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
                self.limits.push(Limit { resource, soft, hard });
            }
            "oom_score_adj" => self.oom_score_adj = Some(value.parse().ok()?),
            "apparmor" => self.apparmor = Some(value.to_owned()),
            "selinux" => self.selinux = Some(value.to_owned()),
            "terminal" => self.terminal = value == "1",
            "node" => {
                let mut words = value.splitn(6, ' ');
                let mut number = || words.next()?.parse().ok();
                let (mode, major, minor, uid, gid) = (number()?, number()?, number()?, number()?, number()?);
                self.nodes.push(Node { path: words.next()?.to_owned(), mode, major, minor, uid, gid });
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            args in prop::collection::vec("[^\0]*", 0..4),
            env in prop::collection::vec("[^\0]*", 0..4),
            path in "[^\0]*",
            numbers in any::<(u32, u32, u64, u64, i32, bool)>(),
        ) {
            let (uid, gid, bounding, ambient, score, flag) = numbers;
            let plan = Plan {
                args, env, cwd: path.clone(), uid, gid, groups: vec![gid, uid], bounding, ambient,
                permitted: bounding, inheritable: ambient, no_new_privs: flag, terminal: !flag,
                architectures: Architectures::Some { compat: flag, x32: uid % 2 == 0 },
                limits: vec![Limit { resource: uid, soft: bounding, hard: ambient }],
                oom_score_adj: Some(score), apparmor: Some(path.clone()), selinux: flag.then(|| path.clone()),
                nodes: vec![Node { path, mode: uid, major: gid, minor: uid, uid, gid }],
            };
            prop_assert!(Plan::decode(&plan.encode().unwrap()).unwrap() == plan);
        }

        #[test]
        fn anything_else_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Plan::decode(&bytes);
        }
    }

    #[test]
    fn a_nul_is_refused() {
        let plan = Plan { args: vec!["a\0uid\x000".into()], ..Plan::default() };
        assert!(plan.encode().unwrap_err().contains("arg"));
    }
}
