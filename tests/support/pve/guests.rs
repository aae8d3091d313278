//! Guests of the server: their life as the real API lets them have it, with locks that wait and tasks that take time.
//!
//! [`Runner::Records`] keeps the books only; [`Runner::Lxc`] unpacks a container's template and runs `lxc-start -F`, so that there
//! is an init, a cgroup and a file system; [`Runner::Qemu`] makes a VM's disks and runs QEMU.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::agent::Executed;
use super::http::{Answer, Call, Failure};
use super::state::{NODE, Server, State, What};

/// How guests are run.
#[derive(Debug, Clone)]
pub enum Runner {
    /// Not at all.
    Records,
    /// Containers by Debian's `lxc`, with its folder.
    Lxc(PathBuf),
    /// VMs by QEMU.
    Qemu,
}

/// Container or virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ct,
    Vm,
}

impl Kind {
    /// Of a part of a path.
    pub fn of(part: &str) -> Option<Self> {
        [Self::Ct, Self::Vm].into_iter().find(|k| k.path() == part)
    }

    /// Its part of paths, and its type in lists.
    pub fn path(self) -> &'static str {
        if self == Self::Ct { "lxc" } else { "qemu" }
    }

    /// What messages call it.
    pub fn word(self) -> &'static str {
        if self == Self::Ct { "CT" } else { "VM" }
    }

    /// The type of its task that does that.
    fn task(self, what: &str) -> String {
        format!("{}{what}", if self == Self::Ct { "vz" } else { "qm" })
    }

    /// Nobody else got out of the way.
    fn lock_timeout(self, vmid: u32) -> String {
        match self {
            Self::Ct => format!("can't lock file '/run/lock/lxc/pve-config-{vmid}.lock' - got timeout"),
            Self::Vm => format!("can't lock file '/var/lock/qemu-server/lock-{vmid}.conf' - got timeout"),
        }
    }
}

/// A container or VM.
pub struct Guest {
    pub kind: Kind,
    /// The node that it is on.
    pub node: String,
    pub config: BTreeMap<String, String>,
    pub pending: BTreeMap<String, Option<String>>,
    pub pool: String,
    pub snapshots: Vec<(String, String, u64, BTreeMap<String, String>)>,
    pub running: Option<Instant>,
    pub child: Option<Child>,
    pub pid: u32,
    /// The CPUs of a VM stand still.
    pub paused: bool,
    /// Commands of a VM's guest agent whose outcome nobody has fetched.
    pub executed: BTreeMap<u64, Executed>,
    /// It is not made yet, or its making has died: its configuration is a lock and nothing else.
    pub half: bool,
}

/// What changes at once in a running container, and in a running VM; the rest waits for the next start.
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

const VM_INSTANT: [&str; 6] = ["description", "onboot", "startup", "protection", "name", "tags"];

impl Kind {
    fn is_instant(self, key: &str) -> bool {
        let numbered = key.trim_end_matches(|c: char| c.is_ascii_digit());
        match self {
            Self::Ct => INSTANT.contains(&key) || numbered == "net",
            // Disks that are new; that one changes or goes waits here.
            Self::Vm => VM_INSTANT.contains(&key) || numbered == "net",
        }
    }
}

pub fn get(call: &Call, name: &str) -> String {
    call.params.get(name).cloned().unwrap_or_default()
}

pub fn on(call: &Call, name: &str) -> bool {
    matches!(get(call, name).as_str(), "1" | "on" | "yes" | "true")
}

impl Guest {
    pub fn new(kind: Kind, config: BTreeMap<String, String>, pool: String) -> Self {
        Self {
            kind,
            node: NODE.into(),
            config,
            pending: BTreeMap::new(),
            pool,
            snapshots: Vec::new(),
            running: None,
            child: None,
            pid: 0,
            paused: false,
            executed: BTreeMap::new(),
            half: false,
        }
    }

