//! `apply`: brings objects to what manifests say, by a three-way merge here or by the server.

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{APPLY_PATCH, Ask, Context, MERGE_PATCH, STRATEGIC_PATCH};
use crate::discovery::Resource;
use crate::error::{Error, Result};
use crate::manifest::{self, Document};
use crate::merge;
use crate::output::OutputArgs;

const FIELD_MANAGER: &str = "kubectl-client-side-apply";
/// Tries of one patch while others write the same object.
const CONFLICT_TRIES_MAX: usize = 5;

#[derive(clap::Args)]
pub struct Args {
    /// The files that contain the configurations to apply; `-` is standard input.
    #[arg(short, long)]
    filename: Vec<String>,
    /// Process the directory used in -f recursively.
    #[arg(short = 'R', long)]
    recursive: bool,
    /// A kustomization directory.
    #[arg(short = 'k', long, hide = true)]
    kustomize: Option<String>,
    /// If true, apply runs in the server instead of the client.
    #[arg(long)]
    server_side: bool,
    /// If true, server-side apply will force the changes against conflicts.
    #[arg(long)]
    force_conflicts: bool,
    /// Name of the manager used to track field ownership.
    #[arg(long)]
    field_manager: Option<String>,
    /// Delete what is no longer in the manifests.
    #[arg(long, hide = true)]
    prune: bool,
    /// Delete and re-create what cannot be patched.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    dry_run: DryRunArgs,
    #[command(flatten)]
    validate: ValidateArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(subcommand)]
    command: Option<Sub>,
}

#[derive(clap::Subcommand)]
enum Sub {
    /// View the latest last-applied-configuration annotations of a resource.
    ViewLastApplied {
        words: Vec<String>,
        #[arg(short, long, default_value = "yaml")]
        output: String,
    },
}

/// `--dry-run`, as all writing verbs have it.
#[derive(clap::Args, Clone, Default)]
pub struct DryRunArgs {
    /// Must be "none", "server", or "client".
    #[arg(long, num_args = 0..=1, default_missing_value = "client", require_equals = true, default_value = "none", value_parser = ["none", "client", "server"])]
    dry_run: String,
}

impl DryRunArgs {
    pub fn is_client(&self) -> bool {
        self.dry_run == "client"
    }

    /// Adds `dryRun=All` to a request.
    pub fn ask<'a>(&self, ask: Ask<'a>) -> Ask<'a> {
        if self.dry_run == "server" { ask.with("dryRun", "All") } else { ask }
    }

    /// `created (dry run)`, `created (server dry run)`.
    pub fn words(&self, what: &str) -> String {
        match self.dry_run.as_str() {
            "client" => format!("{what} (dry run)"),
            "server" => format!("{what} (server dry run)"),
            _ => what.to_owned(),
        }
    }
}

/// `--validate`, as the verbs that read manifests have it.
#[derive(clap::Args, Clone, Default)]
pub struct ValidateArgs {
    /// What the server does with unknown fields: strict (true), warn, ignore (false).
    #[arg(long, num_args = 0..=1, default_missing_value = "strict", require_equals = true, default_value = "strict", value_parser = ["strict", "warn", "ignore", "true", "false"])]
    validate: String,
}

impl ValidateArgs {
    pub fn level(&self) -> &'static str {
        match self.validate.as_str() {
            "warn" => "Warn",
            "ignore" | "false" => "Ignore",
            _ => "Strict",
        }
    }
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    if let Some(Sub::ViewLastApplied { words, output }) = &args.command {
        return view_last_applied(context, words, output).await;
    }
    if args.kustomize.is_some() {
        return Err(Error::refused("apply -k", "build the directory with kustomize first: kustomize build DIR | kubectl apply -f -"));
    }
    if args.prune {
        return Err(Error::refused("apply --prune", "delete what is gone by label: kubectl delete -l ..."));
    }
    let mut errors = Vec::new();
    for document in manifest::read(&args.filename, args.recursive)? {
        if let Err(error) = apply(context, &args, document).await {
            errors.push(error);
        }
    }
    Error::collect(errors)
}

