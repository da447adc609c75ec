//! The keeper's event loop: one thread, one epoll set, no timers. Idle costs nothing.
//!
//! State is small: for each container its pid, its output pipes and log; for each exec its pid and who asked.
//! Exits are written to the container's bundle before anyone is told.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::create::{self, Creator, Outcome};
use super::log::{LogFile, Splitter, Stream};
use super::protocol::{
    AdoptContainer, Answer, Event, Failure, FailureKind, FromKeeper, Op, Request, Running, StartContainer,
    StartExec, Stdin,
};
use super::{pod_init, socket};
use crate::cri::ContainerExit;

/// Bytes read from a pipe at once: one pipe's worth.
const READ_BYTES: usize = 64 << 10;
/// Reads of one pipe before others get their turn.
const READS_PER_TURN: usize = 4;
/// Events taken from the kernel at once.
const EVENTS_PER_TURN: usize = 64;

/// Runs until told to exit. Arguments: `--socket PATH`.
pub fn main(args: Vec<String>) -> i32 {
    let [flag, path] = args.as_slice() else {
        eprintln!("usage: keeper --socket PATH");
        return 2;
    };
    if flag != "--socket" {
        eprintln!("usage: keeper --socket PATH");
        return 2;
    }
    match Keeper::new(Path::new(path)).and_then(|keeper| {
        detach()?;
        keeper.run()
    }) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("keeper on {path}: {error}");
            1
        }
    }
}

/// Leaves the caller's session; the caller waits only for the first fork.
fn detach() -> io::Result<()> {
    // SAFETY: the process has one thread.
    match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {}
        // SAFETY: ends the first process without dropping what the second one uses.
        _ => unsafe { libc::_exit(0) },
    }
    // SAFETY: plain system calls. Orphans of containers without a process namespace come to us to be reaped.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_NAME, c"knarr-keeper".as_ptr());
    }
    // Last to be killed for lack of memory, like the kubelet.
    let _ = fs::write("/proc/self/oom_score_adj", "-999");
    Ok(())
}

struct Keeper {
    epoll: Epoll,
    signals: SignalFd,
    listener: OwnedFd,
    socket_path: PathBuf,
    /// Held for the keeper's life, so that there is one per socket.
    _lock: nix::fcntl::Flock<File>,
    next_token: u64,
    sources: HashMap<u64, Source>,
    connections: HashMap<u64, OwnedFd>,
    containers: HashMap<String, Container>,
    execs: HashMap<u64, Exec>,
    /// What a child's end means, by pid.
    children: HashMap<i32, Child>,
    /// Ends of children nobody has claimed yet, kept while creators run: a short-lived container may end before
    /// its creator has told its pid.
    unclaimed: HashMap<i32, i32>,
    creators: HashMap<u64, Pending>,
    pod_inits: HashMap<String, i32>,
    buffer: Vec<u8>,
    exiting: bool,
}

/// What a descriptor in the epoll set is.
enum Source {
    Listener,
    Signals,
    Connection,
    Creator,
    Output { id: String, stream: Stream },
    Adopted { id: String, pidfd: OwnedFd },
}

#[derive(Clone)]
enum Child {
    Container(String),
    Exec(u64),
    PodInit(String),
}

struct Container {
    start: StartContainer,
    pid: i32,
    start_ticks: u64,
    log: LogFile,
    outputs: Vec<Output>,
    terminal: Option<OwnedFd>,
    /// Keeps the container's input open until told otherwise.
    stdin_hold: Option<File>,
    attached: Vec<Attached>,
    exited: bool,
}

struct Output {
    token: u64,
    fd: OwnedFd,
    splitter: Splitter,
}

