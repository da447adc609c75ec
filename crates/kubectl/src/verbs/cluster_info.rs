//! `cluster-info`: where the control plane and its services answer.

use knarr_api::object::Object;

use crate::context::Context;
use crate::error::{Error, Result};

#[derive(clap::Args)]
pub struct Args {
    #[arg(hide = true)]
    words: Vec<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if args.words.iter().any(|w| w == "dump") {
        return Err(Error::refused("cluster-info dump", "get what you need: kubectl get all -A -o yaml"));
    }
    let url = context.server_url().await?;
    let query = [("labelSelector", "kubernetes.io/cluster-service=true".to_owned())];
    let services = context.list("/api/v1/namespaces/kube-system/services", &query, None).await?;
    println!("Kubernetes control plane is running at {url}");
    for service in services.list_at("items") {
        let label = service.map_at("metadata.labels").and_then(|l| l.get("kubernetes.io/name")).and_then(|n| n.as_str());
        let port = service.list_at("spec.ports").first().map(|p| p.str_at("name")).unwrap_or_default();
        let port = if port.is_empty() { String::new() } else { format!(":{port}") };
        println!("{} is running at {url}/api/v1/namespaces/kube-system/services/{}{port}/proxy", label.unwrap_or(service.name()), service.name());
    }
    println!("\nTo further debug and diagnose cluster problems, use 'kubectl cluster-info dump'.");
    Ok(())
}
