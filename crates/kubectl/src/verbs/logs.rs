//! `logs`: what containers wrote, once or as they write.

use futures::{AsyncReadExt, AsyncBufReadExt, StreamExt};
use knarr_api::object::Object;
use serde_json::Value;
use std::io::Write;

use crate::context::{Ask, Context, parse_duration};
use crate::error::{Error, Result};
use crate::pods;

/// Lines shown of each container when a selector names the pods; upstream's.
const SELECTOR_TAIL: i64 = 10;

#[derive(clap::Args)]
pub struct Args {
    /// POD or TYPE/NAME, and a container.
    words: Vec<String>,
    #[arg(short, long)]
    container: Option<String>,
    /// Print the logs of the container's former instance.
    #[arg(short, long)]
    previous: bool,
    #[arg(short, long)]
    follow: bool,
    /// Lines of recent log to display; -1 shows all.
    #[arg(long, allow_hyphen_values = true)]
    tail: Option<i64>,
    /// Only logs newer than a relative duration like 5s, 2m, or 3h.
    #[arg(long)]
    since: Option<String>,
    /// Only logs after this date (RFC3339).
    #[arg(long)]
    since_time: Option<String>,
    #[arg(long)]
    timestamps: bool,
    #[arg(long)]
    limit_bytes: Option<i64>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    #[arg(long)]
    all_containers: bool,
    /// Get logs from all pods of the workload.
    #[arg(long)]
    all_pods: bool,
    /// Prefix each line with the pod and container it comes from.
    #[arg(long)]
    prefix: bool,
    #[arg(long)]
    ignore_errors: bool,
    /// The most concurrent logs to follow when using a selector.
    #[arg(long, default_value_t = 5)]
    max_log_requests: usize,
}

struct Source {
    path: String,
    container: String,
    pod: String,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let sources = sources(context, &args).await?;
    if args.follow && sources.len() > args.max_log_requests {
        return Err(Error::plain(format!(
            "you are attempting to follow {} log streams, but maximum allowed concurrency is {}, use --max-log-requests to increase the limit",
            sources.len(), args.max_log_requests
        )));
    }
    let several = sources.len() > 1;
    if args.follow && several {
        let all = sources.iter().map(|source| print(context, &args, source, true));
        return futures::future::try_join_all(all).await.map(|_| ());
    }
    for source in &sources {
        match print(context, &args, source, false).await {
            Err(error) if args.ignore_errors => eprintln!("{error}"),
            other => other?,
        }
    }
    Ok(())
}

async fn sources(context: &Context, args: &Args) -> Result<Vec<Source>> {
    let namespace = context.namespace()?;
    let mut asked = args.container.clone();
    let pods = match (&args.selector, args.words.as_slice()) {
        (Some(selector), []) => pods::list(context, Some(&namespace), selector, "").await?,
        (Some(_), _) => return Err(Error::plain("only a selector (-l) or a POD name is allowed")),
        (None, []) => return Err(Error::plain("expected 'logs [-f] [-p] (POD | TYPE/NAME) [-c CONTAINER]'.\nPOD or TYPE/NAME is a required argument for the logs command\nSee 'kubectl logs -h' for help and examples")),
        (None, [name]) => named(context, args, name).await?,
        (None, [name, container]) => {
            asked = Some(container.clone());
            named(context, args, name).await?
        }
        _ => return Err(Error::plain("expected 'logs [-f] [-p] (POD | TYPE/NAME) [-c CONTAINER]'.")),
    };
    if pods.is_empty() {
        eprintln!("No resources found in {namespace} namespace.");
    }
    let mut sources = Vec::new();
    for pod in &pods {
        let containers = if args.all_containers {
            let lists = ["spec.initContainers", "spec.containers", "spec.ephemeralContainers"];
            pods::container_names(pod, &lists).into_iter().map(str::to_owned).collect()
        } else {
            vec![pods::choose_container(pod, asked.as_deref(), false)?]
        };
        sources.extend(containers.into_iter().map(|container| Source {
            path: format!("/api/v1/namespaces/{}/pods/{}/log", pod.namespace(), pod.name()),
            pod: pod.name().to_owned(),
            container,
        }));
    }
    Ok(sources)
}

/// The pods of a name; one pod of a workload unless all are wanted.
async fn named(context: &Context, args: &Args, name: &str) -> Result<Vec<Value>> {
    let words = [name.to_owned()];
    let mut pods = pods::behind(context, &words).await?;
    if !args.all_pods && pods.len() > 1 {
        eprintln!("Found {} pods, using pod/{}", pods.len(), pods[0].name());
        pods.truncate(1);
    }
    Ok(pods)
}

fn query<'a>(args: &Args, container: &str) -> Result<Ask<'a>> {
    let flag = |on: bool| if on { "true" } else { "" };
    let mut ask = Ask::default()
        .with("container", container)
        .with("follow", flag(args.follow))
        .with("previous", flag(args.previous))
        .with("timestamps", flag(args.timestamps))
        .with("sinceTime", args.since_time.clone().unwrap_or_default());
    if let Some(since) = &args.since {
        let since = parse_duration(since).ok_or_else(|| Error::plain(format!("invalid argument {since:?} for \"--since\" flag")))?;
        ask = ask.with("sinceSeconds", since.as_secs_f64().ceil().max(1.0).to_string());
    }
    let tail = args.tail.or(args.selector.is_some().then_some(SELECTOR_TAIL));
    if let Some(tail) = tail.filter(|t| *t >= 0) {
        ask = ask.with("tailLines", tail.to_string());
    }
    if let Some(limit) = args.limit_bytes {
        ask = ask.with("limitBytes", limit.to_string());
    }
    Ok(ask)
}

/// Copies one log out; by lines where several logs mix.
async fn print(context: &Context, args: &Args, source: &Source, by_lines: bool) -> Result<()> {
    let mut stream = context.stream(&source.path, query(args, &source.container)?).await?;
    if by_lines || args.prefix {
        let prefix = if args.prefix { format!("[pod/{}/{}] ", source.pod, source.container) } else { String::new() };
        let mut lines = stream.lines();
        while let Some(line) = lines.next().await {
            writeln!(std::io::stdout().lock(), "{prefix}{}", line?)?;
        }
        return Ok(());
    }
    let mut buffer = vec![0; 32 << 10];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        out.write_all(&buffer[..read])?;
        out.flush()?;
    }
}

