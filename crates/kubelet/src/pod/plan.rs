//! What to do about a pod: which containers to start or kill, whether it needs a new sandbox, and when to look
//! again. Values in, values out (`computePodActions` in `pkg/kubelet/kuberuntime/kuberuntime_manager.go`).

use super::observe::{Observed, Seen};
use super::{State, Waiting};
use crate::backoff::{Backoff, go_duration};
use crate::names;
use crate::probe::ProbeKind;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use knarr_runtime::cri::v1;
use std::collections::{BTreeMap, HashMap};
use tokio::time::Instant;

/// Crash back-offs by container name.
pub type Restarts = BTreeMap<String, Backoff>;

/// What probes found, by container id and probe.
pub type ProbeResults = HashMap<(String, ProbeKind), bool>;

/// What there is to do. Killing goes before starting.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Everything in the pod has to end: it is done, has failed, or needs a new sandbox.
    pub kill_all: bool,
    pub kill: Vec<Kill>,
    /// Needs a sandbox of this attempt before anything can start.
    pub sandbox: Option<u32>,
    /// In the order they start.
    pub start: Vec<Start>,
    /// Containers in crash back-off, and what their status says meanwhile.
    pub waiting: BTreeMap<String, Waiting>,
    /// When a back-off ends.
    pub look_again: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Kill {
    pub id: String,
    pub name: String,
    /// Message of the event; empty: `Stopping container NAME`.
    pub message: String,
    /// The probe that failed may shorten the grace period, in seconds.
    pub grace_s: Option<i64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    pub name: String,
    pub attempt: u32,
    /// When the container before this one ended, for its back-off.
    pub failed_at: Option<Instant>,
}

/// What the plan is made from.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a Observed,
    pub state: &'a State,
    pub probes: &'a ProbeResults,
    pub now: Instant,
    /// The same moment on the wall clock, in nanoseconds: the runtime's times are of that kind.
    pub now_ns: i64,
}

impl Input<'_> {
    /// A time of the runtime on tokio's clock.
    pub fn instant(&self, at_ns: i64) -> Instant {
        let ago = u64::try_from(self.now_ns.saturating_sub(at_ns)).unwrap_or(0);
        self.now.checked_sub(std::time::Duration::from_nanos(ago)).unwrap_or(self.now)
    }

    fn restarted_by(&self, container: &Container, seen: &Seen) -> bool {
        restarts(self.pod, container, &seen.status)
    }

    fn probe(&self, seen: &Seen, kind: ProbeKind) -> Option<bool> {
        self.probes.get(&(seen.status.id.clone(), kind)).copied()
    }

    /// Running, its hook returned and its startup probe satisfied.
    fn has_started(&self, container: &Container, seen: &Seen) -> bool {
        seen.is_running()
            && !self.state.in_hook.contains(&seen.status.id)
            && (container.startup_probe.is_none() || self.probe(seen, ProbeKind::Startup) == Some(true))
    }
}

/// Whether an init container is a sidecar: it keeps running beside the main containers.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Whether a container that ended like this is to run again.
pub fn restarts(pod: &Pod, container: &Container, ended: &v1::ContainerStatus) -> bool {
    for rule in container.restart_policy_rules.iter().flatten() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.iter().flatten().any(|code| *code == ended.exit_code);
        if (codes.operator == "In") == listed && rule.action == "Restart" {
            return true;
        }
    }
    let pods = pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always");
    match container.restart_policy.as_deref().unwrap_or(pods) {
        "Never" => false,
        "OnFailure" => ended.exit_code != 0,
        _ => true,
    }
}

/// Makes the plan for a pod that is to run.
pub fn plan(input: &Input<'_>) -> Plan {
    let Some(spec) = &input.pod.spec else { return Plan::default() };
    let mut plan = Plan::default();
    let Some(sandbox) = input.observed.live_sandbox() else {
        return without_sandbox(input, spec);
    };
    let initialized = is_initialized(input, spec, &sandbox.id);
    for container in spec.ephemeral_containers.iter().flatten() {
        // They run once.
        if input.observed.latest(&container.name).is_none() {
            start(input, &mut plan, &container.name, None);
        }
    }
    let all_done = initialized && main_is_done(input, spec);
    if all_done {
        // Sidecars end after the main containers, the last one first.
        plan.kill_all = true;
        return plan;
    }
    match init(input, spec, &sandbox.id, initialized, &mut plan) {
        Init::Failed => return Plan { kill_all: true, ..Plan::default() },
        Init::Busy => return plan,
        Init::Done => {}
    }
    for container in &spec.containers {
        main(input, container, &mut plan);
    }
    plan
}

