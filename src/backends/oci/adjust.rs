//! What the node's plugins (NRI) change in a container's specification. Pure: CDI devices were looked up before, limits were checked.

use std::path::Path;

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxPidsBuilder, LinuxResources,
    Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Spec,
};

use super::{built, cdi};
use crate::core::error::{Error, Result};
use crate::integrations::cdi::Hook;
use crate::integrations::nri::wire;

/// Changes it. `limits`: all limits of the container afterwards, where any of them has changed. `devices`: what CDI devices change.
pub fn apply(
    spec: &mut Spec,
    adjust: &wire::ContainerAdjustment,
    limits: Option<LinuxResources>,
    devices: &[cdi::DeviceEdits],
    privileged: bool,
) -> Result<()> {
    cdi::apply(spec, devices, privileged)?;
    annotations(spec, adjust);
    process(spec, adjust)?;
    mounts(spec, &adjust.mounts)?;
    if let Some(hooks) = &adjust.hooks {
        cdi::add_hooks(spec, &all_hooks(hooks))?;
    }
    let linux = adjust.linux.clone().unwrap_or_default();
    self::devices(spec, &linux.devices, privileged)?;
    let Some(section) = spec.linux_mut() else { return Ok(()) };
    let old = section.resources().clone().unwrap_or_default();
    let mut new = old.clone();
    if let Some(limits) = limits {
        new = limits;
        new.set_devices(old.devices().clone());
        new.set_pids(*old.pids());
        new.set_block_io(old.block_io().clone());
    }
    if let Some(pids) = linux.resources.as_ref().and_then(|r| r.pids) {
        new.set_pids(Some(built(LinuxPidsBuilder::default().limit(pids.limit).build())?));
    }
    section.set_resources(Some(new));
    Ok(())
}

fn marked(name: &str) -> Option<&str> {
    name.strip_prefix('-')
}

/// Only what plugins set is in a specification, where the runtime takes some for orders.
fn annotations(spec: &mut Spec, adjust: &wire::ContainerAdjustment) {
    let set = adjust.annotations.iter().filter(|(key, _)| marked(key).is_none());
    let set: std::collections::HashMap<_, _> = set.map(|(k, v)| (k.clone(), v.clone())).collect();
    if !set.is_empty() {
        spec.set_annotations(Some(set));
    }
}

