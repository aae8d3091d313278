//! Results and errors of plugins: between versions of the specification, and into addresses.
//!
//! Called by `cni` alone; pure. A result that makes no sense is an error with the reason, never a panic.
//! Format: the CNI specification 1.1.0, section 5, and the same sections of 0.3.1 and 0.4.0.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Value, json};

use super::conf::{SUPPORTED, Version};

/// What a plugin says about its failure.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct PluginError {
    #[serde(default)]
    pub code: u32,
    #[serde(default)]
    pub msg: String,
    #[serde(default)]
    pub details: String,
}

impl PluginError {
    /// From the standard output of a failed plugin, if it speaks the protocol.
    pub fn parse(stdout: &[u8]) -> Option<Self> {
        serde_json::from_slice(stdout).ok().filter(|e: &Self| e.code != 0 || !e.msg.is_empty())
    }

    /// "msg; details".
    pub fn text(&self) -> String {
        match (self.msg.as_str(), self.details.as_str()) {
            ("", details) => details.to_owned(),
            (msg, "") => msg.to_owned(),
            (msg, details) => format!("{msg}; {details}"),
        }
    }
}

/// A plugin's result in the version that the rest of the chain speaks. One without a version has the chain's.
pub(super) fn convert(stdout: &[u8], to: Version) -> Result<Value, String> {
    let mut result: Value = serde_json::from_slice(stdout).map_err(|e| format!("not JSON: {e}"))?;
    if !result.is_object() {
        return Err("not a JSON object".into());
    }
    let from = match result.get("cniVersion").and_then(Value::as_str) {
        None | Some("") => to,
        Some(text) => Version::try_from(text.to_owned())?,
    };
    if !SUPPORTED.contains(&from) {
        return Err(format!("a result of version {from} is not supported"));
    }
    result["cniVersion"] = json!(to);
    // Up to 0.4.0 an address says which protocol it is of; from 1.0.0 on it does not.
    if let Some(ips) = result.get_mut("ips").and_then(Value::as_array_mut) {
        for ip in ips {
            let v6 = address(ip)?.is_ipv6();
            let Some(ip) = ip.as_object_mut() else { return Err("an address is not an object".into()) };
            match to < Version(1, 0, 0) {
                true => ip.insert("version".into(), json!(if v6 { "6" } else { "4" })),
                false => ip.remove("version"),
            };
        }
    }
    Ok(result)
}

/// The pod's addresses in the order of the result: those of `ifname` inside the pod, and those that name no interface.
/// A result that puts all its addresses elsewhere in the pod (a renamed interface) gives those.
pub(super) fn addresses(result: &Value, ifname: &str) -> Result<Vec<IpAddr>, String> {
    let interfaces = result.get("interfaces").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let (mut own, mut other) = (Vec::new(), Vec::new());
    for ip in result.get("ips").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default() {
        let parsed = address(ip)?;
        let index = ip.get("interface").and_then(Value::as_i64).and_then(|n| usize::try_from(n).ok());
        match index.and_then(|n| interfaces.get(n)) {
            None => own.push(parsed),
            Some(on) => {
                let field = |key| on.get(key).and_then(Value::as_str).unwrap_or_default();
                match (field("name") == ifname, field("sandbox").is_empty()) {
                    (true, false) => own.push(parsed),
                    (false, false) => other.push(parsed),
                    (_, true) => {} // on the host: the bridge's own
                }
            }
        }
    }
    Ok(if own.is_empty() { other } else { own })
}

fn address(ip: &Value) -> Result<IpAddr, String> {
    let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
    let (address, length) = text.split_once('/').unwrap_or((text, "0"));
    match (address.parse(), length.parse::<u8>()) {
        (Ok(address), Ok(_)) => Ok(address),
        _ => Err(format!("{text:?} is not an address")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: &str = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"br"},{"name":"eth0","sandbox":"/n"},{"name":"net1","sandbox":"/n"}],
        "ips":[{"address":"10.0.0.1/24","interface":0},{"address":"10.0.0.2/24","interface":1},
               {"address":"fd00::2/64","interface":1},{"address":"10.9.0.2/24","interface":2}]}"#;

    #[test]
    fn versions_are_converted_both_ways() {
        let old = convert(NEW.as_bytes(), Version(0, 4, 0)).unwrap();
        assert_eq!(old["cniVersion"], "0.4.0");
        assert_eq!((&old["ips"][1]["version"], &old["ips"][2]["version"]), (&json!("4"), &json!("6")));
        let new = convert(old.to_string().as_bytes(), Version(1, 1, 0)).unwrap();
        assert_eq!(new["cniVersion"], "1.1.0");
        assert!(new["ips"].as_array().unwrap().iter().all(|ip| ip.get("version").is_none()));
        assert_eq!(convert(b"{}", Version(0, 3, 1)).unwrap(), json!({"cniVersion":"0.3.1"}));
        for bad in ["", "garbage", "[]", r#"{"cniVersion":"0.1.0"}"#, r#"{"ips":[{"address":"x"}]}"#, r#"{"ips":[3]}"#]
        {
            assert!(convert(bad.as_bytes(), Version(1, 0, 0)).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_of_the_pod_only() {
        let list = |text: &str| {
            addresses(&serde_json::from_str(text).unwrap(), "eth0")
                .unwrap()
                .iter()
                .map(IpAddr::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(list(NEW), ["10.0.0.2", "fd00::2"]);
        assert_eq!(list(r#"{"ips":[{"address":"10.0.0.2/24"}]}"#), ["10.0.0.2"]);
        assert_eq!(
            list(r#"{"interfaces":[{"name":"e","sandbox":"/n"}],"ips":[{"address":"10.0.0.2/24","interface":0}]}"#),
            ["10.0.0.2"]
        );
        assert_eq!(list(r#"{"ips":[{"address":"10.0.0.2/24","interface":-1}]}"#), ["10.0.0.2"]);
        assert!(list("{}").is_empty());
    }

    #[test]
    fn plugin_errors() {
        let e = PluginError::parse(br#"{"cniVersion":"1.0.0","code":7,"msg":"no","details":"why"}"#).unwrap();
        assert_eq!((e.code, e.text().as_str()), (7, "no; why"));
        assert!(PluginError::parse(b"{}").is_none() && PluginError::parse(b"panic: x").is_none());
    }
}
