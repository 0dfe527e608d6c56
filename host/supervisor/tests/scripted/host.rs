//! A driver host that does what the name of its plugin says, for tests of the daemon; and, with
//! the argument `daemon`, the daemon itself with short patience and such driver hosts.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use iohost_control::host::{
    DeviceEvent, Failure, FromHost, HandedOver, LONGEST_MESSAGE, MOST_DESCRIPTORS, OpenSession,
    Outcome, Quiesced, Ready, StartDescriptors, ToHost,
};
use iohost_control::plugin::{Needs, Personality, PluginInfo};
use iohost_event::{PacketListener, Packets};
use iohost_interface::packet::{self, FromClient, ReplyPacket, encode_resumed};
use iohost_memory::ring::{Bell, Consumer, Doorway, Ledger, Peer, Producer, Ring};
use iohost_pci::Sysfs;
use iohost_supervisor::{DaemonError, Options, Patience, RestartPolicy};

const INTERFACE: &str = "interface scripted\nmethod 0 echo(u32) -> (u32)\nmethod 1 exit() -> ()\n\
                         queue 0 upload ToDriver\nqueue 1 download ToClient\n";

/// The daemon that took the driver host over last.
static NOW: Mutex<Option<Arc<Packets>>> = Mutex::new(None);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments[0] == "daemon" {
        return daemon(PathBuf::from(&arguments[1]));
    }
    let daemon = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut daemon = Arc::new(Packets::from(daemon));
    let Some((ToHost::Start(start), fds)) = receive(&daemon) else { panic!("no Start") };
    let beside = StartDescriptors::from_order(fds).unwrap();
    let listener = PacketListener::from(beside.listener);
    let recorder = [beside.memory, beside.bell];
    let mut kept: Vec<(OpenSession, Vec<OwnedFd>)> = Vec::new();
    let Some(plugin) = start.plugin else {
        quiesced(&daemon, Outcome::Clean);
        while let Some((message, _)) = receive(&daemon) {
            if message == ToHost::Stop {
                return send(&daemon, &FromHost::Stopped);
            }
        }
        return;
    };
    let script = std::path::Path::new(&plugin).file_stem().unwrap().to_str().unwrap().to_owned();
    // Behind "edu-NUMBER-" stands what it does.
    let name = script;
    let script = name.split('-').nth(2).filter(|_| name.starts_with("edu-")).unwrap_or(&name);
    let later = start.incarnation > 1;
    match script {
        "hang" => sleep(),
        "exit" => std::process::exit(3),
        "garbage" => daemon.send(b"{\"ready\":", &[]).unwrap(),
        "long" => drop(daemon.send(&vec![b' '; LONGEST_MESSAGE + 1], &[])),
        "refuse" => {
            let failure = Failure::new("no-device", "there is no device", "plug it in");
            return send(&daemon, &FromHost::Failed(failure));
        }
        "unfit" => {
            quiesced(&daemon, Outcome::Quarantined);
            let failure = Failure::new("device-quarantined", "it is broken", "mend it");
            return send(&daemon, &FromHost::Failed(failure));
        }
        "decline" => {
            let failure =
                Failure::new("driver-start", format!("not for {name}"), "give it another");
            return send(&daemon, &FromHost::Failed(failure));
        }
        "unasked" => send(&daemon, &FromHost::Stopped),
        "once" if later => std::process::exit(4),
        "recover" if !later => std::process::exit(4),
        _ => {}
    }
    quiesced(&daemon, Outcome::Reset);
    send(&daemon, &FromHost::Ready(ready(&name, script, later)));
    loop {
        let Some((message, fds)) = receive(&daemon) else {
            match script {
                "stay-silent" => sleep(),
                _ if script.starts_with("stay") => {
                    daemon = Arc::new(listener.accept().unwrap());
                    *NOW.lock().unwrap() = Some(daemon.clone());
                }
                _ => return,
            }
            continue;
        };
        match message {
            // Asked for its properties, the shy one shows itself.
            ToHost::QueryProperties => {
                send(&daemon, &FromHost::Registered);
                send(&daemon, &FromHost::Properties { text: "[]".into() });
            }
            ToHost::HandOver if script == "stay-garbage" => {
                let _ = daemon.send(b"{", &[]);
            }
            ToHost::HandOver => {
                let (quiesced, told) = (None, None);
                let message = FromHost::HandedOver(HandedOver { quiesced, told });
                let mut fds = recorder.each_ref().map(AsFd::as_fd);
                if script == "stay-blind" {
                    fds.reverse();
                }
                // A daemon that has found a lie does not listen any more.
                let _ = daemon.send(&serde_json::to_vec(&message).unwrap(), &fds);
                for (open, fds) in &kept {
                    // Another file in the place of the last queue's memory, or one session twice.
                    let mut fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    if script == "stay-lies" {
                        fds[5] = fds[1];
                    }
                    let message = serde_json::to_vec(&FromHost::HandedSession(open.clone()));
                    for _ in 0..if script == "stay-doubles" { 2 } else { 1 } {
                        let _ = daemon.send(message.as_ref().unwrap(), &fds);
                    }
                }
                let text =
                    serde_json::to_vec(&FromHost::Ready(ready(&name, script, later))).unwrap();
                let _ = daemon.send(&text, &[]);
            }
            ToHost::OpenSession(_) if script == "deaf" => {}
            ToHost::OpenSession(OpenSession { session, generation: 2.., .. })
                if script == "choosy" =>
            {
                let reason = "not this one".into();
                send(&daemon, &FromHost::SessionClosed { session, reason });
            }
            ToHost::OpenSession(open) => {
                let copies = fds.iter().map(|fd| fd.try_clone().unwrap());
                kept.push((open.clone(), copies.collect()));
                let daemon = daemon.clone();
                thread::spawn(move || serve(&daemon, &open, fds));
            }
            ToHost::Stop | ToHost::LetGo | ToHost::Drain { .. } if script.ends_with("stubborn") => {
                sleep()
            }
            ToHost::Stop | ToHost::Drain { .. } => {
                let broken = script.ends_with("breaks");
                quiesced(&daemon, if broken { Outcome::Quarantined } else { Outcome::Reset });
                return send(&daemon, &FromHost::Stopped);
            }
            ToHost::LetGo => return send(&daemon, &FromHost::Stopped),
            ToHost::Start(_)
            | ToHost::ServiceBegan(_)
            | ToHost::ServiceEnded { .. }
            | ToHost::CloseSession { .. }
            | ToHost::Query
            | ToHost::SetPower { .. } => {}
        }
    }
}

