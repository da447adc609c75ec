//! A pod's status from what runs: container statuses, phase, conditions. Values in, values out
//! (`pkg/kubelet/kubelet_pods.go`, `pkg/kubelet/status/generate.go`).

use super::observe::{Observed, Seen};
use super::plan::{self, ProbeResults};
use super::resize;
use super::{State, Waiting};
use crate::names;
use crate::probe::ProbeKind;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, ContainerUser, HostIP, LinuxContainerUser, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use knarr_runtime::cri::v1;
use std::collections::BTreeMap;

/// What a status is made from.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a Observed,
    pub state: &'a State,
    pub probes: &'a ProbeResults,
    /// Containers in crash back-off.
    pub waiting: &'a BTreeMap<String, Waiting>,
    pub runtime_name: &'a str,
    pub host_ips: &'a [String],
    pub now: Time,
    /// The pod is being stopped: nothing will be restarted.
    pub stopping: bool,
    /// Ended by the node: reason and message of the failure.
    pub failure: Option<(&'a str, &'a str)>,
}

/// The status to tell. Fields others own are as they were.
pub fn status(input: &Input<'_>) -> PodStatus {
    let spec = input.pod.spec.clone().unwrap_or_default();
    let old = input.pod.status.clone().unwrap_or_default();
    let inits: Vec<Container> = spec.init_containers.clone().unwrap_or_default();
    let ephemeral: Vec<Container> = spec.ephemeral_containers.iter().flatten().map(names::ordinary).collect();
    let mut init = statuses(input, &inits, old.init_container_statuses.as_deref(), List::Init);
    let initialized = init_done(&inits, &init);
    let mut main =
        statuses(input, &spec.containers, old.container_statuses.as_deref(), List::Main { initialized });
    let others = statuses(input, &ephemeral, old.ephemeral_container_statuses.as_deref(), List::Ephemeral);
    let phase = phase(input, &inits, &init, &main);
    let over = matches!(phase, "Failed" | "Succeeded");
    if over {
        for status in init.iter_mut().chain(&mut main) {
            status.started = Some(false);
            if status.state.as_ref().is_some_and(|state| state.terminated.is_none()) {
                status.ready = false;
            }
        }
    }
    let (reason, message) = match input.failure {
        Some((reason, message)) if phase == "Failed" => (Some(reason.to_owned()), Some(message.to_owned())),
        _ if over => (old.reason.clone(), old.message.clone()),
        _ => (None, None),
    };
    let mut out = PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        host_ip: input.host_ips.first().cloned(),
        host_ips: Some(input.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect()),
        start_time: old.start_time.clone().or_else(|| Some(input.now.clone())),
        init_container_statuses: some(init),
        container_statuses: some(main),
        ephemeral_container_statuses: some(others),
        observed_generation: input.pod.metadata.generation,
        ..old.clone()
    };
    let ips = addresses(input, &spec);
    if !ips.is_empty() || !over {
        out.pod_ip = ips.first().cloned();
        out.pod_ips = some(ips.into_iter().map(|ip| PodIP { ip }).collect());
    }
    out.conditions = Some(conditions(input, &out, &inits));
    if out.qos_class.is_none() {
        out.qos_class = Some(crate::resources::Qos::of(input.pod).as_str().to_owned());
    }
    out
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn addresses(input: &Input<'_>, spec: &k8s_openapi::api::core::v1::PodSpec) -> Vec<String> {
    if spec.host_network.unwrap_or(false) {
        return if input.observed.sandboxes.is_empty() { Vec::new() } else { input.host_ips.to_vec() };
    }
    input.observed.pod_ips()
}

#[derive(Clone, Copy, PartialEq)]
enum List {
    Init,
    Main { initialized: bool },
    Ephemeral,
}

fn statuses(
    input: &Input<'_>,
    containers: &[Container],
    old: Option<&[ContainerStatus]>,
    list: List,
) -> Vec<ContainerStatus> {
    let one = |container: &Container| {
        let old = old.and_then(|old| old.iter().find(|status| status.name == container.name));
        container_status(input, container, old, list)
    };
    containers.iter().map(one).collect()
}

