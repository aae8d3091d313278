//! What the server has of containers alone: how they are made, and who may set which of their keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::guests::{Guest, Kind, get, on};
use super::http::{Answer, Call, Failure};
use super::params::{CONFIG, check};
use super::state::{Params, Server, What};

/// Which keys a token never sets.
pub fn root_only(params: &Params) -> Option<String> {
    params.iter().find_map(|(key, value)| match key.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "dev" | "hookscript" => Some(format!("Permission check failed ({key} is only allowed for root@pam)")),
        "mp" if value.trim_start_matches("volume=").starts_with('/') => {
            Some("Permission check failed (mount point type bind is only allowed for root@pam)".into())
        }
        "features" if value.split(',').any(|f| !f.starts_with("nesting=")) => Some(
            "Permission check failed (changing feature flags (except nesting) is only allowed for root@pam)".into(),
        ),
        _ => None,
    })
}

/// The privilege that a key needs.
pub fn config_privilege(key: &str) -> &'static str {
    match key.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "memory" | "swap" => "VM.Config.Memory",
        "hostname" => "VM.Config.Network",
        "cores" | "cpulimit" | "cpuunits" => "VM.Config.CPU",
        "net" | "nameserver" | "searchdomain" => "VM.Config.Network",
        "rootfs" | "mp" | "unused" => "VM.Config.Disk",
        "features" => "VM.Allocate",
        _ => "VM.Config.Options",
    }
}

/// Labels of letters, digits and hyphens, none of them empty, or with a hyphen at an end.
fn is_dns_name(name: &str) -> bool {
    let fits = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    name.split('.').all(fits)
}

impl Server {
    /// POST /nodes/N/lxc.
    pub fn create_ct(self: &Arc<Self>, call: &Call, fault: Option<What>) -> Answer {
        let words = format!(
            "{CONFIG} vmid:id! ostemplate! unprivileged:bool password ssh-public-keys start:bool force:bool pool \
            storage restore:bool unique:bool ha-managed:bool bwlimit:num ignore-unpack-errors:bool"
        );
        check(&words, &call.params)?;
        self.writable()?;
        let vmid: u32 = get(call, "vmid").parse().expect("checked");
        let (pool, template) = (get(call, "pool"), get(call, "ostemplate"));
        let root = call.user == "root@pam";
        let rootfs = call.params.get("rootfs").map(|v| v.trim_start_matches("volume=").to_owned());
        let named = rootfs.as_deref().and_then(|v| v.split(':').next()).map(String::from);
        let store_name = named
            .unwrap_or_else(|| Some(get(call, "storage")).filter(|s| !s.is_empty()).unwrap_or_else(|| "local".into()));
        let mut state = self.lock();
        if pool.is_empty() || !state.may(&call.user, &format!("/pool/{pool}"), "VM.Allocate") {
            state.need(&call.user, &format!("/vms/{vmid}"), "VM.Allocate")?;
        }
        state.need(&call.user, &format!("/storage/{store_name}"), "Datastore.AllocateSpace")?;
        if let Some(why) = root_only(&call.params).filter(|_| !root) {
            return Err(Failure::new(403, why));
        }
        if call.params.get("unprivileged").is_some_and(|u| u == "0") {
            state.need(&call.user, "/", "Sys.Modify")?;
        }
        if let Some(name) = call.params.get("hostname").filter(|n| !is_dns_name(n)) {
            return Err(Failure::param("hostname", format!("value '{name}' does not look like a valid DNS name")));
        }
        let nets = self.check_nets(&state, call)?;
        let outside = ["vmid", "ostemplate", "pool", "storage", "start", "password", "ssh-public-keys", "force"];
        for key in call.params.keys().filter(|k| !outside.contains(&k.as_str())) {
            let privilege = config_privilege(key);
            if pool.is_empty() || !state.may(&call.user, &format!("/pool/{pool}"), privilege) {
                state.need(&call.user, &format!("/vms/{vmid}"), privilege)?;
            }
        }
        if state.guests.contains_key(&vmid) {
            return Err(Failure::die(format!("unable to create CT {vmid} - CT {vmid} already exists on node 'pve1'")));
        }
        let Some(store) = state.stores.get(&store_name).cloned() else {
            return Err(Failure::die(format!("storage '{store_name}' does not exist")));
        };
        let mut config: BTreeMap<_, _> = call
            .params
            .iter()
            .filter(|(k, _)| !outside.contains(&k.as_str()))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        config.extend(nets);
        config.entry("memory".into()).or_insert_with(|| "512".into());
        config.entry("swap".into()).or_insert_with(|| "512".into());
        config.entry("unprivileged".into()).or_insert_with(|| "1".into());
        let size = rootfs.as_deref().and_then(|v| v.split([':', ',']).nth(1)).unwrap_or("4").to_owned();
        config.insert("rootfs".into(), format!("{store_name}:{},size={size}G", self.new_subvol(vmid)));
        config.insert("lock".into(), "create".into());
        // The configuration is there at once: of two creates one wins. A task that fails takes it back, one that dies does not.
        let fails = matches!(&fault, Some(What::TaskEnds(text)) if text != "unexpected status");
        if !fails {
            state.guests.insert(vmid, Guest { half: true, ..Guest::new(Kind::Ct, config, pool) });
        }
        let (server, half) = (self.clone(), matches!(fault, Some(What::HalfDone)));
        drop(state);
        let start = on(call, "start");
        Ok(self.start(call, "vzcreate", &vmid.to_string(), fault, async move {
            let lock = server.guest_lock(vmid);
            let held = lock.lock().await;
            let made = async {
                let dawdle = server.lock().dawdle;
                tokio::time::sleep(server.seconds(1.0) + dawdle).await;
                let file = store
                    .template(&template)
                    .ok_or_else(|| format!("unable to create CT {vmid} - volume '{template}' does not exist"))?;
                if store.full {
                    return Err(format!(
                        "unable to create CT {vmid} - command 'tar xpf -' failed: No space left on device"
                    ));
                }
                server.unpack(vmid, &file).await
            };
            let made = made.await;
            if half {
                // The worker died: the lock stays.
                return Err("unexpected status".into());
            }
            if let Err(e) = made {
                // It takes back what it has begun.
                if let Some(guest) = server.lock().guests.get_mut(&vmid) {
                    guest.half = false;
                }
                server.remove_files(vmid, false);
                server.lock().guests.remove(&vmid);
                return Err(e);
            }
            if let Some(guest) = server.lock().guests.get_mut(&vmid) {
                guest.config.remove("lock");
                guest.half = false;
            }
            drop(held);
            if start { server.power_on(vmid).await } else { Ok(()) }
        }))
    }
}
