//! Leader election by Lease: of several candidates one leads, and stops in time when it can no longer renew. The
//! rules are client-go's `leaderelection`: a lease counts as expired by the *local* time since it was last seen to
//! change, so clocks need not agree.

use crate::{Clock, During, Error, EventType, Recorder, Result, or_none};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Client;
use kube::api::{Api, PostParams};
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Who wants to lead what, and how fast.
#[derive(Clone, Debug)]
pub struct Election {
    pub namespace: String,
    pub name: String,
    /// Unique for this process; see [`identity`].
    pub identity: String,
    /// After this time without renewal another may take the lease.
    pub lease: Duration,
    /// A leader that could not renew for this long stops leading. Shorter than `lease`.
    pub renew_deadline: Duration,
    /// Time between tries.
    pub retry: Duration,
}

impl Election {
    /// Upstream's times: 15, 10 and 2 seconds.
    pub fn new(namespace: &str, name: &str, identity: &str) -> Self {
        Election {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            identity: identity.to_owned(),
            lease: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// A name for this process as a candidate: the host's and something random.
pub fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{:016x}", host.trim(), rand::random::<u64>())
}

/// Where a candidate stands.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// The lease was never seen.
    Starting,
    /// Someone holds the lease; its record was last seen to change at `since`.
    Following { record: Record, since: Instant },
    /// We hold it; the last renewal succeeded at `renewed`.
    Leading { renewed: Instant },
    /// We held it and failed to renew in time. Final: the process must stop what it did as leader.
    Lost,
}

/// The parts of a Lease that show whether its holder is alive.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Record {
    pub holder: String,
    pub renewed: Option<Timestamp>,
    pub transitions: i32,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Write the lease with us as holder; `transitions` counts up when the holder changes.
    Take {
        transitions: i32,
        renewal: bool,
    },
    Wait,
    Stop,
}

/// What a look at the lease brought: the record, no lease at all, or no answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    Record(Record),
    Absent,
    Unreachable,
}

/// One step of the election, without I/O.
pub fn step(election: &Election, state: State, seen: Seen, now: Instant) -> (State, Action) {
    if let State::Leading { renewed } = state {
        if now.duration_since(renewed) >= election.renew_deadline {
            return (State::Lost, Action::Stop);
        }
        if seen == Seen::Unreachable {
            return (state, Action::Wait);
        }
    }
    match (state, seen) {
        (State::Lost, _) => (State::Lost, Action::Stop),
        (state, Seen::Unreachable) => (state, Action::Wait),
        (state, Seen::Absent) => (state, Action::Take { transitions: 0, renewal: false }),
        (state, Seen::Record(record)) if record.holder == election.identity => {
            (state, Action::Take { transitions: record.transitions, renewal: true })
        }
        (State::Leading { .. }, Seen::Record(_)) => (State::Lost, Action::Stop),
        (_, Seen::Record(record)) if record.holder.is_empty() => {
            let transitions = record.transitions + 1;
            (State::Following { record, since: now }, Action::Take { transitions, renewal: false })
        }
        (State::Following { record: known, since }, Seen::Record(record)) if known == record => {
            let expired = now.duration_since(since) >= election.lease;
            let transitions = record.transitions + 1;
            let action = if expired { Action::Take { transitions, renewal: false } } else { Action::Wait };
            (State::Following { record, since }, action)
        }
        (_, Seen::Record(record)) => (State::Following { record, since: now }, Action::Wait),
    }
}

