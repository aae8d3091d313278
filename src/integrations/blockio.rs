//! Classes of block I/O: a YAML file of the administrator's that gives each a name, weights and limits of devices.
//!
//! The format is that of goresctrl, which containerd and CRI-O read. The file is read anew for each container that asks for a class
//! (`backends::pods`), and by `doctor`; both **block on the disk**. A file that can't be understood fails the container with its name.
//! Nothing is kept, nothing is changed.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Component, Utf8Path, Utf8PathBuf};
use serde::Deserialize;

use crate::core::error::{Error, Result};
use crate::core::quota;

/// Largest file, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// Weights that the kernel's scheduler takes in OCI specifications.
const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;
/// A pattern with more devices than this is a mistake.
const DEVICES_MAX: usize = 4096;

/// A device's numbers.
pub type Number = (u32, u32);

/// What one device gives; None: nothing is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Share of it, 10 to 1000.
    pub weight: Option<u16>,
    /// Bytes a second; 0: no limit.
    pub read_bps: Option<u64>,
    /// Bytes a second; 0: no limit.
    pub write_bps: Option<u64>,
    /// Requests a second; 0: no limit.
    pub read_iops: Option<u64>,
    /// Requests a second; 0: no limit.
    pub write_iops: Option<u64>,
}

/// A class, with the devices that are there now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockIo {
    /// Share of the devices that are not named, 10 to 1000.
    pub weight: Option<u16>,
    /// The others.
    pub devices: BTreeMap<Number, Limits>,
    /// Patterns that no block device fits.
    pub unmatched: Vec<String>,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    #[serde(rename = "Classes")]
    classes: BTreeMap<String, Vec<Entry>>,
}

/// A number, or a text with a unit.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Quantity {
    Number(u64),
    Text(String),
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "PascalCase")]
struct Entry {
    /// None: all that no other entry names.
    devices: Option<Vec<String>>,
    throttle_read_bps: Option<Quantity>,
    throttle_write_bps: Option<Quantity>,
    #[serde(rename = "ThrottleReadIOPS")]
    throttle_read_iops: Option<Quantity>,
    #[serde(rename = "ThrottleWriteIOPS")]
    throttle_write_iops: Option<Quantity>,
    weight: Option<Quantity>,
}

/// An entry, understood.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    devices: Option<Vec<String>>,
    limits: Limits,
}

/// All classes of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Classes {
    file: Utf8PathBuf,
    classes: BTreeMap<String, Vec<Rule>>,
}

/// Reads the file.
pub fn read(file: &Utf8Path) -> Result<Classes> {
    let failed = |e| Error::io(format!("read the classes of block I/O in {file}"), e);
    let text = crate::utils::beneath::read_file("/".as_ref(), file.as_std_path(), FILE_MAX).map_err(failed)?;
    let text = String::from_utf8(text).map_err(|_| Error::precondition(format!("{file} is not UTF-8")))?;
    let classes = parse(&text).map_err(|why| Error::precondition(format!("{file}: {why}")))?;
    Ok(Classes { file: file.to_owned(), classes })
}

fn parse(text: &str) -> std::result::Result<BTreeMap<String, Vec<Rule>>, String> {
    let file: File = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
    let class = |(name, entries): (String, Vec<Entry>)| {
        let rules = entries.into_iter().map(rule).collect::<std::result::Result<_, _>>();
        let rules = rules.map_err(|why: String| format!("class {name:?}: {why}"))?;
        Ok((name, rules))
    };
    file.classes.into_iter().map(class).collect()
}

fn rule(entry: Entry) -> std::result::Result<Rule, String> {
    let number = |name: &str, quantity: &Option<Quantity>| match quantity {
        None => Ok(None),
        Some(Quantity::Number(n)) => Ok(Some(*n)),
        Some(Quantity::Text(text)) => quota::quantity(text).map(Some).map_err(|e| format!("{name}: {}", e.chain())),
    };
    let weight = match number("Weight", &entry.weight)? {
        None => None,
        Some(n) if WEIGHTS.contains(&n) => u16::try_from(n).ok(),
        Some(n) => return Err(format!("Weight {n} is not in {} to {}", WEIGHTS.start(), WEIGHTS.end())),
    };
    let limits = Limits {
        weight,
        read_bps: number("ThrottleReadBps", &entry.throttle_read_bps)?,
        write_bps: number("ThrottleWriteBps", &entry.throttle_write_bps)?,
        read_iops: number("ThrottleReadIOPS", &entry.throttle_read_iops)?,
        write_iops: number("ThrottleWriteIOPS", &entry.throttle_write_iops)?,
    };
    match &entry.devices {
        None if limits != (Limits { weight, ..Limits::default() }) => {
            return Err("an entry without Devices can have a Weight alone".into());
        }
        Some(devices) if devices.is_empty() => return Err("Devices is an empty list".into()),
        Some(devices) => {
            if let Some(bad) = devices.iter().find(|d| !d.starts_with("/dev/") || d.split('/').any(|p| p == "..")) {
                return Err(format!("Devices: {bad:?} is not below /dev"));
            }
        }
        None => {}
    }
    if limits == Limits::default() {
        return Err("an entry that says nothing".into());
    }
    Ok(Rule { devices: entry.devices, limits })
}

