//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use iohost_client::{ClientError, Daemon};
use iohost_control::varlink::INTERFACE;
use iohost_pci::PciAddress;
use iohost_supervisor::DEFAULT_RUNTIME_DIRECTORY;

/// Runs device drivers as ordinary Linux processes.
#[derive(Debug, Parser)]
#[command(
    name = "iohost",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = "\
Examples:
  iohost devices                          what is there, and which driver would take it
  iohost daemon                           run the daemon with /etc/iohost/iohost.toml
  iohost doctor 0000:01:00.0              what stands in the way of a device
  iohost bind 0000:01:00.0                take a device and start its driver
  iohost call edu factorial 5             call a method of a driver
  iohost status --json | jq .services     what runs, for a program

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or configuration."
)]
pub(crate) struct Options {
    /// Print JSON: results on standard output, errors on standard error.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// The daemon's control socket [default: io.iohost in the runtime directory].
    #[arg(long, global = true, value_name = "PATH", conflicts_with = "runtime_dir")]
    socket: Option<PathBuf>,

    /// The daemon's runtime directory [default: /run/iohost].
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) runtime_dir: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon until SIGTERM or SIGINT.
    #[command(after_help = "\
Examples:
  iohost daemon
  iohost --runtime-dir /tmp/iohost daemon --config test.toml --driver-dir target/release

The daemon logs to standard error; IOHOST_LOG=debug shows more.
A mistake in the configuration is exit code 2, and then nothing was touched.")]
    Daemon(DaemonOptions),

    /// List PCI functions and configured devices; works without a daemon.
    #[command(after_help = "\
Examples:
  iohost devices
  iohost devices --json | jq '.devices[] | select(.vendor == 4660)'")]
    Devices,

    /// Say what stands between iohost and devices, and the commands that remove it.
    #[command(after_help = "\
Examples:
  iohost doctor                           this machine, and all its functions in short
  iohost doctor 0000:01:00.0              one function closely
  iohost doctor --json 01:00.0 | jq -r '.devices[].findings[].command // empty'

It changes nothing, and needs no daemon; one that runs is asked which devices it has.
Exit codes: 0 nothing blocks, 1 something does.")]
    Doctor(DoctorOptions),

    /// Explain a code of a finding or a refusal.
    #[command(after_help = "\
Examples:
  iohost explain                          all codes
  iohost explain no-iommu")]
    Explain {
        /// The code.
        code: Option<String>,
    },

    /// Take a device from its kernel driver and start its iohost driver.
    #[command(after_help = "\
Examples:
  iohost bind 0000:01:00.0
  iohost bind edu0                        start a configured device again that is down or quarantined
  iohost bind --group 0000:01:00.0        with the rest of its IOMMU group, all or nothing
  iohost bind --persist 0000:01:00.0      again at every start of the daemon, until it is unbound

A device that the machine uses is refused: one with a disk that is mounted, swapped to or part of
another one, or with a network interface that is up or belongs to a bridge. How to give back what
is taken is noted on disk first: after a crash the next daemon undoes it.")]
    Bind(BindingOptions),

    /// Stop a device's driver, reset the device, and give it back with what was taken of its group.
    #[command(after_help = "\
Example:
  iohost unbind 0000:01:00.0")]
    Unbind {
        /// Address of a PCI function, or name of a service.
        device: String,
    },

    /// Try a driver with faults of its device, its process and its clients.
    #[command(subcommand)]
    Faults(FaultsCommand),

    /// Show the daemon and its services.
    #[command(after_help = "\
Examples:
  iohost status
  iohost status edu                       and what the queues of a driver do
  iohost status --json | jq -r '.services[] | \"\\(.name) \\(.state)\"'")]
    Status {
        /// A service: its sessions and dispatch queues instead of the list
        service: Option<String>,
    },

    /// Call a method of a driver, or list its methods.
    #[command(after_help = "\
