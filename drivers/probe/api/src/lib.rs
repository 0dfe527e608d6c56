//! What a test can ask the probe driver for.

#![forbid(unsafe_code)]

use iohost_interface::Action;

iohost_interface::interface! {
    /// Actions in both directions, and news of services.
    pub interface probe;

    methods {
        /// Keeps an action of the client's.
        0 => fn subscribe(action: Action<(u32, Vec<u8>)>);

        /// Invokes each action it keeps `count` times, with the numbers from 0 and as many `bytes`.
        /// How many of these invocations were accepted.
        1 => fn complete(count: u32, bytes: u32) -> u32;

        /// Drops the actions it keeps.
        2 => fn forget();

        /// A new action of the driver's, which notes what it is invoked with.
        3 => fn offer() -> Action<u32>;

        /// What was noted: 4 bytes each, in the machine's order.
        4 => fn noted() -> Vec<u8>;

        /// How many aborted handlers of offered actions have run.
        5 => fn aborted() -> u32;

        /// Cancels every action it has offered. How many invocations they have dropped.
        6 => fn cancel() -> u64;

        /// Watches the services that serve an interface. Replaces an earlier watch.
        7 => fn watch(interface: String);

        /// The news it has heard so far, in order: `+NAME` and `-NAME`, with spaces between.
        8 => fn news() -> String;

        /// Is never answered while the driver runs.
        9 => fn hold();

        /// Bytes of its memory.
        10 => fn peek(memory: u64, offset: u32, len: u32) -> Vec<u8>;

        /// Writes bytes of its memory.
        11 => fn poke(memory: u64, offset: u32, data: Vec<u8>);

        /// Never returns: the driver does nothing any more.
        12 => fn hang();

        /// What has happened to the device so far, in order, with spaces between.
        13 => fn events() -> String;

        /// Reads the first register of BAR 0, mapped where it can be.
        14 => fn register() -> u32;

        /// Has the device decode memory (1), or not (0), behind the back of its host.
        15 => fn decode(on: u32);

        /// Writes the bytes of the caller's memory `from`, backwards, to its memory `to`. How many.
        16 => fn reverse(from: u64, to: u64) -> u64;

        /// The status of looking for the memory of the caller of the first `hold` that is not
        /// answered.
        17 => fn look_for_memory_of_held(memory: u64) -> i32;

        /// How many clients have died with a session open.
        18 => fn crashed_clients() -> u32;

        /// Sets the driver's property `colour`, and its busy count one higher.
        19 => fn describe(colour: String);

        /// Has the stop complete so much later.
        20 => fn stop_after(milliseconds: u32);

        /// The driver ends itself.
        21 => fn terminate();

        /// Dies in the middle of the call: 0 by a null pointer (SIGSEGV), 1 by `abort`, 2 by a
        /// panic, 3 by `exit(3)`.
        22 => fn die(how: u32);

        /// Turns in a circle for so many milliseconds (0: for ever), with a report of progress each
        /// time around if asked for; and is answered then.
        23 => fn spin(milliseconds: u64, progress: u32);

        /// Writes a byte all over the memory of its process's flight recorder, then dies by SIGSEGV.
        24 => fn scribble(byte: u32);

        /// Adds one to what is counted, by every version of the driver, and gives the sum.
        25 => fn count() -> u64;

        /// The byte of [`HOW_IT_STARTS`] that says how this version starts.
        26 => fn version() -> u32;

        /// Takes and keeps what it gets: memory (0), until the process dies of its limit, or
        /// descriptors (1), until there are no more. How many pieces.
        27 => fn leak(what: u32) -> u32;
    }

    queues {}
}

/// What stands in the plugin's file for tests to change in a copy, which is another version then. By
/// one byte the driver starts (`0` to `9`), or its start fails (`e`), panics (`p`), ends the
/// process (`x`), never returns (`h`), or it cannot use what the version before it saved (`r`).
pub const HOW_IT_STARTS: [u8; 24] = *b"how-the-probe-starts: 0!";

/// The place of the byte in it that says so.
pub const HOW: usize = 22;

/// Memory that clients may write.
pub const SHARED: u64 = 0;

/// Memory that clients may read.
pub const PUBLISHED: u64 = 1;

/// Bytes of each; no multiple of a page.
pub const MEMORY_BYTES: usize = 10_000;

/// The interface for clients of type 2.
pub mod echo {
    iohost_interface::interface! {
        /// Gives back what it is sent.
        pub interface echo;

        methods {
            /// Entries that this driver has given back.
            0 => fn given_back() -> u64;
        }

        queues {
            /// Entries of any length.
            0 => UPLOAD: ToDriver;

            /// The same entries, in the same order, each exactly once.
            1 => DOWNLOAD: ToClient;
        }
    }
}

/// The interface for another kind of client, of type 1.
pub mod registering {
    iohost_interface::interface! {
        /// Has the driver be seen.
        pub interface registering;

        methods {
            /// The type of the client.
            0 => fn client_type() -> u32;
        }

        queues {}
    }
}
