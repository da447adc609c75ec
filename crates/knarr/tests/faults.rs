//! Pods that cannot run, on a running cluster with the real kubectl: what their status and events say. The words
//! are upstream's, where upstream has any.

mod frame;

use frame::{Cluster, Place};
use knarr_runtime::image::build::{self, Entry, Image};

/// A pod and what must be told of it, sooner or later.
struct Fault {
    name: &'static str,
    /// The pod's spec, as flow YAML.
    spec: &'static str,
    /// Parts of the pod's status, as JSON.
    status: &'static [&'static str],
    /// Parts of its events, as `TYPE REASON MESSAGE`.
    events: &'static [&'static str],
}

const FAULTS: &[Fault] = &[
    Fault {
        name: "unreachable",
        spec: "{containers: [{name: c, image: '127.0.0.1:1/none:1'}]}",
        status: &[r#""reason":"ImagePullBackOff""#, "Back-off pulling image", "ErrImagePull: "],
        events: &[
            r#"Normal Pulling Pulling image "127.0.0.1:1/none:1""#,
            r#"Warning Failed Failed to pull image "127.0.0.1:1/none:1": "#,
            "Warning Failed Error: ErrImagePull",
            r#"Normal BackOff Back-off pulling image "127.0.0.1:1/none:1""#,
            "Warning Failed Error: ImagePullBackOff",
        ],
    },
    Fault {
        name: "no-name",
        spec: "{containers: [{name: c, image: 'Upper/Case'}]}",
        status: &[
            r#""reason":"InvalidImageName""#,
            r#"Failed to apply default image tag \"Upper/Case\": couldn't parse image name \"Upper/Case\": invalid reference format: repository name must be lowercase"#,
        ],
        events: &[
            "Warning InspectFailed Failed to apply default image tag",
            "Warning Failed Error: InvalidImageName",
        ],
    },
    Fault {
        name: "never-pulled",
        spec: "{containers: [{name: c, image: 'none:1', imagePullPolicy: Never}]}",
        status: &[r#""reason":"ErrImageNeverPull""#],
        events: &[
            r#"Warning ErrImageNeverPull Container image "none:1" is not present with pull policy of Never"#,
            "Warning Failed Error: ErrImageNeverPull",
        ],
    },
    Fault {
        name: "no-config-map",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, env: [{name: A, valueFrom: {configMapKeyRef: {name: nope, key: a}}}]}]}",
        status: &[r#""reason":"CreateContainerConfigError""#, r#"configmap \"nope\" not found"#],
        events: &[r#"Warning Failed Error: configmap "nope" not found"#],
    },
    Fault {
        name: "no-secret",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, envFrom: [{secretRef: {name: nope}}]}]}",
        status: &[r#""reason":"CreateContainerConfigError""#, r#"secret \"nope\" not found"#],
        events: &[r#"Warning Failed Error: secret "nope" not found"#],
    },
    Fault {
        name: "no-key",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, env: [{name: A, valueFrom: {configMapKeyRef: {name: kube-root-ca.crt, key: nope}}}]}]}",
        status: &[r#""reason":"CreateContainerConfigError""#],
        events: &["Warning Failed Error: couldn't find key nope in ConfigMap default/kube-root-ca.crt"],
    },
    Fault {
        name: "no-volume",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent}], volumes: [{name: v, configMap: {name: nope}}]}",
        status: &[r#""reason":"ContainerCreating""#, r#""phase":"Pending""#],
        events: &[
            r#"Warning FailedMount MountVolume.SetUp failed for volume "v" : configmap "nope" not found"#,
        ],
    },
    Fault {
        name: "no-directory",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent}], volumes: [{name: v, hostPath: {path: /nowhere-at-all, type: Directory}}]}",
        status: &[r#""reason":"ContainerCreating""#],
        events: &[
            r#"Warning FailedMount MountVolume.SetUp failed for volume "v" : hostPath type check failed: /nowhere-at-all is not a directory"#,
        ],
    },
    Fault {
        name: "root",
        spec: "{securityContext: {runAsNonRoot: true}, containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent}]}",
        status: &[r#""reason":"CreateContainerConfigError""#],
        events: &[
            "Warning Failed Error: container has runAsNonRoot and image will run as root (pod: \"root_default(",
        ],
    },
    Fault {
        name: "no-program",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [/no/such/program]}]}",
        status: &[
            r#""reason":"StartError""#,
            r#""exitCode":128"#,
            "/no/such/program",
            r#""reason":"CrashLoopBackOff""#,
        ],
        events: &[
            "Warning Failed Error: ",
            "Warning BackOff Back-off restarting failed container c in pod no-program_default(",
        ],
    },
    Fault {
        name: "no-program-never",
        spec: "{restartPolicy: Never, containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [/no/such/program]}]}",
        status: &[r#""phase":"Failed""#, r#""reason":"StartError""#],
        events: &["Warning Failed Error: "],
    },
    Fault {
        name: "memory",
        spec: "{restartPolicy: Never, containers: [{name: c, image: toolbox, imagePullPolicy: IfNotPresent, command: [/toolbox, eat-memory, '100'], resources: {limits: {memory: 20Mi}}}]}",
        status: &[r#""phase":"Failed""#, r#""reason":"OOMKilled""#, r#""exitCode":137"#],
        events: &["Normal Started Container started: c"],
    },
    Fault {
        name: "code",
        spec: "{restartPolicy: Never, containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, 'echo why > /dev/termination-log; exit 3']}]}",
        status: &[r#""phase":"Failed""#, r#""reason":"Error""#, r#""exitCode":3"#, r#""message":"why\n""#],
        events: &["Normal Created Container created: c"],
    },
    Fault {
        name: "killed",
        spec: "{restartPolicy: Never, containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, command: [sh, -c, 'sleep 1000 & kill -9 $!; wait $!']}]}",
        status: &[r#""phase":"Failed""#, r#""exitCode":137"#],
        events: &[],
    },
    Fault {
        name: "done",
        spec: "{restartPolicy: Never, containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, command: ['true']}]}",
        status: &[r#""phase":"Succeeded""#, r#""reason":"Completed""#, r#""exitCode":0"#, "PodCompleted"],
        events: &[],
    },
    Fault {
        name: "crash",
        spec: "{containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent, command: ['false']}]}",
        status: &[
            r#""reason":"CrashLoopBackOff""#,
            "back-off ",
            "s restarting failed container=c pod=crash_default(",
            r#""exitCode":1"#,
        ],
        events: &["Warning BackOff Back-off restarting failed container c in pod crash_default("],
    },
    Fault {
        name: "runtime-class",
        spec: "{runtimeClassName: other, containers: [{name: c, image: busybox, imagePullPolicy: IfNotPresent}]}",
        status: &[r#""reason":"ContainerCreating""#],
        events: &[
            r#"Warning FailedCreatePodSandBox Failed to create pod sandbox: no runtime for "other" is configured"#,
        ],
    },
];

#[test]
fn pods_that_cannot_run_say_why() {
    if !frame::ready("the table of faults", &["kubectl"]) {
        return;
    }
    let place = Place::new("faults");
    let hostile = hostile_archive(&place);
    let mut c = Cluster::up(place, vec!["kubectl".into()], &["--images", &hostile]);
    c.apply("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: other}\nhandler: other\n");
    let pod = |fault: &Fault| {
        format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {}}}\nspec: {}\n", fault.name, fault.spec)
    };
    c.apply(&FAULTS.iter().map(pod).collect::<String>());
    for fault in FAULTS {
        for part in fault.status {
            let what = format!("the status of {} has {part}", fault.name);
            c.wait_for(&what, &["get", "pod", fault.name, "-o", "jsonpath={.status}"], |o| o.contains(part));
        }
        let about = format!("involvedObject.name={}", fault.name);
        let lines = "jsonpath={range .items[*]}{.type} {.reason} {.message}{\"\\n\"}{end}";
        for part in fault.events {
            let what = format!("an event of {} begins with {part}", fault.name);
            c.wait_for(&what, &["get", "events", "--field-selector", &about, "-o", lines], |o| {
                o.lines().any(|line| line.starts_with(part))
            });
        }
    }
    let about_node = ["get", "events", "--field-selector", "involvedObject.kind=Node"];
    let refused = c.wait_for("the archive is refused", &about_node, |o| o.contains("InvalidImageArchive"));
    assert!(refused.contains("leads out of the image"), "{refused}");
    let images = c.kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.images[*].names}"]);
    assert!(!images.contains("hostile"), "nothing of it is there: {images}");

    c.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: nope}\ndata: {a: b}\n");
    c.wait_for("what was missing is there, and the pod runs", &["get", "pod", "no-config-map"], |o| {
        o.contains("Running") || o.contains("Completed") || o.contains("CrashLoopBackOff")
    });
    c.kubectl(&["delete", "pods", "--all", "--grace-period=1"]);
    let verified = c.down();
    assert!(verified.contains("Nothing is left."), "{verified}");
}

/// An image with a link that climbs out of it.
fn hostile_archive(place: &Place) -> String {
    let path = place.dir.path().join("hostile.tar");
    let image = Image {
        names: vec!["hostile:1".into()],
        files: vec![Entry::bytes("/good", "good", 0o644), Entry::symlink("/bad", "../../../../etc/shadow")],
        ..Image::default()
    };
    build::write(&image, &path, false).expect("writes");
    path.display().to_string()
}
