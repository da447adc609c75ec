//! Servers that tell who answers and who asked.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::{Outcome, number, seconds};

const PATHS: &str = "\
/            this page: who answers, who asked, the request
/hostname    the host name alone
/healthz     200, or 503 after /healthz/fail, until /healthz/ok
/readyz      the same, switched by /readyz/fail and /readyz/ok
/delay/N     answers after N seconds
/status/N    answers with this status
/env/NAME    a variable of the environment
/exit/N      ends the server with this exit code
";
/// A request's first line and headers; more is refused.
const REQUEST_LEN_MAX: u64 = 64 << 10;
/// A stuck client does not hold a thread longer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Threads serve connections; the stack need not be large.
const STACK_LEN: usize = 128 << 10;

#[derive(Default)]
struct Switches {
    sick: AtomicBool,
    unready: AtomicBool,
}

struct Request {
    method: String,
    path: String,
    headers: Vec<String>,
}

/// Serves HTTP until ended.
pub fn http(port: u16) -> Outcome {
    let switches = Arc::new(Switches::default());
    serve(port, move |stream| {
        stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
        let request = read_request(&stream)?;
        println!("{} {} from {}", request.method, request.path, stream.peer_addr()?);
        respond(stream, &request, &switches)
    })
}

/// Sends everything back, after its host name on a line.
pub fn tcp_echo(port: u16) -> Outcome {
    serve(port, |mut stream| {
        stream.write_all(format!("{}\n", host_name()).as_bytes())?;
        io::copy(&mut stream.try_clone()?, &mut stream)?;
        Ok(())
    })
}

/// Sends every datagram back, after its host name and a space.
pub fn udp_echo(port: u16) -> Outcome {
    let bind = || {
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))
    };
    let socket = bind().map_err(|error| format!("port {port}: {error}"))?;
    println!("listening on udp port {port}");
    let mut buffer = vec![0; 65536];
    loop {
        // Errors are those of earlier answers that could not be delivered.
        let Ok((len, client)) = socket.recv_from(&mut buffer) else { continue };
        let answer = [host_name().as_bytes(), b" ", &buffer[..len]].concat();
        if let Err(error) = socket.send_to(&answer, client) {
            eprintln!("toolbox: answering {client}: {error}");
        }
    }
}

fn serve(port: u16, handle: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static) -> Outcome {
    let bind = || {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
    };
    let listener = bind().map_err(|error| format!("port {port}: {error}"))?;
    println!("listening on tcp port {port}");
    let handle = Arc::new(handle);
    for stream in listener.incoming() {
        let handle = handle.clone();
        let work = move || {
            if let Err(error) = stream.and_then(|stream| handle(stream)) {
                eprintln!("toolbox: {error}");
            }
        };
        if let Err(error) = std::thread::Builder::new().stack_size(STACK_LEN).spawn(work) {
            eprintln!("toolbox: no thread for a connection: {error}");
        }
    }
    Ok(0)
}

fn read_request(stream: &TcpStream) -> io::Result<Request> {
    let mut lines = BufReader::new(stream.take(REQUEST_LEN_MAX)).lines();
    let first = lines.next().unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))?;
    let mut words = first.split(' ');
    let (method, path) =
        (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or("/").to_owned());
    let mut headers = Vec::new();
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        headers.push(line);
    }
    Ok(Request { method, path, headers })
}

fn respond(stream: TcpStream, request: &Request, switches: &Switches) -> io::Result<()> {
    let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    let (status, body) = match parts[..] {
        [""] => (200, describe(&stream, request)?),
        ["hostname"] => (200, format!("{}\n", host_name())),
        ["healthz"] => health(&switches.sick),
        ["healthz", to] => switch(&switches.sick, to),
        ["readyz"] => health(&switches.unready),
        ["readyz", to] => switch(&switches.unready, to),
        ["delay", time] => match seconds(time) {
            Ok(time) => {
                std::thread::sleep(time);
                (200, format!("waited {}s\n", time.as_secs_f64()))
            }
            Err(reason) => (400, format!("{reason}\n")),
        },
        ["status", code] => match number::<u16>(code) {
            Ok(code) if (200..600).contains(&code) => (code, format!("status {code}\n")),
            _ => (400, "a status is a number from 200 to 599\n".to_owned()),
        },
        ["env", name] => match std::env::var(name) {
            Ok(value) => (200, format!("{value}\n")),
            Err(_) => (404, format!("{name} is not set\n")),
        },
        ["exit", code] => match number::<u8>(code) {
            Ok(code) => {
                write_response(stream, 200, "goodbye\n")?;
                std::process::exit(code.into());
            }
            Err(reason) => (400, format!("{reason}\n")),
        },
        _ => (404, PATHS.to_owned()),
    };
    write_response(stream, status, &body)
}

fn describe(stream: &TcpStream, request: &Request) -> io::Result<String> {
    let plain = |address: SocketAddr| format!("{} port {}", address.ip().to_canonical(), address.port());
    Ok(format!(
        "host: {}\nserver address: {}\nclient address: {}\nrequest: {} {}\n{}\n\n{PATHS}",
        host_name(),
        plain(stream.local_addr()?),
        plain(stream.peer_addr()?),
        request.method,
        request.path,
        request.headers.iter().map(|header| format!("header: {header}")).collect::<Vec<_>>().join("\n"),
    ))
}

fn health(bad: &AtomicBool) -> (u16, String) {
    if bad.load(Ordering::Relaxed) { (503, "failing\n".into()) } else { (200, "ok\n".into()) }
}

fn switch(bad: &AtomicBool, to: &str) -> (u16, String) {
    match to {
        "fail" | "ok" => bad.store(to == "fail", Ordering::Relaxed),
        _ => return (404, PATHS.to_owned()),
    }
    (200, format!("{to}\n"))
}

fn write_response(mut stream: TcpStream, status: u16, body: &str) -> io::Result<()> {
    let reason = match status {
        200 => "OK",
        404 => "Not Found",
        503 => "Service Unavailable",
        _ => "Status",
    };
    let len = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    )
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
