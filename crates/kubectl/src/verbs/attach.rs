//! `attach`: the streams of a container's main process.

use k8s_openapi::api::core::v1::Pod;
use knarr_api::object::Object;
use kube::Api;
use serde_json::Value;

use crate::context::Context;
use crate::error::Result;
use crate::pods;
use crate::verbs::exec::{Session, refuse_ended, streaming_error};

#[derive(clap::Args)]
pub struct Args {
    /// POD or TYPE/NAME.
    target: String,
    #[arg(short, long)]
    container: Option<String>,
    #[arg(short = 'i', long)]
    stdin: bool,
    #[arg(short = 't', long)]
    tty: bool,
    #[arg(short, long)]
    quiet: bool,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let pod = pods::behind(context, std::slice::from_ref(&args.target)).await?.remove(0);
    refuse_ended(&pod)?;
    attach(context, &pod, args.container.as_deref(), args.stdin, args.tty, args.quiet).await
}

pub async fn attach(context: &Context, pod: &Value, container: Option<&str>, stdin: bool, tty: bool, quiet: bool) -> Result<()> {
    let container = pods::choose_container(pod, container, quiet)?;
    let session = Session::new(stdin, tty, quiet);
    if session.tty && !quiet {
        eprintln!("If you don't see a command prompt, try pressing enter.");
    }
    let api: Api<Pod> = Api::namespaced(context.client().await?, pod.namespace());
    let process = api.attach(pod.name(), &session.params(container)).await.map_err(|e| streaming_error(e, ""))?;
    session.run(process).await
}
