//! The server's end of the keeper: finds or starts it, sends requests, hands out events, and when the keeper dies,
//! starts another and gives it everything back.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use super::protocol::{
    AdoptContainer, Answer, Event, Failure, FailureKind, FromKeeper, Op, Request, Running,
};
use super::socket;
use crate::error::{Context, Error, Kind, Result};

/// How long a request waits for a keeper that is being replaced.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between attempts to start a keeper that will not start.
const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// How long a fresh keeper may take until its socket answers; it takes about 2 ms.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// An answer with the descriptors that came beside it.
pub type Answered = (Answer, Vec<OwnedFd>);

/// Gives a new keeper what the old one held.
#[async_trait::async_trait]
pub trait Holdings: Send + Sync {
    /// Everything believed to run, with terminals where we hold copies.
    fn to_adopt(&self) -> Vec<(AdoptContainer, Option<OwnedFd>)>;
    /// What the keeper says runs, each time a connection is made; called before any event of that connection.
    async fn connected(&self, running: Vec<Running>, is_new: bool);
}

/// What the client tells its owner.
#[derive(Debug)]
pub enum Notice {
    Keeper(Event),
    /// The connection ended; execs of that connection will never be heard of again.
    Lost,
}

/// A handle; clones share the connection.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    connection: watch::Sender<Option<Arc<AsyncFd<OwnedFd>>>>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Result<Answered, Failure>>>>,
    seq: AtomicU64,
    pid: AtomicI32,
}

impl Client {
    /// Connects to the keeper on `socket`, starting one by `command` (program and arguments, to which
    /// `--socket PATH` is added) if none runs. A background task keeps the connection until the last clone of
    /// the returned client is dropped.
    pub async fn start(
        socket: PathBuf,
        command: Vec<String>,
        holdings: Arc<dyn Holdings>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Notice>)> {
        let shared = Arc::new(Shared {
            connection: watch::Sender::new(None),
            waiting: Mutex::new(HashMap::new()),
            seq: AtomicU64::new(0),
            pid: AtomicI32::new(0),
        });
        let client = Self { shared };
        // Unbounded, because its only producer is the keeper's socket, which the keeper bounds by cutting us off.
        let (notices, receiver) = mpsc::unbounded_channel();
        let (fd, is_new) = connect_or_start(&socket, &command).await?;
        let weak = Arc::downgrade(&client.shared);
        let (ready, when_ready) = oneshot::channel();
        tokio::spawn(async move {
            let mut next = Some((fd, is_new));
            let mut ready = Some(ready);
            loop {
                let (fd, is_new) = match next.take() {
                    Some(connected) => connected,
                    None => match connect_or_start(&socket, &command).await {
                        Ok(connected) => connected,
                        Err(error) => {
                            tracing::error!(%error, "cannot start the keeper of containers, will try again");
                            tokio::time::sleep(RESTART_PAUSE).await;
                            if weak.strong_count() == 0 {
                                return;
                            }
                            continue;
                        }
                    },
                };
                let Some(shared) = weak.upgrade() else { return };
                let ended = serve(&shared, fd, is_new, &*holdings, &notices, ready.take());
                drop(shared);
                ended.await;
                let Some(shared) = weak.upgrade() else { return };
                shared.connection.send_replace(None);
                shared.waiting.lock().clear();
                if notices.send(Notice::Lost).is_err() {
                    return;
                }
                tracing::warn!("the keeper of containers is gone, starting another");
            }
        });
        when_ready.await.map_err(|_| Error::new(Kind::Unavailable, "the keeper hung up at once"))?;
        Ok((client, receiver))
    }

    /// The keeper's process id.
    pub fn keeper_pid(&self) -> i32 {
        self.shared.pid.load(Ordering::Relaxed)
    }

    /// Sends a request and waits for its answer.
    pub async fn call(&self, op: Op, fds: &[BorrowedFd<'_>]) -> Result<Answered> {
        let connection = self.shared.connected().await?;
        self.shared.call_on(&connection, op, fds).await
    }
}

impl Shared {
    /// The connection, waiting for one that is being replaced.
    async fn connected(&self) -> Result<Arc<AsyncFd<OwnedFd>>> {
        let mut connection = self.connection.subscribe();
        let wait = async {
            // The guard must not live across an await of the caller: it is a lock.
            connection.wait_for(Option::is_some).await.ok().and_then(|connection| connection.clone())
        };
        tokio::time::timeout(CONNECT_TIMEOUT, wait)
            .await
            .ok()
            .flatten()
            .ok_or_else(|| Error::new(Kind::Unavailable, "the keeper of containers does not answer"))
    }

    async fn call_on(&self, fd: &AsyncFd<OwnedFd>, op: Op, fds: &[BorrowedFd<'_>]) -> Result<Answered> {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().insert(seq, sender);
        let request = Request { seq, op };
        loop {
            let mut guard = fd.writable().await.step(|| "wait for the keeper".into())?;
            match guard.try_io(|fd| socket::send(fd.as_raw_fd(), &request, fds)) {
                Err(_would_block) => continue,
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    self.waiting.lock().remove(&seq);
                    return Err(Error::new(Kind::Unavailable, format!("write to the keeper: {error}")));
                }
            }
        }
        match receiver.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failure)) => Err(failure.into()),
            Err(_) => Err(Error::new(Kind::Unavailable, "the keeper died before it answered")),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let kind = match failure.kind {
            FailureKind::NotFound => Kind::NotFound,
            FailureKind::CannotRun => Kind::CannotRun,
            FailureKind::Internal => Kind::Internal,
        };
        Self::new(kind, failure.message)
    }
}

