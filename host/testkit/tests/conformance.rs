//! The fake passes what every backend has to.

use std::sync::Arc;

use iohost_device_backend::conformance;
use iohost_device_models::Function;
use iohost_device_models::edu::{Edu, Timing};
use iohost_testkit::FakeDevice;

#[test]
fn the_fake_passes_the_conformance_tests_twice() {
    let device = FakeDevice::new(Arc::new(Function::new(Edu::new(Timing::Immediate))));
    conformance::all(&device);
    conformance::all(&device);
}
