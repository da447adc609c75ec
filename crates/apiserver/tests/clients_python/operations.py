"""The official Python client's own operations against a live server. Arguments: a kubeconfig and a directory to write in."""

import os
import sys
import threading
import time

from kubernetes import client, config, dynamic, utils, watch
from kubernetes.client.rest import ApiException
from kubernetes.dynamic.exceptions import ConflictError

kubeconfig, folder = sys.argv[1], sys.argv[2]
config.load_kube_config(kubeconfig)
core, apps = client.CoreV1Api(), client.AppsV1Api()
NAMESPACE = "default"


def refused(status, reason, call):
    try:
        call()
    except ApiException as error:
        assert error.status == status, (error.status, error.body)
        assert reason in error.body, error.body
        return
    raise AssertionError(f"not refused with {status}")


def config_map(name, **data):
    return client.V1ConfigMap(metadata=client.V1ObjectMeta(name=name, labels={"run": "python"}), data=data)


def typed():
    made = core.create_namespaced_config_map(NAMESPACE, config_map("typed", a="1"))
    assert made.metadata.resource_version and made.metadata.creation_timestamp.tzinfo
    refused(409, "AlreadyExists", lambda: core.create_namespaced_config_map(NAMESPACE, config_map("typed")))
    refused(404, "NotFound", lambda: core.read_namespaced_config_map("none", NAMESPACE))
    refused(422, "Invalid", lambda: core.create_namespaced_config_map(NAMESPACE, config_map("Not_A_Name")))
    patched = core.patch_namespaced_config_map("typed", NAMESPACE, {"data": {"b": "2"}})
    assert patched.data == {"a": "1", "b": "2"}, patched.data
    steps = [{"op": "remove", "path": "/data/a"}]
    patched = core.patch_namespaced_config_map("typed", NAMESPACE, steps)
    assert patched.data == {"b": "2"}, patched.data
    patched.data = {"c": "3"}
    replaced = core.replace_namespaced_config_map("typed", NAMESPACE, patched)
    refused(409, "Conflict", lambda: core.replace_namespaced_config_map("typed", NAMESPACE, patched))
    assert replaced.data == {"c": "3"}
    core.create_namespaced_config_map(NAMESPACE, config_map("dry"), dry_run="All")
    refused(404, "NotFound", lambda: core.read_namespaced_config_map("dry", NAMESPACE))
    core.delete_namespaced_config_map("typed", NAMESPACE)


def lists():
    for i in range(5):
        core.create_namespaced_config_map(NAMESPACE, config_map(f"page-{i}"))
    names, token = [], None
    while True:
        page = core.list_namespaced_config_map(NAMESPACE, limit=2, _continue=token, label_selector="run=python")
        names += [item.metadata.name for item in page.items]
        token = page.metadata._continue
        if not token:
            break
    assert names == [f"page-{i}" for i in range(5)], names
    one = core.list_config_map_for_all_namespaces(field_selector="metadata.name=page-3")
    assert [item.metadata.name for item in one.items] == ["page-3"]
    status = core.delete_collection_namespaced_config_map(NAMESPACE, label_selector="run=python")
    assert core.list_namespaced_config_map(NAMESPACE, label_selector="run=python").items == [], status


def watches():
    start = core.list_namespaced_config_map(NAMESPACE).metadata.resource_version

    def write():
        core.create_namespaced_config_map(NAMESPACE, config_map("seen", a="1"))
        core.patch_namespaced_config_map("seen", NAMESPACE, {"data": {"a": "2"}})
        core.delete_namespaced_config_map("seen", NAMESPACE)

    writer = threading.Thread(target=write)
    writer.start()
    seen, watcher = [], watch.Watch()
    stream = watcher.stream(core.list_namespaced_config_map, NAMESPACE, resource_version=start, timeout_seconds=30)
    for event in stream:
        if event["object"].metadata.name == "seen":
            seen.append((event["type"], event["object"].data["a"]))
        if len(seen) == 3:
            watcher.stop()
    writer.join()
    assert seen == [("ADDED", "1"), ("MODIFIED", "2"), ("DELETED", "2")], seen


DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata:
  name: from-yaml
