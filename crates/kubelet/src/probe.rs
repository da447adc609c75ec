//! Probes: one task per probe of a running container, and no timer otherwise. Thresholds and messages are
//! upstream's (`pkg/kubelet/prober`).

use crate::handler::{self, Outcome, Target};
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, Probe};
use knarr_client::{EventType, Recorder};
use knarr_runtime::Runtime;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

impl ProbeKind {
    fn as_str(self) -> &'static str {
        match self {
            ProbeKind::Startup => "Startup",
            ProbeKind::Liveness => "Liveness",
            ProbeKind::Readiness => "Readiness",
        }
    }

    pub fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            ProbeKind::Startup => container.startup_probe.as_ref(),
            ProbeKind::Liveness => container.liveness_probe.as_ref(),
            ProbeKind::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// What probes have found so far, by container id. No entry: not decided yet.
pub type Results = Arc<Mutex<HashMap<(String, ProbeKind), bool>>>;

/// A running container that may be probed.
pub struct Probed<'a> {
    pub container: &'a Container,
    pub id: &'a str,
    /// When it started, on tokio's clock.
    pub started_at: Instant,
}

/// The probes of one pod. Dropping it ends them.
pub struct Probers {
    runtime: Arc<dyn Runtime>,
    recorder: Recorder,
    wake: Arc<Notify>,
    pub results: Results,
    tasks: BTreeMap<(String, ProbeKind), JoinHandle<()>>,
}

impl Drop for Probers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Probers {
    pub fn new(runtime: Arc<dyn Runtime>, recorder: Recorder, wake: Arc<Notify>) -> Self {
        Probers { runtime, recorder, wake, results: Results::default(), tasks: BTreeMap::new() }
    }

    /// Ends all probes; results stay.
    pub fn stop(&mut self) {
        for task in std::mem::take(&mut self.tasks).into_values() {
            task.abort();
        }
    }

    /// Probes exactly what runs: until a container has started only its startup probe, afterwards the others.
    pub fn update(&mut self, pod: &Arc<Pod>, pod_ip: &str, running: &[Probed<'_>]) {
        let mut wanted = BTreeMap::new();
        for probed in running {
            let started = self.started(probed.container, probed.id);
            let kinds: &[ProbeKind] =
                if started { &[ProbeKind::Liveness, ProbeKind::Readiness] } else { &[ProbeKind::Startup] };
            for kind in kinds.iter().filter(|kind| kind.of(probed.container).is_some()) {
                wanted.insert((probed.id.to_owned(), *kind), probed);
            }
        }
        self.tasks.retain(|key, task| {
            let keep = wanted.contains_key(key);
            if !keep {
                task.abort();
            }
            keep
        });
        self.results.lock().retain(|(id, _), _| running.iter().any(|probed| probed.id == id));
        for (key, probed) in wanted {
            if self.tasks.contains_key(&key) {
                continue;
            }
            let run = self.prepare(pod, pod_ip, probed, key.1);
            self.tasks.insert(key, tokio::spawn(run.run()));
        }
    }

    /// Whether the container's startup probe, if it has one, has succeeded.
    pub fn started(&self, container: &Container, id: &str) -> bool {
        container.startup_probe.is_none() || self.result(id, ProbeKind::Startup) == Some(true)
    }

    pub fn result(&self, id: &str, kind: ProbeKind) -> Option<bool> {
        self.results.lock().get(&(id.to_owned(), kind)).copied()
    }

    fn prepare(&self, pod: &Arc<Pod>, pod_ip: &str, probed: &Probed<'_>, kind: ProbeKind) -> Run {
        Run {
            kind,
            probe: kind.of(probed.container).cloned().unwrap_or_default(),
            pod: pod.clone(),
            container: probed.container.clone(),
            id: probed.id.to_owned(),
            pod_ip: pod_ip.to_owned(),
            started_at: probed.started_at,
            about: crate::pod::container_reference(pod, &probed.container.name),
            runtime: self.runtime.clone(),
            recorder: self.recorder.clone(),
            results: self.results.clone(),
            wake: self.wake.clone(),
        }
    }
}

/// One probe at work.
struct Run {
    kind: ProbeKind,
    probe: Probe,
    pod: Arc<Pod>,
    container: Container,
    id: String,
    pod_ip: String,
    started_at: Instant,
    about: ObjectReference,
    runtime: Arc<dyn Runtime>,
    recorder: Recorder,
    results: Results,
    wake: Arc<Notify>,
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(
        value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default),
    )
}

