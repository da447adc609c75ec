//! `exec`: a command in a container, with its streams and, if asked, a terminal.

use std::io::Write;

use futures::SinkExt;
use k8s_openapi::api::core::v1::Pod;
use knarr_api::object::Object;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess, TerminalSize};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;
use crate::error::{Error, Result, unreachable};
use crate::pods;
use crate::terminal::{RawTerminal, size, stdin_is_terminal};

#[derive(clap::Args)]
pub struct Args {
    /// POD or TYPE/NAME.
    target: String,
    #[arg(short, long)]
    container: Option<String>,
    /// Pass stdin to the container.
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Stdin is a TTY.
    #[arg(short = 't', long)]
    tty: bool,
    /// Only print output from the remote session.
    #[arg(short, long)]
    quiet: bool,
    /// The command and its arguments.
    #[arg(last = true)]
    command: Vec<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if args.command.is_empty() {
        return Err(Error::plain("you must specify at least one command for the container"));
    }
    let pod = pods::behind(context, std::slice::from_ref(&args.target)).await?.remove(0);
    refuse_ended(&pod)?;
    let container = pods::choose_container(&pod, args.container.as_deref(), args.quiet)?;
    let session = Session::new(args.stdin, args.tty, args.quiet);
    let api: Api<Pod> = Api::namespaced(context.client().await?, pod.namespace());
    let process = api.exec(pod.name(), args.command, &session.params(container)).await.map_err(|e| streaming_error(e, ""))?;
    session.run(process).await
}

pub fn refuse_ended(pod: &Value) -> Result<()> {
    let phase = pod.str_at("status.phase");
    if phase == "Succeeded" || phase == "Failed" {
        return Err(Error::plain(format!(
            "cannot exec into a container in a completed pod; current phase is {phase}"
        )));
    }
    Ok(())
}

/// A refusal by the server reads as any other.
pub fn streaming_error(error: kube::Error, host: &str) -> Error {
    match error {
        kube::Error::Api(status) => {
            Error::Server { status: serde_json::to_value(*status).unwrap_or_default(), during: None }
        }
        other => unreachable(&other, host),
    }
}

/// The local side of a remote process.
pub struct Session {
    pub stdin: bool,
    pub tty: bool,
}

impl Session {
    /// A terminal is only asked for where there is one here.
    pub fn new(stdin: bool, tty: bool, quiet: bool) -> Self {
        let here = stdin_is_terminal();
        if tty && !here && !quiet {
            eprintln!("Unable to use a TTY - input is not a terminal or the right kind of file");
        }
        Session { stdin, tty: tty && stdin && here }
    }

    pub fn params(&self, container: String) -> AttachParams {
        AttachParams::default().container(container).stdin(self.stdin).stdout(true).stderr(!self.tty).tty(self.tty)
    }

    /// Copies the streams until the process ends; its exit code becomes ours.
    pub async fn run(&self, mut process: AttachedProcess) -> Result<()> {
        let raw = if self.tty { RawTerminal::enter() } else { None };
        let resize = process.terminal_size().map(|sender| tokio::spawn(follow_size(sender)));
        let input = process.stdin().map(|stdin| tokio::spawn(copy_input(stdin)));
        let status = process.take_status();
        let out = copy_output(process.stdout(), std::io::stdout());
        let err = copy_output(process.stderr(), std::io::stderr());
        let (out, err) = tokio::join!(out, err);
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        for task in [resize, input].into_iter().flatten() {
            task.abort();
        }
        drop(raw);
        out.and(err)?;
        let status = status.map(|s| serde_json::to_value(s).unwrap_or_default()).unwrap_or_default();
        outcome(&status)
    }
}

/// What the status channel says: success, an exit code, or why it failed.
fn outcome(status: &Value) -> Result<()> {
    if status.str_at("status") != "Failure" {
        return Ok(());
    }
    if status.str_at("reason") == "NonZeroExitCode" {
        let causes = status.list_at("details.causes");
        let code = causes.iter().find(|c| c.str_at("reason") == "ExitCode").and_then(|c| c.str_at("message").parse().ok());
        if let Some(code) = code {
            eprintln!("command terminated with exit code {code}");
            return Err(Error::Exit(code));
        }
    }
    match status.str_at("reason") {
        "" => Err(Error::plain(status.str_at("message"))),
        _ => Err(Error::Server { status: status.clone(), during: None }),
    }
}

async fn copy_output(from: Option<impl tokio::io::AsyncRead + Unpin>, mut to: impl Write) -> Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = vec![0; 32 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..read])?;
        to.flush()?;
    }
}

async fn copy_input(mut to: impl tokio::io::AsyncWrite + Unpin) {
    // Either side may end first; the process's own end decides what is said.
    let _ = tokio::io::copy(&mut tokio::io::stdin(), &mut to).await;
    let _ = to.shutdown().await;
}

async fn follow_size(mut sender: futures::channel::mpsc::Sender<TerminalSize>) {
    let Ok(mut changed) = signal(SignalKind::window_change()) else { return };
    loop {
        if let Some((width, height)) = size()
            && sender.send(TerminalSize { width, height }).await.is_err()
        {
            return;
        }
        if changed.recv().await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_status_channel_becomes_an_exit_code() {
        assert!(outcome(&json!({"status":"Success"})).is_ok());
        let failed = json!({"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}});
        assert_eq!(outcome(&failed).expect_err("failed").exit_code(), 7);
        let internal = json!({"status":"Failure","reason":"InternalError","message":"no such file"});
        assert_eq!(outcome(&internal).expect_err("failed").to_string(), "Error from server (InternalError): no such file");
    }
}
