//! Manifests in every form that books about Kubernetes use, from 1.8's versions to today's: each is accepted as YAML,
//! without a warning about its fields. Names and values are ours; the forms are facts.

mod common;

use common::{send, server};
use knarr_api::object::Object;
use knarr_api::schema::Schema;
use serde_json::Value;

const MANIFESTS: &[&str] = &[
    // Pods: bare, with commands, environment, volumes, probes, hooks, neighbours.
    "apiVersion: v1\nkind: Pod\nmetadata: {name: bare}\nspec: {containers: [{name: c, image: i}]}",
    "kind: Pod # kind first\napiVersion: \"v1\"\nmetadata:\n  name: labelled\n  labels: {zone: prod, version: \"v1\"}\nspec:\n  containers:\n  - image: i\n    name: c\n    command: [\"/bin/sh\", \"-c\", \"sleep 5\"]\n    ports:\n    - containerPort: 80",
    "apiVersion: v1\nkind: Pod\nmetadata: {name: env}\nspec:\n  containers:\n  - name: c\n    image: i\n    env:\n    - {name: A, value: \"04\"}\n    - name: B\n      valueFrom: {configMapKeyRef: {name: m, key: k}}\n    - name: C\n      valueFrom: {secretKeyRef: {name: s, key: k}}\n    - name: D\n      valueFrom: {fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}\n    envFrom:\n    - configMapRef: {name: m}",
    "apiVersion: v1\nkind: Pod\nmetadata: {name: volumes}\nspec:\n  containers:\n  - name: c\n    image: i\n    args:\n    - /bin/sh\n    - -c\n    - >\n      while true; do\n      sleep 1; done\n    volumeMounts:\n    - {name: config, mountPath: /a, readOnly: true}\n    - {name: secret, mountPath: /b}\n    - {name: empty, mountPath: /c}\n    - {name: host, mountPath: /d, subPath: var/log}\n    - {name: host, mountPath: /e, subPath: var/lib}\n    - {name: claim, mountPath: /f}\n    - {name: disk, mountPath: /g}\n  volumes:\n  - name: config\n    configMap: {name: m, items: [{key: a, path: b}]}\n  - name: secret\n    secret: {secretName: s, defaultMode: 0400, items: [{key: a, path: b}]}\n  - {name: empty, emptyDir: {}}\n  - name: host\n    hostPath: {path: /, type: Directory}\n  - name: claim\n    persistentVolumeClaim: {claimName: pvc}\n  - name: disk\n    gcePersistentDisk: {pdName: d, fsType: ext4}",
    "apiVersion: v1\nkind: Pod\nmetadata: {name: placed}\nspec:\n  nodeSelector: {purpose: sandbox, beta.kubernetes.io/instance-type: small}\n  tolerations:\n  - {key: k, value: v, operator: Equal, effect: NoExecute}\n  containers: [{name: c, image: i}]",
    "apiVersion: v1\nkind: Pod\nmetadata: {name: sized}\nspec:\n  containers:\n  - name: c\n    image: i\n    resources: {requests: {cpu: 0.1, memory: 10Mi}, limits: {cpu: \"1\", memory: 1Gi}}\n  - name: d\n    image: i\n    resources: {limits: {cpu: 0, memory: 0}}",
    "apiVersion: v1\nkind: Pod\nmetadata: {name: probed}\nspec:\n  initContainers:\n  - {name: first, image: i, securityContext: {privileged: true}}\n  securityContext: {fsGroup: 1000}\n  terminationGracePeriodSeconds: 10\n  hostNetwork: true\n  hostPID: true\n  containers:\n  - name: c\n    image: i\n    securityContext: {capabilities: {add: [IPC_LOCK]}}\n    readinessProbe:\n      httpGet: {path: /, port: 5000, scheme: HTTP}\n      periodSeconds: 5\n      initialDelaySeconds: 10\n      successThreshold: 2\n      failureThreshold: 3\n      timeoutSeconds: 1\n    lifecycle:\n      postStart: {exec: {command: [\"true\"]}}\n      preStop: {exec: {command: [\"nginx\", \"-s\", \"quit\"]}}",
    // Controllers, in every version they had.
    "apiVersion: v1\nkind: ReplicationController\nmetadata: {name: app-1.12}\nspec:\n  replicas: 2\n  selector: {project: p, service: s}\n  template:\n    metadata: {name: t, labels: {project: p, service: s}}\n    spec: {containers: [{name: c, image: i, ports: [{containerPort: 80}]}]}",
    "apiVersion: extensions/v1beta1\nkind: ReplicaSet\nmetadata: {name: rs-old}\nspec:\n  replicas: 2\n  selector:\n    matchLabels: {app: a}\n    matchExpressions:\n    - {key: version, operator: In, values: [\"0.1\", \"0.2\"]}\n  template:\n    metadata: {labels: {app: a, version: \"0.1\"}}\n    spec: {containers: [{name: c, image: i}]}",
    "apiVersion: apps/v1beta2\nkind: ReplicaSet\nmetadata: {name: rs-beta2}\nspec:\n  replicas: 10\n  selector: {matchLabels: {app: a}}\n  template:\n    metadata: {labels: {app: a}}\n    spec: {containers: [{name: c, image: i}]}",
    "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: rs}\nspec:\n  replicas: 1\n  selector: {matchLabels: {app: a}}\n  template:\n    metadata: {labels: {app: a}}\n    spec: {containers: [{name: c, image: i}]}",
    "apiVersion: apps/v1beta1 # without selector\nkind: Deployment\nmetadata: {name: no-selector}\nspec:\n  replicas: 5\n  minReadySeconds: 2\n  strategy:\n    type: RollingUpdate\n    rollingUpdate: {maxSurge: 1, maxUnavailable: 2}\n  template:\n    metadata: {name: t, labels: {project: p}, annotations: {a: b}}\n    spec:\n      serviceAccountName: default\n      containers: [{name: c, image: i, ports: [{containerPort: 80, protocol: TCP}]}]",
    "apiVersion: extensions/v1beta1\nkind: Deployment\nmetadata: {name: oldest}\nspec:\n  template:\n    metadata: {labels: {app: a}}\n    spec: {containers: [{name: c, image: i}]}",
    "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: today, labels: {run: a}}\nspec:\n  strategy: {type: Recreate}\n  selector: {matchLabels: {run: a}}\n  template:\n    metadata: {labels: {run: a}}\n    spec: {containers: [{name: c, image: i, imagePullPolicy: IfNotPresent, terminationMessagePath: /dev/termination-log, terminationMessagePolicy: File}]}",
    "apiVersion: extensions/v1beta1\nkind: DaemonSet\nmetadata: {name: ds-old}\nspec:\n  minReadySeconds: 1\n  updateStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 1}}\n  template:\n    metadata: {labels: {app: a}}\n    spec:\n      tolerations: [{key: node-role.kubernetes.io/master, operator: Exists, effect: NoSchedule}]\n      containers: [{name: c, image: i, args: [\"--x\"], ports: [{name: m, containerPort: 9100, hostPort: 9100}]}]",
    "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: ds, namespace: kube-system}\nspec:\n  selector: {matchLabels: {app: a}}\n  template:\n    metadata: {labels: {app: a}}\n    spec:\n      nodeSelector: {x: y}\n      terminationGracePeriodSeconds: 30\n      containers: [{name: c, image: i, resources: {limits: {memory: 200Mi}, requests: {cpu: 100m, memory: 200Mi}}}]",
    "apiVersion: apps/v1beta1\nkind: StatefulSet\nmetadata: {name: sts-old}\nspec:\n  serviceName: s\n  replicas: 3\n  updateStrategy: {type: RollingUpdate}\n  template:\n    metadata: {labels: {app: a}}\n    spec: {containers: [{name: c, image: i, volumeMounts: [{name: data, mountPath: /d}]}]}\n  volumeClaimTemplates:\n  - metadata: {name: data}\n    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}",
    "apiVersion: batch/v1\nkind: Job\nmetadata: {name: job}\nspec:\n  completions: 2\n  parallelism: 1\n  template:\n    spec: {restartPolicy: Never, containers: [{name: c, image: i}]}",
    "apiVersion: batch/v1beta1\nkind: CronJob\nmetadata: {name: cron}\nspec:\n  schedule: \"*/1 * * * *\"\n  jobTemplate:\n    spec:\n      template:\n        spec: {restartPolicy: OnFailure, containers: [{name: c, image: i}]}",
    // Services and their kin.
    "apiVersion: v1\nkind: Service\nmetadata: {name: plain}\nspec:\n  ports:\n  - port: 80\n  selector: {app: a}",
    "apiVersion: v1\nkind: Service\nmetadata: {name: nodeport, labels: {app: a}}\nspec:\n  type: NodePort\n  ports: [{port: 8080, targetPort: 80, nodePort: 30080, protocol: TCP}]\n  selector: {app: a}",
    "apiVersion: v1\nkind: Service\nmetadata: {name: balanced}\nspec:\n  type: LoadBalancer\n  ports: [{port: 8080, targetPort: http, name: web}, {port: 9000, name: two}]\n  selector: {app: a}",
    "apiVersion: v1\nkind: Service\nmetadata: {name: external}\nspec: {type: ExternalName, externalName: raw.example.com}",
    "kind: Service\napiVersion: v1\nmetadata: {name: by-hand, annotations: {prometheus.io/scrape: \"true\", prometheus.io/path: /prom}}\nspec:\n  type: ClusterIP\n  ports: [{port: 80}]",
    "kind: Endpoints\napiVersion: v1\nmetadata: {name: by-hand}\nsubsets:\n- addresses: [{ip: 192.0.2.9}]\n  ports: [{port: 80}]",
    "apiVersion: v1\nkind: Service\nmetadata: {name: headless, namespace: kube-system, labels: {k8s-app: a}}\nspec:\n  clusterIP: None\n  selector: {k8s-app: a}\n  ports: [{name: metrics, port: 10054, protocol: TCP}]",
    "apiVersion: extensions/v1beta1\nkind: Ingress\nmetadata:\n  name: ingress-old\n  annotations: {ingress.kubernetes.io/rewrite-target: /}\nspec:\n  rules:\n  - host: example.com\n    http:\n      paths:\n      - path: /examples/*\n        backend: {serviceName: plain, servicePort: 80}\n  - http:\n      paths:\n      - backend: {serviceName: plain, servicePort: http}",
    "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: ingress}\nspec:\n  rules:\n  - http:\n      paths:\n      - {path: /, pathType: Prefix, backend: {service: {name: plain, port: {number: 80}}}}",
    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: from}\nspec:\n  podSelector: {matchLabels: {a: b}}\n  ingress:\n  - from:\n    - podSelector: {matchLabels: {c: d}}",
    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny}\nspec:\n  podSelector:",
    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: allow}\nspec:\n  podSelector:\n  ingress:\n  - {}",
    // Configuration and storage.
    "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata:\n  config.json: |-\n    {\n      \"a\": { \"b\": true }\n    }",
    "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ntype: Opaque\nstringData: {PASSWORD: \"x-2*2*\"}",
    "apiVersion: v1\nkind: Secret\nmetadata: {name: s2}\ntype: Opaque\ndata: {k: cGFzcw==}",
    "\"apiVersion\": \"v1\"\n\"kind\": \"PersistentVolume\"\n\"metadata\":\n  \"name\": \"pv-1\"\n\"spec\":\n  \"capacity\": {\"storage\": \"50Mi\"}\n  \"accessModes\": [\"ReadWriteOnce\"]\n  \"gcePersistentDisk\": {\"fsType\": \"ext4\", \"pdName\": \"d\"}",
    "apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: nfs}\nspec:\n  capacity: {storage: 50Mi}\n  accessModes: [ReadWriteOnce]\n  nfs: {server: nfs.example.com, path: /x}",
    "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: pvc}\nspec:\n  storageClassName: \"\"\n  accessModes: [ReadWriteOnce]\n  resources: {requests: {storage: 40Mi}}",
    "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: fast}\nprovisioner: kubernetes.io/aws-ebs\nparameters: {type: gp2}",
    // Who may do what, and how much of it.
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: project1}",
    "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: agent, namespace: project1}",
    "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: quota, namespace: project1}\nspec:\n  hard: {requests.cpu: \"1\", requests.memory: 1Gi, limits.cpu: \"2\", limits.memory: 2Gi, requests.storage: 64Gi, pods: \"4\"}",
    "apiVersion: v1\nkind: LimitRange\nmetadata: {name: limits, namespace: project1}\nspec:\n  limits:\n  - default: {cpu: 0.5, memory: 512Mi}\n    defaultRequest: {cpu: 0.25, memory: 256Mi}\n    max: {cpu: 1, memory: 1Gi}\n    min: {cpu: 0.25, memory: 128Mi}\n    type: Container",
    "apiVersion: rbac.authorization.k8s.io/v1beta1\nkind: Role\nmetadata: {name: r, namespace: project1}\nrules:\n- apiGroups: [\"\", extensions, apps]\n  resources: [deployments, replicasets, pods]\n  verbs: [\"*\"]",
    "kind: ClusterRole\napiVersion: rbac.authorization.k8s.io/v1beta1\nmetadata: {name: cd}\nrules:\n- apiGroups: [\"\"]\n  resources: [pods, services, secrets, jobs, cronjobs]\n  verbs: [get, list, watch]\n- nonResourceURLs: [/metrics]\n  verbs: [get]",
    "apiVersion: rbac.authorization.k8s.io/v1beta1\nkind: RoleBinding\nmetadata: {name: b, namespace: project1}\nsubjects:\n- {kind: User, name: linda, apiGroup: \"\"}\nroleRef: {kind: Role, name: r, apiGroup: \"\"}",
    "apiVersion: rbac.authorization.k8s.io/v1beta1\nkind: ClusterRoleBinding\nmetadata: {name: cd}\nroleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cd}\nsubjects:\n- {apiGroup: rbac.authorization.k8s.io, kind: User, name: \"system:serviceaccount:cd:cd-agent\"}\n- {kind: ServiceAccount, name: agent, namespace: project1}",
    "apiVersion: autoscaling/v1\nkind: HorizontalPodAutoscaler\nmetadata: {name: hpa}\nspec:\n  scaleTargetRef: {apiVersion: apps/v1beta1, kind: Deployment, name: no-selector}\n  minReplicas: 1\n  maxReplicas: 4\n  targetCPUUtilizationPercentage: 50",
    "apiVersion: policy/v1beta1\nkind: PodDisruptionBudget\nmetadata: {name: budget}\nspec:\n  minAvailable: 50%\n  selector: {matchLabels: {app: a}}",
];

