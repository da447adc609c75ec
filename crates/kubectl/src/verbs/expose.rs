//! `expose`: a Service for what already runs.

use http::Method;
use knarr_api::object::Object;
use serde_json::{Map, Value, json};

use crate::context::{Ask, Context};
use crate::error::{Error, Result};
use crate::output::OutputArgs;
use crate::target;
use crate::verbs::apply::DryRunArgs;
use crate::workload::pod_spec_path;

#[derive(clap::Args)]
pub struct Args {
    words: Vec<String>,
    #[arg(short, long)]
    filename: Vec<String>,
    /// The port that the service should serve on; the pods' own ports where not given.
    #[arg(long)]
    port: Option<u16>,
    /// Name or number of the port on the container.
    #[arg(long)]
    target_port: Option<String>,
    #[arg(long)]
    protocol: Option<String>,
    /// ClusterIP, NodePort, LoadBalancer, or ExternalName.
    #[arg(long)]
    r#type: Option<String>,
    /// The name of the new service.
    #[arg(long)]
    name: Option<String>,
    /// A label selector to use for this service.
    #[arg(long)]
    selector: Option<String>,
    /// Labels of the service.
    #[arg(short, long)]
    labels: Option<String>,
    /// "None" makes a headless service.
    #[arg(long)]
    cluster_ip: Option<String>,
    #[arg(long)]
    external_ip: Option<String>,
    #[arg(long)]
    load_balancer_ip: Option<String>,
    /// "None" or "ClientIP".
    #[arg(long)]
    session_affinity: Option<String>,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let mut words = args.words.clone();
    for document in if args.filename.is_empty() { Vec::new() } else { crate::manifest::read(&args.filename, false)? } {
        words.push(format!("{}/{}", document.object.str_at("kind"), document.object.name()));
    }
    let found = target::fetch_one(context, &words, "").await?;
    let service = service(&args, &found.object)?;
    let resource = context.resource("services").await?;
    let named = format!("service/{}", service.name());
    if args.dry_run.is_client() {
        return args.output.done(&named, &service, &args.dry_run.words("exposed"));
    }
    let path = resource.path(found.namespace.as_deref(), None);
    let ask = Ask::json(&service).with("fieldManager", "kubectl-expose");
    let created = context.json(Method::POST, &path, args.dry_run.ask(ask)).await?;
    args.output.done(&named, &created, &args.dry_run.words("exposed"))
}

fn service(args: &Args, object: &Value) -> Result<Value> {
    let name = args.name.clone().unwrap_or_else(|| object.name().to_owned());
    let selector = match &args.selector {
        Some(text) => pairs(text)?,
        None => selector_of(object)?,
    };
    let mut spec = json!({ "selector": selector, "ports": ports(args, object)? });
    for (field, value) in [("type", &args.r#type), ("clusterIP", &args.cluster_ip), ("loadBalancerIP", &args.load_balancer_ip), ("sessionAffinity", &args.session_affinity)] {
        if let Some(value) = value {
            spec[field] = json!(value);
        }
    }
    if let Some(ip) = &args.external_ip {
        spec["externalIPs"] = json!([ip]);
    }
    let mut metadata = json!({ "name": name });
    let labels = match &args.labels {
        Some(text) => pairs(text)?,
        None => object.map_at("metadata.labels").cloned().unwrap_or_default(),
    };
    if !labels.is_empty() {
        metadata["labels"] = labels.into();
    }
    Ok(json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))
}

/// The labels by which a service finds the pods of the object.
fn selector_of(object: &Value) -> Result<Map<String, Value>> {
    let found = match object.str_at("kind") {
        "Pod" => object.map_at("metadata.labels"),
        "Service" | "ReplicationController" => object.map_at("spec.selector"),
        "Deployment" | "ReplicaSet" if object.list_at("spec.selector.matchExpressions").is_empty() => object.map_at("spec.selector.matchLabels"),
        "Deployment" | "ReplicaSet" => return Err(Error::plain("couldn't convert expressions - \"matchExpressions\" to map-based selector format")),
        kind => return Err(Error::plain(format!("cannot expose a {kind}"))),
    };
    found.filter(|s| !s.is_empty()).cloned().ok_or_else(|| {
        Error::plain("couldn't retrieve selectors via --selector flag or introspection: the pod has no labels and cannot be exposed")
    })
}

fn ports(args: &Args, object: &Value) -> Result<Vec<Value>> {
    let one = |port: Value, protocol: &str| {
        let target = args.target_port.clone().map_or_else(|| port.clone(), |t| t.parse::<u16>().map_or(json!(t), |n| json!(n)));
        json!({ "port": port, "protocol": protocol, "targetPort": target })
    };
    if let Some(port) = args.port {
        return Ok(vec![one(json!(port), args.protocol.as_deref().unwrap_or("TCP"))]);
    }
    let found: Vec<(Value, &str)> = if object.str_at("kind") == "Service" {
        object.list_at("spec.ports").iter().map(|p| (p["port"].clone(), p.str_at("protocol"))).collect()
    } else {
        let path = format!("{}.containers", pod_spec_path(object.str_at("kind"))?);
        object.list_at(&path).iter().flat_map(|c| c.list_at("ports")).map(|p| (p["containerPort"].clone(), p.str_at("protocol"))).collect()
    };
    if found.is_empty() {
        return Err(Error::plain("couldn't find port via --port flag or introspection"));
    }
    let several = found.len() > 1;
    Ok(found
        .into_iter()
        .enumerate()
        .map(|(index, (port, protocol))| {
            let mut made = one(port, if protocol.is_empty() { "TCP" } else { protocol });
            if several {
                made["name"] = json!(format!("port-{}", index + 1));
            }
            made
        })
        .collect())
}

/// `a=b,c=d`.
pub fn pairs(text: &str) -> Result<Map<String, Value>> {
    text.split(',')
        .map(|pair| {
            let (key, value) = pair.split_once('=').ok_or_else(|| Error::plain(format!("unexpected label spec: {pair}")))?;
            Ok((key.to_owned(), json!(value)))
        })
        .collect()
}