impl Classes {
    /// Their names.
    pub fn names(&self) -> Vec<&str> {
        self.classes.keys().map(String::as_str).collect()
    }

    /// A class with the devices that are there. Of entries that fit one device the last that says something counts, value by value.
    pub fn class(&self, name: &str) -> Result<BlockIo> {
        self.class_in(name, &|pattern| devices(Utf8Path::new(pattern)))
    }

    fn class_in(&self, name: &str, find: &dyn Fn(&str) -> Vec<Number>) -> Result<BlockIo> {
        let rules = self.classes.get(name).ok_or_else(|| {
            let known = self.names().join(", ");
            Error::precondition(format!("block I/O class {name:?} is not in {}, which has {known:?}", self.file))
        })?;
        let mut made = BlockIo::default();
        for rule in rules {
            let Some(patterns) = &rule.devices else {
                made.weight = rule.limits.weight;
                continue;
            };
            for pattern in patterns {
                let found = find(pattern);
                if found.is_empty() {
                    made.unmatched.push(pattern.clone());
                }
                for number in found {
                    let old = made.devices.entry(number).or_default();
                    let new = rule.limits;
                    *old = Limits {
                        weight: new.weight.or(old.weight),
                        read_bps: new.read_bps.or(old.read_bps),
                        write_bps: new.write_bps.or(old.write_bps),
                        read_iops: new.read_iops.or(old.read_iops),
                        write_iops: new.write_iops.or(old.write_iops),
                    };
                }
            }
        }
        Ok(made)
    }
}

/// Numbers of the block devices that a pattern fits. The kernel limits disks, not their partitions: those are left out.
fn devices(pattern: &Utf8Path) -> Vec<Number> {
    let mut found = Vec::new();
    for path in expand(pattern) {
        // What comes and goes meanwhile is not there.
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let partition = format!("/sys/dev/block/{}:{}/partition", number.0, number.1);
        let is_disk = meta.file_type().is_block_device() && !Utf8Path::new(&partition).try_exists().unwrap_or(false);
        if is_disk && !found.contains(&number) {
            found.push(number);
        }
    }
    found
}

/// Paths that are there and fit.
fn expand(pattern: &Utf8Path) -> Vec<Utf8PathBuf> {
    let mut found = vec![Utf8PathBuf::from("/")];
    for part in pattern.components() {
        let Utf8Component::Normal(part) = part else { continue };
        let mut next = Vec::new();
        for folder in found {
            if !part.contains(['*', '?', '[', '\\']) {
                next.push(folder.join(part));
                continue;
            }
            let entries = folder.read_dir_utf8().into_iter().flatten().flatten();
            next.extend(entries.filter(|e| fits(part, e.file_name())).map(|e| e.path().to_owned()));
        }
        next.sort();
        next.truncate(DEVICES_MAX);
        found = next;
    }
    found
}

