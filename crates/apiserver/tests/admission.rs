//! Built-in admission through the whole server: quotas, limit ranges, pod security, classes, signing requests.

mod common;

use common::{Client, server};
use knarr_apiserver::api::Peer;
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/default/pods";
const QUOTAS: &str = "/api/v1/namespaces/default/resourcequotas";

fn pod(name: &str, resources: &Value) -> Value {
    json!({ "metadata": { "name": name },
        "spec": { "containers": [{ "name": "c", "image": "i", "resources": resources }] } })
}

#[tokio::test]
async fn a_quota_is_never_exceeded_and_its_status_is_exact() {
    let api = server().await;
    let admin = Client::admin(&api);
    let hard = json!({ "pods": "3", "requests.cpu": "1", "count/configmaps": "2" });
    admin.create(QUOTAS, &json!({ "metadata": { "name": "q" }, "spec": { "hard": hard } })).await;
    let creates = (0..8).map(|i| {
        let (name, cpu) = (format!("p{i}"), json!({ "requests": { "cpu": "300m" } }));
        let admin = &admin;
        async move { admin.post(PODS, &pod(&name, &cpu)).await }
    });
    let answers = futures::future::join_all(creates).await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 3);
    let (status, refused) = answers.iter().find(|(status, _)| *status != 201).expect("five are refused");
    assert_eq!(*status, 403);
    let message = refused["message"].as_str().expect("a message");
    let why = r#"exceeded quota: q, requested: pods=1,requests.cpu=300m, used: pods=3,requests.cpu=900m, limited: pods=3,requests.cpu=1"#;
    assert!(message.ends_with(&format!("is forbidden: {why}")), "{message}");
    let used = |quota: &Value, name: &str| quota["status"]["used"][name].clone();
    let (_, quota) = admin.get(&format!("{QUOTAS}/q")).await;
    assert_eq!((used(&quota, "pods"), used(&quota, "requests.cpu")), (json!("3"), json!("900m")));
    let (_, refused) = admin.post(PODS, &pod("silent", &json!({}))).await;
    assert_eq!(
        refused["message"],
        r#"pods "silent" is forbidden: failed quota: q: must specify requests.cpu for: c"#
    );
    let (_, list) = admin.get(PODS).await;
    let first = list["items"][0]["metadata"]["name"].as_str().expect("a pod").to_owned();
    let ended = json!({ "status": { "phase": "Succeeded" } });
    assert_eq!(admin.patch(&format!("{PODS}/{first}/status"), &ended).await.0, 200);
    let (_, quota) = admin.get(&format!("{QUOTAS}/q")).await;
    assert_eq!(used(&quota, "pods"), "2", "a pod that ended uses nothing");
    let (_, list) = admin.get(PODS).await;
    for item in list["items"].as_array().expect("items") {
        admin.delete(&format!("{PODS}/{}", item["metadata"]["name"].as_str().expect("a name"))).await;
    }
    let (_, quota) = admin.get(&format!("{QUOTAS}/q")).await;
    assert_eq!((used(&quota, "pods"), used(&quota, "requests.cpu")), (json!("0"), json!("0")));
    let maps = "/api/v1/namespaces/default/configmaps";
    let map = |name: &str| json!({ "metadata": { "name": name } });
    for (name, expected) in [("a", 201), ("b", 201), ("c", 403)] {
        assert_eq!(admin.post(maps, &map(name)).await.0, expected, "{name}");
    }
}

#[tokio::test]
async fn scopes_choose_which_pods_count() {
    let api = server().await;
    let admin = Client::admin(&api);
    let quota = |name: &str, spec: Value| json!({ "metadata": { "name": name }, "spec": spec });
    admin.create(QUOTAS, &quota("best", json!({ "hard": { "pods": "1" }, "scopes": ["BestEffort"] }))).await;
    let high =
        json!([{ "scopeName": "PriorityClass", "operator": "In", "values": ["system-node-critical"] }]);
    let spec = json!({ "hard": { "pods": "0" }, "scopeSelector": { "matchExpressions": high } });
    admin.create(QUOTAS, &quota("high", spec)).await;
    let cpu = json!({ "requests": { "cpu": "1" } });
    for (name, resources, expected) in
        [("a", json!({}), 201), ("b", json!({}), 403), ("c", cpu.clone(), 201), ("d", cpu, 201)]
    {
        assert_eq!(admin.post(PODS, &pod(name, &resources)).await.0, expected, "{name}");
    }
    let mut critical = pod("e", &json!({ "requests": { "cpu": "1" } }));
    critical["spec"]["priorityClassName"] = json!("system-node-critical");
    assert_eq!(admin.post(PODS, &critical).await.0, 403);
}

