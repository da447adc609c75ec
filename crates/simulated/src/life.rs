//! What happens next to a pod, without I/O. The pod's own status says how far it has come; [`Memory`] only adds when a
//! stage began, more exactly than the whole seconds of a status, and is made up from the status where it is missing.
//!
//! All containers of a pod share one fate. Statuses look as a kubelet writes them: conditions, container states,
//! restart counts, reasons.

use crate::profile::{Draw, Profile};
use crate::seen::{SeenContainer, SeenPod, SeenState};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::time::Instant;

/// The back-off of crashed containers and failed starts, as a kubelet's.
const BACKOFF_BASE: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// Exit codes of containers that end by SIGKILL and by SIGTERM.
const KILLED: i32 = 137;
const TERMINATED: i32 = 143;
/// A status that says a stage began less than this ago may have been rounded: the stage counts as new.
const ROUNDING: Duration = Duration::from_secs(1);

/// Where a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Bound; the containers do not run yet.
    Starting,
    /// An attempt to start failed; the next follows after a back-off.
    StartFailed,
    /// Running, not ready yet, for the first time in this run.
    Warming {
        restarts: i32,
    },
    Ready {
        restarts: i32,
    },
    /// Running, and not ready any more.
    Unready {
        restarts: i32,
    },
    /// The containers ended and will be started again after a back-off.
    CrashLoop {
        restarts: i32,
    },
    /// Deleted; the containers are being stopped.
    Stopping,
}

/// When the present stage and the present run began.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    stage: Option<(Stage, Instant)>,
    run: Option<(i32, Instant)>,
    /// Failed attempts to start in a row, and changes of readiness in this run.
    attempts: i64,
    flaps: i64,
}

/// The present, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub instant: Instant,
    pub wall: Timestamp,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Write this status, by strategic merge.
    Write(Value),
    /// The pod is over: delete it without grace.
    Delete,
    /// Nothing before this time has passed.
    Wait(Duration),
    /// Nothing until the pod changes.
    Rest,
}

/// The node's part of a status.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub node_address: &'a str,
    pub pod_address: Option<Ipv4Addr>,
}

/// Whether the pod is about to need an address.
pub fn wants_address(pod: &SeenPod) -> bool {
    pod.status.pod_ip.is_empty() && !pod.is_finished() && !pod.is_deleting() && !pod.spec.host_network
}

/// The next step of a pod.
pub fn step(pod: &SeenPod, profile: &Profile, memory: &mut Memory, now: Now, place: Place) -> Step {
    let write = Writer { pod, now, place };
    if pod.is_deleting() {
        return stop(&write, profile, memory);
    }
    if pod.is_finished() {
        return Step::Rest;
    }
    let deadline = remaining_deadline(pod, now);
    if deadline == Some(Duration::ZERO) {
        return Step::Write(write.deadline_exceeded());
    }
    let next = match stage(pod) {
        Stage::Starting => start(&write, profile, memory),
        Stage::StartFailed => retry_start(&write, profile, memory),
        Stage::CrashLoop { restarts } => restart(&write, profile, memory, restarts),
        stage => run(&write, profile, memory, stage),
    };
    match (next, deadline) {
        (Step::Wait(wait), Some(deadline)) => Step::Wait(wait.min(deadline)),
        (Step::Rest, Some(deadline)) => Step::Wait(deadline),
        (next, _) => next,
    }
}

/// Where the pod's status says it stands.
fn stage(pod: &SeenPod) -> Stage {
    let Some(container) = pod.container() else { return Stage::Starting };
    let restarts = container.restart_count;
    match &container.state {
        SeenState { running: Some(_), .. } if pod.is_true("ContainersReady") => Stage::Ready { restarts },
        // The change of readiness is later than the start: it was ready before.
        SeenState { running: Some(running), .. } => {
            let started = running.started_at.as_ref().map(|time| time.0);
            match pod.since("ContainersReady") > started {
                true => Stage::Unready { restarts },
                false => Stage::Warming { restarts },
            }
        }
        _ if container.last_state.terminated.is_some() => Stage::CrashLoop { restarts },
        SeenState { waiting: Some(waiting), .. } if waiting.reason != "ContainerCreating" => {
            Stage::StartFailed
        }
        _ => Stage::Starting,
    }
}

