//! User namespaces of pods: which are taken, and how the spec says them.
//!
//! Pure; what can't be honoured is refused by name. Called before a pod is made and for each of its containers.

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use super::{SpecInput, built};
use crate::core::error::{Error, Kind, Result};
use crate::core::records::ResolvedUser;
use crate::core::spec::{IdMapping, NamespaceMode, Namespaces, UserNamespace};

/// The group of terminals on the host and in most images; devpts gives it to new ones where it is mapped.
const TTY_GROUP: u32 = 5;

/// Refuses user namespaces that a pod can't have: as KEP-127 wants it, one range of users and one of groups, from 0 on.
pub fn check_pod(wanted: &Namespaces) -> Result<()> {
    let Some(user) = &wanted.user else { return Ok(()) };
    for (what, map) in [("uid", &user.uids), ("gid", &user.gids)] {
        let [line] = map.as_slice() else {
            return Err(Error::invalid(format!(
                "user namespace: exactly one {what} mapping is possible, not {}",
                map.len()
            )));
        };
        if line.container_id != 0 {
            return Err(Error::invalid(format!(
                "user namespace: the {what} mapping begins at {} and does not map 0",
                line.container_id
            )));
        }
        check_range(line).map_err(|why| Error::invalid(format!("user namespace: the {what} mapping {why}")))?;
    }
    // They would belong to the host and give nothing to whoever is root in the pod; the API server refuses them, too.
    for (what, mode) in [("network", wanted.network), ("PID", wanted.pid), ("IPC", wanted.ipc)] {
        if mode == NamespaceMode::Node {
            return Err(Error::new(
                Kind::Unimplemented,
                format!("a user namespace together with the host's {what} namespace is not supported"),
            ));
        }
    }
    Ok(())
}

fn check_range(line: &IdMapping) -> std::result::Result<(), &'static str> {
    // The last number is no id: it means "no change" to the kernel.
    let fits = |first: u32| first.checked_add(line.length).is_some();
    match line.length {
        0 => Err("is empty"),
        _ if fits(line.host_id) && fits(line.container_id) => Ok(()),
        _ => Err("goes beyond the largest id"),
    }
}

/// Refuses a container whose user namespace is not its pod's, or whose user has no number there.
pub(super) fn check_container(input: &SpecInput<'_>) -> Result<()> {
    let (own, pods) = (&input.config.security.namespaces, &input.pod.config.security.namespaces);
    if own.user != pods.user {
        return Err(Error::invalid(format!(
            "the container's user namespace ({}) is not the sandbox's ({})",
            described(own.user.as_ref()),
            described(pods.user.as_ref())
        )));
    }
    let Some(user) = &own.user else { return Ok(()) };
    check_pod(own)?;
    if input.facts.userns.is_none() {
        return Err(Error::internal("a pod with a user namespace that is pinned nowhere"));
    }
    check_user(user, input.user)
}

fn check_user(user: &UserNamespace, whom: &ResolvedUser) -> Result<()> {
    let missing = |what: &str, id: u32| {
        Error::invalid(format!("{what} {id} has no number in the pod's user namespace ({})", described(Some(user))))
    };
    if user.host_uid(whom.uid).is_none() {
        return Err(missing("user", whom.uid));
    }
    match [whom.gid].iter().chain(&whom.groups).find(|gid| user.host_gid(**gid).is_none()) {
        Some(gid) => Err(missing("group", *gid)),
        None => Ok(()),
    }
}

fn described(user: Option<&UserNamespace>) -> String {
    let Some(user) = user else { return "the host's".into() };
    let lines = |map: &[IdMapping]| {
        let one = |m: &IdMapping| format!("{}:{}:{}", m.container_id, m.host_id, m.length);
        map.iter().map(one).collect::<Vec<_>>().join(",")
    };
    format!("uids {}, gids {}", lines(&user.uids), lines(&user.gids))
}

/// An id map as the spec says it.
pub(super) fn mappings(map: &[IdMapping]) -> Result<Vec<LinuxIdMapping>> {
    let one = |m: &IdMapping| {
        built(LinuxIdMappingBuilder::default().container_id(m.container_id).host_id(m.host_id).size(m.length).build())
    };
    map.iter().map(one).collect()
}

