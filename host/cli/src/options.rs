//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
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
  iohost crashes                          which drivers died, and why

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
SIGTERM stops every driver first. SIGUSR2 ends the daemon alone, as a crash does: drivers and their
clients go on, and the next daemon in that runtime directory takes them over.
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

    /// Have the daemon read its configuration and its plugins again.
    #[command(after_help = "\
Examples:
  iohost reload
  iohost reload --json | jq -r '.restarted[]'

Devices that the configuration names anew are started, those that it has no more are given back,
those of which it says something else are started again; no other one is disturbed. With a mistake
in it, which is said with its line, nothing changes. SIGHUP does the same.")]
    Reload,

    /// Put another version of its driver into a service that runs; its clients see a pause.
    #[command(after_help = "\
Examples:
  iohost upgrade edu0 --plugin target/release/libedu.so
  iohost upgrade edu --plugin /tmp/libedu.so    the driver's name, if one service runs it

Calls that are under way are finished first, later ones wait. If the new version does not start,
the one before it runs again, and this says why. The file is installed once the new version runs;
other services with the driver run what they have until they start again.")]
    Upgrade {
        /// Name of a service, address of its device, or name of its driver.
        service: String,

        /// The plugin file.
        #[arg(long, value_name = "FILE")]
        plugin: PathBuf,
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

    /// Show what a driver says of itself: its properties, and the services it has made.
    #[command(after_help = "\
Example:
  iohost properties edu0 | jq '.[1].properties'")]
    Properties {
        /// Name of a service, address of its device, or name of its driver.
        service: String,
    },

    /// Have a driver go into a power state.
    #[command(after_help = "\
Examples:
  iohost power edu0 low
  for s in $(iohost status --json | jq -r '.services[].name'); do iohost power $s off; done

Returns when the driver has acknowledged the state, or after 20 seconds with exit code 1. The second
example belongs into /usr/lib/systemd/system-sleep, with `off` before the machine sleeps and `on`
after it: iohost does not hear of that by itself.")]
    Power {
        /// Name of a service, address of its device, or name of its driver.
        service: String,
        /// The state.
        state: PowerChoice,
    },
    /// List the deaths of drivers, or show one closely; works without a daemon.
    #[command(after_help = "\
Examples:
  iohost crashes
  iohost crashes show 3                   cause, requests in flight, what each queue did last
  iohost crashes --json | jq '.crashes[] | select(.reason == \"hang\")'

The reports are files in the daemon's state directory, the newest 64 of them.")]
    Crashes(CrashesOptions),

    /// Call a method of a driver, or list its methods.
    #[command(after_help = "\
Examples:
  iohost call edu                         list methods and queues
  iohost call edu factorial 5
  iohost call edu dma_round_trip @file    bytes from a file
  iohost call edu dma_round_trip hex:00ff bytes in hexadecimal; anything else is text")]
    Call(CallOptions),

    /// Use disks: list, read, write, measure them.
    #[command(after_help = "\
Examples:
  iohost block ls
  iohost block read nvme0 --length 1M image       the first MiB into a file
  iohost block write nvme0 image                  a file to the start of the disk
  iohost block bench nvme0 --depth 32 --size 4K

A disk is the service's first one, unless --disk names another.")]
    Block(BlockOptions),

    /// Use an edu device: factorials, DMA, and files through both data queues.
    #[command(after_help = "\
Examples:
  iohost demo                             stream this program itself
  iohost demo --limit 65536 /bin/ls       at most that many bytes

scripts/demo runs this against an emulated device, without root.")]
    Demo(DemoOptions),
}

