//! `events`: what happened, oldest first.

use knarr_api::object::Object;
use serde_json::Value;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::{OutputArgs, list_of, strip_managed_fields};
use crate::table::{GET, align};
use crate::verbs::describe::{event_age, event_time};

#[derive(clap::Args)]
pub struct Args {
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// TYPE/NAME the events are about.
    #[arg(long = "for")]
    about: Option<String>,
    /// Only these types: Normal, Warning.
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    #[arg(long)]
    no_headers: bool,
    #[arg(short, long, hide = true)]
    watch: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if args.watch {
        return Err(Error::refused("events --watch", "use: kubectl get events --watch"));
    }
    let namespace = context.namespace()?;
    let path = if args.all_namespaces { "/api/v1/events".to_owned() } else { format!("/api/v1/namespaces/{namespace}/events") };
    let mut query = Vec::new();
    if let Some(about) = &args.about {
        let (kind, name) = about.split_once('/').ok_or_else(|| Error::plain("--for must be in resource/name form"))?;
        let resource = context.resource(kind).await?;
        query.push(("fieldSelector", format!("involvedObject.kind={},involvedObject.name={name}", resource.kind)));
    }
    let list = context.list(&path, &query, None).await?;
    let mut items: Vec<Value> = list.list_at("items").to_vec();
    items.retain(|e| args.types.is_empty() || args.types.iter().any(|t| t.eq_ignore_ascii_case(e.str_at("type"))));
    items.sort_by_key(|e| event_time(e).to_owned());
    if args.output.output.is_some() {
        items.iter_mut().for_each(strip_managed_fields);
        return args.output.done("list", &list_of(items), "");
    }
    if items.is_empty() {
        eprintln!("{}", if args.all_namespaces { "No events found.".to_owned() } else { format!("No events found in {namespace} namespace.") });
        return Ok(());
    }
    let mut text = String::new();
    if !args.no_headers {
        text += if args.all_namespaces { "NAMESPACE\t" } else { "" };
        text += "LAST SEEN\tTYPE\tREASON\tOBJECT\tMESSAGE\n";
    }
    for event in &items {
        if args.all_namespaces {
            text += &format!("{}\t", event.namespace());
        }
        let object = format!("{}/{}", event.str_at("involvedObject.kind"), event.str_at("involvedObject.name"));
        text += &format!("{}\t{}\t{}\t{object}\t{}\n", event_age(event), event.str_at("type"), event.str_at("reason"), event.str_at("message").trim());
    }
    print!("{}", align(&text, GET));
    Ok(())
}
