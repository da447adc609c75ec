//! `get`: the server's tables, or the objects themselves; once, or for as long as they change.

use futures::StreamExt;
use knarr_api::object::Object;
use serde_json::Value;

use crate::context::{Context, TABLE};
use crate::error::{Error, Result};
use crate::jsonpath::Template;
use crate::manifest;
use crate::output::{Format, OutputArgs, TableOptions, TablePrinter, custom_columns, json_text, list_of, strip_managed_fields};
use crate::target::{self, Target, selectors};
use crate::yaml;

#[derive(clap::Args)]
pub struct Args {
    /// TYPE[,TYPE...] [NAME...] or TYPE/NAME...
    words: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// If present, list the requested objects across all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Selector (label query) to filter on.
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Selector (field query) to filter on.
    #[arg(long)]
    field_selector: Option<String>,
    /// Files that name the objects.
    #[arg(short, long)]
    filename: Vec<String>,
    /// Process the directory used in -f recursively.
    #[arg(short = 'R', long)]
    recursive: bool,
    /// After listing, watch for changes.
    #[arg(short, long)]
    watch: bool,
    /// Watch for changes without listing first.
    #[arg(long)]
    watch_only: bool,
    /// Output watch event objects when watching.
    #[arg(long)]
    output_watch_events: bool,
    /// Do not print headers.
    #[arg(long)]
    no_headers: bool,
    /// Show all labels as the last column.
    #[arg(long)]
    show_labels: bool,
    /// Labels to present as columns.
    #[arg(short = 'L', long, value_delimiter = ',')]
    label_columns: Vec<String>,
    /// List the resource type for the requested object(s).
    #[arg(long)]
    show_kind: bool,
    /// Sort list types by this field, a JSONPath expression.
    #[arg(long)]
    sort_by: Option<String>,
    /// Treat "not found" as a successful retrieval.
    #[arg(long)]
    ignore_not_found: bool,
    /// A subresource to fetch: status, scale.
    #[arg(long)]
    subresource: Option<String>,
    /// Fetch in pages of this size; pages are always used here.
    #[arg(long, hide = true)]
    chunk_size: Option<u64>,
    /// Fetch this path from the server and print it as it is.
    #[arg(long)]
    raw: Option<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if let Some(path) = &args.raw {
        print!("{}", context.text(http::Method::GET, path, Default::default()).await?);
        return Ok(());
    }
    let format = args.output.format()?;
    let queries = queries(context, &args).await?;
    if args.watch || args.watch_only {
        return watch(context, &args, &format, &queries).await;
    }
    match format {
        Format::Table { wide } => tables(context, &args, wide, &queries).await,
        format => objects(context, &args, &format, &queries).await,
    }
}

/// One request: a collection or one object.
struct Query {
    target: Target,
    path: String,
    namespaced_away: bool,
}

async fn queries(context: &Context, args: &Args) -> Result<Vec<Query>> {
    let discovery = context.discovery().await?;
    let namespace = context.namespace()?;
    let mut queries = Vec::new();
    if !args.filename.is_empty() {
        for document in manifest::read(&args.filename, args.recursive)? {
            let (resource, scope) = super::apply::locate(context, &document.object).await?;
            let name = Some(document.object.name().to_owned());
            let path = resource.path(scope.as_deref(), name.as_deref());
            queries.push(Query { target: Target { resource, name }, path, namespaced_away: false });
        }
        return Ok(queries);
    }
    if args.words.is_empty() {
        return Err(Error::Raw(
            "You must specify the type of resource to get. Use \"kubectl api-resources\" for a complete list of supported resources.\n\n\
             error: Required resource not specified.\nUse \"kubectl explain <resource>\" for a detailed description of that resource (e.g. kubectl explain pods).\n\
             See 'kubectl get -h' for help and examples"
                .into(),
        ));
    }
    for target in target::resolve(discovery, &args.words)? {
        if target.name.is_some() && args.selector.is_some() {
            return Err(Error::plain("name cannot be provided when a selector is specified"));
        }
        if target.name.is_some() && args.all_namespaces && target.resource.namespaced {
            return Err(Error::plain("a resource cannot be retrieved by name across all namespaces"));
        }
        let scope = (!args.all_namespaces).then_some(namespace.as_str());
        let mut path = target.resource.path(scope, target.name.as_deref());
        if let Some(sub) = &args.subresource {
            if target.name.is_none() {
                return Err(Error::plain("--subresource needs the name of an object"));
            }
            path += &format!("/{sub}");
        }
        queries.push(Query { namespaced_away: args.all_namespaces, target, path });
    }
    Ok(queries)
}

async fn ask(context: &Context, args: &Args, query: &Query, accept: Option<&str>) -> Result<Value> {
    if query.target.name.is_some() {
        let ask = crate::context::Ask { accept, ..Default::default() };
        return context.json(http::Method::GET, &query.path, ask).await;
    }
    let mut terms = selectors(args.selector.as_deref(), args.field_selector.as_deref());
    if args.sort_by.is_some() && accept.is_some() {
        terms.push(("includeObject", "Object".into()));
    }
    context.list(&query.path, &terms, accept).await
}

