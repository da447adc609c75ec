//! `/containerLogs/NAMESPACE/POD/CONTAINER`: the log of a container, or of the one before it.

use super::{Answer, Query, find_pod, observe};
use crate::build;
use crate::context::NodeContext;
use crate::logs::read::{self, Options};
use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use knarr_runtime::cri::Event;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Chunks read ahead for a client.
const CHUNKS_MAX: usize = 8;

pub async fn container_logs(
    context: &Arc<NodeContext>,
    namespace: &str,
    pod_name: &str,
    container: &str,
    query: &Query,
) -> Answer {
    let options = options(context, query).map_err(|message| (StatusCode::UNPROCESSABLE_ENTITY, message))?;
    let pod = find_pod(context, namespace, pod_name)?;
    let bad = |message: String| (StatusCode::BAD_REQUEST, message);
    if build::find_container(&pod, container).is_none() {
        return Err((
            StatusCode::NOT_FOUND,
            format!("container {container:?} not found in pod {pod_name:?}"),
        ));
    }
    // Before looking: an end in between must be heard.
    let events = context.runtime.events();
    let observed = observe(context, &pod).await?;
    let mut seen = observed.containers.iter().filter(|seen| seen.name() == container);
    let previous = query.flag("previous");
    let found = if previous { seen.nth(1) } else { seen.next() };
    let Some(found) = found else {
        return Err(bad(match previous {
            true => format!("previous terminated container {container:?} in pod {pod_name:?} not found"),
            false => format!(
                "container {container:?} in pod {pod_name:?} is waiting to start: {}",
                waiting(&pod, container)
            ),
        }));
    };
    let ended = CancellationToken::new();
    if found.has_exited() || previous {
        ended.cancel();
    }
    let (sink, chunks) = mpsc::channel(CHUNKS_MAX);
    let (path, id) = (PathBuf::from(&found.status.log_path), found.status.id.clone());
    tokio::spawn(async move {
        let watch = async {
            let mut events = events;
            while let Some(event) = events.next().await {
                let over = match event {
                    Event::ContainerExited { container_id, .. }
                    | Event::ContainerRemoved { container_id, .. } => container_id == id,
                    _ => false,
                };
                if over {
                    ended.cancel();
                }
            }
            std::future::pending::<()>().await
        };
        let result = tokio::select! {
            result = read::send(&path, &options, &sink, ended.clone()) => result,
            () = watch => Ok(()),
        };
        if let Err(error) = result {
            let message = format!("failed to read the log {}: {error}\n", path.display());
            let _ = sink.send(Ok(message.into())).await;
        }
    });
    let stream = futures::stream::unfold(chunks, async |mut chunks| {
        let chunk = chunks.recv().await?;
        Some((chunk.map(Frame::data), chunks))
    });
    let mut answer = Response::new(StreamBody::new(stream).boxed_unsync());
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(answer)
}

/// Why the container does not run yet, as the status tells it.
fn waiting(pod: &k8s_openapi::api::core::v1::Pod, container: &str) -> String {
    let status = pod.status.as_ref();
    let lists = status.map(|status| {
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
    });
    let mut all = lists.into_iter().flatten().flat_map(|list| list.iter().flatten());
    let reason = all
        .find(|status| status.name == container)
        .and_then(|status| status.state.as_ref()?.waiting.as_ref()?.reason.clone());
    reason.unwrap_or_else(|| "ContainerCreating".to_owned())
}

fn options(context: &NodeContext, query: &Query) -> Result<Options, String> {
    let number = |name: &str| match query.get(name).map(str::parse::<u64>) {
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err(format!("{name} must be a number not below zero")),
        None => Ok(None),
    };
    let since = match (query.get("sinceTime"), number("sinceSeconds")?) {
        (Some(_), Some(_)) => {
            return Err("at most one of sinceTime or sinceSeconds may be specified".to_owned());
        }
        (Some(time), None) => Some(time.parse().map_err(|error| format!("sinceTime: {error}"))?),
        (None, Some(seconds)) => {
            let ago = jiff::SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
            Some(context.clock.now().saturating_sub(ago).unwrap_or(jiff::Timestamp::MIN))
        }
        (None, None) => None,
    };
    // `tailLines=-1` says "all" in old clients.
    let tail_lines = if query.get("tailLines") == Some("-1") { None } else { number("tailLines")? };
    Ok(Options {
        follow: query.flag("follow"),
        timestamps: query.flag("timestamps"),
        tail_lines,
        since,
        limit_bytes: number("limitBytes")?,
        only_stderr: match query.get("stream") {
            Some("Stdout") => Some(false),
            Some("Stderr") => Some(true),
            _ => None,
        },
    })
}
