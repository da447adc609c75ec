//! What every loop is given.

use knarr_client::leader::Election;
use knarr_client::{Client, Clock, Informers, Recorder, lean};
use std::sync::Arc;
use std::time::Duration;

/// How long a paced loop lets one object rest at most; see [`knarr_client::Controller::paced`].
pub const REST_MAX: Duration = Duration::from_millis(200);

/// Settings of the loops; the defaults are upstream's.
#[derive(Clone, Debug)]
pub struct Config {
    /// PEM bundle that pods trust the API server by; published in every namespace. Empty: nothing is published.
    pub root_ca: String,
    /// Where several processes may run the loops, only the holder of this lease does.
    pub election: Option<Election>,
    /// Who signs certificates for the cluster. None: requests wait for another signer.
    pub authority: Option<crate::Authority>,
    /// Which ranges of pod addresses nodes get.
    pub node_ranges: crate::NodeRanges,
    /// Terminated pods beyond this number are deleted, oldest first. Zero or less: none.
    pub terminated_pod_threshold: i32,
    /// A node without a heartbeat for this long is `Unknown`.
    pub node_grace: Duration,
    /// The same for a node that never reported.
    pub node_startup_grace: Duration,
    /// How fast the pods of nodes that are down have to leave.
    pub eviction_rates: crate::EvictionRates,
    /// How long a pod may sit on a vanished node before pod GC looks for that node and deletes it.
    pub orphan_quarantine: Duration,
    /// A bug on purpose, for the simulator to find: loops do not wait until their cache shows what they did.
    #[doc(hidden)]
    pub planted_forgetfulness: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root_ca: String::new(),
            election: None,
            authority: None,
            node_ranges: crate::NodeRanges::default(),
            terminated_pod_threshold: 12_500,
            node_grace: Duration::from_secs(50),
            node_startup_grace: Duration::from_secs(60),
            eviction_rates: crate::EvictionRates::default(),
            orphan_quarantine: Duration::from_secs(40),
            planted_forgetfulness: false,
        }
    }
}

/// Client, caches, clock and events; clones share everything.
#[derive(Clone)]
pub struct Context {
    pub client: Client,
    pub informers: Informers,
    pub clock: Clock,
    pub recorder: Recorder,
    pub config: Arc<Config>,
}

impl Context {
    pub fn new(client: Client, config: Config, clock: Clock) -> Self {
        Context {
            informers: caches(client.clone()),
            recorder: Recorder::new(client.clone(), clock.clone(), "controller-manager", ""),
            client,
            clock,
            config: Arc::new(config),
        }
    }
}

/// Empty caches for the loops.
pub fn caches(client: Client) -> Informers {
    let informers = Informers::new(client);
    informers.trim(lean::pod);
    informers
}
