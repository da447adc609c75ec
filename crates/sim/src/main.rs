//! `knarr-sim`: one seed, fresh seeds, or the seeds that failed before.

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use knarr_sim::world::Canary;
use knarr_sim::{Options, rim};
use std::collections::VecDeque;
use std::process::{Command, ExitCode, Stdio};

/// Seeds that found something once. Each line: the seed, and what it found.
const REGRESSIONS: &str = include_str!("../regressions.txt");

/// Simulations at the same time, each on one thread.
const JOBS: usize = 2;

#[derive(Parser)]
#[command(name = "knarr-sim", about = "Simulates a whole control plane under faults from a seed.")]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Run one seed and print its trace.
    Replay {
        seed: u64,
        /// Only the end of the trace, and only if something is wrong.
        #[arg(long)]
        quiet: bool,
        /// Plant a bug, which must be found.
        #[arg(long)]
        canary: Option<CanaryName>,
        /// Write the log of the components to standard error; the filter is `KNARR_LOG`'s.
        #[arg(long)]
        log: Option<String>,
    },
    /// Run seeds nobody has tried, for a while.
    Fresh {
        #[arg(long, default_value_t = 120)]
        seconds: u64,
        /// Simulations at the same time.
        #[arg(long, default_value_t = JOBS)]
        jobs: usize,
        /// Begin here instead of at a random seed.
        #[arg(long)]
        from: Option<u64>,
    },
    /// Run the seeds that found something before.
    Regressions,
}

#[derive(Clone, Copy, ValueEnum)]
enum CanaryName {
    LostWrite,
    DroppedEvent,
    ForgottenExpectations,
}

impl CanaryName {
    fn canary(self) -> Canary {
        match self {
            CanaryName::LostWrite => Canary::LostWrite,
            CanaryName::DroppedEvent => Canary::DroppedEvent,
            CanaryName::ForgottenExpectations => Canary::ForgottenExpectations,
        }
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().what {
        What::Replay { seed, quiet, canary, log } => {
            if let Some(filter) = log {
                tracing_subscriber::fmt()
                    .with_env_filter(filter)
                    .without_time()
                    .with_writer(std::io::stderr)
                    .init();
            }
            replay(Options { seed, print: !quiet, canary: canary.map(CanaryName::canary) })
        }
        What::Fresh { seconds, jobs, from } => fresh(seconds, jobs.max(1), from),
        What::Regressions => regressions(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("knarr-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn replay(options: Options) -> Result<()> {
    let begun = rim::real_seconds();
    let outcome = knarr_sim::run(options).context("start the simulation")?;
    if !outcome.violations.is_empty() && !options.print {
        outcome.last_lines.iter().for_each(|line| println!("{line}"));
    }
    println!(
        "seed {}: {} writes in {} virtual seconds ({} real), trace {:016x} of {} lines",
        options.seed,
        outcome.revisions,
        outcome.elapsed.as_secs(),
        rim::real_seconds() - begun,
        outcome.digest,
        outcome.lines
    );
    if outcome.violations.is_empty() {
        return Ok(());
    }
    for violation in &outcome.violations {
        println!("violated: {violation}");
    }
    bail!("seed {} failed; replay it with: make sim SEED={}", options.seed, options.seed)
}

/// A simulation has a process of its own.
fn child(seed: u64) -> Result<std::process::Child> {
    let program = std::env::current_exe().context("find this program")?;
    Command::new(program)
        .args(["replay", &seed.to_string(), "--quiet"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start a simulation")
}

fn finish(seed: u64, child: std::process::Child) -> Result<bool> {
    let output = child.wait_with_output().with_context(|| format!("run seed {seed}"))?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        if output.status.code() != Some(1) {
            eprintln!("seed {seed} ended with {}; replay it with: make sim SEED={seed}", output.status);
        }
    }
    Ok(output.status.success())
}

/// Starts seeds until the time is over; the last ones may run on for a little.
fn fresh(seconds: u64, jobs: usize, from: Option<u64>) -> Result<()> {
    let end = rim::real_seconds() + seconds;
    let first = from.unwrap_or_else(|| rand::random::<u32>().into());
    println!("fresh seeds from {first} for {seconds} s");
    run_all((first..).take_while(|_| rim::real_seconds() < end), jobs)
}

fn regressions() -> Result<()> {
    let lines = REGRESSIONS.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let seed = |line: &str| {
        let first = line.split_whitespace().next().unwrap_or_default();
        first.parse().with_context(|| format!("regressions.txt: {line:?} begins with no seed"))
    };
    let seeds: Vec<u64> = lines.map(seed).collect::<Result<_>>()?;
    run_all(seeds.into_iter(), JOBS)
}

/// Runs seeds, some at the same time.
fn run_all(mut seeds: impl Iterator<Item = u64>, jobs: usize) -> Result<()> {
    let (mut failed, mut running) = (Vec::new(), VecDeque::new());
    loop {
        while running.len() < jobs
            && let Some(seed) = seeds.next()
        {
            running.push_back((seed, child(seed)?));
        }
        let Some((seed, child)) = running.pop_front() else { return verdict(&failed) };
        if !finish(seed, child)? {
            failed.push(seed);
        }
    }
}

fn verdict(failed: &[u64]) -> Result<()> {
    if failed.is_empty() {
        return Ok(());
    }
    let list = failed.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    bail!("{} seeds failed: {list}; replay one with: make sim SEED={}", failed.len(), failed[0])
}
