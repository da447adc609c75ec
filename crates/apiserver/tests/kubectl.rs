//! The kubectl of this machine against a server in memory, over plain HTTP on the loopback interface.
//!
//! Without a kubectl the tests say so and end.

mod common;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use http::Request;
use http_body_util::BodyExt;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use knarr_apiserver::api::{Api, Peer};
use knarr_apiserver::identity::User;
use tokio::net::TcpListener;

const KUBECTL: &str = "/usr/bin/kubectl";

/// Serves until the runtime of the test ends.
async fn serve(api: Api) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let api = Arc::new(api);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let api = api.clone();
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let api = api.clone();
                async move {
                    let request = request.map(|body| body.map_err(std::io::Error::other).boxed_unsync());
                    let peer = Peer::InProcess(User::new("admin", &["system:masters"]));
                    Ok::<_, Infallible>(api.handle(request, &peer).await)
                }
            });
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                drop(builder.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    address
}

/// Runs kubectl; `None` if there is none. Its caches go to a directory of the test.
async fn kubectl(server: SocketAddr, args: &[&str]) -> Option<(bool, String)> {
    if !std::path::Path::new(KUBECTL).exists() {
        eprintln!("SKIPPED: there is no {KUBECTL}");
        return None;
    }
    let home = tempfile::tempdir().expect("a directory");
    let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    let output = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(KUBECTL);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", home.path())
            .env("KUBECONFIG", "/dev/null");
        command.arg(format!("--server=http://{server}")).args(args).output()
    });
    let output = output.await.expect("no panic").expect("kubectl starts");
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explain_shows_fields_with_text_from_both_documents() {
    let server = serve(common::server().await).await;
    for output in ["plaintext", "plaintext-openapiv2"] {
        let args = ["explain", "pod.spec.containers.livenessProbe", "--output", output];
        let Some((ok, text)) = kubectl(server, &args).await else { return };
        assert!(ok && text.contains("failureThreshold") && text.contains("Minimum consecutive"), "{text}");
    }
    let Some((ok, text)) = kubectl(server, &["explain", "pod.spec", "--recursive"]).await else { return };
    assert!(ok && text.contains("topologySpreadConstraints"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn apply_and_get_work_in_protobuf_and_json() {
    let server = serve(common::server().await).await;
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("object.yaml");
    let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {k: v}\n";
    std::fs::write(&file, text).expect("the directory is writable");
    let file = file.to_str().expect("a plain path");
    for args in [["apply", "-f", file], ["apply", "-f", file], ["diff", "-f", file]] {
        let Some((ok, text)) = kubectl(server, &args).await else { return };
        assert!(ok, "{args:?}: {text}");
    }
    let Some((_, text)) = kubectl(server, &["get", "configmaps,services", "-A"]).await else { return };
    assert!(text.contains("kubernetes") && text.contains("DATA"), "{text}");
}
