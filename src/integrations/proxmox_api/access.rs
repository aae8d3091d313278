//! What the token may do: asked at the start, so that what is missing is told by privilege and path, not call by call.
//!
//! [`needs`] is pure and says what each privilege is for; `docs/proxmox.md` and `deploy/proxmox/role.sh` follow it.

use std::collections::BTreeMap;

use serde_json::Value;

use super::error::ApiError;
use super::lenient;
use super::transport::{Form, Proxmox};

/// A privilege on a path, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// "/pool/k8s".
    pub path: String,
    /// "VM.Allocate".
    pub privilege: &'static str,
    /// What can't be done without it.
    pub purpose: &'static str,
}

/// The privilege for a VM's guest agent, and what Proxmox VE 8 has in its place.
const AGENT: (&str, &str) = ("VM.GuestAgent.Unrestricted", "VM.Monitor");

/// On a pool: all that is done with guests.
const GUESTS: [(&str, &str); 14] = [
    ("Pool.Audit", "to see the pool"),
    ("VM.Allocate", "to make and delete guests, and for nesting"),
    ("VM.Audit", "to see guests and their configuration"),
    ("VM.Clone", "to clone guests"),
    ("VM.Config.CPU", "to limit CPUs"),
    ("VM.Config.Disk", "to give disks and make them larger"),
    ("VM.Config.HWType", "to give VMs controllers and consoles"),
    ("VM.Config.Memory", "to limit memory and swap"),
    ("VM.Config.Network", "to give networks and host names"),
    ("VM.Config.Options", "to set notes and tags"),
    (AGENT.0, "to run commands in VMs"),
    ("VM.PowerMgmt", "to start and stop"),
    ("VM.Snapshot", "to take snapshots"),
    ("VM.Snapshot.Rollback", "to go back to snapshots"),
];

/// Paths, their privileges, and whether each is inherited further down.
type Granted = BTreeMap<String, BTreeMap<String, Value>>;

/// Where the rights on bridges are that are no vnets.
const LOCAL: &str = "/sdn/zones/localnetwork/";

/// On a storage.
const STORAGE: [(&str, &str); 3] = [
    ("Datastore.AllocateSpace", "to make root file systems"),
    ("Datastore.AllocateTemplate", "to upload templates"),
    ("Datastore.Audit", "to see what is there"),
];

/// What is needed for guests in `pool` ("": in none) with disks on `storages` and networks on `bridges`, of which a vnet is `ZONE/VNET`.
pub fn needs(pool: &str, storages: &[String], bridges: &[String]) -> Vec<Need> {
    let on = |path: String, list: &[(&'static str, &'static str)]| {
        list.iter().map(|(privilege, purpose)| Need { path: path.clone(), privilege, purpose }).collect::<Vec<_>>()
    };
    let guests = if pool.is_empty() { "/vms".to_owned() } else { format!("/pool/{pool}") };
    // Only a pool can be seen.
    let skip = usize::from(pool.is_empty());
    let mut all = on(guests, &GUESTS[skip..]);
    for storage in storages {
        all.extend(on(format!("/storage/{storage}"), &STORAGE));
    }
    for bridge in bridges {
        let zone = if bridge.contains('/') { "" } else { "localnetwork/" };
        all.extend(on(format!("/sdn/zones/{zone}{bridge}"), &[("SDN.Use", "to connect guests to the bridge")]));
    }
    all
}

/// What of `needs` is not in the API's answer for their paths.
pub fn missing(needs: &[Need], granted: &BTreeMap<String, BTreeMap<String, bool>>) -> Vec<Need> {
    let has = |n: &Need| {
        let stands_in = |p: &BTreeMap<String, bool>| n.privilege == AGENT.0 && p.contains_key(AGENT.1);
        granted.get(&n.path).is_some_and(|p| p.contains_key(n.privilege) || stands_in(p))
    };
    needs.iter().filter(|n| !has(n)).cloned().collect()
}

/// Whether a vnet of any zone may be used.
fn may_use(vnet: &str, granted: &Granted) -> bool {
    let of_vnet = |path: &str| {
        let zone_and_vnet = path.strip_prefix("/sdn/zones/").and_then(|rest| rest.split_once('/'));
        zone_and_vnet.is_some_and(|(_, name)| name == vnet)
    };
    granted.iter().any(|(path, privileges)| of_vnet(path) && privileges.contains_key("SDN.Use"))
}

