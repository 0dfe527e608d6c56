//! What a PCI Express function says of its link and its power.
//!
//! Source: PCI Express Base Specification 5.0, 7.5.2 (power management), 7.5.3 (PCI Express).

use iohost_interface::IOReturn;

use super::Capability;
use crate::{Error, IOPCIDevice, Result, ensure};

/// How fast and how wide a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// The generation: 1 for 2.5 GT/s, 2 for 5, 3 for 8, 4 for 16, 5 for 32.
    pub speed: u8,
    /// Lanes.
    pub width: u8,
}

/// The states in which a link saves power while it is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AspmStates {
    /// L0s: one direction stands by.
    pub l0s: bool,
    /// L1: both do.
    pub l1: bool,
}

/// The power states of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DevicePowerState {
    /// On.
    D0,
    /// Light sleep, which few functions have.
    D1,
    /// Deeper sleep, which few functions have.
    D2,
    /// Off, but for its configuration space.
    D3Hot,
}

const LINK_CAPABILITIES: u64 = 0x0c;
const LINK_CONTROL: u64 = 0x10;
const LINK_STATUS: u64 = 0x12;
const POWER_CAPABILITIES: u64 = 0x02;
const POWER_CONTROL: u64 = 0x04;

/// The highest generation that can be asked for, as in DriverKit.
const FASTEST: u8 = 5;

impl IOPCIDevice {
    /// How fast the link runs, and how wide it is. `GetLinkSpeed`.
    ///
    /// Errors: `UNSUPPORTED` for a function that is not PCI Express.
    pub fn link_status(&self) -> Result<LinkStatus> {
        let status = self.configuration_read16(self.express()? + LINK_STATUS);
        Ok(LinkStatus::of(status.into()))
    }

    /// How fast the link could run and how wide it could be, as far as it is for the device.
    ///
    /// Errors: as [`link_status`](Self::link_status).
    pub fn link_capabilities(&self) -> Result<LinkStatus> {
        let can = self.configuration_read32(self.express()? + LINK_CAPABILITIES);
        Ok(LinkStatus::of(can))
    }

    /// Asks for a link of at most this generation. What bounds a link is the port above the
    /// device, which belongs to the kernel: a driver process has no way to it. `SetLinkSpeed`.
    ///
    /// Errors: `BAD_ARGUMENT` outside 1 to 5; `UNSUPPORTED` for those.
    pub fn set_link_speed(&self, speed: u8) -> Result<()> {
        ensure!(
            (1..=FASTEST).contains(&speed),
            IOReturn::BAD_ARGUMENT,
            "link speed {speed}, it has to be 1 to {FASTEST}"
        );
        let reason = "the port above the device bounds its link, and that is the kernel's";
        Err(Error::new(IOReturn::UNSUPPORTED, reason))
    }

    /// The states that the link may use.
    ///
    /// Errors: as [`link_status`](Self::link_status).
    pub fn aspm_states(&self) -> Result<AspmStates> {
        let control = self.configuration_read16(self.express()? + LINK_CONTROL);
        Ok(AspmStates::of(control.into()))
    }

    /// The states that the link has, as far as it is for the device.
    ///
    /// Errors: as [`link_status`](Self::link_status).
    pub fn aspm_capabilities(&self) -> Result<AspmStates> {
        let can = self.configuration_read32(self.express()? + LINK_CAPABILITIES);
        Ok(AspmStates::of(can >> 10))
    }

    /// Says which states the link may use. `SetASPMState`.
    ///
    /// Errors: as [`link_status`](Self::link_status); `UNSUPPORTED` for a state that the link does
    /// not have, or where the host lets no driver change it, as Linux' VFIO does.
    pub fn set_aspm_states(&self, states: AspmStates) -> Result<()> {
        let at = self.express()? + LINK_CONTROL;
        let can = self.aspm_capabilities()?;
        ensure!(
            (can.l0s || !states.l0s) && (can.l1 || !states.l1),
            IOReturn::UNSUPPORTED,
            "{states:?} of a link that has {can:?}"
        );
        let control = self.configuration_read16(at) & !0x3 | states.bits();
        self.configuration_write16(at, control);
        let now = self.aspm_states()?;
        ensure!(
            now == states,
            IOReturn::UNSUPPORTED,
            "the link's control register says {now:?} after {states:?} was written"
        );
        Ok(())
    }

    /// The state that the function is in.
    ///
    /// Errors: `UNSUPPORTED` for a function without power management.
    pub fn power_state(&self) -> Result<DevicePowerState> {
        let control = self.configuration_read16(self.power_management()? + POWER_CONTROL);
        Ok(match control & 0x3 {
            0 => DevicePowerState::D0,
            1 => DevicePowerState::D1,
            2 => DevicePowerState::D2,
            _ => DevicePowerState::D3Hot,
        })
    }

    /// Whether the function has a state. `HasPCIPowerManagement`. The host has no sleep of its own
    /// to choose a state for, so there is no `EnablePCIPowerManagement`.
    ///
    /// Errors: as [`power_state`](Self::power_state).
    pub fn has_power_state(&self, state: DevicePowerState) -> Result<bool> {
        let can = self.configuration_read16(self.power_management()? + POWER_CAPABILITIES);
        Ok(match state {
            DevicePowerState::D0 | DevicePowerState::D3Hot => true,
            DevicePowerState::D1 => can & 1 << 9 != 0,
            DevicePowerState::D2 => can & 1 << 10 != 0,
        })
    }

    fn express(&self) -> Result<u64> {
        self.found_or_unsupported(Capability::EXPRESS, "is not PCI Express")
    }

    fn power_management(&self) -> Result<u64> {
        self.found_or_unsupported(Capability::POWER_MANAGEMENT, "has no power management")
    }

    fn found_or_unsupported(&self, capability: Capability, lack: &str) -> Result<u64> {
        let found = self.find_capability(capability, None);
        found.map_err(|_| Error::new(IOReturn::UNSUPPORTED, format!("the function {lack}")))
    }
}

impl LinkStatus {
    fn of(register: u32) -> Self {
        Self { speed: (register & 0xf) as u8, width: (register >> 4 & 0x3f) as u8 }
    }
}

impl AspmStates {
    fn of(bits: u32) -> Self {
        Self { l0s: bits & 1 != 0, l1: bits & 2 != 0 }
    }

    fn bits(self) -> u16 {
        u16::from(self.l0s) | u16::from(self.l1) << 1
    }
}
