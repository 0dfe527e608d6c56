//! What the daemon knows of a driver host that dies, and what it does about that beside starting
//! the next one: it looks for hangs, writes the crash report, and runs the operator's hook.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use iohost_control::crash::{
    CrashReport, DeathReason, Decision, Event, InFlight, QueueEvents, Stage,
};
use iohost_control::host::{Failure, Quiesced};
use iohost_event::{TickRate, ticks};
use iohost_interface::Description;
use iohost_memory::flight_recorder::{
    self as recorder, CallStage, Kind, LaneRemains, Recorder, Remains,
};
use log::{debug, info, warn};

use super::Actor;
use crate::driver_process::Exit;
use crate::hang::{Hang, HangWatch, Verdict};
use crate::hooks::Call;
use crate::restart::RestartPolicy;
use crate::service::{Service, Session, State};

/// Events of each queue in a report, and queues in it.
const MOST_EVENTS: usize = 16;
const MOST_QUEUES: usize = 24;

/// What is left of a driver host that has ended.
#[derive(Debug)]
pub(crate) struct Evidence {
    pid: u32,
    exit: Exit,
    /// The daemon killed it.
    was_killed: bool,
    remains: Option<Remains>,
    /// Ticks when it was found dead.
    now: u64,
    names: MethodNames,
    device_before: Option<Quiesced>,
    device_after: Option<Quiesced>,
}

/// What the calls of a driver host's sessions are called: each kind of client has an interface.
#[derive(Debug, Default)]
struct MethodNames {
    interfaces: Vec<Description>,
    /// The interface of each session, by its number.
    of_session: BTreeMap<u64, usize>,
}

impl MethodNames {
    fn new(interfaces: &[Description], sessions: &BTreeMap<u64, Session>) -> Self {
        let of_session =
            sessions.iter().map(|(number, session)| (*number, session.memory.client_type()));
        Self { interfaces: interfaces.to_vec(), of_session: of_session.collect() }
    }

    /// The name in the interface, or the number where there is none, or the session has been closed
    /// and could have been of any.
    fn method(&self, session: u64, selector: u64) -> String {
        let interface = match self.of_session.get(&session) {
            Some(kind) => self.interfaces.get(*kind),
            None if self.interfaces.len() == 1 => self.interfaces.first(),
            None => None,
        };
        let methods = interface.into_iter().flat_map(|interface| &interface.methods);
        let mut named = methods.filter(|method| method.selector == selector);
        named.next().map_or_else(|| format!("method {selector}"), |method| method.name.clone())
    }
}

impl Actor {
    /// What holds for a service's device.
    pub(super) fn policy(&self, at: usize) -> RestartPolicy {
        let choices = &self.services[at].device.restart;
        self.options.restart.with(&self.config.restart).with(choices)
    }

    /// The driver runs: from here on it can hang.
    pub(super) fn watch_for_hangs(&mut self, at: usize) {
        let policy = self.policy(at);
        let Some(host) = self.services[at].host_mut() else { return };
        host.watch = HangWatch::new(policy.hang, policy.hang_cap, Instant::now());
        if let Some(recorder) = &host.recorder {
            // Without a watch nobody need ring, either.
            recorder.watch();
        }
    }

    /// A queue of a driver host began to work while nobody looked.
    pub(super) fn has_work(&mut self, number: u64) {
        let Some(at) = self.with_host(number) else { return };
        let now = Instant::now();
        let watch = self.services[at].host_mut().and_then(|host| host.watch.as_mut());
        watch.into_iter().for_each(|watch| watch.rung(now));
    }

    /// Some child of ours was stopped, goes on, or has ended.
    pub(super) fn look_at_children(&mut self) {
        let mut bytes = [0; 64];
        while matches!(std::io::Read::read(&mut self.children, &mut bytes), Ok(1..)) {}
        let now = Instant::now();
        for service in &mut self.services {
            let Some(host) = service.host_mut() else { continue };
            if host.process.is_stopped() {
                host.watch.iter_mut().for_each(|watch| watch.rung(now));
            }
        }
    }

