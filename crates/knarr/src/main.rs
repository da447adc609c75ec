//! The binary: command line, configuration, wiring of roles.

mod bench;
mod check;
mod daemon;
mod foreign;
mod kubeconfig;
mod node;
mod pki;
mod server;
mod settings;
mod simulated;
mod up;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use knarr_network::cni::{self, Call};
use settings::Settings;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing_subscriber::EnvFilter;

/// All of Kubernetes in one binary.
#[derive(Parser)]
#[command(name = "knarr", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the cluster on this machine; does nothing if it runs.
    Up(up::UpArgs),
    /// Stop the cluster.
    Down(up::DownArgs),
    /// Show whether the cluster runs and is well.
    Status(DataDir),
    /// Show whether this machine has all a node needs.
    Check(up::UpArgs),
    /// The Kubernetes command-line client, for this cluster or any other.
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Add nodes to a running cluster, or take them away.
    Node(simulated::NodeArgs),
    /// Measure a running cluster.
    Bench(bench::BenchArgs),
    /// Run the cluster in the foreground, as `up` made it.
    #[command(hide = true)]
    Run(DataDir),
    /// Run the cluster, and run it again whenever it dies.
    #[command(hide = true)]
    Supervise(DataDir),
}

#[derive(Args)]
struct DataDir {
    /// Where the cluster's data lies.
    #[arg(long, default_value = settings::DATA_DIR)]
    data_dir: PathBuf,
}

fn main() -> ExitCode {
    let mut args = std::env::args();
    if args.nth(1).as_deref() == Some(knarr_runtime::keeper::ARGUMENT) {
        return ExitCode::from(knarr_runtime::keeper::main(args) as u8);
    }
    if let Some(call) = cni_call() {
        return network_plugin(&call);
    }
    if let Some(args) = kubectl_args() {
        end_quietly_on_closed_pipes();
        rustls::crypto::ring::default_provider().install_default().ok();
        return ExitCode::from(knarr_kubectl::main(args) as u8);
    }
    let cli = Cli::parse();
    if !matches!(cli.command, Command::Run(_)) {
        end_quietly_on_closed_pipes();
    }
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("knarr: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The call, if a container runtime runs this program as its network plug-in: without arguments.
fn cni_call() -> Option<Call> {
    Call::from_environment().filter(|_| std::env::args().len() == 1)
}

fn network_plugin(call: &Call) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(cni::run(call, std::io::stdin(), std::io::stdout()));
            ExitCode::from(u8::try_from(code).unwrap_or(1))
        }
        Err(error) => {
            eprintln!("knarr: start the network plug-in: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What follows `knarr kubectl`, or everything if the program is called by that name.
fn kubectl_args() -> Option<Vec<String>> {
    let mut args = std::env::args();
    let program = args.next()?;
    if Path::new(&program).file_name().is_some_and(|name| name == "kubectl") {
        return Some(args.collect());
    }
    (args.next()? == "kubectl").then(|| args.collect())
}

/// `knarr status | head` ends like any other program. Servers keep Rust's way: a closed socket is an error.
fn end_quietly_on_closed_pipes() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the default disposition runs no code of ours.
    if let Err(error) = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) } {
        eprintln!("knarr: {error}");
    }
}

fn execute(command: Command) -> Result<()> {
    if !matches!(command, Command::Supervise(_)) {
        rustls::crypto::ring::default_provider().install_default().ok();
    }
    match command {
        Command::Up(args) => up::up(&args),
        Command::Down(args) => up::down(&args),
        Command::Status(args) => up::status(&args.data_dir),
        Command::Check(args) => up::check(&args),
        // Dispatched before the command line was parsed, so that every flag reaches it.
        Command::Kubectl { .. } => Ok(()),
        Command::Node(args) => simulated::node(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Run(args) => run(&args.data_dir),
        Command::Supervise(args) => daemon::supervise(&args.data_dir),
    }
}

/// What is logged unless `KNARR_LOG` says otherwise: the storage engine tells each of its steps as information.
const LOG_FILTER: &str = "info,fjall=warn,lsm_tree=warn";

/// Threads that run tasks: the work is mostly waiting, and each thread costs memory.
const WORKERS_MAX: usize = 4;

fn run(data_dir: &Path) -> Result<()> {
    let filter = EnvFilter::try_from_env("KNARR_LOG").unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let settings = Settings::load(data_dir)?
        .with_context(|| format!("no cluster in {}; make one with `knarr up`", data_dir.display()))?;
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    runtime.block_on(serve(&settings))
}

/// Runs all roles until told to end. Containers stay: they are the keeper's.
async fn serve(settings: &Settings) -> Result<()> {
    let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let mut terminate = signal(SignalKind::terminate())?;
    let host = (!settings.server_only).then(|| {
        let settings = settings.clone();
        tokio::spawn(async move { node::Host::start(&settings).await })
    });
    let server = server::Server::start(settings, &tasks, &shutdown).await?;
    tracing::info!(port = settings.port, "the API server answers");
    let names = match host {
        Some(host) => {
            let host = host.await.context("start the node")?.context("start the node")?;
            Some(node::start(settings, &server, host, &tasks, &shutdown).context("start the node")?)
        }
        None => None,
    };
    server.start_loops(settings, &tasks, &shutdown).context("start the loops")?;
    if let Some(names) = names {
        node::start_dns(settings, &server, names, &tasks, &shutdown).await.context("start the node")?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => result?,
    }
    tracing::info!("ending");
    shutdown.cancel();
    tasks.close();
    if tokio::time::timeout(std::time::Duration::from_secs(5), tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    Ok(())
}
