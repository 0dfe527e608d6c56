//! A client that a test can kill. Arguments: the control socket, the service.
//!
//! It opens a session with a service that runs the probe driver, exchanges actions with it (it
//! passes one and takes two), says `ready`, and waits for its end. With a third argument, `stream`,
//! the service runs the `edu` driver, and entries go through it, both ways, until the end.

use std::error::Error;
use std::io::Read;
use std::thread;

use iohost_client::{Daemon, OSAction, Session};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("no control socket was given")?;
    let service = arguments.next().ok_or("no service was given")?;

    let session = Daemon::connect(socket)?.open(&service)?;
    if arguments.next().is_some_and(|word| word == "stream") {
        return stream(&session);
    }
    let probe = session.client::<probe_api::Client>()?;
    let own = OSAction::create()?;
    probe.subscribe(own.handle()).wait()?;
    let theirs = [probe.offer().wait()?, probe.offer().wait()?];
    for action in &theirs {
        action.invoke(7)?;
    }
    // The driver keeps something of the session when we are gone.
    let _unanswered = probe.hold();
    println!("ready");

    // Until it is killed, or told to leave in order by the end of its input.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn stream(session: &Session) -> Result<(), Box<dyn Error>> {
    let mut upload = session.producer(edu_api::UPLOAD)?;
    let mut download = session.consumer(edu_api::DOWNLOAD)?;
    let sending = thread::spawn(move || -> Result<(), iohost_client::WaitError> {
        loop {
            upload.send(&[7; 100])?;
        }
    });
    let mut entry = Vec::new();
    while !sending.is_finished() {
        download.receive(&mut entry)?;
    }
    sending.join().map_err(|_| "the sending thread panicked")??;
    Ok(())
}
