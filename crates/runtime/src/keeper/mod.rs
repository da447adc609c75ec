//! The keeper: one small process per node that is parent of every container. It forks them, holds their output
//! pipes and terminals, writes their logs and learns their exit codes, so that the server may be killed,
//! restarted or upgraded while containers run on.
//!
//! It is the same binary, re-executed: `main.rs` calls [`main`] when the first argument is [`ARGUMENT`].
//! Reading order: [`protocol`] (what is said over the socket), `server` (the event loop), `create` (the forked
//! child that builds a container), `log` (the CRI log format), [`client`] (the server's end).
//!
//! Invariant: the keeper knows nothing of images, pods or the API. Whatever must outlive it is in the container's
//! directory: its log's path, its named pipes, its exit record.

pub mod client;
mod create;
pub mod log;
mod pod_init;
pub mod protocol;
mod server;
mod socket;

pub(crate) use create::{staged_path, view_path};
pub(crate) use server::start_ticks;

/// The hidden first argument that makes the binary a keeper.
pub const ARGUMENT: &str = "keeper";

/// Runs a keeper until it is told to exit. `args` are the arguments after [`ARGUMENT`]. Returns an exit code.
/// Must be called before any thread is started: the keeper forks without exec.
pub fn main(args: impl IntoIterator<Item = String>) -> i32 {
    server::main(args.into_iter().collect())
}
