"""What a program built on Kubernetes' Python client does: python3 client.py NAMESPACE, with KUBECONFIG set.

It ends with status 0 after everything was as it should be.
"""

import sys

from kubernetes import client, config, dynamic, watch
from kubernetes.client.rest import ApiException
from kubernetes.stream import portforward, stream

namespace = sys.argv[1]
config.load_kube_config()
core, apps = client.CoreV1Api(), client.AppsV1Api()


def step(what):
    print(what, flush=True)


def refused(status, reason, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ApiException as e:
        assert (e.status, e.reason) == (status, reason), e
    else:
        raise AssertionError(f"{call} was not refused")


def ready(pod):
    return any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or [])


step("create a pod and watch it until it is ready")
script = "echo one; echo two; hostname >/tmp/name; exec httpd -f -p 8080 -h /tmp"
manifest = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "py", "labels": {"from": "python"}},
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{
            "name": "main",
            "image": "busybox:1",
            "command": ["sh", "-c", script],
            "readinessProbe": {"httpGet": {"path": "/name", "port": 8080}, "periodSeconds": 1},
        }],
    },
}
created = core.create_namespaced_pod(namespace, manifest)
seen = []
for event in watch.Watch().stream(core.list_namespaced_pod, namespace, label_selector="from=python",
                                  resource_version="0", timeout_seconds=60):
    seen.append(event["type"])
    if ready(event["object"]):
        break
assert ready(core.read_namespaced_pod("py", namespace)), seen
refused(409, "Conflict", core.create_namespaced_pod, namespace, manifest)
refused(404, "Not Found", core.read_namespaced_pod, "no", namespace)

step("read logs, whole and as they come")
assert core.read_namespaced_pod_log("py", namespace) == "one\ntwo\n"
assert core.read_namespaced_pod_log("py", namespace, tail_lines=1) == "two\n"
lines = watch.Watch().stream(core.read_namespaced_pod_log, "py", namespace, follow=True)
assert [next(lines), next(lines)] == ["one", "two"]

step("run commands in it")
out = stream(core.connect_get_namespaced_pod_exec, "py", namespace, command=["cat", "/tmp/name"],
             stdout=True, stderr=True)
assert out == "py\n", out
session = stream(core.connect_get_namespaced_pod_exec, "py", namespace,
                 command=["sh", "-c", "read word; echo got $word; echo trouble >&2; exit 3"],
                 stdin=True, stdout=True, stderr=True, _preload_content=False)
session.write_stdin("hello\n")
session.run_forever(timeout=20)
assert session.read_stdout() == "got hello\n" and session.read_stderr() == "trouble\n" and session.returncode == 3

step("reach a port of it")
forward = portforward(core.connect_get_namespaced_pod_portforward, "py", namespace, ports="8080")
sock = forward.socket(8080)
sock.setblocking(True)
sock.sendall(b"GET /name HTTP/1.0\r\n\r\n")
answer = b""
while chunk := sock.recv(4096):
    answer += chunk
assert answer.endswith(b"\r\n\r\npy\n"), answer
assert forward.error(8080) is None

step("list in pages")
for i in range(7):
    core.create_namespaced_config_map(namespace, client.V1ConfigMap(
        metadata=client.V1ObjectMeta(name=f"page-{i}", labels={"from": "python"})))
names, more = [], None
while more != "":
    page = core.list_namespaced_config_map(namespace, label_selector="from=python", limit=3, _continue=more)
    names += [m.metadata.name for m in page.items]
    more = page.metadata._continue or ""
assert names == [f"page-{i}" for i in range(7)], names

step("watch from a version on")
version = page.metadata.resource_version
core.patch_namespaced_config_map("page-0", namespace, {"data": {"a": "1"}})
core.patch_namespaced_config_map("page-1", namespace, [{"op": "add", "path": "/data", "value": {"b": "2"}}])
core.delete_namespaced_config_map("page-2", namespace)
events = watch.Watch().stream(core.list_namespaced_config_map, namespace, label_selector="from=python",
                              resource_version=version, timeout_seconds=30)
got = []
for event in events:
    got.append((event["type"], event["object"].metadata.name, event["object"].data))
    if len(got) == 3:
        break
assert got == [("MODIFIED", "page-0", {"a": "1"}), ("MODIFIED", "page-1", {"b": "2"}), ("DELETED", "page-2", None)], got

step("deploy, scale, and remove what follows")
labels = {"app": "web"}
apps.create_namespaced_deployment(namespace, client.V1Deployment(
    metadata=client.V1ObjectMeta(name="web"),
    spec=client.V1DeploymentSpec(
        selector=client.V1LabelSelector(match_labels=labels),
        template=client.V1PodTemplateSpec(
            metadata=client.V1ObjectMeta(labels=labels),
            spec=client.V1PodSpec(termination_grace_period_seconds=0, containers=[
                client.V1Container(name="main", image="busybox:1", command=["sleep", "1000"])])))))
assert apps.patch_namespaced_deployment_scale("web", namespace, {"spec": {"replicas": 2}}).spec.replicas == 2
for event in watch.Watch().stream(apps.list_namespaced_deployment, namespace, timeout_seconds=60):
    if event["object"].status.ready_replicas == 2:
        break
assert apps.read_namespaced_deployment("web", namespace).status.ready_replicas == 2
apps.delete_namespaced_deployment("web", namespace, propagation_policy="Foreground")
for event in watch.Watch().stream(apps.list_namespaced_deployment, namespace, timeout_seconds=60):
    if event["type"] == "DELETED":
        break
assert core.list_namespaced_pod(namespace, label_selector="app=web").items == []

step("find kinds by themselves")
everything = dynamic.DynamicClient(client.ApiClient())
maps = everything.resources.get(api_version="v1", kind="ConfigMap")
assert maps.get(name="page-0", namespace=namespace).data.a == "1"
metrics = everything.resources.get(api_version="metrics.k8s.io/v1beta1", kind="NodeMetrics")
assert len(metrics.get().items) == 1

step("ask who may what")
review = client.AuthorizationV1Api().create_self_subject_access_review(client.V1SelfSubjectAccessReview(
    spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=client.V1ResourceAttributes(
        verb="delete", resource="nodes"))))
assert review.status.allowed
step("done")