#[tokio::test]
async fn manifests_of_the_books_are_accepted() {
    let api = server().await;
    let mut trouble = Vec::new();
    for manifest in MANIFESTS {
        let object: Value = serde_yaml_ng::from_str(manifest).expect("the manifest is YAML");
        let (version, name) = (object.str_at("apiVersion"), object.str_at("kind"));
        let (group, bare) = version.split_once('/').unwrap_or(("", version));
        let Some(kind) = Schema::builtin().any_kind(group, bare, name) else {
            trouble.push(format!("{version} {name} is not served"));
            continue;
        };
        let base = if group.is_empty() { format!("/api/{bare}") } else { format!("/apis/{version}") };
        let namespace = if object.namespace().is_empty() { "default" } else { object.namespace() };
        let path = match kind.namespaced {
            true => format!("{base}/namespaces/{namespace}/{}", kind.plural),
            false => format!("{base}/{}", kind.plural),
        };
        let headers = [("content-type", "application/yaml")];
        let reply = send(&api, "POST", &format!("{path}?fieldValidation=Strict"), &headers, *manifest).await;
        if reply.status != 201 {
            let message = reply.json().str_at("message").to_owned();
            trouble.push(format!("{version} {name} {}: {} {message}", object.name(), reply.status));
        }
    }
    assert!(trouble.is_empty(), "{}", trouble.join("\n"));
}
