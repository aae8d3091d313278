//! The QEMU guest agent of the server's VMs. A VM that is a record has this machine for a guest: commands run here, and their
//! outcome is kept as the real agent keeps it, until it is fetched once. In VMs that run no agent does.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::guests::{Kind, Runner, get};
use super::http::{Answer, Call, Failure};
use super::state::Server;

/// A command that was started: how it has ended, if it has.
#[derive(Clone, Default)]
pub struct Executed(Arc<Mutex<Option<Output>>>);

/// Whether a VM has a channel for an agent.
pub fn is_configured(config: &BTreeMap<String, String>) -> bool {
    config.get("agent").is_some_and(|a| a.split(',').any(|p| p == "1" || p == "enabled=1"))
}

/// Bytes as the API sends them, each a character.
fn characters(bytes: &[u8]) -> String {
    bytes.iter().map(|b| char::from(*b)).collect()
}

fn execute(call: &Call) -> Result<(u64, Executed), Failure> {
    let command = get(call, "command");
    let mut words = command.split('\0');
    let program = words.next().unwrap_or_default();
    let mut child = Command::new(program)
        .args(words)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        // The agent's words break the server's answer.
        .map_err(|_| Failure::new(596, "Broken pipe"))?;
    let input: Option<Vec<u8>> = get(call, "input-data").chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
    let input = input.ok_or_else(|| Failure::die("Wide character in subroutine entry"))?;
    if let Some(mut stdin) = child.stdin.take() {
        std::thread::spawn(move || stdin.write_all(&input));
    }
    let (pid, executed) = (u64::from(child.id()), Executed::default());
    let told = executed.clone();
    std::thread::spawn(move || {
        let out = child.wait_with_output().expect("a child's end");
        *told.0.lock().expect("no panic") = Some(out);
    });
    Ok((pid, executed))
}

/// What there is to say of a command; its end is told once.
fn outcome(server: &Server, vmid: u32, pid: u64) -> Answer {
    let mut state = server.lock();
    let executed = state.guests.get_mut(&vmid).map(|g| &mut g.executed);
    let gone = || Failure::die("Agent error: PID ld does not exist");
    let executed = executed.filter(|all| all.contains_key(&pid)).ok_or_else(gone)?;
    let Some(out) = executed[&pid].0.lock().expect("no panic").take() else { return Ok(json!({ "exited": 0 })) };
    executed.remove(&pid);
    let mut answer = json!({ "exited": 1 });
    match out.status.code() {
        Some(code) => answer["exitcode"] = json!(code),
        None => answer["signal"] = json!(out.status.signal()),
    }
    for (key, data) in [("out-data", out.stdout), ("err-data", out.stderr)] {
        if !data.is_empty() {
            answer[key] = json!(characters(&data));
        }
    }
    Ok(answer)
}

impl Server {
    /// Calls below /nodes/N/qemu/ID/agent, checked.
    pub async fn agent_call(self: &Arc<Self>, call: &Call, vmid: u32, what: &str) -> Answer {
        let (configured, runs, paused) =
            self.with(Kind::Vm, vmid, |g| (is_configured(&g.config), g.running.is_some(), g.paused))?;
        if !configured {
            return Err(Failure::die("No QEMU guest agent configured"));
        }
        if !runs {
            return Err(Failure::die(format!("VM {vmid} is not running")));
        }
        if paused || matches!(self.runner, Runner::Qemu) {
            tokio::time::sleep(self.seconds(3.0)).await;
            return Err(Failure::die("QEMU guest agent is not running"));
        }
        match what {
            "exec" => {
                let (pid, executed) = execute(call)?;
                if let Some(guest) = self.lock().guests.get_mut(&vmid) {
                    guest.executed.insert(pid, executed);
                }
                Ok(json!({ "pid": pid }))
            }
            "exec-status" => outcome(self, vmid, get(call, "pid").parse().unwrap_or_default()),
            _ => Ok(interfaces()),
        }
    }
}

/// As the agent words it, unlike the calls of containers.
fn interfaces() -> Value {
    json!({ "result": [{ "name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [
        { "ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8 },
        { "ip-address": "::1", "ip-address-type": "ipv6", "prefix": 128 },
    ] }] })
}
