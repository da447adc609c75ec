//! The node agent: what the API wants on this node, made to run, kept running, and told about.
//!
//! Read [`config`], then [`kubelet`] (the whole), then [`pod`] (one worker per pod, the heart). The pure parts
//! below it ([`env`], [`dns`], [`build`], [`resources`], [`fields`], [`admission`]) turn API objects into what the
//! runtime takes; [`volumes`], [`images`], [`probe`] and [`handler`] touch the world. [`server`] answers the API
//! server; [`streaming`] is the wire format of exec, attach and port-forward, for servers and clients.
//!
//! Invariant: only [`knarr_runtime::Runtime`] touches containers, only [`knarr_network::pod::PodNetwork`] networks,
//! and nothing polls: workers wait for events and real deadlines.

pub mod config;
pub mod context;
pub mod kubelet;

pub mod pod;
pub mod probe;

pub mod admission;
pub mod backoff;
pub mod build;
pub mod dns;
pub mod env;
pub mod fields;
pub mod names;
pub mod references;
pub mod resources;

pub mod gc;
pub mod handler;
pub mod images;
pub mod logs;
pub mod node;
pub mod volumes;

pub mod server;
pub mod streaming;

pub use config::KubeletConfig;
pub use kubelet::Kubelet;
