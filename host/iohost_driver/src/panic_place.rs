//! Where code of a driver panicked: a caught panic has its words, and only the hook its place.

use std::cell::Cell;
use std::panic;
use std::sync::Once;

thread_local! {
    static PLACE: Cell<Option<String>> = const { Cell::new(None) };
}

/// Has the place of each panic noted, from now on, before anything else that is done about it.
pub(crate) fn note_from_now_on() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let earlier = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // A thread that ends has no place for it any more.
            let _ = PLACE.try_with(|place| place.set(info.location().map(ToString::to_string)));
            earlier(info);
        }));
    });
}

/// The place of this thread's latest panic, once; `file:line:column`.
pub(crate) fn take() -> Option<String> {
    PLACE.try_with(Cell::take).ok().flatten()
}