    /// Its line in lists.
    pub fn row(&self, vmid: u32) -> Value {
        let text = |key: &str, or: &str| self.config.get(key).cloned().unwrap_or_else(|| or.to_owned());
        let mib = |key: &str| text(key, "512").parse::<u64>().unwrap_or(512) << 20;
        let status = if self.running.is_some() { "running" } else { "stopped" };
        let name = match self.kind {
            Kind::Ct => text("hostname", &format!("CT{vmid}")),
            Kind::Vm => text("name", &format!("VM {vmid}")),
        };
        let cpus = text("cores", if self.kind == Kind::Ct { "8" } else { "1" });
        let mut row = json!({
            "vmid": vmid, "name": name, "node": self.node, "status": status, "type": self.kind.path(),
            "uptime": self.running.map_or(0, |s| s.elapsed().as_secs()), "cpu": 0, "cpus": cpus, "mem": 0,
            "maxmem": mib("memory"), "disk": "0", "maxdisk": 4294967296u64, "netin": 0, "netout": 0,
        });
        if self.kind == Kind::Ct {
            row["maxswap"] = json!(mib("swap"));
        }
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

    pub fn digest(&self) -> String {
        use sha2::Digest as _;
        sha2::Sha256::digest(format!("{:?}{:?}", self.config, self.pending))
            .iter()
            .take(20)
            .map(|b| format!("{b:02x}"))
            .collect()
    }

    pub fn locked(&self) -> Option<String> {
        self.config.get("lock").map(|l| format!("{} is locked ({l})", self.kind.word()))
    }
}

pub fn missing(kind: Kind, vmid: u32) -> String {
    missing_on(kind, NODE, vmid)
}

pub fn missing_on(kind: Kind, node: &str, vmid: u32) -> String {
    let folder = if kind == Kind::Ct { "lxc" } else { "qemu-server" };
    format!("Configuration file 'nodes/{node}/{folder}/{vmid}.conf' does not exist")
}

impl Server {
    pub fn writable(&self) -> Result<(), Failure> {
        if self.lock().frozen { Err(Failure::die("cluster not ready - no quorum?")) } else { Ok(()) }
    }

