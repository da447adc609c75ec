//! A sandbox's namespaces without a process in them: made by a short-lived thread, kept by bind mounts of its
//! `/proc/thread-self/ns` entries.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error, Kind, Result};
use crate::rootdir::c_path;

/// How long a port of a pod may take to accept a forwarded connection; it is on loopback.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What a sandbox gets of its own.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// A network namespace, with loopback up.
    pub network: bool,
    pub ipc: bool,
    /// A host name of its own.
    pub hostname: Option<String>,
    /// Applied inside the namespaces.
    pub sysctls: Vec<(String, String)>,
}

/// Makes the namespaces and pins them in `dir` as `net`, `ipc` and `uts`. Blocking.
pub fn make(dir: &Path, wanted: &Wanted) -> Result<()> {
    fs::create_dir_all(dir).step(|| format!("make {}", dir.display()))?;
    let (dir, wanted) = (dir.to_owned(), wanted.clone());
    // The thread's namespaces are not the process's; they end with it, except for what is pinned.
    std::thread::Builder::new()
        .name("sandbox".into())
        .stack_size(64 << 10)
        .spawn(move || make_here(&dir, &wanted))
        .step(|| "start a thread".into())?
        .join()
        .map_err(|_| Error::internal("the thread that makes namespaces panicked"))?
}

fn make_here(dir: &Path, wanted: &Wanted) -> Result<()> {
    let mut flags = 0;
    let mut pins = Vec::new();
    if wanted.network {
        flags |= libc::CLONE_NEWNET;
        pins.push("net");
    }
    if wanted.ipc {
        flags |= libc::CLONE_NEWIPC;
        pins.push("ipc");
    }
    if wanted.hostname.is_some() {
        flags |= libc::CLONE_NEWUTS;
        pins.push("uts");
    }
    // SAFETY: unshare of namespaces affects this thread only.
    if unsafe { libc::unshare(flags) } < 0 {
        return Err(io::Error::last_os_error()).step(|| "make namespaces".into());
    }
    if let Some(hostname) = &wanted.hostname {
        nix::unistd::sethostname(hostname).step(|| format!("set the host name {hostname}"))?;
    }
    if wanted.network {
        loopback_up().step(|| "bring up loopback".into())?;
    }
    for (name, value) in &wanted.sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).step(|| format!("set sysctl {name}={value}"))?;
    }
    for pin_name in pins {
        pin(&PathBuf::from(format!("/proc/thread-self/ns/{pin_name}")), &dir.join(pin_name))?;
    }
    Ok(())
}

/// Keeps a namespace alive under a path.
pub fn pin(namespace: &Path, path: &Path) -> Result<()> {
    let step = || format!("pin {} at {}", namespace.display(), path.display());
    File::create(path).step(step)?;
    let (from, to) = (c_path(namespace).step(step)?, c_path(path).step(step)?);
    // SAFETY: both paths are NUL-terminated and outlive the call; null is allowed for the rest.
    let result =
        unsafe { libc::mount(from.as_ptr(), to.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()) };
    if result < 0 { Err(io::Error::last_os_error()).step(step) } else { Ok(()) }
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: ifreq is plain data for which zero is valid; the ioctl reads and writes only it.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        let result = libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &request);
        let error = io::Error::last_os_error();
        libc::close(socket);
        if result < 0 { Err(error) } else { Ok(()) }
    }
}

/// Connects to a port on loopback inside a network namespace (`None`: the host's). Blocking.
pub fn connect(netns: Option<&Path>, port: u16) -> Result<TcpStream> {
    let namespace = match netns {
        Some(path) => Some(File::open(path).step(|| format!("open {}", path.display()))?),
        None => None,
    };
    let connect = move || -> Result<TcpStream> {
        if let Some(namespace) = &namespace {
            // SAFETY: setns affects this thread only, which ends after the connection is made.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error()).step(|| "enter the pod's network".into());
            }
        }
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        TcpStream::connect_timeout(&v4, CONNECT_TIMEOUT)
            .or_else(|error| TcpStream::connect_timeout(&v6, CONNECT_TIMEOUT).map_err(|_| error))
            .map_err(|error| {
                Error::new(
                    Kind::Unavailable,
                    format!("failed to connect to localhost:{port} inside the pod: {error}"),
                )
            })
    };
    std::thread::Builder::new()
        .name("port-forward".into())
        .stack_size(64 << 10)
        .spawn(connect)
        .step(|| "start a thread".into())?
        .join()
        .map_err(|_| Error::internal("the thread that connects panicked"))?
}
