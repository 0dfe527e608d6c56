//! What a register is: an offset, a type and an access right, all known to the compiler.

use std::fmt;
use std::marker::PhantomData;

/// One register of the map `M`, holding a `T`, reached as `A` allows.
///
/// Made by [`register_map!`](crate::register_map) alone, which has checked that it lies inside
/// the map, is naturally aligned and shares its offset with no other register.
pub struct Register<M, T, A> {
    offset: u64,
    kind: PhantomData<(M, T, A)>,
}

/// Registers of one kind at equal distances, as [`register_map!`](crate::register_map) declares
/// with `NAME[count; stride]`.
pub struct RegisterArray<M, T, A> {
    offset: u64,
    count: u64,
    stride: u64,
    kind: PhantomData<(M, T, A)>,
}

/// The marker type of a register map.
pub trait RegisterMap {
    /// Bytes from the first register to the end of the last one.
    const SIZE: u64;
}

/// Something registers can be reached in: a mapping, or a device that has to be called.
pub trait RegisterSpace {
    /// Why an access did not happen.
    type Error;

    /// One read of `W`'s own width.
    fn load<W: Width>(&self, offset: u64) -> Result<W, Self::Error>;

    /// One write of `W`'s own width.
    fn store<W: Width>(&self, offset: u64, value: W) -> Result<(), Self::Error>;
}

/// A value that a register can hold: an unsigned integer, or a
/// [`register_bits!`](crate::register_bits) type over one.
pub trait RegisterValue: Copy {
    /// The integer that goes over the bus.
    type Bits: Width;

    /// The value that these bits mean; every pattern means one.
    fn from_register(bits: Self::Bits) -> Self;

    /// The bits that stand for the value.
    fn to_register(self) -> Self::Bits;
}

/// An unsigned integer a device can be asked for in one access.
pub trait Width: Copy + fmt::Debug + Send + Sync + private::Sealed + 'static {
    /// The value in the widest type, for a call that serves every width.
    fn to_u64(self) -> u64;

    /// The value's low bits, as many as this type has.
    fn from_u64(value: u64) -> Self;
}

/// An access right that includes reading.
#[diagnostic::on_unimplemented(
    message = "this register cannot be read",
    label = "its map declares it write-only (`Wo`)"
)]
pub trait Readable: private::Sealed {}

/// An access right that includes writing.
#[diagnostic::on_unimplemented(
    message = "this register cannot be written",
    label = "its map declares it read-only (`Ro`)"
)]
pub trait Writable: private::Sealed {}

/// The register can be read only.
#[derive(Debug)]
pub enum Ro {}

/// The register can be written only.
#[derive(Debug)]
pub enum Wo {}

/// The register can be read and written.
#[derive(Debug)]
pub enum Rw {}

/// An access that does not fit into its region, or has no natural alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{width} bytes at offset {offset:#x} of a region of {size:#x} bytes")]
pub struct OutOfRegion {
    /// First byte of the access.
    pub offset: u64,
    /// Bytes of the access.
    pub width: usize,
    /// Bytes of the region.
    pub size: u64,
}

impl<M, T: RegisterValue, A> Register<M, T, A> {
    /// Bytes of one access.
    pub const WIDTH: usize = size_of::<T::Bits>();

    /// Bytes from the start of the region.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Reads the register, in one access.
    pub fn read<S: RegisterSpace>(self, space: &S) -> Result<T, S::Error>
    where
        A: Readable,
    {
        space.load(self.offset).map(T::from_register)
    }

    /// Writes the register, in one access.
    pub fn write<S: RegisterSpace>(self, space: &S, value: T) -> Result<(), S::Error>
    where
        A: Writable,
    {
        space.store(self.offset, value.to_register())
    }
}

impl<M, T: RegisterValue, A> RegisterArray<M, T, A> {
    /// How many registers there are. Never zero.
    #[expect(clippy::len_without_is_empty, reason = "an array of none does not compile")]
    pub const fn len(self) -> u64 {
        self.count
    }

    /// The register at `index`.
    ///
    /// Panics when `index` is past the end, as a slice does; at compile time in a constant.
    pub const fn at(self, index: u64) -> Register<M, T, A> {
        assert!(index < self.count, "index past the end of a register array");
        register(self.offset + index * self.stride)
    }
}

/// For the expansion of [`register_map!`](crate::register_map), which checks the offset.
#[doc(hidden)]
pub const fn register<M, T, A>(offset: u64) -> Register<M, T, A> {
    Register { offset, kind: PhantomData }
}

/// For the expansion of [`register_map!`](crate::register_map), which checks the range.
#[doc(hidden)]
pub const fn register_array<M, T, A>(
    offset: u64,
    count: u64,
    stride: u64,
) -> RegisterArray<M, T, A> {
    RegisterArray { offset, count, stride, kind: PhantomData }
}

// By hand, because a derive would ask `M`, `T` and `A` for the same.
impl<M, T, A> Clone for Register<M, T, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M, T, A> Copy for Register<M, T, A> {}

impl<M, T, A> fmt::Debug for Register<M, T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Register({:#x})", self.offset)
    }
}

impl<M, T, A> Clone for RegisterArray<M, T, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M, T, A> Copy for RegisterArray<M, T, A> {}

impl<M, T, A> fmt::Debug for RegisterArray<M, T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisterArray({:#x}, {} every {:#x})", self.offset, self.count, self.stride)
    }
}

impl Readable for Ro {}
impl Readable for Rw {}
impl Writable for Wo {}
impl Writable for Rw {}

mod private {
    pub trait Sealed {}
    impl Sealed for super::Ro {}
    impl Sealed for super::Wo {}
    impl Sealed for super::Rw {}
}

macro_rules! widths {
    ($($int:ty)*) => {$(
        impl private::Sealed for $int {}

        impl Width for $int {
            fn to_u64(self) -> u64 {
                self.into()
            }

            fn from_u64(value: u64) -> Self {
                value as $int
            }
        }

        impl RegisterValue for $int {
            type Bits = $int;

            fn from_register(bits: $int) -> Self {
                bits
            }

            fn to_register(self) -> $int {
                self
            }
        }
    )*};
}
widths!(u8 u16 u32 u64);
