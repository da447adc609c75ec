//! Scenarios of a user's walk through the workloads, each told by kubectl's own words: what is typed, what is printed,
//! what the cluster does. Everything runs in this process, on simulated nodes, but kubectl: no root, no images.
//!
//! A pod of a simulated node lives as the annotations of its template declare (`ready-delay`, `run-time`, ...); a bad
//! image is one whose pods never start.

mod cluster;

mod deployments;
mod replica_sets;
mod rollouts;

mod daemon_sets;
mod jobs;
mod stateful_sets;

mod limits;
mod namespaces;
