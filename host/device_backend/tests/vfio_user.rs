//! The vfio-user backend, on an `edu` that a thread of the test serves.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use iohost_device_backend::VfioUserBackend;
use iohost_device_backend::conformance::{self, Test};
use iohost_device_models::edu::{Edu, Timing};
use iohost_device_models::{DeviceServer, Function, ServeError, Stopper};
use iohost_vfio_user::VfioUserError;
use tempfile::TempDir;

/// A server, which ends with its test.
struct Server {
    path: PathBuf,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
    _folder: TempDir,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("edu");
        let server = DeviceServer::bind(&path).unwrap();
        let stopper = server.stopper();
        let function = Function::new(Edu::new(Timing::Immediate));
        let thread = Some(std::thread::spawn(move || server.run(&function)));
        Self { path, stopper, thread, _folder: folder }
    }
}

impl Drop for Server {
    /// Waits for the client to leave, so a device is dropped before its server.
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

fn pass(test: Test) {
    let server = Server::start();
    let device = VfioUserBackend::open(&server.path).unwrap();
    test(&device);
}

/// One test for each of the conformance tests, and a test that none is left out.
macro_rules! conformance {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                pass(conformance::$name);
            }
        )*

        #[test]
        fn every_conformance_test_runs_here() {
            let names: Vec<&str> = conformance::TESTS.iter().map(|(name, _)| *name).collect();
            assert_eq!([$(stringify!($name)),*], names[..]);
        }
    };
}

conformance! {
    configuration_space_names_the_device
    a_bad_configuration_access_is_refused
    bar_0_is_the_only_one_and_has_its_size
    registers_answer_in_their_width
    a_bad_register_access_is_refused
    a_mapping_shows_the_same_registers
    vectors_are_counted_and_limited
    msi_signals_until_it_is_disabled
    intx_is_masked_until_it_is_unmasked
    one_kind_of_interrupt_replaces_another
    dma_goes_both_ways
    a_bad_dma_mapping_is_refused
    a_part_of_memory_is_mapped_and_no_more
    what_is_not_mapped_is_not_reached
    a_reset_leaves_the_device_quiet
    a_device_in_the_middle_of_its_work_is_made_safe
    the_documentation_says_what_there_is
}

#[test]
fn the_documentation_has_every_backend() {
    pass(conformance::the_documentation_is_complete);
}

#[test]
fn one_connection_passes_all_of_them_twice() {
    pass(|device| {
        conformance::all(device);
        conformance::all(device);
    });
}

#[test]
fn a_socket_where_nobody_listens_is_named() {
    let err = VfioUserBackend::open(Path::new("/nonexistent/edu")).unwrap_err();
    assert!(matches!(err, VfioUserError::Connect { .. }), "{err:?}");
    assert_eq!(err.to_string(), "connecting to /nonexistent/edu");
}
