//! What IODataQueueDispatchSource promises, row by row, as far as it is a matter of the memory.
#![cfg(not(loom))]

use std::cell::Cell;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use iohost_memory::ring::{
    Bell, Consumer, Corruption, Doorway, ENTRY_HEADER_SIZE, Index, Notify, Peer, Producer,
    QueueError, Ring, RingError, WaitError, footprint,
};
use iohost_memory::{AttachError, SharedMemory};

/// No wait in these tests is meant to end by this.
const WATCHDOG: Duration = Duration::from_secs(60);

/// Counts notifications instead of sending them.
#[derive(Debug, Clone, Default)]
struct Counter(Rc<Cell<u32>>);

impl Notify for Counter {
    fn notify(&self) {
        self.0.set(self.0.get() + 1);
    }
}

impl Counter {
    fn take(&self) -> u32 {
        self.0.take()
    }
}

/// Both ends of one queue, what they sent, and the memory as a third party sees it.
struct Queue {
    producer: Producer<Counter>,
    consumer: Consumer<Counter>,
    available: Counter,
    serviced: Counter,
    memory: Arc<SharedMemory>,
}

fn queue(queue_byte_count: u64) -> Queue {
    let ring = Ring::create(c"test", queue_byte_count).unwrap();
    let memory = ring.memory().clone();
    let (available, serviced) = (Counter::default(), Counter::default());
    let producer = Producer::new(ring.clone(), available.clone()).unwrap();
    let consumer = Consumer::new(ring, serviced.clone()).unwrap();
    Queue { producer, consumer, available, serviced, memory }
}

impl Queue {
    fn word(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.memory.read_at(offset, &mut word);
        u32::from_ne_bytes(word)
    }

    fn set_word(&self, offset: usize, value: u32) {
        self.memory.write_at(offset, &value.to_ne_bytes());
    }

    fn head(&self) -> u32 {
        self.word(0)
    }

    /// How far the consumer says that it has read, entry by entry.
    fn read_to(&self) -> u32 {
        self.word(64) - 1
    }

    fn tail(&self) -> u32 {
        self.word(4)
    }

    fn need_serviced(&self) -> u8 {
        let mut flag = [0];
        self.memory.read_at(8, &mut flag);
        flag[0]
    }

    fn dequeue(&mut self) -> Result<Vec<u8>, QueueError> {
        let mut entry = Vec::new();
        self.consumer.dequeue(&mut entry)?;
        Ok(entry)
    }

    /// Fills the queue with entries of 4 bytes until one is refused, and forgets the notifications.
    fn fill(&mut self) {
        while self.producer.enqueue(&[7; 4]).is_ok() {}
        self.available.take();
    }
}

// Memory layout.

#[test]
fn an_independent_parser_reads_head_tail_flag_and_entries_at_their_places() {
    let mut queue = queue(32);
    queue.producer.enqueue(b"gone").unwrap();
    queue.dequeue().unwrap();
    queue.producer.enqueue(b"hello").unwrap();
    queue.producer.enqueue(b"").unwrap();
    queue.producer.enqueue(&[9; 100]).unwrap_err();
    queue.producer.enqueue(&[9; 20]).unwrap_err();

    let mut bytes = vec![0; 32 + 128];
    queue.memory.read_at(0, &mut bytes);
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (head, tail) = (word(0), word(4));
    let mut entries = Vec::new();
    let mut at = head;
    while at != tail {
        let size = word(128 + at);
        entries.push(bytes[128 + at + 4..][..size].to_vec());
        at += 4 + size.div_ceil(4) * 4;
    }
    assert_eq!((head, tail), (8, 24));
    assert_eq!(bytes[8], 1, "the producer waits for room");
    assert_eq!(bytes[9..64], [0; 55], "nobody waits, and nothing else is used");
    assert_eq!((word(64), bytes[68]), (8 + 1, 1), "the consumer's own count, and the same request");
    assert_eq!(bytes[69..128], [0; 59], "nothing else is used");
    assert_eq!(entries, [b"hello".to_vec(), b"".to_vec()]);
}

#[test]
fn the_entry_header_is_four_bytes() {
    assert_eq!(ENTRY_HEADER_SIZE, 4);
}

#[test]
fn a_ring_sized_by_the_published_formula_holds_that_many_entries() {
    let bytes = 10 * footprint(13).unwrap() + 4;
    let mut queue = queue(bytes.into());
    for _ in 0..10 {
        queue.producer.enqueue(&[1; 13]).unwrap();
    }
}

// Create, init, free.

