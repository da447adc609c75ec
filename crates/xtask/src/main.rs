//! Chores of the repository: image building, table generation, checks.

fn main() {}
