//! The driver on an emulated device, step by step.

use std::time::Duration;

use edu::Edu;
use iohost_device_models::Fault;
use iohost_device_models::edu::{Edu as EduModel, Timing};
use iohost_driver::{IOReturn, QueueError};
use iohost_testkit::Rig;

fn rig(timing: Timing) -> Rig<Edu, EduModel> {
    Rig::start(EduModel::new(timing)).unwrap()
}

fn finish(rig: &Rig<Edu, EduModel>) {
    rig.model(|edu, bus| edu.finish(bus));
    rig.settle();
}

#[test]
fn answers_once_the_interrupt_fires() {
    let rig = rig(Timing::Manual);
    let mut answer = rig.client::<edu_api::Client>().factorial(5);

    rig.settle();
    assert_eq!(answer.poll(), None, "no answer before the device is done");

    finish(&rig);
    assert_eq!(answer.poll(), Some(Ok(120)));
}

#[test]
fn answers_by_the_interrupt_line_where_messages_are_not_allowed() {
    let model = EduModel::new(Timing::Manual);
    let line = [iohost_device_backend::InterruptKind::IntX];
    let rig = Rig::<Edu, _>::start_with(model, &line).unwrap();
    let client = rig.client::<edu_api::Client>();

    for (n, factorial) in [(3, 6), (4, 24), (5, 120)] {
        let mut answer = client.factorial(n);
        rig.settle();
        finish(&rig);
        assert_eq!(answer.poll(), Some(Ok(factorial)), "the line was unmasked each time");
    }
}

#[test]
fn refuses_a_second_caller_while_computing() {
    let rig = rig(Timing::Manual);
    let client = rig.client::<edu_api::Client>();
    let (mut first, mut second) = (client.factorial(5), client.factorial(6));

    rig.settle();
    assert_eq!(second.poll(), Some(Err(IOReturn::BUSY)));
    finish(&rig);
    assert_eq!(first.poll(), Some(Ok(120)));
}

#[test]
fn a_caller_left_waiting_is_aborted_at_stop() {
    let mut rig = rig(Timing::Manual);
    let mut answer = rig.client::<edu_api::Client>().factorial(5);
    rig.settle();

    rig.stop();
    assert_eq!(answer.poll(), Some(Err(IOReturn::ABORTED)));
}

#[test]
fn a_call_after_the_stop_is_answered_not_ready() {
    let mut rig = rig(Timing::Immediate);
    let client = rig.client::<edu_api::Client>();
    rig.stop();

    let mut answer = client.factorial(5);
    rig.settle();
    assert_eq!(answer.poll(), Some(Err(IOReturn::NOT_READY)));
}

#[test]
fn a_spurious_interrupt_answers_nobody() {
    const RAISE: u64 = 0x60;
    let rig = rig(Timing::Manual);
    let mut answer = rig.client::<edu_api::Client>().factorial(5);
    rig.settle();

    rig.function().bar_write(0, RAISE, &0x8000_u32.to_le_bytes()).unwrap();
    rig.settle();
    assert_eq!(answer.poll(), None);
    finish(&rig);
    assert_eq!(answer.poll(), Some(Ok(120)));
}

#[test]
fn data_comes_back_from_the_device_as_it_went() {
    let rig = rig(Timing::Immediate);
    let data: Vec<u8> = (0..edu_api::LONGEST_ENTRY).map(|byte| byte as u8).collect();
    let mut answer = rig.client::<edu_api::Client>().dma_round_trip(data.clone());

    rig.settle();
    assert_eq!(answer.poll(), Some(Ok(data)));
    assert_eq!(rig.function().blocked_dma(), 0);
}

#[test]
fn data_that_the_device_cannot_take_is_refused() {
    let rig = rig(Timing::Immediate);
    let client = rig.client::<edu_api::Client>();
    let mut none = client.dma_round_trip(Vec::new());
    let mut too_much = client.dma_round_trip(vec![0; edu_api::LONGEST_ENTRY + 1]);

    rig.settle();
    assert_eq!(none.poll(), Some(Err(IOReturn::BAD_ARGUMENT)));
    assert_eq!(too_much.poll(), Some(Err(IOReturn::BAD_ARGUMENT)));
}

#[test]
fn a_stream_comes_back_whole_and_in_order_through_queues_that_fill_up() {
    let mut rig = rig(Timing::Immediate);
    let mut session = rig.open_session(512).unwrap();
    let mut upload = session.producer(edu_api::UPLOAD);
    let mut download = session.consumer(edu_api::DOWNLOAD);

    let entries: Vec<Vec<u8>> = (0..500_usize).map(|n| vec![n as u8; 1 + n % 200]).collect();
    let (mut sent, mut received) = (0, Vec::new());
    while received.len() < entries.len() {
        // As much as fits, both ways: each side runs into the other's full or empty queue.
        while sent < entries.len() && upload.enqueue(&entries[sent]).is_ok() {
            sent += 1;
        }
        rig.settle();
        let mut entry = Vec::new();
        let before = received.len();
        while download.dequeue(&mut entry).is_ok() {
            received.push(entry.clone());
        }
        rig.settle();
        assert!(received.len() > before || sent < entries.len(), "the stream stands still");
    }
    assert_eq!(received, entries);
}

