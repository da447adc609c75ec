//! A cluster under test: the real binary in a network namespace and a data directory of its own, both proved gone
//! at the end. What it takes: root, namespaces, the test images (`make images`).
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long the cluster may take for any one thing.
pub const PATIENCE: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Whether the machine has what a test needs: root, the test images, and these programs. Says so loudly where not,
/// and fails in CI; except for kubectl, which no package brings: the walk with our own covers it there.
pub fn ready(test: &str, programs: &[&str]) -> bool {
    let archives = std::fs::read_dir(images()).map(|d| d.count()).unwrap_or(0);
    let in_path = |program: &&&str| {
        let dirs = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        dirs.iter().any(|dir| Path::new(dir).join(program).exists())
    };
    let missing = match (nix::unistd::geteuid().is_root(), archives) {
        (false, _) => "root".to_owned(),
        (true, 0) => "the test images (make images)".to_owned(),
        _ => match programs.iter().find(|program| !in_path(program)) {
            Some(program) => format!("the program {program}"),
            None => return true,
        },
    };
    let may_miss = missing == "the program kubectl" || std::env::var_os("CI").is_none();
    assert!(may_miss, "CI must have {missing}");
    eprintln!("SKIPPED: {test} needs {missing}");
    false
}

pub fn knarr() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_knarr"))
}

pub fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images")
}

/// A network namespace and a directory; removed when dropped.
pub struct Place {
    pub namespace: String,
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new(name: &str) -> Place {
        let namespace = format!("knarr-{name}-{}", std::process::id());
        let dir = tempfile::Builder::new().prefix("kw").tempdir_in("/tmp").expect("a directory");
        must(Command::new("ip").args(["netns", "add", &namespace]));
        let place = Place { namespace, dir };
        must(&mut place.command("ip", &["link", "set", "lo", "up"]));
        place
    }

    /// A command in the network namespace.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg(program).args(args);
        command
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        output(Command::new("ip").args(["netns", "delete", &self.namespace]));
    }
}

/// A running cluster; taken down when dropped.
pub struct Cluster {
    kubectl: Vec<String>,
    down: bool,
    pub place: Place,
}

impl Cluster {
    /// Starts one with the test images, and these further options of `up`.
    pub fn up(place: Place, kubectl: Vec<String>, options: &[&str]) -> Cluster {
        let cluster = Cluster::planned(place, kubectl);
        let data = cluster.data_dir();
        let images = images().canonicalize().expect("the images are there").display().to_string();
        let mut args =
            vec!["up", "--data-dir", &data, "--node-name", "walker", "--images", &images, "--no-kubeconfig"];
        args.extend(options);
        println!("{}", must(&mut cluster.command(&knarr().display().to_string(), &args)));
        cluster
    }

    /// One that the test starts itself.
    pub fn planned(place: Place, kubectl: Vec<String>) -> Cluster {
        Cluster { place, kubectl, down: false }
    }

    pub fn data_dir(&self) -> String {
        self.place.path("k")
    }

    /// A command in the cluster's network namespace, with its kubeconfig.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = self.place.command(program, args);
        command.env("KUBECONFIG", format!("{}/admin.kubeconfig", self.data_dir()));
        command
    }

    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut all: Vec<&str> = self.kubectl[1..].iter().map(String::as_str).collect();
        all.extend(args);
        self.command(&self.kubectl[0], &all)
    }

    /// Runs kubectl; it must succeed.
    pub fn kubectl(&self, args: &[&str]) -> String {
        must(&mut self.kubectl_command(args))
    }

    pub fn apply(&self, manifest: &str) -> String {
        let path = self.place.path("manifest.yaml");
        std::fs::write(&path, manifest).expect("writes");
        self.kubectl(&["apply", "-f", &path])
    }

    /// Repeats a look until it finds something.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look() {
                return found;
            }
            if Instant::now() > deadline {
                panic!("waited {} s until {what}\n{}", PATIENCE.as_secs(), self.story());
            }
            std::thread::park_timeout(LOOK_AGAIN);
        }
    }

    /// What a reader of a failure wants to know.
    fn story(&self) -> String {
        let pods = output(&mut self.kubectl_command(&["get", "pods", "-A", "-o", "wide"]));
        let events = output(&mut self.kubectl_command(&["get", "events", "-A"]));
        let log = std::fs::read_to_string(format!("{}/knarr.log", self.data_dir())).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        format!("{}\n{}\n{tail}", text(&pods), text(&events))
    }

    /// Waits until a kubectl command prints what `is` accepts.
    pub fn wait_for(&self, what: &str, args: &[&str], is: impl Fn(&str) -> bool) -> String {
        self.wait(what, || {
            let result = output(&mut self.kubectl_command(args));
            let out = String::from_utf8_lossy(&result.stdout).into_owned();
            (result.status.success() && is(&out)).then_some(out)
        })
    }

    /// The body a URL answers with, from the host's side.
    pub fn get(&self, url: &str) -> Option<String> {
        let result = output(&mut self.command("curl", &["-sS", "--max-time", "3", url]));
        result.status.success().then(|| String::from_utf8_lossy(&result.stdout).into_owned())
    }

    /// The page behind a port forwarded to a pod or deployment.
    pub fn forwarded(&self, target: &str) -> String {
        let mut forward = self.kubectl_command(&["port-forward", target, "18080:80"]);
        let forward = forward.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = forward.spawn().expect("starts");
        let page = self.wait("the forwarded port answers", || self.get("http://127.0.0.1:18080/"));
        child.kill().expect("ends");
        child.wait().expect("ends");
        page
    }

    /// `kill -9` of knarr: the page at `address` is served on meanwhile, and then knarr is there again.
    pub fn kill(&self, address: &str) {
        let old = self.pid().expect("knarr runs");
        must(Command::new("kill").args(["-9", &old]));
        let page = self.get(&format!("http://{address}/"));
        assert!(page.is_some_and(|page| page.contains("nginx")), "containers serve on without knarr");
        self.wait("knarr runs again", || self.pid().filter(|pid| *pid != old));
        self.wait_for("the node is Ready again", &["get", "nodes"], |o| o.contains(" Ready"));
    }

    /// The process id of the server and node.
    pub fn pid(&self) -> Option<String> {
        let data = self.data_dir();
        let found = output(Command::new("pgrep").args(["-f", &format!("knarr run --data-dir {data}")]));
        String::from_utf8_lossy(&found.stdout).lines().next().map(str::to_owned)
    }

    /// Takes everything away, and proves it.
    pub fn down(&mut self) -> String {
        self.down = true;
        let data = self.data_dir();
        let knarr = knarr().display().to_string();
        must(&mut self.command(&knarr, &["down", "--data-dir", &data, "--purge", "--verify"]))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.down {
            let data = self.data_dir();
            let knarr = knarr().display().to_string();
            output(&mut self.command(&knarr, &["down", "--data-dir", &data, "--purge"]));
        }
    }
}

pub fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn must(command: &mut Command) -> String {
    let result = output(command);
    assert!(result.status.success(), "{command:?}: {}\n{}", result.status, text(&result));
    text(&result)
}