fn container_status(
    input: &Input<'_>,
    container: &Container,
    old: Option<&ContainerStatus>,
    list: List,
) -> ContainerStatus {
    // One that was made and not started yet has nothing to tell: it would be one more write on the way up.
    let told =
        |seen: &&Seen| seen.name() == container.name && seen.state() != v1::ContainerState::ContainerCreated;
    let seen: Vec<&Seen> = input.observed.containers.iter().filter(told).collect();
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        image_id: String::new(),
        started: Some(false),
        ..Default::default()
    };
    match seen.first() {
        Some(latest) => of_seen(input, container, latest, seen.get(1).copied(), &mut status),
        None => unseen(input, old, list, &mut status),
    }
    hold_back(input, container, seen.first().copied(), &mut status);
    if list == List::Init && !plan::is_sidecar(container) {
        // An init container is ready when it has done its work.
        let done = status.state.as_ref().and_then(|state| state.terminated.as_ref());
        status.ready = done.is_some_and(|done| done.exit_code == 0);
    }
    if list == List::Ephemeral {
        (status.ready, status.started) = (false, None);
    }
    status
}

/// A container the runtime knows.
fn of_seen(
    input: &Input<'_>,
    container: &Container,
    latest: &Seen,
    before: Option<&Seen>,
    out: &mut ContainerStatus,
) {
    let seen = &latest.status;
    out.container_id = Some(format!("{}://{}", input.runtime_name, seen.id));
    out.restart_count = i32::try_from(latest.attempt()).unwrap_or(i32::MAX);
    let user_image =
        seen.image.as_ref().map(|image| &image.user_specified_image).filter(|image| !image.is_empty());
    out.image = user_image.cloned().unwrap_or_else(|| container.image.clone().unwrap_or_default());
    out.image_id = if seen.image_ref.is_empty() { seen.image_id.clone() } else { seen.image_ref.clone() };
    out.last_state = before
        .filter(|before| before.has_exited())
        .map(|before| ContainerState { terminated: Some(terminated(input, before)), ..Default::default() });
    match latest.state() {
        v1::ContainerState::ContainerRunning if input.state.in_hook.contains(&seen.id) => {
            out.state = Some(waiting("ContainerCreating", ""));
        }
        v1::ContainerState::ContainerRunning => {
            let started_at = Some(time(seen.started_at));
            out.state = Some(ContainerState {
                running: Some(ContainerStateRunning { started_at }),
                ..Default::default()
            });
            let probe = |kind| input.probes.get(&(seen.id.clone(), kind)).copied();
            let started = container.startup_probe.is_none() || probe(ProbeKind::Startup) == Some(true);
            out.started = Some(started);
            out.ready =
                started && (container.readiness_probe.is_none() || probe(ProbeKind::Readiness) == Some(true));
            let behind = input.state.resize.behind.get(&container.name).cloned();
            out.resources = behind.or_else(|| container.resources.clone());
            out.allocated_resources =
                container.resources.as_ref().and_then(|resources| resources.requests.clone());
        }
        _ => {
            out.state =
                Some(ContainerState { terminated: Some(terminated(input, latest)), ..Default::default() });
        }
    }
    out.user = user(seen);
}

fn user(seen: &v1::ContainerStatus) -> Option<ContainerUser> {
    let linux = seen.user.as_ref()?.linux.as_ref()?;
    Some(ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: linux.uid,
            gid: linux.gid,
            supplemental_groups: some(linux.supplemental_groups.clone()),
        }),
    })
}

/// A container the runtime does not know: not made yet, or forgotten.
fn unseen(input: &Input<'_>, old: Option<&ContainerStatus>, list: List, out: &mut ContainerStatus) {
    let has_init =
        input.pod.spec.as_ref().is_some_and(|spec| spec.init_containers.iter().flatten().next().is_some());
    let reason = match list {
        List::Init => "PodInitializing",
        List::Main { initialized: false } if has_init => "PodInitializing",
        _ => "ContainerCreating",
    };
    out.state = Some(waiting(reason, ""));
    let Some(old) = old.filter(|old| old.container_id.is_some()) else { return };
    out.restart_count = old.restart_count;
    out.last_state = old.last_state.clone();
    let before = old.state.clone().unwrap_or_default();
    if let Some(ended) = before.terminated {
        (out.container_id, out.image_id) = (old.container_id.clone(), old.image_id.clone());
        out.state = Some(ContainerState { terminated: Some(ended), ..Default::default() });
    } else if before.running.is_some() {
        // It was running when last seen, and nobody knows how it ended.
        let lost = ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some("The container could not be located when the pod was terminated".to_owned()),
            ..Default::default()
        };
        let lost = ContainerState { terminated: Some(lost), ..Default::default() };
        if input.stopping {
            (out.container_id, out.image_id) = (old.container_id.clone(), old.image_id.clone());
            out.state = Some(lost);
        } else {
            out.last_state = Some(lost);
        }
    }
}