async fn tables(context: &Context, args: &Args, wide: bool, queries: &[Query]) -> Result<()> {
    let mut errors = Vec::new();
    let mut printed: Option<String> = None;
    let kinds = distinct_kinds(queries);
    let mut printer = TablePrinter::new(TableOptions::default());
    let mut empty = true;
    for query in queries {
        let mut table = match ask(context, args, query, Some(TABLE)).await {
            Ok(table) => table,
            Err(error) if error.is_not_found() && args.ignore_not_found && query.target.name.is_some() => continue,
            Err(error) => {
                errors.push(error);
                continue;
            }
        };
        if table.str_at("kind") != "Table" {
            table = plain_table(table);
        }
        if table.list_at("rows").is_empty() {
            continue;
        }
        sort_rows(&mut table, args.sort_by.as_deref())?;
        let kind = query.target.resource.label();
        if printed.as_ref() != Some(&kind) {
            if printed.is_some() {
                println!();
            }
            printer = TablePrinter::new(table_options(args, wide, query, kinds > 1));
        }
        print_checked(&printer.print(&table, None))?;
        (printed, empty) = (Some(kind), false);
    }
    if empty && errors.is_empty() && !args.ignore_not_found {
        nothing_found(context, args, queries)?;
    }
    Error::collect(errors)
}

