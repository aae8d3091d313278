//! How much a container may write into its root file system: asked for by an annotation, or the node's default.
//!
//! Nothing in the CRI carries an ephemeral-storage limit (a kubelet measures and evicts), so a pod says it by
//! [`ANNOTATION`]. Used by the engine when it makes a container; the result is in the container's record. Pure. Fails
//! with InvalidArgument, which names what was written.

use std::collections::BTreeMap;

use super::error::{Error, Result};

/// On a pod, for each of its containers; on a container, for it alone. A quantity as Kubernetes writes them ("10Gi",
/// "500M", bytes); "0" is no limit, whatever the node's default is.
pub const ANNOTATION: &str = "lxcri.proxmox.com/ephemeral-storage";

const UNITS: [(&str, u64); 11] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("", 1),
];

/// Least limit in bytes: a container needs room for the few files that are made for it.
const LEAST: u64 = 1 << 20;

/// Bytes of a limit, 0 for none: whole numbers with Ki, Mi, Gi, Ti, Pi, k, M, G, T, P or nothing behind them.
pub fn bytes(text: &str) -> Result<u64> {
    match quantity(text)? {
        1..LEAST => Err(Error::invalid(format!("size {text:?}: less than 1Mi; \"0\" is no limit"))),
        bytes => Ok(bytes),
    }
}

/// A number as Kubernetes writes them: whole, with Ki, Mi, Gi, Ti, Pi, k, M, G, T, P or nothing behind it.
pub fn quantity(text: &str) -> Result<u64> {
    let bad = |why| Error::invalid(format!("size {text:?}: {why}"));
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(bad("a whole number and Ki, Mi, Gi, Ti, Pi, k, M, G, T, P or nothing"));
    };
    if number.is_empty() {
        return Err(bad("it has no number"));
    }
    let number: Option<u64> = number.parse().ok();
    number.and_then(|n| n.checked_mul(*factor)).ok_or_else(|| bad("larger than 16 EiB"))
}

/// Annotations of a pod or a container.
type Annotations = BTreeMap<String, String>;

/// Bytes that a container may write, by its own annotations and its pod's; 0: no limit.
pub fn of(pod: &Annotations, container: &Annotations, default: u64) -> Result<u64> {
    match container.get(ANNOTATION).or_else(|| pod.get(ANNOTATION)) {
        Some(text) => bytes(text).map_err(|e| e.context(format!("annotation {ANNOTATION}"))),
        None => Ok(default),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, expected) in [
            ("0", 0),
            ("0Gi", 0),
            ("1048576", 1 << 20),
            ("1Mi", 1 << 20),
            ("10Gi", 10 << 30),
            ("500M", 500_000_000),
            ("1024Ki", 1 << 20),
            ("3000k", 3_000_000),
            ("16383Pi", 16_383 << 50),
        ] {
            assert_eq!(bytes(text).expect(text), expected, "{text}");
        }
        for bad in [
            "",
            "Gi",
            "-1",
            "1.5Gi",
            "1 Gi",
            "1GiB",
            "1gi",
            "16384Pi",
            "99999999999999999999",
            "٣",
            "1",
            "1Ki",
            "1M",
            "1023Ki",
        ] {
            let e = bytes(bad).expect_err(bad);
            assert_eq!(e.kind(), crate::core::error::Kind::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn the_nearest_word_counts() {
        let (mut pod, mut container) = (Annotations::new(), Annotations::new());
        assert_eq!(of(&pod, &container, 7).expect("default"), 7);
        pod.insert(ANNOTATION.into(), "2Mi".into());
        assert_eq!(of(&pod, &container, 7).expect("the pod's"), 2 << 20);
        container.insert(ANNOTATION.into(), "0".into());
        assert_eq!(of(&pod, &container, 7).expect("its own"), 0);
        container.insert(ANNOTATION.into(), "much".into());
        let e = of(&pod, &container, 7).expect_err("no size");
        assert!(e.chain().contains(ANNOTATION) && e.chain().contains("much"), "{}", e.chain());
    }

    proptest::proptest! {
        #[test]
        fn no_text_is_too_odd(text in "\\PC{0,12}|[0-9]{0,22}[KMGTPikm]{0,3}") {
            let _ = bytes(&text);
        }
    }
}
