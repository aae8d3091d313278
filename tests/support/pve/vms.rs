//! What the server has of virtual machines alone: how they are made, copied and made templates, and who may set which of their
//! keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::disks;
use super::guests::{Guest, Kind, get, missing, on};
use super::http::{Answer, Call, Failure};
use super::nets::{Net, bridge_access, parse};
use super::params::{VM_CONFIG, check};
use super::state::{Params, Server, State, What};

/// Keys of a net, as the schema has them, but the models.
const NET: [&str; 10] =
    ["model", "macaddr", "bridge", "firewall", "link_down", "mtu", "queues", "rate", "tag", "trunks"];
/// Models of which a net may be.
const MODELS: [&str; 4] = ["virtio", "e1000", "rtl8139", "vmxnet3"];
/// Parameters of a create that are no keys of the configuration.
const OUTSIDE: [&str; 4] = ["vmid", "pool", "storage", "start"];

/// Which keys a token never sets.
pub fn root_only(params: &Params) -> Option<String> {
    let real = |(key, value): (&String, &String)| match key.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "args" | "hookscript" | "lock" => Some(format!("only root can set '{key}' config")),
        "serial" if value != "socket" => Some(format!("only root can set '{key}' config for real devices")),
        _ => None,
    };
    params.iter().find_map(real)
}

/// The privilege that a key needs.
pub fn config_privilege(key: &str) -> &'static str {
    match key.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "memory" | "balloon" => "VM.Config.Memory",
        "cores" | "cpu" | "cpulimit" | "cpuunits" | "numa" | "sockets" => "VM.Config.CPU",
        "net" | "nameserver" | "searchdomain" | "ipconfig" => "VM.Config.Network",
        "boot" | "unused" => "VM.Config.Disk",
        key if disks::is_disk(key) => "VM.Config.Disk",
        "acpi" | "hotplug" | "kvm" | "machine" | "scsihw" | "smbios" | "tablet" | "vga" | "rng" | "serial" => {
            "VM.Config.HWType"
        }
        _ => "VM.Config.Options",
    }
}

