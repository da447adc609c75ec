//! `run`: one pod from an image.

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context};
use crate::error::{Error, Result};
use crate::output::OutputArgs;
use crate::verbs::apply::DryRunArgs;
use crate::verbs::create::labels;

#[derive(clap::Args)]
pub struct Args {
    name: String,
    #[arg(long)]
    image: String,
    /// KEY=VALUE
    #[arg(long)]
    env: Vec<String>,
    #[arg(short, long)]
    labels: Option<String>,
    #[arg(long)]
    annotations: Vec<String>,
    #[arg(long)]
    port: Option<u16>,
    #[arg(long, default_value = "Always", value_parser = ["Always", "OnFailure", "Never"])]
    restart: String,
    #[arg(long)]
    image_pull_policy: Option<String>,
    /// Use the words after `--` as the command instead of as arguments.
    #[arg(long)]
    command: bool,
    #[arg(short = 'i', long)]
    stdin: bool,
    #[arg(short = 't', long)]
    tty: bool,
    #[arg(long)]
    attach: bool,
    /// Delete the pod after it exits; only with --attach or -i.
    #[arg(long)]
    rm: bool,
    #[arg(short, long)]
    quiet: bool,
    #[arg(long)]
    privileged: bool,
    /// A JSON merge patch over the pod.
    #[arg(long)]
    overrides: Option<String>,
    /// Also make a service for the pod.
    #[arg(long)]
    expose: bool,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[arg(last = true)]
    words: Vec<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let attached = args.attach || args.stdin;
    if args.rm && !attached {
        return Err(Error::plain("--rm should only be used for attached containers"));
    }
    if args.expose && args.port.is_none() {
        return Err(Error::plain("--port must be set when exposing a service"));
    }
    let pod = pod(&args)?;
    let named = format!("pod/{}", args.name);
    if args.dry_run.is_client() {
        return args.output.done(&named, &pod, &args.dry_run.words("created"));
    }
    let namespace = context.namespace()?;
    let collection = format!("/api/v1/namespaces/{namespace}/pods");
    let ask = Ask::json(&pod).with("fieldManager", "kubectl-run");
    let created = context.json(Method::POST, &collection, args.dry_run.ask(ask)).await?;
    if args.expose {
        expose(context, &args, &namespace).await?;
    }
    if !attached {
        return args.output.done(&named, &created, &args.dry_run.words("created"));
    }
    let result = attach(context, &args, &collection).await;
    if args.rm {
        context.json(Method::DELETE, &format!("{collection}/{}", args.name), Ask::default()).await?;
        if !args.quiet {
            println!("pod {:?} deleted from {namespace} namespace", args.name);
        }
    }
    result
}

fn pod(args: &Args) -> Result<Value> {
    let mut container = json!({ "name": args.name, "image": args.image, "resources": {} });
    let mut env = Vec::new();
    for pair in &args.env {
        let (name, value) = pair.split_once('=').ok_or_else(|| Error::plain(format!("invalid env: {pair}")))?;
        env.push(json!({ "name": name, "value": value }));
    }
    if !env.is_empty() {
        container["env"] = env.into();
    }
    if !args.words.is_empty() {
        container[if args.command { "command" } else { "args" }] = json!(args.words);
    }
    if let Some(port) = args.port {
        container["ports"] = json!([{ "containerPort": port }]);
    }
    if let Some(policy) = &args.image_pull_policy {
        container["imagePullPolicy"] = json!(policy);
    }
    if args.stdin {
        container["stdin"] = json!(true);
        container["stdinOnce"] = json!(args.restart == "Never" || args.rm || args.attach);
    }
    if args.tty {
        container["tty"] = json!(true);
    }
    if args.privileged {
        container["securityContext"] = json!({ "privileged": true });
    }
    let labels = match &args.labels {
        Some(text) => labels(text)?,
        None => json!({ "run": args.name }),
    };
    let mut metadata = json!({ "name": args.name, "labels": labels });
    for annotation in &args.annotations {
        let (key, value) = annotation.split_once('=').ok_or_else(|| Error::plain(format!("unexpected annotation: {annotation}")))?;
        metadata["annotations"][key] = json!(value);
    }
    let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": { "containers": [container], "dnsPolicy": "ClusterFirst", "restartPolicy": args.restart } });
    match &args.overrides {
        None => Ok(pod),
        Some(text) => knarr_api::patch::merge(&pod, text.as_bytes()).map_err(|s| Error::plain(format!("invalid --overrides: {}", s.message))),
    }
}

async fn expose(context: &Context, args: &Args, namespace: &str) -> Result<()> {
    let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": args.name },
        "spec": { "selector": { "run": args.name }, "ports": [{ "port": args.port, "targetPort": args.port, "protocol": "TCP" }] } });
    context.json(Method::POST, &format!("/api/v1/namespaces/{namespace}/services"), Ask::json(&service)).await?;
    println!("service/{} created", args.name);
    Ok(())
}

/// Waits until the container runs, then attaches; a container already over shows its log instead.
async fn attach(context: &Context, args: &Args, collection: &str) -> Result<()> {
    let query = [("fieldSelector", format!("metadata.name={}", args.name))];
    let mut last = Value::Null;
    super::wait::watch_until(context, collection, &query, |_, object| {
        last = object.cloned().unwrap_or_default();
        object.is_none_or(|o| ["Running", "Succeeded", "Failed"].contains(&o.str_at("status.phase")))
    })
    .await?;
    if last.str_at("status.phase") == "Running" {
        super::attach::attach(context, &last, None, args.stdin, args.tty, args.quiet).await?;
    } else {
        print!("{}", context.text(Method::GET, &format!("{collection}/{}/log", args.name), Ask::default()).await?);
    }
    exit_code(context, args, collection, &query).await
}

/// The container's exit code becomes ours where the pod does not restart it.
async fn exit_code(context: &Context, args: &Args, collection: &str, query: &[(&str, String)]) -> Result<()> {
    if args.restart != "Never" {
        return Ok(());
    }
    let mut code = 0;
    super::wait::watch_until(context, collection, query, |_, object| {
        let Some(object) = object else { return true };
        let state = object.list_at("status.containerStatuses").first().and_then(|s| s.int_at("state.terminated.exitCode"));
        code = state.unwrap_or(0);
        state.is_some()
    })
    .await?;
    if code == 0 { Ok(()) } else { Err(Error::Exit(i32::try_from(code).unwrap_or(1))) }
}
