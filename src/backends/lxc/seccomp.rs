//! Seccomp profiles of OCI in liblxc's words (its version 2 of a policy).
//!
//! Pure. liblxc knows allow, errno, kill (of the thread) and trap, by name and with arguments compared; what else a profile
//! asks for is refused by name. Its rules hold for all architectures that the machine can run, which it always lets in with the
//! default action; those that the profile does not name are closed by the container's first process ([`architectures`]).

use std::fmt::Write;

use lxcri_lxc::foreign::Architectures;
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall};

use super::lines::is_key;
use crate::core::error::{Error, Kind, Result};

/// EPERM, which profiles mean by an errno without a number.
const EPERM: u32 = libc::EPERM as u32;

/// What liblxc and the container's first process do before they become the program, and can't tell that it failed.
const NEEDED: [&str; 3] = ["execve", "read", "write"];

/// Whether a call gets through, with some arguments at least.
fn lets(profile: &LinuxSeccomp, default: &str, call: &str) -> bool {
    let allow = |rule: &LinuxSyscall| rule.action() == LinuxSeccompAction::ScmpActAllow;
    let of_call = |rule: &&LinuxSyscall| rule.names().iter().any(|n| n == call);
    let mut rules = profile.syscalls().iter().flatten().filter(of_call);
    match default {
        "allow" => rules.all(|rule| allow(rule) || rule.args().as_ref().is_some_and(|args| !args.is_empty())),
        _ => rules.any(allow),
    }
}

/// The policy.
pub fn policy(profile: &LinuxSeccomp) -> Result<String> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    if profile.listener_path().is_some() {
        return Err(unknown("listenerPath"));
    }
    if profile.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(unknown("flags"));
    }
    let style = if default == "allow" { "denylist" } else { "allowlist" };
    // In force before the first process becomes the program.
    if let Some(call) = NEEDED.iter().find(|call| !lets(profile, &default, call)) {
        return Err(Error::invalid(format!(
            "seccomp profile: it does not allow {call}, without which no program can be run under it"
        )));
    }
    let mut text = format!("2\n{style} {default}\n[all]\n");
    for call in profile.syscalls().iter().flatten() {
        let verdict = action(call.action(), call.errno_ret())?;
        // The library refuses a rule that changes nothing.
        if verdict != default {
            rules(call, &verdict, &mut text)?;
        }
    }
    Ok(text)
}

/// Whose system calls a process under the profile may make: the machine's own always, as libseccomp has it, others by name.
pub fn architectures(profile: &LinuxSeccomp) -> Architectures {
    let named = |arch| profile.architectures().iter().flatten().any(|a| *a == arch);
    if cfg!(target_arch = "aarch64") {
        Architectures::Some { compat: named(Arch::ScmpArchArm), x32: false }
    } else {
        Architectures::Some { compat: named(Arch::ScmpArchX86), x32: named(Arch::ScmpArchX32) }
    }
}

fn rules(call: &LinuxSyscall, verdict: &str, text: &mut String) -> Result<()> {
    let args = call.args().as_deref().unwrap_or_default();
    // Several conditions on one argument are alternatives, as libseccomp can't have them together.
    let one_each = (0..6).all(|i| args.iter().filter(|a| a.index() == i).count() <= 1);
    for name in call.names() {
        if !is_key(name) {
            return Err(Error::invalid(format!("seccomp profile: {name:?} is no system call")));
        }
        if one_each {
            let all = args.iter().map(condition).collect::<Result<String>>()?;
            let _ = writeln!(text, "{name} {verdict}{all}");
        } else {
            for arg in args {
                let _ = writeln!(text, "{name} {verdict}{}", condition(arg)?);
            }
        }
    }
    Ok(())
}

fn condition(arg: &LinuxSeccompArg) -> Result<String> {
    if arg.index() > 5 {
        return Err(Error::invalid(format!("seccomp profile: a system call has no argument {}", arg.index())));
    }
    let (index, value) = (arg.index(), arg.value());
    let word = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => "SCMP_CMP_NE",
        LinuxSeccompOperator::ScmpCmpLt => "SCMP_CMP_LT",
        LinuxSeccompOperator::ScmpCmpLe => "SCMP_CMP_LE",
        LinuxSeccompOperator::ScmpCmpEq => "SCMP_CMP_EQ",
        LinuxSeccompOperator::ScmpCmpGe => "SCMP_CMP_GE",
        LinuxSeccompOperator::ScmpCmpGt => "SCMP_CMP_GT",
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // Here the value is the mask and the second one what is left of the argument.
            return Ok(format!(" [{index},{},SCMP_CMP_MASKED_EQ,{value}]", arg.value_two().unwrap_or(0)));
        }
    };
    Ok(format!(" [{index},{value},{word}]"))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<String> {
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => "allow".into(),
        LinuxSeccompAction::ScmpActErrno => format!("errno {}", errno.unwrap_or(EPERM)),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => "kill".into(),
        LinuxSeccompAction::ScmpActTrap => "trap".into(),
        LinuxSeccompAction::ScmpActKillProcess => return Err(unknown("SCMP_ACT_KILL_PROCESS")),
        LinuxSeccompAction::ScmpActNotify => return Err(unknown("SCMP_ACT_NOTIFY")),
        LinuxSeccompAction::ScmpActTrace => return Err(unknown("SCMP_ACT_TRACE")),
        LinuxSeccompAction::ScmpActLog => return Err(unknown("SCMP_ACT_LOG")),
    })
}

