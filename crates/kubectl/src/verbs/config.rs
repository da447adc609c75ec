//! `config`: what is in the kubeconfig, and which context counts.
//!
//! Works on the files as they are, not on known fields only, so nothing a user put there is lost.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::json_text;
use crate::table::{GET, align};
use crate::yaml;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Sub,
}

#[derive(clap::Subcommand)]
enum Sub {
    /// Display merged kubeconfig settings.
    View {
        /// Display raw byte data and sensitive data.
        #[arg(long)]
        raw: bool,
        /// Remove all information not used by the current context.
        #[arg(long)]
        minify: bool,
        #[arg(short, long, default_value = "yaml")]
        output: String,
    },
    /// Describe one or many contexts.
    GetContexts {
        names: Vec<String>,
        #[arg(long)]
        no_headers: bool,
        #[arg(short, long, value_parser = ["name"])]
        output: Option<String>,
    },
    /// Display the current-context.
    CurrentContext,
    /// Set the current-context in a kubeconfig file.
    #[command(alias = "use")]
    UseContext { name: String },
    /// Set a context entry: --namespace, --cluster, --user.
    SetContext {
        name: Option<String>,
        /// Modify the current context.
        #[arg(long)]
        current: bool,
    },
    /// Delete the specified context.
    DeleteContext { name: String },
    /// Rename a context.
    RenameContext { old: String, new: String },
    /// Display clusters defined in the kubeconfig.
    GetClusters,
    /// Display users defined in the kubeconfig.
    GetUsers,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let files = read_all(context)?;
    let config = merged(&files);
    match args.command {
        Sub::View { raw, minify, output } => view(context, config, raw, minify, &output),
        Sub::GetContexts { names, no_headers, output } => get_contexts(&config, &names, no_headers, output.is_some()),
        Sub::CurrentContext => match config.str_at("current-context") {
            "" => Err(Error::plain("current-context is not set")),
            name => {
                println!("{name}");
                Ok(())
            }
        },
        Sub::UseContext { name } => use_context(context, files, &name),
        Sub::SetContext { name, current } => set_context(context, files, &config, name, current),
        Sub::DeleteContext { name } => delete_context(files, &name),
        Sub::RenameContext { old, new } => rename_context(files, &old, &new),
        Sub::GetClusters => names_of(&config, "clusters"),
        Sub::GetUsers => names_of(&config, "users"),
    }
}

fn read_all(context: &Context) -> Result<Vec<(PathBuf, Value)>> {
    let read = |path: PathBuf| {
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other.map_err(|e| Error::plain(format!("error loading config file {:?}: {e}", path.display().to_string())))?,
        };
        let value: Value = serde_yaml_ng::from_str(&text).map_err(|e| Error::plain(format!("error loading config file {:?}: {e}", path.display().to_string())))?;
        Ok((path, if value.is_object() { value } else { json!({ "apiVersion": "v1", "kind": "Config" }) }))
    };
    context.kubeconfig_paths().into_iter().map(read).collect()
}

const LISTS: [&str; 3] = ["clusters", "contexts", "users"];

/// The first file to name something wins.
fn merged(files: &[(PathBuf, Value)]) -> Value {
    let mut all = json!({ "apiVersion": "v1", "kind": "Config", "clusters": [], "contexts": [], "users": [], "current-context": "" });
    for (_, file) in files {
        if all.str_at("current-context").is_empty() {
            all["current-context"] = file.str_at("current-context").into();
        }
        for list in LISTS {
            for entry in file.list_at(list) {
                let known = all.list_at(list).iter().any(|e| e.str_at("name") == entry.str_at("name"));
                if let (false, Some(entries)) = (known, all[list].as_array_mut()) {
                    entries.push(entry.clone());
                }
            }
        }
    }
    all
}

fn find<'c>(config: &'c Value, list: &str, name: &str) -> Option<&'c Value> {
    config.list_at(list).iter().find(|e| e.str_at("name") == name)
}