/// Waits until we lead, then runs `lead` and keeps renewing beside it. Returns when `lead` ends or `shutdown` comes (the
/// lease is given back) or, with an error, when leadership is lost: `lead` is dropped then, and the caller has to end what
/// it started elsewhere before it stands again.
pub async fn run<F: Future<Output = ()>>(
    client: Client,
    clock: Clock,
    election: Election,
    shutdown: CancellationToken,
    lead: impl FnOnce() -> F,
) -> Result<()> {
    let recorder = Recorder::new(client.clone(), clock.clone(), &election.name, "");
    let mut candidate = Candidate::new(client, clock, election);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = candidate.turn() => {}
        }
        if matches!(candidate.state, State::Leading { .. }) {
            break;
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(candidate.election.retry) => {}
        }
    }
    candidate.tell(&recorder, "became leader");
    let leading = lead();
    tokio::pin!(leading);
    // Renewing goes on while `lead` works, and `lead` works while renewing waits for an answer.
    let lost = tokio::select! {
        () = &mut leading => false,
        () = shutdown.cancelled() => false,
        () = candidate.keep() => true,
    };
    if lost {
        candidate.tell(&recorder, "stopped leading");
        let name = &candidate.election.name;
        return Err(Error::terminal(format!("renew lease {name}"), "leadership was lost"));
    }
    candidate.give_back().await;
    Ok(())
}

struct Candidate {
    api: Api<Lease>,
    clock: Clock,
    election: Election,
    state: State,
}

impl Candidate {
    fn new(client: Client, clock: Clock, election: Election) -> Self {
        let api = Api::namespaced(client, &election.namespace);
        Candidate { api, clock, election, state: State::Starting }
    }

    /// Renews until that fails for too long.
    async fn keep(&mut self) {
        while self.state != State::Lost {
            tokio::time::sleep(self.election.retry).await;
            self.turn().await;
        }
    }

    /// One look at the lease and what follows from it. A leader takes no longer for it than it may lead without.
    async fn turn(&mut self) {
        let patience = self.election.renew_deadline;
        let until = match self.state {
            State::Leading { renewed } => renewed + patience,
            _ => Instant::now() + patience,
        };
        if tokio::time::timeout_at(until, self.look()).await.is_err()
            && matches!(self.state, State::Leading { .. })
        {
            self.state = State::Lost;
        }
    }

    async fn look(&mut self) {
        let lease = self.api.get_opt(&self.election.name).await;
        let (seen, lease) = match lease {
            Ok(Some(lease)) => (Seen::Record(record(&lease)), Some(lease)),
            Ok(None) => (Seen::Absent, None),
            Err(error) => {
                tracing::debug!(lease = self.election.name, %error, "lease not readable");
                (Seen::Unreachable, None)
            }
        };
        // Others count from when they see what we write, so we count from before we write it.
        let now = Instant::now();
        let (state, action) = step(&self.election, self.state.clone(), seen, now);
        self.state = state;
        if let Action::Take { transitions, renewal } = action {
            match self.write(lease, transitions, renewal).await {
                Ok(()) => self.state = State::Leading { renewed: now },
                Err(error) => tracing::debug!(lease = self.election.name, %error, "lease not taken"),
            }
        }
    }

    fn tell(&self, recorder: &Recorder, what: &str) {
        let Election { namespace, name, identity, .. } = &self.election;
        tracing::info!(lease = name, identity, what, "leadership changed");
        let about = ObjectReference {
            api_version: Some("coordination.k8s.io/v1".to_owned()),
            kind: Some("Lease".to_owned()),
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            ..Default::default()
        };
        recorder.event_about(about, EventType::Normal, "LeaderElection", format!("{identity} {what}"));
    }

    async fn write(&self, lease: Option<Lease>, transitions: i32, renewal: bool) -> Result<()> {
        let now = self.clock.micro_time();
        let acquired = lease.as_ref().and_then(|lease| lease.spec.as_ref()?.acquire_time.clone());
        let spec = LeaseSpec {
            holder_identity: Some(self.election.identity.clone()),
            lease_duration_seconds: Some(self.election.lease.as_secs() as i32),
            acquire_time: acquired.filter(|_| renewal).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..Default::default()
        };
        let name = &self.election.name;
        let params = PostParams::default();
        match lease {
            Some(lease) => {
                let lease = Lease { spec: Some(spec), ..lease };
                self.api.replace(name, &params, &lease).await.during(|| format!("renew lease {name}"))?
            }
            None => {
                let metadata = ObjectMeta { name: Some(name.clone()), ..Default::default() };
                let lease = Lease { metadata, spec: Some(spec) };
                self.api.create(&params, &lease).await.during(|| format!("create lease {name}"))?
            }
        };
        Ok(())
    }