impl Memory {
    /// How long the pod has been in this stage; `stamp` is when its status says it began.
    fn elapsed(&mut self, stage: Stage, stamp: Option<Timestamp>, now: Now) -> Duration {
        let since = match self.stage {
            Some((known, since)) if same_stage(known, stage) => since,
            _ => began(stamp, now),
        };
        self.stage = Some((stage, since));
        now.instant.saturating_duration_since(since)
    }

    /// How long the containers have run.
    fn run_elapsed(&mut self, restarts: i32, stamp: Option<Timestamp>, now: Now) -> Duration {
        let since = match self.run {
            Some((known, since)) if known == restarts => since,
            _ => began(stamp, now),
        };
        if self.run.is_none_or(|(known, _)| known != restarts) {
            self.flaps = 0;
        }
        self.run = Some((restarts, since));
        now.instant.saturating_duration_since(since)
    }
}

/// A pod's status does not always tell unready from warming when both happen within a second.
fn same_stage(a: Stage, b: Stage) -> bool {
    let not_ready = |stage| match stage {
        Stage::Warming { restarts } | Stage::Unready { restarts } => Some(restarts),
        _ => None,
    };
    a == b || (not_ready(a).is_some() && not_ready(a) == not_ready(b))
}

/// When something began by our clock that began at `stamp` by the wall's.
fn began(stamp: Option<Timestamp>, now: Now) -> Instant {
    let age = stamp.and_then(|stamp| Duration::try_from(now.wall.duration_since(stamp)).ok());
    match age.filter(|age| *age > ROUNDING) {
        Some(age) => now.instant.checked_sub(age).unwrap_or(now.instant),
        None => now.instant,
    }
}

fn backoff(failures: i64) -> Duration {
    let doubled = 2u32.saturating_pow(u32::try_from(failures - 1).unwrap_or(0).min(16));
    BACKOFF_BASE.saturating_mul(doubled).min(BACKOFF_MAX)
}

fn remaining_deadline(pod: &SeenPod, now: Now) -> Option<Duration> {
    let (seconds, start) = (pod.spec.active_deadline_seconds?, pod.status.start_time.as_ref()?);
    let elapsed = now.wall.duration_since(start.0);
    let allowed = jiff::SignedDuration::from_secs(seconds);
    Some(Duration::try_from(allowed.saturating_sub(elapsed)).unwrap_or(Duration::ZERO))
}

/// Waits until `due` of `elapsed`, then does it.
fn at(due: Duration, elapsed: Duration, step: impl FnOnce() -> Step) -> Step {
    if elapsed >= due { step() } else { Step::Wait(due - elapsed) }
}

fn draw<'a>(write: &Writer<'a>, round: i64) -> Draw<'a> {
    Draw { uid: write.pod.uid(), round }
}

fn start(write: &Writer, profile: &Profile, memory: &mut Memory) -> Step {
    let elapsed = memory.elapsed(Stage::Starting, write.pod.since("PodScheduled"), write.now);
    let due = profile.start_delay.draw(draw(write, 0), "start-delay");
    at(due, elapsed, || attempt(write, profile, memory))
}

fn retry_start(write: &Writer, profile: &Profile, memory: &mut Memory) -> Step {
    let elapsed = memory.elapsed(Stage::StartFailed, write.pod.since("ContainersReady"), write.now);
    let due = backoff(memory.attempts.max(1));
    if elapsed < due {
        return Step::Wait(due - elapsed);
    }
    // The status need not change when another attempt fails, so the stage is begun anew here.
    memory.stage = Some((Stage::StartFailed, write.now.instant));
    attempt(write, profile, memory)
}