impl Proxmox {
    /// Which of these the token lacks.
    pub async fn lacking(&self, needs: &[Need]) -> Result<Vec<Need>, ApiError> {
        let mut granted = BTreeMap::new();
        for need in needs {
            if granted.contains_key(&need.path) {
                continue;
            }
            let form = vec![("path".to_owned(), need.path.clone())];
            let answer: Granted = self.get("/access/permissions", form as Form).await?;
            let own = answer.into_iter().find(|(path, _)| *path == need.path).map(|(_, p)| p).unwrap_or_default();
            // The value says whether it is inherited further down, not whether it is granted.
            let own = own.into_iter().map(|(name, v)| (name, lenient::as_bool(&v).ok().flatten().unwrap_or_default()));
            granted.insert(need.path.clone(), own.collect());
        }
        let mut lacking = missing(needs, &granted);
        if lacking.iter().any(|need| need.path.starts_with(LOCAL)) {
            // A vnet has the same kind of name as a bridge, and its zone is not known to us.
            let all: Granted = self.get("/access/permissions", Form::new()).await?;
            lacking.retain(|need| !need.path.strip_prefix(LOCAL).is_some_and(|vnet| may_use(vnet, &all)));
        }
        Ok(lacking)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_role_has_what_is_needed_and_no_more() {
        let script = include_str!("../../../deploy/proxmox/role.sh");
        let list = script.split("privileges=\"").nth(1).unwrap().split('"').next().unwrap();
        // The agent's privilege is chosen by the release.
        assert!([AGENT.0, AGENT.1].iter().all(|name| script.contains(&format!("agent={name}"))));
        let agent = |p| if p == "$agent" { AGENT.0 } else { p };
        let role: BTreeSet<&str> = list.split([' ', '\\', '\n']).filter(|p| !p.is_empty()).map(agent).collect();
        let all = needs("k8s", &["local".into()], &["vmbr0".into()]);
        assert_eq!(role, all.iter().map(|n| n.privilege).collect());
        let document = include_str!("../../../docs/proxmox.md");
        for privilege in role {
            let short = privilege.replace("VM.Config", "");
            assert!(document.contains(privilege) || document.contains(&short), "docs/proxmox.md: {privilege}");
        }
    }

    #[test]
    fn what_lacks_is_named_with_its_path() {
        let all = needs("k8s", &["local".into()], &["vmbr0".into()]);
        assert_eq!(all.len(), GUESTS.len() + STORAGE.len() + 1);
        let mut granted: BTreeMap<String, BTreeMap<String, bool>> = BTreeMap::new();
        for need in &all {
            granted.entry(need.path.clone()).or_default().insert(need.privilege.to_owned(), false);
        }
        assert_eq!(missing(&all, &granted), []);
        granted.get_mut("/storage/local").unwrap().remove("Datastore.Audit");
        let pool = granted.get_mut("/pool/k8s").unwrap();
        pool.remove(AGENT.0);
        pool.insert(AGENT.1.into(), false);
        granted.remove("/sdn/zones/localnetwork/vmbr0");
        let lacking = missing(&all, &granted);
        let lacking: Vec<_> = lacking.iter().map(|n| (n.path.as_str(), n.privilege)).collect();
        assert_eq!(lacking, [("/storage/local", "Datastore.Audit"), ("/sdn/zones/localnetwork/vmbr0", "SDN.Use")]);
        let poolless = needs("", &[], &[]);
        assert!(poolless.iter().all(|n| n.path == "/vms" && n.privilege != "Pool.Audit") && poolless.len() > 10);
        let all: Granted = serde_json::from_value(serde_json::json!({"/sdn/zones/z/pods": {"SDN.Use": 1}})).unwrap();
        assert!(may_use("pods", &all) && !may_use("z", &all) && !may_use("other", &all));
        let vnet = needs("k8s", &[], &["zone1/pods".into()]).pop().map(|n| n.path);
        assert_eq!(vnet.as_deref(), Some("/sdn/zones/zone1/pods"));
    }
}
