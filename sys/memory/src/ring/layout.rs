//! Where entries go, as arithmetic on offsets. No memory is touched here.
//!
//! Source: the byte layout and the rules of DriverKit's `IODataQueueDispatchSource` (xnu,
//! `IODataQueueDispatchSourceShared.h`), made stricter where a peer is not to be trusted.
//!
//! All offsets count bytes from the start of the ring. An offset in use is a multiple of
//! [`ALIGNMENT`] in `0..=capacity`; the capacity itself is legal, and is where an entry that ends
//! exactly at the end of the ring leaves an index. Equal indices always mean an empty ring.

/// Bytes before the ring: the indices, the flag, and zeros.
pub const MEMORY_HEADER_SIZE: usize = 128;
/// Where the consumer publishes its index, a native-endian `u32`.
pub const HEAD_OFFSET: usize = 0;
/// Where the producer publishes its index, a native-endian `u32`.
pub const TAIL_OFFSET: usize = 4;
/// Where the producer asks for a DataServiced notification, one byte.
pub const NEED_SERVICED_OFFSET: usize = 8;
/// Where the consumer says that it will look at the ring again without being told, one byte.
pub const CONSUMER_AWAKE_OFFSET: usize = 9;
/// Where the producer says that it will look at the ring again without being told, one byte.
pub const PRODUCER_AWAKE_OFFSET: usize = 10;
/// Where the consumer keeps its index up to date entry by entry, a native-endian `u32`: the index
/// and [`KEPT`], or 0 if it does not.
pub const READ_TO_OFFSET: usize = 64;
/// Where the producer repeats its request for a DataServiced, one byte.
pub const ROOM_WANTED_OFFSET: usize = 68;
/// What tells an index at [`READ_TO_OFFSET`] from a word that nobody has written.
pub const KEPT: u32 = 1;
/// Bytes before the payload of an entry: its unpadded size, a native-endian `u32`.
pub const ENTRY_HEADER_SIZE: u32 = 4;
/// Entries start at multiples of this.
pub const ALIGNMENT: u32 = 4;
/// The largest queue byte count; one more, and a sum with the memory header would not be a `u32`.
pub const MAX_QUEUE_BYTE_COUNT: u32 = u32::MAX - MEMORY_HEADER_SIZE as u32;

/// Bytes that an entry with `size` bytes of payload takes in the ring: the size field, the
/// payload, and padding to a multiple of four. `None` if that is not a `u32`.
///
/// A ring of at least twice the largest footprint takes an entry whenever it is empty, wherever
/// its indices stand. A smaller one may refuse, because an entry is never split.
#[inline]
pub const fn footprint(size: u32) -> Option<u32> {
    match size.checked_next_multiple_of(ALIGNMENT) {
        Some(padded) => padded.checked_add(ENTRY_HEADER_SIZE),
        None => None,
    }
}

/// Where the producer puts an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Offset of the entry's size field.
    pub(super) at: u32,
    /// The tail that publishes it.
    pub(super) next: u32,
    /// Where to leave a size that does not fit, to send the consumer back to offset 0.
    pub(super) marker: Option<u32>,
}

/// Finds room for an entry of `footprint` bytes, or `None` if the ring is too full for it.
///
/// An older `head` never yields another place than the newest one, only `None` more often: the
/// consumer's progress frees room, and the rules take the first of: at the tail, at offset 0.
#[inline]
pub(super) fn place(capacity: u32, head: u32, tail: u32, footprint: u32) -> Option<Place> {
    // Strictly less than the room up to the head, or the indices would meet and mean "empty".
    if tail < head {
        let fits = head - tail > footprint;
        return fits.then(|| Place { at: tail, next: tail + footprint, marker: None });
    }
    if capacity - tail >= footprint {
        return Some(Place { at: tail, next: tail + footprint, marker: None });
    }
    let room_for_marker = capacity - tail >= ENTRY_HEADER_SIZE;
    let fits = head > footprint;
    fits.then(|| Place { at: 0, next: footprint, marker: room_for_marker.then_some(tail) })
}

