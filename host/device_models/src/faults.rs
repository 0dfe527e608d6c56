//! What a device does wrong, on purpose: for tests of what a driver makes of it.
//!
//! A fault is one wrong access, transfer or interrupt, or one setting that is refused. Every model
//! has them, since they happen between the model and its user: the model itself goes on as if
//! nothing were wrong.

/// One thing that a device does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A read of a BAR gives all ones, as of a device that has left the bus.
    ReadsOnes,
    /// A read of a BAR gives what the read before it gave.
    ReadsStale,
    /// A read of a BAR gives one bit inverted, here by its number.
    ReadsInverted(u8),
    /// A write to a BAR does nothing.
    LosesWrite,
    /// An interrupt is not sent.
    LosesInterrupt,
    /// A message is sent as often as this. A line that is asserted twice is asserted.
    RepeatsInterrupt(u8),
    /// A transfer moves nothing; what would have been read are zeros.
    LosesDma,
    /// A transfer moves the first half of its bytes.
    ShortensDma,
    /// A transfer goes to an address that no mapping names, so that it is blocked.
    StraysDma,
    /// Memory is not mapped, or no trigger of an interrupt is set: the function refuses, as the kernel does
    /// when it is out of memory or its own access to the device fails.
    RefusesSetUp,
}

impl Fault {
    /// One of each kind.
    pub const KINDS: [Self; 10] = [
        Self::ReadsOnes,
        Self::ReadsStale,
        Self::ReadsInverted(0),
        Self::LosesWrite,
        Self::LosesInterrupt,
        Self::RepeatsInterrupt(2),
        Self::LosesDma,
        Self::ShortensDma,
        Self::StraysDma,
        Self::RefusesSetUp,
    ];

    fn happens_in(self) -> Place {
        match self {
            Self::ReadsOnes | Self::ReadsStale | Self::ReadsInverted(_) => Place::Read,
            Self::LosesWrite => Place::Write,
            Self::LosesInterrupt | Self::RepeatsInterrupt(_) => Place::Interrupt,
            Self::LosesDma | Self::ShortensDma | Self::StraysDma => Place::Dma,
            Self::RefusesSetUp => Place::SetUp,
        }
    }
}

/// Where nothing can be mapped: the last page of addresses.
const NOWHERE: u64 = !0xfff;

#[derive(Clone, Copy)]
enum Place {
    Read,
    Write,
    Interrupt,
    Dma,
    SetUp,
}

/// The faults of one function that are still to happen.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// For each [`Place`], the next fault and how often it is to happen.
    next: [Option<(Fault, u32)>; 5],
    happened: u64,
    /// What the last read of a BAR gave.
    last_read: u64,
}

impl Faults {
    /// Replaces what was to happen in the same place.
    pub(crate) fn plan(&mut self, fault: Fault, times: u32) {
        self.next[fault.happens_in() as usize] = (times > 0).then_some((fault, times));
    }

    pub(crate) fn forget(&mut self) {
        self.next = Default::default();
    }

    /// How many have happened.
    pub(crate) fn happened(&self) -> u64 {
        self.happened
    }

    fn take(&mut self, place: Place) -> Option<Fault> {
        let next = &mut self.next[place as usize];
        let (fault, times) = (*next)?;
        *next = (times > 1).then_some((fault, times - 1));
        self.happened += 1;
        Some(fault)
    }

    /// Changes what a read has given.
    pub(crate) fn change_read(&mut self, data: &mut [u8]) {
        let before = self.last_read.to_le_bytes();
        match self.take(Place::Read) {
            Some(Fault::ReadsOnes) => data.fill(0xff),
            Some(Fault::ReadsStale) => {
                data.iter_mut().zip(before).for_each(|(byte, before)| *byte = before);
            }
            Some(Fault::ReadsInverted(bit)) => {
                let bit = usize::from(bit) % (8 * data.len().max(1));
                if let Some(byte) = data.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            _ => {}
        }
        let mut last = [0; 8];
        last.iter_mut().zip(&*data).for_each(|(last, byte)| *last = *byte);
        self.last_read = u64::from_le_bytes(last);
    }

    pub(crate) fn loses_write(&mut self) -> bool {
        self.take(Place::Write).is_some()
    }

    pub(crate) fn refuses_set_up(&mut self) -> bool {
        self.take(Place::SetUp).is_some()
    }

    /// How often an interrupt is sent.
    pub(crate) fn interrupts(&mut self) -> u8 {
        match self.take(Place::Interrupt) {
            None => 1,
            Some(Fault::RepeatsInterrupt(times)) => times,
            Some(_) => 0,
        }
    }

    /// Where a transfer goes, and how many of its bytes.
    pub(crate) fn transfer(&mut self, iova: u64, len: usize) -> (u64, usize) {
        match self.take(Place::Dma) {
            None => (iova, len),
            Some(Fault::StraysDma) => (NOWHERE, len.min(0x1000)),
            Some(Fault::ShortensDma) => (iova, len / 2),
            Some(_) => (iova, 0),
        }
    }
}