/// One reader of a container's output.
struct Attached {
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

struct Exec {
    pid: i32,
    connection: u64,
}

/// A reply that waits for a creator.
struct Pending {
    creator: Creator,
    connection: u64,
    seq: u64,
    what: PendingWhat,
}

enum PendingWhat {
    Container(Box<StartContainer>, Vec<(Stream, OwnedFd)>, Option<File>),
    Exec,
}

type Answered = Result<(Answer, Option<OwnedFd>), Failure>;

impl Keeper {
    fn new(socket_path: &Path) -> io::Result<Self> {
        let lock_path = socket_path.with_extension("lock");
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path)?;
        let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock)
            .map_err(|(_, _)| io::Error::other("another keeper is running"))?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        // A terminal's or an operator's stray signals must not end what all containers hang on.
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let keeper = Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            signals: SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            listener: socket::listen(socket_path)?,
            socket_path: socket_path.to_owned(),
            _lock: lock,
            next_token: 0,
            sources: HashMap::new(),
            connections: HashMap::new(),
            containers: HashMap::new(),
            execs: HashMap::new(),
            children: HashMap::new(),
            unclaimed: HashMap::new(),
            creators: HashMap::new(),
            pod_inits: HashMap::new(),
            buffer: Vec::new(),
            exiting: false,
        };
        Ok(keeper)
    }

    fn run(mut self) -> io::Result<()> {
        let listener = self.next();
        self.epoll.add(&self.listener, EpollEvent::new(EpollFlags::EPOLLIN, listener))?;
        self.sources.insert(listener, Source::Listener);
        let signals = self.next();
        self.epoll.add(self.signals.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, signals))?;
        self.sources.insert(signals, Source::Signals);
        let mut events = [EpollEvent::empty(); EVENTS_PER_TURN];
        while !self.exiting {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                other => other?,
            };
            for event in &events[..count] {
                self.dispatch(event.data(), event.events());
            }
            // Output is rare on most nodes; do not hold a buffer for it.
            self.buffer = Vec::new();
        }
        let _ = fs::remove_file(&self.socket_path);
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, flags: EpollFlags, source: Source) -> io::Result<u64> {
        let token = self.next();
        self.epoll.add(fd, EpollEvent::new(flags, token))?;
        self.sources.insert(token, source);
        Ok(token)
    }

    fn dispatch(&mut self, token: u64, flags: EpollFlags) {
        match self.sources.get(&token) {
            Some(Source::Listener) => self.accept(),
            Some(Source::Signals) => self.reap(),
            Some(Source::Connection) => self.receive(token),
            Some(Source::Creator) => self.created(token),
            Some(Source::Output { id, stream }) => {
                let (id, stream) = (id.clone(), *stream);
                self.pump(&id, stream, token, READS_PER_TURN);
            }
            Some(Source::Adopted { .. }) => self.adopted_ended(token, flags),
            None => {}
        }
    }

    fn accept(&mut self) {
        while let Ok(fd) = socket::accept(self.listener.as_raw_fd()) {
            match self.watch(fd.as_fd(), EpollFlags::EPOLLIN, Source::Connection) {
                Ok(token) => {
                    self.connections.insert(token, fd);
                }
                Err(error) => eprintln!("watch connection: {error}"),
            }
        }
    }

    fn hang_up(&mut self, token: u64) {
        self.sources.remove(&token);
        // Dropping the descriptor takes it out of the epoll set.
        self.connections.remove(&token);
    }

    fn receive(&mut self, token: u64) {
        loop {
            let Some(connection) = self.connections.get(&token) else { return };
            match socket::receive::<Request>(connection.as_raw_fd()) {
                Ok(Some((request, fds))) => self.handle(token, request, fds),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) => return self.hang_up(token),
                Err(error) => {
                    eprintln!("receive: {error}");
                    return self.hang_up(token);
                }
            }
        }
    }

    fn handle(&mut self, connection: u64, request: Request, fds: Vec<OwnedFd>) {
        let seq = request.seq;
        let answered = match request.op {
            Op::Start(start) => match self.start(connection, seq, start) {
                Ok(()) => return,
                Err(failure) => Err(failure),
            },
            Op::Exec(exec) => match self.exec(connection, seq, exec, fds) {
                Ok(()) => return,
                Err(failure) => Err(failure),
            },
            op => self.answer(op, fds),
        };
        self.reply(connection, seq, answered);
    }

    fn answer(&mut self, op: Op, fds: Vec<OwnedFd>) -> Answered {
        match op {
            Op::Hello => Ok((self.hello(), None)),
            Op::Adopt(adopt) => self.adopt(adopt, fds.into_iter().next()).map(|()| (Answer::Done, None)),
            Op::Signal { id, signal } => self.signal(&id, signal).map(|()| (Answer::Done, None)),
            Op::KillExec { exec } => {
                if let Some(exec) = self.execs.get(&exec) {
                    // The process leads a session of its own; what it started goes with it.
                    // SAFETY: kill of our own unreaped child, whose pid cannot have been reused.
                    unsafe {
                        libc::kill(-exec.pid, libc::SIGKILL);
                        libc::kill(exec.pid, libc::SIGKILL);
                    }
                }
                Ok((Answer::Done, None))
            }
            Op::Attach { id, stdout, stderr } => {
                self.attach(&id, stdout, stderr, fds).map(|()| (Answer::Done, None))
            }
            Op::CloseStdin { id } => {
                self.container(&id)?.stdin_hold = None;
                Ok((Answer::Done, None))
            }
            Op::ReopenLog { id } => match self.container(&id)?.log.reopen() {
                Ok(()) => Ok((Answer::Done, None)),
                Err(error) => Err(internal(format!("reopen log of {id}: {error}"))),
            },
            Op::Terminal { id } => {
                let terminal = self.container(&id)?.terminal.as_ref().map(OwnedFd::try_clone);
                match terminal {
                    Some(Ok(fd)) => Ok((Answer::Done, Some(fd))),
                    Some(Err(error)) => Err(internal(format!("copy terminal of {id}: {error}"))),
                    None => Err(not_found(format!("container {id} has no terminal"))),
                }
            }
            Op::Forget { id } => {
                self.forget(&id);
                Ok((Answer::Done, None))
            }
            Op::StartPodInit { sandbox } => self.start_pod_init(sandbox).map(|answer| (answer, None)),
            Op::StopPodInit { sandbox } => {
                if let Some(pid) = self.pod_inits.remove(&sandbox) {
                    // SAFETY: kill of our own unreaped child, whose pid cannot have been reused.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                }
                Ok((Answer::Done, None))
            }
            Op::Exit => {
                let running = self.containers.values().filter(|container| !container.exited).count();
                if running > 0 {
                    return Err(internal(format!("{running} containers are still running")));
                }
                self.exiting = true;
                Ok((Answer::Done, None))
            }
            Op::Start(_) | Op::Exec(_) => Err(internal("answered elsewhere".into())),
        }
    }

    fn hello(&self) -> Answer {
        let running = self
            .containers
            .iter()
            .filter(|(_, container)| !container.exited)
            .map(|(id, container)| Running { id: id.clone(), pid: container.pid })
            .collect();
        Answer::Hello { pid: std::process::id() as i32, running }
    }

    fn reply(&mut self, connection: u64, seq: u64, answered: Answered) {
        let (result, fd) = match answered {
            Ok((answer, fd)) => (Ok(answer), fd),
            Err(failure) => (Err(failure), None),
        };
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(AsFd::as_fd).collect();
        self.send(connection, &FromKeeper::Reply { seq, result }, &fds);
    }

    /// Whoever does not keep up is cut off; it finds everything on disk and by `Hello` when it comes back.
    fn send(&mut self, connection: u64, message: &FromKeeper, fds: &[BorrowedFd<'_>]) {
        let Some(fd) = self.connections.get(&connection) else { return };
        if let Err(error) = socket::send(fd.as_raw_fd(), message, fds) {
            eprintln!("send to connection {connection}: {error}");
            self.hang_up(connection);
        }
    }

    fn broadcast(&mut self, event: Event) {
        let message = FromKeeper::Event(event);
        let tokens: Vec<u64> = self.connections.keys().copied().collect();
        for token in tokens {
            self.send(token, &message, &[]);
        }
    }

    fn container(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.get_mut(id).ok_or_else(|| not_found(format!("the keeper holds no container {id}")))
    }

    fn start(&mut self, connection: u64, seq: u64, start: StartContainer) -> Result<(), Failure> {
        if self.containers.contains_key(&start.id) {
            return Err(internal(format!("container {} is already started", start.id)));
        }
        // Our ends first, so that the container's opens find a reader.
        let outputs = if start.terminal { Vec::new() } else { open_outputs(&start.bundle)? };
        let hold = match start.stdin {
            Stdin::Once if !start.terminal => Some(open_stdin(&start.bundle)?),
            _ => None,
        };
        let creator = create::start_container(&start).map_err(|error| internal(format!("fork: {error}")))?;
        let what = PendingWhat::Container(Box::new(start), outputs, hold);
        self.pend(Pending { creator, connection, seq, what })
    }

    fn exec(&mut self, connection: u64, seq: u64, exec: StartExec, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        if self.container(&exec.id)?.exited {
            return Err(not_found(format!("container {} is not running", exec.id)));
        }
        let mut fds = fds.into_iter();
        let streams = exec.streams.map(|present| if present { fds.next() } else { None });
        let creator =
            create::start_exec(&exec, streams).map_err(|error| internal(format!("fork: {error}")))?;
        self.pend(Pending { creator, connection, seq, what: PendingWhat::Exec })
    }

    fn pend(&mut self, pending: Pending) -> Result<(), Failure> {
        let token = self
            .watch(pending.creator.result.as_fd(), EpollFlags::EPOLLIN, Source::Creator)
            .map_err(|error| internal(format!("watch creator: {error}")))?;
        self.creators.insert(token, pending);
        Ok(())
    }

    fn created(&mut self, token: u64) {
        self.sources.remove(&token);
        let Some(pending) = self.creators.remove(&token) else { return };
        let outcome = socket::receive::<Outcome>(pending.creator.result.as_raw_fd());
        let _ = self.epoll.delete(&pending.creator.result);
        let (outcome, fds) = match outcome {
            Ok(Some(received)) => received,
            Ok(None) => (Err(internal("the process that builds containers died".into())), Vec::new()),
            Err(error) => (Err(internal(format!("hear from creator: {error}"))), Vec::new()),
        };
        let terminal = fds.into_iter().next();
        let Pending { connection, seq, what, .. } = pending;
        let answered = outcome.and_then(|pid| match what {
            PendingWhat::Container(start, outputs, hold) => self.hold(*start, pid, outputs, terminal, hold),
            PendingWhat::Exec => {
                let exec = self.next();
                self.execs.insert(exec, Exec { pid, connection });
                self.children.insert(pid, Child::Exec(exec));
                Ok((Answer::Started { pid, start_ticks: start_ticks(pid), exec }, terminal))
            }
        });
        let pid = match &answered {
            Ok((Answer::Started { pid, .. }, _)) => Some(*pid),
            _ => None,
        };
        self.reply(connection, seq, answered);
        if let Some(pid) = pid
            && let Some(status) = self.unclaimed.remove(&pid)
        {
            self.ended(pid, status);
        }
        if self.creators.is_empty() {
            self.unclaimed.clear();
        }
    }

    /// Takes a started container into care; replies with a copy of its terminal.
    fn hold(
        &mut self,
        start: StartContainer,
        pid: i32,
        outputs: Vec<(Stream, OwnedFd)>,
        terminal: Option<OwnedFd>,
        stdin_hold: Option<File>,
    ) -> Answered {
        let id = start.id.clone();
        let start_ticks = start_ticks(pid);
        let copy = terminal.as_ref().map(OwnedFd::try_clone).transpose();
        let copy = copy.map_err(|error| internal(format!("copy terminal: {error}")))?;
        self.insert(start, pid, start_ticks, outputs, terminal, stdin_hold)?;
        self.children.insert(pid, Child::Container(id));
        Ok((Answer::Started { pid, start_ticks, exec: 0 }, copy))
    }

    fn insert(
        &mut self,
        start: StartContainer,
        pid: i32,
        start_ticks: u64,
        mut outputs: Vec<(Stream, OwnedFd)>,
        terminal: Option<OwnedFd>,
        stdin_hold: Option<File>,
    ) -> Result<(), Failure> {
        let id = start.id.clone();
        let log = LogFile::open(start.log_path.as_deref()).unwrap_or_else(|error| {
            eprintln!("open log {:?}: {error}", start.log_path);
            LogFile::open(None).expect("opening no file cannot fail")
        });
        if let Some(terminal) = &terminal {
            set_nonblocking(terminal);
            let reader = terminal.try_clone().map_err(|error| internal(error.to_string()))?;
            outputs.push((Stream::Stdout, reader));
        }
        let mut watched = Vec::new();
        for (stream, fd) in outputs {
            let token = self
                .watch(fd.as_fd(), EpollFlags::EPOLLIN, Source::Output { id: id.clone(), stream })
                .map_err(|error| internal(format!("watch output: {error}")))?;
            watched.push(Output { token, fd, splitter: Splitter::new(stream) });
        }
        let container = Container {
            start,
            pid,
            start_ticks,
            log,
            outputs: watched,
            terminal,
            stdin_hold,
            attached: Vec::new(),
            exited: false,
        };
        self.containers.insert(id, container);
        Ok(())
    }

    fn adopt(&mut self, adopt: AdoptContainer, terminal: Option<OwnedFd>) -> Result<(), Failure> {
        let AdoptContainer { container: start, pid, start_ticks: expected } = adopt;
        let id = start.id.clone();
        if self.containers.contains_key(&id) {
            return Ok(());
        }
        let outputs = if start.terminal { Vec::new() } else { open_outputs(&start.bundle)? };
        let hold = match start.stdin {
            Stdin::Once if !start.terminal => Some(open_stdin(&start.bundle)?),
            _ => None,
        };
        // SAFETY: pidfd_open takes plain numbers.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        // Checked after opening: from here on the number cannot come to mean another process.
        let alive = pidfd >= 0 && start_ticks(pid) == expected;
        self.insert(start, pid, expected, outputs, terminal, hold)?;
        if pidfd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
            if alive {
                let fd = pidfd.as_raw_fd();
                // SAFETY: borrowed only for the call; the descriptor moves into the table, which keeps it open.
                let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
                let source = Source::Adopted { id: id.clone(), pidfd };
                self.watch(borrowed, EpollFlags::EPOLLIN, source)
                    .map_err(|error| internal(format!("watch process: {error}")))?;
                return Ok(());
            }
        }
        self.container_ended(&id, None);
        Ok(())
    }

    /// A process that is not our child: its status is in the pidfd once it is reaped, in `/proc` until then.
    fn adopted_ended(&mut self, token: u64, flags: EpollFlags) {
        let Some(Source::Adopted { id, pidfd }) = self.sources.get(&token) else { return };
        let pid = self.containers.get(id).map_or(0, |container| container.pid);
        let status = reaped_status(pidfd).or_else(|| zombie_status(pid));
        if status.is_none() && !flags.contains(EpollFlags::EPOLLHUP) {
            // Neither yet: wait for the hang-up that follows reaping.
            let _ = self.epoll.modify(pidfd, &mut EpollEvent::new(EpollFlags::empty(), token));
            return;
        }
        let id = id.clone();
        self.sources.remove(&token);
        self.container_ended(&id, status);
    }

    fn signal(&mut self, id: &str, signal: i32) -> Result<(), Failure> {
        let container = self.container(id)?;
        if container.exited {
            return Ok(());
        }
        if start_ticks(container.pid) != container.start_ticks {
            return Ok(());
        }
        // SAFETY: the process is our unreaped child, or was just checked to be the one adopted.
        match unsafe { libc::kill(container.pid, signal) } {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                error => Err(internal(format!("signal {signal} to {id}: {error}"))),
            },
        }
    }

    fn attach(&mut self, id: &str, stdout: bool, stderr: bool, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        let mut fds = fds.into_iter();
        let mut take = |wanted: bool| if wanted { fds.next() } else { None };
        let attached = Attached { stdout: take(stdout), stderr: take(stderr) };
        for fd in attached.stdout.iter().chain(&attached.stderr) {
            set_nonblocking(fd);
        }
        let container = self.container(id)?;
        if container.exited {
            return Err(not_found(format!("container {id} is not running")));
        }
        container.attached.push(attached);
        Ok(())
    }

    fn forget(&mut self, id: &str) {
        let Some(container) = self.containers.remove(id) else { return };
        for output in &container.outputs {
            self.sources.remove(&output.token);
            let _ = self.epoll.delete(&output.fd);
        }
        self.sources.retain(|_, source| !matches!(source, Source::Adopted { id: have, .. } if have == id));
    }

    fn start_pod_init(&mut self, sandbox: String) -> Result<Answer, Failure> {
        if let Some(pid) = self.pod_inits.get(&sandbox) {
            return Ok(Answer::Started { pid: *pid, start_ticks: start_ticks(*pid), exec: 0 });
        }
        let pid = pod_init::start().map_err(|error| internal(format!("start pod init: {error}")))?;
        self.children.insert(pid, Child::PodInit(sandbox.clone()));
        self.pod_inits.insert(sandbox, pid);
        Ok(Answer::Started { pid, start_ticks: start_ticks(pid), exec: 0 })
    }

    /// Collects every child that has ended.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::Exited(pid, code)) => self.ended(pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.ended(pid.as_raw(), 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    fn ended(&mut self, pid: i32, code: i32) {
        match self.children.remove(&pid) {
            Some(Child::Container(id)) => self.container_ended(&id, Some(code)),
            Some(Child::Exec(exec)) => {
                if let Some(Exec { connection, .. }) = self.execs.remove(&exec) {
                    self.send(connection, &FromKeeper::Event(Event::ExecExited { exec, code }), &[]);
                }
            }
            Some(Child::PodInit(sandbox)) => {
                self.pod_inits.remove(&sandbox);
            }
            None if !self.creators.is_empty() => {
                self.unclaimed.insert(pid, code);
            }
            None => {}
        }
    }

    /// `code` is `None` when nobody can tell any more.
    fn container_ended(&mut self, id: &str, code: Option<i32>) {
        // What the process wrote before it ended belongs into the log before its end is told.
        let outputs: Vec<(u64, Stream)> = match self.containers.get(id) {
            Some(container) => {
                container.outputs.iter().map(|out| (out.token, out.splitter.stream())).collect()
            }
            None => return,
        };
        for (token, stream) in outputs {
            self.pump(id, stream, token, usize::MAX);
        }
        let Some(container) = self.containers.get_mut(id) else { return };
        container.exited = true;
        container.attached.clear();
        container.stdin_hold = None;
        let oom_file = container.start.oom_file.as_deref();
        let oom_killed = oom_file.is_some_and(|file| crate::cgroup::flat_value(file, "oom_kill") > 0);
        let exit = exit_record(code, oom_killed);
        if let Err(error) = write_exit(&container.start.bundle, &exit) {
            eprintln!("write exit of {id}: {error}");
        }
        self.broadcast(Event::ContainerExited { id: id.to_owned(), exit });
    }

    /// Moves what is in a pipe to the log and to whoever is attached.
    fn pump(&mut self, id: &str, stream: Stream, token: u64, reads_max: usize) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(index) = container.outputs.iter().position(|output| output.token == token) else { return };
        self.buffer.resize(READ_BYTES, 0);
        let mut lines = Vec::new();
        let mut ended = false;
        for _ in 0..reads_max {
            let output = &mut container.outputs[index];
            // SAFETY: the buffer is valid for its length; the descriptor is ours and non-blocking.
            let count = unsafe {
                libc::read(output.fd.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len())
            };
            match count {
                0 => ended = true,
                // EIO is how a terminal says that its last process is gone.
                -1 => ended = io::Error::last_os_error().raw_os_error() == Some(libc::EIO),
                count => {
                    let chunk = &self.buffer[..count as usize];
                    output.splitter.push(Timestamp::now(), chunk, &mut lines);
                    container.attached.retain_mut(|attached| attached.write(stream, chunk));
                    if container.log.is_open() {
                        container.log.write(&lines);
                    }
                    lines.clear();
                    continue;
                }
            }
            break;
        }
        if ended {
            let mut output = container.outputs.remove(index);
            output.splitter.finish(Timestamp::now(), &mut lines);
            container.log.write(&lines);
            self.sources.remove(&token);
            let _ = self.epoll.delete(&output.fd);
        }
    }
}