#[test]
fn a_size_that_is_not_a_multiple_of_four_is_refused() {
    let err = Ring::create(c"test", 6).unwrap_err();
    assert!(matches!(err, RingError::Unaligned { queue_byte_count: 6 }));
    assert_eq!(err.to_string(), "queue byte count 6 is not a multiple of 4");
}

#[test]
fn a_size_that_leaves_no_room_for_the_header_is_refused() {
    for queue_byte_count in [0xFFFF_FF80, 0xFFFF_FFFC, 1 << 32, u64::MAX - 3] {
        let err = Ring::create(c"test", queue_byte_count).unwrap_err();
        assert!(matches!(err, RingError::TooLarge { .. }), "{queue_byte_count:#x}");
    }
}

#[test]
fn the_largest_size_is_taken() {
    // The memory is a promise of the kernel until it is touched.
    let ring = Ring::create(c"test", 0xFFFF_FF7C).unwrap();
    assert_eq!(ring.queue_byte_count(), 0xFFFF_FF7C);
}

#[test]
fn a_size_of_zero_is_refused() {
    assert!(matches!(Ring::create(c"test", 0), Err(RingError::Empty)));
}

#[test]
fn a_new_queue_is_all_zeros() {
    let ring = Ring::create(c"test", 4096).unwrap();
    let mut bytes = vec![1; 4096 + 128];
    ring.memory().read_at(0, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn a_second_party_maps_the_same_memory_and_agrees_on_its_size() {
    let ours = Ring::create(c"test", 4096).unwrap();
    let descriptor = ours.memory().as_fd().try_clone_to_owned().unwrap();
    let theirs = Ring::attach(descriptor, 4096).unwrap();
    assert_eq!(theirs.queue_byte_count(), 4096);

    Producer::new(ours, None::<Bell>).unwrap().enqueue(b"across").unwrap();
    let mut consumer = Consumer::new(theirs, None::<Bell>).unwrap();
    assert_eq!(consumer.dequeue_with(|entry| entry.to_vec()).unwrap(), b"across");
}

#[test]
fn a_party_that_was_told_another_size_is_refused() {
    let ours = Ring::create(c"test", 4096).unwrap();
    let descriptor = ours.memory().as_fd().try_clone_to_owned().unwrap();
    let err = Ring::attach(descriptor, 4092).unwrap_err();
    let RingError::Attach { queue_byte_count: 4092, source } = err else { panic!("{err:?}") };
    assert!(matches!(source, AttachError::WrongLength { expected: 4220, actual: 4224 }));

    let err = Ring::over(ours.memory().clone(), 8).unwrap_err();
    assert!(matches!(err, RingError::WrongLength { expected: 136, actual: 4224, .. }));
}

#[test]
fn the_memory_is_released_with_the_last_end() {
    let queue = queue(64);
    let memory = Arc::downgrade(&queue.memory);
    drop(queue);
    assert!(memory.upgrade().is_none());
}

#[test]
fn a_new_owner_of_an_end_carries_on_where_the_old_one_stopped() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"1").unwrap();
    queue.producer.enqueue(b"2").unwrap();
    queue.dequeue().unwrap();

    let ring = queue.producer.ring().clone();
    queue.producer = Producer::new(ring.clone(), queue.available.clone()).unwrap();
    queue.consumer = Consumer::new(ring, queue.serviced.clone()).unwrap();
    queue.producer.enqueue(b"3").unwrap();
    assert_eq!(queue.dequeue().unwrap(), b"2");
    assert_eq!(queue.dequeue().unwrap(), b"3");
}

// Enqueue.

#[test]
fn the_first_entry_notifies_once_and_those_after_it_while_unread_do_not() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"1").unwrap();
    assert_eq!(queue.available.take(), 1);
    queue.producer.enqueue(b"2").unwrap();
    queue.dequeue().unwrap();
    queue.producer.enqueue(b"3").unwrap();
    assert_eq!(queue.available.take(), 0, "2 is unread");
    queue.dequeue().unwrap();
    queue.dequeue().unwrap();
    queue.producer.enqueue(b"4").unwrap();
    assert_eq!(queue.available.take(), 1, "all was read");
}

#[test]
fn a_full_queue_refuses_with_overrun_and_still_notifies() {
    let mut queue = queue(16);
    queue.producer.enqueue(&[1; 4]).unwrap();
    queue.producer.enqueue(&[2; 4]).unwrap();
    queue.available.take();
    assert_eq!(queue.producer.enqueue(&[3; 4]), Err(QueueError::Overrun { size: 4 }));
    assert_eq!(queue.available.take(), 1);
    assert_eq!(queue.need_serviced(), 1);
    assert_eq!(queue.dequeue().unwrap(), [1; 4], "what was there is intact");
}