/// The maps of an idmapped mount; None: it is not one. An image's mount comes with its pod's maps and needs no others.
pub fn of_mount(mount: &crate::core::spec::Mount) -> Result<Option<UserNamespace>> {
    if mount.image.is_some() { Ok(None) } else { asked_of_mount(mount) }
}

/// The maps that a mount is asked for with.
pub(super) fn asked_of_mount(mount: &crate::core::spec::Mount) -> Result<Option<UserNamespace>> {
    let user = UserNamespace { uids: mount.uid_mappings.clone(), gids: mount.gid_mappings.clone() };
    match (user.uids.is_empty(), user.gids.is_empty()) {
        (true, true) => return Ok(None),
        (false, false) => {}
        _ => return Err(Error::invalid("an idmapped mount needs mappings for users and for groups")),
    }
    for line in user.uids.iter().chain(&user.gids) {
        check_range(line).map_err(|why| Error::invalid(format!("a mapping {why}")))?;
    }
    Ok(Some(user))
}

/// The devpts option that gives new terminals to their group.
pub(super) fn tty_group(input: &SpecInput<'_>) -> Option<String> {
    let user = input.config.security.namespaces.user.as_ref();
    user.is_none_or(|u| u.host_gid(TTY_GROUP).is_some()).then(|| format!("gid={TTY_GROUP}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(container_id: u32, host_id: u32, length: u32) -> Vec<IdMapping> {
        vec![IdMapping { host_id, container_id, length }]
    }

    fn pod(uids: Vec<IdMapping>, gids: Vec<IdMapping>) -> Namespaces {
        Namespaces { user: Some(UserNamespace { uids, gids }), ..Default::default() }
    }

    #[test]
    fn only_one_range_from_zero_on_is_taken() {
        let good = || map(0, 100_000, 65_536);
        check_pod(&Namespaces::default()).expect("none");
        check_pod(&pod(good(), good())).expect("fits");
        for (bad, word) in [
            (vec![], "exactly one"),
            ([map(0, 1, 1), map(1, 5, 1)].concat(), "exactly one"),
            (map(1, 100_000, 65_536), "does not map 0"),
            (map(0, 100_000, 0), "empty"),
            (map(0, u32::MAX, 1), "largest"),
        ] {
            for (uids, gids, which) in [(bad.clone(), good(), "uid"), (good(), bad.clone(), "gid")] {
                let e = check_pod(&pod(uids, gids)).expect_err(word);
                assert!(e.kind() == Kind::InvalidArgument && e.chain().contains(word), "{e:?}");
                assert!(e.chain().contains(which), "{e:?}");
            }
        }
        let shared = Namespaces { network: NamespaceMode::Node, ..pod(good(), good()) };
        let e = check_pod(&shared).expect_err("host network");
        assert!(e.kind() == Kind::Unimplemented && e.chain().contains("host's network"), "{e:?}");
    }

    #[test]
    fn users_and_groups_without_a_number_are_named() {
        let user = UserNamespace { uids: map(0, 100_000, 1000), gids: map(0, 200_000, 1000) };
        let whom = |uid, gid, groups: &[u32]| ResolvedUser { uid, gid, groups: groups.to_vec() };
        check_user(&user, &whom(999, 999, &[0, 5])).expect("mapped");
        assert_eq!((user.host_uid(999), user.host_gid(0)), (Some(100_999), Some(200_000)));
        for (whom, word) in [
            (whom(1000, 0, &[]), "user 1000"),
            (whom(0, 1000, &[]), "group 1000"),
            (whom(0, 0, &[5, 70_000]), "group 70000"),
        ] {
            let e = check_user(&user, &whom).expect_err(word);
            assert!(e.kind() == Kind::InvalidArgument && e.chain().contains(word), "{e:?}");
        }
    }

    #[test]
    fn a_mount_is_mapped_for_both_or_for_none() {
        let mount =
            |uid_mappings, gid_mappings| crate::core::spec::Mount { uid_mappings, gid_mappings, ..Default::default() };
        assert_eq!(of_mount(&mount(vec![], vec![])).expect("none"), None);
        assert!(of_mount(&mount(map(0, 1, 5), map(0, 1, 5))).expect("both").is_some());
        assert!(of_mount(&mount(map(0, 1, 5), vec![])).is_err());
        assert!(of_mount(&mount(map(0, 1, 0), map(0, 1, 5))).is_err());
    }
}
