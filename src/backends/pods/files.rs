//! The pod's own files (hostname, hosts, resolv.conf) and the annotations that shape its network. Pure text.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::core::error::{Error, Result};
use crate::core::spec::DnsConfig;

/// resolv.conf from the pod's DNS settings.
pub fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

/// hosts of a pod with a network of its own.
pub fn hosts(hostname: &str, ips: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for ip in ips {
            text += &format!("{ip}\t{hostname}\n");
        }
    }
    text
}

/// Bits per second into and out of the pod, from the `kubernetes.io/*-bandwidth` annotations; 0: no limit.
pub fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<(u64, u64)> {
    let get = |key: &str| match annotations.get(key) {
        None => Ok(0),
        Some(text) => quantity(text)
            .filter(|bits| (1_000..=1_000_000_000_000_000).contains(bits))
            .ok_or_else(|| Error::invalid(format!("annotation {key}: {text:?} is not a bandwidth between 1k and 1P"))),
    };
    Ok((get("kubernetes.io/ingress-bandwidth")?, get("kubernetes.io/egress-bandwidth")?))
}

/// A whole Kubernetes quantity: digits and k, M, G, T, P or Ki, Mi, Gi, Ti, Pi.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_what_was_asked() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into(), "fd00::1".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(resolv_conf(&dns), "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::1\noptions ndots:5\n");
    }

    #[test]
    fn bandwidths_are_whole_quantities() {
        let of = |v: &str| bandwidth(&BTreeMap::from([("kubernetes.io/egress-bandwidth".into(), v.into())]));
        assert_eq!(of("10M").expect("fits"), (0, 10_000_000));
        assert_eq!(of("1Mi").expect("fits"), (0, 1 << 20));
        for bad in ["", "10", "1.5M", "-1M", "99999999999P", "10MB"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