impl Run {
    async fn run(self) {
        let delay = seconds(self.probe.initial_delay_seconds, 0);
        tokio::time::sleep_until(self.started_at + delay).await;
        let period = seconds(self.probe.period_seconds, 10);
        let mut streak = Streak::default();
        loop {
            let began_at = Instant::now();
            let outcome = self.once().await;
            self.report(&outcome);
            if let Some(success) = streak.count(&outcome, &self.probe) {
                self.settle(success);
                let over = match self.kind {
                    // The container will be killed, or has started: nothing left to ask.
                    ProbeKind::Liveness => !success,
                    ProbeKind::Startup => true,
                    ProbeKind::Readiness => false,
                };
                if over {
                    // The entry in the table stays, so that this probe is not started again.
                    return;
                }
            }
            tokio::time::sleep_until(began_at + period).await;
        }
    }

    async fn once(&self) -> Outcome {
        let timeout = seconds(self.probe.timeout_seconds, 1);
        let target = Target {
            runtime: &*self.runtime,
            pod: &self.pod,
            container: &self.container,
            container_id: &self.id,
            pod_ip: &self.pod_ip,
        };
        if let Some(action) = &self.probe.exec {
            handler::exec(&target, action.command.as_deref().unwrap_or_default(), timeout).await
        } else if let Some(action) = &self.probe.http_get {
            handler::http(&target, action, timeout).await
        } else if let Some(action) = &self.probe.tcp_socket {
            handler::tcp(&target, action, timeout).await
        } else if let Some(action) = &self.probe.grpc {
            handler::grpc(&target, action, timeout).await
        } else {
            Outcome::Unknown("missing probe handler".to_owned())
        }
    }

    fn report(&self, outcome: &Outcome) {
        let (verb, message) = match outcome {
            Outcome::Success => return,
            Outcome::Failure(message) => ("failed", message),
            Outcome::Unknown(message) => ("errored and resulted in unknown state", message),
        };
        let message = format!("{} probe {verb}: {message}", self.kind.as_str());
        self.recorder.event_about(self.about.clone(), EventType::Warning, "Unhealthy", message);
    }

    fn settle(&self, success: bool) {
        let before = self.results.lock().insert((self.id.clone(), self.kind), success);
        if before != Some(success) {
            self.wake.notify_one();
        }
    }
}

/// Equal outcomes in a row.
#[derive(Default)]
struct Streak {
    success: bool,
    length: i32,
}

impl Streak {
    /// The verdict, once a threshold is reached. What could not be asked counts for nothing.
    fn count(&mut self, outcome: &Outcome, probe: &Probe) -> Option<bool> {
        let success = match outcome {
            Outcome::Success => true,
            Outcome::Failure(_) => false,
            Outcome::Unknown(_) => return None,
        };
        if self.success != success {
            self.length = 0;
        }
        (self.success, self.length) = (success, self.length.saturating_add(1));
        let threshold =
            if success { probe.success_threshold.unwrap_or(1) } else { probe.failure_threshold.unwrap_or(3) };
        (self.length >= threshold.max(1)).then_some(success)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_decide() {
        let probe = Probe { success_threshold: Some(2), failure_threshold: Some(3), ..Default::default() };
        let mut streak = Streak::default();
        let fail = || Outcome::Failure(String::new());
        let cases = [
            (Outcome::Success, None),
            (Outcome::Success, Some(true)),
            (fail(), None),
            (Outcome::Unknown(String::new()), None),
            (fail(), None),
            (fail(), Some(false)),
            (fail(), Some(false)),
            (Outcome::Success, None),
        ];
        for (index, (outcome, want)) in cases.into_iter().enumerate() {
            assert_eq!(streak.count(&outcome, &probe), want, "step {index}");
        }
    }
}
