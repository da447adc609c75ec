//! The contract every served kind keeps: create, defaults, get, update, immutable metadata, each way to patch,
//! apply with conflicts, table, watch, delete. The kinds come from the schema; what a kind requires to be valid
//! stands in one table below, and a kind that needs more than is written there fails.

mod common;

use common::{Client, Events, server};
use knarr_api::object::Object;
use knarr_api::schema::{Kind, Schema};
use knarr_apiserver::api::Api;
use serde_json::{Value, json};

/// The least a kind must say beside its name.
fn sample(kind: &Kind) -> Value {
    let template = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    let job = json!({ "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": "i" }] } });
    let selected = json!({ "selector": { "matchLabels": { "a": "b" } }, "template": template });
    let role = |kind: &str| json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": "r" });
    let claim =
        json!({ "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } } });
    match kind.plural.as_str() {
        "deployments" | "replicasets" | "daemonsets" | "statefulsets" => json!({ "spec": selected }),
        "replicationcontrollers" => json!({ "spec": { "template": template } }),
        "podtemplates" => json!({ "template": template }),
        "pods" => json!({ "spec": template["spec"] }),
        "jobs" => json!({ "spec": { "template": job } }),
        "cronjobs" => {
            json!({ "spec": { "schedule": "* * * * *", "jobTemplate": { "spec": { "template": job } } } })
        }
        "controllerrevisions" => json!({ "data": { "x": 1 }, "revision": 1 }),
        "horizontalpodautoscalers" => {
            json!({ "spec": { "maxReplicas": 2, "scaleTargetRef": { "kind": "Deployment", "name": "d", "apiVersion": "apps/v1" } } })
        }
        "services" => json!({ "spec": { "ports": [{ "port": 80 }] } }),
        "ingresses" if kind.version == "v1" => {
            json!({ "spec": { "defaultBackend": { "service": { "name": "s", "port": { "number": 80 } } } } })
        }
        "ingresses" => json!({ "spec": { "backend": { "serviceName": "s", "servicePort": 80 } } }),
        "ingressclasses" => json!({ "spec": { "controller": "acme.io/c" } }),
        "ipaddresses" => {
            json!({ "metadata": { "name": "192.0.2.1" }, "spec": { "parentRef": { "resource": "services", "name": "s" } } })
        }
        "servicecidrs" => json!({ "spec": { "cidrs": ["10.99.0.0/24"] } }),
        "endpointslices" => json!({ "addressType": "IPv4", "endpoints": [{ "addresses": ["192.0.2.1"] }] }),
        "events" if kind.group.is_empty() => json!({ "involvedObject": { "namespace": "default" } }),
        "events" => {
            json!({ "regarding": { "namespace": "default" }, "eventTime": "2026-01-01T00:00:00.000000Z",
            "reportingController": "acme.io/c", "reportingInstance": "c-1", "action": "a", "reason": "r", "type": "Normal" })
        }
        "persistentvolumeclaims" => json!({ "spec": claim }),
        "persistentvolumes" => {
            json!({ "spec": { "accessModes": ["ReadWriteOnce"], "capacity": { "storage": "1Gi" }, "hostPath": { "path": "/x" } } })
        }
        "storageclasses" => json!({ "provisioner": "acme.io/p" }),
        "volumeattachments" => {
            json!({ "spec": { "attacher": "acme.io", "nodeName": "n", "source": { "persistentVolumeName": "v" } } })
        }
        "volumeattributesclasses" => json!({ "driverName": "acme.io", "parameters": { "a": "b" } }),
        "csidrivers" => json!({ "spec": {} }),
        "csinodes" => json!({ "spec": { "drivers": [{ "name": "acme.io", "nodeID": "n" }] } }),
        "csistoragecapacities" => json!({ "storageClassName": "s" }),
        "runtimeclasses" if kind.version == "v1alpha1" => json!({ "spec": { "runtimeHandler": "h" } }),
        "runtimeclasses" => json!({ "handler": "h" }),
        "priorityclasses" => json!({ "value": 7 }),
        "flowschemas" => {
            json!({ "spec": { "priorityLevelConfiguration": { "name": "global-default" } } })
        }
        "prioritylevelconfigurations" => {
            json!({ "spec": { "type": "Limited", "limited": { "limitResponse": { "type": "Reject" } } } })
        }
        "leases" => json!({ "spec": { "holderIdentity": "me" } }),
        "poddisruptionbudgets" => {
            json!({ "spec": { "minAvailable": 1, "selector": { "matchLabels": { "a": "b" } } } })
        }
        "limitranges" => json!({ "spec": { "limits": [{ "type": "Container", "max": { "cpu": "1" } }] } }),
        "resourcequotas" => json!({ "spec": { "hard": { "count/nothing.acme.io": "1" } } }),
        "rolebindings" => json!({ "roleRef": role("Role"), "subjects": [] }),
        "clusterrolebindings" => json!({ "roleRef": role("ClusterRole"), "subjects": [] }),
        "apiservices" => {
            json!({ "metadata": { "name": "v1.x.acme.io" }, "spec": { "group": "x.acme.io", "version": "v1",
            "groupPriorityMinimum": 10, "versionPriority": 10, "service": { "name": "s", "namespace": "default" } } })
        }
        "customresourcedefinitions" => {
            let schema = json!({ "openAPIV3Schema": { "type": "object" } });
            json!({ "metadata": { "name": "xs.acme.io" }, "spec": { "group": "acme.io", "scope": "Namespaced",
                "names": { "plural": "xs", "kind": "X" }, "versions": [{ "name": "v1", "served": true, "storage": true, "schema": schema }] } })
        }
        "certificatesigningrequests" => {
            use base64::Engine;
            let pem = "-----BEGIN CERTIFICATE REQUEST-----\nAA==\n-----END CERTIFICATE REQUEST-----\n";
            let request = base64::engine::general_purpose::STANDARD.encode(pem);
            json!({ "spec": { "request": request, "signerName": "acme.io/s", "usages": ["client auth"] } })
        }
        _ => json!({}),
    }
}

struct Walk<'a> {
    api: &'a Api,
    admin: Client<'a>,
    kind: &'a Kind,
    collection: String,
    one: String,
    trouble: Vec<String>,
}