fn view(context: &Context, mut config: Value, raw: bool, minify: bool, output: &str) -> Result<()> {
    if minify {
        let name = context.args.context.clone().unwrap_or_else(|| config.str_at("current-context").to_owned());
        let entry = find(&config, "contexts", &name).cloned().ok_or_else(|| Error::plain("current-context must exist in order to minify"))?;
        for (list, wanted) in [("contexts", name.as_str()), ("clusters", entry.str_at("context.cluster")), ("users", entry.str_at("context.user"))] {
            let kept: Vec<Value> = find(&config, list, wanted).cloned().into_iter().collect();
            config[list] = kept.into();
        }
        config["current-context"] = name.into();
    }
    if !raw {
        redact(&mut config);
    }
    match output {
        "yaml" => print!("{}", yaml::print(&config)),
        "json" => print!("{}", json_text(&config)),
        other => {
            let args = crate::output::OutputArgs { output: Some(other.to_owned()), ..Default::default() };
            print!("{}", args.one(&args.format()?, "config", &config)?);
        }
    }
    Ok(())
}

fn redact(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match key.as_str() {
                    "certificate-authority-data" | "client-certificate-data" | "client-key-data" if value.is_string() => {
                        *value = "DATA+OMITTED".into();
                    }
                    "token" | "password" if value.is_string() => *value = "REDACTED".into(),
                    _ => redact(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

fn get_contexts(config: &Value, names: &[String], no_headers: bool, only_names: bool) -> Result<()> {
    let mut errors = Vec::new();
    for name in names.iter().filter(|n| find(config, "contexts", n).is_none()) {
        errors.push(Error::plain(format!("context {name} not found")));
    }
    let mut text = if no_headers || only_names { String::new() } else { "CURRENT\tNAME\tCLUSTER\tAUTHINFO\tNAMESPACE\n".to_owned() };
    let mut entries: Vec<&Value> = config.list_at("contexts").iter().filter(|c| names.is_empty() || names.iter().any(|n| n == c.str_at("name"))).collect();
    entries.sort_by_key(|e| e.str_at("name"));
    for entry in entries {
        let name = entry.str_at("name");
        if only_names {
            text += &format!("{name}\n");
            continue;
        }
        let mark = if name == config.str_at("current-context") { "*" } else { "" };
        text += &format!("{mark}\t{name}\t{}\t{}\t{}\n", entry.str_at("context.cluster"), entry.str_at("context.user"), entry.str_at("context.namespace"));
    }
    print!("{}", align(&text, GET));
    Error::collect(errors)
}

fn names_of(config: &Value, list: &str) -> Result<()> {
    println!("NAME");
    let mut names: Vec<&str> = config.list_at(list).iter().map(|e| e.str_at("name")).collect();
    names.sort_unstable();
    names.iter().for_each(|name| println!("{name}"));
    Ok(())
}

fn use_context(context: &Context, mut files: Vec<(PathBuf, Value)>, name: &str) -> Result<()> {
    if find(&merged(&files), "contexts", name).is_none() {
        return Err(Error::plain(format!("no context exists with the name: {name:?}")));
    }
    // The file that sets it now, else the first.
    let index = files.iter().position(|(_, f)| !f.str_at("current-context").is_empty()).unwrap_or(0);
    let Some((path, file)) = files.get_mut(index) else { return Err(no_file(context)) };
    file["current-context"] = name.into();
    write(path, file)?;
    println!("Switched to context {name:?}.");
    Ok(())
}

fn no_file(_context: &Context) -> Error {
    Error::plain("there is no kubeconfig file; start a cluster with `knarr up`, or set KUBECONFIG")
}

fn set_context(context: &Context, mut files: Vec<(PathBuf, Value)>, config: &Value, name: Option<String>, current: bool) -> Result<()> {
    let name = match (name, current) {
        (Some(name), false) => name,
        (None, true) => config.str_at("current-context").to_owned(),
        _ => return Err(Error::plain("you must specify a context name or --current")),
    };
    if name.is_empty() {
        return Err(Error::plain("no current context is set"));
    }
    let index = files.iter().position(|(_, f)| find(f, "contexts", &name).is_some());
    let existed = index.is_some();
    let Some((path, file)) = files.get_mut(index.unwrap_or(0)) else { return Err(no_file(context)) };
    let mut entries = file.list_at("contexts").to_vec();
    if !existed {
        entries.push(json!({ "name": name, "context": {} }));
    }
    for entry in entries.iter_mut().filter(|e| e.str_at("name") == name) {
        for (field, value) in [("namespace", &context.args.namespace), ("cluster", &context.args.cluster), ("user", &context.args.user)] {
            if let Some(value) = value {
                entry["context"][field] = json!(value);
            }
        }
    }
    file["contexts"] = entries.into();
    write(path, file)?;
    println!("Context {name:?} {}.", if existed { "modified" } else { "created" });
    Ok(())
}

fn delete_context(mut files: Vec<(PathBuf, Value)>, name: &str) -> Result<()> {
    let found = files.iter_mut().find(|(_, f)| find(f, "contexts", name).is_some());
    let Some((path, file)) = found else { return Err(Error::plain(format!("cannot delete context {name}, not in the kubeconfig"))) };
    let kept: Vec<Value> = file.list_at("contexts").iter().filter(|c| c.str_at("name") != name).cloned().collect();
    file["contexts"] = kept.into();
    if file.str_at("current-context") == name {
        eprintln!("warning: this removed your active context, use \"kubectl config use-context\" to select a different one");
    }
    write(path, file)?;
    println!("deleted context {name} from {}", path.display());
    Ok(())
}

fn rename_context(mut files: Vec<(PathBuf, Value)>, old: &str, new: &str) -> Result<()> {
    if find(&merged(&files), "contexts", new).is_some() {
        return Err(Error::plain(format!("cannot rename the context {old:?}, the context {new:?} already exists")));
    }
    let found = files.iter_mut().find(|(_, f)| find(f, "contexts", old).is_some());
    let Some((path, file)) = found else { return Err(Error::plain(format!("cannot rename the context {old:?}, it's not in the kubeconfig"))) };
    let mut entries = file.list_at("contexts").to_vec();
    entries.iter_mut().filter(|e| e.str_at("name") == old).for_each(|e| e["name"] = new.into());
    file["contexts"] = entries.into();
    if file.str_at("current-context") == old {
        file["current-context"] = new.into();
    }
    write(path, file)?;
    println!("Context {old:?} renamed to {new:?}.");
    Ok(())
}

/// Replaces the file as a whole: a crash in the middle leaves the old one.
fn write(path: &Path, value: &Value) -> Result<()> {
    // A link stays a link: what it leads to is replaced.
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let fail = |e: std::io::Error| Error::plain(format!("write {}: {e}", path.display()));
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&name).map_err(fail)?;
    file.write_all(yaml::print(value).as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
    if let Ok(old) = std::fs::metadata(&path) {
        use std::os::unix::fs::MetadataExt;
        // Under sudo the file stays its owner's.
        std::os::unix::fs::chown(&name, Some(old.uid()), Some(old.gid())).map_err(fail)?;
    }
    std::fs::rename(&name, &path).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_keeps_what_it_had() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config");
        let before = json!({"apiVersion":"v1","kind":"Config","x-mine":1,"current-context":"a",
            "contexts":[{"name":"a","context":{"cluster":"c","x-note":"n"}},{"name":"b","context":{}}]});
        std::fs::write(&path, before.to_string()).expect("written");
        let args = crate::context::GlobalArgs { kubeconfig: Some(path.clone()), namespace: Some("team".into()), ..Default::default() };
        let context = Context::new(args);
        let files = || read_all(&context).expect("reads");
        use_context(&context, files(), "b").expect("is there");
        set_context(&context, files(), &merged(&files()), Some("a".into()), false).expect("is there");
        let mut after = before.clone();
        after["current-context"] = "b".into();
        after["contexts"][0]["context"]["namespace"] = "team".into();
        assert_eq!(files()[0].1, after);
        assert!(use_context(&context, files(), "c").expect_err("none").to_string().contains("no context exists with the name: \"c\""));
    }
}