/// Whether a name fits a pattern of a shell: `*`, `?`, `[a-z]`, `[^a-z]`, and `\` before one that is meant as it is.
fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // Where the last `*` stands, and up to where it may have to reach.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if pattern.get(p) == Some(&'*') {
            star = Some((p, n));
            p += 1;
            continue;
        }
        match one(&pattern[p..], name[n]) {
            Some(taken) => (p, n) = (p + taken, n + 1),
            None => match &mut star {
                Some((at, reach)) => {
                    *reach += 1;
                    (p, n) = (*at + 1, *reach);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// How much of the pattern stands for this character; None: nothing does.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern {
        ['?', ..] => Some(1),
        ['\\', meant, ..] => (*meant == c).then_some(2),
        ['[', rest @ ..] => {
            let (not, rest) = match rest {
                ['^' | '!', rest @ ..] => (true, rest),
                rest => (false, rest),
            };
            let end = rest.iter().skip(1).position(|c| *c == ']')? + 1;
            let (mut i, mut found) = (0, false);
            while i < end {
                let last = if i + 2 < end && rest[i + 1] == '-' { i + 2 } else { i };
                found |= (rest[i]..=rest[last]).contains(&c);
                i = last + 1;
            }
            (found != not).then_some(end + 2 + usize::from(not))
        }
        [same, ..] => (*same == c).then_some(1),
        [] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "Classes:\n  slow:\n    - Weight: 80\n    - Devices: [/dev/sd*, /dev/none]\n      ThrottleReadBps: 50M\n      \
                        ThrottleWriteBps: 10Mi\n      ThrottleReadIOPS: 10k\n      ThrottleWriteIOPS: 5000\n      Weight: 50\n    - \
                        Devices:\n        - /dev/disk/by-id/*SSD*\n      ThrottleReadBps: \"100M\"\n  fast:\n    - Weight: 400\n";

    fn classes(text: &str) -> Classes {
        Classes { file: "/etc/blockio.yaml".into(), classes: parse(text).expect(text) }
    }

    #[test]
    fn later_entries_win_value_by_value() {
        let classes = classes(FILE);
        assert_eq!(classes.names(), ["fast", "slow"]);
        let find = |pattern: &str| match pattern {
            "/dev/sd*" => vec![(8, 0), (8, 16)],
            "/dev/disk/by-id/*SSD*" => vec![(8, 16)],
            _ => Vec::new(),
        };
        let slow = classes.class_in("slow", &find).expect("a class");
        let hdd = Limits {
            weight: Some(50),
            read_bps: Some(50_000_000),
            write_bps: Some(10 << 20),
            read_iops: Some(10_000),
            write_iops: Some(5000),
        };
        assert_eq!((slow.weight, slow.devices[&(8, 0)]), (Some(80), hdd));
        assert_eq!(slow.devices[&(8, 16)], Limits { read_bps: Some(100_000_000), ..hdd });
        assert_eq!(slow.unmatched, ["/dev/none"]);
        let fast = classes.class_in("fast", &find).expect("a class");
        assert_eq!((fast.weight, fast.devices.len()), (Some(400), 0));
        let e = classes.class("gold").expect_err("none");
        assert!(e.chain().contains("\"gold\"") && e.chain().contains("fast, slow"), "{}", e.chain());
    }

    #[test]
    fn what_can_not_be_is_refused_by_name() {
        let of = |entry: &str| parse(&format!("Classes:\n  a:\n    - {entry}\n")).expect_err(entry);
        for (entry, says) in [
            ("{Weight: 9}", "Weight 9"),
            ("{Weight: 1001}", "Weight 1001"),
            ("{Weight: much}", "Weight: size \"much\""),
            ("{ThrottleReadBps: 1M}", "without Devices"),
            ("{Devices: [], Weight: 50}", "empty list"),
            ("{Devices: [/dev/sda]}", "says nothing"),
            ("{Devices: [sda], Weight: 50}", "not below /dev"),
            ("{Devices: [/dev/../etc/x], Weight: 50}", "not below /dev"),
            ("{Devices: [/dev/sda], ThrottleReadBps: 1.5M}", "ThrottleReadBps"),
            ("{Devices: [/dev/sda], Throttle: 1}", "Throttle"),
        ] {
            let why = of(entry);
            assert!(why.contains(says), "{entry}: {why}");
        }
        assert!(parse("Klasses: {}").is_err());
        assert!(parse("").expect("an empty file").is_empty());
    }

    #[test]
    fn patterns_of_a_shell() {
        for (pattern, name, good) in [
            ("sd*", "sda", true),
            ("sd*", "vda", false),
            ("sd[a-c]", "sdb", true),
            ("sd[a-c]", "sdd", false),
            ("sd[^a-c]", "sdd", true),
            ("sd[!a-c]", "sda", false),
            ("sd[ax-z]", "sdy", true),
            ("*SSD*", "ata-VendorXSSD_1", true),
            ("*SSD", "ata-SSD-SSD", true),
            ("*SSD", "ata-SSD-1", false),
            ("nvme?n?", "nvme0n1", true),
            ("nvme?n?", "nvme0n1p1", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("[", "[", false),
            ("[]]", "]", true),
            ("", "", true),
            ("**", "", true),
        ] {
            assert_eq!(fits(pattern, name), good, "{pattern} {name}");
        }
        assert_eq!(expand("/dev/nul[l]".into()), ["/dev/null"]);
        assert!(devices("/dev/null".into()).is_empty(), "it is no block device");
    }

    proptest::proptest! {
        #[test]
        fn no_pattern_is_too_odd(pattern in "[]ab*?\\[^!\\\\-]{0,12}", name in "[]ab*\\[-]{0,12}") {
            let _ = fits(&pattern, &name);
            proptest::prop_assert!(fits("*", &name));
        }
    }
}
