//! `[handlers.HANDLER.policy]`: what every pod of a handler has to be like, and what it does not get, whatever its namespace admits.
//!
//! Asked by the engine before anything is made or changed, after the backend has added what its pods have by themselves. What
//! does not fit is refused with FailedPrecondition and the key that says so. Pure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::caps;
use super::error::{Error, Result};
use super::spec::{ContainerConfig, Profile, Resources, SandboxConfig};

/// The kernel's, where a container names a quota without its period, in microseconds.
const PERIOD: i64 = 100_000;
/// With less memory, in bytes, no program starts.
const LEAST: u64 = 1 << 20;
/// cgroup v2 files that are limits as well.
const LIMITS: [&str; 2] = ["memory.max", "cpu.max"];

/// One handler's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Pods have users of their own (`hostUsers: false`).
    pub require_user_namespace: bool,
    /// Containers have a seccomp profile.
    pub require_seccomp: bool,
    /// There are no privileged pods and containers.
    pub forbid_privileged: bool,
    /// Capabilities that no container has; one that asks for them is refused, and so is a privileged one.
    pub drop_capabilities: Vec<String>,
    /// Most memory of a container, in bytes; one without a limit is refused. 0: no such limit.
    pub max_memory: u64,
    /// Most CPUs of a container; one without a limit is refused. 0: no such limit.
    pub max_cpus: f64,
}