/// Whether `count` entries of `footprint` bytes each surely fit. A "no" can be wrong by one entry
/// when the last of them would have to wrap; a "yes" is never wrong.
pub(super) fn surely_fit(capacity: u32, head: u32, tail: u32, footprint: u32, count: u32) -> bool {
    if tail < head {
        return (head - tail - 1) / footprint >= count;
    }
    let at_the_end = (capacity - tail) / footprint;
    let at_the_start = head / footprint;
    at_the_end >= count || u64::from(at_the_end) + u64::from(at_the_start) > u64::from(count)
}

/// The entry that the consumer takes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Offset of the payload.
    pub(super) payload: u32,
    /// Bytes of payload, unpadded.
    pub(super) size: u32,
    /// The head that releases it.
    pub(super) next: u32,
}

/// An entry that no producer of ours can have published: its size, and where it was claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Impossible {
    pub(super) at: u32,
    pub(super) size: u32,
}

/// Finds the entry at `head` in a ring that is not empty.
///
/// `size_at` fetches the size field at an offset. It is asked for fields inside the ring only, and
/// at most once for each of the two places where the entry can be: what it answers is the peer's
/// word, judged here and never fetched again.
///
/// Expects two different offsets, aligned and at most `capacity`.
#[inline]
pub(super) fn find(
    capacity: u32,
    head: u32,
    tail: u32,
    size_at: impl Fn(u32) -> u32,
) -> Result<Found, Impossible> {
    let wraps = tail < head;
    let mut claim = Impossible { at: head, size: 0 };

    // The head can stand at the very end, where there is no field to read: test first.
    if capacity - head >= ENTRY_HEADER_SIZE {
        let size = size_at(head);
        claim.size = size;
        let Some(footprint) = footprint(size) else { return Err(claim) };
        if footprint <= capacity - head {
            let next = head + footprint;
            // Where the indices have wrapped, entries run up to the end, else up to the tail.
            let inside = wraps || next <= tail;
            return if inside { Ok(found(head, size, next)) } else { Err(claim) };
        }
    }

    // Too little room here for what the field says: the producer went back to the start. But only
    // if its index says so too.
    if !wraps {
        return Err(claim);
    }
    // A tail of 0 leaves no entry at the start. (Nor is 0 ever published by a producer of ours.)
    if tail < ENTRY_HEADER_SIZE {
        return Err(claim);
    }
    let size = size_at(0);
    match footprint(size) {
        Some(next) if next <= tail => Ok(found(0, size, next)),
        _ => Err(Impossible { at: 0, size }),
    }
}

fn found(at: u32, size: u32, next: u32) -> Found {
    Found { payload: at + ENTRY_HEADER_SIZE, size, next }
}

