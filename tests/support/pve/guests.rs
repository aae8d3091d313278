//! Containers of the server: their life as the real API lets them have it, with locks that wait and tasks that take time.
//!
//! [`Runner::Records`] keeps the books only; [`Runner::Lxc`] unpacks the template and runs `lxc-start -F`, so that there is an
//! init, a cgroup and a file system.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::http::{Answer, Call, Failure};
use super::params::{CONFIG, check};
use super::state::{NODE, Params, Server, What};

/// How containers are run.
#[derive(Debug, Clone)]
pub enum Runner {
    /// Not at all.
    Records,
    /// By Debian's `lxc`, with its folder.
    Lxc(PathBuf),
}

/// A container.
pub struct Guest {
    /// The node that it is on.
    pub node: String,
    pub config: BTreeMap<String, String>,
    pub pending: BTreeMap<String, Option<String>>,
    pub pool: String,
    pub snapshots: Vec<(String, String, u64, BTreeMap<String, String>)>,
    pub running: Option<Instant>,
    pub child: Option<Child>,
    pub pid: u32,
    /// It is not made yet, or its making has died: its configuration is a lock and nothing else.
    pub half: bool,
}

/// What changes at once in a running container; the rest waits for the next start.
const INSTANT: [&str; 11] = [
    "description",
    "onboot",
    "startup",
    "protection",
    "hostname",
    "cores",
    "tags",
    "memory",
    "swap",
    "cpulimit",
    "cpuunits",
];

fn get(call: &Call, name: &str) -> String {
    call.params.get(name).cloned().unwrap_or_default()
}

fn on(call: &Call, name: &str) -> bool {
    matches!(get(call, name).as_str(), "1" | "on" | "yes" | "true")
}

impl Guest {
    pub fn new(config: BTreeMap<String, String>, pool: String) -> Self {
        Self {
            node: NODE.into(),
            config,
            pending: BTreeMap::new(),
            pool,
            snapshots: Vec::new(),
            running: None,
            child: None,
            pid: 0,
            half: false,
        }
    }

    /// Its line in lists.
    pub fn row(&self, vmid: u32) -> Value {
        let text = |key: &str, or: &str| self.config.get(key).cloned().unwrap_or_else(|| or.to_owned());
        let mib = |key: &str| text(key, "512").parse::<u64>().unwrap_or(512) << 20;
        let status = if self.running.is_some() { "running" } else { "stopped" };
        let mut row = json!({
            "vmid": vmid, "name": text("hostname", &format!("CT{vmid}")), "node": self.node, "status": status, "type": "lxc",
            "uptime": self.running.map_or(0, |s| s.elapsed().as_secs()), "cpu": 0, "cpus": text("cores", "8"), "mem": 0,
            "maxmem": mib("memory"), "maxswap": mib("swap"), "disk": "0", "maxdisk": 4294967296u64, "netin": 0, "netout": 0,
        });
        for key in ["tags", "lock"] {
            if let Some(value) = self.config.get(key) {
                row[key] = json!(value);
            }
        }
        if self.config.contains_key("template") {
            row["template"] = json!(1);
        }
        if !self.pool.is_empty() {
            row["pool"] = json!(self.pool);
        }
        if self.pid > 0 {
            row["pid"] = json!(self.pid);
        }
        row
    }

    fn digest(&self) -> String {
        use sha2::Digest as _;
        sha2::Sha256::digest(format!("{:?}{:?}", self.config, self.pending))
            .iter()
            .take(20)
            .map(|b| format!("{b:02x}"))
            .collect()
    }

    pub fn locked(&self) -> Option<String> {
        self.config.get("lock").map(|l| format!("CT is locked ({l})"))
    }
}

pub fn missing(vmid: u32) -> String {
    missing_on(NODE, vmid)
}

pub fn missing_on(node: &str, vmid: u32) -> String {
    format!("Configuration file 'nodes/{node}/lxc/{vmid}.conf' does not exist")
}

