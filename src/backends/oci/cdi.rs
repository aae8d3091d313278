//! What CDI devices change in a container's specification. Pure: device nodes were looked up before.

use oci_spec::runtime::{
    Hook, HookBuilder, Hooks, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxIntelRdt,
    LinuxIntelRdtBuilder, Mount, MountBuilder, Spec,
};

use super::built;
use crate::core::error::{Error, Result};
use crate::integrations::cdi;

/// Edits of one device, or of all devices of a file, with its nodes and what may be done to them ("rwm").
#[derive(Debug, Clone, Default)]
pub struct DeviceEdits {
    /// As the file says.
    pub edits: cdi::Edits,
    /// Its device nodes.
    pub nodes: Vec<(LinuxDevice, String)>,
}

/// Changes the specification; a later edit wins over an earlier one and over the request.
pub(super) fn apply(spec: &mut Spec, all: &[DeviceEdits], privileged: bool) -> Result<()> {
    for DeviceEdits { edits, nodes } in all {
        process(spec, edits);
        devices(spec, nodes, privileged)?;
        mounts(spec, &edits.mounts)?;
        add_hooks(spec, &edits.hooks)?;
        if let (Some(asked), Some(linux)) = (&edits.intel_rdt, spec.linux_mut()) {
            linux.set_intel_rdt(Some(rdt(asked)?));
        }
    }
    if let Some(list) = spec.mounts_mut() {
        list.sort_by_key(|m| m.destination().components().count());
    }
    Ok(())
}

fn process(spec: &mut Spec, edits: &cdi::Edits) {
    let Some(process) = spec.process_mut() else { return };
    let mut env = process.env().clone().unwrap_or_default();
    for line in &edits.env {
        let name = line.split('=').next();
        match env.iter_mut().find(|e| e.split('=').next() == name) {
            Some(old) => *old = line.clone(),
            None => env.push(line.clone()),
        }
    }
    process.set_env(Some(env));
    let mut groups = process.user().additional_gids().clone().unwrap_or_default();
    for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
        if !groups.contains(gid) {
            groups.push(*gid);
        }
    }
    process.user_mut().set_additional_gids(Some(groups));
}

fn devices(spec: &mut Spec, nodes: &[(LinuxDevice, String)], privileged: bool) -> Result<()> {
    let (uid, gid) = spec.process().as_ref().map_or((0, 0), |p| (p.user().uid(), p.user().gid()));
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let mut list = linux.devices().clone().unwrap_or_default();
    for (node, _) in nodes {
        let mut node = node.clone();
        node.set_uid(node.uid().or(Some(uid)));
        node.set_gid(node.gid().or(Some(gid)));
        list.retain(|d| d.path() != node.path());
        list.push(node);
    }
    linux.set_devices(Some(list));
    let Some(resources) = linux.resources_mut() else { return Ok(()) };
    let mut rules: Vec<LinuxDeviceCgroup> = resources.devices().clone().unwrap_or_default();
    for (node, access) in nodes.iter().filter(|(_, access)| !privileged && !access.is_empty()) {
        if matches!(node.typ(), LinuxDeviceType::B | LinuxDeviceType::C) {
            let rule = LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(node.typ())
                .major(node.major())
                .minor(node.minor())
                .access(access.as_str());
            rules.push(built(rule.build())?);
        }
    }
    resources.set_devices(Some(rules));
    Ok(())
}

fn mounts(spec: &mut Spec, asked: &[cdi::Mount]) -> Result<()> {
    let mut list: Vec<Mount> = spec.mounts().clone().unwrap_or_default();
    for m in asked {
        let kind = m.r#type.as_deref().filter(|t| !t.is_empty()).unwrap_or("bind");
        let mut options = m.options.clone();
        if kind == "bind" && !options.iter().any(|o| o == "bind" || o == "rbind") {
            options.push("rbind".into());
        }
        list.retain(|old| old.destination() != std::path::Path::new(&m.container_path));
        let mount = MountBuilder::default()
            .destination(&m.container_path)
            .typ(kind)
            .source(&m.host_path)
            .options(options)
            .build();
        list.push(built(mount)?);
    }
    spec.set_mounts(Some(list));
    Ok(())
}

/// Adds programs that the OCI runtime calls.
pub fn add_hooks(spec: &mut Spec, all: &[cdi::Hook]) -> Result<()> {
    all.iter().try_for_each(|hook| add_hook(spec, hook))
}