impl Policy {
    /// What makes no sense in it, with its key.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        for name in &self.drop_capabilities {
            if let Err(e) = caps::parse(name) {
                faults.push(("drop_capabilities", e.chain()));
            }
        }
        if (1..LEAST).contains(&self.max_memory) {
            faults.push(("max_memory", format!("is in bytes: with less than {LEAST} nothing starts")));
        }
        if !self.max_cpus.is_finite() || self.max_cpus < 0.0 {
            faults.push(("max_cpus", "is to be a number of CPUs, or 0".to_owned()));
        }
        faults
    }

    /// Refuses a pod that is not to be.
    pub fn check_pod(&self, handler: &str, pod: &SandboxConfig) -> Result<()> {
        let refused = |key: &str, why: &str| {
            let m = &pod.metadata;
            Err(Error::precondition(format!("pod {}/{}: {why} (handlers.{handler}.policy.{key})", m.namespace, m.name)))
        };
        if self.require_user_namespace && pod.security.namespaces.user.is_none() {
            return refused("require_user_namespace", "it has no user namespace (hostUsers: false)");
        }
        if self.forbid_privileged && pod.security.privileged {
            return refused("forbid_privileged", "it is privileged");
        }
        Ok(())
    }

    /// Refuses a container that is not to be, and takes from it what it is not to have.
    pub fn apply(&self, handler: &str, container: &mut ContainerConfig) -> Result<()> {
        let refused =
            |key: &str, why: String| Err(Error::precondition(format!("{why} (handlers.{handler}.policy.{key})")));
        let security = &mut container.security;
        if self.forbid_privileged && security.privileged {
            return refused("forbid_privileged", "it is privileged".into());
        }
        if self.require_seccomp && (security.privileged || security.seccomp == Profile::Unconfined) {
            return refused("require_seccomp", "it has no seccomp profile".into());
        }
        if !self.drop_capabilities.is_empty() {
            if security.privileged {
                return refused("drop_capabilities", "it is privileged, and so has every capability".into());
            }
            let dropped: Vec<_> = self.drop_capabilities.iter().map(|n| caps::parse(n)).collect::<Result<_>>()?;
            let asked = security.add_capabilities.iter().chain(&security.ambient_capabilities);
            if let Some(name) = asked.into_iter().find(|n| caps::parse(n).is_ok_and(|n| dropped.contains(&n))) {
                return refused("drop_capabilities", format!("it asks for the capability {name}"));
            }
            security.drop_capabilities.extend(self.drop_capabilities.iter().cloned());
        }
        self.check_limits(handler, &container.resources)
    }

    /// Refuses limits that are too high. `merged`: as they will be.
    pub fn check_limits(&self, handler: &str, merged: &Resources) -> Result<()> {
        let refused =
            |key: &str, why: String| Err(Error::precondition(format!("{why} (handlers.{handler}.policy.{key})")));
        for (key, on) in [("max_memory", self.max_memory > 0), ("max_cpus", self.max_cpus > 0.0)] {
            if let Some(file) = LIMITS.iter().find(|f| on && merged.unified.contains_key(**f)) {
                return refused(key, format!("it sets {file} by itself"));
            }
        }
        if self.max_memory > 0 && !(1..=self.max_memory).contains(&u64::try_from(merged.memory_limit).unwrap_or(0)) {
            let asked = if merged.memory_limit > 0 { merged.memory_limit.to_string() } else { "no".into() };
            return refused(
                "max_memory",
                format!("memory is limited to {} bytes, it has {asked} limit", self.max_memory),
            );
        }
        let period = if merged.cpu_period > 0 { merged.cpu_period } else { PERIOD };
        // Rounded by the kubelet to whole microseconds of a period.
        let cpus = merged.cpu_quota as f64 / period as f64;
        if self.max_cpus > 0.0 && (merged.cpu_quota <= 0 || cpus > self.max_cpus) {
            let asked = if merged.cpu_quota > 0 { cpus.to_string() } else { "no".into() };
            return refused("max_cpus", format!("CPUs are limited to {}, it has {asked} limit", self.max_cpus));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::spec::UserNamespace;

    fn why<T: std::fmt::Debug>(answer: Result<T>) -> String {
        answer.expect_err("refused").chain()
    }

    #[test]
    fn pods() {
        let policy = Policy { require_user_namespace: true, forbid_privileged: true, ..Policy::default() };
        let mut pod = SandboxConfig::default();
        assert!(why(policy.check_pod("crun", &pod)).contains("handlers.crun.policy.require_user_namespace"));
        pod.security.namespaces.user = Some(UserNamespace::default());
        policy.check_pod("crun", &pod).expect("as it is to be");
        pod.security.privileged = true;
        assert!(why(policy.check_pod("crun", &pod)).contains("handlers.crun.policy.forbid_privileged"));
        Policy::default().check_pod("crun", &pod).expect("nothing is asked for");
    }

    #[test]
    fn containers() {
        let policy = Policy {
            require_seccomp: true,
            drop_capabilities: vec!["NET_RAW".into()],
            max_memory: 1 << 20,
            max_cpus: 1.5,
            ..Policy::default()
        };
        let limits = Resources { memory_limit: 1 << 20, cpu_quota: 75_000, cpu_period: 50_000, ..Resources::default() };
        let mut good = ContainerConfig { resources: limits, ..ContainerConfig::default() };
        good.security.seccomp = Profile::RuntimeDefault;
        let mut made = good.clone();
        policy.apply("lxc", &mut made).expect("as it is to be");
        assert_eq!(made.security.drop_capabilities, ["NET_RAW"]);
        type Change = fn(&mut ContainerConfig);
        let changes: [(Change, &str); 9] = [
            (|c| c.security.seccomp = Profile::Unconfined, "require_seccomp"),
            (|c| c.security.privileged = true, "require_seccomp"),
            (|c| c.security.add_capabilities = vec!["cap_net_raw".into()], "the capability cap_net_raw"),
            (|c| c.security.ambient_capabilities = vec!["NET_RAW".into()], "drop_capabilities"),
            (|c| c.resources.memory_limit += 1, "it has 1048577 limit (handlers.lxc.policy.max_memory)"),
            (|c| c.resources.memory_limit = 0, "it has no limit (handlers.lxc.policy.max_memory)"),
            (|c| c.resources.cpu_quota = 75_001, "handlers.lxc.policy.max_cpus"),
            (|c| c.resources.cpu_quota = -1, "it has no limit (handlers.lxc.policy.max_cpus)"),
            (|c| drop(c.resources.unified.insert("memory.max".into(), "max".into())), "it sets memory.max"),
        ];
        for (change, expected) in changes {
            let mut container = good.clone();
            change(&mut container);
            let told = why(policy.apply("lxc", &mut container));
            assert!(told.contains(expected), "{told}");
        }
        good.security.add_capabilities = vec!["ALL".into()];
        policy.apply("lxc", &mut good).expect("all but what is dropped");
        Policy::default().apply("lxc", &mut ContainerConfig::default()).expect("nothing is asked for");
    }

    #[test]
    fn what_makes_no_sense() {
        let policy = Policy {
            drop_capabilities: vec!["NET_ROW".into()],
            max_memory: 512,
            max_cpus: f64::NAN,
            ..Policy::default()
        };
        let keys: Vec<_> = policy.faults().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["drop_capabilities", "max_memory", "max_cpus"]);
        assert_eq!(Policy::default().faults(), []);
    }
}