    /// Looks whether a driver hangs, if that is due.
    pub(super) fn look_for_hang(&mut self, at: usize, now: Instant) {
        let Service { state, sessions, .. } = &mut self.services[at];
        let State::Running { host, ready, interfaces, .. } = state else { return };
        let (Some(watch), Some(recorder)) = (&mut host.watch, &host.recorder) else { return };
        if host.killed || watch.next().is_none_or(|next| next > now) {
            return;
        }
        let hang = match watch.look(now, &recorder.look(), host.process.is_stopped()) {
            Verdict::Work => return recorder.watch(),
            Verdict::Resting => return recorder.rest(),
            Verdict::AtRest => return,
            Verdict::Hung(hang) => hang,
        };
        let names = MethodNames::new(interfaces, sessions);
        let what = |lane| in_the_middle_of(recorder, lane, &names);
        let how = match hang {
            Hang::Quiet(lane, time) => {
                format!("queue {:?} is in {} for {time:?}", recorder.name(lane), what(lane))
            }
            Hang::Stuck(lane, time) => format!(
                "queue {:?} is in {} for {time:?}, which is the most however much progress it \
                 reports",
                recorder.name(lane),
                what(lane)
            ),
            Hang::Stopped(time) => format!("its process was stopped by a signal {time:?} ago"),
        };
        let failure = Failure::new(
            "driver-hung",
            format!("driver {:?} hangs: {how}", ready.driver),
            "find out what it waits for (iohost crashes show N); a driver that works that long on \
             purpose calls report_progress, or gets more time by hang_seconds",
        );
        self.condemn(at, failure);
    }

    /// Keeps what is left of a driver host that has ended. Before the service forgets it.
    pub(super) fn keep_evidence(&mut self, at: usize, exit: Exit) {
        let service = &mut self.services[at];
        let names = match &service.state {
            State::Running { interfaces, .. } => MethodNames::new(interfaces, &service.sessions),
            _ => MethodNames::default(),
        };
        let Some(host) = service.host_mut() else { return };
        let evidence = Evidence {
            pid: host.process.pid(),
            exit,
            was_killed: host.killed,
            remains: host.recorder.as_ref().map(|recorder| recorder.remains(MOST_EVENTS)),
            now: ticks(),
            names,
            device_before: host.device_before.take(),
            device_after: host.device_after.take(),
        };
        service.evidence = Some(evidence);
    }

    /// Writes down the death of a service's driver host, and tells the operator's hook.
    pub(super) fn report(&mut self, at: usize, why: &Failure, decision: Decision) {
        let evidence = self.services[at].evidence.take();
        let reason = self.reason(why, evidence.as_ref());
        let number = self.crashes.number();
        let service = &self.services[at];
        let report = report(service, number, reason, why, decision, evidence, self.ticks.rate());
        info!(
            device = report.device, crash = number, reason = reason.name(),
            decision = decision.name(); "crash report: iohost crashes show {number}"
        );
        let policy = self.policy(at);
        if let Some(program) = policy.hook {
            self.hooks.call(Call {
                program,
                limit: policy.hook_limit,
                device: report.device.clone(),
                driver: report.driver.clone(),
                reason,
                incarnation: report.incarnation,
                decision,
                message: report.message.clone(),
                report: number,
            });
        }
        self.crashes.write(report.clone());
        // What becomes of the device is known later, where nobody has seen to it yet.
        self.services[at].unfinished_report = report.device_after.is_none().then_some(report);
    }

    fn reason(&mut self, why: &Failure, evidence: Option<&Evidence>) -> DeathReason {
        if let Some(reason) = DeathReason::of_code(&why.code) {
            return reason;
        }
        match evidence {
            // The count is read once for each such death, so that it stands for that one.
            Some(Evidence { exit, was_killed: false, .. }) if exit.is_sigkill() => {
                match self.memory_events.has_killed() {
                    true => DeathReason::OutOfMemory,
                    false => DeathReason::Signal,
                }
            }
            Some(Evidence { exit, .. }) if exit.signal.is_some() => DeathReason::Signal,
            _ => DeathReason::Exit,
        }
    }

    /// It is known what became of the device.
    pub(super) fn finish_report(&mut self, at: usize, quiesced: &Quiesced) {
        let service = &mut self.services[at];
        if let Some(mut report) = service.unfinished_report.take() {
            report.device_after = Some(quiesced.clone());
            debug!(device = service.device.name, crash = report.number; "crash report complete");
            self.crashes.write(report);
        }
        let service = &mut self.services[at];
        if let Some(host) = service.host_mut() {
            let place = match host.device_before {
                None => &mut host.device_before,
                Some(_) => &mut host.device_after,
            };
            *place = Some(quiesced.clone());
        }
    }
}

