//! The device itself: whether it answers, is awake, can be reset, has interrupts and placed BARs.

use iohost_pci::{BarMapping, VFIO_PCI};

use super::{at, sysfs};
use crate::facts::Function;
use crate::{Code, Finding};

pub(super) fn not_an_endpoint(function: &Function) -> Finding {
    at(
        function,
        Code::NotAnEndpoint,
        format!("{} is a bridge", function.address),
        "name the function behind it: `iohost devices` lists all",
        None,
    )
}

pub(super) fn gone(function: &Function) -> Option<Finding> {
    let again = format!("echo 1 > {} && echo 1 > /sys/bus/pci/rescan", sysfs(function, "remove"));
    (!function.configuration.answers).then(|| {
        at(
            function,
            Code::DeviceGone,
            format!("{} does not answer: its configuration reads as all ones", function.address),
            "let the kernel forget it and look for it again; if it stays away, power-cycle it",
            Some(again),
        )
    })
}

pub(super) fn asleep(function: &Function) -> Option<Finding> {
    let kernel = function.kernel_power_state.as_deref();
    let state = match (kernel, function.configuration.power_state) {
        (Some("D3cold"), _) => "D3cold",
        (_, Some(0)) => return None,
        (_, Some(1)) => "D1",
        (_, Some(2)) => "D2",
        (_, Some(_)) => "D3hot",
        (Some(state @ ("D1" | "D2" | "D3hot")), None) => state,
        (_, None) => return None,
    };
    // There it idles so, and is woken when it is opened.
    if function.driver.as_deref() == Some(VFIO_PCI) || !function.configuration.answers {
        return None;
    }
    let control = sysfs(function, "power/control");
    let enable = sysfs(function, "enable");
    let command = match function.driver {
        Some(_) => format!("echo on > {control}"),
        // With a driver gone, this is how the kernel is told to set it to D0.
        None => format!("echo on > {control} && echo 1 > {enable} && echo 0 > {enable}"),
    };
    Some(at(
        function,
        Code::DeviceAsleep,
        format!("{} is in {state}, in which its registers do not answer", function.address),
        "have the kernel wake it and keep it awake",
        Some(command),
    ))
}

pub(super) fn no_reset(function: &Function) -> Option<Finding> {
    let address = function.address;
    match function.reset_methods.as_deref() {
        None => Some(at(
            function,
            Code::NoReset,
            format!("the kernel knows no way to reset {address} alone"),
            "put it into a slot of its own; else it is reset with its bus, or not at all",
            None,
        )),
        Some([]) => Some(at(
            function,
            Code::NoReset,
            format!("somebody has taken from {address} all the ways to reset it"),
            "give them back",
            Some(format!("echo default > {}", sysfs(function, "reset_method"))),
        )),
        Some(_) => None,
    }
}

pub(super) fn no_interrupts(function: &Function) -> Option<Finding> {
    let known = &function.configuration;
    let has_none =
        known.answers && !known.has_line && known.msi == Some(0) && known.msi_x == Some(0);
    has_none.then(|| {
        at(
            function,
            Code::NoInterrupts,
            format!("{} has no interrupt: no line, no MSI, no MSI-X", function.address),
            "use a driver that polls",
            None,
        )
    })
}

pub(super) fn unassigned(function: &Function) -> Vec<Finding> {
    let bars = function.bars.iter().filter(|bar| bar.mapping == BarMapping::Unassigned);
    let unassigned = |bar: &iohost_pci::PciBar| {
        at(
            function,
            Code::BarUnassigned,
            format!(
                "the kernel found no room for BAR {} of {}, which has {:#x} bytes",
                bar.index, function.address, bar.size
            ),
            "let the kernel place it again; or turn above 4G decoding on in the firmware's setup",
            Some(format!("echo 1 > {} && echo 1 > /sys/bus/pci/rescan", sysfs(function, "remove"))),
        )
    };
    bars.map(unassigned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::tests::found;

    #[test]
    fn an_idle_device_under_vfio_sleeps_as_it_should() {
        let asleep = |edu: &mut Function| {
            edu.kernel_power_state = Some("D3hot".to_owned());
            edu.configuration.power_state = Some(3);
        };
        assert_eq!(found(|_, edu| asleep(edu)), []);
        let found = found(|_, edu| {
            asleep(edu);
            (edu.driver, edu.may_bind) = (None, true);
        });
        let asleep = &found[0];
        assert_eq!(asleep.code, Code::DeviceAsleep);
        assert!(asleep.message.contains("D3hot"));
        let enable = "/sys/bus/pci/devices/0000:01:00.0/enable";
        let command = asleep.command.as_ref().unwrap();
        assert!(command.ends_with(&format!("echo 1 > {enable} && echo 0 > {enable}")), "{command}");
    }

    #[test]
    fn the_power_state_is_that_of_the_device_where_it_says_one() {
        let state = |kernel: Option<&str>, device| {
            let found = found(|_, edu| {
                (edu.driver, edu.may_bind) = (Some("e1000e".to_owned()), true);
                edu.kernel_power_state = kernel.map(str::to_owned);
                edu.configuration.power_state = device;
            });
            found.into_iter().find(|finding| finding.code == Code::DeviceAsleep)
        };
        assert!(state(Some("D3hot"), Some(0)).is_none());
        assert!(state(Some("unknown"), None).is_none());
        assert!(state(None, None).is_none());
        for (kernel, device, says) in [
            (Some("D0"), Some(3), "in D3hot"),
            (Some("D3hot"), None, "in D3hot"),
            (Some("D3cold"), None, "in D3cold"),
            (None, Some(1), "in D1"),
        ] {
            let message = state(kernel, device).unwrap().message;
            assert!(message.contains(says), "{message}");
        }
    }
}
