//! Classes of block I/O and of Intel RDT in a container's specification. Pure: they were looked up before.

use oci_spec::runtime::{LinuxBlockIo, LinuxIntelRdt, LinuxThrottleDeviceBuilder, LinuxWeightDeviceBuilder, Spec};

use super::built;
use crate::core::error::Result;
use crate::integrations::blockio::{BlockIo, Limits, Number};

/// A class in the specification's words.
pub fn block_io(of: &BlockIo) -> Result<LinuxBlockIo> {
    let mut made = LinuxBlockIo::default();
    made.set_weight(of.weight);
    let weight = |((major, minor), limits): (&Number, &Limits)| {
        let device = LinuxWeightDeviceBuilder::default().major(*major).minor(*minor);
        Some(built(device.weight(limits.weight?).build()))
    };
    made.set_weight_device(some(of.devices.iter().filter_map(weight))?);
    let limits = |of_one: fn(&Limits) -> Option<u64>| {
        some(of.devices.iter().filter_map(|((major, minor), limits)| {
            let device = LinuxThrottleDeviceBuilder::default().major(*major).minor(*minor);
            Some(built(device.rate(of_one(limits)?).build()))
        }))
    };
    made.set_throttle_read_bps_device(limits(|l| l.read_bps)?);
    made.set_throttle_write_bps_device(limits(|l| l.write_bps)?);
    made.set_throttle_read_iops_device(limits(|l| l.read_iops)?);
    made.set_throttle_write_iops_device(limits(|l| l.write_iops)?);
    Ok(made)
}

fn some<T>(all: impl Iterator<Item = Result<T>>) -> Result<Option<Vec<T>>> {
    let all: Vec<T> = all.collect::<Result<_>>()?;
    Ok((!all.is_empty()).then_some(all))
}

/// Puts a container into a class of block I/O; None: into none.
pub fn set_block_io(spec: &mut Spec, class: Option<LinuxBlockIo>) {
    let Some(linux) = spec.linux_mut() else { return };
    let mut resources = linux.resources().clone().unwrap_or_default();
    resources.set_block_io(class);
    linux.set_resources(Some(resources));
}

/// Puts a container into a group of resctrl, which has to be there; None: into none.
pub fn set_rdt(spec: &mut Spec, group: Option<String>) {
    let Some(linux) = spec.linux_mut() else { return };
    linux.set_intel_rdt(group.map(|group| {
        let mut rdt = LinuxIntelRdt::default();
        rdt.set_clos_id(Some(group));
        rdt
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_as_the_runtime_reads_them() {
        let slow = Limits { weight: Some(50), read_bps: Some(1 << 20), write_iops: Some(0), ..Limits::default() };
        let write = Limits { write_bps: Some(7), read_iops: Some(9), ..Limits::default() };
        let class =
            BlockIo { weight: Some(80), devices: [((8, 0), slow), ((8, 16), write)].into(), ..BlockIo::default() };
        let mut spec = Spec::default();
        set_block_io(&mut spec, Some(block_io(&class).expect("fits")));
        set_rdt(&mut spec, Some("gold".into()));
        let text = serde_json::to_value(&spec).expect("JSON");
        let device = |minor: i64, rate: u64| serde_json::json!([{"major": 8, "minor": minor, "rate": rate}]);
        let wanted = serde_json::json!({
            "weight": 80, "weightDevice": [{"major": 8, "minor": 0, "weight": 50}],
            "throttleReadBpsDevice": device(0, 1 << 20), "throttleWriteBpsDevice": device(16, 7),
            "throttleReadIOPSDevice": device(16, 9), "throttleWriteIOPSDevice": device(0, 0),
        });
        assert_eq!(text["linux"]["resources"]["blockIO"], wanted);
        assert_eq!(text["linux"]["intelRdt"], serde_json::json!({"closID": "gold"}));
        set_rdt(&mut spec, None);
        set_block_io(&mut spec, None);
        let text = serde_json::to_value(&spec).expect("JSON");
        assert!(text["linux"]["intelRdt"].is_null() && text["linux"]["resources"]["blockIO"].is_null());
    }
}
