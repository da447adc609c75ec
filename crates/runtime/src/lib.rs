//! Containers: the built-in runtime and the CRI client.