impl<'a> Walk<'a> {
    fn expect(&mut self, step: &str, right: bool, answer: &impl std::fmt::Display) {
        if !right {
            let shown: String = answer.to_string().chars().take(400).collect();
            self.trouble.push(format!("{} {}: {step}: {shown}", self.kind.api_version(), self.kind.kind));
        }
    }

    async fn patch(&self, content_type: &str, query: &str, body: &Value) -> (u16, Value) {
        let path = format!("{}{query}", self.one);
        self.admin.send("PATCH", &path, &[("content-type", content_type)], &body.to_string()).await
    }

    async fn run(mut self, sample: &Value) -> Vec<String> {
        let (status, made) = self.admin.post(&self.collection, sample).await;
        self.expect("create", status == 201, &made);
        if status != 201 {
            return self.trouble;
        }
        let (_, twice) = self.admin.post(&self.collection, sample).await;
        self.expect("create again", twice["reason"] == "AlreadyExists", &twice);
        let (status, got) = self.admin.get(&self.one).await;
        // A quota's status is written right after it.
        let same = if self.kind.kind == "ResourceQuota" { got["spec"] == made["spec"] } else { got == made };
        self.expect("get what was created", status == 200 && same, &got);
        let (status, same) = self.admin.put(&self.one, &got).await;
        let unchanged = same["metadata"]["resourceVersion"] == got["metadata"]["resourceVersion"];
        self.expect(
            "defaulting is idempotent: an equal update changes nothing",
            status == 200 && unchanged,
            &same,
        );
        self.metadata_stays(&got).await;
        self.patches(&got).await;
        self.applies(&got).await;
        let headers = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")];
        let (status, table) = self.admin.send("GET", &self.collection, &headers, "").await;
        self.expect("table", status == 200 && table["kind"] == "Table", &table);
        self.goes(&made).await;
        self.trouble
    }

    async fn metadata_stays(&mut self, got: &Value) {
        let mut other = got.clone();
        other.set_at("metadata.name", "another");
        let (status, answer) = self.admin.put(&self.one, &other).await;
        self.expect("another name", status == 400, &answer);
        let mut other = got.clone();
        other.set_at("metadata.uid", "another");
        let (status, answer) = self.admin.put(&self.one, &other).await;
        self.expect("another uid", status == 409, &answer);
        let mut stale = got.clone();
        stale.set_at("metadata.resourceVersion", "1");
        let (status, answer) = self.admin.put(&self.one, &stale).await;
        self.expect("a stale update", status == 409 && answer["reason"] == "Conflict", &answer);
    }

