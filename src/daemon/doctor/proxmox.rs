//! The Proxmox API: whether it answers, is who it should be, and lets us do what the handler needs; whether the clocks agree.

use super::Finding;
use crate::core::config::{Config, NetworkKind};
use crate::integrations::proxmox_api::{ApiError, ErrorKind, Need, Proxmox, needs};

/// How long after a look that has found a fault the next one is.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(60);
/// Seconds that clocks may be apart: tickets of Proxmox, and certificates that are just made, allow little more.
const APART: u64 = 60;

pub(super) async fn check(config: &Config) -> Vec<Finding> {
    if !config.proxmox.enabled() {
        return Vec::new();
    }
    let api = match Proxmox::new(&config.proxmox) {
        Ok(api) => api,
        Err(e) => {
            let advice =
                "deploy/proxmox/role.sh makes role and token; its secret goes into proxmox.token_file, mode 0600";
            return vec![Finding::fault("proxmox", e.chain(), advice)];
        }
    };
    let version = match api.version().await {
        Ok(version) => version,
        Err(e) => return vec![failure(&e)],
    };
    let mut all = Vec::new();
    match version.major() {
        Some(major) if major >= 8 => all.push(Finding::good("proxmox", format!("Proxmox VE {}", version.version))),
        _ => {
            let message = format!("Proxmox VE {} is not supported", version.version);
            return vec![Finding::fault("proxmox", message, "upgrade the node to Proxmox VE 8 or later")];
        }
    }
    match api.nodes().await {
        Ok(nodes) if nodes.iter().any(|n| n.node == api.node()) => {}
        Ok(nodes) => {
            let names: Vec<_> = nodes.into_iter().map(|n| n.node).collect();
            let message = format!("the cluster has no node {:?}, only {}", api.node(), names.join(", "));
            all.push(Finding::fault("proxmox", message, "say proxmox.node"));
        }
        Err(e) => all.push(failure(&e)),
    }
    all.extend(privileges(&api, config).await);
    all.push(clocks(api.clock_ahead()));
    all
}

fn failure(e: &ApiError) -> Finding {
    let advice = match e.kind() {
        ErrorKind::Certificate => {
            "compare with `pvenode cert info` on that node; if it is right: proxmox.fingerprint, or proxmox.ca_file (default \
             /etc/pve/pve-root-ca.pem)"
        }
        ErrorKind::Unreachable => "systemctl status pveproxy; proxmox.endpoints",
        ErrorKind::Auth => "pveum user token list; proxmox.token_id, and the secret in proxmox.token_file",
        _ => "pveversion -v; journalctl -u pveproxy -u pvedaemon",
    };
    Finding::fault("proxmox", e.to_string(), advice)
}

/// What the configured handlers need.
pub(in crate::daemon) fn configured(config: &Config) -> Vec<Need> {
    let (lxc, vm) = (&config.handlers.proxmox_lxc, &config.handlers.proxmox_vm);
    let mut all = Vec::new();
    if lxc.enabled {
        let bridges = match lxc.network.kind {
            NetworkKind::Pve => vec![lxc.network.bridge.clone()],
            NetworkKind::Cni => Vec::new(),
        };
        all.extend(needs(&lxc.pool, &[lxc.storage.clone(), lxc.template_storage.clone()], &bridges));
    }
    if vm.enabled {
        all.extend(needs(&vm.pool, std::slice::from_ref(&vm.storage), std::slice::from_ref(&vm.network.bridge)));
    }
    let mut seen = Vec::new();
    all.retain(|need: &Need| {
        let is_new = !seen.contains(need);
        seen.push(need.clone());
        is_new
    });
    all
}

/// Tells in the log, once each, what is not well, and looks again as long as that is so.
pub(in crate::daemon) async fn tell(config: Config) {
    let mut told = std::collections::BTreeSet::new();
    loop {
        let faults: Vec<Finding> =
            check(&config).await.into_iter().filter(|f| f.state == super::State::Fault).collect();
        for fault in &faults {
            if told.insert(fault.message.clone()) {
                tracing::warn!(advice = fault.advice, "Proxmox: {}", fault.message);
            }
        }
        if faults.is_empty() {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn privileges(api: &Proxmox, config: &Config) -> Vec<Finding> {
    let wanted = configured(config);
    if wanted.is_empty() {
        return Vec::new();
    }
    match api.lacking(&wanted).await {
        Ok(lacking) if lacking.is_empty() => vec![Finding::good("proxmox", "the token has every privilege that is needed")],
        Ok(lacking) => lacking
            .into_iter()
            .map(|need| {
                let message = format!("the token lacks {} on {}, which is needed {}", need.privilege, need.path, need.purpose);
                let advice = "deploy/proxmox/role.sh gives the role all that is needed; with privilege separation the token needs it, \
                              too (pveum acl list)";
                Finding::fault("proxmox", message, advice)
            })
            .collect(),
        Err(e) => vec![failure(&e)],
    }
}

/// The server's clock by its last answer. It may be this very machine, which costs nothing.
fn clocks(ahead: Option<i64>) -> Finding {
    let Some(apart) = ahead.map(i64::unsigned_abs) else {
        return Finding::warning("clock", "Proxmox does not say what time it is there", "systemctl status pveproxy");
    };
    if apart > APART {
        let message = format!("this clock and that of Proxmox are {apart} s apart");
        return Finding::fault("clock", message, "timedatectl on both; chronyc makestep on the one that is wrong");
    }
    Finding::good("clock", "agrees with that of Proxmox")
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn clocks_that_are_apart_are_a_fault_either_way() {
        let state = |ahead| clocks(ahead).state;
        assert_eq!([Some(0), Some(-60), Some(60)].map(state), [State::Good; 3]);
        assert_eq!([Some(61), Some(-3600)].map(state), [State::Fault; 2]);
        assert_eq!(state(None), State::Warning);
    }
}
