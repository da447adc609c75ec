//! The flow schemas and priority levels of every cluster: the mandatory ones and those upstream suggests
//! (`apiserver/pkg/apis/flowcontrol/bootstrap`). They are data here: nothing limits requests by them yet.

use serde_json::{Value, json};

/// Name, shares of concurrency, percentage that may be lent, queues (0 for none: requests are refused).
const LEVELS: &[(&str, u32, u32, [u32; 3])] = &[
    ("catch-all", 5, 0, [0; 3]),
    ("system", 30, 33, [64, 6, 50]),
    ("node-high", 40, 25, [64, 6, 50]),
    ("leader-election", 10, 0, [16, 4, 50]),
    ("workload-high", 40, 50, [128, 6, 50]),
    ("workload-low", 100, 90, [128, 6, 50]),
    ("global-default", 20, 50, [128, 6, 50]),
];

pub fn priority_levels() -> Vec<Value> {
    let exempt = json!({ "metadata": { "name": "exempt" }, "spec": {
        "type": "Exempt", "exempt": { "nominalConcurrencyShares": 0, "lendablePercent": 0 } } });
    let limited = LEVELS.iter().map(|(name, shares, lent, [queues, hand, length])| {
        let response = match queues {
            0 => json!({ "type": "Reject" }),
            _ => json!({ "type": "Queue", "queuing": {
                "queues": queues, "handSize": hand, "queueLengthLimit": length } }),
        };
        json!({ "metadata": { "name": name }, "spec": { "type": "Limited", "limited": {
            "nominalConcurrencyShares": shares, "lendablePercent": lent, "limitResponse": response } } })
    });
    std::iter::once(exempt).chain(limited).collect()
}

pub fn flow_schemas() -> Vec<Value> {
    let all = || json!({ "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": true });
    let paths = |paths: &[&str]| json!({ "verbs": ["*"], "nonResourceURLs": paths });
    let leases = || {
        json!({ "verbs": ["get", "create", "update"], "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"], "namespaces": ["*"] })
    };
    let user = |name: &str| json!({ "kind": "User", "user": { "name": name } });
    let group = |name: &str| json!({ "kind": "Group", "group": { "name": name } });
    let account = |namespace: &str, name: &str| json!({ "kind": "ServiceAccount", "serviceAccount": { "namespace": namespace, "name": name } });
    let everybody = || json!([group("system:unauthenticated"), group("system:authenticated")]);
    let schema = |name: &str, level: &str, precedence: u32, by: &str, rule: Value| {
        let mut spec = json!({ "priorityLevelConfiguration": { "name": level },
            "matchingPrecedence": precedence, "rules": [rule] });
        if !by.is_empty() {
            spec["distinguisherMethod"] = json!({ "type": by });
        }
        json!({ "metadata": { "name": name }, "spec": spec })
    };
    let rule = |subjects: Value, resources: Vec<Value>, others: Vec<Value>| {
        let mut rule = json!({ "subjects": subjects });
        if !resources.is_empty() {
            rule["resourceRules"] = Value::Array(resources);
        }
        if !others.is_empty() {
            rule["nonResourceRules"] = Value::Array(others);
        }
        rule
    };
    let node_high = vec![
        json!({ "verbs": ["*"], "apiGroups": [""], "resources": ["nodes", "nodes/status"], "namespaces": ["*"], "clusterScope": true }),
        json!({ "verbs": ["*"], "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "namespaces": ["*"] }),
    ];
    let endpoints = vec![
        json!({ "verbs": ["get", "create", "update"], "apiGroups": [""], "resources": ["endpoints"], "namespaces": ["*"] }),
        json!({ "verbs": ["get", "create", "update"], "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "namespaces": ["*"] }),
    ];
    let manager = || user("system:kube-controller-manager");
    vec![
        schema(
            "exempt",
            "exempt",
            1,
            "",
            rule(json!([group("system:masters")]), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "probes",
            "exempt",
            2,
            "",
            rule(
                everybody(),
                vec![],
                vec![json!({ "verbs": ["get"],
            "nonResourceURLs": ["/healthz", "/readyz", "/livez"] })],
            ),
        ),
        schema(
            "system-leader-election",
            "leader-election",
            100,
            "ByUser",
            rule(
                json!([manager(), user("system:kube-scheduler"), account("kube-system", "*")]),
                vec![leases()],
                vec![],
            ),
        ),
        schema(
            "endpoint-controller",
            "workload-high",
            150,
            "ByUser",
            rule(
                json!([
                    manager(),
                    account("kube-system", "endpoint-controller"),
                    account("kube-system", "endpointslicemirroring-controller")
                ]),
                endpoints,
                vec![],
            ),
        ),
        schema(
            "workload-leader-election",
            "leader-election",
            200,
            "ByUser",
            rule(json!([account("kube-system", "*")]), vec![leases()], vec![]),
        ),
        schema(
            "system-node-high",
            "node-high",
            400,
            "ByUser",
            rule(json!([group("system:nodes")]), node_high, vec![]),
        ),
        schema(
            "system-nodes",
            "system",
            500,
            "ByUser",
            rule(json!([group("system:nodes")]), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "kube-controller-manager",
            "workload-high",
            800,
            "ByNamespace",
            rule(json!([manager()]), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "kube-scheduler",
            "workload-high",
            800,
            "ByNamespace",
            rule(json!([user("system:kube-scheduler")]), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "kube-system-service-accounts",
            "workload-high",
            900,
            "ByNamespace",
            rule(json!([account("kube-system", "*")]), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "service-accounts",
            "workload-low",
            9000,
            "ByUser",
            rule(json!([group("system:serviceaccounts")]), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "global-default",
            "global-default",
            9900,
            "ByUser",
            rule(everybody(), vec![all()], vec![paths(&["*"])]),
        ),
        schema(
            "catch-all",
            "catch-all",
            10_000,
            "ByUser",
            rule(everybody(), vec![all()], vec![paths(&["*"])]),
        ),
    ]
}