#[test]
fn an_entry_that_can_never_fit_is_too_large_and_asks_for_nothing() {
    let mut queue = queue(16);
    let too_large = |size| QueueError::MessageTooLarge { size, queue_byte_count: 16 };
    for size in [13, u32::MAX as usize, u32::MAX as usize + 1, usize::MAX] {
        let refused = queue.producer.enqueue_with(size, |_| unreachable!("nothing to fill"));
        assert_eq!(refused, Err::<(), _>(too_large(size)));
    }
    assert_eq!(queue.available.take(), 0);
    assert_eq!(queue.need_serviced(), 0);
    queue.producer.enqueue(&[1; 12]).unwrap();
}

#[test]
fn a_batch_into_an_empty_queue_is_flagged_and_not_sent_until_asked() {
    let mut queue = queue(256);
    let mut send = false;
    for value in 0..10 {
        queue
            .producer
            .enqueue_with_coalesce(1, &mut send, |slot| slot.write_at(0, &[value]).unwrap())
            .unwrap();
    }
    assert!(send);
    assert_eq!(queue.available.take(), 0);
    queue.producer.send_data_available();
    assert_eq!(queue.available.take(), 1);
}

#[test]
fn a_coalesced_operation_never_takes_a_flag_back() {
    let mut queue = queue(64);
    let mut send = true;
    queue.producer.enqueue(b"unread").unwrap();
    queue.producer.enqueue_with_coalesce(1, &mut send, |_| ()).unwrap();
    assert!(send);
    queue.consumer.dequeue_with_coalesce(&mut send, |_| ()).unwrap();
    assert!(send);
}

#[test]
fn the_fill_callback_runs_once_with_the_exact_size_before_the_tail_moves() {
    let mut queue = queue(64);
    let memory = queue.memory.clone();
    let mut sizes = Vec::new();
    queue
        .producer
        .enqueue_with(5, |slot| {
            let mut tail = [1; 4];
            memory.read_at(4, &mut tail);
            assert_eq!(tail, [0; 4]);
            sizes.push(slot.size());
        })
        .unwrap();
    assert_eq!(sizes, [5]);
    assert_eq!(queue.tail(), 12);
}

#[test]
fn the_fill_callback_does_not_run_on_overrun() {
    let mut queue = queue(16);
    queue.fill();
    let refused = queue.producer.enqueue_with(4, |_| unreachable!("there is no room"));
    assert_eq!(refused, Err::<(), _>(QueueError::Overrun { size: 4 }));
}

#[test]
fn a_fill_callback_that_panics_publishes_nothing() {
    let mut queue = queue(64);
    let fill = AssertUnwindSafe(|| queue.producer.enqueue_with(4, |_| panic!("in the callback")));
    assert!(catch_unwind(fill).map(|never: Result<(), _>| never).is_err());
    assert_eq!(queue.dequeue(), Err(QueueError::Underrun));
    queue.producer.enqueue(b"next").unwrap();
    assert_eq!(queue.dequeue().unwrap(), b"next");
}

#[test]
fn a_slot_takes_no_byte_outside_its_payload() {
    let mut queue = queue(64);
    queue
        .producer
        .enqueue_with(5, |slot| {
            slot.write_at(0, b"ab").unwrap();
            slot.write_at(2, b"cde").unwrap();
            slot.write_at(5, b"").unwrap();
            let err = slot.write_at(3, b"xyz").unwrap_err();
            assert_eq!(err.to_string(), "3 bytes at 3 are not inside a payload of 5 bytes");
            slot.write_at(usize::MAX, b"x").unwrap_err();
        })
        .unwrap();
    assert_eq!(queue.dequeue().unwrap(), b"abcde");
}

#[test]
fn without_a_handler_nothing_is_sent_and_the_request_for_service_stays() {
    let ring = Ring::create(c"test", 16).unwrap();
    let memory = ring.memory().clone();
    let mut producer = Producer::new(ring.clone(), None::<Counter>).unwrap();
    let mut consumer = Consumer::new(ring, None::<Counter>).unwrap();
    while producer.enqueue(&[0; 4]).is_ok() {}
    consumer.dequeue_with(|_| ()).unwrap();
    let mut flag = [0];
    memory.read_at(8, &mut flag);
    assert_eq!(flag, [1]);

    // A handler that is installed later is called by the next dequeue, not at once.
    let serviced = Counter::default();
    *consumer.data_serviced_mut() = Some(serviced.clone());
    assert_eq!(serviced.take(), 0);
    consumer.dequeue_with(|_| ()).unwrap();
    assert_eq!(serviced.take(), 1);
}

// Batches.

