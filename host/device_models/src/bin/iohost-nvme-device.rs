//! `iohost-nvme-device`: an NVMe controller for vfio-user clients.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use clap::Parser;
use iohost_device_models::nvme::{Namespace, Nvme, Options};
use iohost_device_models::program;

/// Emulates an NVMe controller (PCI 1b36:0010, NVM Express 1.4) at a vfio-user socket.
///
/// Serves one client after another: when one leaves or dies, the controller is reset and waits for
/// the next; what was written stays. Ends on SIGTERM or SIGINT and removes its socket. RUST_LOG
/// sets what is logged.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to make the socket; one that a dead server left behind is replaced.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// A namespace: `file:PATH` or `memory:MIB`, and `,4096` for blocks of 4096 bytes instead of
    /// 512, `,ro` for one that is read only. They are numbered from 1 on.
    #[arg(long = "namespace", value_name = "WHAT", required = true)]
    namespaces: Vec<Backing>,

    /// I/O queue pairs the controller can have.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    io_queues: u16,

    /// The longest transfer is 2^N pages of 4096 bytes; 0 for no limit.
    #[arg(long, value_name = "N", default_value_t = 7)]
    mdts: u8,

    /// Vectors of MSI-X; 0 for none, so that the line is used.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(0..=256))]
    msi_x_vectors: u16,

    /// Take shadow doorbells.
    #[arg(long)]
    shadow_doorbells: bool,

    /// Take scatter gather lists.
    #[arg(long)]
    sgls: bool,
}

/// Where the blocks of a namespace are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Backing {
    place: Place,
    block: u32,
    is_read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    File(PathBuf),
    Memory { mib: u64 },
}

impl FromStr for Backing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let place = parts.next().unwrap_or_default();
        let place = match place.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Place::File(path.into()),
            Some(("memory", mib)) => match mib.parse() {
                Ok(mib @ 1..=1_048_576) => Place::Memory { mib },
                _ => return Err(format!("{mib:?} is not a number of MiB")),
            },
            _ => return Err(format!("{place:?} is neither file:PATH nor memory:MIB")),
        };
        let mut backing = Self { place, block: 512, is_read_only: false };
        for part in parts {
            match part {
                "512" => backing.block = 512,
                "4096" => backing.block = 4096,
                "ro" => backing.is_read_only = true,
                other => return Err(format!("{other:?} is none of 512, 4096 and ro")),
            }
        }
        Ok(backing)
    }
}

impl Backing {
    fn open(&self) -> anyhow::Result<Namespace> {
        let namespace = match &self.place {
            Place::File(path) => Namespace::in_file(path, self.block)?,
            Place::Memory { mib } => {
                Namespace::in_memory(self.block, (mib << 20) / u64::from(self.block))?
            }
        };
        Ok(if self.is_read_only { namespace.read_only() } else { namespace })
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::run("iohost-nvme-device", &arguments.socket, || {
        let options = Options {
            io_queues: arguments.io_queues,
            mdts: arguments.mdts,
            msi_x_vectors: arguments.msi_x_vectors,
            shadow_doorbells: arguments.shadow_doorbells,
            sgls: arguments.sgls,
            ..Options::default()
        };
        let namespaces = arguments.namespaces.iter().map(Backing::open);
        let namespaces: anyhow::Result<Vec<_>> = namespaces.collect();
        Ok(Nvme::new(options, namespaces.context("opening a namespace")?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_a_file_or_memory_with_its_block_size() {
        let file = Backing { place: Place::File("/a:b".into()), block: 4096, is_read_only: true };
        assert_eq!("file:/a:b,4096,ro".parse(), Ok(file));
        let memory = Backing { place: Place::Memory { mib: 64 }, block: 512, is_read_only: false };
        assert_eq!("memory:64".parse(), Ok(memory));
        for wrong in ["", "file:", "memory:x", "memory:0", "disk:1", "memory:1,1024"] {
            assert!(wrong.parse::<Backing>().is_err(), "{wrong}");
        }
    }
}