/// `scsi0`, as the parameters name it, without its number.
fn without_number(key: &str) -> &str {
    key.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// A net as the configuration has it: the model with its address, then the rest.
fn written(net: &Net, mac: &str) -> Result<String, String> {
    let model = MODELS.iter().find(|m| net.contains_key(**m));
    let model = model.copied().or_else(|| net.get("model").map(String::as_str)).ok_or("missing model")?;
    let mac = net.get(model).or_else(|| net.get("macaddr")).map_or(mac, String::as_str);
    let rest = net.iter().filter(|(k, _)| !["model", "macaddr", model].contains(&k.as_str()));
    Ok(rest.fold(format!("{model}={mac}"), |all, (k, v)| format!("{all},{k}={v}")))
}

impl Server {
    /// Checks a call's nets and disks; the former as they are written into the configuration.
    pub fn check_devices(&self, state: &State, call: &Call) -> Result<Vec<(String, String)>, Failure> {
        let mut nets = Vec::new();
        for (key, value) in call.params.iter().filter(|(k, _)| without_number(k) == "net") {
            // The model may stand alone.
            let value = if value.split(',').next().is_some_and(|v| !v.contains('=')) {
                format!("model={value}")
            } else {
                value.clone()
            };
            let net = parse(&value);
            if let Some(bad) = net.keys().find(|k| !NET.contains(&k.as_str()) && !MODELS.contains(&k.as_str())) {
                let why = format!(
                    "{bad}: property is not defined in schema and the schema does not allow additional properties"
                );
                return Err(Failure::param(key, why));
            }
            if net.contains_key("bridge") {
                bridge_access(state, &call.user, &net)?;
            }
            nets.push((key.clone(), written(&net, &self.mac()).map_err(|why| Failure::param(key, why))?));
        }
        for (key, value) in call.params.iter().filter(|(k, _)| disks::is_disk(without_number(k))) {
            let disk = disks::Disk::parse(value).ok_or_else(|| Failure::param(key, "unable to parse drive options"))?;
            if disk.volume.starts_with('/') || disk.import.as_deref().is_some_and(|i| i.starts_with('/')) {
                return Err(Failure::new(403, format!("Only root can pass arbitrary filesystem paths ({key})")));
            }
            let Some((store, _)) = disk.volume.split_once(':') else { continue };
            if !state.stores.contains_key(store) {
                return Err(Failure::die(format!("storage '{store}' does not exist")));
            }
            // Somebody's volume is for those who may change his disks.
            let own = call.parts.get(3).and_then(|id| id.parse().ok());
            if let Some(owner) = disk.owner().filter(|owner| Some(*owner) != own) {
                state.need(&call.user, &format!("/storage/{store}"), "Datastore.Audit")?;
                state.need(&call.user, &format!("/vms/{owner}"), "VM.Config.Disk")?;
            }
            if disk.new_gib().is_some() {
                state.need(&call.user, &format!("/storage/{store}"), "Datastore.AllocateSpace")?;
            }
            if disk.import.is_some() && disk.new_gib() != Some(0.0) {
                let why = "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>";
                return Err(Failure::param(key, why));
            }
        }
        Ok(nets)
    }

    /// POST /nodes/N/qemu.
    pub fn create_vm(self: &Arc<Self>, call: &Call, fault: Option<What>) -> Answer {
        check(&format!("{VM_CONFIG} vmid:id! pool storage start:bool bwlimit:num"), &call.params)?;
        self.writable()?;
        let vmid: u32 = get(call, "vmid").parse().expect("checked");
        let pool = get(call, "pool");
        let mut state = self.lock();
        self.may_make(&state, call, vmid, &pool)?;
        for key in call.params.keys().filter(|k| !OUTSIDE.contains(&k.as_str())) {
            let privilege = config_privilege(key);
            if pool.is_empty() || !state.may(&call.user, &format!("/pool/{pool}"), privilege) {
                state.need(&call.user, &format!("/vms/{vmid}"), privilege)?;
            }
        }
        if let Some(why) = root_only(&call.params).filter(|_| call.user != "root@pam") {
            return Err(Failure::die(why));
        }
        let nets = self.check_devices(&state, call)?;
        let given = call.params.iter().filter(|(k, _)| !OUTSIDE.contains(&k.as_str()));
        let mut config: BTreeMap<_, _> = given.map(|(k, v)| (k.clone(), v.clone())).collect();
        config.extend(nets);
        config.insert("meta".into(), "creation-qemu=10.1.2,ctime=1".into());
        config.insert("lock".into(), "create".into());
        self.begin(&mut state, vmid, config, pool, &fault)?;
        drop(state);
        let (server, half, start) = (self.clone(), matches!(fault, Some(What::HalfDone)), on(call, "start"));
        Ok(self.start(call, "qmcreate", &vmid.to_string(), fault, async move {
            let made = async {
                let dawdle = server.lock().dawdle;
                tokio::time::sleep(server.seconds(1.0) + dawdle).await;
                server.allocate(vmid).map_err(|e| format!("unable to create VM {vmid} - {e}"))
            };
            server.made(vmid, made, half, start).await
        }))
    }

    fn may_make(&self, state: &State, call: &Call, vmid: u32, pool: &str) -> Result<(), Failure> {
        if pool.is_empty() || !state.may(&call.user, &format!("/pool/{pool}"), "VM.Allocate") {
            state.need(&call.user, &format!("/vms/{vmid}"), "VM.Allocate")?;
        }
        Ok(())
    }

    /// The configuration is there at once: of two creates one wins. A task that fails takes it back, one that dies does not.
    fn begin(
        &self,
        state: &mut State,
        vmid: u32,
        config: BTreeMap<String, String>,
        pool: String,
        fault: &Option<What>,
    ) -> Result<(), Failure> {
        if state.guests.contains_key(&vmid) {
            return Err(Failure::die(format!("unable to create VM {vmid} - VM {vmid} already exists on node 'pve1'")));
        }
        if !matches!(fault, Some(What::TaskEnds(text)) if text != "unexpected status") {
            state.guests.insert(vmid, Guest { half: true, ..Guest::new(Kind::Vm, config, pool) });
        }
        Ok(())
    }

    /// The end of what makes a VM; `half`: its worker dies.
    async fn made(
        self: &Arc<Self>,
        vmid: u32,
        work: impl Future<Output = Result<(), String>>,
        half: bool,
        start: bool,
    ) -> Result<(), String> {
        let lock = self.guest_lock(vmid);
        let held = lock.lock().await;
        let made = work.await;
        if half {
            return Err("unexpected status".into());
        }
        if let Err(e) = made {
            self.lock().guests.remove(&vmid);
            self.remove_files(vmid, false);
            return Err(e);
        }
        if let Some(guest) = self.lock().guests.get_mut(&vmid) {
            guest.config.remove("lock");
            guest.half = false;
        }
        drop(held);
        if start { self.power_on(vmid).await } else { Ok(()) }
    }

    /// GET status/current.
    pub fn vm_status(&self, vmid: u32) -> Answer {
        let qmp = self.qmp_status(vmid);
        self.with(Kind::Vm, vmid, |g| {
            let mut row = g.row(vmid);
            row["ha"] = json!({ "managed": 0 });
            row["qmpstatus"] = json!(qmp);
            if super::agent::is_configured(&g.config) {
                row["agent"] = json!(1);
            }
            row
        })
    }

    /// POST clone and POST template.
    pub fn copy_vm(self: &Arc<Self>, call: &Call, vmid: u32, what: &str, fault: Option<What>) -> Answer {
        self.writable()?;
        if what == "template" { self.to_template(call, vmid, fault) } else { self.clone_vm(call, vmid, fault) }
    }

    fn to_template(self: &Arc<Self>, call: &Call, vmid: u32, fault: Option<What>) -> Answer {
        let refused = self.with(Kind::Vm, vmid, |g| match () {
            () if g.locked().is_some() => g.locked(),
            () if !g.snapshots.is_empty() => Some("unable to create template, because VM contains snapshots".into()),
            () if g.config.contains_key("template") => Some("you can't convert a template to a template".into()),
            () if g.running.is_some() => Some("you can't convert a VM to template if VM is running".into()),
            () => None,
        })?;
        if let Some(why) = refused {
            return Err(Failure::die(why));
        }
        let server = self.clone();
        Ok(self.start(call, "qmtemplate", &vmid.to_string(), fault, async move {
            tokio::time::sleep(server.seconds(1.0)).await;
            server.rename_disks(vmid)?;
            let mut state = server.lock();
            let guest = state.guests.get_mut(&vmid).ok_or_else(|| missing(Kind::Vm, vmid))?;
            guest.config.insert("template".into(), "1".into());
            Ok(())
        }))
    }

    fn clone_vm(self: &Arc<Self>, call: &Call, vmid: u32, fault: Option<What>) -> Answer {
        let new: u32 = get(call, "newid").parse().expect("checked");
        let (pool, storage) = (get(call, "pool"), get(call, "storage"));
        let mut state = self.lock();
        self.may_make(&state, call, new, &pool)?;
        let source = &state.guests[&vmid];
        if let Some(why) = source.locked() {
            return Err(Failure::die(why));
        }
        let template = source.config.contains_key("template");
        let full = call.params.get("full").map_or(!template, |_| on(call, "full"));
        if !full && !storage.is_empty() {
            return Err(Failure::die("parameter 'storage' not allowed for linked clones"));
        }
        let snapshot = get(call, "snapname");
        let mut config = match source.snapshots.iter().find(|s| s.0 == snapshot) {
            Some(found) => found.3.clone(),
            None if snapshot.is_empty() => source.config.clone(),
            None => return Err(Failure::die(format!("snapshot '{snapshot}' does not exist"))),
        };
        for (key, value) in &config {
            if without_number(key) == "net" && value.contains("bridge=") {
                bridge_access(&state, &call.user, &parse(value))?;
            }
            if disks::is_disk(without_number(key)) {
                let own = value.split(':').next().unwrap_or_default();
                let store = if storage.is_empty() { own } else { &storage };
                state.need(&call.user, &format!("/storage/{store}"), "Datastore.AllocateSpace")?;
            }
        }
        config.remove("template");
        for (key, value) in &mut config {
            if without_number(key) == "net" {
                let mut net = parse(value);
                net.retain(|k, _| k != "macaddr");
                let model = MODELS.iter().find(|m| net.remove(**m).is_some()).copied().unwrap_or("virtio");
                net.insert("model".into(), model.into());
                *value = written(&net, &self.mac()).expect("it has a model");
            }
        }
        for key in ["name", "description"] {
            if call.params.contains_key(key) {
                config.insert(key.into(), get(call, key));
            }
        }
        config.insert("lock".into(), "clone".into());
        self.begin(&mut state, new, config, pool, &fault)?;
        drop(state);
        let (server, half) = (self.clone(), matches!(fault, Some(What::HalfDone)));
        Ok(self.start(call, "qmclone", &vmid.to_string(), fault, async move {
            let work = async {
                tokio::time::sleep(server.seconds(1.0)).await;
                server.copy_disks(vmid, new, full, &snapshot).map_err(|e| format!("clone failed: {e}"))
            };
            server.made(new, work, half, false).await
        }))
    }
}

/// What tests do to it.
impl super::Pve {
    /// A template of a raw disk, in our pool.
    pub fn add_template(&self, vmid: u32, disk: &std::path::Path) {
        let folder = self.state.folder.join(format!("local/images/{vmid}"));
        std::fs::create_dir_all(&folder).expect("the folder of its disk");
        let name = format!("base-{vmid}-disk-0.raw");
        std::os::unix::fs::symlink(disk, folder.join(&name)).expect("its disk");
        let config = [
            ("name", "guest".to_owned()),
            ("memory", "512".into()),
            ("scsihw", "virtio-scsi-single".into()),
            ("scsi0", format!("local:{vmid}/{name},size=2G")),
            ("boot", "order=scsi0".into()),
            ("serial0", "socket".into()),
            ("template", "1".into()),
        ];
        let config = config.map(|(k, v)| (k.to_owned(), v)).into();
        self.state.lock().guests.insert(vmid, Guest::new(Kind::Vm, config, "k8s".into()));
    }
}

/// What tests do to it.
impl super::Pve {
    /// Somebody's VM in our pool, without disks.
    pub fn add_vm_with_notes(&self, vmid: u32, notes: &str) {
        let config = [("name", "made-elsewhere"), ("description", notes)];
        let config = config.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        self.state.lock().guests.insert(vmid, Guest::new(Kind::Vm, config, "k8s".into()));
    }
}

/// What QEMU says of a VM that is kept as a record.
pub fn recorded_status(guest: &Guest) -> Value {
    json!(match () {
        () if guest.running.is_none() => "stopped",
        () if guest.paused => "paused",
        () => "running",
    })
}