/// The resource of a manifest, and the namespace its object goes to.
pub async fn locate(context: &Context, object: &Value) -> Result<(Resource, Option<String>)> {
    let (api_version, kind) = (object.str_at("apiVersion"), object.str_at("kind"));
    let resource = context.discovery().await?.of_kind(api_version, kind).cloned().ok_or_else(|| {
        Error::plain(format!(
            "resource mapping not found for name: {:?} namespace: {:?}: no matches for kind {kind:?} in version {api_version:?}\nensure CRDs are installed first",
            object.name(), object.namespace()
        ))
    })?;
    if !resource.namespaced {
        return Ok((resource, None));
    }
    let asked = context.args.namespace.as_deref();
    let namespace = match (object.namespace(), asked) {
        ("", _) => context.namespace()?,
        (own, Some(asked)) if own != asked => {
            return Err(Error::plain(format!(
                "the namespace from the provided object {own:?} does not match the namespace {asked:?}. You must pass '--namespace={own}' to perform this operation."
            )));
        }
        (own, _) => own.to_owned(),
    };
    Ok((resource, Some(namespace)))
}

async fn apply(context: &Context, args: &Args, document: Document) -> Result<()> {
    let Document { source, mut object } = document;
    let (resource, namespace) = locate(context, &object).await?;
    if object.name().is_empty() {
        let generated = object.str_at("metadata.generateName");
        return Err(Error::plain(if generated.is_empty() {
            format!("error when applying {source:?}: resource name may not be empty")
        } else {
            format!("from {generated}: cannot use generate name with apply")
        }));
    }
    if let Some(namespace) = &namespace {
        object.set_at("metadata.namespace", namespace.clone());
    }
    let one = One { context, args, source: &source, path: resource.path(namespace.as_deref(), Some(object.name())), collection: resource.path(namespace.as_deref(), None), resource: &resource };
    if args.server_side { one.server_side(&object).await } else { one.client_side(&object).await }
}

/// One object on its way to the server.
struct One<'a> {
    context: &'a Context,
    args: &'a Args,
    source: &'a str,
    resource: &'a Resource,
    path: String,
    collection: String,
}

