//! The API server: authentication, authorization, admission, registry, watch cache, discovery, proxies.
//!
//! Invariants: only this crate opens the store; the registry knows no kind by name beyond what its rules
//! and tables say; a request that is refused has changed nothing.
//!
//! A request goes: [`server`] → [`api`] (who, what, may they) → [`registry`] (rules, defaults, admission,
//! ownership) → store → [`respond`]. Watches go [`watch`] → the store's history.

pub mod api;
pub mod server;

pub mod authn;
pub mod identity;
pub mod node;
pub mod rbac;
pub mod request;

pub mod admission;
pub mod classes;
pub mod encode;
pub mod escalation;
pub mod limit_range;
pub mod pod_security;
pub mod quota;
pub mod registry;
pub mod reviews;
pub mod services;
pub mod signing;
pub mod subresources;

pub mod compress;
pub mod discovery;
pub mod openapi;
pub mod proxy;
pub mod respond;
pub mod watch;
pub mod wire;

pub mod health;
pub mod metrics;

pub mod bootstrap;
mod flow_objects;

/// The API level served.
pub const VERSION: &str = "v1.36.0";