fn add_hook(spec: &mut Spec, asked: &cdi::Hook) -> Result<()> {
    let mut hook = HookBuilder::default().path(&asked.path);
    if !asked.args.is_empty() {
        hook = hook.args(asked.args.clone());
    }
    if !asked.env.is_empty() {
        hook = hook.env(asked.env.clone());
    }
    if let Some(seconds) = asked.timeout.filter(|s| *s > 0) {
        hook = hook.timeout(seconds);
    }
    let hook: Hook = built(hook.build())?;
    let mut hooks: Hooks = spec.hooks().clone().unwrap_or_default();
    let with = |list: &Option<Vec<Hook>>| Some([list.clone().unwrap_or_default(), vec![hook.clone()]].concat());
    match asked.hook_name.as_str() {
        #[allow(deprecated)] // the format has it
        "prestart" => drop(hooks.set_prestart(with(hooks.prestart()))),
        "createRuntime" => drop(hooks.set_create_runtime(with(hooks.create_runtime()))),
        "createContainer" => drop(hooks.set_create_container(with(hooks.create_container()))),
        "startContainer" => drop(hooks.set_start_container(with(hooks.start_container()))),
        "poststart" => drop(hooks.set_poststart(with(hooks.poststart()))),
        "poststop" => drop(hooks.set_poststop(with(hooks.poststop()))),
        other => return Err(Error::invalid(format!("hook {other:?} is not known"))),
    }
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn rdt(asked: &cdi::IntelRdt) -> Result<LinuxIntelRdt> {
    let mut rdt: LinuxIntelRdt = built(LinuxIntelRdtBuilder::default().build())?;
    rdt.set_clos_id(asked.clos_id.clone());
    rdt.set_l3_cache_schema(asked.l3_cache_schema.clone());
    rdt.set_mem_bw_schema(asked.mem_bw_schema.clone());
    rdt.set_schemata(asked.schemata.clone());
    rdt.set_enable_monitoring(asked.enable_monitoring);
    rdt.set_enable_cmt(asked.enable_cmt);
    rdt.set_enable_mbm(asked.enable_mbm);
    Ok(rdt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxDeviceBuilder;

    #[test]
    fn edits_go_into_the_specification() {
        let mut spec = Spec::default();
        let process = spec.process_mut().as_mut().expect("a process");
        process.set_env(Some(vec!["A=old".into(), "B=1".into()]));
        process.user_mut().set_additional_gids(Some(vec![7]));
        let node = LinuxDeviceBuilder::default().path("/dev/x").typ(LinuxDeviceType::C).major(1i64).minor(3i64);
        let edits = cdi::Edits {
            env: vec!["A=new".into()],
            additional_gids: vec![0, 7, 44],
            mounts: vec![cdi::Mount {
                host_path: "/x".into(),
                container_path: "/x".into(),
                options: vec!["ro".into()],
                ..Default::default()
            }],
            hooks: vec![cdi::Hook { hook_name: "poststop".into(), path: "/bin/x".into(), ..Default::default() }],
            intel_rdt: Some(cdi::IntelRdt { clos_id: Some("c".into()), ..Default::default() }),
            ..Default::default()
        };
        let all = [DeviceEdits { edits, nodes: vec![(node.build().expect("device"), "rw".into())] }];
        let before = spec.linux().as_ref().and_then(|l| l.resources().as_ref()?.devices().as_ref().map(Vec::len));
        apply(&mut spec, &all, false).expect("applied");
        let process = spec.process().as_ref().expect("a process");
        assert_eq!(process.env().clone().expect("env"), ["A=new", "B=1"]);
        assert_eq!(process.user().additional_gids().clone().expect("groups"), [7, 44]);
        let mount =
            spec.mounts().as_ref().expect("mounts").iter().find(|m| m.destination().ends_with("x")).expect("mount");
        assert_eq!(mount.options().clone().expect("options"), ["ro", "rbind"]);
        let linux = spec.linux().as_ref().expect("linux");
        assert!(linux.devices().as_ref().expect("devices").iter().any(|d| d.path().ends_with("x")));
        let rules = linux.resources().as_ref().expect("resources").devices().as_ref().map(Vec::len);
        assert_eq!(rules, Some(before.unwrap_or(0) + 1));
        assert_eq!(spec.hooks().as_ref().expect("hooks").poststop().as_ref().map(Vec::len), Some(1));
        assert_eq!(linux.intel_rdt().as_ref().expect("rdt").clos_id().as_deref(), Some("c"));
    }
}