fn attempt(write: &Writer, profile: &Profile, memory: &mut Memory) -> Step {
    if draw(write, memory.attempts).happens("start-failure", profile.start_failure_chance) {
        memory.attempts += 1;
        let known = matches!(stage(write.pod), Stage::StartFailed);
        return if known {
            Step::Wait(backoff(memory.attempts))
        } else {
            Step::Write(write.start_failed(profile))
        };
    }
    Step::Write(write.running(0, profile.ready_delay.most.is_zero()))
}

fn restart(write: &Writer, profile: &Profile, memory: &mut Memory, restarts: i32) -> Step {
    let finished = write.pod.container().and_then(|c| c.last_state.terminated.as_ref()?.finished_at.clone());
    let elapsed = memory.elapsed(Stage::CrashLoop { restarts }, finished.map(|time| time.0), write.now);
    // The first restart is immediate, as a kubelet's.
    let due = if restarts == 0 { Duration::ZERO } else { backoff(i64::from(restarts)) };
    at(due, elapsed, || Step::Write(write.running(restarts + 1, profile.ready_delay.most.is_zero())))
}

fn run(write: &Writer, profile: &Profile, memory: &mut Memory, stage: Stage) -> Step {
    let pod = write.pod;
    let restarts = pod.restarts();
    let started = pod.container().and_then(|container| container.state.running.as_ref()?.started_at.clone());
    let ran = memory.run_elapsed(restarts, started.as_ref().map(|time| time.0), write.now);
    let round = i64::from(restarts);
    let end = profile.run_time.map(|time| time.draw(draw(write, round), "run-time"));
    if end.is_some_and(|end| ran >= end) {
        return Step::Write(write.ended(profile.outcome(draw(write, round))));
    }
    let turn = turn_readiness(write, profile, memory, stage, started.map(|time| time.0));
    let next = match turn {
        Step::Write(_) => return turn,
        // Somebody else's condition may have opened or closed a gate.
        _ if write.is_ready(stage_is_ready(stage)) != pod.is_true("Ready") => {
            return Step::Write(write.readiness(stage_is_ready(stage)));
        }
        other => other,
    };
    match (next, end.map(|end| end - ran)) {
        (Step::Wait(wait), Some(end)) => Step::Wait(wait.min(end)),
        (Step::Rest, Some(end)) => Step::Wait(end),
        (next, _) => next,
    }
}

fn stage_is_ready(stage: Stage) -> bool {
    matches!(stage, Stage::Ready { .. })
}

fn turn_readiness(
    write: &Writer,
    profile: &Profile,
    memory: &mut Memory,
    stage: Stage,
    started: Option<Timestamp>,
) -> Step {
    let restarts = i64::from(write.pod.restarts());
    let stamp = write.pod.since("ContainersReady").max(started);
    let elapsed = memory.elapsed(stage, stamp, write.now);
    let round = restarts.wrapping_mul(1 << 20) + memory.flaps;
    let due = match stage {
        Stage::Warming { .. } if memory.flaps == 0 => {
            Some(profile.ready_delay.draw(draw(write, round), "ready-delay"))
        }
        Stage::Ready { .. } => {
            profile.unready_after.map(|time| time.draw(draw(write, round), "unready-after"))
        }
        _ => Some(profile.unready_for.draw(draw(write, round), "unready-for")),
    };
    let Some(due) = due else { return Step::Rest };
    at(due, elapsed, || {
        memory.flaps += 1;
        Step::Write(write.readiness(!stage_is_ready(stage)))
    })
}

/// A deleted pod: its containers end after a while, then it goes.
fn stop(write: &Writer, profile: &Profile, memory: &mut Memory) -> Step {
    let pod = write.pod;
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    let is_last = grace == 0 && pod.has_finalizers();
    if pod.is_finished() || pod.container().is_none() {
        // Without grace it is only held by finalizers: others have to act now.
        return if is_last { Step::Rest } else { Step::Delete };
    }
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
    let asked = pod.metadata.deletion_timestamp.as_ref().map(|time| time.0 - grace);
    let elapsed = memory.elapsed(Stage::Stopping, asked, write.now);
    let due = profile.stop_delay.draw(draw(write, 0), "stop-delay");
    let killed = due > grace && !grace.is_zero();
    at(due.min(grace), elapsed, || match pod.has_finalizers() {
        // Who holds it wants to know how it ended. Otherwise nobody would see that status: it is saved.
        true => Step::Write(write.finished(if killed { KILLED } else { TERMINATED })),
        false => Step::Delete,
    })
}

