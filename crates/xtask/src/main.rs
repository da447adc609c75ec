//! Chores of the repository: `cargo xtask CHORE`.
//!
//! Light on purpose: what runs before anything else is built must itself build in seconds.

mod images;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Chores of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the images of tests and the sample from Debian packages, as OCI archives.
    ///
    /// Needs apt-get, apt-cache and dpkg-deb, and package lists (apt-get update). What is there already and
    /// unchanged is not built again.
    Images {
        /// Where the archives go, one file each: NAME.tar.
        #[arg(long, default_value = "target/images")]
        out: PathBuf,
        /// Only these: busybox, nginx, nginx-next, redis, toolbox.
        names: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().chore {
        Chore::Images { out, names } => images::build(&out, &names),
    }
}
