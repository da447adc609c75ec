//! Who may do what: nodes, roles that grant roles, impersonation, anonymous users.

mod common;

use common::{Client, server};
use knarr_apiserver::api::Peer;
use serde_json::json;

fn pod(name: &str, node: &str, secret: &str) -> serde_json::Value {
    json!({ "metadata": { "name": name }, "spec": { "nodeName": node, "containers": [{ "name": "c", "image": "i" }],
        "volumes": [{ "name": "s", "secret": { "secretName": secret } }] } })
}

#[tokio::test]
async fn a_node_reads_and_writes_only_what_is_its_own() {
    let api = server().await;
    let admin = Client::admin(&api);
    let node = Client::named(&api, "system:node:one", &["system:nodes"]);
    let (pods, secrets) = ("/api/v1/namespaces/default/pods", "/api/v1/namespaces/default/secrets");
    for name in ["mine", "theirs"] {
        admin.create(secrets, &json!({ "metadata": { "name": name } })).await;
    }
    admin.create(pods, &pod("a", "one", "mine")).await;
    admin.create(pods, &pod("b", "two", "theirs")).await;
    assert_eq!(node.get(&format!("{secrets}/mine")).await.0, 200);
    assert_eq!(node.get(&format!("{secrets}?fieldSelector=metadata.name%3Dmine")).await.0, 200);
    let (status, refused) = node.get(&format!("{secrets}/theirs")).await;
    assert_eq!(status, 403);
    assert_eq!(
        refused["message"],
        r#"secrets "theirs" is forbidden: User "system:node:one" cannot get resource "secrets" in API group "" in the namespace "default""#
    );
    assert_eq!(node.get(secrets).await.0, 403, "not all of them");
    for name in ["one", "two"] {
        let (status, answer) = node.post("/api/v1/nodes", &json!({ "metadata": { "name": name } })).await;
        assert_eq!(status, if name == "one" { 201 } else { 403 }, "{answer}");
    }
    let labels = json!({ "metadata": { "labels": { "node-role.kubernetes.io/x": "", "own": "1" } } });
    let (status, refused) = node.patch("/api/v1/nodes/one", &labels).await;
    assert_eq!(status, 403);
    assert_eq!(
        refused["message"],
        r#"nodes "one" is forbidden: is not allowed to modify labels: node-role.kubernetes.io/x"#
    );
    let ready = json!({ "status": { "phase": "Running" } });
    assert_eq!(node.patch(&format!("{pods}/a/status"), &ready).await.0, 200);
    let (status, refused) = node.patch(&format!("{pods}/b/status"), &ready).await;
    assert_eq!(status, 403);
    assert_eq!(
        refused["message"],
        r#"pods "b" is forbidden: node "system:node:one" can only update pod status for pods with spec.nodeName set to itself"#.replace("system:node:", "")
    );
    let tokens = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let bound = |pod: &serde_json::Value| {
        json!({ "spec": { "boundObjectRef": { "apiVersion": "v1", "kind": "Pod",
            "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"] } } })
    };
    let (_, own) = admin.get(&format!("{pods}/a")).await;
    let (_, foreign) = admin.get(&format!("{pods}/b")).await;
    assert_eq!(node.post(tokens, &bound(&own)).await.0, 201);
    for (request, why) in [
        (bound(&foreign), "node requested token bound to a pod scheduled on a different node"),
        (json!({ "spec": {} }), "node requested token not bound to a pod"),
    ] {
        let (status, refused) = node.post(tokens, &request).await;
        let message = format!(r#"serviceaccounts "default" is forbidden: {why}"#);
        assert_eq!((status, &refused["message"]), (403, &json!(message)));
    }
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(node.post(leases, &json!({ "metadata": { "name": "one" } })).await.0, 201);
    assert_eq!(node.post(leases, &json!({ "metadata": { "name": "two" } })).await.0, 403);
}

