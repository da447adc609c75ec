//! `describe` of what bounds a namespace: quotas and limit ranges, by themselves and as part of their namespace.

use knarr_api::object::Object;
use serde_json::{Map, Value};

use super::Doc;

const LIMIT_HEADS: &str = "Type\tResource\tMin\tMax\tDefault Request\tDefault Limit\tMax Limit/Request Ratio";
const LIMIT_RULES: &str = "----\t--------\t---\t---\t---------------\t-------------\t-----------------------";
/// In the order of the columns.
const LIMITS: [&str; 5] = ["min", "max", "defaultRequest", "default", "maxLimitRequestRatio"];

pub fn quota(object: &Value, doc: &mut Doc) {
    doc.field(0, "Name", object.name());
    doc.field(0, "Namespace", object.namespace());
    scopes(object, doc, 0, " * ");
    doc.line(0, "Resource\tUsed\tHard");
    doc.line(0, "--------\t----\t----");
    used_and_hard(object, doc, 0);
}

/// All quotas of a namespace.
pub fn quotas(quotas: &[Value], doc: &mut Doc) {
    if quotas.is_empty() {
        return doc.line(0, "No resource quota.");
    }
    doc.line(0, "Resource Quotas");
    let mut sorted: Vec<&Value> = quotas.iter().collect();
    sorted.sort_by_key(|quota| quota.name());
    for quota in sorted {
        doc.field(1, "Name", quota.name());
        scopes(quota, doc, 1, "* ");
        doc.line(1, "Resource\tUsed\tHard");
        doc.line(1, "--------\t---\t---");
        used_and_hard(quota, doc, 1);
    }
}

fn scopes(quota: &Value, doc: &mut Doc, level: usize, bullet: &str) {
    let mut scopes: Vec<&str> = quota.list_at("spec.scopes").iter().filter_map(Value::as_str).collect();
    if scopes.is_empty() {
        return;
    }
    scopes.sort_unstable();
    doc.field(level, "Scopes", scopes.join(", "));
    for help in scopes.iter().filter_map(|scope| scope_help(scope)) {
        doc.line(level, &format!("{bullet}{help}"));
    }
}

fn scope_help(scope: &str) -> Option<&'static str> {
    Some(match scope {
        "Terminating" => {
            "Matches all pods that have an active deadline. These pods have a limited lifespan on a node before being actively terminated by the system."
        }
        "NotTerminating" => {
            "Matches all pods that do not have an active deadline. These pods usually include long running pods whose container command is not expected to terminate."
        }
        "BestEffort" => {
            "Matches all pods that do not have resource requirements set. These pods have a best effort quality of service."
        }
        "NotBestEffort" => {
            "Matches all pods that have at least one resource requirement set. These pods have a burstable or guaranteed quality of service."
        }
        _ => return None,
    })
}

fn used_and_hard(quota: &Value, doc: &mut Doc, level: usize) {
    let used = quota.map_at("status.used");
    let mut hard: Vec<_> = quota.map_at("status.hard").into_iter().flatten().collect();
    hard.sort_unstable_by_key(|(resource, _)| *resource);
    for (resource, hard) in hard {
        let used = used.and_then(|used| used.get(resource)).map_or("0".to_owned(), crate::jsonpath::print);
        doc.line(level, &format!("{resource}\t{used}\t{}", crate::jsonpath::print(hard)));
    }
}

pub fn limit_range(object: &Value, doc: &mut Doc) {
    doc.field(0, "Name", object.name());
    doc.field(0, "Namespace", object.namespace());
    doc.line(0, LIMIT_HEADS);
    doc.line(0, LIMIT_RULES);
    limits(object, doc, "");
}

/// All limit ranges of a namespace.
pub fn limit_ranges(ranges: &[Value], doc: &mut Doc) {
    if ranges.is_empty() {
        return doc.line(0, "No LimitRange resource.");
    }
    doc.line(0, "Resource Limits");
    doc.line(0, &format!(" {LIMIT_HEADS}"));
    doc.line(0, &format!(" {LIMIT_RULES}"));
    ranges.iter().for_each(|range| limits(range, doc, " "));
}

/// A row for each resource that an item bounds in any way.
fn limits(range: &Value, doc: &mut Doc, indent: &str) {
    for item in range.list_at("spec.limits") {
        let maps: Vec<Option<&Map<String, Value>>> = LIMITS.iter().map(|limit| item.map_at(limit)).collect();
        let mut resources: Vec<&String> = maps.iter().flatten().flat_map(|map| map.keys()).collect();
        resources.sort_unstable();
        resources.dedup();
        for resource in resources {
            let cell = |map: &Option<&Map<String, Value>>| {
                map.and_then(|map| map.get(resource)).map_or("-".to_owned(), crate::jsonpath::print)
            };
            let cells: Vec<String> = maps.iter().map(cell).collect();
            doc.line(0, &format!("{indent}{}\t{resource}\t{}", item.str_at("type"), cells.join("\t")));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{DESCRIBE, align};
    use super::*;

    fn printed(tell: impl Fn(&mut Doc)) -> String {
        let mut doc = Doc::default();
        tell(&mut doc);
        align(&doc.text, DESCRIBE)
    }

    #[test]
    fn a_quota_reads_as_upstream_prints_it() {
        let object = json!({ "metadata": { "name": "few", "namespace": "shop" }, "spec": { "scopes": ["BestEffort"] },
            "status": { "hard": { "services": "5", "pods": "2" }, "used": { "pods": "1" } } });
        let text = "Name:       few\nNamespace:  shop\nScopes:     BestEffort\n * Matches all pods that do not have resource requirements set. These pods have a best effort quality of service.\nResource  Used  Hard\n--------  ----  ----\npods      1     2\nservices  0     5\n";
        let given = printed(|doc| quota(&object, doc));
        assert_eq!(given.split_whitespace().collect::<Vec<_>>(), text.split_whitespace().collect::<Vec<_>>(), "{given}");
        assert_eq!(printed(|doc| quotas(&[], doc)), "No resource quota.\n");
    }

    #[test]
    fn a_limit_range_has_a_row_for_each_resource() {
        let object = json!({ "metadata": { "name": "sizes", "namespace": "shop" }, "spec": { "limits": [
            { "type": "Container", "max": { "cpu": "1" }, "default": { "cpu": "500m", "memory": "1Gi" } }] } });
        let given = printed(|doc| limit_range(&object, doc));
        let rows: Vec<Vec<&str>> = given.lines().skip(4).map(|line| line.split_whitespace().collect()).collect();
        let wanted =
            [["Container", "cpu", "-", "1", "-", "500m", "-"], ["Container", "memory", "-", "-", "-", "1Gi", "-"]];
        assert_eq!(rows, wanted, "{given}");
    }
}
