//! The rules of `IOInterruptDispatchSource`, for every way to reach a device.
//!
//! `rules.rs` has the tests, through the SDK and both ends of the plugin ABI, written once. They run on
//! a model in the same process and on one behind a vfio-user socket (`tests/` of this crate), and
//! in a virtual machine on a device behind the kernel's VFIO (`vfio-check interrupts`).
//!
//! A rule needs a device that interrupts when it is told to: [`Ringing`] is a device and the
//! registers that do it.

#![forbid(unsafe_code)]

mod bench;
mod ringing;
mod rules;

pub use bench::Setup;
pub use ringing::{BellsRegisters, E1000eRegisters, EduRegisters, Registers, Ringing};
pub use rules::resize_rounds;

use iohost_device_backend::InterruptKind;

/// A rule: its name, what it needs, and the test, which panics when the rule is broken.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The name of the function in `rules.rs`.
    pub name: &'static str,
    /// What it needs of a device.
    pub needs: Needs,
    /// The test.
    pub test: fn(&Setup),
}

/// What a rule needs of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// An INTx line.
    Line,
    /// An INTx line and MSI.
    LineAndMsi,
    /// A kind of message.
    Message,
    /// Four vectors of a kind of message.
    Vectors,
}

impl Rule {
    /// The rule of a name.
    ///
    /// Panics when there is none.
    pub fn named(name: &str) -> Self {
        *RULES.iter().find(|rule| rule.name == name).expect("a name of `each_rule!`")
    }

    /// Whether it is for a device with so many vectors of a kind.
    pub fn is_for(&self, kind: InterruptKind, vectors: u32) -> bool {
        let line = kind == InterruptKind::IntX;
        match self.needs {
            Needs::Line | Needs::LineAndMsi => line,
            Needs::Message => !line,
            Needs::Vectors => !line && vectors >= 4,
        }
    }
}

/// Hands the names of all rules to a macro, by what they need; before them, what it is given.
#[macro_export]
macro_rules! each_rule {
    ($macro:ident $given:tt) => {
        $macro! {
            $given
            line:
                a_level_line_stays_masked_until_its_handler_has_returned
                a_line_that_is_asserted_while_disabled_interrupts_once_when_enabled
                the_type_of_a_line_is_level
                a_synchronous_check_of_a_line_returns_after_its_handler;
            line_and_msi:
                without_configuration_the_line_is_index_0_and_the_first_message_follows
                a_message_source_without_configuration_works;
            message:
                an_index_past_the_last_vector_is_no_interrupt
                flags_of_an_index_that_do_not_exist_are_a_bad_argument
                an_interrupt_source_starts_disabled
                making_a_message_source_makes_the_device_bus_master
                the_type_of_an_interrupt_is_the_number_of_its_kind
                a_source_dropped_without_cancel_frees_its_vector
                a_new_handler_gets_the_next_delivery_and_the_old_one_is_dropped
                enabling_what_is_enabled_succeeds_and_only_a_change_after_cancel_is_refused
                the_cancel_handler_finds_the_vector_free
                the_last_interrupt_counts_what_is_undelivered_and_keeps_its_time
                looking_at_the_last_interrupt_takes_it_from_nobody
                five_interrupts_during_one_handler_make_one_more_call_with_the_time_of_the_fifth
                messages_are_never_masked
                messages_while_disabled_arrive_as_one_call_when_enabled
                the_time_of_an_interrupt_is_on_the_clock_that_its_index_asks_for
                an_interrupt_handler_runs_on_the_queue_given_to_create
                interrupts_reach_a_driver_on_an_engine_with_threads
                a_completion_runs_once_after_the_handler_in_flight_and_also_when_nothing_changed
                no_interrupt_handler_starts_after_the_cancel_handler
                a_source_can_be_cancelled_in_its_own_handler
                a_check_for_work_with_nothing_to_deliver_is_not_ready
                a_check_for_work_has_what_there_is_delivered_after_the_call
                a_check_for_work_inside_the_handler_leads_to_one_more_call
                a_synchronous_check_waits_for_the_next_interrupt_and_its_handler
                a_synchronous_check_of_a_disabled_source_waits_until_it_is_enabled
                the_waiter_of_a_check_is_told_when_the_source_or_its_queue_is_cancelled
                a_synchronous_check_on_the_queue_and_a_second_waiter_are_refused;
            vectors:
                a_second_source_on_one_vector_is_refused_for_want_of_resources
                cancel_frees_the_vector_loses_what_was_counted_and_can_be_called_twice
                a_configured_vector_is_the_index_of_its_number
                vectors_are_resized_under_interrupts_and_none_is_lost_or_foreign
                vectors_that_are_disabled_have_no_source_and_a_reset_keeps_them_so;
        }
    };
}

macro_rules! table {
    ([] line: $($line:ident)*; line_and_msi: $($both:ident)*; message: $($message:ident)*;
        vectors: $($vectors:ident)*;) => {
        /// All of them.
        pub const RULES: &[Rule] = &[
            $(Rule { name: stringify!($line), needs: Needs::Line, test: rules::$line },)*
            $(Rule { name: stringify!($both), needs: Needs::LineAndMsi, test: rules::$both },)*
            $(Rule { name: stringify!($message), needs: Needs::Message, test: rules::$message },)*
            $(Rule { name: stringify!($vectors), needs: Needs::Vectors, test: rules::$vectors },)*
        ];
    };
}
each_rule!(table []);

/// A test for each rule and each kind of interrupt that it is for. `$run` gets the rule and the
/// kind.
#[macro_export]
macro_rules! tests_of_each_rule {
    ($run:ident) => {
        use $crate::each_test;
        $crate::each_rule!(each_test[$run]);
    };
}

/// A part of `tests_of_each_rule!`.
#[doc(hidden)]
#[macro_export]
macro_rules! each_test {
    ([$run:ident] line: $($line:ident)*; line_and_msi: $($both:ident)*;
        message: $($message:ident)*; vectors: $($vectors:ident)*;) => {
        mod by_line {
            $crate::each_test!(@ $run IntX: $($line)* $($both)*);
        }
        mod by_msi {
            $crate::each_test!(@ $run Msi: $($message)* $($vectors)*);
        }
        mod by_msi_x {
            $crate::each_test!(@ $run MsiX: $($message)* $($vectors)*);
        }
    };
    (@ $run:ident $kind:ident: $($name:ident)*) => {$(
        #[test]
        fn $name() {
            let rule = $crate::Rule::named(stringify!($name));
            super::$run(rule, iohost_device_backend::InterruptKind::$kind);
        }
    )*};
}