fn without_sandbox(input: &Input<'_>, spec: &PodSpec) -> Plan {
    let observed = input.observed;
    let attempt = observed.sandboxes.first().and_then(|sandbox| sandbox.metadata.as_ref());
    let attempt = attempt.map_or(0, |meta| meta.attempt + 1);
    let mut plan = Plan { kill_all: observed.running().next().is_some(), ..Plan::default() };
    let never_failed = |container: &Container| match observed.latest(&container.name) {
        Some(seen) if seen.has_exited() => input.restarted_by(container, seen),
        _ => true,
    };
    // A pod whose containers have all ended for good needs no sandbox any more.
    let nothing_left = !observed.containers.is_empty() && !spec.containers.iter().any(never_failed);
    let init_failed =
        spec.init_containers.iter().flatten().filter(|container| !is_sidecar(container)).any(|container| {
            observed.latest(&container.name).is_some_and(|seen| {
                seen.has_exited() && seen.status.exit_code != 0 && !input.restarted_by(container, seen)
            })
        });
    if nothing_left || init_failed {
        return plan;
    }
    plan.sandbox = Some(attempt);
    let first_init = spec.init_containers.iter().flatten().next();
    match first_init {
        Some(container) => start(input, &mut plan, &container.name, None),
        None => {
            for container in spec.containers.iter().filter(|container| never_failed(container)) {
                start(input, &mut plan, &container.name, None);
            }
        }
    }
    plan
}

/// Whether all init containers have done their work in this sandbox: then they do not run again.
fn is_initialized(input: &Input<'_>, spec: &PodSpec, sandbox_id: &str) -> bool {
    let in_sandbox = |name: &str| {
        input.observed.containers.iter().any(|seen| seen.name() == name && seen.sandbox_id == sandbox_id)
    };
    if spec.containers.iter().any(|container| in_sandbox(&container.name)) {
        return true;
    }
    let mut regular = spec.init_containers.iter().flatten().filter(|container| !is_sidecar(container)).rev();
    regular.next().is_some_and(|last| {
        input.observed.latest(&last.name).is_some_and(|seen| {
            seen.sandbox_id == sandbox_id && seen.has_exited() && seen.status.exit_code == 0
        })
    })
}

fn main_is_done(input: &Input<'_>, spec: &PodSpec) -> bool {
    !spec.containers.is_empty()
        && spec.containers.iter().all(|container| {
            input
                .observed
                .latest(&container.name)
                .is_some_and(|seen| seen.has_exited() && !input.restarted_by(container, seen))
        })
}

enum Init {
    /// One of them is at work, or has to wait.
    Busy,
    Done,
    /// One failed for good, and the pod with it.
    Failed,
}

fn init(input: &Input<'_>, spec: &PodSpec, sandbox_id: &str, initialized: bool, plan: &mut Plan) -> Init {
    for container in spec.init_containers.iter().flatten() {
        let latest = input.observed.latest(&container.name);
        let here = latest.filter(|seen| seen.sandbox_id == sandbox_id);
        if is_sidecar(container) {
            match here {
                Some(seen) if seen.is_running() => {
                    if let Some(kill) = unhealthy(input, container, seen) {
                        plan.kill.push(kill);
                    } else if !input.has_started(container, seen) && !initialized {
                        return Init::Busy;
                    }
                }
                seen => {
                    start(input, plan, &container.name, seen.filter(|seen| seen.has_exited()));
                    if !initialized {
                        return Init::Busy;
                    }
                }
            }
            continue;
        }
        if initialized {
            continue;
        }
        match here {
            Some(seen) if seen.is_running() => return Init::Busy,
            Some(seen) if seen.has_exited() && seen.status.exit_code == 0 => {}
            Some(seen) if seen.has_exited() => {
                if !input.restarted_by(container, seen) {
                    return Init::Failed;
                }
                start(input, plan, &container.name, Some(seen));
                return Init::Busy;
            }
            _ => {
                start(input, plan, &container.name, None);
                return Init::Busy;
            }
        }
    }
    Init::Done
}