#[tokio::test]
async fn limit_ranges_fill_in_and_refuse() {
    let api = server().await;
    let admin = Client::admin(&api);
    let limits = json!([
        { "type": "Container", "default": { "cpu": "500m" }, "defaultRequest": { "cpu": "100m" },
          "min": { "cpu": "50m" }, "max": { "cpu": "1" }, "maxLimitRequestRatio": { "cpu": "10" } },
        { "type": "PersistentVolumeClaim", "min": { "storage": "1Gi" }, "max": { "storage": "2Gi" } },
    ]);
    let ranges = "/api/v1/namespaces/default/limitranges";
    admin.create(ranges, &json!({ "metadata": { "name": "l" }, "spec": { "limits": limits } })).await;
    let made = admin.create(PODS, &pod("plain", &json!({}))).await;
    let container = &made["spec"]["containers"][0]["resources"];
    assert_eq!(*container, json!({ "limits": { "cpu": "500m" }, "requests": { "cpu": "100m" } }));
    assert_eq!(made["status"]["qosClass"], "Burstable", "by what the pod has in the end");
    assert_eq!(
        made["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
        "LimitRanger plugin set: cpu request for container c; cpu limit for container c"
    );
    for (resources, why) in [
        (json!({ "limits": { "cpu": "2" } }), "maximum cpu usage per Container is 1, but limit is 2"),
        (
            json!({ "requests": { "cpu": "10m" }, "limits": { "cpu": "50m" } }),
            "minimum cpu usage per Container is 50m, but request is 10m",
        ),
        (
            json!({ "requests": { "cpu": "50m" }, "limits": { "cpu": "1" } }),
            "cpu max limit to request ratio per Container is 10, but provided ratio is 20.000000",
        ),
    ] {
        let (status, refused) = admin.post(PODS, &pod("x", &resources)).await;
        assert_eq!((status, &refused["message"]), (403, &json!(format!(r#"pods "x" is forbidden: {why}"#))));
    }
    let claim = json!({ "metadata": { "name": "c" }, "spec": { "accessModes": ["ReadWriteOnce"],
        "resources": { "requests": { "storage": "5Gi" } } } });
    let (_, refused) = admin.post("/api/v1/namespaces/default/persistentvolumeclaims", &claim).await;
    assert_eq!(
        refused["message"],
        r#"persistentvolumeclaims "c" is forbidden: maximum storage usage per PersistentVolumeClaim is 2Gi, but request is 5Gi"#
    );
}

#[tokio::test]
async fn pod_security_refuses_and_warns_in_upstreams_words() {
    let api = server().await;
    let admin = Client::admin(&api);
    let label = |mode: &str, level: &str| json!({ "metadata": { "labels": { format!("pod-security.kubernetes.io/{mode}"): level } } });
    let namespace = "/api/v1/namespaces/default";
    assert_eq!(admin.patch(namespace, &label("enforce", "bogus")).await.0, 422);
    assert_eq!(admin.patch(namespace, &label("enforce", "restricted")).await.0, 200);
    let (status, refused) = admin.post(PODS, &pod("p", &json!({}))).await;
    assert_eq!(status, 403);
    assert_eq!(
        refused["message"],
        r#"pods "p" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false (container "c" must set securityContext.allowPrivilegeEscalation=false), unrestricted capabilities (container "c" must set securityContext.capabilities.drop=["ALL"]), runAsNonRoot != true (pod or container "c" must set securityContext.runAsNonRoot=true), seccompProfile (pod or container "c" must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")"#
    );
    let mut good = pod("good", &json!({}));
    good["spec"]["securityContext"] =
        json!({ "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } });
    good["spec"]["containers"][0]["securityContext"] =
        json!({ "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } });
    assert_eq!(admin.post(PODS, &good).await.0, 201);
    assert_eq!(admin.patch(namespace, &label("enforce", "baseline")).await.0, 200);
    let mut host = pod("host", &json!({}));
    host["spec"]["hostNetwork"] = json!(true);
    host["spec"]["volumes"] = json!([{ "name": "v", "hostPath": { "path": "/" } }]);
    host["spec"]["containers"][0]["securityContext"] = json!({ "privileged": true });
    let (_, refused) = admin.post(PODS, &host).await;
    assert_eq!(
        refused["message"],
        r#"pods "host" is forbidden: violates PodSecurity "baseline:latest": host namespaces (hostNetwork=true), privileged (container "c" must not set securityContext.privileged=true), hostPath volumes (volume "v")"#
    );
    assert_eq!(admin.post(PODS, &pod("plain", &json!({}))).await.0, 201);
}

#[tokio::test]
async fn default_classes_and_runtime_classes_are_applied() {
    let api = server().await;
    let admin = Client::admin(&api);
    let class = json!({ "metadata": { "name": "fast", "annotations": { "storageclass.kubernetes.io/is-default-class": "true" } },
        "provisioner": "acme.io/disk" });
    admin.create("/apis/storage.k8s.io/v1/storageclasses", &class).await;
    let claim = json!({ "metadata": { "name": "c" }, "spec": { "accessModes": ["ReadWriteOnce"],
        "resources": { "requests": { "storage": "1Gi" } } } });
    let made = admin.create("/api/v1/namespaces/default/persistentvolumeclaims", &claim).await;
    assert_eq!(made["spec"]["storageClassName"], "fast");
    assert_eq!(made["metadata"]["finalizers"], json!(["kubernetes.io/pvc-protection"]));
    let class = json!({ "metadata": { "name": "vm" }, "handler": "vm", "overhead": { "podFixed": { "cpu": "250m" } },
        "scheduling": { "nodeSelector": { "vm": "yes" } } });
    admin.create("/apis/node.k8s.io/v1/runtimeclasses", &class).await;
    let mut wanted = pod("v", &json!({}));
    wanted["spec"]["runtimeClassName"] = json!("vm");
    let made = admin.create(PODS, &wanted).await;
    assert_eq!(
        (&made["spec"]["overhead"], &made["spec"]["nodeSelector"]),
        (&json!({ "cpu": "250m" }), &json!({ "vm": "yes" }))
    );
    wanted["spec"]["runtimeClassName"] = json!("none");
    let (_, refused) = admin.post(PODS, &wanted).await;
    assert_eq!(refused["message"], r#"pods "v" is forbidden: pod rejected: RuntimeClass "none" not found"#);
}

#[tokio::test]
async fn signing_requests_carry_their_maker_and_are_approved_by_who_may() {
    let api = server().await;
    let admin = Client::admin(&api);
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let rules = json!([{ "apiGroups": ["certificates.k8s.io"], "verbs": ["create", "get", "update"],
        "resources": ["certificatesigningrequests", "certificatesigningrequests/approval"] }]);
    admin
        .create(&format!("{rbac}/clusterroles"), &json!({ "metadata": { "name": "csr" }, "rules": rules }))
        .await;
    let binding = json!({ "metadata": { "name": "csr" },
        "subjects": [{ "kind": "User", "name": "bob", "apiGroup": "rbac.authorization.k8s.io" }],
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "csr" } });
    admin.create(&format!("{rbac}/clusterrolebindings"), &binding).await;
    let bob =
        Client { api: &api, peer: Peer::InProcess(knarr_apiserver::identity::User::new("bob", &["dev"])) };
    let pem = "-----BEGIN CERTIFICATE REQUEST-----\nAA==\n-----END CERTIFICATE REQUEST-----\n";
    let request = {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.encode(pem)
    };
    let csr = json!({ "metadata": { "name": "r" }, "spec": { "request": request, "usages": ["client auth"],
        "signerName": "acme.io/signer", "username": "forged" } });
    let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let mut made = bob.create(path, &csr).await;
    assert_eq!(
        (&made["spec"]["username"], &made["spec"]["groups"]),
        (&json!("bob"), &json!(["dev", "system:authenticated"]))
    );
    made["status"] = json!({ "conditions": [{ "type": "Approved", "status": "True", "reason": "r" }] });
    let (status, refused) = bob.put(&format!("{path}/r/approval"), &made).await;
    assert_eq!(status, 403);
    assert_eq!(
        refused["message"],
        r#"certificatesigningrequests.certificates.k8s.io "r" is forbidden: user not permitted to approve requests with signerName "acme.io/signer""#
    );
    let (status, approved) = admin.put(&format!("{path}/r/approval"), &made).await;
    assert_eq!(status, 200, "{approved}");
    assert_eq!(approved["status"]["conditions"][0]["type"], "Approved");
}

#[tokio::test]
async fn eviction_asks_the_disruption_budgets() {
    let api = server().await;
    let admin = Client::admin(&api);
    let mut wanted = pod("web", &json!({}));
    wanted["metadata"]["labels"] = json!({ "app": "web" });
    wanted["spec"]["nodeName"] = json!("n");
    admin.create(PODS, &wanted).await;
    admin
        .patch(
            &format!("{PODS}/web/status"),
            &json!({ "status": { "phase": "Running",
        "conditions": [{ "type": "Ready", "status": "True" }] } }),
        )
        .await;
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let budget = json!({ "metadata": { "name": "b" }, "spec": { "minAvailable": 1, "selector": { "matchLabels": { "app": "web" } } } });
    admin.create(budgets, &budget).await;
    let status = json!({ "status": { "currentHealthy": 1, "desiredHealthy": 1, "disruptionsAllowed": 0, "expectedPods": 1, "observedGeneration": 1 } });
    assert_eq!(admin.patch(&format!("{budgets}/b/status"), &status).await.0, 200);
    let eviction = json!({ "metadata": { "name": "web", "namespace": "default" } });
    let (code, refused) = admin.post(&format!("{PODS}/web/eviction"), &eviction).await;
    assert_eq!(code, 429, "{refused}");
    assert_eq!(refused["message"], "Cannot evict pod as it would violate the pod's disruption budget.");
    assert_eq!(refused["details"]["causes"][0]["reason"], "DisruptionBudget");
    let free = json!({ "status": { "disruptionsAllowed": 1 } });
    assert_eq!(admin.patch(&format!("{budgets}/b/status"), &free).await.0, 200);
    let (code, _) = admin.post(&format!("{PODS}/web/eviction"), &eviction).await;
    assert_eq!(code, 201);
    let (_, budget) = admin.get(&format!("{budgets}/b")).await;
    assert_eq!(
        budget["status"]["disruptionsAllowed"].as_i64().unwrap_or(0),
        0,
        "the eviction took its place"
    );
    assert!(budget["status"]["disruptedPods"].get("web").is_some(), "{budget}");
}
