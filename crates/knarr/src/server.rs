//! The server role: store, API server, control loops and scheduler in one process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use knarr_api::schema::Schema;
use knarr_apiserver::api::Api;
use knarr_apiserver::authn::Tokens;
use knarr_apiserver::identity::User;
use knarr_apiserver::proxy::Dialer;
use knarr_apiserver::rbac::Rbac;
use knarr_apiserver::registry::Registry;
use knarr_apiserver::server::InProcess;
use knarr_apiserver::services::Allocator;
use knarr_apiserver::{bootstrap, metrics, server};
use knarr_client::{Client, Clock};
use knarr_store::engine::Disk;
use knarr_store::{Embedded, Options};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::kubeconfig;
use crate::pki::{Authority, Clients, Leaf, Subject};
use crate::settings::Settings;

/// The name the API server shows to kubelets.
pub const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";

/// A running server; clients of this process call it without sockets.
pub struct Server {
    api: Arc<Api>,
    pub authority: Authority,
}

impl Server {
    /// Opens the store, creates what every cluster has, and answers on the port.
    pub async fn start(
        settings: &Settings,
        tasks: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Result<Server> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, settings.port))
            .await
            .with_context(|| format!("port {} is taken; choose another with --port", settings.port))?;
        let (certificates, store) =
            tokio::try_join!(on_thread(settings, Certificates::open), on_thread(settings, open_store))?;
        tracing::debug!("certificates and store are there");
        expire(&store, tasks, shutdown);
        let registry = Arc::new(Registry {
            store: store.clone(),
            schema: Schema::builtin(),
            services: Allocator::load(store.as_ref(), settings.service_ranges()?, settings.node_ports()?),
            quotas: Default::default(),
            health: Default::default(),
            clock: Arc::new(jiff::Timestamp::now),
        });
        let advertised = SocketAddr::new(settings.node_ip, settings.port);
        bootstrap::run(&registry, &[advertised])
            .await
            .map_err(|e| anyhow!("create the first objects: {e}"))?;
        tracing::debug!("the first objects are there");
        let Certificates { authority, tokens, dialing, serving: tls, admin } = certificates;
        let api = Arc::new(Api {
            rbac: Rbac::new(store),
            registry,
            tokens: Arc::new(tokens),
            dialer: Dialer::new(dialing),
            address: advertised.to_string(),
            old_versions: settings.legacy_api,
        });
        let (serve, stop) = (server::serve(api.clone(), listener, tls), shutdown.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = serve => {}
                () = stop.cancelled() => {}
            }
        });
        kubeconfig::write_admin(settings, authority.certificate(), &admin)?;
        Ok(Server { api, authority })
    }

    /// A client of this process with the given identity.
    pub fn client(&self, name: &str, groups: &[&str]) -> Client {
        knarr_client::connect::in_process(InProcess::new(self.api.clone(), User::new(name, groups)))
    }

    /// Starts the control loops, the scheduler, and whoever plays the simulated nodes, if there are any: each under
    /// a name of its own, all on the same caches.
    pub fn start_loops(
        &self,
        settings: &Settings,
        tasks: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Result<()> {
        let config = knarr_controllers::Config {
            root_ca: self.authority.certificate().to_owned(),
            authority: Some(knarr_controllers::Authority {
                certificate: self.authority.certificate().to_owned(),
                key: self.authority.key(),
            }),
            node_ranges: node_ranges(settings),
            ..knarr_controllers::Config::default()
        };
        let client = self.client("system:kube-controller-manager", &[]);
        let context = knarr_controllers::Context::new(client, config, Clock::System);
        let informers = context.informers.clone();
        let health = &self.api.registry.health;
        let (alive, stop) = (health.running("controller-manager"), shutdown.clone());
        tasks.spawn(async move {
            let _alive = alive;
            knarr_controllers::ControllerManager::run_with(context, stop).await;
        });
        let config = scheduler_config(settings)?;
        let client = self.client("system:kube-scheduler", &[]);
        // Extenders are told whole pods, which the loops do not keep.
        let caches = if config.extenders.is_empty() {
            informers.acting_as(client)
        } else {
            knarr_client::Informers::new(client)
        };
        let (alive, stop) = (health.running("scheduler"), shutdown.clone());
        tasks.spawn(async move {
            let _alive = alive;
            knarr_scheduler::Scheduler::run_with(caches, config, stop).await;
        });
        metrics::add_source(knarr_scheduler::metrics::print);
        let client = self.client("system:simulated-nodes", &["system:masters"]);
        let config = knarr_simulated::Config::default();
        tasks.spawn(knarr_simulated::run(client, Clock::System, config, shutdown.clone()));
        Ok(())
    }
}

