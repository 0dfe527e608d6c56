//! Actions across the plugin ABI, with a client in the same process.

use iohost_client::{Action, OSAction};
use iohost_device_models::edu::{Edu as EduModel, Timing};
use iohost_driver::IOReturn;
use iohost_testkit::Rig;
use probe::Probe;

fn rig() -> (Rig<Probe, EduModel>, probe_api::Client) {
    let rig = Rig::start(EduModel::new(Timing::Manual)).unwrap();
    let client = rig.client();
    (rig, client)
}

/// The driver's action, as a client gets it.
fn offer(rig: &Rig<Probe, EduModel>, client: &probe_api::Client) -> Action<u32> {
    let mut offered = client.offer();
    rig.settle();
    offered.poll().unwrap().unwrap()
}

fn noted(rig: &Rig<Probe, EduModel>, client: &probe_api::Client) -> Vec<u8> {
    let mut noted = client.noted();
    rig.settle();
    noted.poll().unwrap().unwrap()
}

fn aborted(rig: &Rig<Probe, EduModel>, client: &probe_api::Client) -> u32 {
    let mut aborted = client.aborted();
    rig.settle();
    aborted.poll().unwrap().unwrap()
}

#[test]
fn a_driver_completes_a_clients_action_as_often_as_it_likes_in_order() {
    let (rig, client) = rig();
    let action = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    let _ = client.subscribe(action.handle());
    let mut accepted = client.complete(3, 2);
    rig.settle();
    assert_eq!(accepted.poll(), Some(Ok(3)));
    for number in 0..3 {
        assert_eq!(action.poll(), Some(Ok((number, vec![number as u8; 2]))));
    }
    assert_eq!(action.poll(), None, "the driver still holds it");

    let _ = client.forget();
    rig.settle();
    assert_eq!(action.poll(), Some(Err(IOReturn::ABORTED)));
}

#[test]
fn a_client_invokes_a_drivers_action_in_order_and_is_missed_when_it_is_gone() {
    let (rig, client) = rig();
    let action = offer(&rig, &client);
    (1..=3).for_each(|number| action.invoke(number).unwrap());
    let numbers: Vec<u8> = [1_u32, 2, 3].iter().flat_map(|number| number.to_ne_bytes()).collect();
    assert_eq!(noted(&rig, &client), numbers);
    assert_eq!(aborted(&rig, &client), 0);
    drop(action);
    assert_eq!(aborted(&rig, &client), 1);
}

#[test]
fn an_action_that_the_driver_never_took_is_released() {
    let (rig, client) = rig();
    let action = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    let mut refused = {
        use iohost_testkit::interface::{Argument, Arguments};
        let mut arguments = Arguments::default();
        action.handle().put(&mut arguments);
        0_u32.put(&mut arguments);
        rig.call(0, arguments)
    };
    rig.settle();
    assert_eq!(refused.poll(), Some(Err(IOReturn::BAD_ARGUMENT)), "one argument too many");
    drop(client);
    assert_eq!(action.poll(), Some(Err(IOReturn::ABORTED)));
}

#[test]
fn a_stopped_driver_has_let_go_of_everything() {
    let (mut rig, client) = rig();
    let theirs = OSAction::<(u32, Vec<u8>)>::create().unwrap();
    let _ = client.subscribe(theirs.handle());
    let ours = offer(&rig, &client);
    rig.stop();
    assert_eq!(theirs.poll(), Some(Err(IOReturn::ABORTED)));
    assert_eq!(ours.invoke(1), Err(IOReturn::ABORTED));
}

#[test]
fn an_invocation_of_a_cancelled_action_is_dropped_and_counted_and_not_run() {
    let (rig, client) = rig();
    let action = offer(&rig, &client);
    let _ = client.cancel();
    rig.settle();
    assert_eq!(action.invoke(1), Err(IOReturn::ABORTED));
    let mut dropped = client.cancel();
    rig.settle();
    assert_eq!(dropped.poll(), Some(Ok(1)));
    assert!(noted(&rig, &client).is_empty());
}
