//! `/exec`, `/attach` and `/portForward`: upgrades the connection to SPDY or a WebSocket and joins it to the
//! process or port.

use super::{Answer, Body, Query, find_pod, full, observe, text};
use crate::context::NodeContext;
use crate::streaming::portforward::{self, Connect};
use crate::streaming::remotecommand::{self, Wanted};
use crate::streaming::spdy::{self, Session};
use crate::streaming::websocket;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use knarr_runtime::ExecSession;
use knarr_runtime::cri::v1;
use std::sync::Arc;
use tokio_tungstenite::tungstenite::protocol::Role;

const PROTOCOL_VERSION: &str = "x-stream-protocol-version";

type Start = BoxFuture<'static, knarr_runtime::Result<ExecSession>>;

pub async fn exec(
    request: Request<Incoming>,
    context: Arc<NodeContext>,
    namespace: &str,
    pod: &str,
    container: &str,
) -> Answer {
    let (query, id) = target(&request, &context, namespace, pod, container).await?;
    let wanted = wanted(&query)?;
    let command: Vec<String> = query.all("command").map(str::to_owned).collect();
    if command.is_empty() {
        return Err((
            StatusCode::BAD_REQUEST,
            "you must specify at least 1 command for the container".to_owned(),
        ));
    }
    let ask = v1::ExecRequest {
        container_id: id,
        cmd: command,
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr && !wanted.tty,
    };
    let runtime = context.runtime.clone();
    remote_command(request, wanted, Box::pin(async move { runtime.exec(ask).await }))
}

pub async fn attach(
    request: Request<Incoming>,
    context: Arc<NodeContext>,
    namespace: &str,
    pod: &str,
    container: &str,
) -> Answer {
    let (query, id) = target(&request, &context, namespace, pod, container).await?;
    let wanted = wanted(&query)?;
    let ask = v1::AttachRequest {
        container_id: id,
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr && !wanted.tty,
    };
    let runtime = context.runtime.clone();
    remote_command(request, wanted, Box::pin(async move { runtime.attach(ask).await }))
}

async fn target(
    request: &Request<Incoming>,
    context: &NodeContext,
    namespace: &str,
    pod: &str,
    container: &str,
) -> Result<(Query, String), (StatusCode, String)> {
    let found = find_pod(context, namespace, pod)?;
    let observed = observe(context, &found).await?;
    let seen = observed.latest(container).filter(|seen| seen.is_running());
    let seen = seen.ok_or_else(|| (StatusCode::NOT_FOUND, format!("container not found ({container:?})")))?;
    Ok((Query::of(request), seen.status.id.clone()))
}

fn wanted(query: &Query) -> Result<Wanted, (StatusCode, String)> {
    // Both spellings: kubelets were asked for `input`, the API says `stdin`.
    let flag = |own: &str, api: &str| query.flag(own) || query.flag(api);
    let wanted = Wanted {
        stdin: flag("input", "stdin"),
        stdout: flag("output", "stdout"),
        stderr: flag("error", "stderr"),
        tty: query.flag("tty"),
    };
    if wanted.stdin || wanted.stdout || wanted.stderr {
        return Ok(wanted);
    }
    Err((StatusCode::BAD_REQUEST, "you must specify at least 1 of stdin, stdout, stderr".to_owned()))
}

fn remote_command(mut request: Request<Incoming>, wanted: Wanted, start: Start) -> Answer {
    if websocket::is_upgrade(request.headers()) {
        let protocol = choose(request.headers(), &remotecommand::WEBSOCKET_PROTOCOLS)?;
        let answer = accept(request.headers(), &protocol)?;
        upgraded(&mut request, move |connection| async move {
            let socket = websocket::frame(connection, Role::Server).await;
            remotecommand::over_websocket(socket, &protocol, wanted, start).await;
        });
        return Ok(answer);
    }
    let version = spdy_version(request.headers(), &remotecommand::SPDY_VERSIONS)?;
    let answer = switch_to_spdy(&version);
    upgraded(&mut request, move |connection| async move {
        let session = Session::new(connection, spdy::Role::Server);
        remotecommand::over_spdy(session, &version, wanted, start).await;
    });
    Ok(answer)
}

