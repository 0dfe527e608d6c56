//! `register_bits!`: the bits of a register, by name.

/// Declares a type for what a register holds.
///
/// `const NAME = value;` names a bit or several; `fn name = low..=high;` names a field, which
/// gets a getter `name()` and a setter `with_name(value)`. Bits that nothing names are kept as
/// they are read.
///
/// ```
/// iohost_registers::register_bits! {
///     /// Identification: version, then signature.
///     pub struct Id: u32 {
///         fn major = 24..=31;
///         fn minor = 16..=23;
///         const EMULATED = 0x01;
///         const SECURE = 0x02;
///     }
/// }
/// let id = Id::from_bits(0x0102_0001);
/// assert_eq!((id.major(), id.minor()), (1, 2));
/// assert!(id.contains(Id::EMULATED));
/// assert!(!id.contains(Id::EMULATED | Id::SECURE));
/// assert_eq!(id.with_minor(7).bits(), 0x0107_0001);
/// assert_eq!(id.without(Id::EMULATED).bits(), 0x0102_0000);
/// assert_eq!(format!("{id:?}"), "Id(0x1020001, major=0x1, minor=0x2, EMULATED)");
/// ```
///
/// A field or a constant that does not fit into the integer does not compile:
///
/// ```compile_fail,E0080
/// iohost_registers::register_bits! { struct Wide: u16 { fn high = 8..=16; } }
/// ```
/// ```compile_fail
/// iohost_registers::register_bits! { struct Wide: u8 { const HIGH = 0x100; } }
/// ```
#[macro_export]
macro_rules! register_bits {
    (
        $(#[$attr:meta])*
        $vis:vis struct $name:ident: $int:ident {
            $(
                $(#[$doc:meta])*
                $kind:ident $item:ident = $value:expr;
            )*
        }
    ) => {
        $(#[$attr])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(transparent)]
        #[allow(unreachable_pub, reason = "as visible as its driver makes it")]
        $vis struct $name($int);

        #[allow(dead_code, unreachable_pub, reason = "names what its driver may not use")]
        impl $name {
            $(
                $crate::register_bits! { @item $(#[$doc])* $vis $int $kind $item = $value }
            )*

            /// No bit set.
            $vis const fn empty() -> Self {
                Self(0)
            }

            /// The bits as they are on the bus.
            $vis const fn bits(self) -> $int {
                self.0
            }

            /// What these bits mean; no bit is lost.
            $vis const fn from_bits(bits: $int) -> Self {
                Self(bits)
            }

            /// Whether every bit of `other` is set here.
            $vis const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The same with every bit of `other` cleared.
            $vis const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl ::core::ops::BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl ::core::ops::BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl ::core::fmt::Debug for $name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                ::core::write!(f, "{}({:#x}", ::core::stringify!($name), self.0)?;
                $(
                    $crate::register_bits! { @show self f $kind $item }
                )*
                ::core::write!(f, ")")
            }
        }

        impl $crate::RegisterValue for $name {
            type Bits = $int;

            fn from_register(bits: $int) -> Self {
                Self(bits)
            }

            fn to_register(self) -> $int {
                self.0
            }
        }
    };

    (@item $(#[$doc:meta])* $vis:vis $int:ident const $item:ident = $value:expr) => {
        #[doc = concat!("`", stringify!($value), "`.\n\n")]
        $(#[$doc])*
        $vis const $item: Self = Self($value);
    };

    (@item $(#[$doc:meta])* $vis:vis $int:ident fn $item:ident = $value:expr) => {
        $crate::expansion::paste! {
            #[doc(hidden)]
            const [<$item:upper _FIELD>]: (u32, $int) = {
                let range: ::core::ops::RangeInclusive<u32> = $value;
                let (low, high) = (*range.start(), *range.end());
                assert!(low <= high && high < $int::BITS, "a field outside its register");
                (low, $int::MAX >> ($int::BITS - 1 - (high - low)))
            };

            #[doc = concat!("Bits `", stringify!($value), "`.\n\n")]
            $(#[$doc])*
            $vis const fn $item(self) -> $int {
                let (shift, mask) = Self::[<$item:upper _FIELD>];
                self.0 >> shift & mask
            }

            #[doc = concat!("The same with `", stringify!($item), "` replaced. ")]
            #[doc = "Panics when the value does not fit; at compile time in a constant."]
            #[must_use]
            $vis const fn [<with_ $item>](self, value: $int) -> Self {
                let (shift, mask) = Self::[<$item:upper _FIELD>];
                assert!(value <= mask, "a value too large for its field");
                Self(self.0 & !(mask << shift) | value << shift)
            }
        }
    };

    (@show $self:ident $f:ident const $item:ident) => {
        if $self.contains(Self::$item) {
            ::core::write!($f, ", {}", ::core::stringify!($item))?;
        }
    };

    (@show $self:ident $f:ident fn $item:ident) => {
        ::core::write!($f, ", {}={:#x}", ::core::stringify!($item), $self.$item())?;
    };
}

#[cfg(test)]
mod tests {
    register_bits! {
        struct Wide: u64 {
            fn whole = 0..=63;
            fn top = 63..=63;
        }
    }

    register_bits! {
        struct Narrow: u8 {
            fn low = 0..=3;
            const BOTH = 0x30;
        }
    }

    #[test]
    fn a_field_may_be_as_wide_as_its_register_or_one_bit() {
        let wide = Wide::empty().with_whole(u64::MAX);
        assert_eq!(wide.bits(), u64::MAX);
        assert_eq!(wide.top(), 1);
        assert_eq!(wide.with_top(0).bits(), u64::MAX >> 1);
    }

    #[test]
    fn a_name_for_several_bits_is_contained_only_when_all_are_set() {
        assert!(!Narrow::from_bits(0x10).contains(Narrow::BOTH));
        assert!(Narrow::from_bits(0x35).contains(Narrow::BOTH));
    }

    #[test]
    #[should_panic(expected = "too large for its field")]
    fn a_value_that_does_not_fit_its_field_panics() {
        let _ = Narrow::empty().with_low(16);
    }
}
