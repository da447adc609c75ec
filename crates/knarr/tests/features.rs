//! What a pod may ask of its node, on a running cluster with the real kubectl: each pod tells by its log or its
//! status that it got it.

mod frame;

use std::process::{Command, Stdio};

use frame::{Cluster, Place, must};

/// A pod and what shows that the node did as asked.
struct Feature {
    name: &'static str,
    /// The pod's spec, as flow YAML. `SH` stands for a container `c` of busybox that runs the script after it.
    spec: &'static str,
    /// Parts of the log of its container `c`.
    log: &'static [&'static str],
    /// Parts of its status, as JSON.
    status: &'static [&'static str],
}

const fn feature(name: &'static str, spec: &'static str, log: &'static [&'static str]) -> Feature {
    Feature { name, spec, log, status: &[] }
}

const BUSYBOX: &str = "image: busybox, imagePullPolicy: IfNotPresent";

const FEATURES: &[Feature] = &[
    feature(
        "host-aliases",
        "{hostAliases: [{ip: 10.1.2.3, hostnames: [foo.local, bar.local]}], containers: [{name: c, BUSYBOX, command: [cat, /etc/hosts]}]}",
        &["10.1.2.3\tfoo.local\tbar.local"],
    ),
    feature(
        "names",
        "{hostname: a, subdomain: b, containers: [{name: c, BUSYBOX, command: [sh, -c, 'hostname; cat /etc/hosts']}]}",
        &["a\n", "\ta.b.default.svc.cluster.local\ta"],
    ),
    feature(
        "dns",
        "{dnsPolicy: None, dnsConfig: {nameservers: [10.9.9.9], searches: [x.example], options: [{name: ndots, value: '2'}]}, containers: [{name: c, BUSYBOX, command: [cat, /etc/resolv.conf]}]}",
        &["search x.example\nnameserver 10.9.9.9\noptions ndots:2"],
    ),
    feature(
        "sub-path",
        "{volumes: [{name: v, configMap: {name: settings}}, {name: w, emptyDir: {}}], containers: [{name: c, BUSYBOX, env: [{name: WHO, valueFrom: {fieldRef: {fieldPath: metadata.name}}}], command: [sh, -c, 'cat /etc/one; echo x > /w/file; ls /all'], volumeMounts: [{name: v, mountPath: /etc/one, subPath: color}, {name: w, mountPath: /w, subPathExpr: $(WHO)}, {name: w, mountPath: /all}]}]}",
        &["blue", "sub-path"],
    ),
    feature(
        "downward",
        "{volumes: [{name: v, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, {path: cpu, resourceFieldRef: {containerName: c, resource: limits.cpu, divisor: 1m}}]}}], containers: [{name: c, BUSYBOX, resources: {limits: {cpu: 250m, memory: 32Mi}}, env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}, {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory}}}, {name: BOTH, value: '$(IP)-$(MEMORY)'}], command: [sh, -c, 'cat /v/labels /v/cpu; echo; echo both=$BOTH'], volumeMounts: [{name: v, mountPath: /v}]}]}",
        &["app=\"downward\"", "250", "both=10.42.0.", "-33554432"],
    ),
    feature(
        "projected",
        "{volumes: [{name: v, projected: {defaultMode: 256, sources: [{serviceAccountToken: {path: token, audience: x, expirationSeconds: 600}}, {configMap: {name: settings, items: [{key: color, path: deep/color}]}}]}}], containers: [{name: c, BUSYBOX, command: [sh, -c, 'tr -cd . < /v/token | wc -c; cat /v/deep/color; ls -lL /v/deep/color'], volumeMounts: [{name: v, mountPath: /v}]}]}",
        &["2\n", "blue", "-r--------"],
    ),
    Feature {
        name: "last-words",
        spec: "{restartPolicy: Never, containers: [{name: c, BUSYBOX, terminationMessagePolicy: FallbackToLogsOnError, command: [sh, -c, 'echo out of ideas; exit 1']}]}",
        log: &["out of ideas"],
        status: &[r#""message":"out of ideas\n""#],
    },
    feature(
        "sysctls",
        "{securityContext: {sysctls: [{name: kernel.shm_rmid_forced, value: '1'}, {name: net.ipv4.ip_local_port_range, value: 2000 3000}]}, containers: [{name: c, BUSYBOX, command: [sh, -c, 'cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range']}]}",
        &["1\n2000\t3000"],
    ),
    feature(
        "one-process-table",
        "{shareProcessNamespace: true, containers: [{name: other, BUSYBOX, command: [sleep, '98765']}, {name: c, BUSYBOX, command: [sh, -c, 'until ps | grep -q [9]8765; do :; done; echo seen; sleep 9999']}]}",
        &["seen"],
    ),
    feature(
        "users",
        "{securityContext: {runAsUser: 1234, runAsGroup: 2345, fsGroup: 3456, supplementalGroups: [4567]}, volumes: [{name: v, emptyDir: {}}], containers: [{name: c, BUSYBOX, command: [sh, -c, 'id -u; id -g; id -G; touch /v/mine; ls -ln /v'], volumeMounts: [{name: v, mountPath: /v}]}]}",
        &["1234\n2345\n2345 3456 4567", "1234     3456"],
    ),
    feature(
        "image-volume",
        "{volumes: [{name: v, image: {reference: toolbox, pullPolicy: IfNotPresent}}], containers: [{name: c, BUSYBOX, command: [sh, -c, '/v/toolbox exit 0 && echo runs; touch /v/x || echo refused'], volumeMounts: [{name: v, mountPath: /v}]}]}",
        &["runs", "refused"],
    ),
    feature(
        "read-only",
        "{containers: [{name: c, BUSYBOX, securityContext: {readOnlyRootFilesystem: true}, command: [sh, -c, 'touch /x || echo refused']}]}",
        &["refused"],
    ),
    feature(
        "rights",
        "{containers: [{name: c, BUSYBOX, securityContext: {allowPrivilegeEscalation: false, seccompProfile: {type: RuntimeDefault}, capabilities: {drop: [ALL], add: [NET_ADMIN]}}, command: [grep, -E, 'CapEff|NoNewPrivs|Seccomp:', /proc/self/status]}]}",
        &["CapEff:\t0000000000001000", "NoNewPrivs:\t1", "Seccomp:\t2"],
    ),
    feature(
        "memory-disk",
        "{volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: 4Mi}}], containers: [{name: c, BUSYBOX, command: [sh, -c, 'df -k /v; head -c 5000000 /dev/zero > /v/big || echo full'], volumeMounts: [{name: v, mountPath: /v}]}]}",
        &["tmpfs                     4096", "full"],
    ),
    feature(
        "init-and-sidecar",
        "{volumes: [{name: v, emptyDir: {}}], initContainers: [{name: first, BUSYBOX, command: [sh, -c, 'echo first > /v/f'], volumeMounts: [{name: v, mountPath: /v}]}, {name: side, BUSYBOX, restartPolicy: Always, command: [sh, -c, 'echo side >> /v/f; sleep 9999'], startupProbe: {exec: {command: [grep, side, /v/f]}, periodSeconds: 1}, volumeMounts: [{name: v, mountPath: /v}]}], containers: [{name: c, BUSYBOX, command: [sh, -c, 'cat /v/f; sleep 9999'], volumeMounts: [{name: v, mountPath: /v}]}]}",
        &["first\nside"],
    ),
    feature(
        "host-namespaces",
        "{hostPID: true, hostIPC: true, hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet, containers: [{name: c, BUSYBOX, command: [sh, -c, 'ps | grep -q knarr && echo sees the host; ip addr; cat /etc/resolv.conf']}]}",
        &["sees the host", "knarr0", "nameserver 10.96.0.10"],
    ),
    Feature {
        name: "deadline",
        spec: "{activeDeadlineSeconds: 1, terminationGracePeriodSeconds: 1, containers: [{name: c, BUSYBOX, command: [sleep, '9999']}]}",
        log: &[],
        status: &[r#""reason":"DeadlineExceeded""#, r#""phase":"Failed""#],
    },
    Feature {
        name: "liveness",
        spec: "{terminationGracePeriodSeconds: 1, containers: [{name: c, BUSYBOX, command: [sleep, '9999'], livenessProbe: {exec: {command: ['false']}, periodSeconds: 1, failureThreshold: 1}}]}",
        log: &[],
        status: &[r#""restartCount":1"#],
    },
    Feature {
        name: "gate",
        spec: "{readinessGates: [{conditionType: example.com/ok}], containers: [{name: c, BUSYBOX, command: [sleep, '9999']}]}",
        log: &[],
        status: &[
            r#""reason":"ReadinessGatesNotReady""#,
            r#"corresponding condition of pod readiness gate \"example.com/ok\" does not exist."#,
        ],
    },
    Feature {
        name: "hooks",
        spec: "{terminationGracePeriodSeconds: 3, volumes: [{name: v, hostPath: {path: PLACE/hooks, type: DirectoryOrCreate}}], containers: [{name: c, BUSYBOX, command: [sleep, '9999'], lifecycle: {postStart: {exec: {command: [sh, -c, 'echo began > /v/began']}}, preStop: {exec: {command: [sh, -c, 'echo ended > /v/ended; kill -9 1']}}}, volumeMounts: [{name: v, mountPath: /v}]}]}",
        log: &[],
        status: &[r#""ready":true"#],
    },
    Feature {
        name: "host-port",
        spec: "{containers: [{name: c, image: toolbox, imagePullPolicy: IfNotPresent, command: [/toolbox, serve, '8080'], ports: [{containerPort: 8080, hostPort: 18081}]}]}",
        log: &[],
        status: &[r#""ready":true"#],
    },
];

#[test]
fn pods_get_what_they_ask_for() {
    if !frame::ready("the table of features", &["kubectl", "curl"]) {
        return;
    }
    let mut c = Cluster::up(Place::new("features"), vec!["kubectl".into()], &[]);
    let place = c.place.dir.path().display().to_string();
    c.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {color: blue}\n");
    let pod = |feature: &Feature| {
        let spec = feature.spec.replace("BUSYBOX", BUSYBOX).replace("PLACE", &place);
        let name = feature.name;
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec: {spec}\n"
        )
    };
    c.apply(&FEATURES.iter().map(pod).collect::<String>());
    for feature in FEATURES {
        for part in feature.log {
            let what = format!("the log of {} has {part:?}", feature.name);
            c.wait_for(&what, &["logs", feature.name, "-c", "c"], |o| o.contains(part));
        }
        for part in feature.status {
            let what = format!("the status of {} has {part}", feature.name);
            c.wait_for(&what, &["get", "pod", feature.name, "-o", "jsonpath={.status}"], |o| {
                o.contains(part)
            });
        }
    }
    a_gate_opens(&c);
    a_port_of_the_node_leads_to_the_pod(&c);
    a_container_is_added_to_look_around(&c);
    files_are_copied_and_output_is_attached(&c);
    hooks_run_at_both_ends(&c, &place);
    c.kubectl(&["delete", "pods", "--all", "--grace-period=1"]);
    let verified = c.down();
    assert!(verified.contains("Nothing is left."), "{verified}");
}

fn a_gate_opens(c: &Cluster) {
    let patch = r#"{"status":{"conditions":[{"type":"example.com/ok","status":"True"}]}}"#;
    c.kubectl(&["patch", "pod", "gate", "--subresource=status", "-p", patch]);
    c.kubectl(&["wait", "--for=condition=Ready", "pod/gate", "--timeout=30s"]);
}

fn a_port_of_the_node_leads_to_the_pod(c: &Cluster) {
    let node = c.kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}"]);
    let page = c.wait("the host port answers", || c.get(&format!("http://{node}:18081/")));
    assert!(page.contains("host-port"), "{page}");
}

fn a_container_is_added_to_look_around(c: &Cluster) {
    c.kubectl(&[
        "debug",
        "gate",
        "--container=look",
        "--image=busybox",
        "--image-pull-policy=IfNotPresent",
        "--target=c",
        "--",
        "sh",
        "-c",
        "ps; sleep 9999",
    ]);
    c.wait_for("the added container sees its target's processes", &["logs", "gate", "-c", "look"], |o| {
        o.contains("sleep 9999")
    });
}

fn files_are_copied_and_output_is_attached(c: &Cluster) {
    let (from, to) = (c.place.path("from"), c.place.path("to"));
    std::fs::write(&from, "carried").unwrap();
    c.kubectl(&["cp", &from, "gate:/tmp/there", "-c", "c"]);
    c.kubectl(&["cp", "gate:/tmp/there", &to, "-c", "c"]);
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "carried");
    let mut child = c
        .kubectl_command(&[
            "run",
            "typed",
            "--rm",
            "-i",
            "--image=busybox",
            "--image-pull-policy=IfNotPresent",
            "--restart=Never",
            "--",
            "sh",
            "-c",
            "read line; echo got $line",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"words\n").expect("is read");
    let said = child.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("got words"), "{said}");
}

fn hooks_run_at_both_ends(c: &Cluster, place: &str) {
    let read = |name: &str| std::fs::read_to_string(format!("{place}/hooks/{name}")).ok();
    assert_eq!(read("began").as_deref(), Some("began\n"));
    c.kubectl(&["delete", "pod", "hooks"]);
    assert_eq!(read("ended").as_deref(), Some("ended\n"));
    must(Command::new("rm").args(["-r", &format!("{place}/hooks")]));
}
