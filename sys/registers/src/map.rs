//! `register_map!`: the registers of a region, checked while compiling.

/// Declares the registers of a region.
///
/// Each line is an offset, an access right (`Ro`, `Wo`, `Rw`), a name, and the type it holds;
/// `NAME[count; stride]` declares several at equal distances. The struct is a marker for the map
/// as a whole, and each register becomes a constant beside it, a
/// [`Register`](crate::Register) or [`RegisterArray`](crate::RegisterArray).
///
/// ```
/// iohost_registers::register_map! {
///     /// Registers of a disk controller.
///     pub struct Disk[0x2000] {
///         /// What the controller can do.
///         0x0000 Ro CAPABILITIES:      u64,
///         0x0014 Rw CONFIGURATION:     u32,
///         0x1000 Wo DOORBELLS[128; 4]: u32,
///     }
/// }
/// assert_eq!(CONFIGURATION.offset(), 0x14);
/// assert_eq!(DOORBELLS.at(3).offset(), 0x100c);
/// ```
///
/// A write-only register cannot be read, nor a read-only one written:
///
/// ```compile_fail,E0277
/// # fn f<S: iohost_registers::RegisterSpace>(bar: &S) {
/// iohost_registers::register_map! { struct Map[0x10] { 0x0 Wo ACK: u32 } }
/// let _ = ACK.read(bar);
/// # }
/// ```
/// ```compile_fail,E0277
/// # fn f<S: iohost_registers::RegisterSpace>(bar: &S) {
/// iohost_registers::register_map! { struct Map[0x10] { 0x0 Ro ID: u32 } }
/// let _ = ID.write(bar, 1);
/// # }
/// ```
///
/// Two registers at one offset, a register off its natural alignment, and a register or an array
/// that reaches past the end of the map do not compile:
///
/// ```compile_fail,E0080
/// iohost_registers::register_map! { struct Map[0x10] { 0x4 Ro ID: u32, 0x4 Rw STATUS: u32 } }
/// ```
/// ```compile_fail,E0080
/// iohost_registers::register_map! { struct Map[0x10] { 0x2 Ro ID: u32 } }
/// ```
/// ```compile_fail,E0080
/// iohost_registers::register_map! { struct Map[0x10] { 0x10 Ro ID: u32 } }
/// ```
/// ```compile_fail,E0080
/// iohost_registers::register_map! { struct Map[0x10] { 0x8 Ro SLOTS[3; 4]: u32 } }
/// ```
/// ```compile_fail,E0080
/// iohost_registers::register_map! { struct Map[0x10] { 0x4 Ro SLOTS[2; 8]: u32, 0xc Rw B: u32 } }
/// ```
///
/// Registers may overlap without being equal, because devices have 64-bit registers that can
/// also be reached as two halves.
#[macro_export]
macro_rules! register_map {
    (
        $(#[$attr:meta])*
        $vis:vis struct $map:ident[$size:expr] {
            $(
                $(#[$doc:meta])*
                $offset:literal $access:ident $name:ident $([$count:expr; $stride:expr])? : $type:ty
            ),* $(,)?
        }
    ) => {
        $(#[$attr])*
        #[derive(Clone, Copy, Debug)]
        #[allow(dead_code, unreachable_pub, reason = "a map names what its driver may not use")]
        $vis struct $map;

        impl $crate::RegisterMap for $map {
            const SIZE: u64 = $size;
        }

        $(
            $crate::register_map! {
                @register $(#[$doc])* $vis $map $offset $access $name $([$count; $stride])? : $type
            }
        )*

        const _: () = $crate::expansion::check($size, &[
            $(
                $crate::register_map! { @entry $offset $name $([$count; $stride])? : $type }
            ),*
        ]);
    };

    (@register $(#[$doc:meta])* $vis:vis $map:ident $offset:literal $access:ident $name:ident
        : $type:ty) => {
        #[doc = concat!("The register at `", stringify!($offset), "`.\n\n")]
        $(#[$doc])*
        #[allow(dead_code, unreachable_pub, reason = "a map names what its driver may not use")]
        $vis const $name: $crate::Register<$map, $type, $crate::$access> =
            $crate::expansion::register($offset);
    };

    (@register $(#[$doc:meta])* $vis:vis $map:ident $offset:literal $access:ident $name:ident
        [$count:expr; $stride:expr] : $type:ty) => {
        #[doc = concat!("The registers from `", stringify!($offset), "`.\n\n")]
        $(#[$doc])*
        #[allow(dead_code, unreachable_pub, reason = "a map names what its driver may not use")]
        $vis const $name: $crate::RegisterArray<$map, $type, $crate::$access> =
            $crate::expansion::register_array($offset, $count, $stride);
    };

    (@entry $offset:literal $name:ident : $type:ty) => {
        $crate::register_map! { @entry $offset $name [1; 0] : $type }
    };

    (@entry $offset:literal $name:ident [$count:expr; $stride:expr] : $type:ty) => {
        $crate::expansion::Entry {
            offset: $offset,
            width: ::core::mem::size_of::<<$type as $crate::RegisterValue>::Bits>() as u64,
            count: $count,
            stride: $stride,
            misaligned: concat!(stringify!($name), " is off its natural alignment"),
            outside: concat!(stringify!($name), " lies outside its map"),
            taken: concat!(stringify!($name), " has the offset of a register above it"),
        }
    };
}

/// One line of a map, as [`check`] sees it.
#[doc(hidden)]
#[derive(Debug)]
pub struct Entry {
    pub offset: u64,
    pub width: u64,
    pub count: u64,
    pub stride: u64,
    /// What to say when something is wrong with it: a constant cannot put a text together.
    pub misaligned: &'static str,
    pub outside: &'static str,
    pub taken: &'static str,
}

/// Refuses a map that no device can have. A panic here is an error of the compiler there.
#[doc(hidden)]
pub const fn check(size: u64, entries: &[Entry]) {
    let mut i = 0;
    while i < entries.len() {
        let entry = &entries[i];
        assert!(
            entry.offset.is_multiple_of(entry.width) && entry.stride.is_multiple_of(entry.width),
            "{}",
            entry.misaligned
        );
        assert!(is_inside(entry, size), "{}", entry.outside);
        let mut j = 0;
        while j < i {
            assert!(!share_an_offset(entry, &entries[j]), "{}", entry.taken);
            j += 1;
        }
        i += 1;
    }
}

/// Whether the entry names at least one register, and the last one ends inside the map.
const fn is_inside(entry: &Entry, size: u64) -> bool {
    let Some(steps) = entry.count.checked_sub(1) else { return false };
    let Some(distance) = steps.checked_mul(entry.stride) else { return false };
    let Some(last) = entry.offset.checked_add(distance) else { return false };
    let Some(end) = last.checked_add(entry.width) else { return false };
    // An array that does not advance names one register several times.
    end <= size && (steps == 0 || entry.stride > 0)
}

/// Whether some register of one entry starts where some register of the other does.
const fn share_an_offset(a: &Entry, b: &Entry) -> bool {
    let mut i = 0;
    while i < a.count {
        let at = a.offset + i * a.stride;
        if at >= b.offset {
            let distance = at - b.offset;
            if distance == 0
                || (b.stride > 0
                    && distance.is_multiple_of(b.stride)
                    && distance / b.stride < b.count)
            {
                return true;
            }
        }
        i += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::{Entry, is_inside, share_an_offset};

    fn entry(offset: u64, count: u64, stride: u64) -> Entry {
        Entry { offset, width: 4, count, stride, misaligned: "", outside: "", taken: "" }
    }

    #[test]
    fn interleaved_arrays_share_no_offset() {
        assert!(!share_an_offset(&entry(0x1000, 64, 8), &entry(0x1004, 64, 8)));
    }

    #[test]
    fn an_array_that_runs_into_a_register_shares_its_offset_in_either_order() {
        let (array, register) = (entry(0x10, 8, 4), entry(0x1c, 1, 0));
        assert!(share_an_offset(&array, &register));
        assert!(share_an_offset(&register, &array));
    }

    #[test]
    fn an_entry_is_inside_only_with_all_of_its_last_register() {
        assert!(is_inside(&entry(0x1000, 4, 8), 0x101c));
        assert!(!is_inside(&entry(0x1000, 4, 8), 0x101b));
        assert!(!is_inside(&entry(0x1000, 0, 8), 0x2000));
        assert!(!is_inside(&entry(0x1000, 2, 0), 0x2000));
        assert!(!is_inside(&entry(8, u64::MAX, 8), u64::MAX));
    }
}
