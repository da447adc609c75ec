//! `autoscale`: a HorizontalPodAutoscaler for a workload.

use http::Method;
use knarr_api::object::Object;
use serde_json::json;

use crate::context::{Ask, Context};
use crate::error::{Error, Result};
use crate::output::OutputArgs;
use crate::target;
use crate::verbs::apply::DryRunArgs;

#[derive(clap::Args)]
pub struct Args {
    words: Vec<String>,
    #[arg(long)]
    min: Option<i64>,
    #[arg(long)]
    max: i64,
    /// Target average CPU utilization, in percent of what is requested.
    #[arg(long, visible_alias = "cpu")]
    cpu_percent: Option<String>,
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if args.max < 1 || args.min.is_some_and(|m| m > args.max) {
        return Err(Error::plain(format!("--max=MAXPODS is required and must be at least 1 and not below --min, max: {}", args.max)));
    }
    let found = target::fetch_one(context, &args.words, "").await?;
    let resource = context.resource("horizontalpodautoscalers").await?.clone();
    let name = args.name.clone().unwrap_or_else(|| found.object.name().to_owned());
    let mut spec = json!({ "maxReplicas": args.max,
        "scaleTargetRef": { "apiVersion": found.resource.api_version(), "kind": found.resource.kind, "name": found.object.name() } });
    if let Some(min) = args.min {
        spec["minReplicas"] = min.into();
    }
    if let Some(percent) = &args.cpu_percent {
        let percent: i64 = percent.trim_end_matches('%').parse().map_err(|_| Error::plain(format!("invalid CPU percentage {percent:?}")))?;
        spec["metrics"] = json!([{ "type": "Resource", "resource": { "name": "cpu", "target": { "type": "Utilization", "averageUtilization": percent } } }]);
    }
    let object = json!({ "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": { "name": name }, "spec": spec });
    let (named, words) = (resource.named(&name), args.dry_run.words("autoscaled"));
    if args.dry_run.is_client() {
        return args.output.done(&named, &object, &words);
    }
    let path = format!("/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers", found.namespace.as_deref().unwrap_or("default"));
    let created = context.json(Method::POST, &path, args.dry_run.ask(Ask::json(&object))).await?;
    args.output.done(&named, &created, &words)
}