#[test]
fn an_entry_that_the_device_cannot_take_comes_back_empty() {
    let mut rig = rig(Timing::Immediate);
    let mut session = rig.open_session(16384).unwrap();
    let mut upload = session.producer(edu_api::UPLOAD);
    let mut download = session.consumer(edu_api::DOWNLOAD);
    upload.enqueue(&vec![7; edu_api::LONGEST_ENTRY + 1]).unwrap();
    upload.enqueue(b"fits").unwrap();

    rig.settle();
    let mut entry = Vec::new();
    download.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"");
    download.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"fits");
    assert!(matches!(download.dequeue(&mut entry), Err(QueueError::Underrun)));
}

#[test]
fn two_streams_take_turns_and_one_that_ends_does_not_stop_the_other() {
    let mut rig = rig(Timing::Manual);
    let mut sessions = [rig.open_session(4096).unwrap(), rig.open_session(4096).unwrap()];
    let mut uploads = sessions.each_mut().map(|session| session.producer(edu_api::UPLOAD));
    let mut downloads = sessions.each_mut().map(|session| session.consumer(edu_api::DOWNLOAD));
    for upload in &mut uploads {
        upload.enqueue(b"one").unwrap();
        upload.enqueue(b"two").unwrap();
    }
    rig.settle();
    let trip = || {
        finish(&rig);
        finish(&rig);
    };
    trip();
    trip();
    let mut entry = Vec::new();
    for download in &mut downloads {
        download.dequeue(&mut entry).unwrap();
        assert_eq!(entry, b"one", "each had a turn");
    }
    let [first, _second] = sessions;
    rig.close_session(first);
    trip();
    trip();
    downloads[1].dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"two");
}

#[test]
fn the_timer_ticks_every_ten_milliseconds_without_drift() {
    let rig = rig(Timing::Immediate);
    for _ in 0..50 {
        // Late by 1 ms each time, as a busy machine would be.
        rig.advance(Duration::from_millis(11));
    }
    // The 55th is due now; it has a leeway of 1 ms.
    rig.advance(Duration::from_millis(1));
    let mut ticks = rig.client::<edu_api::Client>().ticks();
    rig.settle();
    assert_eq!(ticks.poll(), Some(Ok(55)));
}

#[test]
fn will_not_start_on_a_device_still_working_for_someone_else() {
    let first = rig(Timing::Manual);
    let mut answer = first.client::<edu_api::Client>().factorial(5);
    first.settle();
    let function = first.function();
    drop(first);
    assert_eq!(answer.poll(), Some(Err(IOReturn::ABORTED)));

    // QEMU's device has no reset for its factorial engine: only time ends the computation.
    let kinds = [iohost_device_backend::InterruptKind::Msi];
    let refused = Rig::<Edu, EduModel>::start_on(function.clone(), &kinds).unwrap_err();
    assert_eq!(refused.status, IOReturn::BUSY);

    function.with_model(|edu, bus| edu.finish(bus));
    let second = Rig::<Edu, EduModel>::start_on(function, &kinds).unwrap();
    let mut answer = second.client::<edu_api::Client>().factorial(4);
    second.settle();
    finish(&second);
    assert_eq!(answer.poll(), Some(Ok(24)), "and not the predecessor's 120");
}

#[test]
fn an_interrupt_that_is_lost_costs_time_and_no_entry() {
    let mut rig = rig(Timing::Immediate);
    let mut session = rig.open_session(16384).unwrap();
    let mut upload = session.producer(edu_api::UPLOAD);
    let mut download = session.consumer(edu_api::DOWNLOAD);
    let mut came_back = Vec::new();
    for (number, fault) in Fault::KINDS.into_iter().enumerate() {
        // Not those that bring other bytes back: the device has them, and a driver cannot know.
        if matches!(fault, Fault::LosesDma | Fault::ShortensDma | Fault::StraysDma) {
            continue;
        }
        for times in 1..4 {
            rig.function().fail_next(fault, times);
            let entry = vec![number as u8; 10];
            upload.enqueue(&entry).unwrap();
            rig.settle();
            rig.function().heal();
            (0..10).for_each(|_| rig.advance(Duration::from_millis(10)));
            let received = download.dequeue(&mut came_back);
            assert_eq!(received, Ok(()), "{fault:?} {times} times");
            assert_eq!(download.dequeue(&mut Vec::new()), Err(QueueError::Underrun));
            if fault != Fault::LosesWrite {
                assert_eq!(came_back, entry, "{fault:?} {times} times");
            }
        }
    }
}

#[test]
fn an_interrupt_that_comes_too_early_ends_no_copy() {
    let rig = rig(Timing::Manual);
    let mut answer = rig.client::<edu_api::Client>().dma_round_trip(vec![7; 10]);
    rig.settle();
    const RAISE: u64 = 0x60;
    rig.function().bar_write(0, RAISE, &0x100_u32.to_le_bytes()).unwrap();
    rig.settle();
    finish(&rig);
    assert_eq!(answer.poll(), None, "the way back is still to come");
    finish(&rig);
    assert_eq!(answer.poll(), Some(Ok(vec![7; 10])));
}