#[test]
fn a_batch_is_seen_all_at_once_and_announced_once() {
    let mut queue = queue(256);
    let memory = queue.memory.clone();
    queue
        .producer
        .enqueue_batch(|batch| {
            batch.enqueue(b"one").unwrap();
            batch.enqueue_with(3, |slot| slot.write_at(0, b"two").unwrap()).unwrap();
            let mut tail = [1; 4];
            memory.read_at(4, &mut tail);
            assert_eq!(tail, [0; 4]);
        })
        .unwrap();
    assert_eq!(queue.available.take(), 1);
    assert_eq!(queue.dequeue().unwrap(), b"one");
    queue.producer.enqueue_batch(|batch| batch.enqueue(b"three").unwrap()).unwrap();
    assert_eq!(queue.available.take(), 0, "two is unread");

    let mut entries = Vec::new();
    let count = queue.consumer.dequeue_batch(9, |entry| {
        let mut read_to = [0; 4];
        memory.read_at(64, &mut read_to);
        assert_eq!(read_to, 9_u32.to_ne_bytes(), "not given back yet");
        entries.push(entry.to_vec());
    });
    assert_eq!(count, Ok(2));
    assert_eq!(entries, [b"two".to_vec(), b"three".to_vec()]);
    assert_eq!(queue.consumer.dequeue_batch(9, |_| ()), Err(QueueError::Underrun));
}

#[test]
fn a_batch_that_finds_no_room_publishes_what_it_has_and_asks_for_service() {
    let mut queue = queue(32);
    queue.producer.enqueue(&[0; 4]).unwrap();
    queue.available.take();
    let refused = queue.producer.enqueue_batch(|batch| {
        std::iter::repeat_with(|| batch.enqueue(&[1; 4])).find_map(Result::err)
    });
    assert_eq!(refused, Ok(Some(QueueError::Overrun { size: 4 })));
    assert_eq!((queue.tail(), queue.available.take(), queue.need_serviced()), (32, 1, 1));
    assert_eq!(queue.consumer.dequeue_batch(2, |_| ()), Ok(2));
    assert_eq!((queue.serviced.take(), queue.need_serviced()), (1, 0));
}

#[test]
fn a_batch_that_panics_publishes_nothing_and_gives_back_what_it_had_read() {
    let mut queue = queue(64);
    let fill = AssertUnwindSafe(|| {
        queue.producer.enqueue_batch(|batch| {
            batch.enqueue(b"lost").unwrap();
            panic!("in the callback")
        })
    });
    assert!(catch_unwind(fill).map(|never: Result<(), _>| never).is_err());
    assert_eq!(queue.dequeue(), Err(QueueError::Underrun));
    for entry in [b"1", b"2", b"3"] {
        queue.producer.enqueue(entry).unwrap();
    }
    let read = AssertUnwindSafe(|| {
        queue.consumer.dequeue_batch(3, |entry| assert_eq!(entry.to_vec(), b"1"))
    });
    assert!(catch_unwind(read).is_err());
    assert_eq!(queue.dequeue().unwrap(), b"2");
}

// Ends that are awake.

#[test]
fn a_consumer_that_waits_is_sent_nothing_until_it_was_told_underrun() {
    let mut queue = queue(64);
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    queue.producer.enqueue(b"1").unwrap();
    assert_eq!(queue.available.take(), 1);
    queue.consumer.wait(&line, WATCHDOG).unwrap();
    queue.dequeue().unwrap();
    queue.producer.enqueue(b"2").unwrap();
    assert_eq!(queue.available.take(), 0, "it will look");
    queue.consumer.wait(&line, WATCHDOG).unwrap();
    queue.dequeue().unwrap();
    assert_eq!(queue.dequeue(), Err(QueueError::Underrun));
    queue.producer.enqueue(b"3").unwrap();
    assert_eq!(queue.available.take(), 1, "it may sleep now");
}

#[test]
fn a_consumer_that_looks_is_sent_nothing_until_it_was_told_underrun() {
    let mut queue = queue(64);
    assert!(!queue.consumer.look_for(Duration::from_millis(1)).unwrap());
    queue.producer.enqueue(b"1").unwrap();
    assert_eq!(queue.available.take(), 0, "it will look");
    assert!(queue.consumer.look_for(WATCHDOG).unwrap());
    queue.dequeue().unwrap();
    assert_eq!(queue.dequeue(), Err(QueueError::Underrun));
    queue.producer.enqueue(b"2").unwrap();
    assert_eq!(queue.available.take(), 1, "it may sleep now");
}

