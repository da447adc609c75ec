//! Deterministic simulation of a whole control plane: API server, store, every control loop, the scheduler and
//! simulated nodes, in one thread, on virtual time. One number, the seed, decides what users do and what goes wrong:
//! lost requests and answers, cut and late and repeated watches, full disks, deaths of any part between any two
//! writes, jumps of the clock, dead nodes. While it goes wrong, [`rules`] hold after every write; when it stops,
//! everything [converges](convergence). The same seed gives the same run, to the last line of the trace.
//!
//! [`run`] must have a process of its own: see [`rim`]. How to read a trace and how to add a part:
//! `docs/simulation.md`.

/// Time and randomness of the process.
pub mod rim;

/// What happened.
pub mod trace;
/// The parts and their lives.
pub mod world;

/// The disk under the store.
mod disk;
/// Between components and server.
mod wire;
/// What users do.
mod workload;

/// What must hold in the end.
pub mod convergence;
/// Everything that became durable.
pub mod history;
/// What must hold always.
pub mod rules;

use parking_lot::Mutex;
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;
use world::{Canary, Component, Rates, World};

/// How long things go wrong, in virtual time.
const STORM: std::ops::Range<u64> = 60..360;
/// How long the cluster may take to converge: longer than the longest back-off and the tolerance of dead nodes.
const CONVERGENCE_MAX: Duration = Duration::from_secs(2400);
/// How long it must then stay quiet.
const QUIET: Duration = Duration::from_secs(120);

/// One simulation.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub seed: u64,
    /// Print every line of the trace as it comes.
    pub print: bool,
    pub canary: Option<Canary>,
}

/// How it ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Empty if all is well.
    pub violations: Vec<String>,
    /// The end of the trace.
    pub last_lines: Vec<String>,
    /// A number for the whole trace, and its length in lines.
    pub digest: u64,
    pub lines: u64,
    /// Writes that became durable, and virtual time that passed.
    pub revisions: u64,
    pub elapsed: Duration,
}

/// Runs a simulation to its end. Call it once in a process.
pub fn run(options: Options) -> Result<Outcome, std::io::Error> {
    rim::enter(options.seed);
    let start: Arc<Mutex<Option<tokio::time::Instant>>> = Arc::default();
    let begun = start.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        // Virtual time moves only while everybody waits: afterwards all clocks are set to it.
        .on_thread_unpark(move || {
            let begun = *begun.lock().get_or_insert_with(tokio::time::Instant::now);
            rim::set_elapsed(begun.elapsed());
        })
        .build()?;
    let outcome = runtime.block_on(async {
        start.lock().get_or_insert_with(tokio::time::Instant::now);
        simulate(options).await
    });
    // Whatever still hangs on dead wires is left to the end of the process.
    std::mem::forget(runtime);
    Ok(outcome)
}

async fn simulate(options: Options) -> Outcome {
    let world = World::new(options.seed, options.print, options.canary);
    world.trace.line("simulation", &format!("seed {} with {:?}", options.seed, world.rates()));
    tokio::spawn(world.clone().keep_server());
    world.wait_for_server().await;
    let components = Component::all();
    for component in &components {
        tokio::spawn(component.clone().keep(world.clone()));
    }
    let mut user = workload::Workload::new(&world);
    user.prepare().await;
    let storm = Duration::from_secs(world.dice.lock().random_range(STORM));
    let trouble = tokio::spawn(make_trouble(world.clone(), components.clone()));
    user.work(storm).await;
    trouble.abort();
    world.set_rates(Rates::default());
    world.disk.set_full(false);
    components.iter().for_each(|component| component.spare());
    world.trace.line("simulation", "nothing fails any more");
    if !world.trace.is_violated() {
        user.settle().await;
        converge(&world).await;
    }
    let (digest, lines) = world.trace.digest();
    Outcome {
        violations: world.trace.violations(),
        last_lines: world.trace.last_lines(),
        digest,
        lines,
        revisions: world.history.lock().revision(),
        elapsed: rim::elapsed(),
    }
}

/// What goes wrong beside single requests: deaths, full disks, jumps of the clock.
async fn make_trouble(world: Arc<World>, components: Vec<Arc<Component>>) {
    // A run without some kinds of trouble finds what that trouble would hide.
    let (deaths, jumps, full) = {
        let mut dice = world.dice.lock();
        (dice.random_bool(0.8), dice.random_bool(0.5), dice.random_bool(0.5))
    };
    loop {
        let (pause, kind) = {
            let mut dice = world.dice.lock();
            (dice.random_range(1_000..30_000), dice.random_range(0..10))
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        match kind {
            0..6 if deaths => {
                let mut dice = world.dice.lock();
                let chosen = dice.random_range(0..components.len());
                components[chosen].kill_soon(&mut dice);
            }
            6..8 if deaths => world.server_died(),
            8 if jumps => {
                let seconds = world.dice.lock().random_range(-600..600);
                world.trace.line("clock", &format!("jumps by {seconds} s"));
                rim::jump(seconds);
            }
            9 if full => {
                world.trace.line("disk", "is full");
                world.disk.set_full(true);
                let pause = world.dice.lock().random_range(100..10_000);
                tokio::time::sleep(Duration::from_millis(pause)).await;
                world.disk.set_full(false);
            }
            _ => {}
        }
    }
}

/// Waits until nothing is missing, and then that nobody writes without a reason.
async fn converge(world: &Arc<World>) {
    let deadline = tokio::time::Instant::now() + CONVERGENCE_MAX;
    for second in 0u32.. {
        let missing = convergence::missing(&world.history.lock());
        if missing.is_empty() {
            world.trace.line("simulation", "converged");
            break;
        }
        if world.trace.is_violated() {
            return;
        }
        if tokio::time::Instant::now() > deadline {
            let missing = missing.join("; ");
            return world
                .trace
                .violation(format!("not converged after {} s: {missing}", CONVERGENCE_MAX.as_secs()));
        }
        if second.is_multiple_of(60) {
            let some = missing.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
            world.trace.line("simulation", &format!("{} things are missing, such as: {some}", missing.len()));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // Statuses and slices of the last changes are still being written.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let before = world.history.lock().writes();
    tokio::time::sleep(QUIET).await;
    let after = world.history.lock().writes();
    for (partition, count) in after {
        let written = count - before.get(&partition).copied().unwrap_or(0);
        if written > 0 && !convergence::may_be_written_when_idle(&partition) {
            world.trace.violation(format!("idle loops wrote {written} times to {partition}"));
        }
    }
    let missing = convergence::missing(&world.history.lock());
    if !missing.is_empty() {
        world.trace.violation(format!("converged, and then: {}", missing.join("; ")));
    }
}
