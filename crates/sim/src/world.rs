//! The world of one simulation: the disk, the server of the moment, the components and their lives, dice and trace.
//!
//! A component's life ends by making its wire dead: whatever the component still does reaches nobody, as if its process
//! had been killed. The server's life ends the same way; what survives it is the disk.

use crate::disk::Disk;
use crate::history::History;
use crate::trace::Trace;
use crate::wire::{self, Life, Wire};
use futures::future::BoxFuture;
use knarr_apiserver::api::Api as Server;
use knarr_apiserver::authn::Tokens;
use knarr_apiserver::identity::{MASTERS, User};
use knarr_apiserver::proxy::Dialer;
use knarr_apiserver::rbac::Rbac;
use knarr_apiserver::registry::Registry;
use knarr_apiserver::services::Allocator;
use knarr_client::{Client, Clock, connect};
use knarr_store::engine::Record;
use knarr_store::{Embedded, Options, Range, Store};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How often what goes wrong. All are chances of one request, event or write.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// A request does not arrive, arrives and is answered by an error, or its answer is lost.
    pub request_lost: f64,
    pub request_refused: f64,
    pub answer_lost: f64,
    /// A request or answer takes up to half a second; up to ten seconds.
    pub slow: f64,
    pub very_slow: f64,
    /// A watch ends, an event of it is late (and all after it), or comes twice.
    pub watch_cut: f64,
    pub event_late: f64,
    pub event_twice: f64,
    /// The disk refuses a write; the server dies at it.
    pub disk_error: f64,
    pub disk_death: f64,
}

impl Rates {
    /// Some runs are calm, some are stormy, each in its own way.
    pub fn draw(dice: &mut SmallRng) -> Rates {
        let mut rate =
            |most: f64| if dice.random_bool(0.3) { 0.0 } else { most * dice.random::<f64>().powi(2) };
        Rates {
            request_lost: rate(0.05),
            request_refused: rate(0.05),
            answer_lost: rate(0.05),
            slow: rate(0.2),
            very_slow: rate(0.02),
            watch_cut: rate(0.02),
            event_late: rate(0.05),
            event_twice: rate(0.05),
            disk_error: rate(0.01),
            disk_death: rate(0.002),
        }
    }
}

/// A bug planted on purpose: the simulation must find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// The disk acknowledges a write and loses it when the power is cut.
    LostWrite,
    /// A watch drops an event.
    DroppedEvent,
    /// Control loops do not wait until their cache shows what they created.
    ForgottenExpectations,
}

impl Canary {
    pub const ALL: [(&str, Canary); 3] = [
        ("lost-write", Canary::LostWrite),
        ("dropped-event", Canary::DroppedEvent),
        ("forgotten-expectations", Canary::ForgottenExpectations),
    ];
}

/// What everybody shares.
pub struct World {
    pub trace: Trace,
    pub history: Mutex<History>,
    pub dice: Mutex<SmallRng>,
    pub disk: Disk,
    pub canary: Option<Canary>,
    rates: Mutex<Rates>,
    server: Mutex<Option<Running>>,
    server_changed: Notify,
    tokens: Mutex<Option<(String, Vec<u8>)>>,
}

/// One life of the server.
#[derive(Clone)]
pub struct Running {
    pub server: Arc<Server>,
    /// Cancelled when it dies.
    pub dead: CancellationToken,
}

impl World {
    pub fn new(seed: u64, print: bool, canary: Option<Canary>) -> Arc<World> {
        let mut dice = SmallRng::seed_from_u64(seed);
        let rates = Rates::draw(&mut dice);
        Arc::new(World {
            trace: Trace::new(print),
            history: Mutex::new(History::default()),
            dice: Mutex::new(dice),
            disk: Disk::default(),
            canary,
            rates: Mutex::new(rates),
            server: Mutex::new(None),
            server_changed: Notify::new(),
            tokens: Mutex::new(None),
        })
    }

    pub fn rates(&self) -> Rates {
        *self.rates.lock()
    }

    pub fn set_rates(&self, rates: Rates) {
        *self.rates.lock() = rates;
    }

    /// The server, if it is up.
    pub fn server(&self) -> Option<Running> {
        self.server.lock().clone()
    }

    /// A record became durable.
    pub fn recorded(&self, record: &Record) {
        let actor = wire::actor();
        let found = self.history.lock().record(record, &actor, &self.trace);
        found.into_iter().for_each(|violation| self.trace.violation(violation));
    }

    /// The server's process is gone, from one instruction to the next.
    pub fn server_died(&self) {
        let running = self.server.lock().take();
        if let Some(running) = running {
            running.dead.cancel();
            let undo = self.dice.lock().random_bool(0.5);
            self.disk.cut(undo);
            if self.canary == Some(Canary::LostWrite) {
                self.disk.lose_newest();
            }
            self.trace.line("server", "died");
            self.server_changed.notify_waiters();
        }
    }