fn unknown(what: &str) -> Error {
    Error::new(Kind::Unimplemented, format!("seccomp profile: liblxc has no word for {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::oci::seccomp;
    use crate::core::caps::CapSet;

    fn of(json: &str) -> Result<String> {
        policy(&seccomp::parse(json, "test").expect("JSON"))
    }

    #[test]
    fn a_profile_of_every_kind() {
        let text =
            of(r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
              {"names": ["execve", "read", "write"], "action": "SCMP_ACT_ALLOW"},
              {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
              {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
              {"names": ["kill"], "action": "SCMP_ACT_KILL"},
              {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
               "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
              {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
               "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}, {"index": 1, "value": 3, "op": "SCMP_CMP_LT"}]},
              {"names": ["personality"], "action": "SCMP_ACT_TRAP",
               "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
            ]}"#)
            .expect("fits");
        assert_eq!(
            text,
            "2\nallowlist errno 38\n[all]\nexecve allow\nread allow\nwrite allow\nchmod errno 1\nkill kill\n\
             clone allow [0,0,SCMP_CMP_MASKED_EQ,2114060288]\n\
             socket allow [0,40,SCMP_CMP_NE] [1,3,SCMP_CMP_LT]\n\
             personality trap [0,0,SCMP_CMP_EQ]\npersonality trap [0,8,SCMP_CMP_EQ]\n"
        );
        let deny = of(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]}"#,
        );
        assert_eq!(deny.expect("fits"), "2\ndenylist allow\n[all]\nchmod errno 1\n");
    }

    #[test]
    fn what_liblxc_lacks_is_named() {
        for (action, word) in [("SCMP_ACT_LOG", "LOG"), ("SCMP_ACT_TRACE", "TRACE"), ("SCMP_ACT_NOTIFY", "NOTIFY")] {
            let e = of(&format!(r#"{{"defaultAction": "{action}"}}"#)).expect_err(action);
            assert!(e.kind() == Kind::Unimplemented && e.chain().contains(word), "{e:?}");
        }
        let e =
            of(r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}"#);
        let e = e.expect_err("nothing can be executed");
        assert!(e.kind() == Kind::InvalidArgument && e.chain().contains("execve"), "{e:?}");
        let e = of(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["close", "read"], "action": "SCMP_ACT_ERRNO"}]}"#,
        );
        assert!(e.expect_err("the first process could not read its plan").chain().contains("does not allow read"));
        let e = of(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a\nb kill"], "action": "SCMP_ACT_KILL"}]}"#,
        );
        assert_eq!(e.expect_err("forged").kind(), Kind::InvalidArgument);
    }

    #[test]
    fn other_architectures_are_those_that_are_named() {
        let of = |list: &str| {
            let text = format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW" {list}}}"#);
            architectures(&seccomp::parse(&text, "test").expect("JSON"))
        };
        let (compat, own) = if cfg!(target_arch = "aarch64") { ("ARM", "AARCH64") } else { ("X86", "X86_64") };
        let none = Architectures::Some { compat: false, x32: false };
        assert_eq!(of(""), none);
        assert_eq!(of(r#", "architectures": []"#), none);
        assert_eq!(of(&format!(r#", "architectures": ["SCMP_ARCH_{own}"]"#)), none);
        let both = of(&format!(r#", "architectures": ["SCMP_ARCH_{own}", "SCMP_ARCH_{compat}"]"#));
        assert_eq!(both, Architectures::Some { compat: true, x32: false });
        let ours = architectures(&seccomp::runtime_default(CapSet::default()).expect("profile"));
        assert_eq!(ours, Architectures::Some { compat: true, x32: cfg!(target_arch = "x86_64") });
    }

    #[test]
    fn our_own_profile_fits() {
        for caps in [CapSet::default(), CapSet::ALL] {
            let text = policy(&seccomp::runtime_default(caps).expect("profile")).expect("fits");
            assert!(text.contains("\nexecve allow\n"), "{text}");
        }
    }
}
