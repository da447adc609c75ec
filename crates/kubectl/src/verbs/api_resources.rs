//! `api-resources`: every resource served.

use crate::context::Context;
use crate::discovery::Resource;
use crate::error::Result;
use crate::table::{GET, align};

#[derive(clap::Args)]
pub struct Args {
    #[arg(long)]
    api_group: Option<String>,
    /// Only namespaced resources (true) or only others (false).
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    namespaced: Option<bool>,
    #[arg(long, value_delimiter = ',')]
    verbs: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    categories: Vec<String>,
    #[arg(long)]
    no_headers: bool,
    #[arg(short, long, value_parser = ["wide", "name"])]
    output: Option<String>,
    #[arg(long, value_parser = ["name", "kind"])]
    sort_by: Option<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let mut shown: Vec<&Resource> = context.discovery().await?.resources.iter().filter(|r| is_wanted(&args, r)).collect();
    shown.sort_by_key(|r| match args.sort_by.as_deref() {
        Some("name") => (r.plural.clone(), String::new()),
        Some("kind") => (r.kind.clone(), String::new()),
        _ => (r.group.clone(), r.plural.clone()),
    });
    if args.output.as_deref() == Some("name") {
        shown.iter().for_each(|r| println!("{}", r.qualified()));
        return Ok(());
    }
    let wide = args.output.is_some();
    let mut text = String::new();
    if !args.no_headers {
        text += "NAME\tSHORTNAMES\tAPIVERSION\tNAMESPACED\tKIND";
        text += if wide { "\tVERBS\tCATEGORIES\n" } else { "\n" };
    }
    for r in shown {
        text += &format!("{}\t{}\t{}\t{}\t{}", r.plural, r.short.join(","), r.api_version(), r.namespaced, r.kind);
        if wide {
            text += &format!("\t{}\t{}", r.verbs.join(","), r.categories.join(","));
        }
        text.push('\n');
    }
    print!("{}", align(&text, GET));
    Ok(())
}

fn is_wanted(args: &Args, resource: &Resource) -> bool {
    args.api_group.as_ref().is_none_or(|g| *g == resource.group)
        && args.namespaced.is_none_or(|n| n == resource.namespaced)
        && args.verbs.iter().all(|v| resource.can(v))
        && args.categories.iter().all(|c| resource.categories.contains(c))
}
