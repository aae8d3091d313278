//! Classes of block I/O and of Intel RDT that annotations put containers into, by the names that containerd and CRI-O know.
//!
//! Pure: what a class is, and whether there is such a one, is looked up by whoever makes the container.

use std::collections::BTreeMap;

/// Annotations of a pod or a container.
type Annotations = BTreeMap<String, String>;

/// A kind of classes: which annotations name one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// On a container, which only what makes it (a kubelet's plugin, crictl) can set.
    pub container: &'static str,
    /// On a pod, for all of its containers.
    pub pod: &'static str,
    /// On a pod, with a container's name behind it, for that one alone.
    pub one: &'static str,
}

/// Weights and limits of block devices.
pub const BLOCKIO: Kind = Kind {
    container: "io.kubernetes.cri.blockio-class",
    pod: "blockio.resources.beta.kubernetes.io/pod",
    one: "blockio.resources.beta.kubernetes.io/container.",
};

/// Groups of caches and memory bandwidth (/sys/fs/resctrl).
pub const RDT: Kind = Kind {
    container: "io.kubernetes.cri.rdt-class",
    pod: "rdt.resources.beta.kubernetes.io/pod",
    one: "rdt.resources.beta.kubernetes.io/container.",
};

/// A class that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its name.
    pub class: String,
    /// The annotation that names it.
    pub annotation: String,
}

impl Kind {
    /// The class of the container `name`: its own annotation counts before its pod's for it, and that before its pod's for all. An
    /// empty name asks for none.
    pub fn of(&self, name: &str, container: &Annotations, pod: &Annotations) -> Option<Asked> {
        let one = format!("{}{name}", self.one);
        let places = [(container, self.container), (pod, one.as_str()), (pod, self.pod)];
        let (annotation, class) = places.iter().find_map(|(from, key)| Some((*key, from.get(*key)?)))?;
        (!class.is_empty()).then(|| Asked { class: class.clone(), annotation: annotation.to_owned() })
    }
}

/// Whether a name can be that of a group of resctrl, whose folders of other names are the kernel's.
pub fn is_rdt_group(name: &str) -> bool {
    let fits = !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && !name.contains(['/', '\n', '\0']);
    fits && !["info", "mon_data", "mon_groups"].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(list: &[(&str, &str)]) -> Annotations {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn the_nearest_annotation_counts() {
        let none = annotations(&[]);
        let pod = annotations(&[
            ("blockio.resources.beta.kubernetes.io/pod", "slow"),
            ("blockio.resources.beta.kubernetes.io/container.db", "fast"),
            ("blockio.resources.beta.kubernetes.io/container.free", ""),
            ("rdt.resources.beta.kubernetes.io/container.db", "gold"),
        ]);
        let own = annotations(&[("io.kubernetes.cri.blockio-class", "own"), ("io.kubernetes.cri.rdt-class", "silver")]);
        let of = |kind: Kind, name: &str, own: &Annotations| kind.of(name, own, &pod).map(|a| a.class);
        assert_eq!(of(BLOCKIO, "web", &none).as_deref(), Some("slow"));
        assert_eq!(of(BLOCKIO, "db", &none).as_deref(), Some("fast"));
        assert_eq!(of(BLOCKIO, "free", &none), None);
        assert_eq!(of(BLOCKIO, "db", &own).as_deref(), Some("own"));
        assert_eq!(of(RDT, "web", &none), None);
        assert_eq!(of(RDT, "db", &none).as_deref(), Some("gold"));
        assert_eq!(of(RDT, "db", &own).as_deref(), Some("silver"));
        let asked = BLOCKIO.of("db", &none, &pod).expect("a class");
        assert_eq!(asked.annotation, "blockio.resources.beta.kubernetes.io/container.db");
    }
}
