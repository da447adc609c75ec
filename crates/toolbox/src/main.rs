//! A static test image: servers, clients, eaters of memory and CPU, signal and exit-code games.

fn main() {}