fn main(input: &Input<'_>, container: &Container, plan: &mut Plan) {
    match input.observed.latest(&container.name) {
        None => start(input, plan, &container.name, None),
        Some(seen) if seen.is_running() => plan.kill.extend(unhealthy(input, container, seen)),
        Some(seen) if seen.has_exited() => {
            if input.restarted_by(container, seen) {
                start(input, plan, &container.name, Some(seen));
            }
        }
        // Made but never started: the kubelet died in between.
        Some(_) => start(input, plan, &container.name, None),
    }
}

/// Whether a running container has to go, and what to say about it.
fn unhealthy(input: &Input<'_>, container: &Container, seen: &Seen) -> Option<Kill> {
    let wanted = names::container_hash(&container.name, container.image.as_deref().unwrap_or_default());
    let kill = |message: String, probe: Option<ProbeKind>| Kill {
        id: seen.status.id.clone(),
        name: container.name.clone(),
        message,
        grace_s: probe
            .and_then(|kind| kind.of(container))
            .and_then(|probe| probe.termination_grace_period_seconds),
    };
    let (what, name) = ("Container", &container.name);
    if seen.hash().is_some_and(|hash| hash != wanted) {
        return Some(kill(format!("{what} {name} definition changed, will be restarted"), None));
    }
    let never = {
        let pods = input.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref());
        container.restart_policy.as_deref().or(pods) == Some("Never")
    };
    let then = if never { "" } else { ", will be restarted" };
    if input.probe(seen, ProbeKind::Startup) == Some(false) {
        return Some(kill(format!("{what} {name} failed startup probe{then}"), Some(ProbeKind::Startup)));
    }
    if input.probe(seen, ProbeKind::Liveness) == Some(false) {
        return Some(kill(format!("{what} {name} failed liveness probe{then}"), Some(ProbeKind::Liveness)));
    }
    None
}

/// Starts a container, unless it crashed and has to wait.
fn start(input: &Input<'_>, plan: &mut Plan, name: &str, ended: Option<&Seen>) {
    let failed_at = ended.map(|seen| input.instant(seen.status.finished_at));
    if let (Some(failed_at), Some(backoff)) = (failed_at, input.state.restarts.get(name))
        && let Some(remaining) = backoff.remaining(failed_at, input.now)
    {
        let message = format!(
            "back-off {} restarting failed container={name} pod={}",
            go_duration(backoff.delay()),
            names::display(input.pod)
        );
        plan.waiting.insert(name.to_owned(), Waiting { reason: "CrashLoopBackOff".to_owned(), message });
        let at = input.now + remaining;
        plan.look_again = Some(plan.look_again.map_or(at, |earlier| earlier.min(at)));
        return;
    }
    if let Some(at) = input.state.not_before.get(name).copied().filter(|at| *at > input.now) {
        plan.look_again = Some(plan.look_again.map_or(at, |earlier| earlier.min(at)));
        return;
    }
    let before = input.observed.latest(name);
    let attempt = match before {
        Some(seen) if seen.has_exited() || seen.is_running() => seen.attempt() + 1,
        Some(seen) => seen.attempt(),
        None => recorded_restarts(input.pod, name).map_or(0, |count| count + 1),
    };
    plan.start.push(Start { name: name.to_owned(), attempt, failed_at });
}

/// How often the API was told the container had restarted, if it ever ran: the runtime may have forgotten it.
fn recorded_restarts(pod: &Pod, name: &str) -> Option<u32> {
    let status = pod.status.as_ref()?;
    let lists =
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    let mut all = lists.into_iter().flat_map(|list| list.iter().flatten());
    let found = all.find(|status| status.name == name)?;
    let ran = found.container_id.as_deref().is_some_and(|id| !id.is_empty());
    ran.then(|| u32::try_from(found.restart_count).unwrap_or(0))
}
