//! What several plugins want of one request, put together: two that set the same thing conflict, by name.
//!
//! Pure. The rules are those of NRI's own adaptation: a plugin sees what those before it have changed; a later one may take away what
//! an earlier one has set (a name that begins with "-") and set it anew; hooks and only they add up.

use std::collections::BTreeMap;

use super::limits;
use super::wire::{
    CompoundFieldOwners, Container, ContainerAdjustment, ContainerUpdate, FieldOwners, Hooks, LinuxContainerAdjustment,
    LinuxCpu, LinuxMemory, LinuxRdt, LinuxResources, OwningPlugins,
};
use crate::core::error::{Error, Kind, Result};
use crate::core::plugins::NewLimits;

/// NRI's numbers of what can be set.
mod field {
    pub const ANNOTATIONS: i32 = 1;
    pub const MOUNTS: i32 = 2;
    pub const HOOKS: i32 = 3;
    pub const DEVICES: i32 = 4;
    pub const CDI_DEVICES: i32 = 5;
    pub const ENV: i32 = 6;
    pub const ARGS: i32 = 7;
    pub const MEM_LIMIT: i32 = 8;
    pub const MEM_SWAP: i32 = 10;
    pub const CPU_SHARES: i32 = 16;
    pub const CPU_QUOTA: i32 = 17;
    pub const CPU_PERIOD: i32 = 18;
    pub const CPUS: i32 = 21;
    pub const MEMS: i32 = 22;
    pub const PIDS: i32 = 23;
    pub const HUGEPAGES: i32 = 24;
    pub const BLOCKIO_CLASS: i32 = 25;
    pub const RDT_CLASS: i32 = 26;
    pub const UNIFIED: i32 = 27;
    pub const OOM_SCORE_ADJ: i32 = 29;
    pub const RLIMITS: i32 = 30;
    pub const RDT_CLOS_ID: i32 = 37;

    /// Its name for people.
    pub fn name(number: i32) -> &'static str {
        match number {
            ANNOTATIONS => "annotation",
            MOUNTS => "mount",
            HOOKS => "hooks",
            DEVICES => "device",
            CDI_DEVICES => "CDI device",
            ENV => "env",
            ARGS => "args",
            MEM_LIMIT => "memory.limit",
            MEM_SWAP => "memory.swap",
            CPU_SHARES => "cpu.shares",
            CPU_QUOTA => "cpu.quota",
            CPU_PERIOD => "cpu.period",
            CPUS => "cpu.cpus",
            MEMS => "cpu.mems",
            PIDS => "pids",
            HUGEPAGES => "hugepages",
            BLOCKIO_CLASS => "blockio_class",
            RDT_CLASS => "rdt_class",
            RDT_CLOS_ID => "rdt.clos_id",
            UNIFIED => "unified",
            OOM_SCORE_ADJ => "oom_score_adj",
            RLIMITS => "rlimit",
            _ => "field",
        }
    }
}

/// Who has set what of which container. Fields that are one thing have the key "".
#[derive(Debug, Default)]
struct Owners(BTreeMap<(String, i32, String), String>);

impl Owners {
    fn claim(&mut self, container: &str, field: i32, key: &str, plugin: &str) -> Result<()> {
        let place = (container.to_owned(), field, key.to_owned());
        match self.0.get(&place) {
            Some(other) => {
                let what = field::name(field);
                let what = if key.is_empty() { what.to_owned() } else { format!("{what} {key:?}") };
                let message = format!("plugins {other:?} and {plugin:?} both set {what} of container {container}");
                Err(Error::precondition(message))
            }
            None => {
                self.0.insert(place, plugin.to_owned());
                Ok(())
            }
        }
    }

    fn clear(&mut self, container: &str, field: i32, key: &str) {
        self.0.remove(&(container.to_owned(), field, key.to_owned()));
    }

    fn to_wire(&self) -> OwningPlugins {
        let mut owners: BTreeMap<String, FieldOwners> = BTreeMap::new();
        for ((container, field, key), plugin) in &self.0 {
            let of = owners.entry(container.clone()).or_default();
            if key.is_empty() {
                of.simple.insert(*field, plugin.clone());
            } else {
                let compound: &mut CompoundFieldOwners = of.compound.entry(*field).or_default();
                compound.owners.insert(key.clone(), plugin.clone());
            }
        }
        OwningPlugins { owners }
    }
}

