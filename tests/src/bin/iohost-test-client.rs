//! A client that a test can kill: it opens a session with a service that runs the probe driver,
//! exchanges actions with it, says `ready`, and waits for its end.
//!
//! Arguments: the control socket, the service. It passes one action and takes two.

use std::error::Error;
use std::io::Read;

use iohost_client::{Daemon, OSAction};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("no control socket was given")?;
    let service = arguments.next().ok_or("no service was given")?;

    let session = Daemon::connect(socket)?.open(&service)?;
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