#[tokio::test]
async fn nobody_grants_what_they_do_not_hold() {
    let api = server().await;
    let admin = Client::admin(&api);
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default";
    let rules = json!([
        { "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings"], "verbs": ["create"] },
        { "apiGroups": [""], "resources": ["pods"], "verbs": ["get"] },
    ]);
    admin.create(&format!("{rbac}/roles"), &json!({ "metadata": { "name": "r" }, "rules": rules })).await;
    let subject = json!([{ "kind": "User", "name": "bob", "apiGroup": "rbac.authorization.k8s.io" }]);
    let to =
        |role: &str| json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role });
    let own = json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r" });
    let binding = json!({ "metadata": { "name": "b" }, "subjects": subject, "roleRef": own });
    admin.create(&format!("{rbac}/rolebindings"), &binding).await;
    let bob = Client::named(&api, "bob", &[]);
    let role = |verbs: &[&str]| json!({ "metadata": { "name": "x" }, "rules": [{ "apiGroups": [""], "resources": ["pods"], "verbs": verbs }] });
    let (status, refused) = bob.post(&format!("{rbac}/roles"), &role(&["get", "list", "delete"])).await;
    assert_eq!(status, 403, "{refused}");
    assert_eq!(
        refused["message"],
        "roles.rbac.authorization.k8s.io \"x\" is forbidden: user \"bob\" (groups=[\"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"list\" \"delete\"]}"
    );
    assert_eq!(bob.post(&format!("{rbac}/roles"), &role(&["get"])).await.0, 201);
    let admin_binding = json!({ "metadata": { "name": "up" }, "subjects": subject, "roleRef": to("admin") });
    assert_eq!(bob.post(&format!("{rbac}/rolebindings"), &admin_binding).await.0, 403);
    // Who may bind a role may bind it whatever it holds.
    let binder = json!({ "rules": [
        { "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["rolebindings"], "verbs": ["create"] },
        { "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["clusterroles"], "resourceNames": ["admin"], "verbs": ["bind"] } ] });
    assert_eq!(admin.patch(&format!("{rbac}/roles/r"), &binder).await.0, 200);
    assert_eq!(bob.post(&format!("{rbac}/rolebindings"), &admin_binding).await.0, 201);
}

#[tokio::test]
async fn impersonation_asks_for_each_part() {
    let api = server().await;
    let admin = Client::admin(&api);
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let rules = json!([{ "apiGroups": [""], "resources": ["users"], "verbs": ["impersonate"], "resourceNames": ["eve"] }]);
    admin
        .create(&format!("{rbac}/clusterroles"), &json!({ "metadata": { "name": "i" }, "rules": rules }))
        .await;
    let binding = json!({ "metadata": { "name": "i" },
        "subjects": [{ "kind": "User", "name": "bob", "apiGroup": "rbac.authorization.k8s.io" }],
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "i" } });
    admin.create(&format!("{rbac}/clusterrolebindings"), &binding).await;
    let remote = |name: &str, groups: &[&str]| Client {
        api: &api,
        peer: Peer::Remote(Some(knarr_apiserver::identity::User::new(name, groups))),
    };
    let whoami = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let json_type = ("content-type", "application/json");
    let bob = remote("bob", &[]);
    let (status, review) = bob.send("POST", whoami, &[json_type, ("impersonate-user", "eve")], "{}").await;
    assert_eq!(status, 201, "{review}");
    assert_eq!(review["status"]["userInfo"]["username"], "eve");
    let headers = [json_type, ("impersonate-user", "eve"), ("impersonate-uid", "7")];
    let (status, refused) = bob.send("POST", whoami, &headers, "{}").await;
    assert_eq!(status, 403);
    assert_eq!(
        refused["message"],
        r#"uids.authentication.k8s.io "7" is forbidden: User "bob" cannot impersonate resource "uids" in API group "authentication.k8s.io" at the cluster scope"#
    );
    let root = remote("root", &["system:masters"]);
    let headers = [
        json_type,
        ("impersonate-user", "eve"),
        ("impersonate-uid", "7"),
        ("impersonate-group", "dev"),
        ("impersonate-extra-acme.io%2fproject", "x"),
    ];
    let (status, review) = root.send("POST", whoami, &headers, "{}").await;
    assert_eq!(status, 201, "{review}");
    assert_eq!(
        review["status"]["userInfo"],
        json!({ "username": "eve", "uid": "7", "groups": ["dev", "system:authenticated"], "extra": { "acme.io/project": ["x"] } })
    );
}

#[tokio::test]
async fn anonymous_users_read_health_and_version_only() {
    let api = server().await;
    let nobody = Client { api: &api, peer: Peer::Remote(None) };
    for path in ["/healthz", "/livez", "/readyz", "/version"] {
        assert_eq!(nobody.get(path).await.0, 200, "{path}");
    }
    for path in [
        "/api",
        "/apis",
        "/openapi/v2",
        "/metrics",
        "/",
        "/api/v1/namespaces",
        "/api/v1/nodes",
        "/apis/apps/v1",
    ] {
        let (status, answer) = nobody.get(path).await;
        assert_eq!((status, &answer["reason"]), (403, &json!("Forbidden")), "{path}");
    }
}
