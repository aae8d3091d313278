//! What is the same of all guests that are pods, as pure functions of the pod: names, notes and CPU time.
//!
//! Values that Proxmox would not take, or would take for something else, are made to fit where they only decorate (name, tags,
//! notes) and refused where they count.

use crate::core::spec::{Resources, SandboxConfig};
use crate::integrations::proxmox_api::Tags;

/// Longest host name.
const NAME_MAX: usize = 63;

/// CPU time of a pod; 0: no limit.
pub fn cpus(resources: &Resources, overhead: &Resources) -> f64 {
    let cpus = |r: &Resources| match (r.cpu_quota, r.cpu_period) {
        (quota, period) if quota > 0 && period > 0 => quota as f64 / period as f64,
        _ => 0.0,
    };
    match cpus(resources) {
        0.0 => 0.0,
        // As precise as Proxmox shows it, and never less than was asked for.
        some => ((some + cpus(overhead)) * 100.0).ceil() / 100.0,
    }
}

/// Labels of letters, digits and hyphens, as DNS has them; the pod's name where it is one.
pub fn host_name(pod: &SandboxConfig) -> String {
    let wanted = if pod.hostname.is_empty() { &pod.metadata.name } else { &pod.hostname };
    let name: String = wanted
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' })
        .take(NAME_MAX)
        .collect();
    let labels = name.split('.').map(|label| label.trim_matches('-')).filter(|label| !label.is_empty());
    let name = labels.collect::<Vec<_>>().join(".");
    if name.is_empty() { "pod".to_owned() } else { name }
}

/// Words for the GUI's lists.
pub fn tags(pod: &SandboxConfig) -> Tags {
    let word = |text: &str| {
        text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect::<String>()
    };
    format!("k8s;ns-{}", word(&pod.metadata.namespace)).parse().unwrap_or_default()
}

/// What is to be seen in the GUI's notes; the identity comes below it.
pub fn words(pod: &SandboxConfig) -> String {
    let m = &pod.metadata;
    let line = |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect::<String>();
    format!("Pod {}/{}\n\nuid {}", line(&m.namespace), line(&m.name), line(&m.uid))
}
