//! Unmodified clients against a live server with TLS and client certificates: the official Python client (from a
//! virtual environment under `target/`), and kube-rs.
//!
//! Without Python, or without an index to install the client from, the first test says so and ends.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use base64::Engine;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use knarr_apiserver::server::serve;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
    PostParams, WatchEvent, WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

/// The client as released; another one is a change to look at.
const PYTHON_CLIENT: &str = "kubernetes>=30";

/// A server on a port of the loopback interface, and the kubeconfig of its administrator.
struct Live {
    kubeconfig: Value,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn live() -> Live {
    let mut params = CertificateParams::new(vec![]).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a leaf with its issuer's name for one that signed itself.
    params.distinguished_name.push(DnType::CommonName, "test authority");
    let key = KeyPair::generate().expect("a key");
    let authority = params.self_signed(&key).expect("an authority");
    let issuer = Issuer::new(params, key);
    let leaf = |names: Vec<String>, subject: &[(DnType, &str)], usage| {
        let mut params = CertificateParams::new(names).expect("parameters");
        subject.iter().for_each(|(kind, text)| params.distinguished_name.push(kind.clone(), *text));
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &issuer).expect("signs");
        (certificate, key)
    };
    let (serving, serving_key) =
        leaf(vec!["localhost".into(), "127.0.0.1".into()], &[], ExtendedKeyUsagePurpose::ServerAuth);
    let admin = [(DnType::CommonName, "admin"), (DnType::OrganizationName, "system:masters")];
    let (client, client_key) = leaf(vec![], &admin, ExtendedKeyUsagePurpose::ClientAuth);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).expect("an authority");
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier.allow_unauthenticated().build().expect("a verifier"))
        .with_single_cert(
            vec![serving.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(serving_key.serialize_der()).expect("a key"),
        )
        .expect("a certificate");
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let api = Arc::new(common::racing_server().await);
    let task = tokio::spawn(serve(api, listener, Arc::new(tls)));
    let encode = |text: String| base64::engine::general_purpose::STANDARD.encode(text);
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "live",
        "clusters": [{ "name": "live", "cluster": {
            "server": format!("https://{address}"), "certificate-authority-data": encode(authority.pem()) } }],
        "users": [{ "name": "admin", "user": {
            "client-certificate-data": encode(client.pem()), "client-key-data": encode(client_key.serialize_pem()) } }],
        "contexts": [{ "name": "live", "context": { "cluster": "live", "user": "admin", "namespace": "default" } }],
    });
    Live { kubeconfig, task }
}

/// A virtual environment with the client, made once; `None`, and a word why, if it cannot be had.
fn python() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-client");
    let python = target.join("bin/python");
    let works = |python: &Path| {
        Command::new(python).args(["-c", "import kubernetes"]).output().is_ok_and(|out| out.status.success())
    };
    if works(&python) {
        return Some(python);
    }
    let run = |program: &Path, args: &[&str]| -> Result<(), String> {
        let output = Command::new(program).args(args).output().map_err(|e| e.to_string())?;
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    };
    let folder = target.to_str()?;
    let made = run(Path::new("python3"), &["-m", "venv", folder])
        .and_then(|()| run(&python, &["-m", "pip", "install", "--quiet", "--retries", "1", PYTHON_CLIENT]));
    match made {
        Ok(()) => Some(python),
        Err(why) => {
            eprintln!("SKIPPED: the Python client cannot be installed: {why}");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_clients_operations_work() {
    let Some(python) = tokio::task::spawn_blocking(python).await.expect("no panic") else { return };
    let live = live().await;
    let folder = tempfile::tempdir().expect("a directory");
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, live.kubeconfig.to_string()).expect("writes");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients_python/operations.py");
    let path = folder.path().to_owned();
    let output = tokio::task::spawn_blocking(move || {
        Command::new(python).arg(script).arg(kubeconfig).arg(path).env_remove("HTTPS_PROXY").output()
    });
    let output = output.await.expect("no panic").expect("python starts");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("all but the election passed"), "{text}");
}

async fn connect(live: &Live) -> kube::Client {
    let kubeconfig: Kubeconfig = serde_json::from_value(live.kubeconfig.clone()).expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    kube::Client::try_from(config.expect("a config")).expect("a client")
}