fn process(spec: &mut Spec, adjust: &wire::ContainerAdjustment) -> Result<()> {
    let Some(process) = spec.process_mut() else { return Ok(()) };
    let mut env = process.env().clone().unwrap_or_default();
    for change in &adjust.env {
        let name = marked(&change.key).unwrap_or(&change.key);
        if name.is_empty() || name.contains(['=', '\0']) || change.value.contains('\0') {
            return Err(Error::invalid(format!("a plugin's variable {name:?} is none")));
        }
        let line = (name == change.key).then(|| format!("{name}={}", change.value));
        let at = env.iter().position(|e| e.split('=').next() == Some(name));
        match (at, line) {
            (Some(at), Some(line)) => env[at] = line,
            (Some(at), None) => drop(env.remove(at)),
            (None, Some(line)) => env.push(line),
            (None, None) => {}
        }
    }
    process.set_env(Some(env));
    if let Some(first) = adjust.args.first() {
        if first.is_empty() {
            return Err(Error::invalid("a plugin's args begin with an empty one"));
        }
        process.set_args(Some(adjust.args.clone()));
    }
    let mut rlimits: Vec<PosixRlimit> = process.rlimits().clone().unwrap_or_default();
    for limit in &adjust.rlimits {
        let kind = rlimit(marked(&limit.r#type).unwrap_or(&limit.r#type))?;
        rlimits.retain(|l| l.typ() != kind);
        if marked(&limit.r#type).is_none() {
            let limit = PosixRlimitBuilder::default().typ(kind).soft(limit.soft).hard(limit.hard);
            rlimits.push(built(limit.build())?);
        }
    }
    process.set_rlimits(Some(rlimits));
    if let Some(score) = adjust.linux.as_ref().and_then(|l| l.oom_score_adj) {
        let score = i32::try_from(score.value).ok().filter(|s| (-1000..=1000).contains(s));
        let score = score.ok_or_else(|| Error::invalid("a plugin's oom_score_adj is not in -1000..1000"))?;
        process.set_oom_score_adj(Some(score));
    }
    Ok(())
}

fn rlimit(name: &str) -> Result<PosixRlimitType> {
    serde_json::from_value(serde_json::Value::String(name.to_owned()))
        .map_err(|_| Error::invalid(format!("a plugin's rlimit {name:?} is none")))
}

fn mounts(spec: &mut Spec, asked: &[wire::Mount]) -> Result<()> {
    let mut list: Vec<Mount> = spec.mounts().clone().unwrap_or_default();
    for m in asked {
        let place = marked(&m.destination).unwrap_or(&m.destination);
        let bad = |why: &str| Err(Error::invalid(format!("a plugin's mount at {place:?}: {why}")));
        let climbs = Path::new(place).components().any(|c| c == std::path::Component::ParentDir);
        if !place.starts_with('/') || climbs || Path::new(place) == Path::new("/") || place.contains('\0') {
            return bad("not an absolute path below the root");
        }
        list.retain(|old| old.destination() != Path::new(place));
        if marked(&m.destination).is_some() {
            continue;
        }
        let binds = m.options.iter().any(|o| o == "bind" || o == "rbind");
        let kind = if m.r#type.is_empty() { "bind" } else { m.r#type.as_str() };
        let mut options = m.options.clone();
        if binds || kind == "bind" {
            if !Path::new(&m.source).is_absolute() {
                return bad("its source is not an absolute path");
            }
            if !binds {
                options.push("rbind".into());
            }
        }
        let mount = MountBuilder::default().destination(place).typ(kind).source(&m.source).options(options).build();
        let mount = built(mount)?;
        // Above what is below it, or that would be hidden.
        let below = |old: &Mount| old.destination().starts_with(place);
        let at = list.iter().position(below).unwrap_or(list.len());
        list.insert(at, mount);
    }
    spec.set_mounts(Some(list));
    Ok(())
}

fn all_hooks(of: &wire::Hooks) -> Vec<Hook> {
    let stages = [
        ("prestart", &of.prestart),
        ("createRuntime", &of.create_runtime),
        ("createContainer", &of.create_container),
        ("startContainer", &of.start_container),
        ("poststart", &of.poststart),
        ("poststop", &of.poststop),
    ];
    let hook = |stage: &str, h: &wire::Hook| Hook {
        hook_name: stage.into(),
        path: h.path.clone(),
        args: h.args.clone(),
        env: h.env.clone(),
        timeout: h.timeout.map(|t| t.value),
    };
    stages.into_iter().flat_map(|(stage, list)| list.iter().map(move |h| hook(stage, h))).collect()
}

fn devices(spec: &mut Spec, asked: &[wire::LinuxDevice], privileged: bool) -> Result<()> {
    let Some(linux) = spec.linux_mut().as_mut().filter(|_| !asked.is_empty()) else { return Ok(()) };
    let mut list = linux.devices().clone().unwrap_or_default();
    let mut rules = linux.resources().as_ref().and_then(|r| r.devices().clone()).unwrap_or_default();
    for d in asked {
        let path = marked(&d.path).unwrap_or(&d.path);
        // What may be done to one that is taken away is not: its number may be another's as well.
        list.retain(|old| old.path() != Path::new(path));
        if marked(&d.path).is_some() {
            continue;
        }
        let kind = match d.r#type.as_str() {
            "c" | "u" => LinuxDeviceType::C,
            "b" => LinuxDeviceType::B,
            "p" => LinuxDeviceType::P,
            other => return Err(Error::invalid(format!("a plugin's device {path:?} has the type {other:?}"))),
        };
        if !path.starts_with("/dev/") || path.split('/').any(|part| part == "..") {
            return Err(Error::invalid(format!("a plugin's device {path:?} is not below /dev")));
        }
        let node = LinuxDeviceBuilder::default().path(path).typ(kind).major(d.major).minor(d.minor);
        let mut node: LinuxDevice = built(node.build())?;
        node.set_file_mode(d.file_mode.map(|m| m.value));
        node.set_uid(d.uid.map(|u| u.value));
        node.set_gid(d.gid.map(|g| g.value));
        if kind != LinuxDeviceType::P && !privileged {
            let rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(kind).access("rwm");
            rules.push(built(rule.major(d.major).minor(d.minor).build())?);
        }
        list.push(node);
    }
    linux.set_devices(Some(list));
    let mut resources = linux.resources().clone().unwrap_or_default();
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrations::nri::wire::{KeyValue, LinuxContainerAdjustment, OptionalInt};

    fn spec() -> Spec {
        let mut spec = Spec::default();
        let process = spec.process_mut().as_mut().expect("a process");
        process.set_env(Some(vec!["A=1".into(), "B=1".into()]));
        let mount = |place: &str| MountBuilder::default().destination(place).typ("bind").build().expect("a mount");
        spec.set_mounts(Some(vec![mount("/proc"), mount("/data/sub"), mount("/old")]));
        spec
    }

    fn mount(place: &str, source: &str) -> wire::Mount {
        wire::Mount { destination: place.into(), source: source.into(), ..Default::default() }
    }

    fn changed(adjust: &wire::ContainerAdjustment) -> Result<Spec> {
        let mut spec = spec();
        apply(&mut spec, adjust, None, &[], false).map(|()| spec)
    }

    #[test]
    fn what_plugins_set_is_in_the_specification() {
        let pair = |k: &str, v: &str| KeyValue { key: k.into(), value: v.into() };
        let device = wire::LinuxDevice {
            path: "/dev/x".into(),
            r#type: "c".into(),
            major: 10,
            minor: 229,
            ..Default::default()
        };
        let hook = wire::Hook { path: "/bin/x".into(), ..Default::default() };
        let rlimit = wire::PosixRlimit { r#type: "RLIMIT_CORE".into(), hard: 5, soft: 4 };
        let adjust = wire::ContainerAdjustment {
            annotations: [("a".into(), "b".into()), ("-c".into(), String::new())].into(),
            env: vec![pair("-A", ""), pair("B", "2"), pair("C", "3")],
            mounts: vec![mount("-/old", ""), mount("/data", "/srv"), mount("/new", "/srv")],
            args: vec!["sh".into(), "-c".into()],
            hooks: Some(wire::Hooks { poststop: vec![hook], ..Default::default() }),
            rlimits: vec![rlimit],
            linux: Some(LinuxContainerAdjustment {
                devices: vec![device],
                oom_score_adj: Some(OptionalInt { value: -5 }),
                resources: Some(wire::LinuxResources {
                    pids: Some(wire::LinuxPids { limit: 7 }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let before =
            spec().linux().as_ref().and_then(|l| l.resources().as_ref()?.devices().clone()).unwrap_or_default();
        let spec = changed(&adjust).expect("applied");
        let process = spec.process().as_ref().expect("a process");
        assert_eq!(process.env().clone().expect("env"), ["B=2", "C=3"]);
        assert_eq!(process.args().clone().expect("args"), ["sh", "-c"]);
        assert_eq!(process.oom_score_adj(), Some(-5));
        assert!(process.rlimits().iter().flatten().any(|l| l.typ() == PosixRlimitType::RlimitCore && l.hard() == 5));
        let places: Vec<_> =
            spec.mounts().iter().flatten().map(|m| m.destination().to_string_lossy().into_owned()).collect();
        assert_eq!(places, ["/proc", "/data", "/data/sub", "/new"]);
        assert_eq!(spec.annotations().clone().expect("annotations"), [("a".to_owned(), "b".to_owned())].into());
        assert_eq!(spec.hooks().as_ref().expect("hooks").poststop().as_ref().map(Vec::len), Some(1));
        let linux = spec.linux().as_ref().expect("linux");
        assert!(linux.devices().iter().flatten().any(|d| d.path() == Path::new("/dev/x") && d.minor() == 229));
        let resources = linux.resources().as_ref().expect("resources");
        assert_eq!(resources.devices().as_ref().map(Vec::len), Some(before.len() + 1));
        assert_eq!(resources.pids().as_ref().map(|p| p.limit()), Some(7));
    }

    #[test]
    fn what_is_none_is_named() {
        let pair = |k: &str| vec![KeyValue { key: k.into(), ..Default::default() }];
        let with = |mounts| wire::ContainerAdjustment { mounts, ..Default::default() };
        let rlimit = wire::PosixRlimit { r#type: "RLIMIT_FUN".into(), ..Default::default() };
        let device = wire::LinuxDevice { path: "/etc/x".into(), r#type: "c".into(), ..Default::default() };
        let linux = LinuxContainerAdjustment { devices: vec![device], ..Default::default() };
        for (adjust, named) in [
            (wire::ContainerAdjustment { env: pair("A=B"), ..Default::default() }, "A=B"),
            (with(vec![mount("relative", "/srv")]), "relative"),
            (with(vec![mount("/", "/srv")]), "\"/\""),
            (with(vec![mount("/a/../../b", "/srv")]), "/a/../../b"),
            (with(vec![mount("/a", "srv")]), "source"),
            (wire::ContainerAdjustment { rlimits: vec![rlimit], ..Default::default() }, "RLIMIT_FUN"),
            (wire::ContainerAdjustment { linux: Some(linux), ..Default::default() }, "/etc/x"),
        ] {
            let told = changed(&adjust).expect_err(named).chain();
            assert!(told.contains(named), "{told}");
        }
    }
}
