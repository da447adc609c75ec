//! The binary: command line, configuration, wiring of roles.

fn main() {}