fn report(
    service: &Service,
    number: u64,
    reason: DeathReason,
    why: &Failure,
    decision: Decision,
    evidence: Option<Evidence>,
    rate: TickRate,
) -> CrashReport {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut report = CrashReport {
        number,
        time: now.map_or(0, |time| time.as_secs()),
        device: service.device.name.clone(),
        location: service.device.location.to_string(),
        driver: service.driver.clone().unwrap_or_default(),
        incarnation: service.incarnation,
        pid: 0,
        reason,
        message: why.message.clone(),
        ended: "nothing is known of its process".to_owned(),
        decision,
        panic: None,
        device_before: None,
        device_after: None,
        in_flight: Vec::new(),
        in_flight_left_out: 0,
        queues: Vec::new(),
    };
    let Some(evidence) = evidence else { return report };
    if reason == DeathReason::OutOfMemory {
        report.message += ", by the kernel for want of memory";
    }
    report.pid = evidence.pid;
    report.ended = evidence.exit.words;
    report.device_before = evidence.device_before;
    report.device_after = evidence.device_after;
    let Some(remains) = evidence.remains else {
        warn!(device = report.device; "nothing was recorded of this driver host");
        return report;
    };
    let names = &evidence.names;
    let age_us = |ticks: u64| rate.ns(evidence.now.saturating_sub(ticks)) / 1000;
    report.panic = remains.panic;
    report.in_flight_left_out = remains.calls_left_out;
    let in_flight = |call: &recorder::OpenCall| InFlight {
        session: call.session,
        method: names.method(call.session, call.selector),
        stage: match call.stage {
            CallStage::Queued => Stage::Queued,
            CallStage::Running => Stage::Running,
            CallStage::Taken => Stage::Taken,
        },
        age_us: age_us(call.ticks),
        fate: match call.stage {
            CallStage::Queued => "not begun: the next driver host gets it, if there is one",
            CallStage::Running | CallStage::Taken => {
                "begun: the next driver host gets it if its method is idempotent, else its client \
                 was told NO_COMPLETION"
            }
        }
        .to_owned(),
    };
    report.in_flight = remains.calls.iter().map(in_flight).collect();
    let mut lanes = remains.lanes;
    let latest = |lane: &LaneRemains| lane.events.last().map_or(0, |event| event.ticks);
    lanes.sort_by_key(|lane| (!lane.pulse.is_at_work, u64::MAX - latest(lane)));
    let queue = |lane: LaneRemains| QueueEvents {
        doing: lane.pulse.is_at_work.then(|| match &lane.doing {
            Some(event) => in_words(event, names),
            None => SOME_WORK.to_owned(),
        }),
        executed: lane.pulse.done,
        events: lane
            .events
            .iter()
            .map(|event| Event { age_us: age_us(event.ticks), what: in_words(event, names) })
            .collect(),
        queue: lane.name,
    };
    report.queues = lanes.into_iter().take(MOST_QUEUES).map(queue).collect();
    report
}

/// What a queue is in where that is no event.
const SOME_WORK: &str = "work that was put on it";

fn in_the_middle_of(recorder: &Recorder, lane: usize, names: &MethodNames) -> String {
    match recorder.doing(lane) {
        Some(event) => in_words(&event, names),
        None => SOME_WORK.to_owned(),
    }
}

/// An event for people. It comes from memory that the driver could write, so any number is one.
fn in_words(event: &recorder::Event, names: &MethodNames) -> String {
    let (first, second) = (event.first, event.second);
    match Kind::of(event.kind) {
        Some(Kind::Turn) if first == 1 => "ran what was put on it".to_owned(),
        Some(Kind::Turn) => format!("ran what was put on it, {first} times in a row"),
        Some(Kind::Interrupt) => format!("the handler of an interrupt, count {first}"),
        Some(Kind::Timer) => "the handler of a timer".to_owned(),
        Some(Kind::Bell) => "the handler of a data queue".to_owned(),
        Some(Kind::Call) => format!("call {} of session {first}", names.method(first, second)),
        Some(Kind::Answer) => {
            format!("answered call {} of session {first}", names.method(first, second))
        }
        Some(Kind::SessionOpened) => format!("session {first} opened"),
        Some(Kind::SessionClosed) => format!("session {first} closed"),
        Some(Kind::Device) => match first {
            1 => "the device reported an error".to_owned(),
            2 => "somebody wants the device back".to_owned(),
            3 => "the device is gone".to_owned(),
            other => format!("event {other} of the device"),
        },
        Some(Kind::Start) => "the driver's start".to_owned(),
        Some(Kind::Stop) => "the driver's stop".to_owned(),
        None => format!("an event of no known kind ({}, {first}, {second})", event.kind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_has_the_name_of_its_sessions_interface() {
        let interface = |method: &str| {
            Description::parse(&format!("interface i\nmethod 1 {method}() -> ()\n")).unwrap()
        };
        let names = MethodNames {
            interfaces: vec![interface("read"), interface("format")],
            of_session: BTreeMap::from([(7, 0), (8, 1), (9, 2)]),
        };
        let of = |session| names.method(session, 1);
        assert_eq!((of(7), of(8)), ("read".to_owned(), "format".to_owned()));
        assert_eq!(of(9), "method 1", "a kind that the driver does not have");
        assert_eq!(of(10), "method 1", "a session that nobody knows any more");
        assert_eq!(names.method(7, 2), "method 2");
    }
}