/// A container that is not running but shall be: it waits, and the reason is told.
fn hold_back(input: &Input<'_>, container: &Container, latest: Option<&Seen>, out: &mut ContainerStatus) {
    if input.stopping || latest.is_some_and(|seen| seen.is_running()) {
        return;
    }
    let ended = latest.filter(|seen| seen.has_exited());
    if ended.is_some_and(|seen| !plan::restarts(input.pod, container, &seen.status)) {
        return;
    }
    let why = input.waiting.get(&container.name).or_else(|| input.state.waiting.get(&container.name));
    let Some(why) = why else { return };
    if let Some(ended) = out.state.take().filter(|state| state.terminated.is_some()) {
        out.last_state = Some(ended);
    }
    out.state = Some(waiting(&why.reason, &why.message));
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    let message = (!message.is_empty()).then(|| message.to_owned());
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ContainerState { waiting: Some(waiting), ..Default::default() }
}

fn terminated(input: &Input<'_>, seen: &Seen) -> ContainerStateTerminated {
    let status = &seen.status;
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let message = input.state.messages.get(&status.id).map_or("", String::as_str);
    let reason = match (status.reason.as_str(), status.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (reason, _) => reason,
    };
    ContainerStateTerminated {
        container_id: Some(format!("{}://{}", input.runtime_name, status.id)),
        exit_code: status.exit_code,
        started_at: Some(time(status.started_at)),
        finished_at: Some(time(status.finished_at)),
        reason: text(reason),
        message: text(message).or_else(|| text(&status.message)),
        signal: None,
    }
}

fn time(nanos: i64) -> Time {
    Time(jiff::Timestamp::from_second(nanos.div_euclid(1_000_000_000)).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
}

/// Whether every init container is done, and every sidecar up.
fn init_done(inits: &[Container], statuses: &[ContainerStatus]) -> bool {
    inits.iter().zip(statuses).all(|(container, status)| {
        if plan::is_sidecar(container) { status.started == Some(true) } else { status.ready }
    })
}

fn phase(
    input: &Input<'_>,
    inits: &[Container],
    init: &[ContainerStatus],
    main: &[ContainerStatus],
) -> &'static str {
    let old = input.pod.status.as_ref().and_then(|status| status.phase.as_deref());
    match old {
        // A pod that has ended stays ended.
        Some("Failed") => return "Failed",
        Some("Succeeded") => return "Succeeded",
        _ => {}
    }
    let all_down = input.observed.running().next().is_none();
    if input.failure.is_some() && all_down {
        return "Failed";
    }
    let never = input.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) == Some("Never");
    let started_main = main.iter().any(|status| status.container_id.is_some());
    let mut pending_init = false;
    for (container, status) in inits.iter().zip(init) {
        let state = status.state.clone().unwrap_or_default();
        let ended = state
            .terminated
            .as_ref()
            .or(status.last_state.as_ref().and_then(|last| last.terminated.as_ref()));
        let failed = ended.is_some_and(|ended| ended.exit_code != 0) && state.running.is_none();
        if plan::is_sidecar(container) {
            pending_init |= status.started != Some(true) && !started_main;
        } else if failed && (never || input.stopping) && all_down {
            return "Failed";
        } else {
            pending_init |= !status.ready && !started_main;
        }
    }
    let (mut waiting, mut running, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for status in main {
        let state = status.state.clone().unwrap_or_default();
        if state.running.is_some() {
            running += 1;
        } else if let Some(ended) = &state.terminated {
            stopped += 1;
            succeeded += usize::from(ended.exit_code == 0);
        } else if status.last_state.as_ref().is_some_and(|last| last.terminated.is_some()) {
            stopped += 1;
        } else {
            waiting += 1;
        }
    }
    if pending_init || (waiting > 0 && !input.stopping) || (running == 0 && stopped == 0) {
        return "Pending";
    }
    let for_good = |(container, status): (&Container, &ContainerStatus)| {
        let ended = status.state.as_ref().and_then(|state| state.terminated.as_ref());
        ended.is_some_and(|ended| {
            let exit = v1::ContainerStatus { exit_code: ended.exit_code, ..Default::default() };
            input.stopping || !plan::restarts(input.pod, container, &exit)
        })
    };
    let containers = input.pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let over = running == 0 && all_down && containers.iter().zip(main).all(for_good);
    match (over, stopped == succeeded) {
        (false, _) => "Running",
        (true, true) => "Succeeded",
        (true, false) => "Failed",
    }
}