/// Which keys a token never sets.
fn root_only(params: &Params) -> Option<String> {
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
fn config_privilege(key: &str) -> &'static str {
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

impl Server {
    fn writable(&self) -> Result<(), Failure> {
        if self.lock().frozen { Err(Failure::die("cluster not ready - no quorum?")) } else { Ok(()) }
    }

    /// POST /nodes/N/lxc.
    pub fn create(self: &Arc<Self>, call: &Call, fault: Option<What>) -> Answer {
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
        config.insert("rootfs".into(), format!("{store_name}:subvol-{vmid}-disk-0,size={size}G"));
        config.insert("lock".into(), "create".into());
        // The configuration is there at once: of two creates one wins. A task that fails takes it back, one that dies does not.
        let fails = matches!(&fault, Some(What::TaskEnds(text)) if text != "unexpected status");
        if !fails {
            state.guests.insert(vmid, Guest { half: true, ..Guest::new(config, pool) });
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
                server.lock().guests.remove(&vmid);
                server.remove_files(vmid);
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

    /// Calls below /nodes/N/lxc/ID, checked.
    pub async fn guest_call(
        self: &Arc<Self>,
        call: &Call,
        vmid: u32,
        method: &str,
        rest: &[&str],
        fault: Option<What>,
    ) -> Answer {
        let id = vmid.to_string();
        let server = self.clone();
        match (method, rest) {
            ("GET", ["status", "current"]) => self.with(vmid, |g| g.row(vmid)),
            ("GET", ["config"]) => self.with(vmid, |g| {
                let written = g.config.iter().filter(|(k, _)| !g.half || *k == "lock");
                let mut all: serde_json::Map<_, _> = written.map(|(k, v)| (k.clone(), json!(v))).collect();
                // Some keys are numbers.
                for key in ["memory", "swap", "unprivileged", "template"] {
                    if let Some(n) = g.config.get(key).filter(|_| !g.half).and_then(|v| v.parse::<u64>().ok()) {
                        all.insert(key.into(), json!(n));
                    }
                }
                all.insert("digest".into(), json!(g.digest()));
                Value::Object(all)
            }),
            ("GET", ["pending"]) => self.with(vmid, |g| {
                let now = g
                    .config
                    .iter()
                    .filter(|(k, _)| !g.pending.contains_key(*k))
                    .map(|(k, v)| json!({ "key": k, "value": v }));
                let later = g.pending.iter().map(|(k, v)| match v {
                    Some(v) => json!({ "key": k, "value": g.config.get(k), "pending": v }),
                    None => json!({ "key": k, "value": g.config.get(k), "delete": 1 }),
                });
                now.chain(later).collect()
            }),
            ("GET", ["interfaces"]) => self.with(vmid, |g| match g.running {
                Some(_) => {
                    json!([{ "name": "lo", "hwaddr": "00:00:00:00:00:00", "inet": "127.0.0.1/8", "inet6": "::1/128",
                    "ip-addresses": [{ "ip-address": "127.0.0.1", "prefix": "8", "ip-address-type": "inet" }] }])
                }
                None => Value::Null,
            }),
            ("PUT", ["config"]) => self.change(call, vmid).await,
            ("POST", ["status", "start"]) => {
                self.writable()?;
                Ok(self.start(call, "vzstart", &id, fault, async move {
                    let lock = server.guest_lock(vmid);
                    let _held = lock.lock().await;
                    tokio::time::sleep(server.seconds(2.0)).await;
                    server.power_on(vmid).await
                }))
            }
            ("POST", ["status", "stop" | "shutdown"]) => {
                let running = self.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some());
                if !running {
                    return Err(Failure::die(format!("CT {vmid} not running")));
                }
                let shut = rest[1] == "shutdown";
                let kind = if shut { "vzshutdown" } else { "vzstop" };
                let (wait, force) = (get(call, "timeout").parse().unwrap_or(60.0), on(call, "forceStop"));
                Ok(self.start(call, kind, &id, fault, async move {
                    let lock = server.guest_lock(vmid);
                    let _held = lock.lock().await;
                    tokio::time::sleep(server.seconds(1.0)).await;
                    if let Some(why) = server.lock().guests.get(&vmid).and_then(Guest::locked) {
                        return Err(why);
                    }
                    server.power_off(vmid, shut.then_some((wait, force))).await
                }))
            }
            ("DELETE", []) => {
                self.writable()?;
                let (running, locked) = {
                    let state = self.lock();
                    let guest = &state.guests[&vmid];
                    (guest.running.is_some(), guest.locked())
                };
                if self.lock().guests[&vmid].config.get("protection").is_some_and(|p| p == "1") {
                    return Err(Failure::die(format!("can't remove CT {vmid} - protection mode enabled")));
                }
                // `force` is for those that run; a lock stays one.
                if let Some(why) = locked {
                    return Err(Failure::die(why));
                }
                if running && !on(call, "force") {
                    return Err(Failure::die(format!("unable to destroy CT {vmid} - container is running")));
                }
                let force = on(call, "force");
                Ok(self.start(call, "vzdestroy", &id, fault, async move {
                    let lock = server.guest_lock(vmid);
                    let Ok(_held) = tokio::time::timeout(server.seconds(10.0), lock.lock()).await else {
                        return Err(format!("can't lock file '/run/lock/lxc/pve-config-{vmid}.lock' - got timeout"));
                    };
                    // It may have been locked, or started, meanwhile.
                    if let Some(why) = server.lock().guests.get(&vmid).and_then(Guest::locked) {
                        return Err(why);
                    }
                    let running = server.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some());
                    if running && !force {
                        return Err(format!("unable to destroy CT {vmid} - container is running"));
                    }
                    if running {
                        server.power_off(vmid, None).await?;
                    }
                    tokio::time::sleep(server.seconds(0.5)).await;
                    server.remove_files(vmid);
                    server.forget_addresses(vmid);
                    server.lock().guests.remove(&vmid).map(drop).ok_or_else(|| missing(vmid))
                }))
            }
            ("PUT", ["resize"]) => {
                let (disk, size) = (get(call, "disk"), get(call, "size"));
                Ok(self.start(call, "resize", &id, fault, async move {
                    let mut state = server.lock();
                    let guest = state.guests.get_mut(&vmid).ok_or_else(|| missing(vmid))?;
                    let volume = guest.config.get_mut(&disk).ok_or_else(|| format!("disk '{disk}' does not exist"))?;
                    let now = volume
                        .split("size=")
                        .nth(1)
                        .and_then(|s| s.trim_end_matches('G').parse::<f64>().ok())
                        .unwrap_or(0.0);
                    let asked: f64 = size.trim_matches(['+', 'G']).parse().map_err(|_| "bad size".to_owned())?;
                    let new = if size.starts_with('+') { now + asked } else { asked };
                    if new < now {
                        return Err("unable to shrink disk size".into());
                    }
                    *volume = format!("{},size={new}G", volume.split(',').next().unwrap_or_default());
                    Ok(())
                }))
            }
            ("GET", ["snapshot"]) => self.with(vmid, |g| {
                let list = g
                    .snapshots
                    .iter()
                    .map(|(name, notes, time, _)| json!({ "name": name, "description": notes, "snaptime": time }));
                list.chain([json!({ "name": "current", "description": "You are here!", "digest": g.digest() })])
                    .collect()
            }),
            ("POST", ["snapshot"]) => {
                let (name, notes) = (get(call, "snapname"), get(call, "description"));
                Ok(self.start(call, "vzsnapshot", &id, fault, async move {
                    let mut state = server.lock();
                    let guest = state.guests.get_mut(&vmid).ok_or_else(|| missing(vmid))?;
                    if guest.snapshots.iter().any(|s| s.0 == name) {
                        return Err(format!("snapshot name '{name}' already used"));
                    }
                    let config = guest.config.clone();
                    guest.snapshots.push((name, notes, super::tasks::now(), config));
                    Ok(())
                }))
            }
            (_, ["snapshot", name, ..]) => {
                let (name, delete, again) = ((*name).to_owned(), method == "DELETE", on(call, "start"));
                let kind = if delete { "vzdelsnapshot" } else { "vzrollback" };
                Ok(self.start(call, kind, &id, fault, async move {
                    let at = server.lock().guests.get(&vmid).and_then(|g| g.snapshots.iter().position(|s| s.0 == name));
                    let at = at.ok_or_else(|| format!("snapshot '{name}' does not exist"))?;
                    if delete {
                        if let Some(g) = server.lock().guests.get_mut(&vmid) {
                            g.snapshots.remove(at);
                        }
                        return Ok(());
                    }
                    let newest = server.lock().guests.get(&vmid).is_some_and(|g| at + 1 == g.snapshots.len());
                    if !newest {
                        return Err(format!("can't rollback, '{name}' is not most recent snapshot"));
                    }
                    let _ = server.power_off(vmid, None).await;
                    if let Some(g) = server.lock().guests.get_mut(&vmid) {
                        g.config = g.snapshots[at].3.clone();
                    }
                    if again { server.power_on(vmid).await } else { Ok(()) }
                }))
            }
            ("POST", ["clone"]) => {
                self.writable()?;
                let new: u32 = get(call, "newid").parse().expect("checked");
                let pool = get(call, "pool");
                let mut state = self.lock();
                if pool.is_empty() || !state.may(&call.user, &format!("/pool/{pool}"), "VM.Allocate") {
                    state.need(&call.user, &format!("/vms/{new}"), "VM.Allocate")?;
                }
                if state.guests.contains_key(&new) {
                    return Err(Failure::die(format!(
                        "unable to create CT {new} - CT {new} already exists on node 'pve1'"
                    )));
                }
                let mut config = state.guests[&vmid].config.clone();
                config.remove("template");
                config.insert("rootfs".into(), format!("local:subvol-{new}-disk-0,size=4G"));
                for key in ["hostname", "description"] {
                    if call.params.contains_key(key) {
                        config.insert(key.into(), get(call, key));
                    }
                }
                state.guests.insert(new, Guest::new(config, pool));
                drop(state);
                Ok(self.start(call, "vzclone", &id, fault, async move { server.copy_files(vmid, new).await }))
            }
            ("POST", ["template"]) => {
                self.start(call, "vztemplate", &id, fault, async move {
                    tokio::time::sleep(server.seconds(1.0)).await;
                    if let Some(g) = server.lock().guests.get_mut(&vmid) {
                        g.config.insert("template".into(), "1".into());
                    }
                    Ok(())
                });
                Ok(Value::Null)
            }
            _ => Err(Failure::new(501, format!("Method '{} {}' not implemented", call.method, call.path))),
        }
    }

    fn with<T>(&self, vmid: u32, look: impl FnOnce(&Guest) -> T) -> Result<T, Failure> {
        self.lock().guests.get(&vmid).map(look).ok_or_else(|| Failure::die(missing(vmid)))
    }

    /// PUT config: waits ten seconds for the guest's lock.
    async fn change(&self, call: &Call, vmid: u32) -> Answer {
        self.writable()?;
        let lock = self.guest_lock(vmid);
        let held = tokio::time::timeout(self.seconds(10.0), lock.lock()).await;
        let Ok(_held) = held else {
            return Err(Failure::die(format!("can't lock file '/run/lock/lxc/pve-config-{vmid}.lock' - got timeout")));
        };
        let mut state = self.lock();
        let delete: Vec<String> = get(call, "delete").split(',').filter(|k| !k.is_empty()).map(String::from).collect();
        let keys: Vec<&String> =
            call.params.keys().filter(|k| !matches!(k.as_str(), "delete" | "digest")).chain(&delete).collect();
        for key in keys {
            state.need(&call.user, &format!("/vms/{vmid}"), config_privilege(key))?;
        }
        if let Some(why) = root_only(&call.params).filter(|_| call.user != "root@pam") {
            return Err(Failure::new(403, why));
        }
        let guest = state.guests.get_mut(&vmid).ok_or_else(|| Failure::die(missing(vmid)))?;
        if let Some(why) = guest.locked() {
            return Err(Failure::die(why));
        }
        if call.params.get("digest").is_some_and(|d| *d != guest.digest()) {
            return Err(Failure::die("detected modified configuration - file changed by other user? Try again."));
        }
        let instant = |key: &str| INSTANT.contains(&key) || key.starts_with("net");
        for (key, value) in call.params.iter().filter(|(k, _)| !matches!(k.as_str(), "delete" | "digest")) {
            if guest.running.is_some() && !instant(key) {
                guest.pending.insert(key.clone(), Some(value.clone()));
            } else {
                guest.config.insert(key.clone(), value.clone());
            }
        }
        for key in delete {
            if guest.running.is_some() && !instant(&key) {
                guest.pending.insert(key, None);
            } else {
                guest.config.remove(&key);
            }
        }
        Ok(Value::Null)
    }

    pub async fn power_on(&self, vmid: u32) -> Result<(), String> {
        {
            let mut state = self.lock();
            let guest = state.guests.get_mut(&vmid).ok_or_else(|| missing(vmid))?;
            if let Some(why) = guest.locked() {
                return Err(why);
            }
            if guest.running.is_some() {
                return Err(format!("CT {vmid} already running"));
            }
            if guest.config.contains_key("template") {
                return Err("you can't start a CT if it's a template".into());
            }
            for (key, value) in std::mem::take(&mut guest.pending) {
                match value {
                    Some(value) => guest.config.insert(key, value),
                    None => guest.config.remove(&key),
                };
            }
        }
        let (child, pid) = self.run(vmid).await?;
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            (guest.running, guest.child, guest.pid) = (Some(Instant::now()), child, pid);
        }
        self.lease_addresses(vmid, pid).await
    }

    /// `gently`: how long it may take by itself, and whether it is killed then.
    pub async fn power_off(&self, vmid: u32, gently: Option<(f64, bool)>) -> Result<(), String> {
        let child = self.lock().guests.get_mut(&vmid).and_then(|g| g.child.take());
        let Some(mut child) = child else {
            if let Some(guest) = self.lock().guests.get_mut(&vmid) {
                (guest.running, guest.pid) = (None, 0);
            }
            return Ok(());
        };
        let Runner::Lxc(path) = &self.runner else { return Ok(()) };
        let path = path.display().to_string();
        let how = if gently.is_some() { "--nokill" } else { "--kill" };
        let _ = Command::new("lxc-stop").args(["-P", &path, "-n", &vmid.to_string(), how, "--nowait"]).output();
        let patience = gently.map_or(60.0, |(t, _)| t);
        let deadline = Instant::now() + std::time::Duration::from_secs_f64(patience);
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                if gently.is_some_and(|(_, force)| force) {
                    let _ = Command::new("lxc-stop").args(["-P", &path, "-n", &vmid.to_string(), "--kill"]).output();
                    let _ = child.wait();
                    break;
                }
                if let Some(guest) = self.lock().guests.get_mut(&vmid) {
                    guest.child = Some(child);
                }
                return Err("container did not stop".into());
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            (guest.running, guest.pid) = (None, 0);
        }
        Ok(())
    }
}
