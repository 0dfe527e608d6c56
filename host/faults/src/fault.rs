//! What can go wrong, and how often it does.

use fastrand::Rng;
use iohost_device_models::Fault as Lie;
use nix::sys::signal::Signal;

use crate::offence::Offence;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The device does something wrong the next few times.
    Device(Lie, u32),
    /// The device interrupts without a cause.
    Spurious(u32),
    /// The driver host dies, and the next ones are refused what they set up, this often.
    SetUp(u32),
    /// The driver host is killed.
    Driver(Death),
    /// The driver fails by itself.
    Within(Flaw),
    /// A client misbehaves.
    Client(Offence),
    /// The daemon is killed, and the next one takes everything over.
    Daemon,
}

/// How a driver host is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    Killed,
    Segfault,
    Abort,
    /// It stops where it is, with all its threads, and is killed.
    Stopped,
}

/// What is wrong with a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    Panic,
    Abort,
    Segfault,
    /// Writes all over memory that it shares with the daemon, and dies.
    WildWrite,
    /// A handler does not return. Nobody kills it but the daemon, once it has noticed.
    Hang,
    /// Takes memory until that is its end.
    MemoryLeak,
    /// Takes all descriptors there are, and goes on.
    DescriptorLeak,
}

impl Death {
    const ALL: [Self; 4] = [Self::Killed, Self::Segfault, Self::Abort, Self::Stopped];

    /// What the kernel does to a process that dies like this.
    pub(crate) fn signal(self) -> Signal {
        match self {
            Self::Killed => Signal::SIGKILL,
            Self::Segfault => Signal::SIGSEGV,
            Self::Abort => Signal::SIGABRT,
            Self::Stopped => Signal::SIGSTOP,
        }
    }
}

impl Fault {
    /// The next one. What only costs the driver an access is frequent, and makes ten faults at a time; a
    /// death costs a restart; that of the daemon has all the others wait.
    pub(crate) fn choose(random: &mut Rng) -> Self {
        match random.u32(..1000) {
            0..40 => Self::Driver(Death::ALL[random.usize(..Death::ALL.len())]),
            40..100 => Self::Client(Offence::ALL[random.usize(..Offence::ALL.len())]),
            100..150 => Self::Spurious(random.u32(1..64)),
            150..160 => Self::Daemon,
            160..170 => Self::SetUp(random.u32(1..4)),
            _ => Self::lie(random),
        }
    }

    fn lie(random: &mut Rng) -> Self {
        let lie = match Lie::KINDS[random.usize(..Lie::KINDS.len())] {
            Lie::ReadsInverted(_) => Lie::ReadsInverted(random.u8(..64)),
            Lie::RepeatsInterrupt(_) => Lie::RepeatsInterrupt(random.u8(2..16)),
            // Those are for a start.
            Lie::RefusesSetUp => Lie::LosesInterrupt,
            lie => lie,
        };
        let times = match lie {
            // The driver waits out a whole tick of its timer each time.
            Lie::LosesInterrupt | Lie::LosesWrite => random.u32(1..3),
            Lie::ReadsOnes | Lie::ReadsStale | Lie::ReadsInverted(_) => random.u32(1..16),
            _ => random.u32(1..64),
        };
        Self::Device(lie, times)
    }
}
