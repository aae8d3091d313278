//! The QEMU guest agent of a VM, as far as the API lets it be asked: commands, addresses.
//!
//! A command has no streams: its input goes with the call, its output comes when it has ended, and can be fetched once. So
//! this is for probes, for bootstrap and for operators, not for what a pod's containers do. Fails with [`ApiError`], `NoAgent`
//! where none answers in the guest. A caller that goes away leaves the command to its own end.

use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

use super::error::{ApiError, ErrorKind};
use super::guest_types::{GuestId, Interface};
use super::lenient;
use super::task::pause;
use super::transport::{Form, Proxmox};

/// Most bytes of input that the API takes.
const MAX_INPUT: usize = 64 << 10;

/// How a command in a guest ended, and what it said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentOutput {
    /// Its exit code; of one that a signal ended 128 and the signal's number.
    pub code: u32,
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its error output.
    pub stderr: Vec<u8>,
    /// The agent has cut output that was too long for it (16 MiB).
    pub truncated: bool,
}

#[derive(Deserialize)]
struct Started {
    #[serde(deserialize_with = "lenient::u64")]
    pid: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Status {
    #[serde(deserialize_with = "lenient::bool")]
    exited: bool,
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    exitcode: Option<u64>,
    #[serde(default, deserialize_with = "lenient::opt_u64")]
    signal: Option<u64>,
    #[serde(default, deserialize_with = "lenient::string")]
    out_data: String,
    #[serde(default, deserialize_with = "lenient::string")]
    err_data: String,
    #[serde(default, deserialize_with = "lenient::bool")]
    out_truncated: bool,
    #[serde(default, deserialize_with = "lenient::bool")]
    err_truncated: bool,
}

impl Status {
    /// None: it goes on, or ended neither by itself nor by a signal, which is no answer.
    fn output(self) -> Option<AgentOutput> {
        let number = |n: u64| u32::try_from(n).ok();
        let code = match (self.exitcode, self.signal) {
            (Some(code), _) => number(code)?,
            (None, Some(signal)) => number(signal)?.checked_add(128)?,
            (None, None) => return None,
        };
        Some(AgentOutput {
            code,
            stdout: bytes(&self.out_data),
            stderr: bytes(&self.err_data),
            truncated: self.out_truncated || self.err_truncated,
        })
    }
}

#[derive(Deserialize)]
struct Interfaces {
    result: Vec<Card>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Card {
    name: String,
    #[serde(default)]
    hardware_address: String,
    #[serde(default)]
    ip_addresses: Vec<Address>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Address {
    ip_address: String,
    ip_address_type: String,
    #[serde(deserialize_with = "lenient::u64")]
    prefix: u64,
}

impl Card {
    fn interface(&self) -> Interface {
        let of = |kind: &str| {
            let found = self.ip_addresses.iter().find(|a| a.ip_address_type == kind);
            found.map(|a| format!("{}/{}", a.ip_address, a.prefix))
        };
        Interface {
            name: self.name.clone(),
            hwaddr: self.hardware_address.clone(),
            inet: of("ipv4"),
            inet6: of("ipv6"),
        }
    }
}

/// The API sends bytes as characters of the same number.
fn bytes(text: &str) -> Vec<u8> {
    let each: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
    // It has decoded them: then they are the text.
    each.unwrap_or_else(|| text.as_bytes().to_vec())
}

/// And takes them so.
fn characters(bytes: &[u8]) -> String {
    bytes.iter().map(|b| char::from(*b)).collect()
}

impl Proxmox {
    /// Runs a command as the guest's root and waits up to `limit` for its end. `input`, at most 64 KiB, is all that it reads.
    ///
    /// `command` has the program's path first. The API gives no answer (`NoAnswer`, 596) where the guest has no such program.
    pub async fn agent_exec(
        &self,
        vm: GuestId<'_>,
        command: &[String],
        input: &[u8],
        limit: Duration,
    ) -> Result<AgentOutput, ApiError> {
        let at = vm.path(&["agent", "exec"]);
        let fail = |kind, why: String| ApiError::new(kind, format!("POST {at}"), why);
        if input.len() > MAX_INPUT {
            return Err(fail(
                ErrorKind::Invalid,
                format!("{} bytes of input: at most {MAX_INPUT} can be sent", input.len()),
            ));
        }
        let mut form: Form = command.iter().map(|word| ("command".to_owned(), word.clone())).collect();
        form.extend((!input.is_empty()).then(|| ("input-data".to_owned(), characters(input))));
        let started: Started = self.settle(vm.vmid, self.post(&at, form).await).await?;
        let since = Instant::now();
        loop {
            let form = vec![("pid".to_owned(), started.pid.to_string())];
            let status: Status = self.get(&vm.path(&["agent", "exec-status"]), form).await?;
            if status.exited {
                let none = || fail(ErrorKind::Protocol, "the command ended with neither exit code nor signal".into());
                return status.output().ok_or_else(none);
            }
            if since.elapsed() >= limit {
                let why = format!(
                    "it has not ended after {} s and goes on in the guest (pid {})",
                    limit.as_secs(),
                    started.pid
                );
                return Err(fail(ErrorKind::Timeout, why));
            }
            tokio::time::sleep(pause(since.elapsed())).await;
        }
    }

    /// The guest's network interfaces, as its agent sees them.
    pub async fn agent_interfaces(&self, vm: GuestId<'_>) -> Result<Vec<Interface>, ApiError> {
        let at = vm.path(&["agent", "network-get-interfaces"]);
        let found: Interfaces = self.settle(vm.vmid, self.get(&at, Form::new()).await).await?;
        Ok(found.result.iter().map(Card::interface).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn status(text: &str) -> Status {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn ends() {
        let ended =
            status(r#"{"exited":1,"exitcode":3,"out-data":"a\u00ff","err-data":"b","out-truncated":1}"#).output();
        let expected = AgentOutput { code: 3, stdout: vec![b'a', 0xff], stderr: b"b".to_vec(), truncated: true };
        assert_eq!(ended, Some(expected));
        assert_eq!(status(r#"{"exited":"1","signal":"9"}"#).output().unwrap().code, 137);
        assert_eq!(status(r#"{"exited":1}"#).output(), None);
        assert!(!status(r#"{"exited":0}"#).exited);
        assert_eq!(bytes("\u{2713}"), "\u{2713}".as_bytes());
    }

    #[test]
    fn addresses() {
        let text = r#"{"result":[{"name":"lo","hardware-address":"00:00:00:00:00:00"},{"name":"eth0","ip-addresses":[
            {"ip-address":"fe80::1","ip-address-type":"ipv6","prefix":64},{"ip-address":"10.0.0.5","ip-address-type":"ipv4","prefix":24}]}]}"#;
        let found: Interfaces = serde_json::from_str(text).unwrap();
        let all: Vec<_> = found.result.iter().map(Card::interface).collect();
        assert_eq!((all[0].name.as_str(), &all[0].inet), ("lo", &None));
        assert_eq!((all[1].inet.as_deref(), all[1].inet6.as_deref()), (Some("10.0.0.5/24"), Some("fe80::1/64")));
    }

    proptest! {
        #[test]
        fn bytes_come_back_as_they_went(data in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(bytes(&characters(&data)), data);
        }
    }
}