/// Makes statuses.
struct Writer<'a> {
    pod: &'a SeenPod,
    now: Now,
    place: Place<'a>,
}

impl Writer<'_> {
    fn stamp(&self) -> Value {
        let seconds = Timestamp::from_second(self.now.wall.as_second()).unwrap_or(self.now.wall);
        json!(Time(seconds))
    }

    fn running(&self, restarts: i32, ready: bool) -> Value {
        let started = self.stamp();
        let state = json!({ "running": { "startedAt": started } });
        let last = self.pod.container().and_then(|container| container.last_state.terminated.as_ref());
        let last = last.map(|end| json!({ "terminated": terminated(end.exit_code, &end.started_at, &json!(end.finished_at)) }));
        let mut status = self.containers(&state, last.as_ref(), restarts, ready);
        status["phase"] = json!("Running");
        status["hostIP"] = json!(self.place.node_address);
        status["hostIPs"] = json!([{ "ip": self.place.node_address }]);
        if self.pod.status.start_time.is_none() {
            status["startTime"] = self.stamp();
        }
        let address = match (self.pod.spec.host_network, self.place.pod_address) {
            (true, _) => Some(self.place.node_address.to_owned()),
            (false, address) => address.map(|address| address.to_string()),
        };
        if let Some(address) = address {
            status["podIP"] = json!(address);
            status["podIPs"] = json!([{ "ip": address }]);
        }
        status["conditions"] = self.conditions(&[
            ("PodReadyToStartContainers", true, None),
            ("Initialized", true, None),
            ("ContainersReady", ready, (!ready).then(|| self.unready_reason())),
            self.ready_condition(ready),
            ("PodScheduled", true, None),
        ]);
        status
    }

    fn start_failed(&self, profile: &Profile) -> Value {
        let reason = &profile.start_failure_reason;
        let state = json!({ "waiting": { "reason": reason, "message": "simulated failure to start" } });
        let mut status = self.containers(&state, None, 0, false);
        status["phase"] = json!("Pending");
        status["hostIP"] = json!(self.place.node_address);
        status["hostIPs"] = json!([{ "ip": self.place.node_address }]);
        if self.pod.status.start_time.is_none() {
            status["startTime"] = self.stamp();
        }
        status["conditions"] = self.conditions(&[
            ("Initialized", true, None),
            ("ContainersReady", false, Some(self.unready_reason())),
            self.ready_condition(false),
            ("PodScheduled", true, None),
        ]);
        status
    }

    /// Running containers become ready, or stop being so.
    fn readiness(&self, ready: bool) -> Value {
        let container = self.pod.container();
        let started = container.and_then(|container| container.state.running.as_ref()?.started_at.clone());
        let state = json!({ "running": { "startedAt": started } });
        let last = container.and_then(|container| container.last_state.terminated.as_ref());
        let last = last.map(|end| json!({ "terminated": terminated(end.exit_code, &end.started_at, &json!(end.finished_at)) }));
        let mut status = self.containers(&state, last.as_ref(), self.pod.restarts(), ready);
        status["conditions"] = self.conditions(&[
            ("ContainersReady", ready, (!ready).then(|| self.unready_reason())),
            self.ready_condition(ready),
        ]);
        status
    }

    /// The containers ended: for good, or to be started again.
    fn ended(&self, exit_code: i32) -> Value {
        let again = match self.pod.spec.restart_policy.as_str() {
            "Never" => false,
            "OnFailure" => exit_code != 0,
            _ => true,
        };
        if !again {
            return self.finished(exit_code);
        }
        let last = json!({ "terminated": self.terminated_now(exit_code) });
        let message = "back-off restarting failed container";
        let state = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": message } });
        let mut status = self.containers(&state, Some(&last), self.pod.restarts(), false);
        status["conditions"] = self.conditions(&[
            ("ContainersReady", false, Some(self.unready_reason())),
            self.ready_condition(false),
        ]);
        status
    }

    fn finished(&self, exit_code: i32) -> Value {
        let state = json!({ "terminated": self.terminated_now(exit_code) });
        let mut status = self.containers(&state, None, self.pod.restarts(), false);
        status["phase"] = json!(if exit_code == 0 { "Succeeded" } else { "Failed" });
        let reason = if exit_code == 0 { "PodCompleted" } else { "PodFailed" };
        status["conditions"] = self.conditions(&[
            ("PodReadyToStartContainers", false, None),
            ("Initialized", true, (exit_code == 0).then(|| "PodCompleted".to_owned())),
            ("ContainersReady", false, Some(reason.to_owned())),
            ("Ready", false, Some(reason.to_owned())),
        ]);
        status
    }

    fn deadline_exceeded(&self) -> Value {
        let mut status = match self.pod.container().is_some() {
            true => self.finished(KILLED),
            false => json!({ "phase": "Failed" }),
        };
        status["reason"] = json!("DeadlineExceeded");
        status["message"] = json!("Pod was active on the node longer than the specified deadline");
        status
    }

    fn terminated_now(&self, exit_code: i32) -> Value {
        let started = self.pod.container().and_then(|c| c.state.running.as_ref()?.started_at.clone());
        terminated(exit_code, &started, &self.stamp())
    }

    fn containers(&self, state: &Value, last: Option<&Value>, restarts: i32, ready: bool) -> Value {
        let main: Vec<Value> = self
            .pod
            .spec
            .containers
            .iter()
            .map(|c| self.container(c, state, last, restarts, ready))
            .collect();
        let mut status = json!({ "containerStatuses": main });
        if !self.pod.spec.init_containers.is_empty() {
            let init: Vec<Value> =
                self.pod.spec.init_containers.iter().map(|c| self.init(c, state, ready)).collect();
            status["initContainerStatuses"] = json!(init);
        }
        if let Some(generation) = self.pod.metadata.generation {
            status["observedGeneration"] = json!(generation);
        }
        status
    }

    fn container(
        &self,
        container: &SeenContainer,
        state: &Value,
        last: Option<&Value>,
        restarts: i32,
        ready: bool,
    ) -> Value {
        let mut status = json!({
            "name": container.name, "image": container.image, "ready": ready, "restartCount": restarts,
            "started": state.get("running").is_some(), "state": state,
            "imageID": "", "lastState": {},
        });
        if state.get("waiting").is_none() {
            status["imageID"] = json!(format!("simulated://{}", container.image));
            status["containerID"] =
                json!(format!("simulated://{}/{}/{restarts}", self.pod.uid(), container.name));
        }
        if let Some(last) = last {
            status["lastState"] = last.clone();
        }
        status
    }

    /// Sidecars share the fate of the main containers; others have run before them.
    fn init(&self, container: &SeenContainer, state: &Value, ready: bool) -> Value {
        if container.restart_policy == "Always" {
            return self.container(container, state, None, 0, ready);
        }
        if state.get("waiting").is_some() && self.pod.restarts() == 0 {
            let waiting = json!({ "waiting": { "reason": "PodInitializing" } });
            return self.container(container, &waiting, None, 0, false);
        }
        let done = json!({ "terminated": terminated(0, &None, &Value::Null) });
        self.container(container, &done, None, 0, true)
    }

    fn unready_reason(&self) -> String {
        "ContainersNotReady".to_owned()
    }

    /// Whether the pod is ready when its containers are: its gates must be open.
    fn is_ready(&self, containers: bool) -> bool {
        containers && self.pod.spec.readiness_gates.iter().all(|gate| self.pod.is_true(&gate.condition_type))
    }

    fn ready_condition(&self, containers: bool) -> (&'static str, bool, Option<String>) {
        let ready = self.is_ready(containers);
        let reason = match (ready, containers) {
            (true, _) => None,
            (false, true) => Some("ReadinessGatesNotReady".to_owned()),
            (false, false) => Some(self.unready_reason()),
        };
        ("Ready", ready, reason)
    }

    /// Conditions with the time of their last change.
    fn conditions(&self, wanted: &[(&str, bool, Option<String>)]) -> Value {
        let one = |(type_, holds, reason): &(&str, bool, Option<String>)| {
            let status = if *holds { "True" } else { "False" };
            let known = self.pod.condition(type_).filter(|known| known.status == status);
            let since = known.and_then(|known| known.last_transition_time.clone());
            json!({
                "type": type_, "status": status, "reason": reason, "message": null, "lastProbeTime": null,
                "lastTransitionTime": since.map_or_else(|| self.stamp(), |since| json!(since)),
            })
        };
        json!(wanted.iter().map(one).collect::<Vec<_>>())
    }
}