/// Nodes that bring no range get one beside this node's own; simulated ones have ranges of their own.
fn node_ranges(settings: &Settings) -> knarr_controllers::NodeRanges {
    let list = |text: &str| text.split(',').map(|range| range.trim().to_owned()).collect::<Vec<_>>();
    let mut reserved = list(&settings.service_cidr);
    reserved.push(settings.node_cidr.clone());
    knarr_controllers::NodeRanges {
        cluster: list(&settings.cluster_cidr),
        reserved,
        elsewhere: Some(knarr_simulated::NODE_LABEL.to_owned()),
    }
}

/// What the scheduler is told: the file of the settings, or the default.
pub fn scheduler_config(settings: &Settings) -> Result<knarr_scheduler::Config> {
    let Some(path) = &settings.scheduler_config else { return Ok(knarr_scheduler::Config::default()) };
    // Clients of extenders belong to a runtime, though none of them is used before the scheduler runs.
    let own = match tokio::runtime::Handle::try_current() {
        Ok(_) => None,
        Err(_) => Some(tokio::runtime::Builder::new_current_thread().enable_all().build()?),
    };
    let _inside = own.as_ref().map(|runtime| runtime.enter());
    knarr_scheduler::Config::load(path).with_context(|| format!("read {}", path.display()))
}

/// What the server proves itself with, and knows others by.
struct Certificates {
    authority: Authority,
    tokens: Tokens,
    /// Towards kubelets.
    dialing: Arc<rustls::ClientConfig>,
    serving: Arc<rustls::ServerConfig>,
    admin: Leaf,
}

impl Certificates {
    /// Opens them, making what is missing.
    fn open(settings: &Settings) -> Result<Certificates> {
        let authority = Authority::open(&settings.pki_dir())?;
        let (key, point) = authority.token_key()?;
        let issuer = format!("https://kubernetes.default.svc.{}", settings.domain);
        let tokens = Tokens::new(issuer, key.as_bytes(), &point).map_err(|e| anyhow!("{e}"))?;
        let client = |name| Subject { name, groups: &["system:masters"], names: &[], addresses: &[] };
        let dialing = authority.leaf("apiserver-kubelet-client", &client(KUBELET_CLIENT))?;
        let serving = authority.leaf("apiserver", &serving_names(settings)?.subject())?;
        Ok(Certificates {
            dialing: authority.client_config(&dialing)?,
            serving: authority.server_config(&serving, Clients::Optional, &["h2", "http/1.1"])?,
            admin: authority.leaf("admin", &client("kubernetes-admin"))?,
            tokens,
            authority,
        })
    }
}

/// Runs what waits for the disk where it holds nobody up.
async fn on_thread<T: Send + 'static>(settings: &Settings, work: fn(&Settings) -> Result<T>) -> Result<T> {
    let settings = settings.clone();
    tokio::task::spawn_blocking(move || work(&settings)).await.context("a worker thread failed")?
}

fn open_store(settings: &Settings) -> Result<Arc<Embedded>> {
    let dir = settings.data_dir.join("store");
    std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    Ok(Arc::new(Embedded::open(Disk::open(&dir)?, Options::default())?))
}

/// Lets objects with a time to live end.
fn expire(store: &Arc<Embedded>, tasks: &TaskTracker, shutdown: &CancellationToken) {
    let (store, stop) = (store.clone(), shutdown.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = store.run_expiry() => {}
            () = stop.cancelled() => {}
        }
    });
}

/// All names the API server is called by.
struct ServingNames {
    names: Vec<String>,
    addresses: Vec<IpAddr>,
}

impl ServingNames {
    fn subject(&self) -> Subject<'_> {
        Subject { name: "kube-apiserver", groups: &[], names: &self.names, addresses: &self.addresses }
    }
}

fn serving_names(settings: &Settings) -> Result<ServingNames> {
    let service = "kubernetes.default.svc";
    let mut names: Vec<String> =
        ["localhost", "kubernetes", "kubernetes.default", service].map(str::to_owned).to_vec();
    names.push(format!("{service}.{}", settings.domain));
    if !names.contains(&settings.node_name) {
        names.push(settings.node_name.clone());
    }
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST), settings.service_address(1)?];
    if !addresses.contains(&settings.node_ip) {
        addresses.push(settings.node_ip);
    }
    Ok(ServingNames { names, addresses })
}
