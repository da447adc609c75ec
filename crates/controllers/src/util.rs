//! Condition lists, hashes and counts that several loops need.

use k8s_openapi::api::apps::v1::{DaemonSetCondition, DeploymentCondition, ReplicaSetCondition};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscalerCondition;
use k8s_openapi::api::batch::v1::JobCondition;
use k8s_openapi::api::certificates::v1::CertificateSigningRequestCondition;
use k8s_openapi::api::core::v1::{NamespaceCondition, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;

/// The letters upstream uses in generated names: no vowels, no look-alikes.
const SAFE_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// A condition of any kind: what a list of them is searched by.
pub trait Condition {
    fn type_(&self) -> &str;
    fn status(&self) -> &str;
}

macro_rules! conditions {
    ($($kind:ty),*) => {$(
        impl Condition for $kind {
            fn type_(&self) -> &str {
                &self.type_
            }
            fn status(&self) -> &str {
                &self.status
            }
        }
    )*};
}

conditions!(
    DeploymentCondition,
    ReplicaSetCondition,
    DaemonSetCondition,
    JobCondition,
    HorizontalPodAutoscalerCondition,
    CertificateSigningRequestCondition,
    NamespaceCondition,
    k8s_openapi::api::core::v1::PodCondition,
    k8s_openapi::api::core::v1::NodeCondition
);

/// The condition of `type_`.
pub fn find<'a, C: Condition>(conditions: &'a Option<Vec<C>>, type_: &str) -> Option<&'a C> {
    conditions.iter().flatten().find(|condition| condition.type_() == type_)
}

/// Whether the condition of `type_` is `True`.
pub fn is_true<C: Condition>(conditions: &Option<Vec<C>>, type_: &str) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.status() == "True")
}

/// Removes the condition of `type_`; an emptied list disappears.
pub fn remove<C: Condition>(conditions: &mut Option<Vec<C>>, type_: &str) {
    if let Some(list) = conditions {
        list.retain(|condition| condition.type_() != type_);
        if list.is_empty() {
            *conditions = None;
        }
    }
}

/// The hash a controller names its children by: of the template and, after a collision, a counter.
pub fn template_hash(template: &impl Serialize, collision_count: Option<i32>) -> String {
    let mut hash = Fnv::default();
    hash.write(&serde_json::to_vec(template).unwrap_or_default());
    if let Some(count) = collision_count {
        hash.write(&count.to_le_bytes());
    }
    safe_encode(&hash.0.to_string())
}

/// Maps each character to a letter that is safe in names.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|byte| char::from(SAFE_LETTERS[usize::from(byte) % SAFE_LETTERS.len()])).collect()
}

/// FNV-1a, 32 bits.
struct Fnv(u32);

impl Default for Fnv {
    fn default() -> Self {
        Fnv(0x811c_9dc5)
    }
}

impl Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    }
}

/// Whether two templates wish for the same pods: labels a controller added (`hash_label`) do not count, absent and
/// empty labels and annotations are the same.
pub fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec, hash_label: &str) -> bool {
    normal(a, hash_label) == normal(b, hash_label)
}

fn normal(template: &PodTemplateSpec, hash_label: &str) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    if let Some(labels) = &mut meta.labels {
        labels.remove(hash_label);
    }
    meta.labels = meta.labels.take().filter(|labels| !labels.is_empty());
    meta.annotations = meta.annotations.take().filter(|annotations| !annotations.is_empty());
    meta.creation_timestamp = None;
    template
}

/// A count or a percentage of `total`, which is rounded up or down. An unreadable percentage counts as zero.
pub fn scaled(value: &IntOrString, total: i32, round_up: bool) -> i32 {
    match value {
        IntOrString::Int(count) => *count,
        IntOrString::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let hundredfold = percent * i64::from(total);
            let rounded =
                if round_up { (hundredfold + 99).div_euclid(100) } else { hundredfold.div_euclid(100) };
            i32::try_from(rounded).unwrap_or(i32::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_round_as_told() {
        let quarter = IntOrString::String("25%".into());
        assert_eq!((scaled(&quarter, 10, true), scaled(&quarter, 10, false)), (3, 2));
        assert_eq!(scaled(&IntOrString::Int(4), 10, true), 4);
    }

    #[test]
    fn hashes_are_safe_names_and_change_with_the_collision_count() {
        let template = PodTemplateSpec::default();
        let (plain, bumped) = (template_hash(&template, None), template_hash(&template, Some(1)));
        assert_ne!(plain, bumped);
        assert!(plain.bytes().all(|byte| SAFE_LETTERS.contains(&byte)));
    }
}
