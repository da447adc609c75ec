//! Commands in running containers, and joining the streams of their first process. Bytes flow between the caller
//! and the process without the keeper in between, except for attached output, which the keeper copies.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use k8s_cri::v1;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};

use super::record::{Container, Phase};
use super::streams::{self, Closing, Fd};
use super::{ExecSlot, Inner};
use crate::error::{Context, Error, Kind, Result};
use crate::keeper::protocol::{Answer, Op, StartExec};
use crate::spec;
use crate::stream::{ExecSession, Reader, TerminalSize, Writer};

/// Output kept of one stream of an `exec_sync`, as upstream's limit has it.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;
/// Sizes of a terminal that may wait to be set.
const RESIZES_MAX: usize = 4;
/// How long the output of an ended command may still be held open by what it left behind.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

static NEXT_EXEC: AtomicU64 = AtomicU64::new(1);

impl Inner {
    /// Starts a command; returns its streams, and the keeper's number for it.
    pub(super) async fn exec(self: &Arc<Self>, request: v1::ExecRequest) -> Result<(ExecSession, u64)> {
        if request.cmd.is_empty() {
            return Err(Error::invalid("you must specify at least one command for the container"));
        }
        let container = self.running(&request.container_id)?;
        let bundle = self.bundle(&container.id);
        let number = NEXT_EXEC.fetch_add(1, Ordering::Relaxed);
        let process = bundle.join(format!("exec-{}-{number}.json", std::process::id()));
        let spec: serde_json::Value = read_json(&bundle.join("config.json"))?;
        let bytes = serde_json::to_vec(&spec::exec_process(&spec, &request.cmd, request.tty))
            .step(|| "encode the command".into())?;
        fs::write(&process, bytes).step(|| format!("write {}", process.display()))?;
        let result = self.exec_described(&container, &request, &process).await;
        let _ = fs::remove_file(&process);
        result
    }

    async fn exec_described(
        self: &Arc<Self>,
        container: &Container,
        request: &v1::ExecRequest,
        process: &std::path::Path,
    ) -> Result<(ExecSession, u64)> {
        let pipe = |wanted: bool| {
            (wanted && !request.tty).then(streams::pipe).transpose().step(|| "make a pipe".into())
        };
        let (stdin, stdout, stderr) = (pipe(request.stdin)?, pipe(request.stdout)?, pipe(request.stderr)?);
        let theirs = [
            stdin.as_ref().map(|(read, _)| read),
            stdout.as_ref().map(|(_, write)| write),
            stderr.as_ref().map(|(_, write)| write),
        ];
        let op = Op::Exec(StartExec {
            id: container.id.clone(),
            oci_root: self.config.oci_root(),
            process: process.to_owned(),
            terminal: request.tty,
            streams: theirs.map(|stream| stream.is_some()),
            cgroup_dirs: self.cgroups.dirs(&container.cgroup),
            bundle: self.bundle(&container.id),
        });
        let fds: Vec<BorrowedFd<'_>> = theirs.iter().flatten().map(|fd| fd.as_fd()).collect();
        for fd in &fds {
            // So that the user can open /dev/stdout again.
            std::os::unix::fs::fchown(fd, Some(container.user.uid), None)
                .step(|| "give the pipe away".into())?;
        }
        let (answer, fds) = self.keeper()?.call(op, &fds).await?;
        let Answer::Started { exec, .. } = answer else {
            return Err(Error::internal("the keeper told no number for the command"));
        };
        let exit = self.exec_exit(exec);
        let mut session = ExecSession {
            stdin: None,
            stdout: None,
            stderr: None,
            resize: None,
            exit: async move {
                exit.await.map_err(|_| Error::new(Kind::Unavailable, "the keeper died while the command ran"))
            }
            .boxed(),
        };
        if request.tty {
            let fd =
                fds.into_iter().next().ok_or_else(|| Error::internal("no terminal came for the command"))?;
            join_terminal(&mut session, Fd::new(fd).step(|| "use the terminal".into())?, request.stdin);
        } else {
            let step = || "use a pipe".into();
            if let Some((_, write)) = stdin {
                session.stdin = Some(Box::pin(Closing::new(Fd::new(write).step(step)?, None)));
            }
            session.stdout = reader(stdout).step(step)?;
            session.stderr = reader(stderr).step(step)?;
        }
        Ok((session, exec))
    }