pub async fn port_forward(
    mut request: Request<Incoming>,
    context: Arc<NodeContext>,
    namespace: &str,
    pod: &str,
) -> Answer {
    let found = find_pod(&context, namespace, pod)?;
    let observed = observe(&context, &found).await?;
    let sandbox = observed.live_sandbox().map(|sandbox| sandbox.id.clone());
    let sandbox =
        sandbox.ok_or_else(|| (StatusCode::NOT_FOUND, format!("pod {pod:?} has no running sandbox")))?;
    let runtime = context.runtime.clone();
    let connect: Connect = Arc::new(move |port| {
        let (runtime, sandbox) = (runtime.clone(), sandbox.clone());
        Box::pin(async move { runtime.port_forward(&sandbox, port).await })
    });
    if !websocket::is_upgrade(request.headers()) {
        let version = spdy_version(request.headers(), &[portforward::SPDY_VERSION])?;
        upgraded(&mut request, move |connection| async move {
            portforward::over_spdy(Session::new(connection, spdy::Role::Server), connect).await;
        });
        return Ok(switch_to_spdy(&version));
    }
    let protocol = choose(request.headers(), &portforward::WEBSOCKET_PROTOCOLS)?;
    let ports = ports(&Query::of(&request))?;
    if protocol != portforward::TUNNEL && ports.is_empty() {
        return Err((StatusCode::BAD_REQUEST, "query parameter \"port\" is required".to_owned()));
    }
    let answer = accept(request.headers(), &protocol)?;
    upgraded(&mut request, move |connection| async move {
        let socket = websocket::frame(connection, Role::Server).await;
        if protocol == portforward::TUNNEL {
            let tunnel = websocket::Tunnel::new(socket);
            portforward::over_spdy(Session::new(tunnel, spdy::Role::Server), connect).await;
        } else {
            portforward::over_websocket(socket, &protocol, &ports, connect).await;
        }
    });
    Ok(answer)
}

fn ports(query: &Query) -> Result<Vec<u16>, (StatusCode, String)> {
    let texts = query.all("port").chain(query.all("ports")).flat_map(|list| list.split(','));
    let port = |text: &str| {
        let port = text.parse().ok().filter(|port| *port > 0);
        port.ok_or_else(|| (StatusCode::BAD_REQUEST, format!("unable to parse {text:?} as a port")))
    };
    texts.map(port).collect()
}

fn choose(headers: &HeaderMap, ours: &[&str]) -> Result<String, (StatusCode, String)> {
    websocket::choose(headers, ours).map_err(|message| (StatusCode::BAD_REQUEST, message))
}

fn accept(headers: &HeaderMap, protocol: &str) -> Answer {
    let answer =
        websocket::accept::<()>(headers, protocol).map_err(|message| (StatusCode::BAD_REQUEST, message))?;
    Ok(answer.map(|()| full(Vec::new())))
}

/// The first version we speak among those the client offers; without any offer the oldest.
fn spdy_version(headers: &HeaderMap, ours: &[&str]) -> Result<String, (StatusCode, String)> {
    let upgrade = headers.get(header::UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !upgrade.eq_ignore_ascii_case(spdy::PROTOCOL) {
        let message =
            format!("unable to upgrade: missing upgrade headers in request, ask for {}", spdy::PROTOCOL);
        return Err((StatusCode::BAD_REQUEST, message));
    }
    let offered: Vec<&str> = headers
        .get_all(PROTOCOL_VERSION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    if offered.is_empty() {
        return Ok(ours.last().map(|version| (*version).to_owned()).unwrap_or_default());
    }
    let found = offered.iter().find(|version| ours.contains(version));
    found.map(|version| (*version).to_owned()).ok_or_else(|| {
        let message = format!("unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server accepts {ours:?}");
        (StatusCode::FORBIDDEN, message)
    })
}

fn switch_to_spdy(version: &str) -> Response<Body> {
    let answer = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, spdy::PROTOCOL)
        .header(PROTOCOL_VERSION, version)
        .body(full(Vec::new()));
    answer.unwrap_or_else(|error| text(StatusCode::BAD_REQUEST, error.to_string()))
}

/// Runs `work` on the connection once the answer has been sent.
fn upgraded<F>(request: &mut Request<Incoming>, work: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => work(TokioIo::new(connection)).await,
            Err(error) => tracing::debug!(%error, "connection not upgraded"),
        }
    });
}
