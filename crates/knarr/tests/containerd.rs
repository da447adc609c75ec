//! A cluster whose containers are containerd's: the real binary against Debian's containerd, started here with
//! directories and a socket of its own. Needs what every cluster needs, and containerd, ctr and runc.

mod frame;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use frame::{Cluster, Place, output};

/// A containerd of ours; ended when dropped, after the cluster.
struct Containerd {
    child: Child,
    dir: String,
}

impl Containerd {
    fn start(place: &Place) -> Containerd {
        let at = |name: &str| place.path(&format!("containerd/{name}"));
        let config = format!(
            r#"version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "knarr.test/pause:1"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{net}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
"#,
            root = at("root"),
            state = at("state"),
            socket = at("sock"),
            bin = at("bin"),
            net = at("net"),
            opt = at("opt"),
        );
        std::fs::create_dir_all(at("")).expect("makes a directory");
        std::fs::write(at("config.toml"), config).expect("writes");
        let log = std::fs::File::create(at("log")).expect("writes");
        let child = place
            .command("containerd", &["--config", &at("config.toml")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("containerd starts");
        let containerd = Containerd { child, dir: at("") };
        let deadline = std::time::Instant::now() + frame::PATIENCE;
        let answers =
            || output(Command::new("ctr").args(["--address", &at("sock"), "version"])).status.success();
        while !answers() {
            assert!(std::time::Instant::now() < deadline, "waited until containerd answers");
            std::thread::yield_now();
        }
        containerd
    }

    fn endpoint(&self) -> String {
        format!("unix://{}sock", self.dir)
    }

    /// What containerd still has.
    fn left(&self) -> String {
        let socket = format!("{}sock", self.dir);
        let listed = output(Command::new("ctr").args([
            "--address",
            &socket,
            "--namespace",
            "k8s.io",
            "containers",
            "list",
            "-q",
        ]));
        String::from_utf8_lossy(&listed.stdout).trim().to_owned()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        for point in points.iter().rev().filter(|point| Path::new(point).starts_with(&self.dir)) {
            let _ = nix::mount::umount2(*point, nix::mount::MntFlags::MNT_DETACH);
        }
        // The cluster's directory around it could not be removed with these mounts in it.
        let _ = std::fs::remove_dir_all(Path::new(&self.dir).parent().expect("it lies in the cluster's"));
    }
}

const MANIFEST: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: web
  labels: {app: web}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: nginx
    image: nginx
    imagePullPolicy: IfNotPresent
    ports: [{containerPort: 80}]
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
  - name: side
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, "echo hello from the side; touch /tmp/here; sleep 3600"]
    readinessProbe: {exec: {command: [cat, /tmp/here]}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
"#;

#[test]
fn a_cluster_runs_its_pods_in_containerd() {
    if !frame::ready("the cluster with containerd", &["containerd", "ctr", "runc", "kubectl", "curl"]) {
        return;
    }
    let place = Place::new("cd");
    let containerd = Containerd::start(&place);
    // Dropped after the cluster that uses it.
    let mut c =
        Cluster::up(place, vec!["kubectl".into()], &["--container-runtime-endpoint", &containerd.endpoint()]);
    c.wait_for("the node tells its runtime", &["get", "nodes", "-o", "wide"], |o| {
        o.contains("containerd://")
    });
    c.apply(MANIFEST);
    c.wait_for("all containers are ready", &["get", "pod", "web"], |o| o.contains("2/2"));
    let address = c.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
    let page = c.wait("the service answers", || c.get(&format!("http://{address}/")));
    assert!(page.contains("nginx"), "{page}");
    c.wait_for("the log", &["logs", "web", "-c", "side"], |o| o.contains("hello from the side"));
    assert!(c.kubectl(&["exec", "web", "-c", "side", "--", "cat", "/etc/hostname"]).contains("web"));
    let inside = ["exec", "web", "-c", "side", "--", "wget", "-qO-", "http://web.default/"];
    c.wait_for("a pod reaches the service by name", &inside, |o| o.contains("nginx"));
    let page = c.forwarded("pod/web");
    assert!(page.contains("nginx"), "{page}");
    survives_a_kill(&c, &address);

    c.kubectl(&["delete", "service", "web"]);
    c.kubectl(&["delete", "pod", "web", "--grace-period=1"]);
    c.wait("containerd has forgotten the pod", || containerd.left().is_empty().then_some(()));
    // One more, for the purge to find.
    c.apply(MANIFEST);
    c.wait_for("all containers are ready again", &["get", "pod", "web"], |o| o.contains("2/2"));
    assert!(c.place.dir.path().join("containerd/net/10-knarr.conflist").exists());
    let verified = c.down();
    assert!(verified.contains("Nothing is left."), "{verified}");
    assert_eq!(containerd.left(), "", "pods were removed from containerd");
    for dir in ["bin", "net"] {
        let left: Vec<_> = std::fs::read_dir(c.place.path(&format!("containerd/{dir}"))).unwrap().collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
}

/// `kill -9` of knarr: containers keep serving, and the next process takes them over with no restart.
fn survives_a_kill(c: &Cluster, address: &str) {
    let ids = [
        "get",
        "pod",
        "web",
        "-o",
        "jsonpath={range .status.containerStatuses[*]}{.containerID} {.restartCount}{\"\\n\"}{end}",
    ];
    let before = c.kubectl(&ids);
    c.kill(address);
    c.wait_for("the pod is ready again", &["get", "pod", "web"], |o| o.contains("2/2"));
    assert_eq!(before, c.kubectl(&ids), "no container was replaced or restarted");
}