/// A power state, as it is typed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PowerChoice {
    /// Everything is quiet.
    Off,
    /// It works with less.
    Low,
    /// As it began.
    On,
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
pub(crate) struct CrashesOptions {
    /// The daemon's state directory [default: that of /etc/iohost/iohost.toml, or
    /// /var/lib/iohost].
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Option<CrashCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CrashCommand {
    /// Show one report.
    Show {
        /// Its number.
        number: u64,
    },
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

#[derive(Debug, Args)]
pub(crate) struct BlockOptions {
    #[command(subcommand)]
    pub(crate) command: BlockCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BlockCommand {
    /// List the disks of all services that have some.
    Ls,

    /// Show what a disk is.
    Info(DiskOptions),

    /// Show how a disk's device is: temperature, wear, errors.
    Health(DiskOptions),

    /// Read bytes into a file, or to standard output.
    Read {
        #[command(flatten)]
        disk: DiskOptions,

        /// The file [default: standard output].
        file: Option<PathBuf>,

        /// The first byte: with K, M, G or T for powers of 1024.
        #[arg(long, value_name = "BYTES", default_value = "0", value_parser = bytes)]
        offset: u64,

        /// How many bytes [default: up to the end of the disk].
        #[arg(long, value_name = "BYTES", value_parser = bytes)]
        length: Option<u64>,
    },

    /// Write a file, or standard input, to a disk, and flush it. What is there is lost.
    Write {
        #[command(flatten)]
        disk: DiskOptions,

        /// The file; `-` for standard input.
        file: PathBuf,

        /// The first byte: with K, M, G or T for powers of 1024.
        #[arg(long, value_name = "BYTES", default_value = "0", value_parser = bytes)]
        offset: u64,
    },

    /// Serve a disk to programs that speak NBD, at a Unix socket, until it is interrupted.
    #[command(after_help = "\
Examples:
  iohost block export nvme0 /run/nvme0.nbd
  qemu-img info nbd+unix:///?socket=/run/nvme0.nbd
  nbd-client -unix /run/nvme0.nbd /dev/nbd0")]
    Export {
        #[command(flatten)]
        disk: DiskOptions,

        /// The socket to make; one that nobody listens on is replaced.
        #[arg(value_name = "PATH")]
        at: PathBuf,
    },

    /// Make a disk a block device, /dev/ublkbN, and serve it until it is interrupted.
    #[command(after_help = "\
Needs root, and Linux 6.4 or later with ublk (modprobe ublk_drv). The name of the block device is
printed when it can be used. Unmount it before you interrupt this: it goes on until then.

Examples:
  iohost block attach nvme0
  mount /dev/ublkb0 /mnt")]
    Attach(DiskOptions),

    /// Take a block device away that `attach` has made, also when its process has died.
    Detach {
        /// The N of /dev/ublkbN.
        #[arg(value_name = "N")]
        number: u32,

        /// Also when it is mounted or in use: what was not written is lost.
        #[arg(long)]
        force: bool,
    },

    /// Measure how fast it reads, at random places.
    Bench {
        #[command(flatten)]
        disk: DiskOptions,

        /// Requests under way at a time.
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
        depth: u32,

        /// Bytes of a request: with K or M for powers of 1024.
        #[arg(long, value_name = "BYTES", default_value = "4K", value_parser = bytes)]
        size: u64,

        /// How long, in seconds.
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,

        /// One place after the other.
        #[arg(long)]
        sequential: bool,

        /// Look for completions instead of waiting for interrupts: a processor for the driver, and one here.
        #[arg(long)]
        polled: bool,

        /// Write instead. What is on the disk is lost.
        #[arg(long)]
        write: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DiskOptions {
    /// Name of a service, or address of its device.
    pub(crate) service: String,

    /// The disk's number [default: the first one].
    #[arg(long, value_name = "N")]
    pub(crate) disk: Option<u32>,
}

/// A number of bytes, with a suffix for powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no number of bytes"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
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
Ctrl-C ends it early, with the score so far.
Exit codes: 0 everything held, 1 something did not, or it was ended early; the score says what.")]
    Run(FaultsOptions),
}

#[derive(Debug, Args)]
pub(crate) struct FaultsOptions {
    /// Where the choice of faults starts [default: another one each time].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    /// How many faults, beside those of the two probes.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub(crate) count: u64,

    /// How many devices, each with a driver and a client of its own. Two more have the driver `probe`,
    /// which fails from within.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub(crate) devices: u64,

    /// The driver; it serves the interface `edu` on an `edu` device.
    #[arg(long, value_name = "DRIVER", default_value = "edu")]
    pub(crate) against: String,

    /// Where its plugin is [default: beside this program, else /usr/lib/iohost/drivers].
    #[arg(long, value_name = "DIR")]
    pub(crate) driver_dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn a_number_of_bytes_can_have_a_suffix() {
        assert_eq!(bytes("512"), Ok(512));
        assert_eq!(bytes("4K"), Ok(4096));
        assert_eq!(bytes("3g"), Ok(3 << 30));
        for wrong in ["", "K", "1.5M", "-1", "1X", "99999999999T"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
