//! `edit`: an object in the user's editor, and back as a patch.

use std::io::Write;
use std::process::Command;

use http::Method;
use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::{Ask, Context, MERGE_PATCH, STRATEGIC_PATCH};
use crate::error::{Error, Result};
use crate::merge;
use crate::output::strip_managed_fields;
use crate::target::{self, Found};
use crate::yaml;

const HEAD: &str = "# Please edit the object below. Lines beginning with a '#' will be ignored,\n\
    # and an empty file will abort the edit. If an error occurs while saving this file will be\n\
    # reopened with the relevant failures.\n#\n";

#[derive(clap::Args)]
pub struct Args {
    words: Vec<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    for found in target::fetch(context, &args.words, None, None, false).await? {
        edit(context, &found).await?;
    }
    Ok(())
}

async fn edit(context: &Context, found: &Found) -> Result<()> {
    let mut before = found.object.clone();
    strip_managed_fields(&mut before);
    let mut text = yaml::print(&before);
    let mut complaint = String::new();
    loop {
        let edited = in_editor(&format!("{HEAD}{complaint}{text}"))?;
        let kept: String = edited.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{l}\n")).collect();
        // The same text twice, after a complaint or at first, ends the edit.
        if kept.trim().is_empty() || kept == text {
            println!("Edit cancelled, no changes made.");
            return if complaint.is_empty() { Ok(()) } else { Err(Error::Exit(1)) };
        }
        match send(context, found, &before, &kept).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                complaint = error.to_string().lines().map(|l| format!("# {l}\n")).collect::<String>() + "#\n";
                text = kept;
            }
        }
    }
}

async fn send(context: &Context, found: &Found, before: &Value, text: &str) -> Result<()> {
    let after: Value = serde_yaml_ng::from_str(text).map_err(|e| Error::plain(format!("The edited file had a syntax error: {e}")))?;
    let type_id = merge::type_of(before.str_at("apiVersion"), before.str_at("kind"));
    let patch = merge::three_way(type_id, before, &after, before);
    if patch == json!({}) {
        println!("{} skipped", found.named());
        return Ok(());
    }
    let kind = if type_id.is_some() { STRATEGIC_PATCH } else { MERGE_PATCH };
    let ask = Ask::patch(kind, &patch).with("fieldManager", "kubectl-edit").with("fieldValidation", "Strict");
    context.json(Method::PATCH, &found.path(), ask).await?;
    println!("{} edited", found.named());
    Ok(())
}

fn in_editor(text: &str) -> Result<String> {
    let editor = ["KUBE_EDITOR", "EDITOR"].into_iter().find_map(|v| std::env::var(v).ok().filter(|e| !e.is_empty()));
    let editor = editor.unwrap_or_else(|| "vi".into());
    let path = std::env::temp_dir().join(format!("kubectl-edit-{}.yaml", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create(true).truncate(true), 0o600);
    options.open(&path)?.write_all(text.as_bytes())?;
    let status = Command::new("sh").arg("-c").arg(format!("{editor} \"$0\"")).arg(&path).status();
    let edited = std::fs::read_to_string(&path);
    // A copy left behind would only be litter.
    let _ = std::fs::remove_file(&path);
    let status = status.map_err(|e| Error::plain(format!("unable to launch the editor {editor:?}: {e}; set KUBE_EDITOR")))?;
    if !status.success() {
        return Err(Error::plain(format!("there was a problem with the editor {editor:?}; set KUBE_EDITOR to another")));
    }
    Ok(edited?)
}