impl Attached {
    /// False when the reader is gone or has fallen a whole pipe behind: a slow client must not stop a container.
    fn write(&mut self, stream: Stream, chunk: &[u8]) -> bool {
        let fd = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        let Some(fd) = fd else { return true };
        // SAFETY: the chunk is valid for its length; the descriptor is ours and non-blocking.
        let count = unsafe { libc::write(fd.as_raw_fd(), chunk.as_ptr().cast(), chunk.len()) };
        count == chunk.len() as isize
    }
}

fn open_outputs(bundle: &Path) -> Result<Vec<(Stream, OwnedFd)>, Failure> {
    let open = |name: &str| {
        let path = bundle.join(name);
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|error| internal(format!("open {}: {error}", path.display())))
    };
    Ok(vec![(Stream::Stdout, open("stdout")?.into()), (Stream::Stderr, open("stderr")?.into())])
}

fn open_stdin(bundle: &Path) -> Result<File, Failure> {
    let path = bundle.join("stdin");
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(|error| internal(format!("open {}: {error}", path.display())))
}

fn set_nonblocking(fd: &OwnedFd) {
    // SAFETY: fcntl on a descriptor we own.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
    }
}

fn exit_record(code: Option<i32>, oom_killed: bool) -> ContainerExit {
    let finished_at = Timestamp::now().as_nanosecond() as i64;
    let Some(code) = code else {
        return ContainerExit {
            code: 137,
            oom_killed,
            finished_at,
            reason: "ContainerStatusUnknown".into(),
            message: "the container ended while nobody was there to see its exit code".into(),
        };
    };
    let oom_killed = oom_killed && code != 0;
    let reason = match (oom_killed, code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    ContainerExit { code, oom_killed, finished_at, reason: reason.into(), message: String::new() }
}

fn write_exit(bundle: &Path, exit: &ContainerExit) -> io::Result<()> {
    let temporary = bundle.join("exit.json.new");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(exit)?)?;
    fs::rename(&temporary, bundle.join("exit.json"))
}

