//! The arguments of a call, in the form of `IOUserClientMethodArguments`: up to sixteen integers
//! and one run of bytes, each way.

use std::sync::Arc;

use crate::{ActionTarget, IOReturn, PassedAction};

/// What travels with a call or with its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// Integers; at most [`Arguments::MOST_SCALARS`].
    pub scalars: Vec<u64>,
    /// Bytes; at most [`Arguments::LONGEST_STRUCTURE`].
    pub structure: Vec<u8>,
    /// Actions: which scalars stand for one, in ascending order.
    pub actions: Vec<PassedAction>,
}

impl Arguments {
    /// The most integers of one call.
    pub const MOST_SCALARS: usize = 16;
    /// The most bytes of one call; more goes through a data queue, or as memory that the client
    /// offers.
    pub const LONGEST_STRUCTURE: usize = 4096;

    /// Whether both parts are within their limits.
    pub fn check(&self) -> Result<(), IOReturn> {
        if self.scalars.len() > Self::MOST_SCALARS {
            return Err(IOReturn::BAD_ARGUMENT);
        }
        if self.structure.len() > Self::LONGEST_STRUCTURE {
            return Err(IOReturn::MESSAGE_TOO_LARGE);
        }
        Ok(())
    }
}

/// A value that a method can take or give: an integer is a scalar, bytes and text are the
/// structure (one of them per direction).
pub trait Argument: Sized {
    /// How a [`Description`](crate::Description) spells the type.
    const TYPE: &'static str;

    /// Appends the value.
    fn put(self, arguments: &mut Arguments);

    /// Takes the value; `BAD_ARGUMENT` when it is missing or out of the type's range.
    fn take(from: &mut Taken) -> Result<Self, IOReturn>;
}

/// Arguments being taken apart, in the order in which they were put.
#[derive(Debug)]
pub struct Taken {
    scalars: std::vec::IntoIter<u64>,
    /// Scalars taken so far.
    taken: usize,
    structure: Option<Vec<u8>>,
    actions: Vec<PassedAction>,
}

impl From<Arguments> for Taken {
    fn from(arguments: Arguments) -> Self {
        let Arguments { scalars, structure, actions } = arguments;
        Self { scalars: scalars.into_iter(), taken: 0, structure: Some(structure), actions }
    }
}

impl Taken {
    /// The next scalar, with the action it stands for if it does.
    fn next(&mut self) -> Result<(u64, Option<PassedAction>), IOReturn> {
        let scalar = self.scalars.next().ok_or(IOReturn::BAD_ARGUMENT)?;
        let place = self.actions.iter().position(|action| action.scalar == self.taken);
        self.taken += 1;
        Ok((scalar, place.map(|place| self.actions.remove(place))))
    }

    fn scalar(&mut self) -> Result<u64, IOReturn> {
        match self.next()? {
            (scalar, None) => Ok(scalar),
            (_, Some(_)) => Err(IOReturn::BAD_ARGUMENT),
        }
    }

    pub(crate) fn action(&mut self) -> Result<Arc<dyn ActionTarget>, IOReturn> {
        let (_, action) = self.next()?;
        action.and_then(|action| action.target).ok_or(IOReturn::BAD_ARGUMENT)
    }

    /// `BAD_ARGUMENT` when something is left over that nobody took.
    pub fn finish(self) -> Result<(), IOReturn> {
        let bytes_left = self.structure.is_some_and(|bytes| !bytes.is_empty());
        // An action that is left over has a scalar that is.
        if bytes_left || self.scalars.len() != 0 { Err(IOReturn::BAD_ARGUMENT) } else { Ok(()) }
    }
}

macro_rules! integers {
    ($($int:ident)*) => {$(
        impl Argument for $int {
            const TYPE: &'static str = stringify!($int);

            fn put(self, arguments: &mut Arguments) {
                // Signed values keep their value through the sign extension.
                arguments.scalars.push(self as i64 as u64);
            }

            fn take(from: &mut Taken) -> Result<Self, IOReturn> {
                let scalar = from.scalar()?;
                let value = scalar as $int;
                if value as i64 as u64 == scalar { Ok(value) } else { Err(IOReturn::BAD_ARGUMENT) }
            }
        }
    )*};
}
integers!(u8 u16 u32 u64 i8 i16 i32 i64);

