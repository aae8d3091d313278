//! The server's calls: which path is what, which privileges it needs, which parameters it takes.

use std::sync::Arc;

use serde_json::{Value, json};

use super::guests::{Kind, missing_on};
use super::http::{Answer, Call, Failure};
use super::params::{CONFIG, VM_CONFIG, check};
use super::state::{NODE, Server, What};

/// One call, authenticated.
pub async fn route(server: &Arc<Server>, call: &Call, fault: Option<What>) -> Answer {
    let parts: Vec<&str> = call.parts.iter().map(String::as_str).collect();
    let unknown = || Failure::new(501, format!("Method '{} {}' not implemented", call.method, call.path));
    match (call.method.as_str(), parts.as_slice()) {
        ("POST", ["access", "ticket"]) => server.new_ticket(call),
        ("GET", ["access", "permissions"]) => server.permissions(call),
        ("GET", ["version"]) => Ok(json!({ "version": "9.2.11", "release": "9.2", "repoid": "0123456789abcdef" })),
        ("GET", ["nodes"]) => Ok(json!([{ "node": "pve1", "status": "online", "type": "node", "cpu": 0.1, "maxcpu": 8,
            "mem": "1073741824", "maxmem": 8589934592u64, "uptime": 1000, "ssl_fingerprint": "AA:BB" }])),
        ("GET", ["cluster", "nextid"]) => next_id(server, call),
        ("GET", ["cluster", "resources"]) => {
            let state = server.lock();
            let sees = |vmid: &u32| state.may(&call.user, &format!("/vms/{vmid}"), "VM.Audit");
            Ok(state.guests.iter().filter(|(id, _)| sees(id)).map(|(id, g)| g.row(*id)).collect())
        }
        (_, ["nodes", node, ..]) if *node != NODE && !server.lock().others.iter().any(|o| o == node) => {
            Err(Failure::die(format!("hostname lookup '{node}' failed - failed to get address info for: {node}")))
        }
        (_, ["nodes", _, "tasks", ..]) => server.task_call(call),
        (_, ["nodes", _, "storage", ..]) => server.storage_call(call, fault),
        ("GET", ["nodes", node, kind @ ("lxc" | "qemu")]) => {
            let kind = Kind::of(kind);
            let state = server.lock();
            let sees = |vmid: &u32| state.may(&call.user, &format!("/vms/{vmid}"), "VM.Audit");
            let there = state.guests.iter().filter(|(id, g)| g.node == *node && Some(g.kind) == kind && sees(id));
            Ok(there.map(|(id, g)| g.row(*id)).collect())
        }
        ("POST", ["nodes", _, "lxc"]) => server.create_ct(call, fault),
        ("POST", ["nodes", _, "qemu"]) => server.create_vm(call, fault),
        (method, ["nodes", node, kind @ ("lxc" | "qemu"), vmid, rest @ ..]) => {
            let kind = Kind::of(kind).ok_or_else(unknown)?;
            let vmid: u32 = vmid.parse().map_err(|_| Failure::param("vmid", "type check ('integer') failed"))?;
            // The privilege comes before the look whether it is there.
            let privilege = privilege(kind, method, rest).ok_or_else(unknown)?;
            let path = format!("/vms/{vmid}");
            {
                let state = server.lock();
                let mut any = vec![
                    "VM.Config.Disk",
                    "VM.Config.CPU",
                    "VM.Config.Memory",
                    "VM.Config.Network",
                    "VM.Config.Options",
                ];
                if kind == Kind::Vm {
                    any.extend(["VM.Config.CDROM", "VM.Config.HWType", "VM.Config.Cloudinit"]);
                }
                if privilege == "any" {
                    if !any.iter().any(|p| state.may(&call.user, &path, p)) {
                        return Err(Failure::new(403, format!("Permission check failed ({path}, {})", any.join("|"))));
                    }
                } else {
                    // Also of a guest that is not there: a token that may only what its pool allows gets 403, not "does not exist".
                    state.need(&call.user, &path, privilege)?;
                }
                let there = state.guests.get(&vmid).is_some_and(|g| g.node == *node && g.kind == kind);
                if !there && !starts_task(rest) {
                    return Err(Failure::die(missing_on(kind, node, vmid)));
                }
            }
            let words = match (method, rest) {
                ("PUT" | "POST", ["config"]) if kind == Kind::Vm => {
                    format!("{VM_CONFIG} delete digest revert force:bool")
                }
                ("DELETE", []) if kind == Kind::Vm => "purge:bool skiplock:bool destroy-unreferenced-disks:bool".into(),
                ("POST", ["status", "start"]) if kind == Kind::Vm => "skiplock:bool timeout:int".into(),
                ("POST", ["status", "stop"]) if kind == Kind::Vm => {
                    "skiplock:bool timeout:int overrule-shutdown:bool keepActive:bool".into()
                }
                ("POST", ["snapshot"]) if kind == Kind::Vm => "snapname! description vmstate:bool".into(),
                ("POST", ["clone"]) if kind == Kind::Vm => {
                    "newid:id! name description pool snapname storage full:bool format target bwlimit:num".into()
                }
                ("POST", ["template"]) if kind == Kind::Vm => "disk".into(),
                ("POST", ["agent", "exec"]) => "command! input-data".into(),
                ("GET", ["agent", "exec-status"]) => "pid:int!".into(),
                ("PUT", ["config"]) => format!("{CONFIG} delete digest revert"),
                ("GET", ["config"]) => "current:bool snapshot".into(),
                ("DELETE", []) => "purge:bool force:bool destroy-unreferenced-disks:bool".into(),
                ("POST", ["status", "start"]) => "skiplock:bool debug:bool".into(),
                ("POST", ["status", "stop"]) => "skiplock:bool overrule-shutdown:bool".into(),
                ("POST", ["status", "shutdown"]) => "timeout:int forceStop:bool".into(),
                ("POST", ["snapshot"]) => "snapname! description".into(),
                ("POST", ["snapshot", _, "rollback"]) => "start:bool".into(),
                ("POST", ["clone"]) => {
                    "newid:id! hostname description pool snapname storage full:bool target bwlimit:num".into()
                }
                ("PUT", ["resize"]) => "disk! size! digest".into(),
                _ => String::new(),
            };
            check(&words, &call.params)?;
            server.guest_call(call, (kind, vmid), method, rest, fault).await
        }
        _ => Err(unknown()),
    }
}