/// Prints without a panic when nobody reads any more.
fn print_checked(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

fn distinct_kinds(queries: &[Query]) -> usize {
    let mut kinds: Vec<String> = queries.iter().map(|q| q.target.resource.qualified()).collect();
    kinds.sort();
    kinds.dedup();
    kinds.len()
}

fn table_options(args: &Args, wide: bool, query: &Query, several: bool) -> TableOptions {
    TableOptions {
        wide,
        headers: !args.no_headers,
        namespace: query.namespaced_away && query.target.resource.namespaced,
        show_labels: args.show_labels,
        label_columns: args.label_columns.clone(),
        prefix: (several || args.show_kind).then(|| query.target.resource.label()),
        events: args.output_watch_events,
    }
}

/// A server without tables: name and age.
fn plain_table(answer: Value) -> Value {
    let items = match answer.get("items") {
        Some(Value::Array(items)) => items.clone(),
        _ => vec![answer],
    };
    let rows: Vec<Value> = items
        .iter()
        .map(|item| serde_json::json!({ "cells": [item.name(), age_of(item.str_at("metadata.creationTimestamp"))], "object": item }))
        .collect();
    serde_json::json!({ "columnDefinitions": [{ "name": "Name" }, { "name": "Age" }], "rows": rows })
}

/// How long ago a time was, in the words of the age column.
pub fn age_of(time: &str) -> String {
    match time.parse::<jiff::Timestamp>() {
        Ok(then) => knarr_api::time::age(jiff::Timestamp::now().duration_since(then).as_secs()),
        Err(_) => "<unknown>".into(),
    }
}

fn nothing_found(context: &Context, args: &Args, queries: &[Query]) -> Result<()> {
    let namespaced = queries.iter().all(|q| q.target.resource.namespaced);
    if namespaced && !args.all_namespaces {
        eprintln!("No resources found in {} namespace.", context.namespace()?);
    } else {
        eprintln!("No resources found");
    }
    Ok(())
}

fn sort_rows(table: &mut Value, sort_by: Option<&str>) -> Result<()> {
    let Some(path) = sort_by else { return Ok(()) };
    if let Some(Value::Array(rows)) = table.get_mut("rows") {
        sort(rows, path, "object")?;
    }
    Ok(())
}

/// Sorts by the first value of a path; numbers and quantities by size, all else as text.
fn sort(items: &mut [Value], path: &str, within: &str) -> Result<()> {
    let template = Template::relaxed(path).map_err(|e| Error::plain(format!("error parsing jsonpath {path}, {e}")))?;
    let key = |item: &Value| {
        let object = if within.is_empty() { Some(item) } else { item.get(within) };
        object.and_then(|o| template.find(o).first().map(|v| (*v).clone()))
    };
    items.sort_by(|a, b| compare(key(a).as_ref(), key(b).as_ref()));
    Ok(())
}

fn compare(a: Option<&Value>, b: Option<&Value>) -> std::cmp::Ordering {
    use std::cmp::Ordering;
    match (a, b) {
        (None, None) => Ordering::Equal,
        (None, _) => Ordering::Less,
        (_, None) => Ordering::Greater,
        (Some(Value::Number(a)), Some(Value::Number(b))) => {
            a.as_f64().partial_cmp(&b.as_f64()).unwrap_or(Ordering::Equal)
        }
        (Some(a), Some(b)) => crate::jsonpath::print(a).cmp(&crate::jsonpath::print(b)),
    }
}

async fn objects(context: &Context, args: &Args, format: &Format, queries: &[Query]) -> Result<()> {
    let (mut errors, mut items) = (Vec::new(), Vec::new());
    for query in queries {
        match ask(context, args, query, None).await {
            Ok(answer) => items.extend(unpack(answer, query)),
            Err(error) if error.is_not_found() && args.ignore_not_found => {}
            Err(error) => errors.push(error),
        }
    }
    let one = queries.len() == 1 && queries[0].target.name.is_some();
    if let Some(path) = &args.sort_by {
        sort(&mut items, path, "")?;
    }
    if !args.output.show_managed_fields {
        items.iter_mut().for_each(strip_managed_fields);
    }
    // A single named object that was not there: only the error is printed.
    if !(one && items.is_empty()) {
        print_checked(&render(args, format, items, one, context).await?)?;
    }
    Error::collect(errors)
}

fn unpack(mut answer: Value, query: &Query) -> Vec<Value> {
    if query.target.name.is_some() {
        return vec![answer];
    }
    let Value::Array(items) = answer["items"].take() else { return Vec::new() };
    let resource = &query.target.resource;
    items
        .into_iter()
        .map(|mut item| {
            item["apiVersion"] = resource.api_version().into();
            item["kind"] = resource.kind.clone().into();
            item
        })
        .collect()
}

async fn render(args: &Args, format: &Format, mut items: Vec<Value>, one: bool, context: &Context) -> Result<String> {
    let whole = |items: &mut Vec<Value>| if one { items.remove(0) } else { list_of(std::mem::take(items)) };
    Ok(match format {
        Format::Json => json_text(&whole(&mut items)),
        Format::Yaml => yaml::print(&whole(&mut items)),
        Format::JsonPath(template) => template.render(&whole(&mut items)),
        Format::JsonPathAsJson(template) => json_text(&serde_json::json!(template.find(&whole(&mut items)))),
        Format::Columns(columns) => custom_columns(columns, &items, !args.no_headers),
        Format::Name => {
            let discovery = context.discovery().await?;
            let named = |item: &Value| {
                let resource = discovery.of_kind(item.str_at("apiVersion"), item.str_at("kind"));
                let label = resource.map_or_else(|| item.str_at("kind").to_lowercase(), |r| r.label());
                format!("{label}/{}\n", item.name())
            };
            items.iter().map(named).collect()
        }
        Format::Table { .. } => String::new(),
    })
}

async fn watch(context: &Context, args: &Args, format: &Format, queries: &[Query]) -> Result<()> {
    let [query] = queries else {
        return Err(Error::plain("you may only specify a single resource type"));
    };
    let (wide, accept) = match format {
        Format::Table { wide } => (*wide, Some(TABLE)),
        _ => (false, None),
    };
    let resource = &query.target.resource;
    // One object is watched through its collection, by name.
    let scope = (!query.namespaced_away).then(|| context.namespace()).transpose()?;
    let path = resource.path(scope.as_deref(), None);
    let mut fields = args.field_selector.clone().unwrap_or_default();
    if let Some(name) = &query.target.name {
        fields = format!("metadata.name={name}");
        if !args.watch_only {
            context.get(&query.path).await?;
        }
    }
    let terms = selectors(args.selector.as_deref(), Some(fields.as_str()).filter(|f| !f.is_empty()));
    let first = context.list(&path, &terms, accept).await?;
    let mut version = first.str_at("metadata.resourceVersion").to_owned();
    let mut printer = TablePrinter::new(table_options(args, wide, query, false));
    if !args.watch_only {
        show(args, format, &mut printer, &first, "ADDED", resource)?;
    } else if accept.is_some() {
        let mut headers = first.clone();
        headers["rows"] = serde_json::json!([]);
        print_checked(&printer.print(&headers, None))?;
    }
    loop {
        let mut events = context.watch(&path, &terms, &version, accept).await?;
        while let Some(event) = events.next().await {
            let event = event?;
            let object = event.object.list_at("rows").first().and_then(|row| row.at("object")).unwrap_or(&event.object);
            if !object.str_at("metadata.resourceVersion").is_empty() {
                version = object.str_at("metadata.resourceVersion").to_owned();
            }
            if event.kind != "BOOKMARK" {
                show(args, format, &mut printer, &event.object, &event.kind, resource)?;
            }
        }
        tokio::time::sleep(super::wait::RELIST_PAUSE).await;
    }
}

fn show(
    args: &Args,
    format: &Format,
    printer: &mut TablePrinter,
    answer: &Value,
    event: &str,
    resource: &crate::discovery::Resource,
) -> Result<()> {
    if let Format::Table { .. } = format {
        return print_checked(&printer.print(answer, Some(event)));
    }
    let items: Vec<Value> = match answer.get("items") {
        Some(Value::Array(items)) => items.clone(),
        _ => vec![answer.clone()],
    };
    for mut item in items {
        item["apiVersion"] = resource.api_version().into();
        item["kind"] = resource.kind.clone().into();
        let named = resource.named(item.name());
        if args.output_watch_events {
            item = serde_json::json!({ "type": event, "object": item });
        }
        if matches!(format, Format::Yaml) {
            print_checked("---\n")?;
        }
        print_checked(&args.output.one(format, &named, &item)?)?;
    }
    Ok(())
}
