//! Names of CDI devices: `vendor.com/class=device`, from the request and from annotations. Pure.

use std::collections::BTreeMap;
use std::fmt;

use super::CdiError;

/// Annotations with this prefix name devices, separated by commas, as older kubelets' device plugins do.
pub const ANNOTATIONS: &str = "cdi.k8s.io/";

/// A device, fully qualified.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName {
    /// "vendor.com/class".
    pub kind: String,
    /// "gpu0".
    pub name: String,
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.name)
    }
}

fn bad(given: &str, why: &'static str) -> CdiError {
    CdiError::Name { given: given.chars().take(200).collect(), why }
}

/// Whether `text` begins as `first` says, ends in a letter or digit, and has nothing but these and `between` inside.
fn fits(text: &str, first: fn(&char) -> bool, between: &str) -> bool {
    text.chars().next().is_some_and(|c| first(&c))
        && text.chars().all(|c| c.is_ascii_alphanumeric() || between.contains(c))
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
}

/// Checks "vendor.com/class".
pub fn check_kind(kind: &str) -> Result<(), CdiError> {
    let Some((vendor, class)) = kind.split_once('/') else { return Err(bad(kind, "it is not vendor/class")) };
    match (fits(vendor, char::is_ascii_alphabetic, "_-."), fits(class, char::is_ascii_alphabetic, "_-.")) {
        (true, true) => Ok(()),
        (false, _) => Err(bad(kind, "its vendor is no vendor's name")),
        (_, false) => Err(bad(kind, "its class is no class's name")),
    }
}

/// Checks "gpu0".
pub fn check_device(name: &str) -> Result<(), CdiError> {
    let good = fits(name, char::is_ascii_alphanumeric, "_-.:");
    if good { Ok(()) } else { Err(bad(name, "it is no device's name")) }
}

impl std::str::FromStr for DeviceName {
    type Err = CdiError;

    fn from_str(text: &str) -> Result<Self, CdiError> {
        let (kind, name) = text.split_once('=').ok_or_else(|| bad(text, "it is not vendor/class=device"))?;
        check_kind(kind)?;
        check_device(name)?;
        Ok(Self { kind: kind.to_owned(), name: name.to_owned() })
    }
}

/// Devices that a container is to have, each once, those of the request first.
pub fn wanted(devices: &[String], annotations: &BTreeMap<String, String>) -> Result<Vec<DeviceName>, CdiError> {
    let annotated = annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATIONS));
    let annotated = annotated.flat_map(|(_, value)| value.split(',').map(str::trim));
    let mut all: Vec<DeviceName> = Vec::new();
    for text in devices.iter().map(String::as_str).chain(annotated) {
        let name = text.parse()?;
        if !all.contains(&name) {
            all.push(name);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_vendor_class_device() {
        for good in ["vendor.com/class=dev", "v/c=0", "nvidia.com/gpu=GPU-1:2.3", "a-b_c.d/e_f=x"] {
            assert_eq!(good.parse::<DeviceName>().expect(good).to_string(), good);
        }
        for bad in [
            "",
            "dev",
            "vendor.com/class",
            "vendor.com=dev",
            "/c=d",
            "v/=d",
            "v/c=",
            "1v/c=d",
            "v/c=-d",
            "v-/c=d",
            "v/c=d/../e",
            "v/c=d=e",
            "v/c=d\n",
        ] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn annotations_name_devices_too() {
        let annotations = BTreeMap::from([
            ("cdi.k8s.io/plugin_x".to_owned(), "v/c=a, v/c=b".to_owned()),
            ("other".to_owned(), "nonsense".to_owned()),
        ]);
        let found = wanted(&["v/c=b".to_owned()], &annotations).expect("names");
        assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), ["v/c=b", "v/c=a"]);
        assert!(wanted(&[], &BTreeMap::from([("cdi.k8s.io/x".to_owned(), String::new())])).is_err());
    }
}