impl One<'_> {
    async fn server_side(&self, object: &Value) -> Result<()> {
        let manager = self.args.field_manager.as_deref().unwrap_or("kubectl");
        let mut ask = Ask::patch(APPLY_PATCH, object)
            .with("fieldManager", manager)
            .with("fieldValidation", self.args.validate.level())
            .with("force", if self.args.force_conflicts { "true" } else { "false" });
        ask = self.args.dry_run.ask(ask);
        match self.context.json(Method::PATCH, &self.path, ask).await {
            Ok(applied) => self.done(&applied, "serverside-applied"),
            Err(error) if error.reason() == "Conflict" => Err(Error::Raw(format!(
                "error: {}\nPlease review the fields above--they currently have other managers. Here\n\
                 are the ways you can resolve this warning:\n\
                 * If you intend to manage all of these fields, please re-run the apply\n  command with the `--force-conflicts` flag.\n\
                 * If you do not intend to manage all of the fields, please edit your\n  manifest to remove references to the fields that should keep their\n  current managers.\n\
                 * You may co-own fields by updating your manifest to match the existing\n  value; in this case, you'll become the manager if the other manager(s)\n  stop managing the field (remove it from their configuration).\n\
                 See https://kubernetes.io/docs/reference/using-api/server-side-apply/#conflicts",
                error.message()
            ))),
            Err(error) => Err(error),
        }
    }

    fn manager(&self) -> &str {
        self.args.field_manager.as_deref().unwrap_or(FIELD_MANAGER)
    }

    async fn client_side(&self, object: &Value) -> Result<()> {
        let modified = merge::with_last_applied(object);
        for _ in 0..CONFLICT_TRIES_MAX {
            let current = match self.context.get(&self.path).await {
                Ok(current) => current,
                Err(error) if error.is_not_found() => return self.create(&modified).await,
                Err(error) => return Err(error.when("retrieving current configuration of", self.source)),
            };
            match self.patch(&modified, &current).await {
                Err(error) if error.reason() == "Conflict" => {}
                other => return other,
            }
        }
        Err(Error::plain(format!("{} changed faster than it could be patched", self.path)))
    }

    async fn create(&self, modified: &Value) -> Result<()> {
        if self.args.dry_run.is_client() {
            return self.done(modified, "created");
        }
        let ask = Ask::json(modified).with("fieldManager", self.manager()).with("fieldValidation", self.args.validate.level());
        let created = self.context.json(Method::POST, &self.collection, self.args.dry_run.ask(ask)).await;
        self.done(&created.map_err(|e| e.when("creating", self.source))?, "created")
    }

    async fn patch(&self, modified: &Value, current: &Value) -> Result<()> {
        let original = merge::last_applied(current);
        if original.is_none() {
            let named = format!("{}/{}", self.resource.plural, modified.name());
            eprintln!(
                "Warning: resource {named} is missing the {} annotation which is required by kubectl apply. kubectl apply should only be used on resources created declaratively by either kubectl create --save-config or kubectl apply. The missing annotation will be patched automatically.",
                merge::LAST_APPLIED
            );
        }
        let type_id = merge::type_of(modified.str_at("apiVersion"), modified.str_at("kind"));
        let mut patch = merge::three_way(type_id, &original.unwrap_or_else(|| json!({})), modified, current);
        if patch == json!({}) {
            return self.done(current, "unchanged");
        }
        if self.args.dry_run.is_client() {
            return self.done(modified, "configured");
        }
        // An object that carries a version in its manifest is only to be changed from that version.
        if let Some(version) = modified.at("metadata.resourceVersion") {
            patch.set_at("metadata.resourceVersion", version.clone());
        }
        let kind = if type_id.is_some() { STRATEGIC_PATCH } else { MERGE_PATCH };
        let ask = Ask::patch(kind, &patch).with("fieldManager", self.manager()).with("fieldValidation", self.args.validate.level());
        match self.context.json(Method::PATCH, &self.path, self.args.dry_run.ask(ask)).await {
            Ok(patched) => self.done(&patched, "configured"),
            Err(error) if self.args.force && error.reason() == "Invalid" => self.recreate(modified).await,
            Err(error) if error.reason() == "Invalid" || error.reason() == "Conflict" => Err(error),
            Err(error) => Err(error.when("applying patch from", self.source)),
        }
    }

    async fn recreate(&self, modified: &Value) -> Result<()> {
        let deleted = self.context.json(Method::DELETE, &self.path, Ask::json(&json!({ "gracePeriodSeconds": 0 }))).await?;
        super::wait::until_gone(self.context, &self.path, &self.collection, &deleted, None).await?;
        self.create(modified).await
    }

    fn done(&self, object: &Value, what: &str) -> Result<()> {
        let named = self.resource.named(object.name());
        self.args.output.done(&named, object, &self.args.dry_run.words(what))
    }
}

async fn view_last_applied(context: &Context, words: &[String], output: &str) -> Result<()> {
    for found in crate::target::fetch(context, words, None, None, false).await? {
        let Some(last) = merge::last_applied(&found.object) else {
            return Err(Error::plain(format!("no last-applied-configuration annotation found on resource: {}", found.object.name())));
        };
        match output {
            "yaml" => print!("{}", crate::yaml::print(&last)),
            "json" => print!("{}", crate::output::json_text(&last)),
            other => return Err(Error::plain(format!("Unexpected -o output mode: {other}, the flag 'output' must be one of yaml|json"))),
        }
    }
    Ok(())
}