spec:
  replicas: 2
  selector: {matchLabels: {app: x}}
  template:
    metadata: {labels: {app: x}}
    spec:
      containers:
      - {name: c, image: registry.invalid/c, ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: from-yaml
spec:
  selector: {app: x}
  ports: [{port: 80}]
"""


def from_yaml():
    path = os.path.join(folder, "objects.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(DEPLOYMENT)
    utils.create_from_yaml(client.ApiClient(), path, namespace=NAMESPACE)
    assert core.read_namespaced_service("from-yaml", NAMESPACE).spec.cluster_ip
    scale = apps.read_namespaced_deployment_scale("from-yaml", NAMESPACE)
    assert (scale.spec.replicas, scale.status.selector) == (2, "app=x"), scale
    scale.spec.replicas = 3
    assert apps.replace_namespaced_deployment_scale("from-yaml", NAMESPACE, scale).spec.replicas == 3
    apps.patch_namespaced_deployment_scale("from-yaml", NAMESPACE, {"spec": {"replicas": 1}})
    deployment = apps.read_namespaced_deployment("from-yaml", NAMESPACE)
    assert deployment.spec.replicas == 1 and deployment.spec.strategy.rolling_update.max_surge == "25%"
    # A strategic merge patch, which is what the client sends for a mapping.
    image = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "registry.invalid/d"}]}}}}
    containers = apps.patch_namespaced_deployment("from-yaml", NAMESPACE, image).spec.template.spec.containers
    assert [(c.name, c.image, c.ports[0].container_port) for c in containers] == [("c", "registry.invalid/d", 80)]
    apps.delete_namespaced_deployment("from-yaml", NAMESPACE, propagation_policy="Background")
    core.delete_namespaced_service("from-yaml", NAMESPACE)


def through_dynamic():
    objects = dynamic.DynamicClient(client.ApiClient())
    maps = objects.resources.get(api_version="v1", kind="ConfigMap")
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "dynamic"}, "data": {"a": "1"}}
    applied = maps.server_side_apply(body=body, namespace=NAMESPACE, field_manager="one")
    assert applied.metadata.managedFields[0].operation == "Apply"
    body["data"]["a"] = "2"
    try:
        maps.server_side_apply(body=body, namespace=NAMESPACE, field_manager="two")
        raise AssertionError("no conflict")
    except ConflictError as error:
        assert "FieldManagerConflict" in str(error.body), error.body
    forced = maps.server_side_apply(body=body, namespace=NAMESPACE, field_manager="two", force_conflicts=True)
    assert forced.data.a == "2"
    merge = "application/merge-patch+json"
    patched = maps.patch(body={"data": {"a": None}}, name="dynamic", namespace=NAMESPACE, content_type=merge)
    assert not patched.data, patched.data
    assert maps.get(name="dynamic", namespace=NAMESPACE).metadata.name == "dynamic"
    start = maps.get(namespace=NAMESPACE).metadata.resourceVersion
    maps.delete(name="dynamic", namespace=NAMESPACE)
    for event in maps.watch(namespace=NAMESPACE, resource_version=start, timeout=30):
        assert (event["type"], event["object"].metadata.name) == ("DELETED", "dynamic")
        break
    deployments = objects.resources.get(api_version="apps/v1", kind="Deployment")
    assert deployments.name == "deployments" and "scale" in deployments.subresources


def election():
    from kubernetes.leaderelection import electionconfig, leaderelection
    from kubernetes.leaderelection.resourcelock.configmaplock import ConfigMapLock

    led = threading.Event()

    def lead():
        led.set()
        time.sleep(0.2)
        # The client has no other way out of an election it has won.
        os._exit(0)

    lock = ConfigMapLock("elected", NAMESPACE, "python")
    settings = electionconfig.Config(
        lock, lease_duration=17, renew_deadline=15, retry_period=5, onstarted_leading=lead, onstopped_leading=None
    )
    print("all but the election passed", flush=True)
    leaderelection.LeaderElection(settings).run()
    raise AssertionError("the election ended without a leader")


for step in (typed, lists, watches, from_yaml, through_dynamic, election):
    print(step.__name__, flush=True)
    step()
