//! `iohost devices`.

use iohost_client::ClientError;
use iohost_control::host::Failure;
use iohost_control::varlink::{Device, DeviceList};
use iohost_doctor::refusal;
use iohost_pci::Sysfs;

use crate::CommandError;
use crate::options::Options;
use crate::output::{Output, backend, table};

/// Asks the daemon, which knows plugins and services as well; without one, sysfs has to do.
pub(crate) fn run(options: &Options, output: Output) -> Result<(), CommandError> {
    let devices = match options.connect() {
        Ok(mut daemon) => daemon.devices()?,
        Err(ClientError::NotRunning { .. } | ClientError::NoPermission { .. }) => from_sysfs()?,
        Err(err) => return Err(err.into()),
    };
    let mut shown = table(&[
        "LOCATION",
        "ID",
        "CLASS",
        "KERNEL DRIVER",
        "GROUP",
        "BACKEND",
        "PLUGIN",
        "SERVICE",
    ]);
    for device in &devices {
        let id = match (device.vendor, device.device) {
            (Some(vendor), Some(device)) => format!("{vendor:04x}:{device:04x}"),
            _ => "-".into(),
        };
        shown.add_row([
            device.location.clone(),
            id,
            device.class.map_or("-".into(), |class| format!("{class:06x}")),
            or_dash(&device.kernel_driver),
            device.iommu_group.map_or("-".into(), |group| group.to_string()),
            backend(&device.kind, device.is_unsafe),
            or_dash(&device.plugin),
            or_dash(&device.service),
        ]);
    }
    let text = match devices.is_empty() {
        true => "no devices: this machine shows no PCI functions, and none are configured".into(),
        false => shown.trim_fmt(),
    };
    output.result(&DeviceList { devices }, text);
    Ok(())
}

fn from_sysfs() -> Result<Vec<Device>, Failure> {
    let functions = Sysfs::default().functions().map_err(|err| {
        Failure::new(refusal::of_pci(&err).name(), err.to_string(), err.next_step())
    })?;
    let device = |function: iohost_pci::PciFunction| Device {
        location: function.address.to_string(),
        kind: "vfio".into(),
        is_unsafe: false,
        vendor: Some(function.vendor),
        device: Some(function.device),
        class: Some(function.class),
        kernel_driver: function.driver,
        iommu_group: function.iommu_group,
        service: None,
        plugin: None,
    };
    Ok(functions.into_iter().map(device).collect())
}

fn or_dash(text: &Option<String>) -> String {
    text.clone().unwrap_or_else(|| "-".into())
}
