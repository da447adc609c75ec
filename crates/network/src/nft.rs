//! The firewall: scripts in, atomic transactions out.
//!
//! A script is what `nft -f` reads; it is applied whole or not at all. What the rules say is the business
//! of [`crate::builtin`] (table `knarr_pods`) and [`crate::proxy`] (table `knarr`).

use std::process::Stdio;

use async_trait::async_trait;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::{NetworkError, Result};

/// How much of an error of `nft` is kept; it quotes the whole offending line, which can be megabytes.
const ERROR_LEN_MAX: usize = 600;

/// The rim to the kernel's packet filter.
#[async_trait]
pub trait Firewall: Send + Sync {
    /// Applies a script as one transaction in the network namespace of this process.
    async fn apply(&self, script: &str) -> Result<()>;

    /// Runs `nft -j ARGS` and returns its JSON.
    async fn query(&self, args: &[&str]) -> Result<serde_json::Value>;
}

/// The real one, by the `nft` program.
#[derive(Clone, Copy, Debug, Default)]
pub struct NftProgram;

#[async_trait]
impl Firewall for NftProgram {
    async fn apply(&self, script: &str) -> Result<()> {
        let step = "apply rules";
        let mut child = nft(&["-f", "-"]).stdin(Stdio::piped()).spawn().map_err(|e| not_run(step, e))?;
        let mut stdin = child.stdin.take().expect("stdin was asked to be a pipe");
        // Reading what nft says while it is still being fed keeps two full pipes from waiting for each other.
        let (fed, output) = tokio::join!(
            async move {
                let fed = stdin.write_all(script.as_bytes()).await;
                drop(stdin);
                fed
            },
            child.wait_with_output()
        );
        let output = output.map_err(|e| not_run(step, e))?;
        if output.status.success() {
            return fed.map_err(|e| not_run(step, e));
        }
        Err(NetworkError::Nftables { step, reason: shorten(&output.stderr) })
    }

    async fn query(&self, args: &[&str]) -> Result<serde_json::Value> {
        let step = "list rules";
        let output = nft(&["-j"]).args(args).output().await.map_err(|e| not_run(step, e))?;
        if !output.status.success() {
            return Err(NetworkError::Nftables { step, reason: shorten(&output.stderr) });
        }
        serde_json::from_slice(&output.stdout)
            .map_err(|error| NetworkError::Nftables { step, reason: error.to_string() })
    }
}

/// Whether the `inet` table exists.
pub async fn table_exists(firewall: &dyn Firewall, name: &str) -> Result<bool> {
    let listing = firewall.query(&["list", "tables"]).await?;
    let tables = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(tables.iter().any(|entry| entry["table"]["family"] == "inet" && entry["table"]["name"] == name))
}

/// A script that removes the table whether it exists or not (`destroy` needs a newer nft than Debian 12's).
pub fn remove_table(name: &str) -> String {
    format!("add table inet {name}\ndelete table inet {name}\n")
}

fn nft(args: &[&str]) -> Command {
    let mut command = Command::new("nft");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // systemd units and sudo may leave the system directories out.
    if let Some(path) = std::env::var_os("PATH") {
        let mut dirs: Vec<_> = std::env::split_paths(&path).collect();
        dirs.extend(["/usr/sbin".into(), "/sbin".into()]);
        if let Ok(path) = std::env::join_paths(dirs) {
            command.env("PATH", path);
        }
    }
    command
}

fn not_run(step: &'static str, error: std::io::Error) -> NetworkError {
    let advice = match error.kind() {
        std::io::ErrorKind::NotFound => "; install the package nftables",
        _ => "",
    };
    NetworkError::Nftables { step, reason: format!("cannot run nft: {error}{advice}") }
}

fn shorten(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let text = text.trim();
    match text.char_indices().nth(ERROR_LEN_MAX) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
pub mod testing {
    //! A firewall that only takes notes.

    use parking_lot::Mutex;

    use super::*;

    /// Remembers every script; answers every query with nothing.
    #[derive(Default)]
    pub struct Recorder {
        pub scripts: Mutex<Vec<String>>,
    }

    #[async_trait]
    impl Firewall for Recorder {
        async fn apply(&self, script: &str) -> Result<()> {
            self.scripts.lock().push(script.to_owned());
            Ok(())
        }

        async fn query(&self, _: &[&str]) -> Result<serde_json::Value> {
            Ok(serde_json::json!({ "nftables": [] }))
        }
    }
}
