//! A user's walk through a real cluster: real binary, real containers, real packets, a real kubectl.
//!
//! Needs root, the kernel's namespaces and the test images (`make images`); says so and ends without them,
//! except in CI, where their absence is a failure. Everything happens in a network namespace and a data
//! directory of its own and is proved gone at the end.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long the cluster may take for any one thing.
const PATIENCE: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A cluster under test; removed when dropped.
struct Cluster {
    namespace: String,
    dir: tempfile::TempDir,
    kubectl: Vec<String>,
    down: bool,
}

fn knarr() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_knarr"))
}

fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images")
}

/// Whether the machine has what the test needs; says so loudly where not, and fails in CI.
fn ready() -> bool {
    let archives = std::fs::read_dir(images()).map(|d| d.count()).unwrap_or(0);
    let missing = match (nix::unistd::geteuid().is_root(), archives) {
        (false, _) => "root",
        (true, 0) => "the test images (make images)",
        _ => return true,
    };
    assert!(std::env::var_os("CI").is_none(), "CI must have {missing}");
    eprintln!("SKIPPED: the walk needs {missing}");
    false
}

impl Cluster {
    fn up(name: &str, kubectl: Vec<String>) -> Cluster {
        let namespace = format!("knarr-{name}-{}", std::process::id());
        let dir = tempfile::Builder::new().prefix("kw").tempdir_in("/tmp").expect("a directory");
        must(Command::new("ip").args(["netns", "add", &namespace]));
        let cluster = Cluster { namespace, dir, kubectl, down: false };
        must(&mut cluster.command("ip", &["link", "set", "lo", "up"]));
        let data = cluster.data_dir();
        let images = images().canonicalize().expect("the images are there").display().to_string();
        let output = must(&mut cluster.command(
            &knarr().display().to_string(),
            &["up", "--data-dir", &data, "--node-name", "walker", "--images", &images, "--no-kubeconfig"],
        ));
        println!("{output}");
        cluster
    }

    fn data_dir(&self) -> String {
        self.dir.path().join("k").display().to_string()
    }

    /// A command in the cluster's network namespace.
    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg(program).args(args);
        command.env("KUBECONFIG", format!("{}/admin.kubeconfig", self.data_dir()));
        command
    }

    fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut all: Vec<&str> = self.kubectl[1..].iter().map(String::as_str).collect();
        all.extend(args);
        self.command(&self.kubectl[0], &all)
    }

    /// Runs kubectl; it must succeed.
    fn kubectl(&self, args: &[&str]) -> String {
        must(&mut self.kubectl_command(args))
    }

    fn apply(&self, manifest: &str) -> String {
        let path = self.dir.path().join("manifest.yaml");
        std::fs::write(&path, manifest).expect("writes");
        self.kubectl(&["apply", "-f", &path.display().to_string()])
    }

    /// Repeats a look until it finds something.
    fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return found;
            }
            if Instant::now() > deadline {
                let pods = output(&mut self.kubectl_command(&["get", "pods", "-A", "-o", "wide"]));
                let events = output(&mut self.kubectl_command(&["get", "events", "-A"]));
                let log =
                    std::fs::read_to_string(format!("{}/knarr.log", self.data_dir())).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(40).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                panic!(
                    "waited {} s until {what}\n{}\n{}\n{}",
                    PATIENCE.as_secs(),
                    text(&pods),
                    text(&events),
                    tail.join("\n")
                );
            }
            std::thread::park_timeout(LOOK_AGAIN);
        }
    }

    /// Waits until a kubectl command prints what `is` accepts.
    fn wait_for(&self, what: &str, args: &[&str], is: impl Fn(&str) -> bool) -> String {
        self.wait(what, || {
            let result = output(&mut self.kubectl_command(args));
            let out = String::from_utf8_lossy(&result.stdout).into_owned();
            (result.status.success() && is(&out)).then_some(out)
        })
    }

    /// The body a URL answers with, from the host's side.
    fn get(&self, url: &str) -> Option<String> {
        let result = output(&mut self.command("curl", &["-sS", "--max-time", "3", url]));
        result.status.success().then(|| String::from_utf8_lossy(&result.stdout).into_owned())
    }

    fn down(&mut self) -> String {
        self.down = true;
        let data = self.data_dir();
        must(
            &mut self.command(
                &knarr().display().to_string(),
                &["down", "--data-dir", &data, "--purge", "--verify"],
            ),
        )
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.down {
            let data = self.data_dir();
            output(
                &mut self.command(&knarr().display().to_string(), &["down", "--data-dir", &data, "--purge"]),
            );
        }
        output(Command::new("ip").args(["netns", "delete", &self.namespace]));
    }
}

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn must(command: &mut Command) -> String {
    let result = output(command);
    assert!(result.status.success(), "{command:?}: {}\n{}", result.status, text(&result));
    text(&result)
}

const MANIFEST: &str = "
apiVersion: v1
kind: ConfigMap
metadata:
  name: settings
data:
  color: blue
---
apiVersion: v1
kind: Pod
metadata:
  name: client
spec:
  containers:
  - name: shell
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, '3600']
    env:
    - name: COLOR
      valueFrom:
        configMapKeyRef: {name: settings, key: color}
";

#[test]
fn a_user_walks_through_a_cluster_with_the_machines_kubectl() {
    let version = Command::new("kubectl").args(["version", "--client"]).output();
    if !version.is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED: there is no kubectl on this machine");
        return;
    }
    if ready() {
        walk("theirs", vec!["kubectl".into()]);
    }
}

#[test]
fn a_user_walks_through_a_cluster_with_knarr_kubectl() {
    if ready() {
        walk("ours", vec![knarr().display().to_string(), "kubectl".into()]);
    }
}

