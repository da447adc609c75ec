//! The program as its users meet it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};

fn toolbox(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_toolbox"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, .. } = toolbox(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap())
}

/// A server, ended with the test.
struct Server(Child);

impl Server {
    fn start(arguments: &[&str]) -> Server {
        let mut child = toolbox(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert!(line.starts_with("listening"), "{line}");
        std::thread::spawn(move || _ = output.read_to_end(&mut Vec::new()));
        Server(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

#[test]
fn commands_exit_as_told() {
    let cases: [(&[&str], i32, &str); 6] = [
        (&["exit", "7"], 7, ""),
        (&["exit", "3", "0.01"], 3, ""),
        (&["sleep", "0"], 0, ""),
        (&["nonsense"], 1, ""),
        (&["resolve", "localhost"], 0, ""),
        (&["eat-memory", "2", "0"], 0, "ate 2 MB\n"),
    ];
    for (arguments, code, output) in cases {
        let got = run(arguments);
        assert_eq!(got.0, Some(code), "{arguments:?}");
        assert!(got.1.starts_with(output), "{arguments:?}: {}", got.1);
    }
}

#[test]
fn the_http_server_tells_who_asked_and_switches_its_health() {
    let port = free_port();
    let mut server = Server::start(&["serve", &port]);
    let get = |path: &str| run(&["get", &format!("http://127.0.0.1:{port}{path}")]);
    let (code, page) = get("/");
    assert_eq!(code, Some(0));
    assert!(page.contains("client address: 127.0.0.1 port"), "{page}");
    assert!(page.contains("header: User-Agent: toolbox"), "{page}");
    assert_eq!(get("/healthz"), (Some(0), "ok\n".into()));
    get("/healthz/fail");
    assert_eq!(get("/healthz"), (Some(1), "failing\n".into()));
    assert_eq!(get("/readyz"), (Some(0), "ok\n".into()));
    get("/healthz/ok");
    assert_eq!(get("/healthz"), (Some(0), "ok\n".into()));
    assert_eq!(get("/status/418"), (Some(1), "status 418\n".into()));
    assert_eq!(get("/delay/0.01"), (Some(0), "waited 0.01s\n".into()));
    assert_eq!(get("/exit/9").1, "goodbye\n");
    assert_eq!(server.0.wait().unwrap().code(), Some(9));
}

#[test]
fn echo_servers_send_back_what_they_get() {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let host = host.trim();
    let port = free_port();
    let _tcp = Server::start(&["tcp-echo", &port]);
    let _udp = Server::start(&["udp-echo", &port]);
    assert_eq!(run(&["tcp", "127.0.0.1", &port, "abc"]), (Some(0), format!("{host}\nabc")));
    assert_eq!(run(&["udp", "127.0.0.1", &port, "abc"]), (Some(0), format!("{host} abc\n")));
}

#[test]
fn files_come_back_as_written() {
    let path = std::env::temp_dir().join(format!("toolbox-test-{}", std::process::id()));
    let path = path.to_str().unwrap();
    assert_eq!(run(&["write-file", path, "x y"]).0, Some(0));
    assert_eq!(run(&["read-file", path]), (Some(0), "x y".into()));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn trapped_signals_are_printed_and_survived() {
    let mut child = toolbox(&["trap", "TERM", "SIGHUP"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "trapping TERM SIGHUP");
    for (signal, line) in [("-TERM", "received SIGTERM"), ("-HUP", "received SIGHUP")] {
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), line);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn as_the_first_process_it_forwards_signals_and_passes_the_exit_code_on() {
    if !std::fs::metadata("/proc/1").is_ok_and(|_| is_root()) {
        eprintln!("SKIPPED: needs root to make a process namespace");
        return;
    }
    let first = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", env!("CARGO_BIN_EXE_toolbox")])
            .args(arguments);
        command
    };
    assert_eq!(first(&["exit", "7"]).status().unwrap().code(), Some(7));
    let mut child = first(&["sleep", "60"]).spawn().unwrap();
    // unshare ignores TERM while it waits; its child is toolbox as process 1, whose child sleeps.
    let inner = loop {
        let path = format!("/proc/{0}/task/{0}/children", child.id());
        let children = std::fs::read_to_string(path).unwrap();
        if let Some(pid) = children.split_whitespace().next()
            && !std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap().is_empty()
        {
            break pid.to_owned();
        }
        std::thread::yield_now();
    };
    Command::new("kill").args(["-TERM", &inner]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").unwrap().lines().any(|line| line.starts_with("Uid:\t0\t"))
}
