//! `drain`: cordons a node and evicts its pods.

use std::time::Duration;

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context, parse_duration};
use crate::error::{Error, Result};
use crate::pods;
use crate::verbs::apply::DryRunArgs;
use crate::verbs::cordon::{mark_one, nodes};

/// Between two tries of an eviction that a disruption budget forbids; upstream's.
const RETRY: Duration = Duration::from_secs(5);
const MIRROR: &str = "kubernetes.io/config.mirror";

#[derive(clap::Args)]
pub struct Args {
    names: Vec<String>,
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Continue even if there are pods that do not declare a controller.
    #[arg(long)]
    force: bool,
    #[arg(long)]
    ignore_daemonsets: bool,
    /// Continue even if there are pods using emptyDir.
    #[arg(long)]
    delete_emptydir_data: bool,
    #[arg(long, default_value_t = -1, allow_hyphen_values = true)]
    grace_period: i64,
    /// How long to wait before giving up; zero waits for ever.
    #[arg(long, default_value = "0s")]
    timeout: String,
    /// Only these pods.
    #[arg(long, default_value = "")]
    pod_selector: String,
    /// Delete instead of evicting: disruption budgets do not count.
    #[arg(long)]
    disable_eviction: bool,
    #[command(flatten)]
    dry_run: DryRunArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let limit = parse_duration(&args.timeout).ok_or_else(|| Error::plain(format!("invalid argument {:?} for \"--timeout\" flag", args.timeout)))?;
    let nodes = nodes(context, &args.names, args.selector.as_deref()).await?;
    for node in &nodes {
        mark_one(context, node, true, &args.dry_run).await?;
    }
    for node in &nodes {
        let name = node.object.name();
        let drained = drain(context, &args, name);
        let result = if limit.is_zero() { drained.await } else { tokio::time::timeout(limit, drained).await.unwrap_or_else(|_| Err(Error::plain("drain did not complete within the timeout"))) };
        result.map_err(|e| Error::plain(format!("unable to drain node {name:?} due to error: {}, continuing command...", e.message())))?;
        println!("{} {}", node.named(), args.dry_run.words("drained"));
    }
    Ok(())
}

/// Whether a pod goes, stays (with a word why), or forbids the drain.
enum Fate {
    Goes,
    Stays(Option<&'static str>),
    Forbids(&'static str),
}

fn fate(args: &Args, pod: &Value) -> Fate {
    let owner = pod.list_at("metadata.ownerReferences").iter().find(|o| o.bool_at("controller"));
    let over = ["Succeeded", "Failed"].contains(&pod.str_at("status.phase"));
    if pod.map_at("metadata.annotations").is_some_and(|a| a.contains_key(MIRROR)) {
        return Fate::Stays(None);
    }
    if owner.is_some_and(|o| o.str_at("kind") == "DaemonSet") {
        return if args.ignore_daemonsets { Fate::Stays(Some("ignoring DaemonSet-managed Pods")) } else { Fate::Forbids("cannot delete DaemonSet-managed Pods (use --ignore-daemonsets to ignore)") };
    }
    if over {
        return Fate::Goes;
    }
    if pod.list_at("spec.volumes").iter().any(|v| v.at("emptyDir").is_some()) && !args.delete_emptydir_data {
        return Fate::Forbids("cannot delete Pods with local storage (use --delete-emptydir-data to override)");
    }
    if owner.is_none() && !args.force {
        return Fate::Forbids("cannot delete Pods that declare no controller (use --force to override)");
    }
    Fate::Goes
}

async fn drain(context: &Context, args: &Args, node: &str) -> Result<()> {
    let mut going = Vec::new();
    let (mut kept, mut forbidden): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for pod in pods::list(context, None, &args.pod_selector, &format!("spec.nodeName={node}")).await? {
        let name = format!("{}/{}", pod.namespace(), pod.name());
        match fate(args, &pod) {
            Fate::Goes => going.push(pod),
            Fate::Stays(None) => {}
            Fate::Stays(Some(why)) => kept.push(format!("{why}: {name}")),
            Fate::Forbids(why) => forbidden.push(format!("{why}: {name}")),
        }
    }
    if !forbidden.is_empty() {
        return Err(Error::plain(format!("[{}]", forbidden.join(", "))));
    }
    if !kept.is_empty() {
        eprintln!("Warning: {}", kept.join("; "));
    }
    for pod in &going {
        println!("evicting pod {}/{}", pod.namespace(), pod.name());
    }
    if args.dry_run.is_client() {
        return Ok(());
    }
    futures::future::try_join_all(going.iter().map(|pod| evict(context, args, pod))).await?;
    Ok(())
}

/// Evicts one pod, again and again while a budget forbids it, and waits until it is gone.
async fn evict(context: &Context, args: &Args, pod: &Value) -> Result<()> {
    let collection = format!("/api/v1/namespaces/{}/pods", pod.namespace());
    let path = format!("{collection}/{}", pod.name());
    let mut options = json!({});
    if args.grace_period >= 0 {
        options["gracePeriodSeconds"] = args.grace_period.into();
    }
    loop {
        let result = if args.disable_eviction {
            context.json(Method::DELETE, &path, args.dry_run.ask(Ask::json(&options))).await
        } else {
            let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": pod.name(), "namespace": pod.namespace() }, "deleteOptions": options });
            context.json(Method::POST, &format!("{path}/eviction"), args.dry_run.ask(Ask::json(&eviction))).await
        };
        match result {
            Ok(_) => break,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) if error.reason() == "TooManyRequests" => {
                eprintln!("error when evicting pods/{:?} -n {:?} (will retry after 5s): {}", pod.name(), pod.namespace(), error.message());
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error),
        }
    }
    super::wait::until_gone(context, &path, &collection, pod, None).await?;
    println!("pod/{} evicted", pod.name());
    Ok(())
}