#[test]
fn a_consumer_that_looked_in_vain_and_then_waits_in_vain_is_told_of_the_next_entry() {
    let mut queue = queue(64);
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    assert!(!queue.consumer.look_for(Duration::ZERO).unwrap());
    queue.consumer.wait(&line, Duration::from_millis(1)).unwrap_err();
    queue.producer.enqueue(b"1").unwrap();
    assert_eq!(queue.available.take(), 1);
}

#[test]
fn looking_finds_what_was_there_before_whatever_the_time() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"1").unwrap();
    assert!(queue.consumer.look_for(Duration::ZERO).unwrap());
    queue.consumer.set_offline();
    assert_eq!(queue.consumer.look_for(Duration::ZERO), Err(QueueError::Offline));
}

#[test]
fn a_consumer_whose_wait_timed_out_is_told_of_the_next_entry() {
    let mut queue = queue(64);
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    queue.consumer.wait(&line, Duration::from_millis(1)).unwrap_err();
    queue.producer.enqueue(b"1").unwrap();
    assert_eq!(queue.available.take(), 1);
}

#[test]
fn a_new_owner_of_an_end_is_told_although_the_old_one_was_awake() {
    let mut queue = queue(16);
    let ring = queue.producer.ring().clone();
    queue.memory.write_at(9, &[1, 1]); // both old owners were awake when they went
    queue.consumer = Consumer::new(ring.clone(), queue.serviced.clone()).unwrap();
    queue.producer.enqueue(&[0; 4]).unwrap();
    assert_eq!(queue.available.take(), 1);
    queue.producer = Producer::new(ring, queue.available.clone()).unwrap();
    queue.fill();
    queue.dequeue().unwrap();
    assert_eq!(queue.serviced.take(), 1);
}

#[test]
fn a_producer_that_waits_for_room_is_sent_nothing_until_it_was_refused() {
    let mut queue = queue(16);
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    queue.fill();
    queue.dequeue().unwrap();
    assert_eq!(queue.serviced.take(), 1);
    queue.dequeue().unwrap();
    queue.producer.wait_for_room(4, &line, WATCHDOG).unwrap();
    queue.fill();
    queue.dequeue().unwrap();
    assert_eq!(queue.serviced.take(), 1, "it was refused, and may sleep");
}

#[test]
fn a_consumer_that_is_given_entries_by_a_program_without_the_second_line_answers_it() {
    // A producer that knows only head, tail and needServicedCallback.
    let mut queue = queue(64);
    queue.set_word(128, 4);
    queue.set_word(4, 8);
    queue.memory.write_at(8, &[1]);
    assert_eq!(queue.dequeue().unwrap(), [0; 4]);
    assert_eq!(queue.head(), 8);
    assert_eq!(queue.dequeue(), Err(QueueError::Underrun));
    assert_eq!((queue.serviced.take(), queue.need_serviced()), (1, 0));
}

#[test]
fn a_producer_gets_on_with_a_program_without_the_second_line() {
    // A consumer that writes head and needServicedCallback alone.
    let ring = Ring::create(c"test", 32).unwrap();
    let memory = ring.memory().clone();
    let available = Counter::default();
    let mut producer = Producer::new(ring, available.clone()).unwrap();
    for round in 0..100 {
        producer.enqueue(&[round; 4]).unwrap();
        assert_eq!(available.take(), 1, "round {round}");
        producer.enqueue(&[round; 4]).unwrap();
        assert_eq!(available.take(), 0, "round {round}");
        let mut tail = [0; 4];
        memory.read_at(4, &mut tail);
        memory.write_at(0, &tail);
    }
}

// CanEnqueueData.

#[test]
fn asking_for_room_arms_nothing() {
    let mut queue = queue(16);
    queue.producer.enqueue(&[0; 4]).unwrap();
    queue.producer.enqueue(&[0; 4]).unwrap();
    queue.available.take();
    assert_eq!(queue.producer.can_enqueue(4), Err(QueueError::Overrun { size: 4 }));
    assert_eq!(queue.need_serviced(), 0);
    assert_eq!(queue.available.take(), 0);
}

#[test]
fn asking_for_room_for_an_entry_larger_than_the_ring_says_so() {
    let mut queue = queue(16);
    let err = queue.producer.can_enqueue_many(13, 2).unwrap_err();
    assert_eq!(err, QueueError::MessageTooLarge { size: 13, queue_byte_count: 16 });
}

#[test]
fn room_for_several_is_promised_only_if_all_of_them_fit() {
    let mut queue = queue(64);
    assert_eq!(queue.producer.can_enqueue_many(4, 8), Ok(()));
    assert_eq!(queue.producer.can_enqueue_many(4, 9), Err(QueueError::Overrun { size: 4 }));
}

// Peek and dequeue.