    async fn patches(&mut self, got: &Value) {
        let labelled = |object: &Value, value: &str| object["metadata"]["labels"]["contract"] == value;
        let merge = json!({ "metadata": { "labels": { "contract": "merge" } } });
        let (status, answer) = self.patch("application/merge-patch+json", "", &merge).await;
        self.expect("merge patch", status == 200 && labelled(&answer, "merge"), &answer);
        let strategic = json!({ "metadata": { "labels": { "contract": "strategic" } } });
        let (status, answer) = self.patch("application/strategic-merge-patch+json", "", &strategic).await;
        self.expect("strategic patch", status == 200 && labelled(&answer, "strategic"), &answer);
        let operations = json!([
            { "op": "test", "path": "/metadata/name", "value": got.name() },
            { "op": "replace", "path": "/metadata/labels/contract", "value": "json" },
        ]);
        let (status, answer) = self.patch("application/json-patch+json", "", &operations).await;
        self.expect("json patch", status == 200 && labelled(&answer, "json"), &answer);
        let failing = json!([{ "op": "test", "path": "/metadata/name", "value": "other" }]);
        let (status, answer) = self.patch("application/json-patch+json", "", &failing).await;
        self.expect("a failing test", status == 422, &answer);
        let bad = json!({ "metadata": { "labels": { "contract": "not a label" } } });
        let (status, answer) = self.patch("application/merge-patch+json", "", &bad).await;
        self.expect("a bad label", status == 422 && answer["reason"] == "Invalid", &answer);
    }

    async fn applies(&mut self, got: &Value) {
        let config = |value: &str| {
            json!({ "apiVersion": self.kind.api_version(), "kind": self.kind.kind,
                "metadata": { "name": got.name(), "labels": { "applied": value } } })
        };
        let (first, second) = (config("1"), config("2"));
        let apply = "application/apply-patch+yaml";
        let (status, answer) = self.patch(apply, "?fieldManager=one", &first).await;
        self.expect("apply", status == 200, &answer);
        let version = answer["metadata"]["resourceVersion"].clone();
        let (_, again) = self.patch(apply, "?fieldManager=one", &first).await;
        self.expect("apply is idempotent", again["metadata"]["resourceVersion"] == version, &again);
        let (status, answer) = self.patch(apply, "?fieldManager=two", &second).await;
        self.expect("apply conflicts", status == 409 && answer["reason"] == "Conflict", &answer);
        let (status, answer) = self.patch(apply, "?fieldManager=two&force=true", &second).await;
        self.expect(
            "apply by force",
            status == 200 && answer["metadata"]["labels"]["applied"] == "2",
            &answer,
        );
    }

    /// Deletes, and finds creation's successors in a watch from it.
    async fn goes(&mut self, made: &Value) {
        let (status, answer) = self.admin.delete(&self.one).await;
        self.expect("delete", status == 200, &answer);
        if self.admin.get(&self.one).await.0 == 200 {
            // Protected, or a namespace: whoever protects it lets go.
            let none = json!({ "metadata": { "finalizers": null } });
            self.patch("application/merge-patch+json", "", &none).await;
            if self.kind.kind == "Namespace" {
                let empty = json!({ "kind": "Namespace", "apiVersion": "v1", "metadata": { "name": made.name() }, "spec": {} });
                self.admin.put(&format!("{}/finalize", self.one), &empty).await;
            }
        }
        let (status, answer) = self.admin.get(&self.one).await;
        self.expect("gone", status == 404, &answer);
        let from = made.str_at("metadata.resourceVersion");
        let path = format!("{}?watch=1&resourceVersion={from}", self.collection);
        let mut events = Events::open(self.api, &path).await;
        let mut own = Vec::new();
        while own.last().is_none_or(|kind| kind != "DELETED") {
            let (kind, object) = events.next().await;
            if object["metadata"]["uid"] == made["metadata"]["uid"] {
                own.push(kind);
            }
        }
        let in_order = own.len() >= 2 && own[..own.len() - 1].iter().all(|kind| kind == "MODIFIED");
        self.expect("watch", in_order, &own.join(" "));
    }
}