fn walk(name: &str, kubectl: Vec<String>) {
    let mut c = Cluster::up(name, kubectl);
    assert!(c.kubectl(&["get", "nodes"]).contains("Ready"));

    c.kubectl(&["create", "deployment", "web", "--image=nginx:latest"]);
    c.kubectl(&["patch", "deployment", "web", "-p", r#"{"spec":{"template":{"spec":{"containers":[{"name":"nginx","imagePullPolicy":"IfNotPresent"}],"terminationGracePeriodSeconds":1}}}}"#]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let wide = c.wait_for("one pod of web is left", &["get", "pods", "-l", "app=web", "-o", "wide"], |o| {
        o.lines().count() == 2
    });
    assert!(wide.contains("walker") && wide.contains("1/1"), "{wide}");
    assert!(c.kubectl(&["describe", "deployment", "web"]).contains("NewReplicaSet"));
    let pod = c.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}"]);
    assert!(c.kubectl(&["describe", "pod", &pod]).contains("Started"));
    assert!(c.kubectl(&["exec", &pod, "--", "cat", "/etc/hostname"]).contains(&pod));

    c.kubectl(&["expose", "deployment", "web", "--port=80", "--type=NodePort"]);
    let address = c.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
    let port = c.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}"]);
    let page = c.wait("the service answers", || c.get(&format!("http://{address}/")));
    assert!(page.contains("nginx"), "{page}");
    let node = c.kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}"]);
    assert!(c.wait("the node port answers", || c.get(&format!("http://{node}:{port}/"))).contains("nginx"));
    c.wait_for("the request is in the log", &["logs", &pod], |o| o.contains("GET /"));

    assert!(c.apply(MANIFEST).contains("pod/client created"));
    c.kubectl(&["wait", "--for=condition=Ready", "pod/client", "--timeout=60s"]);
    assert!(c.apply(MANIFEST).contains("pod/client unchanged"));
    assert!(
        c.apply(&MANIFEST.replace("color: blue", "color: green")).contains("configmap/settings configured")
    );
    assert_eq!(c.kubectl(&["exec", "client", "--", "sh", "-c", "echo $COLOR"]).trim(), "blue");
    for name in ["web", "web.default", "web.default.svc.cluster.local"] {
        let url = format!("http://{name}/");
        c.wait_for(
            "another pod reaches the service by name",
            &["exec", "client", "--", "wget", "-qO-", &url],
            |o| o.contains("nginx"),
        );
    }

    c.kubectl(&["scale", "deployment", "web", "--replicas=5"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    c.kubectl(&["delete", "pod", &pod, "--wait=false"]);
    c.wait_for("a deleted pod is replaced", &["get", "pods", "-l", "app=web"], |o| {
        !o.contains(&pod) && o.matches("1/1").count() == 5
    });

    c.kubectl(&["set", "image", "deployment/web", "nginx=nginx:next"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    assert!(
        c.wait("the new version answers", || c.get(&format!("http://{address}/"))).contains("next version")
    );
    assert!(c.kubectl(&["rollout", "history", "deployment/web"]).contains("REVISION"));
    c.kubectl(&["rollout", "undo", "deployment/web"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    assert!(
        !c.wait("the old version answers", || c.get(&format!("http://{address}/"))).contains("next version")
    );

    forwards_a_port(&c);
    survives_a_kill(&c, &address);

    c.kubectl(&["delete", "deployment,service", "web"]);
    c.kubectl(&["delete", "pod", "client", "--grace-period=1"]);
    c.wait_for("all pods are gone", &["get", "pods", "-o", "name"], |o| o.trim().is_empty());
    let verified = c.down();
    assert!(verified.contains("Nothing is left."), "{verified}");
}

fn forwards_a_port(c: &Cluster) {
    let mut forward = c.kubectl_command(&["port-forward", "deployment/web", "18080:80"]);
    let mut child =
        forward.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts");
    let page = c.wait("the forwarded port answers", || c.get("http://127.0.0.1:18080/"));
    child.kill().expect("ends");
    child.wait().expect("ends");
    assert!(page.contains("nginx"), "{page}");
}

/// `kill -9` of knarr: containers keep serving, and the next process adopts them with no restart.
fn survives_a_kill(c: &Cluster, address: &str) {
    let restarts = |c: &Cluster| {
        c.kubectl(&["get", "pods", "-o", "jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}"])
    };
    let before = c.wait("all pods are settled", || {
        let pods = c.kubectl(&["get", "pods"]);
        (!pods.contains("Terminating") && pods.matches("1/1").count() == 6).then(|| restarts(c))
    });
    let data = c.data_dir();
    let pid = || -> Option<String> {
        let found = output(Command::new("pgrep").args(["-f", &format!("knarr run --data-dir {data}")]));
        String::from_utf8_lossy(&found.stdout).lines().next().map(str::to_owned)
    };
    let old = pid().expect("knarr runs");
    must(Command::new("kill").args(["-9", &old]));
    assert!(
        c.get(&format!("http://{address}/")).is_some_and(|p| p.contains("nginx")),
        "containers serve on without knarr"
    );
    c.wait("knarr runs again", || pid().filter(|p| *p != old));
    c.wait_for("the API answers again", &["get", "nodes"], |o| o.contains(" Ready"));
    let after = c.wait("all pods are known again", || {
        let pods = c.kubectl(&["get", "pods"]);
        (pods.matches("1/1").count() == 6).then(|| restarts(c))
    });
    assert_eq!(before, after, "no container was replaced or restarted");
    c.kubectl(&["scale", "deployment", "web", "--replicas=6"]);
    c.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
}