fn ready(name: &str, script: &str, later: bool) -> Ready {
    let interface = match script {
        "changes" if later => INTERFACE.replace("method 1", "method 9"),
        _ => INTERFACE.into(),
    };
    Ready {
        driver: name.to_owned(),
        backend: "scripted".into(),
        reset: "done".into(),
        interface,
        further_interfaces: Vec::new(),
        is_registered: script != "shy",
        sandbox: None,
    }
}

fn daemon(config: PathBuf) {
    iohost_control::log_lines::start(log::LevelFilter::Debug, None);
    let moment = Duration::from_secs(3);
    let options = Options {
        config: Some(config.clone()),
        runtime_directory: None,
        driver_directory: None,
        driver_host: std::env::current_exe().unwrap(),
        inspect,
        sysfs: Sysfs::at(config.with_file_name("sys")),
        restart: RestartPolicy {
            most: 2,
            pause: Duration::from_millis(1),
            ..RestartPolicy::default()
        },
        patience: Patience {
            start: moment,
            stop: moment,
            removal: Duration::from_secs(1),
            session: moment,
            drain: moment,
        },
    };
    if let Err(err) = iohost_supervisor::run(&options) {
        let Failure { code, message, next } = err.failure();
        eprintln!("{code}: {message}\n  next: {next}");
        std::process::exit(if matches!(err, DaemonError::Config(_)) { 2 } else { 1 });
    }
}

/// A plugin is a file with anything but "broken" in it, named as the file is.
fn inspect(file: &Path) -> Result<PluginInfo, Failure> {
    if std::fs::read(file).unwrap() == b"broken" {
        return Err(Failure::new("plugin-abi", "this plugin is for another iohost", "rebuild it"));
    }
    let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
    // "edu" is for that device, and so are "edu-NUMBER-…", which think as much more of themselves.
    let score = match name.split('-').collect::<Vec<_>>().as_slice() {
        ["edu"] => Some(0),
        ["edu", number, ..] => number.parse().ok(),
        _ => None,
    };
    let edu = |score| Personality { score, ..Personality::pci(0x1234, 0x11e8) };
    let personalities = score.map(edu).into_iter().collect();
    Ok(PluginInfo { name, category: String::new(), personalities, needs: Needs::default() })
}

