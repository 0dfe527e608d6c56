//! Which addresses of a device are in use.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Bytes of the smallest piece that can be mapped.
pub const PAGE: u64 = 4096;

/// Hands out I/O virtual addresses for one device.
///
/// Invariant: `free` holds disjoint ranges of whole pages, first byte to last byte, that do not
/// touch; `used` holds disjoint ranges of whole pages, first byte to length; together they are the
/// allowed ranges without page 0. Address 0 is never handed out: devices take it for "none".
#[derive(Debug)]
pub struct IovaSpace {
    free: BTreeMap<u64, u64>,
    used: BTreeMap<u64, u64>,
}

/// Why no address can be handed out or taken back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IovaError {
    /// No free range is large enough where the device can reach it.
    #[error(
        "no {len:#x} bytes of I/O address space aligned to {alignment:#x} are free below 2^{bits}, \
         the largest free range there has {largest_free:#x}"
    )]
    Exhausted {
        /// Bytes asked for.
        len: u64,
        /// Address bits the device has.
        bits: u8,
        /// Alignment asked for, in bytes.
        alignment: u64,
        /// Bytes of the largest range that is free below 2^`bits`.
        largest_free: u64,
    },
    /// A length of zero, or an alignment that is no power of two.
    #[error("{len:#x} bytes of I/O address space aligned to {alignment:#x} cannot be asked for")]
    Request {
        /// Bytes asked for.
        len: u64,
        /// Alignment asked for, in bytes.
        alignment: u64,
    },
    /// Nothing that was handed out starts there.
    #[error("no I/O address range in use starts at {iova:#x}")]
    NotInUse {
        /// The address given.
        iova: u64,
    },
}

impl IovaSpace {
    /// All of `ranges`, whole pages only, apart from page 0. The ranges may touch or overlap.
    pub fn new(ranges: &[RangeInclusive<u64>]) -> Self {
        let mut sorted: Vec<_> = ranges.to_vec();
        sorted.sort_by_key(|range| *range.start());
        let mut free: BTreeMap<u64, u64> = BTreeMap::new();
        for range in sorted {
            let Some(first) = (*range.start()).max(PAGE).checked_next_multiple_of(PAGE) else {
                continue;
            };
            // The last byte of the last whole page.
            let Some(last) = round_down_last(*range.end()) else { continue };
            if first > last {
                continue;
            }
            match free.last_entry() {
                Some(mut before) if first <= before.get().saturating_add(1) => {
                    *before.get_mut() = last.max(*before.get());
                }
                _ => {
                    free.insert(first, last);
                }
            }
        }
        Self { free, used: BTreeMap::new() }
    }

    /// The lowest address at which `len` bytes are free and lie below 2^`max_address_bits`.
    ///
    /// `len` is rounded up to whole pages, `alignment` (a power of two) up to one page.
    pub fn allocate(
        &mut self,
        len: u64,
        max_address_bits: u8,
        alignment: u64,
    ) -> Result<u64, IovaError> {
        if len == 0 || !alignment.is_power_of_two() {
            return Err(IovaError::Request { len, alignment });
        }
        let limit = last_below(max_address_bits);
        let exhausted = |space: &Self| IovaError::Exhausted {
            len,
            bits: max_address_bits,
            alignment,
            largest_free: space.largest_free(limit),
        };
        let step = alignment.max(PAGE);
        let Some(rounded) = len.checked_next_multiple_of(PAGE) else { return Err(exhausted(self)) };
        let found = self.free.iter().find_map(|(&first, &last)| {
            let iova = first.checked_next_multiple_of(step)?;
            let end = iova.checked_add(rounded - 1)?;
            (end <= last.min(limit)).then_some((first, last, iova, end))
        });
        let Some((first, last, iova, end)) = found else { return Err(exhausted(self)) };
        self.free.remove(&first);
        if first < iova {
            self.free.insert(first, iova - 1);
        }
        if end < last {
            self.free.insert(end + 1, last);
        }
        self.used.insert(iova, rounded);
        Ok(iova)
    }

    /// Takes back what [`allocate`](Self::allocate) handed out at `iova`; returns its length.
    pub fn free(&mut self, iova: u64) -> Result<u64, IovaError> {
        let len = self.used.remove(&iova).ok_or(IovaError::NotInUse { iova })?;
        let (mut first, mut last) = (iova, iova + (len - 1));
        let before = self.free.range(..first).next_back().map(|(&start, &end)| (start, end));
        if let Some((start, end)) = before
            && end + 1 == first
        {
            self.free.remove(&start);
            first = start;
        }
        if let Some(next) = last.checked_add(1)
            && let Some(end) = self.free.remove(&next)
        {
            last = end;
        }
        self.free.insert(first, last);
        Ok(len)
    }

    fn largest_free(&self, limit: u64) -> u64 {
        let sizes = self.free.iter().filter(|(first, _)| **first <= limit);
        sizes.map(|(&first, &last)| (last.min(limit) - first).saturating_add(1)).max().unwrap_or(0)
    }
}

/// The last address that `bits` bits can express.
fn last_below(bits: u8) -> u64 {
    1_u64.checked_shl(bits.into()).map_or(u64::MAX, |limit| limit - 1)
}

/// The last byte of the last page that ends at or before `end`.
fn round_down_last(end: u64) -> Option<u64> {
    match end.checked_add(1) {
        Some(past) => (past / PAGE * PAGE).checked_sub(1),
        None => Some(u64::MAX),
    }
}

