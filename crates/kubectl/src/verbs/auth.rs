//! `auth`: what am I, and may I?

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context};
use crate::error::{Error, Result};
use crate::output::OutputArgs;
use crate::table::{GET, align};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Sub,
}

#[derive(clap::Subcommand)]
enum Sub {
    /// Check whether an action is allowed.
    CanI(CanIArgs),
    /// Check self subject attributes.
    Whoami(OutputArgs),
}

#[derive(clap::Args)]
struct CanIArgs {
    /// VERB TYPE[/NAME], or VERB and a path such as /healthz.
    words: Vec<String>,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[arg(long)]
    subresource: Option<String>,
    /// Say nothing, only set the exit code.
    #[arg(short, long)]
    quiet: bool,
    /// Print all allowed actions.
    #[arg(long)]
    list: bool,
    #[arg(long)]
    no_headers: bool,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    match args.command {
        Sub::CanI(args) if args.list => list(context, &args).await,
        Sub::CanI(args) => can_i(context, &args).await,
        Sub::Whoami(output) => whoami(context, &output).await,
    }
}

async fn can_i(context: &Context, args: &CanIArgs) -> Result<()> {
    let [verb, what] = args.words.as_slice() else {
        return Err(Error::plain("you must specify two arguments: verb resource or verb resource/resourceName"));
    };
    let namespace = if args.all_namespaces { String::new() } else { context.namespace()? };
    let spec = if what.starts_with('/') {
        json!({ "nonResourceAttributes": { "verb": verb, "path": what } })
    } else {
        let (kind, name) = what.split_once('/').unwrap_or((what, ""));
        let found = context.discovery().await?.find(kind).ok();
        if found.is_none() && kind != "*" {
            eprintln!("Warning: the server doesn't have a resource type '{kind}'\n");
        }
        let (group, resource) = found.map_or_else(|| (String::new(), kind.to_owned()), |r| (r.group.clone(), r.plural.clone()));
        if found.is_some_and(|r| !r.namespaced) && !args.all_namespaces {
            eprintln!("Warning: resource '{resource}' is not namespace scoped\n");
        }
        json!({ "resourceAttributes": { "verb": verb, "group": group, "resource": resource, "name": name, "namespace": namespace, "subresource": args.subresource } })
    };
    let review = json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec });
    let answer = context.json(Method::POST, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", Ask::json(&review)).await?;
    let allowed = answer.bool_at("status.allowed");
    if !args.quiet {
        let reason = answer.str_at("status.reason");
        let error = answer.str_at("status.evaluationError");
        let mut text = if allowed { "yes".to_owned() } else { "no".to_owned() };
        if !reason.is_empty() && !allowed {
            text += &format!(" - {reason}");
        }
        if !error.is_empty() {
            text += &format!(" - {error}");
        }
        println!("{text}");
    }
    if allowed { Ok(()) } else { Err(Error::Exit(1)) }
}

async fn list(context: &Context, args: &CanIArgs) -> Result<()> {
    let review = json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": { "namespace": context.namespace()? } });
    let answer = context.json(Method::POST, "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", Ask::json(&review)).await?;
    let mut text = if args.no_headers { String::new() } else { "Resources\tNon-Resource URLs\tResource Names\tVerbs\n".to_owned() };
    let join = |rule: &Value, field: &str| rule.list_at(field).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
    for rule in answer.list_at("status.resourceRules") {
        for resource in rule.list_at("resources").iter().filter_map(Value::as_str) {
            let group = join(rule, "apiGroups");
            let name = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
            text += &format!("{name}\t[]\t[{}]\t[{}]\n", join(rule, "resourceNames"), join(rule, "verbs"));
        }
    }
    for rule in answer.list_at("status.nonResourceRules") {
        text += &format!("\t[{}]\t[]\t[{}]\n", join(rule, "nonResourceURLs"), join(rule, "verbs"));
    }
    print!("{}", align(&text, GET));
    Ok(())
}

async fn whoami(context: &Context, output: &OutputArgs) -> Result<()> {
    let review = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview" });
    let answer = context.json(Method::POST, "/apis/authentication.k8s.io/v1/selfsubjectreviews", Ask::json(&review)).await?;
    if output.output.is_some() {
        return output.done("selfsubjectreview.authentication.k8s.io", &answer, "");
    }
    let mut text = format!("ATTRIBUTE\tVALUE\nUsername\t{}\n", answer.str_at("status.userInfo.username"));
    let groups: Vec<&str> = answer.list_at("status.userInfo.groups").iter().filter_map(Value::as_str).collect();
    text += &format!("Groups\t[{}]\n", groups.join(" "));
    for (key, values) in answer.map_at("status.userInfo.extra").into_iter().flatten() {
        let values: Vec<&str> = values.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        text += &format!("Extra: {key}\t[{}]\n", values.join(" "));
    }
    print!("{}", align(&text, GET));
    Ok(())
}
