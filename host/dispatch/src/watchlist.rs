//! The sources an engine watches, by token.

use std::sync::Weak;

use crate::source::Watched;

/// A table of sources. A token is a place and how often it was used before, so that an event of
/// a source that has gone does not reach the one that came in its place.
#[derive(Default)]
pub(crate) struct Watchlist {
    places: Vec<Place>,
    free: Vec<u32>,
}

struct Place {
    /// Starts at 1: no token is below [`Watchlist::FIRST_TOKEN`].
    generation: u32,
    source: Option<Weak<dyn Watched>>,
}

impl Watchlist {
    /// Tokens below this are never given.
    pub(crate) const FIRST_TOKEN: u64 = 1 << 32;

    pub(crate) fn add(&mut self, source: Weak<dyn Watched>) -> u64 {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.places.push(Place { generation: 0, source: None });
                (self.places.len() - 1) as u32
            }
        };
        let slot = &mut self.places[place as usize];
        slot.generation = slot.generation.wrapping_add(1).max(1);
        slot.source = Some(source);
        u64::from(slot.generation) << 32 | u64::from(place)
    }

    pub(crate) fn get(&self, token: u64) -> Option<&Weak<dyn Watched>> {
        let place = self.places.get(token as u32 as usize)?;
        place.source.as_ref().filter(|_| u64::from(place.generation) == token >> 32)
    }

    /// `false` when it was not there any more.
    pub(crate) fn remove(&mut self, token: u64) -> bool {
        if self.get(token).is_none() {
            return false;
        }
        self.places[token as u32 as usize].source = None;
        self.free.push(token as u32);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Then;

    struct Nothing;

    impl Watched for Nothing {
        fn became_ready(&self, _: Then) {}
    }

    #[test]
    fn a_token_of_a_source_that_has_gone_finds_nobody() {
        let mut list = Watchlist::default();
        let first = list.add(Weak::<Nothing>::new());
        assert!(list.remove(first));
        let second = list.add(Weak::<Nothing>::new());
        assert_eq!(first as u32, second as u32, "the place is used again");
        assert!(list.get(first).is_none() && list.get(second).is_some());
        assert!(!list.remove(first));
    }
}
