//! toolbox: the program inside the test image. Servers to be reached, clients to reach them with, eaters of
//! memory and CPU, games with signals and exit codes.
//!
//! One static binary without an async runtime, so that an image of it is small and starts at once. As the
//! first process of a container it is also a proper init: see [`init`].

mod client;
mod eat;
mod init;
mod server;
mod signals;

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "\
usage: toolbox COMMAND [ARGUMENTS]

  serve [PORT]                 HTTP echo server (default 8080); see / for its paths
  tcp-echo PORT                sends back what it receives, each connection preceded by its host name
  udp-echo PORT                sends back what it receives, preceded by its host name
  get URL [TIMEOUT]            fetches http://HOST[:PORT]/PATH, prints the body; fails on status 400 and up
  tcp HOST PORT [TEXT]         connects, sends the text, prints the answer
  udp HOST PORT [TEXT]         sends a datagram, prints the answer
  resolve NAME                 prints the addresses of a name, one a line
  eat-memory MB [SECONDS]      takes and touches memory, then waits (for ever)
  eat-cpu CORES SECONDS        keeps this many cores busy
  exit CODE [SECONDS]          exits with the code, after a while
  trap SIGNAL...               prints each of these signals (TERM, HUP, ...) and goes on; KILL ends it
  sleep SECONDS
  write-file PATH TEXT         writes the text, as a whole
  read-file PATH
  print-env [NAME]

A timeout or a number of seconds may be a fraction. Clients give up after 5 seconds unless told otherwise.
";

/// How long clients wait.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a command ends with: the exit code, or what went wrong.
type Outcome = Result<u8, String>;

fn main() -> ExitCode {
    if let Some(code) = init::run_if_first() {
        return ExitCode::from(code);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => ExitCode::from(code),
        Err(reason) => {
            eprintln!("toolbox: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Outcome {
    match words {
        ["serve"] => server::http(8080),
        ["serve", port] => server::http(number(port)?),
        ["tcp-echo", port] => server::tcp_echo(number(port)?),
        ["udp-echo", port] => server::udp_echo(number(port)?),
        ["get", url] => client::get(url, PATIENCE),
        ["get", url, timeout] => client::get(url, seconds(timeout)?),
        ["tcp", host, port] => client::tcp(host, number(port)?, "", PATIENCE),
        ["tcp", host, port, text] => client::tcp(host, number(port)?, text, PATIENCE),
        ["udp", host, port] => client::udp(host, number(port)?, "hello", PATIENCE),
        ["udp", host, port, text] => client::udp(host, number(port)?, text, PATIENCE),
        ["resolve", name] => client::resolve(name),
        ["eat-memory", megabytes] => eat::memory(number(megabytes)?, None),
        ["eat-memory", megabytes, time] => eat::memory(number(megabytes)?, Some(seconds(time)?)),
        ["eat-cpu", cores, time] => eat::cpu(number(cores)?, seconds(time)?),
        ["exit", code] => number(code),
        ["exit", code, time] => {
            std::thread::sleep(seconds(time)?);
            number(code)
        }
        ["trap", names @ ..] if !names.is_empty() => signals::trap(names),
        ["sleep", time] => {
            std::thread::sleep(seconds(time)?);
            Ok(0)
        }
        ["write-file", path, text] => write_file(path, text),
        ["read-file", path] => read_file(path),
        ["print-env"] => print_env(),
        ["print-env", name] => print_variable(name),
        ["help" | "--help" | "-h"] => print(USAGE),
        [] => Err(format!("no command\n\n{USAGE}")),
        [command, ..] => Err(format!("unknown command or wrong arguments: {command}\n\n{USAGE}")),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("not a number in range: {text:?}"))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = number(text)?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("not a time: {text:?}"))
}

fn print(text: &str) -> Outcome {
    let mut output = std::io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .map_err(|error| format!("stdout: {error}"))?;
    Ok(0)
}

/// A reader never sees half of it: written beside, then renamed.
fn write_file(path: &str, text: &str) -> Outcome {
    let fresh = format!("{path}.new");
    let written = std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, path));
    written.map_err(|error| format!("{path}: {error}"))?;
    Ok(0)
}

fn read_file(path: &str) -> Outcome {
    let mut content = Vec::new();
    let read = std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut content));
    read.map_err(|error| format!("{path}: {error}"))?;
    std::io::stdout().write_all(&content).map_err(|error| format!("stdout: {error}"))?;
    Ok(0)
}

fn print_env() -> Outcome {
    let mut variables: Vec<String> = std::env::vars_os()
        .map(|(name, value)| format!("{}={}\n", name.to_string_lossy(), value.to_string_lossy()))
        .collect();
    variables.sort();
    print(&variables.concat())
}

fn print_variable(name: &str) -> Outcome {
    match std::env::var(name) {
        Ok(value) => print(&format!("{value}\n")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}