    /// Runs the server; after each death again, after a while.
    pub async fn keep_server(self: Arc<Self>) {
        loop {
            match self.start_server().await {
                Ok(running) => running.dead.cancelled().await,
                Err(error) => self.trace.line("server", &format!("does not start: {error}")),
            }
            let pause = self.dice.lock().random_range(100..10_000);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn start_server(self: &Arc<Self>) -> Result<Running, String> {
        let store =
            Embedded::open_inline(self.disk.engine(self), Options::default()).map_err(|e| e.to_string())?;
        let store = Arc::new(store);
        let found = self.history.lock().check_loaded(&store);
        found.into_iter().for_each(|violation| self.trace.violation(violation));
        let server = self.build(store.clone())?;
        let running = Running { server: server.clone(), dead: CancellationToken::new() };
        // Known before the first write, so that a death at it is noticed.
        *self.server.lock() = Some(running.clone());
        let address = "10.0.0.1:6443".parse().map_err(|e| format!("{e}"))?;
        let booted = knarr_apiserver::bootstrap::run(&server.registry, &[address]).await;
        if let Err(status) = booted {
            self.server_died();
            return Err(format!("first objects: {status}"));
        }
        let dead = running.dead.clone();
        tokio::spawn(async move { dead.run_until_cancelled(store.run_expiry()).await });
        self.trace.line("server", "answers");
        self.server_changed.notify_waiters();
        Ok(running)
    }

    fn build(&self, store: Arc<Embedded>) -> Result<Arc<Server>, String> {
        let (pem, point) = self.token_key()?;
        let tokens = Tokens::new("https://kubernetes.default.svc", pem.as_bytes(), &point)
            .map_err(|e| format!("{e:?}"))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let range = "10.96.0.0/16".parse().map_err(|e: String| e)?;
        let registry = Registry {
            services: Allocator::load(store.as_ref(), range, 30_000..=32_767),
            schema: knarr_api::schema::Schema::builtin(),
            quotas: Default::default(),
            health: Default::default(),
            clock: Arc::new(jiff::Timestamp::now),
            store: store.clone(),
        };
        Ok(Arc::new(Server {
            rbac: Rbac::new(store),
            registry: Arc::new(registry),
            tokens: Arc::new(tokens),
            dialer: Dialer::new(Arc::new(tls)),
            address: "10.0.0.1:6443".to_owned(),
            old_versions: true,
        }))
    }

    fn token_key(&self) -> Result<(String, Vec<u8>), String> {
        let mut known = self.tokens.lock();
        if known.is_none() {
            let key = rcgen::KeyPair::generate().map_err(|e| e.to_string())?;
            *known = Some((key.serialize_pem(), key.public_key_raw().to_vec()));
        }
        known.clone().ok_or_else(|| "no key".to_owned())
    }

    /// Waits until the server answers.
    pub async fn wait_for_server(&self) {
        loop {
            let changed = self.server_changed.notified();
            if self.server().is_some() {
                return;
            }
            changed.await;
        }
    }

    /// A client over a wire of its own.
    pub fn client(self: &Arc<Self>, life: Arc<Life>) -> Client {
        connect::in_process(Wire::new(self.clone(), life))
    }
}

/// Something that runs beside the server and can be killed.
pub struct Component {
    pub name: &'static str,
    user: User,
    start: fn(Arc<World>, Client, CancellationToken) -> BoxFuture<'static, ()>,
    life: Mutex<Option<Arc<Life>>>,
}

impl Component {
    /// Control loops, scheduler, simulated nodes.
    pub fn all() -> Vec<Arc<Component>> {
        let one = |name, user: User, start| Arc::new(Component { name, user, start, life: Mutex::new(None) });
        let authenticated = |name: &str| User::new(name, &["system:authenticated"]);
        vec![
            one("controllers", authenticated("system:kube-controller-manager"), run_controllers),
            one("scheduler", authenticated("system:kube-scheduler"), run_scheduler),
            one("nodes", User::new("system:simulated-nodes", &[MASTERS]), run_nodes),
        ]
    }

    /// Runs it; after each death again, after a while.
    pub async fn keep(self: Arc<Self>, world: Arc<World>) {
        for number in 1.. {
            let life = Life::new(self.name, number, self.user.clone());
            *self.life.lock() = Some(life.clone());
            world.trace.line(&life.name, "starts");
            let stop = CancellationToken::new();
            let running = tokio::spawn((self.start)(world.clone(), world.client(life.clone()), stop.clone()));
            life.dead.cancelled().await;
            world.trace.line(&life.name, "died");
            stop.cancel();
            running.abort();
            let pause = world.dice.lock().random_range(10..15_000);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Kills it at one of its next writes: before it is sent, or before its answer arrives.
    pub fn kill_soon(&self, dice: &mut SmallRng) {
        if let Some(life) = &*self.life.lock() {
            life.die_at_write(dice.random_range(0..20), dice.random_bool(0.5));
        }
    }

    /// Nobody kills it any more.
    pub fn spare(&self) {
        if let Some(life) = &*self.life.lock() {
            life.live_on();
        }
    }
}

fn run_controllers(world: Arc<World>, client: Client, stop: CancellationToken) -> BoxFuture<'static, ()> {
    let config = knarr_controllers::Config {
        root_ca: "PEM".to_owned(),
        planted_forgetfulness: world.canary == Some(Canary::ForgottenExpectations),
        ..Default::default()
    };
    let context = knarr_controllers::Context::new(client, config, Clock::System);
    Box::pin(knarr_controllers::ControllerManager::run_with(context, stop))
}

fn run_scheduler(_: Arc<World>, client: Client, stop: CancellationToken) -> BoxFuture<'static, ()> {
    Box::pin(knarr_scheduler::Scheduler::run_default(client, stop))
}

fn run_nodes(_: Arc<World>, client: Client, stop: CancellationToken) -> BoxFuture<'static, ()> {
    knarr_simulated::run(client, Clock::System, knarr_simulated::Config::default(), stop)
}

/// All entries of a store, by partition and key; for comparing it with the history.
pub fn entries_of(store: &Embedded, partitions: &[String]) -> Vec<(String, String, u64)> {
    let mut all = Vec::new();
    for partition in partitions {
        let listing = store.list(partition, &Range::default());
        for entry in listing.map(|listing| listing.entries).unwrap_or_default() {
            all.push((partition.clone(), entry.key.to_string(), entry.revision));
        }
    }
    all
}