/// Calls whose task, not they themselves, finds that there is no such guest.
fn starts_task(rest: &[&str]) -> bool {
    matches!(rest, ["status", "start"])
}

fn privilege(kind: Kind, method: &str, rest: &[&str]) -> Option<&'static str> {
    Some(match (method, rest) {
        ("GET", ["interfaces"]) if kind == Kind::Vm => return None,
        ("POST", ["config"]) if kind == Kind::Vm => "any",
        ("POST", ["agent", "exec"]) | ("GET", ["agent", "exec-status" | "network-get-interfaces"])
            if kind == Kind::Vm =>
        {
            "VM.GuestAgent.Unrestricted"
        }
        ("GET", ["config" | "pending" | "interfaces" | "snapshot"] | ["status", "current"]) => "VM.Audit",
        ("PUT", ["config"]) => "any",
        ("POST", ["status", "start" | "stop" | "shutdown" | "reboot"]) => "VM.PowerMgmt",
        ("POST", ["snapshot"]) | ("DELETE", ["snapshot", _]) => "VM.Snapshot",
        ("POST", ["snapshot", _, "rollback"]) => "VM.Snapshot.Rollback",
        ("POST", ["clone"]) => "VM.Clone",
        ("PUT", ["resize"]) => "VM.Config.Disk",
        ("POST", ["template"]) | ("DELETE", []) => "VM.Allocate",
        _ => return None,
    })
}

fn next_id(server: &Server, call: &Call) -> Answer {
    let state = server.lock();
    if let Some(vmid) = call.params.get("vmid") {
        let taken = vmid.parse().is_ok_and(|id: u32| state.guests.contains_key(&id));
        return if taken { Err(Failure::param("vmid", format!("VM {vmid} already exists"))) } else { Ok(json!(vmid)) };
    }
    let free = (100..).find(|id| !state.guests.contains_key(id)).unwrap_or(100);
    Ok(Value::String(free.to_string()))
}