fn config_map(name: &str, data: Value) -> ConfigMap {
    let value = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "labels": { "run": "kube" } }, "data": data });
    serde_json::from_value(value).expect("a config map")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kube_rs_reads_writes_and_patches_each_way() {
    let live = live().await;
    let client = connect(&live).await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let post = PostParams::default();
    let made = maps.create(&post, &config_map("m", json!({ "a": "1" }))).await.expect("creates");
    let again = maps.create(&post, &config_map("m", json!({}))).await.expect_err("exists");
    assert!(matches!(&again, kube::Error::Api(status) if status.is_already_exists()), "{again}");
    assert!(maps.get_opt("none").await.expect("reads").is_none());
    let mut changed = made.clone();
    changed.data = Some([("b".to_owned(), "2".to_owned())].into());
    maps.replace("m", &post, &changed).await.expect("replaces");
    let stale = maps.replace("m", &post, &changed).await.expect_err("stale");
    assert!(matches!(&stale, kube::Error::Api(status) if status.is_conflict()), "{stale}");
    let plain = PatchParams::default();
    maps.patch("m", &plain, &Patch::Merge(json!({ "data": { "c": "3" } }))).await.expect("merges");
    maps.patch("m", &plain, &Patch::Strategic(json!({ "data": { "b": null } }))).await.expect("merges");
    let steps =
        serde_json::from_value(json!([{ "op": "add", "path": "/data/d", "value": "4" }])).expect("steps");
    let patched = maps.patch("m", &plain, &Patch::Json::<()>(steps)).await.expect("patches");
    let data: Vec<String> = patched.data.expect("data").into_keys().collect();
    assert_eq!(data, ["c", "d"]);
    let mine = PatchParams::apply("mine");
    let applied =
        maps.patch("n", &mine, &Patch::Apply(config_map("n", json!({ "x": "1" })))).await.expect("applies");
    assert_eq!(applied.metadata.managed_fields.expect("owners")[0].operation.as_deref(), Some("Apply"));
    let other = PatchParams::apply("other");
    let refused = maps.patch("n", &other, &Patch::Apply(config_map("n", json!({ "x": "2" })))).await;
    assert!(matches!(&refused, Err(kube::Error::Api(status)) if status.is_conflict()), "{refused:?}");
    maps.patch("n", &other.force(), &Patch::Apply(config_map("n", json!({ "x": "2" }))))
        .await
        .expect("by force");
    let metadata = maps.get_metadata("n").await.expect("metadata");
    assert_eq!(metadata.metadata.name.as_deref(), Some("n"));
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    maps.create(&dry, &config_map("dry", json!({}))).await.expect("would create");
    assert!(maps.get_opt("dry").await.expect("reads").is_none());
    let all = ListParams::default().labels("run=kube");
    let page = maps.list(&all.clone().limit(1)).await.expect("lists");
    let rest = all.clone().limit(1).continue_token(page.metadata.continue_.as_deref().expect("a token"));
    assert_eq!(maps.list(&rest).await.expect("lists").items[0].metadata.name.as_deref(), Some("n"));
    maps.delete_collection(&DeleteParams::default(), &all).await.expect("deletes");
    assert!(maps.list(&all).await.expect("lists").items.is_empty());

    let deployments: Api<Deployment> = Api::default_namespaced(client.clone());
    let template = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    let deployment = json!({ "metadata": { "name": "d" }, "spec": { "replicas": 2, "selector": { "matchLabels": { "a": "b" } }, "template": template } });
    deployments
        .create(&post, &serde_json::from_value(deployment).expect("a deployment"))
        .await
        .expect("creates");
    let scale = Patch::Merge(json!({ "spec": { "replicas": 5 } }));
    let scaled = deployments.patch_scale("d", &plain, &scale).await.expect("scales");
    assert_eq!(scaled.spec.and_then(|spec| spec.replicas), Some(5));
    let status = Patch::Merge(json!({ "status": { "replicas": 4 } }));
    let told = deployments.patch_status("d", &plain, &status).await.expect("tells");
    assert_eq!(told.status.and_then(|status| status.replicas), Some(4));
    deployments.delete("d", &DeleteParams::background()).await.expect("deletes");

    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "ConfigMap"));
    let untyped: Api<DynamicObject> = Api::default_namespaced_with(client.clone(), &kind);
    let object = DynamicObject::new("untyped", &kind).data(json!({ "data": { "k": "v" } }));
    assert_eq!(untyped.create(&post, &object).await.expect("creates").data["data"]["k"], "v");
    let discovery = kube::discovery::Discovery::new(client).run().await.expect("discovers");
    assert!(discovery.groups().count() > 15 && discovery.has_group("apps"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kube_rs_watches_and_reflects() {
    let live = live().await;
    let client = connect(&live).await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let post = PostParams::default();
    maps.create(&post, &config_map("early", json!({}))).await.expect("creates");
    let start =
        maps.list(&ListParams::default()).await.expect("lists").metadata.resource_version.expect("a version");
    maps.create(&post, &config_map("late", json!({}))).await.expect("creates");
    let mut events = maps.watch(&WatchParams::default().timeout(30), &start).await.expect("watches").boxed();
    match events.try_next().await.expect("an event") {
        Some(WatchEvent::Added(map)) => assert_eq!(map.metadata.name.as_deref(), Some("late")),
        other => panic!("{other:?}"),
    }
    for streaming in [false, true] {
        let (reader, writer) = reflector::store();
        let settings = watcher::Config::default().labels("run=kube");
        let settings = if streaming { settings.streaming_lists() } else { settings };
        let stream = watcher(maps.clone(), settings).default_backoff().reflect(writer).applied_objects();
        let task = tokio::spawn(stream.for_each(|_| std::future::ready(())));
        reader.wait_until_ready().await.expect("the watcher lives");
        let name = format!("during-{streaming}");
        maps.create(&post, &config_map(&name, json!({}))).await.expect("creates");
        maps.delete("early", &DeleteParams::default()).await.ok();
        let patience = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let mut names: Vec<String> =
                reader.state().iter().filter_map(|m| m.metadata.name.clone()).collect();
            names.sort();
            if names.contains(&name) && !names.contains(&"early".to_owned()) {
                break;
            }
            assert!(tokio::time::Instant::now() < patience, "awaited {name} and no early, have {names:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        task.abort();
    }
}
