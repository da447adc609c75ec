//! Counting ended pods exactly once, in three steps that each survive a crash: the status lists an ended pod as
//! uncounted; the pod loses its finalizer; the counter goes up and the pod leaves the list. An indexed job's set of
//! completed indexes is its own list.

use super::finish::{self, Verdict};
use super::indexes::Indexes;
use super::policy::{self, Meaning};
use super::{FINALIZER, Jobs, Turn, failures_before, index_of, is_tracked};
use crate::pods;
use futures::future::join_all;
use k8s_openapi::api::batch::v1::{Job, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use knarr_client::patch::{self, Guard};
use knarr_client::{EventType, ObjectKey, Result};
use kube::api::Api;
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What there is of a job's pods.
#[derive(Default)]
pub struct Tally {
    pub active: Vec<Arc<Pod>>,
    pub terminating: usize,
    /// Counted, listed as uncounted, or ended and not listed yet.
    pub succeeded: i32,
    pub failed: i32,
    pub completed_indexes: Indexes,
    /// With a limit per index only.
    pub failed_indexes: Option<Indexes>,
}

impl Tally {
    /// Succeeded or failed for good.
    pub fn is_done(&self, index: i32) -> bool {
        self.completed_indexes.contains(index)
            || self.failed_indexes.as_ref().is_some_and(|failed| failed.contains(index))
    }

    /// Indexes that need a pod, lowest first.
    pub fn pending_indexes(&self, turn: &Turn, completions: i32) -> Vec<i32> {
        let held = |pod: &Arc<Pod>| {
            turn.replaces_only_failed() && pods::is_terminating(pod) && !pods::is_finished(pod)
        };
        let ending = turn.pods.iter().filter(|pod| held(pod));
        let taken: HashSet<i32> = self.active.iter().chain(ending).filter_map(|pod| index_of(pod)).collect();
        (0..completions).filter(|index| !taken.contains(index) && !self.is_done(*index)).collect()
    }
}

/// Whether a pod counts as failed already: a terminating one does, unless only ended pods are to be replaced.
pub fn counts_as_failed(turn: &Turn, pod: &Pod) -> bool {
    match pods::phase(pod) {
        "Failed" => true,
        "Succeeded" => false,
        _ => pods::is_terminating(pod) && !turn.replaces_only_failed(),
    }
}

pub fn tally(turn: &Turn) -> Tally {
    let completions = turn.completions_if_indexed();
    let listed =
        |list: Option<&Vec<String>>| list.cloned().unwrap_or_default().into_iter().collect::<HashSet<_>>();
    let uncounted = turn.status.uncounted_terminated_pods.clone().unwrap_or_default();
    let (listed_succeeded, listed_failed) =
        (listed(uncounted.succeeded.as_ref()), listed(uncounted.failed.as_ref()));
    let mut tally = Tally {
        succeeded: turn.status.succeeded.unwrap_or(0) + listed_succeeded.len() as i32,
        failed: turn.status.failed.unwrap_or(0) + listed_failed.len() as i32,
        ..Tally::default()
    };
    if let Some(completions) = completions {
        let text = turn.status.completed_indexes.as_deref().unwrap_or_default();
        tally.completed_indexes = Indexes::parse(text, completions);
    }
    for pod in &turn.pods {
        let uid = pods::uid(&pod.metadata);
        let fresh = is_tracked(pod) && !listed_succeeded.contains(uid) && !listed_failed.contains(uid);
        if pods::is_active(pod) {
            tally.active.push(pod.clone());
        } else if !pods::is_finished(pod) {
            tally.terminating += 1;
        }
        if pods::phase(pod) == "Succeeded" {
            match (completions, index_of(pod)) {
                (Some(completions), Some(index)) if index < completions && is_tracked(pod) => {
                    tally.completed_indexes.insert(index);
                }
                (Some(_), _) => {}
                (None, _) => tally.succeeded += i32::from(fresh),
            }
        } else if counts_as_failed(turn, pod) && fresh && policy::meaning(turn, pod) != Meaning::Ignore {
            tally.failed += 1;
        }
    }
    if completions.is_some() {
        tally.succeeded = tally.completed_indexes.len() as i32;
    }
    tally.failed_indexes = failed_indexes(turn, &tally.completed_indexes);
    tally
}

fn failed_indexes(turn: &Turn, completed: &Indexes) -> Option<Indexes> {
    let limit = turn.spec.backoff_limit_per_index?;
    let completions = turn.completions_if_indexed()?;
    let mut failed = Indexes::parse(turn.status.failed_indexes.as_deref().unwrap_or_default(), completions);
    for pod in turn.pods.iter().filter(|pod| counts_as_failed(turn, pod)) {
        let Some(index) = index_of(pod).filter(|index| *index < completions && !completed.contains(*index))
        else {
            continue;
        };
        match policy::meaning(turn, pod) {
            Meaning::Ignore => {}
            Meaning::FailIndex => _ = failed.insert(index),
            _ if failures_before(pod) + 1 > limit => _ = failed.insert(index),
            _ => {}
        }
    }
    Some(failed)
}

impl Jobs {
    /// Moves the counting one step on and writes the status.
    pub(super) async fn account(
        &self,
        turn: &mut Turn,
        tally: &Tally,
        verdict: Option<&Verdict>,
    ) -> Result<()> {
        let mut list = turn.status.uncounted_terminated_pods.take().unwrap_or_default();
        self.count_untracked(turn, &mut list);
        let untrack = list_ended(turn, tally, &mut list, verdict);
        let tidy = |list: Option<Vec<String>>| list.filter(|list| !list.is_empty());
        turn.status.uncounted_terminated_pods =
            Some(UncountedTerminatedPods { succeeded: tidy(list.succeeded), failed: tidy(list.failed) });
        if turn.completions_if_indexed().is_some() {
            let text = tally.completed_indexes.text();
            turn.status.completed_indexes = Some(text).filter(|text| !text.is_empty());
            turn.status.succeeded = Some(tally.completed_indexes.len() as i32).filter(|count| *count > 0);
        }
        if let Some(failed) = &tally.failed_indexes {
            // Present, if empty, wherever there is a limit per index.
            turn.status.failed_indexes = Some(failed.text());
        }
        let finished = verdict.filter(|_| finish::may_finish(turn) && untrack.is_empty()).cloned();
        if let Some(verdict) = &finished {
            finish::note_final(turn, verdict);
            (turn.status.ready, turn.status.terminating) = (Some(0), Some(0));
        }
        self.write_status(turn).await?;
        if let Some(verdict) = finished {
            self.tell(turn, &verdict);
        }
        self.untrack_all(&untrack).await
    }

    /// Counts the listed pods that have lost their finalizer.
    fn count_untracked(&self, turn: &mut Turn, list: &mut UncountedTerminatedPods) {
        let tracked: HashSet<&str> =
            turn.pods.iter().filter(|pod| is_tracked(pod)).map(|pod| pods::uid(&pod.metadata)).collect();
        let count = |uids: &mut Option<Vec<String>>, counter: &mut Option<i32>| {
            let before = uids.as_ref().map_or(0, Vec::len);
            if let Some(uids) = uids {
                uids.retain(|uid| tracked.contains(uid.as_str()));
            }
            let counted = before - uids.as_ref().map_or(0, Vec::len);
            if counted > 0 {
                *counter = Some(counter.unwrap_or(0) + counted as i32);
            }
        };
        count(&mut list.succeeded, &mut turn.status.succeeded);
        count(&mut list.failed, &mut turn.status.failed);
    }

    async fn write_status(&self, turn: &Turn) -> Result<()> {
        let api = self.api(&turn.key);
        // Guarded by the version: counting from an old status would count twice.
        let written =
            patch::write_status(&api, &*turn.job, &turn.job.status, &turn.status, Guard::Version).await;
        let written = match written {
            Err(error) if error.is_not_found() => None,
            written => written?,
        };
        let version = written.and_then(|job| job.metadata.resource_version?.parse::<u64>().ok());
        if let Some(version) = version {
            self.written.lock().insert(turn.key.clone(), version);
        }
        Ok(())
    }

    fn tell(&self, turn: &Turn, verdict: &Verdict) {
        if verdict.succeeded {
            self.recorder.event(&*turn.job, EventType::Normal, "Completed", "Job completed");
        } else {
            self.recorder.event(&*turn.job, EventType::Warning, &verdict.reason, verdict.message.clone());
        }
    }

    /// Takes the finalizer off pods that name this key's job but belong to another of that name, or to none.
    pub(super) async fn untrack_strangers(&self, key: &ObjectKey, job: Option<&Job>) -> Result<()> {
        let mut strangers = self.family.pods.by_index(super::TRACKED, &key.to_string());
        let uid = job.map(|job| pods::uid(&job.metadata)).unwrap_or_default();
        strangers.retain(|pod| !knarr_client::owner::is_controlled_by(&pod.metadata, uid));
        self.untrack_all(&strangers).await
    }

    pub(super) async fn untrack_all(&self, pods: &[Arc<Pod>]) -> Result<()> {
        join_all(pods.iter().map(|pod| self.untrack(pod))).await.into_iter().collect()
    }

    pub(super) async fn untrack(&self, pod: &Pod) -> Result<()> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), namespace);
        patch::remove_finalizer(&api, pod, FINALIZER).await.map(|_| ())
    }

    pub(super) async fn track(&self, pod: Pod) -> Result<Pod> {
        if is_tracked(&pod) || pods::is_finished(&pod) {
            return Ok(pod);
        }
        let key = ObjectKey::of(&pod);
        let mut finalizers = pod.metadata.finalizers.clone().unwrap_or_default();
        finalizers.push(FINALIZER.to_owned());
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &key.namespace);
        let change = json!({"metadata": {
            "uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version, "finalizers": finalizers,
        }});
        patch::merge(&api, &key.name, change).await
    }
}