#[tokio::test]
async fn every_kind_keeps_the_contract() {
    let api = server().await;
    let mut trouble = Vec::new();
    let mut walked = 0;
    for kind in Schema::builtin().kinds() {
        if kind.create_only || kind.kind == "ComponentStatus" {
            continue;
        }
        let mut sample = sample(kind);
        if sample.name().is_empty() {
            sample.set_at("metadata.name", "contract");
        }
        let base = if kind.group.is_empty() {
            "/api/v1".to_owned()
        } else {
            format!("/apis/{}", kind.api_version())
        };
        let collection = match kind.namespaced {
            true => format!("{base}/namespaces/default/{}", kind.plural),
            false => format!("{base}/{}", kind.plural),
        };
        let one = format!("{collection}/{}", sample.name());
        let admin = Client::admin(&api);
        let walk = Walk { api: &api, admin, kind, collection, one, trouble: Vec::new() };
        trouble.extend(walk.run(&sample).await);
        walked += 1;
    }
    assert!(trouble.is_empty(), "{} of {walked} kinds:\n{}", trouble.len(), trouble.join("\n"));
    assert!(walked >= 60, "only {walked} kinds are served");
}

/// What of a kind never changes, how one tries, and what upstream says.
fn immutable_fields() -> Vec<(&'static str, &'static str, Value, &'static str)> {
    let container = json!([{ "name": "c", "image": "other" }]);
    vec![
        (
            "",
            "pods",
            json!({ "spec": { "restartPolicy": "Never" } }),
            "spec: Forbidden: pod updates may not change fields other than",
        ),
        ("", "secrets", json!({ "type": "other" }), "type: Invalid value: \"other\": field is immutable"),
        (
            "",
            "services",
            json!({ "spec": { "clusterIP": "10.96.7.7" } }),
            "spec.clusterIPs[0]: Invalid value: [\"10.96.7.7\"]: may not change once set",
        ),
        ("", "nodes", json!({ "spec": { "podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"] } }), ""),
        (
            "",
            "persistentvolumeclaims",
            json!({ "spec": { "accessModes": ["ReadOnlyMany"] } }),
            "spec: Forbidden: spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        ),
        (
            "",
            "persistentvolumes",
            json!({ "spec": { "hostPath": { "path": "/y" } } }),
            "spec.persistentvolumesource: Forbidden: spec.persistentvolumesource is immutable after creation",
        ),
        (
            "",
            "persistentvolumes",
            json!({ "spec": { "volumeMode": "Block" } }),
            "spec.volumeMode: Invalid value: \"Block\": field is immutable",
        ),
        (
            "apps",
            "deployments",
            json!({ "spec": { "selector": { "matchLabels": { "c": "d" } }, "template": { "metadata": { "labels": { "c": "d" } } } } }),
            "spec.selector: Invalid value: ",
        ),
        (
            "apps",
            "replicasets",
            json!({ "spec": { "selector": { "matchLabels": { "c": "d" } }, "template": { "metadata": { "labels": { "c": "d" } } } } }),
            "spec.selector: Invalid value: ",
        ),
        (
            "apps",
            "daemonsets",
            json!({ "spec": { "selector": { "matchLabels": { "c": "d" } }, "template": { "metadata": { "labels": { "c": "d" } } } } }),
            "spec.selector: Invalid value: ",
        ),
        (
            "apps",
            "statefulsets",
            json!({ "spec": { "serviceName": "other" } }),
            "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy'",
        ),
        ("apps", "controllerrevisions", json!({ "data": { "x": 2 } }), "data: Invalid value: "),
        (
            "batch",
            "jobs",
            json!({ "spec": { "template": { "spec": { "containers": container } } } }),
            "spec.template: Invalid value: ",
        ),
        (
            "batch",
            "jobs",
            json!({ "spec": { "completions": 7 } }),
            "spec.completions: Invalid value: 7: field is immutable",
        ),
        (
            "discovery.k8s.io",
            "endpointslices",
            json!({ "addressType": "IPv6", "endpoints": [] }),
            "addressType: Invalid value: \"IPv6\": field is immutable",
        ),
        (
            "networking.k8s.io",
            "ingressclasses",
            json!({ "spec": { "controller": "acme.io/other" } }),
            "spec.controller: Invalid value: \"acme.io/other\": field is immutable",
        ),
        (
            "networking.k8s.io",
            "ipaddresses",
            json!({ "spec": { "parentRef": { "name": "other" } } }),
            "spec.parentRef: Invalid value: ",
        ),
        (
            "networking.k8s.io",
            "servicecidrs",
            json!({ "spec": { "cidrs": ["10.98.0.0/24"] } }),
            "spec.cidrs[0]: Invalid value: \"10.98.0.0/24\": field is immutable",
        ),
        (
            "node.k8s.io",
            "runtimeclasses",
            json!({ "handler": "other" }),
            "handler: Invalid value: \"other\": field is immutable",
        ),
        (
            "rbac.authorization.k8s.io",
            "rolebindings",
            json!({ "roleRef": { "name": "other" } }),
            "roleRef: Invalid value: ",
        ),
        (
            "rbac.authorization.k8s.io",
            "clusterrolebindings",
            json!({ "roleRef": { "name": "other" } }),
            "cannot change roleRef",
        ),
        (
            "scheduling.k8s.io",
            "priorityclasses",
            json!({ "value": 8 }),
            "value: Forbidden: may not be changed in an update.",
        ),
        (
            "scheduling.k8s.io",
            "priorityclasses",
            json!({ "preemptionPolicy": "Never" }),
            "preemptionPolicy: Invalid value: ",
        ),
        (
            "storage.k8s.io",
            "storageclasses",
            json!({ "provisioner": "acme.io/q" }),
            "provisioner: Forbidden: updates to provisioner are forbidden.",
        ),
        (
            "storage.k8s.io",
            "storageclasses",
            json!({ "parameters": { "a": "b" } }),
            "parameters: Forbidden: updates to parameters are forbidden.",
        ),
        (
            "storage.k8s.io",
            "storageclasses",
            json!({ "reclaimPolicy": "Retain" }),
            "reclaimPolicy: Forbidden: updates to reclaimPolicy are forbidden.",
        ),
        (
            "storage.k8s.io",
            "volumeattachments",
            json!({ "spec": { "nodeName": "other" } }),
            "spec: Invalid value: ",
        ),
        (
            "storage.k8s.io",
            "volumeattributesclasses",
            json!({ "driverName": "acme.com" }),
            "driverName: Invalid value: \"acme.com\": field is immutable",
        ),
        (
            "storage.k8s.io",
            "volumeattributesclasses",
            json!({ "parameters": { "a": "c" } }),
            "parameters: Invalid value: ",
        ),
        (
            "storage.k8s.io",
            "csidrivers",
            json!({ "spec": { "attachRequired": false } }),
            "spec.attachRequired: Invalid value: false: field is immutable",
        ),
        (
            "storage.k8s.io",
            "csinodes",
            json!({ "spec": { "drivers": [{ "name": "acme.io", "nodeID": "other" }] } }),
            "CSINodeDrivers: Invalid value: ",
        ),
        (
            "storage.k8s.io",
            "csistoragecapacities",
            json!({ "storageClassName": "other" }),
            "storageClassName: Invalid value: \"other\": field is immutable",
        ),
        (
            "apiextensions.k8s.io",
            "customresourcedefinitions",
            json!({ "spec": { "group": "acme.com" } }),
            "spec.group: Invalid value: \"acme.com\": field is immutable",
        ),
        (
            "apiregistration.k8s.io",
            "apiservices",
            json!({ "spec": { "group": "y.acme.io" } }),
            "metadata.name: Invalid value: ",
        ),
    ]
}

