//! `version`: ours and the server's.

use knarr_api::object::Object;
use serde_json::{Value, json};

use crate::context::Context;
use crate::error::{Error, Result};

/// The API level whose kubectl this is.
const API_LEVEL: &str = "v1.36.0";

#[derive(clap::Args)]
pub struct Args {
    /// If true, shows client version only (no server required).
    #[arg(long)]
    client: bool,
    #[arg(short, long, value_parser = ["yaml", "json"])]
    output: Option<String>,
}

pub async fn run(context: &Context, args: Args) -> Result<()> {
    let ours = format!("{API_LEVEL}+knarr-{}", env!("CARGO_PKG_VERSION"));
    let server = if args.client { Ok(Value::Null) } else { context.get("/version").await };
    let known = server.as_ref().ok().filter(|s| !s.is_null());
    if let Some(format) = &args.output {
        let mut all = json!({ "clientVersion": { "major": "1", "minor": "36", "gitVersion": ours, "platform": platform() } });
        if let Some(server) = known {
            all["serverVersion"] = server.clone();
        }
        print!("{}", if format == "json" { crate::output::json_text(&all) } else { crate::yaml::print(&all) });
    } else {
        println!("Client Version: {ours}");
        if let Some(server) = known {
            println!("Server Version: {}", server.str_at("gitVersion"));
        }
    }
    server.map(|_| ()).map_err(|e: Error| e)
}

fn platform() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("{}/{arch}", std::env::consts::OS)
}