/// Lists ended pods as uncounted; returns the pods that may lose their finalizer once the status is written.
fn list_ended(
    turn: &Turn,
    tally: &Tally,
    list: &mut UncountedTerminatedPods,
    verdict: Option<&Verdict>,
) -> Vec<Arc<Pod>> {
    let over = verdict.is_some() || turn.job.metadata.deletion_timestamp.is_some();
    let failed_verdict = verdict.is_some_and(|verdict| !verdict.succeeded);
    let kept = kept_for_replacement(turn, tally, over);
    let mut untrack = Vec::new();
    for pod in turn.pods.iter().filter(|pod| is_tracked(pod)) {
        let uid = pods::uid(&pod.metadata).to_owned();
        let known = |uids: &Option<Vec<String>>| uids.iter().flatten().any(|known| *known == uid);
        let indexed = turn.completions_if_indexed();
        let valid_index =
            indexed.is_none_or(|completions| index_of(pod).is_some_and(|index| index < completions));
        if known(&list.succeeded) || known(&list.failed) {
            untrack.push(pod.clone());
        } else if pods::phase(pod) == "Succeeded" {
            if indexed.is_none() {
                list.succeeded.get_or_insert_default().push(uid);
            }
            untrack.push(pod.clone());
        } else if counts_as_failed(turn, pod) || (failed_verdict && pods::is_terminating(pod)) {
            if kept.contains(pods::uid(&pod.metadata)) {
                continue;
            }
            if valid_index && policy::meaning(turn, pod) != Meaning::Ignore {
                list.failed.get_or_insert_default().push(uid);
            }
            untrack.push(pod.clone());
        } else if over && pods::is_terminating(pod) {
            untrack.push(pod.clone());
        }
    }
    untrack
}

/// With a limit per index the newest failed pod of an unfinished index says how often the index failed: it stays
/// tracked until its replacement carries the number on. In a namespace that is going away there will be none.
fn kept_for_replacement(turn: &Turn, tally: &Tally, over: bool) -> HashSet<String> {
    let mut newest: HashMap<i32, &Arc<Pod>> = HashMap::new();
    if over || turn.is_last || turn.spec.backoff_limit_per_index.is_none() {
        return HashSet::new();
    }
    let replaced: HashSet<i32> = tally.active.iter().filter_map(|pod| index_of(pod)).collect();
    for pod in turn.pods.iter().filter(|pod| counts_as_failed(turn, pod)) {
        let Some(index) = index_of(pod).filter(|index| !replaced.contains(index) && !tally.is_done(*index))
        else {
            continue;
        };
        let best = newest.entry(index).or_insert(pod);
        if failures_before(pod) > failures_before(best) {
            *best = pod;
        }
    }
    newest.into_values().map(|pod| pods::uid(&pod.metadata).to_owned()).collect()
}