/// What a name says: whether it takes away, and what.
fn marked(name: &str) -> Option<&str> {
    name.strip_prefix('-')
}

/// A request's answers so far.
#[derive(Debug, Default)]
pub struct Merge {
    /// The container that is made, as the next plugin is to see it.
    pub container: Container,
    /// All adjustments of it. What is taken away comes before what is set.
    pub adjust: ContainerAdjustment,
    /// New limits of others (and, for an update, of the container itself), by id.
    updates: BTreeMap<String, (String, ContainerUpdate)>,
    owners: Owners,
}

impl Merge {
    /// Of a container that is being made.
    pub fn of(container: Container) -> Self {
        Self { container, ..Self::default() }
    }

    /// For validators.
    pub fn owners(&self) -> OwningPlugins {
        self.owners.to_wire()
    }

    /// All updates, for validators.
    pub fn updates(&self) -> Vec<ContainerUpdate> {
        self.updates.values().map(|(_, u)| u.clone()).collect()
    }

    /// The updates, in our words.
    pub fn limits(&self) -> Result<Vec<NewLimits>> {
        let limits = |(plugin, update): &(String, ContainerUpdate)| {
            let resources = update.linux.as_ref().and_then(|l| l.resources.as_ref());
            Ok(NewLimits {
                plugin: plugin.clone(),
                container: update.container_id.clone(),
                resources: resources.map(limits::to_core).transpose()?.unwrap_or_default(),
                ignore_failure: update.ignore_failure,
            })
        };
        self.updates.values().map(limits).collect()
    }

