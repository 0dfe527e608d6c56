//! A peer that writes anything anywhere at any time, in both roles.
//!
//! Half of the steps are programs ([`program`](crate::program)): an attacker's writes between the
//! operations of both ends, inside their callbacks and while they sleep. A program that leads to an
//! outcome not seen before is kept and changed further; those that a former run kept are the corpus,
//! in `corpus/` beside this crate. In the other half a thread writes all the while, so that values
//! change between two reads of one operation as well. There is an inaccessible page behind the ring.
//!
//! A failure leaves the program behind; `--replay` does it again.

use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use iohost_memory::SharedMemory;

use crate::program::{CAPACITIES, Program, Write};
use crate::victim::{Outcome, Victim};
use crate::{AttackOptions, PROGRESS, watch_for_hangs};

/// What runs now, for whoever finds that it never ends.
static CURRENT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Where a program is left that broke something.
const FAILED: &str = "queue-stress-failed.bin";

/// Programs that are kept and changed, at the most.
const POOL: usize = 1024;

/// Programs in a row with one attacking thread.
const PROGRAMS_PER_STORM: usize = 2000;

/// Something that was seen: the ring, the step, its outcome and the outcome before it.
type Feature = (usize, u8, Outcome, Outcome);

/// What came of it, to show that the attack did not just end everything at once.
#[derive(Default)]
struct Tally {
    steps: u64,
    /// By outcome, see `victim::number`.
    outcomes: [u64; 10],
}

pub fn run(options: &AttackOptions) -> Result<(), String> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("attack: seed {seed}");
    watch_for_hangs(move || {
        leave_behind();
        format!("seed {seed}; the program is in {FAILED}")
    });
    let done = catch_unwind(AssertUnwindSafe(|| attack(options, seed)));
    done.unwrap_or_else(|_| {
        leave_behind();
        Err(format!("seed {seed}; run it again with: attack --replay {FAILED}"))
    })
}

fn attack(options: &AttackOptions, seed: u64) -> Result<(), String> {
    let mut victims = victims()?;
    let mut tally = Tally::default();
    let mut seen = HashSet::new();
    if let Some(path) = &options.replay {
        let bytes = fs::read(path).map_err(|err| format!("{}: {err}", path.display()))?;
        run_program(&Program::from_bytes(bytes), &mut victims, &mut tally, &mut seen);
        println!("attack: {} steps of {} without a fault", tally.steps, path.display());
        return Ok(());
    }

    let corpus = read_corpus()?;
    let started = Instant::now();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pool = corpus.clone();
    for program in &corpus {
        run_program(program, &mut victims, &mut tally, &mut seen);
    }
    let known = seen.len();
    while tally.steps < options.steps / 2 {
        let program = match random.choice(&pool) {
            Some(program) if random.u8(..8) > 0 => {
                program.mutated(random.choice(&pool).expect("not empty"), &mut random)
            }
            _ => Program::random(&mut random),
        };
        let is_new = run_program(&program, &mut victims, &mut tally, &mut seen);
        if is_new && pool.len() < POOL {
            pool.push(program);
        }
    }
    let new = seen.len() - known;
    if options.grow {
        write_corpus(&pool, &mut victims)?;
    }
    let mut under_storm = Tally::default();
    let mut writes = 0;
    while under_storm.steps < options.steps.saturating_sub(tally.steps) {
        writes += storm(&pool, &mut victims, &mut under_storm, &mut random)?;
    }

    println!(
        "attack: {} programs of the corpus lead to {known} outcomes, the others to {new} more",
        corpus.len()
    );
    println!("attack: {} steps one by one: {tally}", tally.steps);
    println!(
        "attack: {} steps among {writes} writes of a thread: {under_storm}",
        under_storm.steps
    );
    println!("attack: {:.1?}, no fault", started.elapsed());
    // A run in which nothing ever worked, or nothing was ever found out, proves nothing.
    let hollow = |tally: &Tally| tally.outcomes[1..=8].contains(&0);
    if options.steps >= 1_000_000 && (hollow(&tally) || hollow(&under_storm)) {
        return Err("some outcome never came about: not a worthwhile attack".to_owned());
    }
    Ok(())
}

fn victims() -> Result<Vec<Victim>, String> {
    CAPACITIES.iter().map(|size| Victim::new(*size).map_err(|err| err.to_string())).collect()
}

/// Whether it did something new.
fn run_program(
    program: &Program,
    victims: &mut [Victim],
    tally: &mut Tally,
    seen: &mut HashSet<Feature>,
) -> bool {
    program.bytes().clone_into(&mut CURRENT.lock().expect("nobody panics with it"));
    let victim = &mut victims[program.capacity()];
    victim.reset(true);
    let (mut before, mut is_new) = (0, false);
    for step in program.steps() {
        let (kind, outcome) = victim.step(step);
        tally.count(outcome);
        if outcome != 0 {
            is_new |= seen.insert((program.capacity(), kind, outcome, before));
            before = outcome;
        }
    }
    PROGRESS.fetch_add(1, Relaxed);
    is_new
}