/// Whether the consumer can have moved its head from `from` to `to` while the tail stood at
/// `tail`: only forward, and not past it.
#[inline]
pub(super) fn can_advance(from: u32, to: u32, tail: u32) -> bool {
    if from <= tail { (from..=tail).contains(&to) } else { to >= from || to <= tail }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_entry_takes_four_bytes_more_than_its_padded_payload() {
        let footprints = [0, 1, 4, 5].map(footprint);
        assert_eq!(footprints, [Some(4), Some(8), Some(8), Some(12)]);
    }

    #[test]
    fn a_payload_whose_padding_overflows_has_no_footprint() {
        assert_eq!(footprint(u32::MAX), None, "rounding up overflows");
        assert_eq!(footprint(u32::MAX - 3), None, "adding the header overflows");
        assert_eq!(footprint(u32::MAX - 7), Some(u32::MAX - 3));
    }

    #[test]
    fn an_entry_may_end_exactly_at_the_end_of_the_ring() {
        assert_eq!(place(32, 16, 16, 16), Some(Place { at: 16, next: 32, marker: None }));
    }

    #[test]
    fn an_entry_that_wraps_leaves_a_marker_where_one_fits() {
        assert_eq!(place(32, 16, 28, 8), Some(Place { at: 0, next: 8, marker: Some(28) }));
        assert_eq!(place(32, 16, 32, 8), Some(Place { at: 0, next: 8, marker: None }));
    }

    #[test]
    fn the_tail_never_catches_up_with_the_head_from_behind() {
        assert_eq!(place(32, 16, 8, 8), None);
        assert_eq!(place(32, 8, 32, 8), None);
    }

    #[test]
    fn an_empty_ring_takes_an_entry_everywhere_if_it_is_twice_as_large_and_only_then() {
        for footprint in (4..=64).step_by(4) {
            for capacity in (4..=128).step_by(4) {
                let everywhere = (0..=capacity)
                    .step_by(4)
                    .all(|index| place(capacity, index, index, footprint).is_some());
                assert_eq!(everywhere, 2 * footprint <= capacity, "{footprint} in {capacity}");
            }
        }
    }

    #[test]
    fn an_older_head_never_changes_the_place() {
        let indices = || (0..=48_u32).step_by(4);
        for tail in indices() {
            for old in indices() {
                for new in indices().filter(|&new| can_advance(old, new, tail)) {
                    for footprint in (4..=48).step_by(4) {
                        let known = place(48, old, tail, footprint);
                        let fresh = place(48, new, tail, footprint);
                        assert!(
                            known.is_none() || known == fresh,
                            "tail {tail}, head {old} then {new}, {footprint} bytes"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn room_promised_for_several_entries_is_there() {
        let indices = || (0..=48_u32).step_by(4);
        for (head, tail) in indices().flat_map(|head| indices().map(move |tail| (head, tail))) {
            for (footprint, count) in [(4, 3), (8, 2), (8, 5), (12, 2), (20, 2), (48, 1)] {
                let mut at = tail;
                let all_fit = (0..count).all(|_| match place(48, head, at, footprint) {
                    Some(place) => {
                        at = place.next;
                        true
                    }
                    None => false,
                });
                let promised = surely_fit(48, head, tail, footprint, count);
                assert!(all_fit || !promised, "{count} of {footprint} at {head}..{tail}");
            }
        }
    }

    #[test]
    fn a_head_at_the_end_of_the_ring_reads_no_size_there() {
        let found = find(32, 32, 8, |at| if at == 0 { 4 } else { panic!("read at {at}") });
        assert_eq!(found, Ok(Found { payload: 4, size: 4, next: 8 }));
    }

    #[test]
    fn an_entry_that_runs_past_the_tail_is_impossible() {
        assert_eq!(find(32, 0, 8, |_| 8), Err(Impossible { at: 0, size: 8 }));
        assert_eq!(find(32, 24, 8, |at| if at == 0 { 5 } else { 100 }), {
            Err(Impossible { at: 0, size: 5 })
        });
    }

    #[test]
    fn a_marker_is_impossible_while_the_tail_is_ahead() {
        assert_eq!(find(32, 8, 16, |_| 40), Err(Impossible { at: 8, size: 40 }));
    }

    #[test]
    fn no_size_leads_outside_the_ring() {
        let indices = || (0..=32_u32).step_by(4);
        let sizes = || (0..=40).chain([u32::MAX, u32::MAX - 3, u32::MAX - 7, 1 << 31]);
        for (head, tail) in indices().flat_map(|head| indices().map(move |tail| (head, tail))) {
            for (here, start) in sizes().flat_map(|here| sizes().map(move |start| (here, start))) {
                if head == tail {
                    continue;
                }
                let size_at = |at| {
                    assert!(at <= 28, "a size field ends inside the ring");
                    if at == head { here } else { start }
                };
                if let Ok(found) = find(32, head, tail, size_at) {
                    assert!(found.payload + found.size <= found.next);
                    assert!(found.next <= 32);
                    assert!(can_advance(head, found.next, tail), "{head} {tail} {found:?}");
                }
            }
        }
    }
}