#[test]
fn peeking_shows_the_same_entry_twice_and_moves_nothing() {
    let mut queue = queue(16);
    queue.fill();
    assert_eq!(queue.consumer.peek(|entry| entry.to_vec()), Ok(vec![7; 4]));
    assert_eq!(queue.consumer.peek(|entry| entry.to_vec()), Ok(vec![7; 4]));
    assert_eq!(queue.head(), 0);
    assert_eq!((queue.serviced.take(), queue.need_serviced()), (0, 1), "nor is anyone told");
}

#[test]
fn an_empty_queue_answers_underrun_to_peek_and_dequeue() {
    let mut queue = queue(16);
    assert_eq!(queue.consumer.peek(|_| ()), Err(QueueError::Underrun));
    assert_eq!(queue.dequeue(), Err(QueueError::Underrun));
    assert_eq!(queue.serviced.take(), 0);
}

#[test]
fn entries_come_out_in_the_order_they_went_in() {
    let mut queue = queue(64);
    for round in 0..100_u8 {
        queue.producer.enqueue(&[round; 3]).unwrap();
        queue.producer.enqueue(&[round; 9]).unwrap();
        assert_eq!(queue.dequeue().unwrap(), [round; 3]);
        assert_eq!(queue.dequeue().unwrap(), [round; 9]);
    }
}

#[test]
fn the_copying_form_replaces_what_the_buffer_held_and_reuses_its_memory() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"long entry").unwrap();
    queue.producer.enqueue(b"short").unwrap();
    let mut entry = Vec::with_capacity(64);
    let memory = entry.as_ptr();
    queue.consumer.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"long entry");
    queue.consumer.dequeue(&mut entry).unwrap();
    assert_eq!(entry, b"short");
    queue.consumer.dequeue(&mut entry).unwrap_err();
    assert_eq!(entry, b"short", "left alone when there is none");
    assert_eq!(entry.as_ptr(), memory);
}

#[test]
fn the_read_callback_gets_the_unpadded_size_before_the_head_moves() {
    let mut queue = queue(64);
    let memory = queue.memory.clone();
    queue.producer.enqueue(b"hello").unwrap();
    let size = queue
        .consumer
        .dequeue_with(|entry| {
            let mut head = [1; 4];
            memory.read_at(0, &mut head);
            assert_eq!(head, [0; 4]);
            entry.size()
        })
        .unwrap();
    assert_eq!(size, 5);
    assert_eq!(queue.head(), 12);
}

#[test]
fn a_read_callback_that_panics_leaves_the_entry() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"again").unwrap();
    let read = AssertUnwindSafe(|| queue.consumer.dequeue_with(|_| panic!("in the callback")));
    assert!(catch_unwind(read).map(|never: Result<(), _>| never).is_err());
    assert_eq!(queue.dequeue().unwrap(), b"again");
}

#[test]
fn an_entry_shows_no_byte_outside_its_payload() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"hello").unwrap();
    queue
        .consumer
        .dequeue_with(|entry| {
            let mut part = [0; 3];
            entry.read_at(2, &mut part).unwrap();
            assert_eq!(&part, b"llo");
            entry.read_at(3, &mut part).unwrap_err();
            entry.read_at(usize::MAX, &mut part).unwrap_err();
            assert_eq!(&part, b"llo");
        })
        .unwrap();
}

#[test]
fn data_is_available_while_the_indices_differ() {
    let mut queue = queue(64);
    assert!(!queue.consumer.is_data_available());
    queue.producer.enqueue(b"").unwrap();
    assert!(queue.consumer.is_data_available());
    queue.dequeue().unwrap();
    assert!(!queue.consumer.is_data_available());
}

// DataServiced.

#[test]
fn the_first_dequeue_after_an_overrun_notifies_the_producer_and_the_next_does_not() {
    let mut queue = queue(32);
    queue.fill();
    queue.dequeue().unwrap();
    assert_eq!((queue.serviced.take(), queue.need_serviced()), (1, 0));
    queue.dequeue().unwrap();
    assert_eq!(queue.serviced.take(), 0);
}

#[test]
fn the_producer_is_notified_even_if_the_room_is_still_too_small() {
    let mut queue = queue(32);
    queue.fill();
    queue.producer.enqueue(&[0; 20]).unwrap_err();
    queue.dequeue().unwrap();
    assert_eq!(queue.serviced.take(), 1);
    queue.producer.enqueue(&[0; 20]).unwrap_err();
}