#[tokio::test]
async fn what_never_changes_is_refused_in_upstreams_words() {
    let api = server().await;
    let admin = Client::admin(&api);
    let mut trouble = Vec::new();
    for (group, plural, change, why) in immutable_fields() {
        let kinds = Schema::builtin().kinds();
        let kind = kinds.iter().find(|k| k.group == group && k.plural == plural && k.conversion.is_none());
        let kind = kind.unwrap_or_else(|| panic!("{plural}.{group} is served"));
        let mut sample = sample(kind);
        if sample.name().is_empty() {
            sample.set_at("metadata.name", "fixed");
        }
        let base = match group {
            "" => "/api/v1".to_owned(),
            _ => format!("/apis/{}", kind.api_version()),
        };
        let collection = match kind.namespaced {
            true => format!("{base}/namespaces/default/{plural}"),
            false => format!("{base}/{plural}"),
        };
        let one = format!("{collection}/{}", sample.name());
        let (status, made) = admin.post(&collection, &sample).await;
        assert!(matches!(status, 201 | 409), "{plural}: {made}");
        let (status, answer) = admin.patch(&one, &change).await;
        let message = answer["message"].as_str().unwrap_or_default();
        let refused = status == 422 && message.contains(why);
        if !why.is_empty() && !refused {
            trouble.push(format!("{plural} {change}: {status} {message}"));
        }
    }
    assert!(trouble.is_empty(), "{}", trouble.join("\n"));
}