/// When a process was started, in clock ticks since boot; 0 if there is none.
pub fn start_ticks(pid: i32) -> u64 {
    stat_field(pid, 22).and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// The wait status of a zombie, as an exit code.
fn zombie_status(pid: i32) -> Option<i32> {
    if stat_field(pid, 3)? != "Z" {
        return None;
    }
    Some(code_of(stat_field(pid, 52)?.parse().ok()?))
}

/// A field of `/proc/PID/stat`, numbered as in proc(5).
fn stat_field(pid: i32, number: usize) -> Option<String> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/stat")).ok()?.read_to_string(&mut text).ok()?;
    // The second field is a name in parentheses, which may itself hold blanks and parentheses.
    let rest = &text[text.rfind(')')? + 2..];
    rest.split_whitespace().nth(number - 3).map(str::to_owned)
}

/// The exit code that a pidfd tells after its process was reaped (Linux 6.15 and later).
fn reaped_status(pidfd: &OwnedFd) -> Option<i32> {
    /// `struct pidfd_info`, first version.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const PIDFD_GET_INFO: libc::c_ulong = 0xC040_FF0B;
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    let mut info = Info { mask: PIDFD_INFO_EXIT, ..Info::default() };
    // SAFETY: `info` has the size that the request number tells, and lives through the call.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &mut info) };
    (result == 0 && info.mask & PIDFD_INFO_EXIT != 0).then(|| code_of(info.exit_code))
}

