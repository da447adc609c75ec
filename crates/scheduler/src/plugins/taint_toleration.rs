//! TaintToleration: taints keep pods away that do not tolerate them; `PreferNoSchedule` only lowers the score.

use super::{Cycle, Plugin, Scale, Score, Verdict};
use crate::pod::PodInfo;
use crate::table::Slot;
use k8s_openapi::api::core::v1::Taint;
use knarr_client::placement;

pub const PLUGIN: Plugin = Plugin {
    name: "TaintToleration",
    prepare: None,
    filter: Some(filter),
    score: Some(Score { weight: 3, raw: score, scale: Scale::Reversed }),
    wakes: |event, _| event.node_added || event.node_taints,
};

fn filter(cycle: &Cycle, slot: Slot) -> Verdict {
    let blocking = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
    let mut taints = cycle.table.taints[slot].iter().filter(blocking);
    match taints.find(|taint| !tolerates(cycle.pod, taint)) {
        None => Verdict::Fits,
        Some(taint) => {
            let value = taint.value.as_deref().unwrap_or_default();
            Verdict::hopeless(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key))
        }
    }
}

/// The number of soft taints the pod does not tolerate.
fn score(cycle: &Cycle, slot: Slot) -> i64 {
    let soft = cycle.table.taints[slot].iter().filter(|taint| taint.effect == "PreferNoSchedule");
    soft.filter(|taint| !tolerates(cycle.pod, taint)).count() as i64
}

/// Whether any toleration of the pod covers the taint.
pub fn tolerates(pod: &PodInfo, taint: &Taint) -> bool {
    let tolerations = pod.pod.spec.as_ref().and_then(|spec| spec.tolerations.as_ref());
    placement::tolerates(tolerations, taint)
}