/// Some programs while a thread writes into the same memory. How often it wrote.
fn storm(
    pool: &[Program],
    victims: &mut [Victim],
    tally: &mut Tally,
    random: &mut fastrand::Rng,
) -> Result<u64, String> {
    let target = random.usize(..CAPACITIES.len());
    let victim = &mut victims[target];
    let memory = victim.second_mapping().map_err(|err| err.to_string())?;
    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let raging = {
        let (stop, writes, seed) = (stop.clone(), writes.clone(), random.u64(..));
        thread::spawn(move || rage(&memory, CAPACITIES[target], seed, &stop, &writes))
    };
    while writes.load(Relaxed) == 0 {
        thread::yield_now();
    }
    victim.reset(false);
    for _ in 0..PROGRAMS_PER_STORM {
        let program = match random.choice(pool) {
            Some(program) => program.mutated(program, random),
            None => Program::random(random),
        };
        program.bytes().clone_into(&mut CURRENT.lock().expect("nobody panics with it"));
        for step in program.steps() {
            let (_, outcome) = victim.step(step);
            tally.count(outcome);
        }
        // What one program ended, the next one begins anew, over whatever is there.
        victim.operate(35, [0; 3]);
        PROGRESS.fetch_add(1, Relaxed);
    }
    stop.store(true, Relaxed);
    raging.join().map_err(|_| "the attacking thread panicked".to_owned())?;
    Ok(writes.load(Relaxed))
}

fn rage(memory: &SharedMemory, capacity: u32, seed: u64, stop: &AtomicBool, writes: &AtomicU64) {
    let mut random = fastrand::Rng::with_seed(seed);
    while !stop.load(Relaxed) {
        let how = random.u32(..).to_ne_bytes();
        let head = random.u32(..=capacity);
        let write = Write::new(how[0] % Write::KINDS, [how[1], how[2], how[3]], capacity, head);
        memory.write_at(write.offset, write.data());
        writes.fetch_add(1, Relaxed);
        // Now and then something that an honest peer could have left, or no end would ever start.
        if random.u8(..16) == 0 {
            memory.write_at(0, &[0; 128]);
        }
    }
}

fn corpus_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn read_corpus() -> Result<Vec<Program>, String> {
    let folder = corpus_folder();
    let told = |err: std::io::Error| format!("{}: {err}", folder.display());
    let entries = fs::read_dir(&folder).map_err(told)?;
    let mut paths: Vec<_> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(told)?;
    // The folder's order is not the same everywhere, and the seed counts on it.
    paths.sort();
    paths.iter().map(|path| fs::read(path).map(Program::from_bytes).map_err(told)).collect()
}

/// Replaces the corpus by as few programs as lead to every outcome of every step.
fn write_corpus(pool: &[Program], victims: &mut [Victim]) -> Result<(), String> {
    let mut outcomes: Vec<_> = pool
        .iter()
        .map(|program| {
            let mut seen = HashSet::new();
            run_program(program, victims, &mut Tally::default(), &mut seen);
            let coarse = seen.into_iter().map(|(ring, kind, outcome, _)| (ring, kind, outcome));
            (program, coarse.collect::<HashSet<_>>())
        })
        .collect();
    let folder = corpus_folder();
    let told = |err: std::io::Error| format!("{}: {err}", folder.display());
    fs::remove_dir_all(&folder).map_err(told)?;
    fs::create_dir(&folder).map_err(told)?;
    let mut number = 0;
    loop {
        let best = outcomes.iter().max_by_key(|(_, seen)| seen.len());
        let Some((program, covered)) = best.cloned().filter(|(_, seen)| !seen.is_empty()) else {
            return Ok(());
        };
        number += 1;
        fs::write(folder.join(format!("{number:03}")), program.bytes()).map_err(told)?;
        for (_, seen) in &mut outcomes {
            seen.retain(|outcome| !covered.contains(outcome));
        }
    }
}

fn leave_behind() {
    let program = match CURRENT.lock() {
        Ok(program) => program.clone(),
        Err(_) => exit(1),
    };
    if let Err(err) = fs::write(FAILED, program) {
        eprintln!("attack: {FAILED}: {err}");
    }
}

impl Tally {
    fn count(&mut self, outcome: Outcome) {
        self.steps += 1;
        self.outcomes[usize::from(outcome)] += 1;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [
            "done",
            "no room",
            "empty",
            "too large",
            "bad index",
            "bad head",
            "bad entry",
            "offline",
        ];
        for (at, (name, count)) in names.iter().zip(&self.outcomes[1..]).enumerate() {
            write!(f, "{}{count} {name}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