fn sleep() -> ! {
    loop {
        thread::park_timeout(Duration::from_secs(3600));
    }
}

/// Answers calls, and sends what comes through the first queue back through the second.
fn serve(daemon: &Packets, open: &OpenSession, fds: Vec<OwnedFd>) {
    let mut fds = fds.into_iter();
    let socket = Packets::from(fds.next().unwrap());
    let ledger = Ledger::attach(fds.next().unwrap()).unwrap();
    let hang_up = socket.as_fd().try_clone_to_owned().unwrap();
    let rings: Vec<(Ring, Bell, Bell)> = open
        .queues
        .iter()
        .map(|queue| {
            let ring = Ring::attach(fds.next().unwrap(), u64::from(queue.bytes)).unwrap();
            (ring, fds.next().unwrap().into(), fds.next().unwrap().into())
        })
        .collect();
    thread::spawn(move || echo(rings, hang_up));
    send(daemon, &FromHost::SessionOpened { session: open.session });

    let mut buffer = vec![0; packet::LONGEST];
    if open.generation > 1 {
        let generation = open.generation;
        socket.send(&encode_resumed(generation), &[]).unwrap();
        loop {
            let Ok(packet) = socket.receive(&mut buffer, 1) else { break };
            let packet = FromClient::decode(&buffer[..packet.len]).unwrap();
            if packet == (FromClient::Resumed { generation }) {
                break;
            }
        }
    }
    while let Ok(packet) = socket.receive(&mut buffer, 0) {
        // A client that closes its session says goodbye first.
        let Ok(FromClient::Call(call)) = FromClient::decode(&buffer[..packet.len]) else { break };
        ledger.begin(call.id);
        match call.selector {
            1 => std::process::exit(5),
            2 => {
                let events = [DeviceEvent::Error, DeviceEvent::RemovalRequested, DeviceEvent::Gone];
                let event = events[call.arguments.scalars[0] as usize];
                send(daemon, &FromHost::DeviceEvent(event));
            }
            _ => {}
        }
        let reply = ReplyPacket { id: call.id, answer: Ok(call.arguments) };
        socket.send(&reply.encode(), &[]).unwrap();
    }
    let closed = FromHost::SessionClosed { session: open.session, reason: String::new() };
    let now = NOW.lock().unwrap();
    let now = now.as_deref().unwrap_or(daemon);
    // It may be gone.
    let _ = now.send(&serde_json::to_vec(&closed).unwrap(), &[]);
}

fn echo(rings: Vec<(Ring, Bell, Bell)>, hang_up: OwnedFd) {
    let [(up, up_available, up_serviced), (down, down_available, down_serviced)] =
        <[_; 2]>::try_from(rings).unwrap();
    let peer = || Some(Peer::Connection(hang_up.try_clone().unwrap()));
    let available = Doorway::new(up_available, peer()).unwrap();
    let serviced = Doorway::new(down_serviced, peer()).unwrap();
    let mut upload = Consumer::new(up, up_serviced).unwrap();
    let mut download = Producer::new(down, down_available).unwrap();
    let mut entry = Vec::new();
    while upload.wait(&available, Duration::MAX).is_ok() {
        while upload.dequeue(&mut entry).is_ok() {
            while download.enqueue(&entry).is_err() {
                if download.wait_for_room(entry.len(), &serviced, Duration::MAX).is_err() {
                    return;
                }
            }
        }
    }
}

fn quiesced(daemon: &Packets, outcome: Outcome) {
    let how = "as the script says".to_owned();
    let (found, left) = (String::new(), String::new());
    send(daemon, &FromHost::Quiesced(Quiesced { outcome, how, found, left }));
}

fn send(daemon: &Packets, message: &FromHost) {
    daemon.send(&serde_json::to_vec(message).unwrap(), &[]).unwrap();
}

fn receive(daemon: &Packets) -> Option<(ToHost, Vec<OwnedFd>)> {
    let mut buffer = vec![0; LONGEST_MESSAGE];
    let packet = daemon.receive(&mut buffer, MOST_DESCRIPTORS).ok()?;
    Some((serde_json::from_slice(&buffer[..packet.len]).unwrap(), packet.fds))
}
