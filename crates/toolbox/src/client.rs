//! Clients: one question, the answer on standard output.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use crate::{Outcome, print};

/// Fetches a URL and prints the body; the status goes to standard error.
pub fn get(url: &str, patience: Duration) -> Outcome {
    let rest = url.strip_prefix("http://").ok_or_else(|| format!("{url}: only http:// is understood"))?;
    let (authority, path) = match rest.find('/') {
        Some(place) => rest.split_at(place),
        None => (rest, "/"),
    };
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let target = if has_port { authority.to_owned() } else { format!("{authority}:80") };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: toolbox\r\nConnection: close\r\n\r\n"
    );
    let answer =
        exchange(&target, request.as_bytes(), patience, false).map_err(|error| format!("{url}: {error}"))?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| format!("{url}: the answer is not HTTP"))?;
    let status: u16 = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    if !(200..400).contains(&status) {
        eprintln!("toolbox: {url}: status {status}");
    }
    print(body)?;
    Ok(u8::from(!(200..400).contains(&status)))
}

/// Sends a text over TCP and prints what comes back.
pub fn tcp(host: &str, port: u16, text: &str, patience: Duration) -> Outcome {
    let target = join(host, port);
    let answer =
        exchange(&target, text.as_bytes(), patience, true).map_err(|error| format!("{target}: {error}"))?;
    print(&String::from_utf8_lossy(&answer))
}

/// Sends a datagram and prints the one that comes back.
pub fn udp(host: &str, port: u16, text: &str, patience: Duration) -> Outcome {
    let target = join(host, port);
    let failed = |error: io::Error| format!("{target}: {error}");
    let address = first_address(&target).map_err(failed)?;
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).map_err(failed)?;
    socket.set_read_timeout(Some(patience)).map_err(failed)?;
    socket.connect(address).map_err(failed)?;
    socket.send(text.as_bytes()).map_err(failed)?;
    let mut buffer = vec![0; 65536];
    let len = socket.recv(&mut buffer).map_err(failed)?;
    print(&format!("{}\n", String::from_utf8_lossy(&buffer[..len])))
}

/// Prints a name's addresses, as programs in this container see them.
pub fn resolve(name: &str) -> Outcome {
    let found = (name, 0).to_socket_addrs().map_err(|error| format!("{name}: {error}"))?;
    let mut lines: Vec<String> = found.map(|address| format!("{}\n", address.ip())).collect();
    lines.dedup();
    print(&lines.concat())
}

fn exchange(target: &str, bytes: &[u8], patience: Duration, finish: bool) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&first_address(target)?, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(bytes)?;
    if finish {
        stream.shutdown(Shutdown::Write)?;
    }
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn first_address(target: &str) -> io::Result<SocketAddr> {
    target.to_socket_addrs()?.next().ok_or_else(|| io::Error::other("the name has no address"))
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}
