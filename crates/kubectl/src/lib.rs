//! The command-line client: `knarr kubectl`, and `kubectl` when the binary is called by that name.
//!
//! It prints what upstream's kubectl prints, word for word and column for column, so that scripts and people
//! need no second program. What is asked of the server goes through [`context::Context`]; one file per verb
//! under [`verbs`]. Everything about printing and merging is pure: values in, text or values out.

pub mod cli;
pub mod context;
pub mod error;
pub mod verbs;

pub mod discovery;
pub mod manifest;
pub mod target;

pub mod jsonpath;
pub mod output;
pub mod table;
pub mod yaml;

pub mod merge;
pub mod pods;
pub mod terminal;
pub mod workload;

pub use cli::main;
