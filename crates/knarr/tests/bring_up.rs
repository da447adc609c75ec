//! What `up`, `down`, `status` and `check` say when something is in the way, and that a second `up` changes nothing.

mod frame;

use std::net::TcpListener;
use std::process::Command;

use frame::{Cluster, Place, knarr, must, output, text};

/// Who is not root.
const NOBODY: &str = "65534";

/// Nothing but root; says so where that is missing.
fn root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {test} needs root");
    }
    root
}

/// Runs knarr; returns whether it succeeded, and all it printed.
fn run(command: &mut Command) -> (bool, String) {
    let output = output(command);
    (output.status.success(), text(&output))
}

#[test]
fn without_root_each_command_says_so_in_one_sentence() {
    if !root("the test of users without rights") {
        return;
    }
    // Where everybody may run it.
    let dir = tempfile::Builder::new().prefix("kw").tempdir_in("/tmp").unwrap();
    let program = dir.path().join("knarr");
    std::fs::copy(knarr(), &program).unwrap();
    must(Command::new("chmod").arg("755").arg(dir.path()));
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let settings = data.join("settings.json");
    std::fs::write(&settings, "{}").unwrap();
    must(Command::new("chmod").arg("600").arg(&settings));
    let nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(&program).args(args);
        run(&mut command)
    };
    let data = data.display().to_string();
    let other = dir.path().join("none").display().to_string();
    for args in [
        &["up", "--data-dir", &data][..],
        &["up", "--data-dir", &other],
        &["down", "--data-dir", &data],
        &["down", "--data-dir", &other],
        &["status", "--data-dir", &data],
    ] {
        let want = "knarr: needed: root privileges; run it with sudo\n";
        assert_eq!(nobody(args), (false, want.to_owned()), "{args:?}");
    }
    let (ok, said) = nobody(&["check", "--data-dir", &other]);
    assert!(!ok && said.contains("✘ root privileges: run it with sudo"), "{said}");
    assert!(said.contains("✔ kernel: overlayfs"), "the rest is judged all the same: {said}");
}

#[test]
fn a_taken_port_and_missing_programs_are_told_with_the_way_out() {
    if !root("the test of preconditions") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data").display().to_string();
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (taken_port, free_port) =
        (taken.local_addr().unwrap().port().to_string(), free.local_addr().unwrap().port().to_string());
    drop(free);
    let socket = dir.path().join("nobody.sock").display().to_string();
    let cases: [(&[&str], &str, &str); 4] = [
        (
            &["--port", &taken_port, "--kubelet-port", &free_port],
            "/usr/sbin:/usr/bin:/sbin:/bin",
            &format!(
                "needed: port {taken_port} is free; another program listens there; end it or choose another with --port"
            ),
        ),
        (
            &["--port", &free_port, "--kubelet-port", &taken_port],
            "/usr/sbin:/usr/bin:/sbin:/bin",
            "choose another with --kubelet-port",
        ),
        (
            &["--port", &free_port, "--kubelet-port", "0"],
            "/nowhere",
            "needed: nftables (nft); install the package nftables",
        ),
        (
            &["--port", &free_port, "--kubelet-port", "0", "--container-runtime-endpoint", &socket],
            "/usr/sbin:/usr/bin:/sbin:/bin",
            "start the container runtime, or leave --container-runtime-endpoint out",
        ),
    ];
    for (options, path, want) in cases {
        let mut command = Command::new(knarr());
        command.args(["up", "--data-dir", &data, "--no-kubeconfig"]).args(options).env("PATH", path);
        let (ok, said) = run(&mut command);
        assert!(!ok && said.starts_with("knarr: needed: ") && said.contains(want), "{options:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!dir.path().join("data").exists(), "nothing was made");
    }
}

#[test]
fn all_preconditions_are_listed() {
    if !frame::ready("the list of preconditions", &["nft"]) {
        return;
    }
    let place = Place::new("check");
    let (ok, said) =
        run(&mut place.command(&knarr().display().to_string(), &["check", "--data-dir", &place.path("k")]));
    assert!(ok, "{said}");
    for what in [
        "root privileges",
        "port 6443",
        "nftables (nft)",
        "address translation",
        "overlayfs",
        "control groups",
        "net namespaces",
    ] {
        assert!(said.lines().any(|line| line.starts_with("✔ ") && line.contains(what)), "{what}: {said}");
    }
}

#[test]
fn a_second_up_changes_nothing_and_the_kubeconfig_is_shared_politely() {
    if !frame::ready("the second up", &["kubectl"]) {
        return;
    }
    let mut c = Cluster::planned(Place::new("again"), vec!["kubectl".into()]);
    let (first, second) = (c.place.path("first.yaml"), c.place.path("second.yaml"));
    let theirs = "apiVersion: v1\nkind: Config\nclusters: [{name: work, cluster: {server: 'https://127.0.0.1:1'}}]\nusers: [{name: me, user: {}}]\ncontexts: [{name: work, context: {cluster: work, user: me}}]\ncurrent-context: work\n";
    std::fs::write(&second, theirs).unwrap();
    let list = format!("{first}:{second}");
    let data = c.data_dir();
    let knarr = knarr().display().to_string();
    let up = |extra: &[&str]| {
        let mut command = c.place.command(&knarr, &["up", "--data-dir", &data, "--node-name", "walker"]);
        run(command.args(extra).env("KUBECONFIG", &list))
    };
    let (ok, said) = up(&[]);
    assert!(ok && said.contains("node walker is Ready"), "{said}");
    assert!(
        !std::path::Path::new(&first).exists(),
        "a file that was not there is not made beside one that is"
    );
    let kubectl = |args: &[&str]| must(c.place.command("kubectl", args).env("KUBECONFIG", &list));
    assert_eq!(kubectl(&["config", "current-context"]).trim(), "knarr");
    assert!(kubectl(&["config", "get-contexts", "-o", "name"]).contains("work"));
    assert!(kubectl(&["get", "nodes"]).contains("walker"));

    let files = [format!("{data}/settings.json"), format!("{data}/admin.kubeconfig"), second.clone()];
    let state = || {
        files.clone().map(|file| {
            (std::fs::metadata(&file).unwrap().modified().unwrap(), std::fs::read(&file).unwrap())
        })
    };
    let (before, pid) = (state(), c.pid());
    let (ok, said) = up(&[]);
    assert!(ok && said.starts_with("The cluster is already up; nothing was changed."), "{said}");
    assert!(state() == before && c.pid() == pid, "nothing was changed");
    let (ok, said) = up(&["--service-cidr", "10.97.0.0/16"]);
    assert!(!ok && said.contains("`knarr down` first"), "{said}");
    let port = ["up", "--data-dir", &c.place.path("other"), "--no-kubeconfig"];
    let (ok, said) = run(&mut c.place.command(&knarr, &port));
    assert!(!ok && said.contains("needed: port 6443 is free"), "a second cluster on the same ports: {said}");

    let verified = c.down();
    assert!(verified.contains("Nothing is left."), "{verified}");
    let left = std::fs::read_to_string(&second).unwrap();
    assert!(left.contains("work") && !left.contains("knarr"), "{left}");
}