Examples:
  iohost call edu                         list methods and queues
  iohost call edu factorial 5
  iohost call edu dma_round_trip @file    bytes from a file
  iohost call edu dma_round_trip hex:00ff bytes in hexadecimal; anything else is text")]
    Call(CallOptions),

    /// Use an edu device: factorials, DMA, and files through both data queues.
    #[command(after_help = "\
Examples:
  iohost demo                             stream this program itself
  iohost demo --limit 65536 /bin/ls       at most that many bytes

scripts/demo runs this against an emulated device, without root.")]
    Demo(DemoOptions),
}

#[derive(Debug, Args)]
pub(crate) struct DaemonOptions {
    /// The configuration [default: /etc/iohost/iohost.toml, if it is there].
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Where the plugins are [default: what the configuration says, or
    /// /usr/lib/iohost/drivers].
    #[arg(long, value_name = "DIR")]
    pub(crate) driver_dir: Option<PathBuf>,

    /// The program that runs a driver [default: iohost-driver-host beside this one].
    #[arg(long, value_name = "FILE")]
    pub(crate) driver_host: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BindingOptions {
    /// Address of a PCI function, or name of a service.
    pub(crate) device: String,

    /// Take every function of its IOMMU group that VFIO can take, or none.
    #[arg(long)]
    pub(crate) group: bool,

    /// Take it again at every start of the daemon, until it is unbound.
    #[arg(long)]
    pub(crate) persist: bool,

    /// Take it although the machine uses it, which breaks whatever does.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorOptions {
    /// Addresses of PCI functions [default: the machine, and all of them in short].
    #[arg(value_name = "ADDRESS")]
    pub(crate) devices: Vec<PciAddress>,

    /// Memory that drivers are to have for DMA, all of them together.
    #[arg(long, value_name = "BYTES", default_value_t = 8 * 1024 * 1024)]
    pub(crate) dma_memory: u64,
}

#[derive(Debug, Args)]
pub(crate) struct CallOptions {
    /// Name of a service, address of its device, or name of its driver.
    pub(crate) service: String,

    /// The method.
    pub(crate) method: Option<String>,

    /// Its arguments, in order.
    #[arg(allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,

    /// How long to wait for the answer, in seconds.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DemoOptions {
    /// Files to send through the device, one after the other.
    pub(crate) files: Vec<PathBuf>,

    /// The service.
    #[arg(long, default_value = "edu")]
    pub(crate) service: String,

    /// The most bytes to send.
    #[arg(long, value_name = "BYTES")]
    pub(crate) limit: Option<u64>,
}

impl Options {
    /// The control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        let directory = || self.runtime_dir.clone().unwrap_or(DEFAULT_RUNTIME_DIRECTORY.into());
        self.socket.clone().unwrap_or_else(|| directory().join(INTERFACE))
    }

    /// A connection to the daemon.
    pub(crate) fn connect(&self) -> Result<Daemon, ClientError> {
        Daemon::connect(self.socket())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum FaultsCommand {
    /// Make faults and print what came of them.
    #[command(after_help = "\
Examples:
  iohost faults run --count 10000
  iohost faults run --seed 42 --count 1000000 --devices 4

Starts a daemon of its own in a temporary folder, with emulated devices: nothing else is touched.
Exit codes: 0 everything held, 1 something did not; the score says what.")]
    Run(FaultsOptions),
}

#[derive(Debug, Args)]
pub(crate) struct FaultsOptions {
    /// Where the choice of faults starts [default: another one each time].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    /// How many faults.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub(crate) count: u64,

    /// How many devices, each with a driver and a client of its own.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub(crate) devices: u64,

    /// The driver; it serves the interface `edu` on an `edu` device.
    #[arg(long, value_name = "DRIVER", default_value = "edu")]
    pub(crate) against: String,

    /// Where its plugin is [default: beside this program, else /usr/lib/iohost/drivers].
    #[arg(long, value_name = "DIR")]
    pub(crate) driver_dir: Option<PathBuf>,
}
