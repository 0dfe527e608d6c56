//! Whether a device, reached as the configuration says, has what a driver cannot do without.

use iohost_control::host::{Failure, PciBackend};
use iohost_control::plugin::PluginInfo;
use iohost_doctor::Code;

use crate::config::DeviceConfig;

/// Refuses a driver that would find out only when it runs. `may_lock` is how much memory one of our
/// processes may lock; `None`: as much as there is.
pub(crate) fn check(
    plugin: &PluginInfo,
    device: &DeviceConfig,
    may_lock: Option<u64>,
) -> Result<(), Failure> {
    let refused = |code: Code, message: String, next: String| {
        let (driver, device) = (&plugin.name, &device.name);
        let message = format!("driver {driver:?} cannot run device {device:?}: {message}");
        Err(Failure::new(code.name(), message, next))
    };
    let by_vfio =
        "reach the device through VFIO and an IOMMU; docs/backends.md shows what each way has";
    let backend = device.backend.filter(|backend| backend.is_unsafe());
    let bytes = plugin.needs.dma_bytes;
    if let (1.., Some(backend)) = (bytes, backend) {
        let message = format!(
            "it needs {bytes} bytes of memory that the device reaches, and {} has no DMA",
            backend.name()
        );
        return refused(Code::BackendLacksDma, message, by_vfio.to_owned());
    }
    if let (true, Some(PciBackend::Uio)) = (plugin.needs.messages, device.backend) {
        let message = "it needs interrupts by message, and uio has the INTx line only".to_owned();
        return refused(Code::BackendLacksMessages, message, by_vfio.to_owned());
    }
    match may_lock {
        Some(have) if have < bytes => refused(
            Code::MemlockTooSmall,
            format!("it needs to lock {bytes} bytes of memory, and {have} are allowed"),
            format!("put LimitMEMLOCK={bytes} into the [Service] section of the unit file"),
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use iohost_control::plugin::Needs;

    use super::*;
    use crate::config::Location;

    const DMA: Needs = Needs { dma_bytes: 1 << 20, messages: false };
    const MESSAGES: Needs = Needs { dma_bytes: 0, messages: true };

    fn device(backend: Option<PciBackend>) -> DeviceConfig {
        let location = Location::Pci("0000:01:00.0".parse().unwrap());
        DeviceConfig { backend, ..DeviceConfig::unconfigured("disk0".into(), location) }
    }

    fn refusal(
        needs: Needs,
        backend: Option<PciBackend>,
        may_lock: Option<u64>,
    ) -> Option<Failure> {
        let plugin = PluginInfo {
            name: "disk".into(),
            category: String::new(),
            personalities: Vec::new(),
            needs,
        };
        let device = device(backend);
        check(&plugin, &device, may_lock).err()
    }

    #[test]
    fn a_driver_that_needs_dma_is_refused_where_no_memory_is_mapped() {
        for backend in [PciBackend::Uio, PciBackend::VfioNoIommu] {
            let refusal = refusal(DMA, Some(backend), None).unwrap();
            assert_eq!(refusal.code, "backend-lacks-dma");
            assert!(refusal.message.contains("1048576 bytes"), "{}", refusal.message);
        }
        for backend in [None, Some(PciBackend::VfioCdev), Some(PciBackend::VfioGroup)] {
            assert_eq!(refusal(DMA, backend, None), None);
        }
    }

    #[test]
    fn a_driver_that_needs_messages_is_refused_where_there_is_the_line_only() {
        assert_eq!(
            refusal(MESSAGES, Some(PciBackend::Uio), None).unwrap().code,
            "backend-lacks-messages"
        );
        assert_eq!(refusal(MESSAGES, Some(PciBackend::VfioNoIommu), None), None);
        assert_eq!(refusal(Needs::default(), Some(PciBackend::Uio), Some(0)), None);
    }

    #[test]
    fn memory_that_may_not_be_locked_is_said_with_need_have_and_the_line_for_the_unit_file() {
        let refusal_at = |have| refusal(DMA, None, Some(have));
        let refused = refusal_at(65536).unwrap();
        assert_eq!(refused.code, "memlock-too-small");
        assert!(refused.message.contains("lock 1048576 bytes of memory, and 65536"));
        assert!(refused.next.contains("LimitMEMLOCK=1048576"));
        assert_eq!(refusal_at(1 << 20), None);
    }
}