    /// Calls below /nodes/N/lxc/ID and /nodes/N/qemu/ID, checked.
    pub async fn guest_call(
        self: &Arc<Self>,
        call: &Call,
        (kind, vmid): (Kind, u32),
        method: &str,
        rest: &[&str],
        fault: Option<What>,
    ) -> Answer {
        let id = vmid.to_string();
        let server = self.clone();
        match (method, rest) {
            ("GET", ["status", "current"]) if kind == Kind::Vm => self.vm_status(vmid),
            ("GET", ["status", "current"]) => self.with(kind, vmid, |g| g.row(vmid)),
            (_, ["agent", what]) => self.agent_call(call, vmid, what).await,
            ("GET", ["config"]) => self.with(kind, vmid, |g| {
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
            ("GET", ["pending"]) => self.with(kind, vmid, |g| {
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
            ("GET", ["interfaces"]) => self.with(kind, vmid, |g| match g.running {
                Some(_) => {
                    json!([{ "name": "lo", "hwaddr": "00:00:00:00:00:00", "inet": "127.0.0.1/8", "inet6": "::1/128",
                    "ip-addresses": [{ "ip-address": "127.0.0.1", "prefix": "8", "ip-address-type": "inet" }] }])
                }
                None => Value::Null,
            }),
            ("PUT", ["config"]) => self.change(call, kind, vmid).await,
            ("POST", ["config"]) => {
                // Checks come before the task, of which disks are the work.
                let before = self.with(kind, vmid, |g| g.config.clone())?;
                self.change(call, kind, vmid).await?;
                Ok(self.start(call, "qmconfig", &id, fault, async move {
                    server.allocate(vmid)?;
                    let now = server.lock().guests.get(&vmid).filter(|g| g.running.is_some()).map(|g| g.config.clone());
                    for (key, _) in super::disks::of(&now.unwrap_or_default()) {
                        if !before.contains_key(&key) && matches!(server.runner, Runner::Qemu) {
                            server.plug(vmid, &key)?;
                        }
                    }
                    Ok(())
                }))
            }
            ("POST", ["status", "start"]) => {
                self.writable()?;
                Ok(self.start(call, &kind.task("start"), &id, fault, async move {
                    let _held = server.hold(kind, vmid).await?;
                    tokio::time::sleep(server.seconds(2.0)).await;
                    if server.lock().guests.get(&vmid).is_none_or(|g| g.kind != kind) {
                        return Err(missing(kind, vmid));
                    }
                    server.power_on(vmid).await
                }))
            }
            ("POST", ["status", "stop" | "shutdown"]) => {
                let running = self.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some());
                if !running && kind == Kind::Ct {
                    return Err(Failure::die(format!("CT {vmid} not running")));
                }
                let (wait, force) = (get(call, "timeout").parse().unwrap_or(60.0), on(call, "forceStop"));
                let paused = self.lock().guests.get(&vmid).is_some_and(|g| g.paused);
                let asked = rest[1] == "shutdown";
                if asked && paused && !force {
                    return Err(Failure::die("VM is paused - cannot shutdown"));
                }
                let shut = asked && !paused;
                Ok(self.start(call, &kind.task(rest[1]), &id, fault, async move {
                    let _held = server.hold(kind, vmid).await?;
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
                    return Err(Failure::die(format!("can't remove {} {vmid} - protection mode enabled", kind.word())));
                }
                // `force` is for those that run; a lock stays one.
                if let Some(why) = locked {
                    return Err(Failure::die(why));
                }
                let (force, unreferenced) = (on(call, "force"), on(call, "destroy-unreferenced-disks"));
                let runs = match kind {
                    Kind::Ct => format!("unable to destroy CT {vmid} - container is running"),
                    Kind::Vm => format!("VM {vmid} is running - destroy failed"),
                };
                if running && !force {
                    return Err(Failure::die(runs));
                }
                Ok(self.start(call, &kind.task("destroy"), &id, fault, async move {
                    let _held = server.hold(kind, vmid).await?;
                    // It may have been locked, or started, meanwhile.
                    if let Some(why) = server.lock().guests.get(&vmid).and_then(Guest::locked) {
                        return Err(why);
                    }
                    let running = server.lock().guests.get(&vmid).is_some_and(|g| g.running.is_some());
                    if running && !force {
                        return Err(runs);
                    }
                    if running {
                        server.power_off(vmid, None).await?;
                    }
                    tokio::time::sleep(server.seconds(0.5)).await;
                    server.remove_files(vmid, unreferenced);
                    server.forget_addresses(vmid);
                    server.lock().guests.remove(&vmid).map(drop).ok_or_else(|| missing(kind, vmid))
                }))
            }
            ("PUT", ["resize"]) => {
                let (disk, size) = (get(call, "disk"), get(call, "size"));
                Ok(self.start(call, "resize", &id, fault, async move { server.resize(kind, vmid, &disk, &size) }))
            }
            ("GET", ["snapshot"]) => self.with(kind, vmid, |g| {
                let list = g
                    .snapshots
                    .iter()
                    .map(|(name, notes, time, _)| json!({ "name": name, "description": notes, "snaptime": time }));
                list.chain([json!({ "name": "current", "description": "You are here!", "digest": g.digest() })])
                    .collect()
            }),
            ("POST", ["snapshot"]) => {
                let (name, notes) = (get(call, "snapname"), get(call, "description"));
                Ok(self.start(call, &kind.task("snapshot"), &id, fault, async move {
                    let taken = |g: &Guest| g.snapshots.iter().any(|s| s.0 == name);
                    if server.lock().guests.get(&vmid).is_some_and(taken) {
                        return Err(format!("snapshot name '{name}' already used"));
                    }
                    if kind == Kind::Vm {
                        server.snapshot_disks(vmid, "-c", &name)?;
                    }
                    let mut state = server.lock();
                    let guest = state.guests.get_mut(&vmid).ok_or_else(|| missing(kind, vmid))?;
                    let config = guest.config.clone();
                    guest.snapshots.push((name, notes, super::tasks::now(), config));
                    Ok(())
                }))
            }
            (_, ["snapshot", name, ..]) => {
                let (name, delete, again) = ((*name).to_owned(), method == "DELETE", on(call, "start"));
                let task = kind.task(if delete { "delsnapshot" } else { "rollback" });
                Ok(self.start(call, &task, &id, fault, async move {
                    let at = server.lock().guests.get(&vmid).and_then(|g| g.snapshots.iter().position(|s| s.0 == name));
                    let at = at.ok_or_else(|| format!("snapshot '{name}' does not exist"))?;
                    if delete {
                        if kind == Kind::Vm {
                            server.snapshot_disks(vmid, "-d", &name)?;
                        }
                        if let Some(g) = server.lock().guests.get_mut(&vmid) {
                            g.snapshots.remove(at);
                        }
                        return Ok(());
                    }
                    let newest = server.lock().guests.get(&vmid).is_some_and(|g| at + 1 == g.snapshots.len());
                    if !newest && kind == Kind::Ct {
                        return Err(format!("can't rollback, '{name}' is not most recent snapshot"));
                    }
                    let _ = server.power_off(vmid, None).await;
                    if kind == Kind::Vm {
                        server.snapshot_disks(vmid, "-a", &name)?;
                    }
                    if let Some(g) = server.lock().guests.get_mut(&vmid) {
                        g.config = g.snapshots[at].3.clone();
                    }
                    if again { server.power_on(vmid).await } else { Ok(()) }
                }))
            }
            ("POST", ["clone" | "template"]) if kind == Kind::Vm => self.copy_vm(call, vmid, rest[0], fault),
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
                state.guests.insert(new, Guest::new(kind, config, pool));
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

    pub fn with<T>(&self, kind: Kind, vmid: u32, look: impl FnOnce(&Guest) -> T) -> Result<T, Failure> {
        self.lock().guests.get(&vmid).map(look).ok_or_else(|| Failure::die(missing(kind, vmid)))
    }

    /// The guest's lock file, for which ten seconds are waited.
    async fn hold(&self, kind: Kind, vmid: u32) -> Result<tokio::sync::OwnedMutexGuard<()>, String> {
        let held = tokio::time::timeout(self.seconds(10.0), self.guest_lock(vmid).lock_owned()).await;
        held.map_err(|_| kind.lock_timeout(vmid))
    }

    /// PUT config: waits ten seconds for the guest's lock.
    async fn change(&self, call: &Call, kind: Kind, vmid: u32) -> Answer {
        self.writable()?;
        let _held = self.hold(kind, vmid).await.map_err(Failure::die)?;
        let mut state = self.lock();
        let delete: Vec<String> = get(call, "delete").split(',').filter(|k| !k.is_empty()).map(String::from).collect();
        let keys: Vec<&String> =
            call.params.keys().filter(|k| !matches!(k.as_str(), "delete" | "digest")).chain(&delete).collect();
        let written = self.may_set(&state, call, (kind, vmid), &keys)?;
        let guest = state.guests.get_mut(&vmid).ok_or_else(|| Failure::die(missing(kind, vmid)))?;
        if let Some(why) = guest.locked() {
            return Err(Failure::die(why));
        }
        if call.params.get("digest").is_some_and(|d| *d != guest.digest()) {
            return Err(Failure::die(match kind {
                Kind::Ct => "detected modified configuration - file changed by other user? Try again.",
                Kind::Vm => "checksum mismatch (file change by other user?)",
            }));
        }
        let instant = |key: &str| kind.is_instant(key);
        for (key, value) in call.params.iter().filter(|(k, _)| !matches!(k.as_str(), "delete" | "digest")) {
            let value = written.get(key).unwrap_or(value);
            let plugged =
                kind == Kind::Vm && key.starts_with("scsi") && key != "scsihw" && !guest.config.contains_key(key);
            if guest.running.is_some() && !instant(key) && !plugged {
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
        let now = guest.running.filter(|_| kind == Kind::Ct).map(|_| guest.config.clone());
        drop(state);
        now.map_or(Ok(()), |config| self.limit(vmid, &config)).map_err(Failure::die)?;
        Ok(Value::Null)
    }

    /// Whether somebody may set or delete these keys of a guest; values that are not written as they came.
    fn may_set(
        &self,
        state: &State,
        call: &Call,
        (kind, vmid): (Kind, u32),
        keys: &[&String],
    ) -> Result<BTreeMap<String, String>, Failure> {
        let privilege = match kind {
            Kind::Ct => super::cts::config_privilege,
            Kind::Vm => super::vms::config_privilege,
        };
        for key in keys {
            state.need(&call.user, &format!("/vms/{vmid}"), privilege(key))?;
        }
        let root = call.user == "root@pam";
        match kind {
            Kind::Ct => match super::cts::root_only(&call.params).filter(|_| !root) {
                Some(why) => Err(Failure::new(403, why)),
                None => Ok(BTreeMap::new()),
            },
            Kind::Vm => match super::vms::root_only(&call.params).filter(|_| !root) {
                Some(why) => Err(Failure::die(why)),
                None => Ok(self.check_devices(state, call)?.into_iter().collect()),
            },
        }
    }

    pub async fn power_on(self: &Arc<Self>, vmid: u32) -> Result<(), String> {
        let kind = {
            let mut state = self.lock();
            // It may have been deleted since it was asked for.
            let Some(guest) = state.guests.get_mut(&vmid) else { return Err(missing(Kind::Ct, vmid)) };
            if let Some(why) = guest.locked() {
                return Err(why);
            }
            if guest.running.is_some() {
                return Err(format!("{} {vmid} already running", guest.kind.word()));
            }
            if guest.config.contains_key("template") {
                let word = if guest.kind == Kind::Ct { "CT" } else { "vm" };
                return Err(format!("you can't start a {word} if it's a template"));
            }
            for (key, value) in std::mem::take(&mut guest.pending) {
                match value {
                    Some(value) => guest.config.insert(key, value),
                    None => guest.config.remove(&key),
                };
            }
            guest.kind
        };
        if kind == Kind::Vm {
            self.allocate(vmid)?;
            return self.run_vm(vmid).await;
        }
        let (child, pid) = self.run(vmid).await?;
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            (guest.running, guest.child, guest.pid) = (Some(Instant::now()), child, pid);
        }
        self.lease_addresses(vmid, pid).await
    }

    /// `gently`: how long it may take by itself, and whether it is killed then.
    pub async fn power_off(&self, vmid: u32, gently: Option<(f64, bool)>) -> Result<(), String> {
        if self.lock().guests.get(&vmid).is_some_and(|g| g.kind == Kind::Vm) {
            return self.stop_vm(vmid, gently).await;
        }
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