/// The conditions the kubelet owns, put between those of others.
fn conditions(input: &Input<'_>, status: &PodStatus, inits: &[Container]) -> Vec<PodCondition> {
    let old = input.pod.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let mut own = vec![
        sandbox_condition(input),
        initialized_condition(status, inits),
        ready_condition(input, status),
        containers_condition("ContainersReady", input, status, inits),
        condition("PodScheduled", true, None, None),
    ];
    own.extend(input.state.resize.conditions());
    let is_own = |kind: &str| {
        own.iter().any(|own| own.type_ == kind) || [resize::PENDING, resize::IN_PROGRESS].contains(&kind)
    };
    let mut out: Vec<PodCondition> = old.iter().filter(|have| !is_own(&have.type_)).cloned().collect();
    for mut condition in own {
        let before = old.iter().find(|have| have.type_ == condition.type_);
        let same = before.filter(|before| before.status == condition.status);
        condition.last_transition_time =
            same.and_then(|same| same.last_transition_time.clone()).or_else(|| Some(input.now.clone()));
        condition.observed_generation = input.pod.metadata.generation;
        out.push(condition);
    }
    out.sort_by_key(|condition| order(&condition.type_));
    out
}

/// Upstream's order, others before.
fn order(kind: &str) -> usize {
    let own = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];
    own.iter().position(|own| *own == kind).map_or(0, |index| index + 1)
}

fn condition(kind: &str, holds: bool, reason: Option<&str>, message: Option<String>) -> PodCondition {
    PodCondition {
        type_: kind.to_owned(),
        status: if holds { "True" } else { "False" }.to_owned(),
        reason: reason.map(str::to_owned),
        message,
        ..Default::default()
    }
}

fn sandbox_condition(input: &Input<'_>) -> PodCondition {
    let host_network = input.pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    let ready =
        input.observed.live_sandbox().is_some() && (host_network || !input.observed.pod_ips().is_empty());
    condition("PodReadyToStartContainers", ready, None, None)
}

fn initialized_condition(status: &PodStatus, inits: &[Container]) -> PodCondition {
    let statuses = status.init_container_statuses.as_deref().unwrap_or_default();
    if status.phase.as_deref() == Some("Succeeded") {
        return condition("Initialized", true, Some("PodCompleted"), None);
    }
    let main_ran = status.container_statuses.iter().flatten().any(|status| status.container_id.is_some());
    let incomplete: Vec<&str> = inits
        .iter()
        .zip(statuses)
        .filter(|(container, status)| match plan::is_sidecar(container) {
            true => status.started != Some(true) && !main_ran,
            false => !status.ready && !main_ran,
        })
        .map(|(container, _)| container.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return condition("Initialized", true, None, None);
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    condition("Initialized", false, Some("ContainersNotInitialized"), Some(message))
}

fn containers_condition(
    kind: &str,
    input: &Input<'_>,
    status: &PodStatus,
    inits: &[Container],
) -> PodCondition {
    match status.phase.as_deref() {
        Some("Succeeded") => return condition(kind, false, Some("PodCompleted"), None),
        Some("Failed") => return condition(kind, false, Some("PodFailed"), None),
        _ => {}
    }
    let sidecars = inits.iter().zip(status.init_container_statuses.iter().flatten());
    let sidecars = sidecars.filter(|(container, _)| plan::is_sidecar(container)).map(|(_, status)| status);
    let all = sidecars.chain(status.container_statuses.iter().flatten());
    let unready: Vec<&str> = all.filter(|status| !status.ready).map(|status| status.name.as_str()).collect();
    // A pod being stopped serves no more, though its containers may still answer.
    let _ = input;
    if unready.is_empty() {
        return condition(kind, true, None, None);
    }
    let message = format!("containers with unready status: [{}]", unready.join(" "));
    condition(kind, false, Some("ContainersNotReady"), Some(message))
}

fn ready_condition(input: &Input<'_>, status: &PodStatus) -> PodCondition {
    let spec = input.pod.spec.as_ref();
    let inits = spec.and_then(|spec| spec.init_containers.clone()).unwrap_or_default();
    let containers = containers_condition("Ready", input, status, &inits);
    if containers.status != "True" {
        return containers;
    }
    let conditions =
        input.pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let mut unmet = Vec::new();
    for gate in spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten()) {
        let kind = &gate.condition_type;
        match conditions.iter().find(|condition| condition.type_ == *kind) {
            None => {
                unmet.push(format!("corresponding condition of pod readiness gate {kind:?} does not exist."))
            }
            Some(found) if found.status != "True" => unmet.push(format!(
                "the status of pod readiness gate {kind:?} is not \"True\", but {}",
                found.status
            )),
            Some(_) => {}
        }
    }
    if unmet.is_empty() {
        return containers;
    }
    condition("Ready", false, Some("ReadinessGatesNotReady"), Some(unmet.join(", ")))
}