impl Argument for bool {
    const TYPE: &'static str = "bool";

    fn put(self, arguments: &mut Arguments) {
        arguments.scalars.push(u64::from(self));
    }

    fn take(from: &mut Taken) -> Result<Self, IOReturn> {
        match from.scalar() {
            Ok(0) => Ok(false),
            Ok(1) => Ok(true),
            _ => Err(IOReturn::BAD_ARGUMENT),
        }
    }
}

impl Argument for Vec<u8> {
    const TYPE: &'static str = "bytes";

    fn put(self, arguments: &mut Arguments) {
        arguments.structure = self;
    }

    fn take(from: &mut Taken) -> Result<Self, IOReturn> {
        from.structure.take().ok_or(IOReturn::BAD_ARGUMENT)
    }
}

impl Argument for String {
    const TYPE: &'static str = "text";

    fn put(self, arguments: &mut Arguments) {
        arguments.structure = self.into_bytes();
    }

    fn take(from: &mut Taken) -> Result<Self, IOReturn> {
        String::from_utf8(Vec::take(from)?).map_err(|_| IOReturn::BAD_ARGUMENT)
    }
}

/// What a method gives back: nothing, one value, or two.
pub trait Results: Sized + Send + 'static {
    /// How a [`Description`](crate::Description) spells the results.
    fn types() -> Vec<&'static str>;

    /// Turns the results into what travels.
    fn into_arguments(self) -> Arguments;

    /// The other way; `BAD_ARGUMENT` when something is missing, left over or out of range.
    fn from_arguments(arguments: Arguments) -> Result<Self, IOReturn>;
}

macro_rules! results {
    ($(($($name:ident)*))*) => {$(
        #[allow(unused_mut, unused_variables, non_snake_case, reason = "the empty tuple")]
        impl<$($name: Argument + Send + 'static),*> Results for ($($name,)*) {
            fn types() -> Vec<&'static str> {
                vec![$($name::TYPE),*]
            }

            fn into_arguments(self) -> Arguments {
                let mut arguments = Arguments::default();
                let ($($name,)*) = self;
                $($name.put(&mut arguments);)*
                arguments
            }

            fn from_arguments(arguments: Arguments) -> Result<Self, IOReturn> {
                let mut from = Taken::from(arguments);
                let results = ($($name::take(&mut from)?,)*);
                from.finish()?;
                Ok(results)
            }
        }
    )*};
}
results! { () (A) (A B) (A B C) (A B C D) }

/// A single result needs no tuple.
impl<T: Argument + Send + 'static> Results for T {
    fn types() -> Vec<&'static str> {
        vec![T::TYPE]
    }

    fn into_arguments(self) -> Arguments {
        (self,).into_arguments()
    }

    fn from_arguments(arguments: Arguments) -> Result<Self, IOReturn> {
        <(T,)>::from_arguments(arguments).map(|(value,)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_as_they_went() {
        let sent = (7_u32, -3_i16, true, vec![1, 2, 3]);
        assert_eq!(Results::from_arguments(sent.clone().into_arguments()), Ok(sent));
    }

    #[test]
    fn a_value_that_does_not_fit_its_type_is_refused() {
        let too_large = Arguments { scalars: vec![256], structure: vec![], ..Default::default() };
        assert_eq!(u8::from_arguments(too_large), Err(IOReturn::BAD_ARGUMENT));
    }

    #[test]
    fn missing_and_left_over_arguments_are_refused() {
        let two = Arguments { scalars: vec![1, 2], structure: vec![], ..Default::default() };
        assert_eq!(u64::from_arguments(two.clone()), Err(IOReturn::BAD_ARGUMENT));
        assert_eq!(<(u64, u64, u64)>::from_arguments(two), Err(IOReturn::BAD_ARGUMENT));
        let bytes = Arguments { scalars: vec![], structure: vec![1], ..Default::default() };
        assert_eq!(<()>::from_arguments(bytes), Err(IOReturn::BAD_ARGUMENT));
    }
}
