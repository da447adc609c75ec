//! The user's rules: which failures end the job or do not count (pod failure policy), and when enough has succeeded
//! (success policy).

use super::{Turn, indexes::Indexes};
use k8s_openapi::api::batch::v1::{PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::Pod;
use knarr_client::ObjectKey;

/// What a failed pod means.
#[derive(Clone, Debug, PartialEq)]
pub enum Meaning {
    /// One more failure.
    Count,
    /// No failure of the job's: not counted.
    Ignore,
    /// The job has failed, with this message.
    FailJob(String),
    /// The pod's index has failed.
    FailIndex,
}

/// The first rule that matches a failed pod decides; without any the failure counts.
pub fn meaning(turn: &Turn, pod: &Pod) -> Meaning {
    let rules =
        turn.spec.pod_failure_policy.as_ref().map(|policy| policy.rules.as_slice()).unwrap_or_default();
    for (index, rule) in rules.iter().enumerate() {
        let Some(what) = matches(rule, pod) else { continue };
        return match rule.action.as_str() {
            "FailJob" => Meaning::FailJob(format!("{what} matching FailJob rule at index {index}")),
            "Ignore" => Meaning::Ignore,
            "FailIndex" => Meaning::FailIndex,
            _ => Meaning::Count,
        };
    }
    Meaning::Count
}

/// What in the pod matches the rule, in words.
fn matches(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<String> {
    let key = ObjectKey::of(pod);
    if let Some(requirement) = &rule.on_exit_codes {
        return exit_code(requirement, pod).map(|(container, code)| {
            format!("Container {container} for pod {key} failed with exit code {code}")
        });
    }
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let patterns = rule.on_pod_conditions.iter().flatten();
    let mut found = patterns.filter(|pattern| {
        let wanted = pattern.status.as_deref().unwrap_or("True");
        conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == pattern.type_ && condition.status == wanted)
    });
    found.next().map(|pattern| format!("Pod {key} has condition {}", pattern.type_))
}

fn exit_code(requirement: &PodFailurePolicyOnExitCodesRequirement, pod: &Pod) -> Option<(String, i32)> {
    let status = pod.status.as_ref()?;
    let all =
        status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
    let ended = all.filter_map(|status| {
        let code = status.state.as_ref()?.terminated.as_ref()?.exit_code;
        let named = requirement.container_name.as_ref().is_none_or(|name| *name == status.name);
        (named && code != 0).then(|| (status.name.clone(), code))
    });
    let wanted = |code: i32| requirement.values.contains(&code) == (requirement.operator == "In");
    ended.into_iter().find(|(_, code)| wanted(*code))
}

/// The first rule of the success policy that is met, in words.
pub fn success(turn: &Turn, completed: &Indexes) -> Option<String> {
    let completions = turn.completions_if_indexed()?;
    let rules = turn.spec.success_policy.as_ref()?.rules.iter().enumerate();
    let met = |rule: &k8s_openapi::api::batch::v1::SuccessPolicyRule| {
        let wanted = rule.succeeded_indexes.as_deref().map(|text| Indexes::parse(text, completions));
        let (succeeded, all) = match &wanted {
            Some(wanted) => (wanted.common(completed), wanted.len()),
            None => (completed.len(), completions as usize),
        };
        succeeded >= rule.succeeded_count.map_or(all, |count| usize::try_from(count).unwrap_or(0))
    };
    rules.into_iter().find(|(_, rule)| met(rule)).map(|(index, _)| format!("Matched rules at index {index}"))
}