#[test]
fn a_coalesced_dequeue_flags_a_waiting_producer_also_on_underrun() {
    let mut queue = queue(16);
    queue.producer.enqueue(&[0; 4]).unwrap();
    queue.dequeue().unwrap();
    // Too large for either side of where the indices stand.
    queue.producer.enqueue(&[0; 8]).unwrap_err();

    let mut send = false;
    let empty = queue.consumer.dequeue_with_coalesce(&mut send, |_| ());
    assert_eq!(empty, Err(QueueError::Underrun));
    assert!(send);
    assert_eq!((queue.serviced.take(), queue.need_serviced()), (0, 1), "not sent yet");
    queue.consumer.send_data_serviced();
    assert_eq!((queue.serviced.take(), queue.need_serviced()), (1, 0));
}

// A peer that breaks the rules.

#[test]
fn indices_outside_the_ring_are_an_error_for_every_operation() {
    for bad in [68, u32::MAX, 2] {
        let mut queue = queue(64);
        queue.set_word(4, bad);
        let index = Corruption::Index { index: Index::Tail, value: bad, queue_byte_count: 64 };
        assert_eq!(queue.consumer.peek(|_| ()), Err(QueueError::Corrupt(index)));
        assert_eq!(queue.dequeue(), Err(QueueError::Corrupt(index)));

        queue.set_word(0, bad);
        let index = Corruption::Index { index: Index::Head, value: bad, queue_byte_count: 64 };
        assert_eq!(queue.producer.can_enqueue(1), Err(QueueError::Corrupt(index)));
        assert_eq!(queue.producer.enqueue(b"x"), Err(QueueError::Corrupt(index)));
        assert_eq!((queue.available.take(), queue.serviced.take()), (0, 0), "nobody is told");

        let ring = queue.producer.ring().clone();
        assert!(Producer::new(ring.clone(), None::<Bell>).is_err());
        assert!(Consumer::new(ring, None::<Bell>).is_err());
    }
}

#[test]
fn a_corrupt_queue_stays_corrupt_when_the_peer_repairs_it() {
    let mut queue = queue(64);
    queue.set_word(4, 2);
    let corrupt = queue.dequeue().unwrap_err();
    queue.set_word(4, 0);
    assert_eq!(queue.dequeue(), Err(corrupt));
    queue.consumer.set_offline();
    assert_eq!(queue.dequeue(), Err(corrupt), "the first reason stays");
}

#[test]
fn a_consumer_that_goes_backwards_or_past_the_tail_is_found_out() {
    for (astray, first) in [(4, 8), (32, 8)] {
        let mut queue = queue(64);
        queue.producer.enqueue(&[0; 4]).unwrap();
        queue.producer.enqueue(&[0; 4]).unwrap();
        queue.dequeue().unwrap();
        queue.producer.can_enqueue(4).unwrap();
        queue.set_word(64, astray + 1);
        let corruption = Corruption::HeadAstray { from: first, to: astray, tail: 16 };
        assert_eq!(queue.producer.can_enqueue(4), Err(corruption.into()));
    }
}

#[test]
fn a_size_that_leads_past_the_tail_is_an_error_and_the_callback_does_not_run() {
    let mut queue = queue(64);
    queue.producer.enqueue(&[0; 4]).unwrap();
    queue.set_word(128, 8);
    let corruption = Corruption::Entry { at: 0, size: 8, head: 0, tail: 8 };
    let refused = queue.consumer.dequeue_with(|_| unreachable!("not an entry"));
    assert_eq!(refused, Err::<(), _>(corruption.into()));
    assert_eq!(queue.head(), 0);
}

#[test]
fn a_peer_that_rewrites_our_index_changes_nothing_for_us() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"1").unwrap();
    queue.set_word(4, 40);
    queue.producer.enqueue(b"2").unwrap();
    assert_eq!(queue.tail(), 16);
    queue.set_word(0, 12);
    queue.set_word(64, 12 + 1);
    assert_eq!(queue.dequeue().unwrap(), b"1");
    assert_eq!(queue.read_to(), 8);
    assert_eq!(queue.dequeue().unwrap(), b"2");
    assert_eq!((queue.head(), queue.read_to()), (16, 16));
}

