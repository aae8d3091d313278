//! Where mounts end up in a container whose image has links on the way (`/var/run` is one in most).
//!
//! Called for each launch plan. crun follows such links by itself when it makes a container, but can't for a checkpoint,
//! when the root file system is not mounted where it was; criu needs the real places. Nothing fails: what can't be
//! followed stays as it was asked for, and the runtime has the last word.

use std::collections::VecDeque;

use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};

use crate::utils::beneath::Root;

/// As many links as the kernel follows.
const LINKS_MAX: u32 = 40;

/// Replaces the destinations of all bind mounts by the places that they are in `root`.
pub(in crate::backends) fn resolve_all(root: &Root, mut spec: Spec) -> Spec {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in mounts.iter_mut().filter(|m| m.typ().as_deref() == Some("bind")) {
        if let Some(place) = mount.destination().to_str().and_then(|path| resolve(root, path)) {
            mount.set_destination(place.into());
        }
    }
    spec.set_mounts(Some(mounts));
    spec
}

fn resolve(root: &Root, path: &str) -> Option<String> {
    let mut todo: VecDeque<String> = path.split('/').map(str::to_owned).collect();
    let (mut done, mut links) = (Vec::new(), 0);
    while let Some(part) = todo.pop_front() {
        match part.as_str() {
            "" | "." => continue,
            ".." => {
                done.pop();
                continue;
            }
            _ => done.push(part),
        }
        // What is not there yet has no links in it.
        let Ok(fd) = root.open_at(done.join("/"), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) else { continue };
        let Ok(target) = rustix::fs::readlinkat(&fd, c"", Vec::new()) else { continue };
        let target = target.into_string().ok()?;
        links += 1;
        if links > LINKS_MAX {
            return None;
        }
        done.pop();
        if target.starts_with('/') {
            done.clear();
        }
        for part in target.split('/').rev() {
            todo.push_front(part.to_owned());
        }
    }
    Some(format!("/{}", done.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_inside_the_root() {
        let temp = tempfile::tempdir().unwrap();
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(to, temp.path().join(at)).unwrap();
        std::fs::create_dir_all(temp.path().join("var/lib")).unwrap();
        std::fs::create_dir_all(temp.path().join("run")).unwrap();
        link("/run", "var/run");
        link("../../../..", "var/up");
        link("lib/new", "var/relative");
        link("loop", "loop");
        let root = Root::open(temp.path()).unwrap();
        let at = |path: &str| resolve(&root, path);
        assert_eq!(at("/var/run/secrets/x").as_deref(), Some("/run/secrets/x"));
        assert_eq!(at("/var/up/var/lib/").as_deref(), Some("/var/lib"));
        assert_eq!(at("/var/relative/y").as_deref(), Some("/var/lib/new/y"));
        assert_eq!(at("/none/../var//lib/./z").as_deref(), Some("/var/lib/z"));
        assert_eq!((at("/loop/x"), at("/").as_deref()), (None, Some("/")));
    }
}