    /// Resolves to the exit code of an exec, which may have ended already.
    fn exec_exit(&self, exec: u64) -> oneshot::Receiver<i32> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state.lock();
        match state.execs.remove(&exec) {
            Some(ExecSlot::Ended(code)) => drop(sender.send(code)),
            _ => drop(state.execs.insert(exec, ExecSlot::Waiting(sender))),
        }
        receiver
    }

    pub(super) async fn exec_sync(
        self: &Arc<Self>,
        container_id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse> {
        let shown = command.join(" ");
        let request = v1::ExecRequest {
            container_id: container_id.to_owned(),
            cmd: command,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let (session, exec) = self.exec(request).await?;
        let work = collect(session);
        if timeout.is_zero() {
            return work.await;
        }
        match tokio::time::timeout(timeout, work).await {
            Ok(result) => result,
            Err(_) => {
                let _ = self.keeper()?.call(Op::KillExec { exec }, &[]).await;
                Err(Error::new(
                    Kind::DeadlineExceeded,
                    format!("command {shown:?} timed out: timeout {timeout:?} exceeded"),
                ))
            }
        }
    }

    pub(super) async fn attach(self: &Arc<Self>, request: v1::AttachRequest) -> Result<ExecSession> {
        let container = self.running(&request.container_id)?;
        let (mut exit, terminal) = {
            let state = self.state.lock();
            let entry =
                state.containers.get(&container.id).ok_or_else(|| crate::cri::no_container(&container.id))?;
            (entry.exit.subscribe(), entry.terminal.clone())
        };
        let tty = container.config.tty;
        let pipe = |wanted: bool| wanted.then(streams::large_pipe).transpose().step(|| "make a pipe".into());
        let (stdout, stderr) = (pipe(request.stdout)?, pipe(request.stderr && !tty)?);
        let fds: Vec<BorrowedFd<'_>> =
            [&stdout, &stderr].into_iter().flatten().map(|(_, write)| write.as_fd()).collect();
        let op = Op::Attach { id: container.id.clone(), stdout: stdout.is_some(), stderr: stderr.is_some() };
        self.keeper()?.call(op, &fds).await?;
        let step = || "use a pipe".into();
        let mut session = ExecSession {
            stdin: None,
            stdout: reader(stdout).step(step)?,
            stderr: reader(stderr).step(step)?,
            resize: None,
            exit: async move {
                let ended = exit.wait_for(Option::is_some).await;
                let exit = ended.ok().and_then(|exit| exit.clone());
                exit.map(|exit| exit.code).ok_or_else(|| Error::not_found("the container was removed"))
            }
            .boxed(),
        };
        if let (true, Some(terminal)) = (tty, terminal) {
            let stdout = session.stdout.take();
            join_terminal(&mut session, terminal, request.stdin && container.config.stdin);
            // Output comes through the keeper, which also logs it: two readers of a terminal would share it.
            session.stdout = stdout;
        } else if request.stdin && container.config.stdin {
            session.stdin = Some(self.container_stdin(&container)?);
        }
        Ok(session)
    }

    fn container_stdin(self: &Arc<Self>, container: &Container) -> Result<Writer> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.bundle(&container.id).join("stdin");
        let file = fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .step(|| format!("open {}", path.display()))?;
        let (inner, id) = (self.clone(), container.id.clone());
        let on_close: Option<Box<dyn FnOnce() + Send>> = container.config.stdin_once.then(|| {
            let handle = tokio::runtime::Handle::current();
            Box::new(move || {
                handle.spawn(async move {
                    if let Ok(keeper) = inner.keeper() {
                        let _ = keeper.call(Op::CloseStdin { id }, &[]).await;
                    }
                });
            }) as _
        });
        let fd = Fd::new(OwnedFd::from(file)).step(|| "use the container's input".into())?;
        Ok(Box::pin(Closing::new(fd, on_close)))
    }

    fn running(&self, id: &str) -> Result<Container> {
        let container = self.container(id)?;
        match container.phase {
            Phase::Running => Ok(container),
            phase => Err(Error::new(
                Kind::FailedPrecondition,
                format!("container is in state {phase:?}, only a running one takes commands: {id}"),
            )),
        }
    }
}

/// Input, output and size of a terminal.
fn join_terminal(session: &mut ExecSession, terminal: Fd, stdin: bool) {
    if stdin {
        session.stdin = Some(Box::pin(terminal.clone()));
    }
    session.stdout = Some(Box::pin(terminal.clone()));
    let (sender, mut sizes) = mpsc::channel::<TerminalSize>(RESIZES_MAX);
    session.resize = Some(sender);
    tokio::spawn(async move {
        while let Some(size) = sizes.recv().await {
            if let Err(error) = terminal.resize(size) {
                tracing::debug!(%error, "terminal not resized");
            }
        }
    });
}

fn reader(pipe: Option<(OwnedFd, OwnedFd)>) -> std::io::Result<Option<Reader>> {
    // Dropping our copy of the writing end here lets us see the process close its own.
    pipe.map(|(read, _write)| Fd::new(read).map(|fd| Box::pin(fd) as Reader)).transpose()
}

async fn collect(session: ExecSession) -> Result<v1::ExecSyncResponse> {
    let (stdout, stderr) = (keep(session.stdout), keep(session.stderr));
    let output = tokio::spawn(async move { tokio::join!(stdout, stderr) });
    let abort = output.abort_handle();
    let code = session.exit.await;
    // A daemon that the command left behind holds the pipes open; it must not hold us.
    let (stdout, stderr) = match tokio::time::timeout(DRAIN_TIMEOUT, output).await {
        Ok(Ok(output)) => output,
        _ => {
            abort.abort();
            Default::default()
        }
    };
    Ok(v1::ExecSyncResponse { stdout, stderr, exit_code: code? })
}

/// Reads to the end, keeping the first [`OUTPUT_BYTES_MAX`].
async fn keep(reader: Option<Reader>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(reader) = reader else { return kept };
    let mut limited = reader.take(OUTPUT_BYTES_MAX);
    if limited.read_to_end(&mut kept).await.is_ok() {
        let _ = tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await;
    }
    kept
}

fn read_json(path: &std::path::Path) -> Result<serde_json::Value> {
    let bytes = fs::read(path).step(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).step(|| format!("read {}", path.display()))
}