    /// Empties the holder, so that another need not wait for the lease to expire.
    async fn give_back(&self) {
        let name = &self.election.name;
        let lease = or_none(self.api.get(name).await.during(|| format!("read lease {name}")));
        let Ok(Some(mut lease)) = lease else { return };
        if record(&lease).holder != self.election.identity {
            return;
        }
        if let Some(spec) = lease.spec.as_mut() {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(self.clock.now()));
        }
        if let Err(error) = self.api.replace(name, &PostParams::default(), &lease).await {
            tracing::debug!(lease = name, %error, "lease not given back");
        }
    }
}

fn record(lease: &Lease) -> Record {
    let Some(spec) = &lease.spec else { return Record::default() };
    Record {
        holder: spec.holder_identity.clone().unwrap_or_default(),
        renewed: spec.renew_time.as_ref().map(|time| time.0),
        transitions: spec.lease_transitions.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeApi;

    fn held(by: &str, renewed_s: i64) -> Seen {
        let renewed = Some(Timestamp::from_second(renewed_s).unwrap());
        Seen::Record(Record { holder: by.into(), renewed, transitions: 3 })
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_takes_the_lease_only_when_it_did_not_change_for_its_duration() {
        let election = Election::new("ns", "lease", "me");
        let start = Instant::now();
        let (state, action) = step(&election, State::Starting, held("other", 1), start);
        assert_eq!(action, Action::Wait);
        let later = start + Duration::from_secs(14);
        let (state, action) = step(&election, state, held("other", 2), later);
        assert_eq!(action, Action::Wait, "the holder renewed");
        let (state, action) = step(&election, state, held("other", 2), later + Duration::from_secs(14));
        assert_eq!(action, Action::Wait);
        let (_, action) = step(&election, state, held("other", 2), later + Duration::from_secs(15));
        assert_eq!(action, Action::Take { transitions: 4, renewal: false });
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_cannot_renew_stops_before_another_may_start() {
        let election = Election::new("ns", "lease", "me");
        let renewed = Instant::now();
        let leading = State::Leading { renewed };
        let (state, action) = step(&election, leading, Seen::Unreachable, renewed + Duration::from_secs(9));
        assert_eq!(action, Action::Wait);
        let (state, action) = step(&election, state, Seen::Unreachable, renewed + Duration::from_secs(10));
        assert_eq!((state, action), (State::Lost, Action::Stop));
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_candidate_leads_when_the_first_gives_the_lease_back() {
        let api = FakeApi::new();
        let first_stop = CancellationToken::new();
        let (client, stop) = (api.client(), first_stop.clone());
        let first = tokio::spawn(async move {
            let election = Election::new("default", "loops", "first");
            run(client, Clock::System, election, stop, std::future::pending).await
        });
        api.wait_for::<Lease>("the first leader", |leases| leases.len() == 1).await;
        let client = api.client();
        let second = tokio::spawn(async move {
            let election = Election::new("default", "loops", "second");
            run(client, Clock::System, election, CancellationToken::new(), || async {}).await
        });
        first_stop.cancel();
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_leader_does_ends_when_another_takes_the_lease() {
        let api = FakeApi::new();
        let client = api.client();
        let first = tokio::spawn(async move {
            let election = Election::new("default", "loops", "first");
            run(client, Clock::System, election, CancellationToken::new(), std::future::pending).await
        });
        api.wait_for::<Lease>("the first leader", |leases| leases.len() == 1).await;
        let leases: Api<Lease> = Api::namespaced(api.client(), "default");
        let stolen = serde_json::json!({"spec": {"holderIdentity": "thief"}});
        leases.patch("loops", &Default::default(), &kube::api::Patch::Merge(stolen)).await.unwrap();
        let began = Instant::now();
        assert!(first.await.unwrap().is_err(), "leadership is lost");
        assert!(began.elapsed() <= Duration::from_secs(3));
        let told = |events: &[k8s_openapi::api::core::v1::Event]| {
            ["first became leader", "first stopped leading"]
                .iter()
                .all(|message| events.iter().any(|event| event.message.as_deref() == Some(message)))
        };
        api.wait_for("both events", told).await;
    }
}