#[test]
fn an_exact_fit_before_a_guard_page_reads_nothing_past_the_end() {
    // The memory fills whole pages, and `SharedMemory` keeps an inaccessible page behind them.
    let queue_byte_count = 2 * 4096 - 128;
    let mut queue = queue(queue_byte_count);
    let size = queue_byte_count as usize / 2 - 4;
    for _ in 0..10 {
        queue.producer.enqueue(&vec![1; size]).unwrap();
        queue.producer.enqueue(&vec![2; size]).unwrap();
        assert_eq!(queue.tail(), queue_byte_count as u32);
        assert_eq!(queue.dequeue().unwrap(), vec![1; size]);
        assert_eq!(queue.dequeue().unwrap(), vec![2; size]);
        assert_eq!(queue.head(), queue_byte_count as u32);
        assert_eq!(queue.consumer.peek(|_| ()), Err(QueueError::Underrun));
        // The next ones start over at 0, with the head at the very end.
        queue.producer.enqueue(&[3; 8]).unwrap();
        assert_eq!(queue.dequeue().unwrap(), [3; 8]);
        let rest = queue_byte_count as usize / 2 - 12 - 4;
        queue.producer.enqueue(&vec![4; rest]).unwrap();
        queue.dequeue().unwrap();
        queue.producer.enqueue(&vec![5; size]).unwrap();
        queue.dequeue().unwrap();
        assert_eq!(queue.head(), queue_byte_count as u32);
        // And once more to stand at the half, so that the next round fits exactly again.
        let ring = queue.producer.ring().clone();
        queue.set_word(0, 0);
        queue.set_word(4, 0);
        queue.set_word(64, 0);
        queue.producer = Producer::new(ring.clone(), queue.available.clone()).unwrap();
        queue.consumer = Consumer::new(ring, queue.serviced.clone()).unwrap();
    }
}

// Peers that go, and waiting without a dispatch engine.

#[test]
fn an_end_that_was_set_offline_says_so_for_ever() {
    let mut queue = queue(64);
    queue.producer.enqueue(b"left over").unwrap();
    queue.producer.set_offline();
    queue.consumer.set_offline();
    assert_eq!(queue.producer.enqueue(b""), Err(QueueError::Offline));
    assert_eq!(queue.producer.can_enqueue(0), Err(QueueError::Offline));
    assert_eq!(queue.dequeue(), Err(QueueError::Offline));
    assert_eq!(queue.consumer.peek(|_| ()), Err(QueueError::Offline));
}

#[test]
fn waiting_on_an_empty_queue_times_out_and_says_how_long_it_was() {
    let mut queue = queue(64);
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    let err = queue.consumer.wait(&line, Duration::from_millis(1)).unwrap_err();
    assert_eq!(err.to_string(), "nothing came from the other end of the queue within 1ms");
}

#[test]
fn a_waiting_consumer_gets_what_was_published_before_its_peer_went_and_then_offline() {
    let mut queue = queue(64);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Some(Peer::Connection(ours.into()));
    let line = Doorway::new(Bell::new().unwrap(), peer).unwrap();
    queue.producer.enqueue(b"last").unwrap();
    drop(theirs);
    queue.consumer.wait(&line, WATCHDOG).unwrap();
    assert_eq!(queue.dequeue().unwrap(), b"last");
    let err = queue.consumer.wait(&line, WATCHDOG).unwrap_err();
    assert!(matches!(err, WaitError::Queue(QueueError::Offline)));
    assert_eq!(queue.dequeue(), Err(QueueError::Offline));
}

#[test]
fn a_producer_that_waits_for_room_learns_that_its_peer_went() {
    let mut queue = queue(16);
    queue.fill();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Some(Peer::Connection(ours.into()));
    let line = Doorway::new(Bell::new().unwrap(), peer).unwrap();
    drop(theirs);
    let err = queue.producer.wait_for_room(4, &line, WATCHDOG).unwrap_err();
    assert!(matches!(err, WaitError::Queue(QueueError::Offline)));
    assert_eq!(queue.producer.enqueue(&[0; 4]), Err(QueueError::Offline));
}

#[test]
fn a_producer_does_not_wait_for_room_that_can_never_come() {
    let mut queue = queue(16);
    queue.producer.enqueue(&[0; 4]).unwrap();
    queue.dequeue().unwrap();
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    // Empty, and refused all the same: nothing that the consumer does will help.
    let err = queue.producer.wait_for_room(8, &line, WATCHDOG).unwrap_err();
    let too_large = QueueError::MessageTooLarge { size: 8, queue_byte_count: 16 };
    assert!(matches!(err, WaitError::Queue(err) if err == too_large));
}

#[test]
fn a_producer_that_waits_is_woken_by_a_consumer_that_finds_nothing_left() {
    let mut queue = queue(16);
    queue.fill();
    let line = Doorway::new(Bell::new().unwrap(), None).unwrap();
    queue.dequeue().unwrap();
    queue.dequeue().unwrap();
    queue.serviced.take();
    queue.producer.enqueue(&[0; 8]).unwrap();
    queue.producer.enqueue(&[0; 8]).unwrap_err();
    queue.dequeue().unwrap();
    queue.producer.enqueue(&[0; 8]).unwrap_err();
    queue.serviced.take();
    queue.consumer.wait(&line, Duration::ZERO).unwrap_err();
    assert_eq!(queue.serviced.take(), 1);
}