/// One connection, to its end. Holds no strong reference between messages, so that dropping the client ends it.
fn serve<'a>(
    shared: &Arc<Shared>,
    fd: OwnedFd,
    is_new: bool,
    holdings: &'a dyn Holdings,
    notices: &'a mpsc::UnboundedSender<Notice>,
    ready: Option<oneshot::Sender<()>>,
) -> impl Future<Output = ()> + use<'a> {
    let weak = Arc::downgrade(shared);
    async move {
        // SAFETY: the descriptor is owned by the AsyncFd and stays open as long as it is registered.
        let Ok(fd) = (unsafe { AsyncFd::register(fd) }).map(Arc::new) else { return };
        let greeting = {
            let (fd, weak) = (fd.clone(), weak.clone());
            async move {
                let Some(shared) = weak.upgrade() else { return };
                if let Err(error) = greet(&shared, &fd, is_new, holdings).await {
                    tracing::error!(%error, "cannot hand containers to the keeper");
                    return;
                }
                shared.connection.send_replace(Some(fd));
                if let Some(ready) = ready {
                    let _ = ready.send(());
                }
            }
        };
        let reading = async {
            loop {
                let message = match read(&fd).await {
                    Ok(Some(message)) => message,
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(%error, "cannot read from the keeper");
                        return;
                    }
                };
                let Some(shared) = weak.upgrade() else { return };
                match message {
                    (FromKeeper::Reply { seq, result }, fds) => {
                        if let Some(waiting) = shared.waiting.lock().remove(&seq) {
                            let _ = waiting.send(result.map(|answer| (answer, fds)));
                        }
                    }
                    (FromKeeper::Event(event), _) => {
                        let _ = notices.send(Notice::Keeper(event));
                    }
                }
            }
        };
        tokio::pin!(reading);
        tokio::select! {
            () = &mut reading => return,
            () = greeting => {}
        }
        // The owner going away is noticed here even when the keeper says nothing.
        tokio::select! {
            () = reading => {}
            () = notices.closed() => {}
        }
    }
}

async fn greet(shared: &Shared, fd: &AsyncFd<OwnedFd>, is_new: bool, holdings: &dyn Holdings) -> Result<()> {
    let (answer, _) = shared.call_on(fd, Op::Hello, &[]).await?;
    let Answer::Hello { pid, running } = answer else {
        return Err(Error::internal("the keeper answered a greeting with something else"));
    };
    shared.pid.store(pid, Ordering::Relaxed);
    let known: std::collections::HashSet<&str> = running.iter().map(|running| running.id.as_str()).collect();
    let adopt: Vec<_> = holdings
        .to_adopt()
        .into_iter()
        .filter(|(adopt, _)| !known.contains(adopt.container.id.as_str()))
        .collect();
    holdings.connected(running, is_new).await;
    for (adopt, terminal) in adopt {
        let id = adopt.container.id.clone();
        let fds: Vec<BorrowedFd<'_>> = terminal.iter().map(AsFd::as_fd).collect();
        if let Err(error) = shared.call_on(fd, Op::Adopt(adopt), &fds).await {
            tracing::error!(container = id, %error, "the keeper did not take over a container");
        }
    }
    Ok(())
}

async fn read(fd: &AsyncFd<OwnedFd>) -> io::Result<Option<(FromKeeper, Vec<OwnedFd>)>> {
    loop {
        let mut guard = fd.readable().await?;
        match guard.try_io(|fd| socket::receive(fd.as_raw_fd())) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Returns the connection, and whether the keeper behind it was started just now.
async fn connect_or_start(path: &Path, command: &[String]) -> Result<(OwnedFd, bool)> {
    if let Ok(fd) = socket::connect(path) {
        return Ok((fd, false));
    }
    start(path, command).await?;
    let fd = socket::connect(path).step(|| format!("connect to the keeper at {}", path.display()))?;
    Ok((fd, true))
}

/// Starts a keeper and waits until it listens: it forks into the background only then.
async fn start(path: &Path, command: &[String]) -> Result<()> {
    let [program, arguments @ ..] = command else {
        return Err(Error::invalid("no command to start the keeper by"));
    };
    let log = path.with_extension("log");
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .step(|| format!("open {}", log.display()))?;
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .arg("--socket")
        .arg(path)
        .current_dir("/")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .step(|| format!("start the keeper by {program}"))?;
    let status = tokio::time::timeout(START_TIMEOUT, child.wait())
        .await
        .map_err(|_| Error::new(Kind::Unavailable, "the keeper did not start in time"))?
        .step(|| "wait for the keeper's start".into())?;
    if !status.success() {
        let log = path.with_extension("log");
        return Err(Error::new(
            Kind::Unavailable,
            format!("the keeper did not start ({status}); see {}", log.display()),
        ));
    }
    Ok(())
}

/// The process id of the keeper listening on `path`, if one does. Blocking.
pub fn keeper_pid(path: &Path) -> Option<i32> {
    let fd = socket::connect(path).ok()?;
    let credentials = nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::PeerCredentials).ok()?;
    Some(credentials.pid())
}

/// Ends the keeper listening on `path`, if one does, and waits until it is gone. Its containers must be dead.
/// Blocking.
pub fn dismiss(path: &Path, timeout: Duration) -> Result<()> {
    let deadline = std::time::Instant::now() + timeout;
    let mut seq = 0;
    while let Ok(fd) = socket::connect(path) {
        seq += 1;
        // Refused while it has not yet noticed that its containers are dead; asked again until it is gone.
        let _ = socket::send(fd.as_raw_fd(), &Request { seq, op: Op::Exit }, &[]);
        std::thread::sleep(Duration::from_millis(5));
        if std::time::Instant::now() > deadline {
            return Err(Error::internal(format!("the keeper at {} does not end", path.display())));
        }
    }
    Ok(())
}