/// Wait status to exit code.
fn code_of(status: i32) -> i32 {
    match status & 0x7f {
        0 => (status >> 8) & 0xff,
        signal => 128 + signal,
    }
}

fn internal(message: String) -> Failure {
    Failure { kind: FailureKind::Internal, message }
}

fn not_found(message: String) -> Failure {
    Failure { kind: FailureKind::NotFound, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_become_exit_codes() {
        for (status, code) in [(0, 0), (1 << 8, 1), (255 << 8, 255), (9, 137), (15, 143), (11 | 0x80, 139)] {
            assert_eq!(code_of(status), code, "{status:#x}");
        }
    }

    #[test]
    fn exits_have_kubernetes_reasons() {
        let reason = |code, oom| exit_record(code, oom).reason;
        assert_eq!(reason(Some(0), false), "Completed");
        assert_eq!(reason(Some(3), false), "Error");
        assert_eq!(reason(Some(137), true), "OOMKilled");
        assert_eq!(reason(Some(0), true), "Completed", "a killed helper is not the container's end");
        assert_eq!(reason(None, false), "ContainerStatusUnknown");
    }

    #[test]
    fn own_start_time_is_known_and_stable() {
        let pid = std::process::id() as i32;
        assert!(start_ticks(pid) > 0);
        assert_eq!(start_ticks(pid), start_ticks(pid));
        assert_eq!(start_ticks(0), 0);
    }
}