// Not under loom, as Cargo.toml says.
#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The ranges QEMU's intel-iommu leaves around the interrupt window.
    fn intel() -> IovaSpace {
        IovaSpace::new(&[0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff])
    }

    #[test]
    fn address_zero_is_never_handed_out() {
        assert_eq!(intel().allocate(1, 64, 1), Ok(PAGE));
    }

    #[test]
    fn the_lowest_free_address_is_handed_out_again() {
        let mut space = intel();
        let first = space.allocate(PAGE, 64, 1).unwrap();
        let second = space.allocate(PAGE, 64, 1).unwrap();
        space.free(first).unwrap();
        assert_eq!(second, 2 * PAGE);
        assert_eq!(space.allocate(PAGE, 64, 1), Ok(first));
    }

    #[test]
    fn a_range_does_not_cross_the_interrupt_window() {
        let mut space = intel();
        assert_eq!(space.allocate(0x1_0000_0000, 64, 1), Ok(0xfef0_0000));
    }

    #[test]
    fn a_device_of_28_bits_gets_nothing_above_them() {
        let mut space = intel();
        space.allocate((1 << 28) - 2 * PAGE, 28, 1).unwrap();
        let err = space.allocate(2 * PAGE, 28, 1).unwrap_err();
        assert_eq!(
            err,
            IovaError::Exhausted { len: 2 * PAGE, bits: 28, alignment: 1, largest_free: PAGE }
        );
        assert_eq!(space.allocate(PAGE, 28, 1), Ok((1 << 28) - PAGE));
        assert_eq!(space.allocate(2 * PAGE, 29, 1), Ok(1 << 28));
    }

    #[test]
    fn an_alignment_is_kept_and_what_it_skips_stays_free() {
        let mut space = intel();
        assert_eq!(space.allocate(PAGE, 64, 1 << 21), Ok(1 << 21));
        assert_eq!(space.allocate(PAGE, 64, 1), Ok(PAGE));
    }

    #[test]
    fn a_part_of_a_page_is_not_handed_out() {
        let mut space = IovaSpace::new(&[0x1001..=0x3ffe]);
        assert_eq!(space.allocate(1, 64, 1), Ok(0x2000));
        assert!(space.allocate(1, 64, 1).is_err());
    }

    #[test]
    fn the_top_of_the_address_space_can_be_used() {
        let top = u64::MAX - (PAGE - 1);
        let mut space = IovaSpace::new(&[top..=u64::MAX]);
        assert_eq!(space.allocate(PAGE, 64, 1), Ok(top));
        assert_eq!(space.free(top), Ok(PAGE));
        assert_eq!(space.allocate(PAGE, 64, 1), Ok(top));
    }

    #[test]
    fn what_is_not_in_use_cannot_be_freed() {
        let mut space = intel();
        let iova = space.allocate(PAGE, 64, 1).unwrap();
        space.free(iova).unwrap();
        assert_eq!(space.free(iova), Err(IovaError::NotInUse { iova }));
    }

    #[test]
    fn a_request_that_makes_no_sense_is_refused() {
        let mut space = intel();
        assert!(matches!(space.allocate(0, 64, 1), Err(IovaError::Request { .. })));
        assert!(matches!(space.allocate(1, 64, 3), Err(IovaError::Request { .. })));
        assert!(matches!(space.allocate(u64::MAX, 64, 1), Err(IovaError::Exhausted { .. })));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate { len: u64, bits: u8, alignment: u64 },
        Free(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let allocate = (1_u64..0x8000, 14_u8..22, 0_u32..16)
            .prop_map(|(len, bits, shift)| Step::Allocate { len, bits, alignment: 1 << shift });
        let step = prop_oneof![3 => allocate, 2 => any::<usize>().prop_map(Step::Free)];
        proptest::collection::vec(step, 1..80)
    }

    fn ranges() -> impl Strategy<Value = Vec<RangeInclusive<u64>>> {
        let range =
            (0_u64..0x20_0000, 0_u64..0x8_0000).prop_map(|(start, len)| start..=start + len);
        proptest::collection::vec(range, 1..5)
    }

    proptest! {
        #[test]
        fn addresses_in_use_are_allowed_reachable_and_disjoint_and_freeing_all_restores_all(
            ranges in ranges(),
            steps in steps(),
        ) {
            let mut space = IovaSpace::new(&ranges);
            let initially_free = space.free.clone();
            let mut live: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Allocate { len, bits, alignment } => {
                        let Ok(iova) = space.allocate(len, bits, alignment) else { continue };
                        let end = iova + (len - 1);
                        prop_assert!(iova != 0 && iova % PAGE == 0 && iova % alignment == 0);
                        prop_assert!(end < 1 << bits);
                        let allowed = |at| ranges.iter().any(|range| range.contains(&at));
                        let is_allowed = (iova..=end).step_by(PAGE as usize).all(allowed);
                        prop_assert!(is_allowed && allowed(end));
                        let is_apart = live.iter().all(|&(a, b)| end < a || b < iova);
                        prop_assert!(is_apart);
                        live.push((iova, end));
                    }
                    Step::Free(pick) if !live.is_empty() => {
                        let (iova, _) = live.swap_remove(pick % live.len());
                        prop_assert!(space.free(iova).is_ok());
                    }
                    Step::Free(_) => {}
                }
            }
            for (iova, _) in live {
                prop_assert!(space.free(iova).is_ok());
            }
            prop_assert_eq!(space.free, initially_free);
        }
    }
}