fn terminated(exit_code: i32, started: &Option<Time>, finished: &Value) -> Value {
    let reason = if exit_code == 0 { "Completed" } else { "Error" };
    json!({ "exitCode": exit_code, "reason": reason, "startedAt": started, "finishedAt": finished })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place =
        Place { node_address: "100.64.0.1", pod_address: Some(Ipv4Addr::new(100, 64, 0, 2)) };

    /// A pod on virtual time whose statuses are merged as the API server does.
    struct Stage {
        object: Value,
        profile: Profile,
        memory: Memory,
        start: Instant,
    }

    impl Stage {
        fn new(annotations: &[(&str, &str)], spec: Value) -> Self {
            let annotations = annotations
                .iter()
                .map(|(k, v)| (format!("{}{k}", crate::profile::PREFIX), (*v).to_owned()))
                .collect();
            let mut object = json!({ "metadata": { "name": "p", "uid": "u" }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
            for (key, value) in spec.as_object().unwrap() {
                object["spec"][key] = value.clone();
            }
            let always = object["spec"]["restartPolicy"].is_null();
            let profile = Profile::of(Some(&annotations), None, always).0;
            Stage { object, profile, memory: Memory::default(), start: Instant::now() }
        }

        fn pod(&self) -> SeenPod {
            serde_json::from_value(self.object.clone()).unwrap()
        }

        fn step(&mut self) -> Step {
            let instant = Instant::now();
            let wall = Timestamp::UNIX_EPOCH + (instant - self.start) + Duration::from_secs(1_000_000);
            let (pod, now) = (self.pod(), Now { instant, wall });
            step(&pod, &self.profile, &mut self.memory, now, PLACE)
        }

        fn write(&mut self, status: Value) {
            let old = self.object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            for (key, value) in status.as_object().unwrap() {
                self.object["status"][key] = value.clone();
            }
            let new = self.object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let kept = old.into_iter().filter(|old| !new.iter().any(|new| new["type"] == old["type"]));
            self.object["status"]["conditions"] = json!(new.iter().cloned().chain(kept).collect::<Vec<_>>());
        }

        /// Lives until nothing more is to come, or `max` writes; each as seconds, phase and container state.
        async fn live(&mut self, max: usize) -> Vec<(f64, String)> {
            let mut story = Vec::new();
            while story.len() < max {
                match self.step() {
                    Step::Wait(time) => tokio::time::advance(time).await,
                    Step::Write(status) => {
                        self.write(status);
                        let pod = self.pod();
                        let container = self.object["status"]["containerStatuses"][0].clone();
                        let state =
                            container["state"].as_object().and_then(|state| state.keys().next().cloned());
                        let ready = if pod.is_true("Ready") { " ready" } else { "" };
                        let state = state.unwrap_or_default();
                        let line = format!("{} {state} {}{ready}", pod.status.phase, pod.restarts());
                        story.push(((self.start.elapsed().as_secs_f64() * 10.0).round() / 10.0, line));
                    }
                    Step::Delete => {
                        story.push((self.start.elapsed().as_secs_f64(), "gone".to_owned()));
                        break;
                    }
                    Step::Rest => break,
                }
            }
            story
        }
    }

    fn story(lines: &[(f64, &str)]) -> Vec<(f64, String)> {
        lines.iter().map(|(time, line)| (*time, (*line).to_owned())).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn delays_of_less_than_a_second_are_kept() {
        let mut pod = Stage::new(&[("start-delay", "300ms"), ("ready-delay", "1500ms")], json!({}));
        assert_eq!(pod.live(9).await, story(&[(0.3, "Running running 0"), (1.8, "Running running 0 ready")]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_crashing_container_is_restarted_at_once_and_then_ever_later() {
        let mut pod = Stage::new(&[("run-time", "2s"), ("exit-code", "1")], json!({}));
        let times: Vec<f64> = pod
            .live(10)
            .await
            .into_iter()
            .filter(|(_, line)| line.contains("running"))
            .map(|(t, _)| t)
            .collect();
        assert_eq!(times, [0.0, 2.0, 14.0, 36.0, 78.0], "10, 20 and 40 seconds of back-off");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_of_a_job_ends_and_a_deadline_ends_one_that_does_not() {
        let never = json!({ "restartPolicy": "Never" });
        let mut pod = Stage::new(&[("run-time", "5s")], never);
        assert_eq!(
            pod.live(9).await,
            story(&[(0.0, "Running running 0 ready"), (5.0, "Succeeded terminated 0")])
        );
        let mut pod = Stage::new(&[("run-time", "forever")], json!({ "activeDeadlineSeconds": 7 }));
        assert_eq!(
            pod.live(9).await,
            story(&[(0.0, "Running running 0 ready"), (7.0, "Failed terminated 0")])
        );
        assert_eq!(pod.object["status"]["reason"], "DeadlineExceeded");
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_that_fails_is_tried_again_with_back_off() {
        let mut pod = Stage::new(&[("start-failure-chance", "0.9")], json!({}));
        let story = pod.live(2).await;
        assert_eq!(story[0], (0.0, "Pending waiting 0".to_owned()));
        assert!(story[1].1.starts_with("Running") && story[1].0 >= 10.0, "{story:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_pod_stops_in_its_time_but_not_later_than_its_grace() {
        for (delay, grace, gone) in [("2s", 30, 2.0), ("60s", 30, 30.0), ("0s", 30, 0.0)] {
            let mut pod = Stage::new(&[("stop-delay", delay)], json!({}));
            pod.live(1).await;
            pod.object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            let at = Timestamp::UNIX_EPOCH + Duration::from_secs(1_000_000 + grace);
            pod.object["metadata"]["deletionTimestamp"] = json!(Time(at));
            assert_eq!(pod.live(1).await, story(&[(gone, "gone")]), "{delay} of {grace} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_a_deleted_pod_learns_how_it_ended() {
        let mut pod = Stage::new(&[], json!({}));
        pod.object["metadata"]["finalizers"] = json!(["batch.kubernetes.io/job-tracking"]);
        pod.live(1).await;
        pod.object["metadata"]["deletionGracePeriodSeconds"] = json!(30);
        pod.object["metadata"]["deletionTimestamp"] =
            json!(Time(Timestamp::UNIX_EPOCH + Duration::from_secs(1_000_030)));
        assert_eq!(pod.live(2).await, story(&[(0.0, "Failed terminated 0"), (0.0, "gone")]));
        pod.object["metadata"]["deletionGracePeriodSeconds"] = json!(0);
        assert_eq!(pod.step(), Step::Rest, "only its holders can let it go now");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_process_goes_on_where_the_last_one_stopped() {
        let mut pod =
            Stage::new(&[("run-time", "60s"), ("ready-delay", "20s")], json!({ "restartPolicy": "Never" }));
        pod.live(1).await;
        tokio::time::advance(Duration::from_secs(15)).await;
        pod.memory = Memory::default();
        assert_eq!(pod.step(), Step::Wait(Duration::from_secs(5)));
        assert_eq!(
            pod.live(9).await,
            story(&[(20.0, "Running running 0 ready"), (60.0, "Succeeded terminated 0")])
        );
    }
}
