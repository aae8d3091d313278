//! Whom a container runs as: the image's user or the request's, looked up in the image's own passwd and group.
//!
//! Pure: the files' contents are given. They are hostile input: lines that don't parse are skipped, numbers out of
//! range never match.

use crate::core::error::{Error, Result};
use crate::core::records::ResolvedUser;
use crate::core::spec::{ContainerSecurity, SupplementalGroupsPolicy};

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn passwd_entries(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut f = line.split(':');
        let (name, _, uid, gid) = (f.next()?, f.next()?, f.next()?, f.next()?);
        Some(PasswdEntry { name, uid: id(uid)?, gid: id(gid)? })
    })
}

fn group_entries(text: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut f = line.split(':');
        let (name, _, gid) = (f.next()?, f.next()?, f.next()?);
        Some(GroupEntry { name, gid: id(gid)?, members: f.next().unwrap_or_default() })
    })
}

/// Ids fit 31 bits: 4294967295 means "no change" to setuid(2), and names that are numbers are numbers.
fn id(text: &str) -> Option<u32> {
    text.trim().parse::<u32>().ok().filter(|n| *n <= i32::MAX as u32)
}

/// Resolves user, group and supplementary groups.
///
/// The request's numeric user wins over its user name, both over `image_user` ("user[:group]", names or numbers).
/// A number that passwd does not know has group 0; a name that it does not know is an error.
pub fn resolve(request: &ContainerSecurity, image_user: &str, passwd: &str, group: &str) -> Result<ResolvedUser> {
    let in_range = |n: i64, what: &str| {
        u32::try_from(n)
            .ok()
            .filter(|n| *n <= i32::MAX as u32)
            .ok_or_else(|| Error::invalid(format!("{what} {n} is out of range")))
    };
    let (user, image_group) = match (request.run_as_user, request.run_as_username.as_str()) {
        (Some(n), _) => (in_range(n, "run_as_user")?.to_string(), None),
        (None, name) if !name.is_empty() => (name.to_string(), None),
        _ if request.run_as_group.is_some() => {
            return Err(Error::invalid("run_as_group needs run_as_user or run_as_username"));
        }
        _ => match image_user.split_once(':') {
            Some((user, group)) => (user.to_string(), Some(group)),
            None => (image_user.to_string(), None),
        },
    };
    let user = if user.is_empty() { "0".to_string() } else { user };
    let entry = match id(&user) {
        Some(uid) => passwd_entries(passwd).find(|e| e.uid == uid),
        None => passwd_entries(passwd).find(|e| e.name == user),
    };
    let uid = match (&entry, id(&user)) {
        (Some(e), _) => e.uid,
        (None, Some(uid)) => uid,
        (None, None) => return Err(Error::invalid(format!("the image has no user {user:?}"))),
    };
    let gid = match (request.run_as_group, image_group) {
        (Some(n), _) => in_range(n, "run_as_group")?,
        (None, Some(name)) if !name.is_empty() => match id(name) {
            Some(gid) => gid,
            None => group_entries(group)
                .find(|g| g.name == name)
                .map(|g| g.gid)
                .ok_or_else(|| Error::invalid(format!("the image has no group {name:?}")))?,
        },
        _ => entry.as_ref().map_or(0, |e| e.gid),
    };
    let mut groups = vec![gid];
    if request.supplemental_groups_policy == SupplementalGroupsPolicy::Merge
        && let Some(e) = &entry
    {
        groups.extend(group_entries(group).filter(|g| g.members.split(',').any(|m| m.trim() == e.name)).map(|g| g.gid));
    }
    for n in &request.supplemental_groups {
        groups.push(in_range(*n, "supplemental group")?);
    }
    let mut seen = std::collections::BTreeSet::new();
    groups.retain(|g| seen.insert(*g));
    Ok(ResolvedUser { uid, gid, groups })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\nu:x:1000:1000::/home/u:/bin/sh\nbroken\nhuge:x:4294967295:0::/:/\n";
    const GROUP: &str = "root:x:0:\nwww-data:x:33:\nstaff:x:50000:u,www-data\n";

    fn of(request: ContainerSecurity, image: &str) -> Result<ResolvedUser> {
        resolve(&request, image, PASSWD, GROUP)
    }

    #[test]
    fn image_users_in_all_four_forms() {
        let r = |image| of(ContainerSecurity::default(), image).expect(image);
        assert_eq!(r(""), ResolvedUser { uid: 0, gid: 0, groups: vec![0] });
        assert_eq!(r("1002"), ResolvedUser { uid: 1002, gid: 0, groups: vec![0] });
        assert_eq!(r("www-data"), ResolvedUser { uid: 33, gid: 33, groups: vec![33, 50000] });
        assert_eq!(r("1003:1004"), ResolvedUser { uid: 1003, gid: 1004, groups: vec![1004] });
        assert_eq!(r("www-data:staff"), ResolvedUser { uid: 33, gid: 50000, groups: vec![50000] });
        for unknown in ["nobody-here", "1000:nogroup", "huge"] {
            assert!(of(ContainerSecurity::default(), unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn the_request_wins_and_strict_drops_the_images_groups() {
        let request = ContainerSecurity {
            run_as_user: Some(1000),
            run_as_group: Some(7),
            supplemental_groups: vec![1234, 7],
            ..Default::default()
        };
        assert_eq!(
            of(request.clone(), "www-data").expect("user"),
            ResolvedUser { uid: 1000, gid: 7, groups: vec![7, 50000, 1234] }
        );
        let strict = ContainerSecurity { supplemental_groups_policy: SupplementalGroupsPolicy::Strict, ..request };
        assert_eq!(of(strict, "").expect("user").groups, vec![7, 1234]);
        assert!(of(ContainerSecurity { run_as_group: Some(1), ..Default::default() }, "").is_err());
        assert!(of(ContainerSecurity { run_as_user: Some(-1), ..Default::default() }, "").is_err());
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(passwd in ".*", group in ".*", user in ".*") {
            let _ = resolve(&ContainerSecurity::default(), &user, &passwd, &group);
        }
    }
}