    /// Adds a plugin's adjustments.
    pub fn adjust(&mut self, plugin: &str, asked: ContainerAdjustment) -> Result<()> {
        refuse(&asked).map_err(|e| e.context(format!("plugin {plugin:?}")))?;
        let id = self.container.id.clone();
        let (owners, sum, now) = (&mut self.owners, &mut self.adjust, &mut self.container);
        let (gone, set): (Vec<_>, Vec<_>) = asked.annotations.into_iter().partition(|(k, _)| marked(k).is_some());
        for (key, _) in gone {
            let bare = marked(&key).unwrap_or_default().to_owned();
            owners.clear(&id, field::ANNOTATIONS, &bare);
            now.annotations.remove(&bare);
            sum.annotations.remove(&bare);
            sum.annotations.insert(key, String::new());
        }
        for (key, value) in set {
            owners.claim(&id, field::ANNOTATIONS, &key, plugin)?;
            now.annotations.insert(key.clone(), value.clone());
            sum.annotations.insert(key, value);
        }
        // Of lists whose entries have a name.
        macro_rules! list {
            ($asked:expr, $sum:expr, $now:expr, $field:expr, $key:ident) => {{
                let (gone, set): (Vec<_>, Vec<_>) = $asked.into_iter().partition(|e| marked(&e.$key).is_some());
                for entry in gone {
                    let bare = marked(&entry.$key).unwrap_or_default().to_owned();
                    owners.clear(&id, $field, &bare);
                    $now.retain(|e| e.$key != bare);
                    $sum.retain(|e| e.$key != bare && e.$key != entry.$key);
                    $sum.insert(0, entry);
                }
                for entry in set {
                    owners.claim(&id, $field, &entry.$key, plugin)?;
                    $now.retain(|e| e.$key != entry.$key);
                    $now.push(entry.clone());
                    $sum.push(entry);
                }
            }};
        }
        list!(asked.mounts, sum.mounts, now.mounts, field::MOUNTS, destination);
        list!(asked.rlimits, sum.rlimits, now.rlimits, field::RLIMITS, r#type);
        list!(asked.cdi_devices, sum.cdi_devices, now.cdi_devices, field::CDI_DEVICES, name);
        let (gone, set): (Vec<_>, Vec<_>) = asked.env.into_iter().partition(|e| marked(&e.key).is_some());
        let name = |line: &String| line.split('=').next().unwrap_or_default().to_owned();
        for entry in gone {
            let bare = marked(&entry.key).unwrap_or_default().to_owned();
            owners.clear(&id, field::ENV, &bare);
            now.env.retain(|e| name(e) != bare);
            sum.env.retain(|e| e.key != bare && e.key != entry.key);
            sum.env.insert(0, entry);
        }
        for entry in set {
            owners.claim(&id, field::ENV, &entry.key, plugin)?;
            now.env.retain(|e| name(e) != entry.key);
            now.env.push(format!("{}={}", entry.key, entry.value));
            sum.env.push(entry);
        }
        if let Some(first) = asked.args.first() {
            let over = first.is_empty();
            if over {
                owners.clear(&id, field::ARGS, "");
            }
            owners.claim(&id, field::ARGS, "", plugin)?;
            sum.args = asked.args.into_iter().skip(usize::from(over)).collect();
            now.args.clone_from(&sum.args);
        }
        if let Some(hooks) = asked.hooks {
            add_hooks(now.hooks.get_or_insert_default(), &hooks);
            add_hooks(sum.hooks.get_or_insert_default(), &hooks);
            // Who was the last to add some.
            owners.0.insert((id.clone(), field::HOOKS, String::new()), plugin.to_owned());
        }
        let Some(linux) = asked.linux else { return Ok(()) };
        let (now, sum) = (now.linux.get_or_insert_default(), sum.linux.get_or_insert_default());
        list!(linux.devices, sum.devices, now.devices, field::DEVICES, path);
        if let Some(score) = linux.oom_score_adj {
            owners.claim(&id, field::OOM_SCORE_ADJ, "", plugin)?;
            now.oom_score_adj = Some(score);
            sum.oom_score_adj = Some(score);
        }
        if let Some(rdt) = linux.rdt {
            let of_sum = sum.rdt.get_or_insert_default();
            if rdt.remove {
                owners.clear(&id, field::RDT_CLOS_ID, "");
                owners.clear(&id, field::RDT_CLASS, "");
                if let Some(resources) = &mut sum.resources {
                    resources.rdt_class = None;
                }
                *of_sum = LinuxRdt { remove: true, ..Default::default() };
            }
            if rdt.clos_id.is_some() {
                owners.claim(&id, field::RDT_CLOS_ID, "", plugin)?;
                of_sum.clos_id = rdt.clos_id;
            }
        }
        if let Some(resources) = linux.resources {
            claim_limits(owners, &id, plugin, &resources)?;
            set_limits(now.resources.get_or_insert_default(), &resources);
            set_limits(sum.resources.get_or_insert_default(), &resources);
        }
        Ok(())
    }

    /// Adds a plugin's wishes for containers that are there. `own`: the one that is being made, which is not.
    pub fn update(&mut self, plugin: &str, asked: Vec<ContainerUpdate>, own: Option<&str>) -> Result<()> {
        for update in asked {
            let id = update.container_id.clone();
            if own == Some(id.as_str()) {
                let message =
                    format!("plugin {plugin:?} wants an update of container {id}, which the request itself is about");
                return Err(Error::precondition(message));
            }
            let resources = update.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
            let claimed = limits::check(&resources, false)
                .map_err(|e| e.context(format!("plugin {plugin:?}, container {id}")))
                .and_then(|()| claim_limits(&mut self.owners, &id, plugin, &resources));
            match claimed {
                Err(e) if update.ignore_failure => {
                    tracing::warn!(plugin, container = id, error = e.chain(), "a plugin's update is left out");
                    continue;
                }
                claimed => claimed?,
            }
            let entry = self.updates.entry(id.clone()).or_insert_with(|| {
                let ignore_failure = true;
                (
                    plugin.to_owned(),
                    ContainerUpdate { container_id: id, linux: Some(Default::default()), ignore_failure },
                )
            });
            entry.1.ignore_failure &= update.ignore_failure;
            let linux = entry.1.linux.get_or_insert_default();
            set_limits(linux.resources.get_or_insert_default(), &resources);
        }
        Ok(())
    }
}

/// What no handler does, by name.
fn refuse(asked: &ContainerAdjustment) -> Result<()> {
    let linux = asked.linux.clone().unwrap_or_default();
    let LinuxContainerAdjustment { cgroups_path, io_priority, seccomp_policy, namespaces, .. } = &linux;
    for (name, there) in [
        // Where a container's group is, is how its limits, statistics and end are found.
        ("linux.cgroups_path", !cgroups_path.is_empty()),
        ("linux.io_priority", io_priority.is_some()),
        ("linux.seccomp_policy", seccomp_policy.is_some()),
        ("linux.namespaces", !namespaces.is_empty()),
        ("linux.sysctl", !linux.sysctl.is_empty()),
        ("linux.net_devices", !linux.net_devices.is_empty()),
        ("linux.scheduler", linux.scheduler.is_some()),
        ("linux.rdt.schemata", linux.rdt.as_ref().is_some_and(|r| r.schemata.is_some())),
        ("linux.rdt.enable_monitoring", linux.rdt.as_ref().is_some_and(|r| r.enable_monitoring.is_some())),
        ("linux.memory_policy", linux.memory_policy.is_some()),
    ] {
        if there {
            return Err(Error::new(Kind::Unimplemented, format!("{name} can't be set by a plugin here")));
        }
    }
    linux.resources.as_ref().map_or(Ok(()), |resources| limits::check(resources, true))
}

fn add_hooks(to: &mut Hooks, more: &Hooks) {
    to.prestart.extend(more.prestart.iter().cloned());
    to.create_runtime.extend(more.create_runtime.iter().cloned());
    to.create_container.extend(more.create_container.iter().cloned());
    to.start_container.extend(more.start_container.iter().cloned());
    to.poststart.extend(more.poststart.iter().cloned());
    to.poststop.extend(more.poststop.iter().cloned());
}

fn claim_limits(owners: &mut Owners, id: &str, plugin: &str, of: &LinuxResources) -> Result<()> {
    let (none, no_cpu) = (LinuxMemory::default(), LinuxCpu::default());
    let (memory, cpu) = (of.memory.as_ref().unwrap_or(&none), of.cpu.as_ref().unwrap_or(&no_cpu));
    for (field, there) in [
        (field::MEM_LIMIT, memory.limit.is_some()),
        (field::MEM_SWAP, memory.swap.is_some()),
        (field::CPU_SHARES, cpu.shares.is_some()),
        (field::CPU_QUOTA, cpu.quota.is_some()),
        (field::CPU_PERIOD, cpu.period.is_some()),
        (field::CPUS, !cpu.cpus.is_empty()),
        (field::MEMS, !cpu.mems.is_empty()),
        (field::PIDS, of.pids.is_some()),
        (field::BLOCKIO_CLASS, of.blockio_class.is_some()),
        (field::RDT_CLASS, of.rdt_class.is_some()),
    ] {
        if there {
            owners.claim(id, field, "", plugin)?;
        }
    }
    for huge in &of.hugepage_limits {
        owners.claim(id, field::HUGEPAGES, &huge.page_size, plugin)?;
    }
    for file in of.unified.keys() {
        owners.claim(id, field::UNIFIED, file, plugin)?;
    }
    Ok(())
}

/// Sets in `to` what `of` has.
pub fn set_limits(to: &mut LinuxResources, of: &LinuxResources) {
    if let Some(new) = &of.memory {
        let memory = to.memory.get_or_insert_default();
        memory.limit = new.limit.or(memory.limit);
        memory.swap = new.swap.or(memory.swap);
    }
    if let Some(new) = &of.cpu {
        let cpu = to.cpu.get_or_insert_default();
        cpu.shares = new.shares.or(cpu.shares);
        cpu.quota = new.quota.or(cpu.quota);
        cpu.period = new.period.or(cpu.period);
        for (old, new) in [(&mut cpu.cpus, &new.cpus), (&mut cpu.mems, &new.mems)] {
            if !new.is_empty() {
                old.clone_from(new);
            }
        }
    }
    for new in &of.hugepage_limits {
        to.hugepage_limits.retain(|h| h.page_size != new.page_size);
        to.hugepage_limits.push(new.clone());
    }
    to.unified.extend(of.unified.clone());
    to.pids = of.pids.or(to.pids);
    for (old, new) in [(&mut to.blockio_class, &of.blockio_class), (&mut to.rdt_class, &of.rdt_class)] {
        if new.is_some() {
            old.clone_from(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrations::nri::wire::{
        Hook, KeyValue, Mount, OptionalInt, OptionalInt64, OptionalString, PosixRlimit, Refused,
    };

    fn env(pairs: &[(&str, &str)]) -> ContainerAdjustment {
        let env = pairs.iter().map(|(k, v)| KeyValue { key: (*k).into(), value: (*v).into() }).collect();
        ContainerAdjustment { env, ..Default::default() }
    }

    fn memory(limit: i64) -> LinuxResources {
        let limit = Some(OptionalInt64 { value: limit });
        LinuxResources { memory: Some(LinuxMemory { limit, ..Default::default() }), ..Default::default() }
    }

    fn update(id: &str, resources: LinuxResources) -> ContainerUpdate {
        let linux = Some(crate::integrations::nri::wire::LinuxContainerUpdate { resources: Some(resources) });
        ContainerUpdate { container_id: id.into(), linux, ignore_failure: false }
    }

    fn merge() -> Merge {
        Merge::of(Container { id: "c1".into(), env: vec!["A=1".into(), "PATH=/bin".into()], ..Default::default() })
    }

    #[test]
    fn a_later_plugin_sees_and_may_take_away() {
        let mut merge = merge();
        merge.adjust("10-a", env(&[("A", "2"), ("B", "1")])).expect("set");
        assert_eq!(merge.container.env, ["PATH=/bin", "A=2", "B=1"]);
        let told = merge.adjust("20-b", env(&[("B", "5")])).expect_err("a conflict").chain();
        assert_eq!(told, "plugins \"10-a\" and \"20-b\" both set env \"B\" of container c1");
        merge.adjust("20-b", env(&[("-B", ""), ("B", "5"), ("-PATH", "")])).expect("over it");
        assert_eq!(merge.container.env, ["A=2", "B=5"]);
        let sum: Vec<_> = merge.adjust.env.iter().map(|e| (e.key.as_str(), e.value.as_str())).collect();
        assert_eq!(sum, [("-PATH", ""), ("-B", ""), ("A", "2"), ("B", "5")]);
        let owners = merge.owners();
        assert_eq!(owners.owners["c1"].compound[&field::ENV].owners["B"], "20-b");
    }

    #[test]
    fn everything_that_can_be_set_has_one_owner() {
        let mount = Mount { destination: "/x".into(), ..Default::default() };
        let with = |change: &dyn Fn(&mut ContainerAdjustment)| {
            let mut adjust = ContainerAdjustment::default();
            change(&mut adjust);
            adjust
        };
        let linux = |linux| ContainerAdjustment { linux: Some(linux), ..Default::default() };
        let limited = |r| linux(LinuxContainerAdjustment { resources: Some(r), ..Default::default() });
        let cpu = |cpu| limited(LinuxResources { cpu: Some(cpu), ..Default::default() });
        let device = crate::integrations::nri::wire::LinuxDevice { path: "/dev/x".into(), ..Default::default() };
        for (asked, named) in [
            (with(&|a| drop(a.annotations.insert("k".into(), "v".into()))), "annotation \"k\""),
            (with(&|a| a.mounts.push(mount.clone())), "mount \"/x\""),
            (with(&|a| a.args = vec!["sh".into()]), "args"),
            (
                with(&|a| a.rlimits.push(PosixRlimit { r#type: "RLIMIT_CORE".into(), ..Default::default() })),
                "RLIMIT_CORE",
            ),
            (
                with(&|a| a.cdi_devices.push(crate::integrations::nri::wire::CdiDevice { name: "v/c=d".into() })),
                "v/c=d",
            ),
            (linux(LinuxContainerAdjustment { devices: vec![device], ..Default::default() }), "/dev/x"),
            (
                linux(LinuxContainerAdjustment { oom_score_adj: Some(OptionalInt { value: 5 }), ..Default::default() }),
                "oom_score_adj",
            ),
            (limited(memory(1 << 20)), "memory.limit"),
            (cpu(LinuxCpu { cpus: "0".into(), ..Default::default() }), "cpu.cpus"),
            (
                limited(LinuxResources { unified: [("memory.high".into(), "1".into())].into(), ..Default::default() }),
                "unified \"memory.high\"",
            ),
        ] {
            let mut merge = merge();
            merge.adjust("10-a", asked.clone()).expect("the first");
            let told = merge.adjust("20-b", asked).expect_err("a conflict").chain();
            assert!(told.contains(named) && told.contains("\"10-a\" and \"20-b\""), "{named}: {told}");
        }
        let mut merge = merge();
        let hook = Hook { path: "/bin/x".into(), ..Default::default() };
        let hooks = ContainerAdjustment {
            hooks: Some(Hooks { poststop: vec![hook], ..Default::default() }),
            ..Default::default()
        };
        merge.adjust("10-a", hooks.clone()).expect("added");
        merge.adjust("20-b", hooks).expect("added");
        assert_eq!(merge.adjust.hooks.expect("hooks").poststop.len(), 2);
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        let linux = |linux| ContainerAdjustment { linux: Some(linux), ..Default::default() };
        let none = LinuxContainerAdjustment::default;
        for (asked, named) in [
            (LinuxContainerAdjustment { cgroups_path: "/x".into(), ..none() }, "linux.cgroups_path"),
            (LinuxContainerAdjustment { seccomp_policy: Some(Refused {}), ..none() }, "linux.seccomp_policy"),
            (LinuxContainerAdjustment { sysctl: vec![Refused {}], ..none() }, "linux.sysctl"),
            (
                LinuxContainerAdjustment {
                    rdt: Some(LinuxRdt { schemata: Some(Refused {}), ..Default::default() }),
                    ..none()
                },
                "linux.rdt.schemata",
            ),
        ] {
            let e = merge().adjust("10-a", linux(asked)).expect_err(named);
            assert_eq!(e.kind(), Kind::Unimplemented);
            assert!(e.chain().contains(named) && e.chain().contains("\"10-a\""), "{}", e.chain());
        }
    }

    #[test]
    fn classes_have_one_owner_and_are_not_changed_later() {
        let class = |value: &str| Some(OptionalString { value: value.into() });
        let linux = |linux| ContainerAdjustment { linux: Some(linux), ..Default::default() };
        let limits = |blockio: Option<OptionalString>, rdt: Option<OptionalString>| LinuxResources {
            blockio_class: blockio,
            rdt_class: rdt,
            ..Default::default()
        };
        let of = |resources| linux(LinuxContainerAdjustment { resources: Some(resources), ..Default::default() });
        let rdt = |rdt| linux(LinuxContainerAdjustment { rdt: Some(rdt), ..Default::default() });
        let mut merge = merge();
        merge.adjust("10-a", of(limits(class("slow"), class("gold")))).expect("set");
        let told = merge.adjust("20-b", of(limits(class("fast"), None))).expect_err("a conflict").chain();
        assert!(told.contains("blockio_class") && told.contains("\"10-a\" and \"20-b\""), "{told}");
        merge
            .adjust("20-b", rdt(LinuxRdt { remove: true, clos_id: class("silver"), ..Default::default() }))
            .expect("over");
        let told =
            merge.adjust("30-c", rdt(LinuxRdt { clos_id: class("x"), ..Default::default() })).expect_err("a conflict");
        assert!(told.chain().contains("rdt.clos_id"), "{}", told.chain());
        let sum = merge.adjust.linux.clone().expect("linux");
        let resources = sum.resources.expect("resources");
        assert_eq!((resources.blockio_class, resources.rdt_class), (class("slow"), None));
        assert_eq!(sum.rdt.expect("rdt").clos_id, class("silver"));
        let told =
            merge.update("10-a", vec![update("c2", limits(class("slow"), None))], Some("c1")).expect_err("refused");
        assert!(told.chain().contains("blockio_class of a container that is there"), "{}", told.chain());
    }

    #[test]
    fn updates_of_others_are_put_together() {
        let mut merge = merge();
        merge.update("10-a", vec![update("c2", memory(1 << 20))], Some("c1")).expect("set");
        let cpus = LinuxCpu { cpus: "0".into(), ..Default::default() };
        let cpus = LinuxResources { cpu: Some(cpus), ..Default::default() };
        merge.update("20-b", vec![update("c2", cpus)], Some("c1")).expect("another field");
        let limits = merge.limits().expect("fits");
        assert_eq!(limits.len(), 1);
        assert_eq!((limits[0].resources.memory_limit, limits[0].resources.cpuset_cpus.as_str()), (1 << 20, "0"));
        let told = merge.update("30-c", vec![update("c2", memory(5))], Some("c1")).expect_err("a conflict").chain();
        assert!(told.contains("\"10-a\" and \"30-c\"") && told.contains("memory.limit"), "{told}");
        let lenient = ContainerUpdate { ignore_failure: true, ..update("c2", memory(5)) };
        merge.update("30-c", vec![lenient], Some("c1")).expect("left out");
        assert!(merge.update("30-c", vec![update("c1", memory(5))], Some("c1")).is_err(), "it is not there yet");
    }
}
