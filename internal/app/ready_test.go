package app

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

func TestReady(t *testing.T) {
	deployment := func(status string) string {
		return "{apiVersion: apps/v1, kind: Deployment, metadata: {name: x, generation: 2}, spec: {replicas: 3}, status: " + status + "}"
	}
	for _, c := range []struct {
		name, text string
		want       verdict
	}{
		{"deployment not seen", deployment("{observedGeneration: 1, replicas: 3, updatedReplicas: 3, availableReplicas: 3}"), waiting("not seen by its controller yet")},
		{"deployment rolling", deployment("{observedGeneration: 2, replicas: 4, updatedReplicas: 1, availableReplicas: 3}"), waiting("1 of 3 updated")},
		{"deployment starting", deployment("{observedGeneration: 2, replicas: 3, updatedReplicas: 3, availableReplicas: 1}"), waiting("1 of 3 ready")},
		{"deployment with old ones", deployment("{observedGeneration: 2, replicas: 4, updatedReplicas: 3, availableReplicas: 3}"), waiting("1 old to be stopped")},
		{"deployment ready", deployment("{observedGeneration: 2, replicas: 3, updatedReplicas: 3, availableReplicas: 3}"), done("3 of 3 ready")},
		{"deployment stuck", deployment("{observedGeneration: 2, availableReplicas: 1, conditions: [{type: Progressing, status: 'False', reason: ProgressDeadlineExceeded}]}"), failed("1 of 3 ready, no progress for too long; `tutti status` says why")},
		{"deployment over quota", deployment("{observedGeneration: 2, conditions: [{type: ReplicaFailure, status: 'True', message: exceeded quota}]}"), waiting("exceeded quota")},
		{"deployment without replicas", "{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: {replicas: 0}}", done("0 of 0 ready")},
		{"deployment by default one", "{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: {}}", waiting("0 of 1 updated")},
		{"stateful set new", "{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: x}, spec: {replicas: 2}, status: {availableReplicas: 1, replicas: 1, currentRevision: a, updateRevision: a}}", waiting("1 of 2 ready")},
		{"stateful set rolling", "{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: x}, spec: {replicas: 2}, status: {availableReplicas: 2, replicas: 2, updatedReplicas: 1, currentRevision: a, updateRevision: b}}", waiting("1 of 2 updated")},
		{"stateful set partitioned", "{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: x}, spec: {replicas: 2, updateStrategy: {type: RollingUpdate, rollingUpdate: {partition: 1}}}, status: {availableReplicas: 2, replicas: 2, updatedReplicas: 1, currentRevision: a, updateRevision: b}}", done("2 of 2 ready")},
		{"stateful set ready", "{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: x}, spec: {replicas: 2}, status: {availableReplicas: 2, replicas: 2, updatedReplicas: 2, currentRevision: b, updateRevision: b}}", done("2 of 2 ready")},
		{"daemon set starting", "{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: x}, status: {desiredNumberScheduled: 2, updatedNumberScheduled: 2, numberAvailable: 1}}", waiting("1 of 2 ready")},
		{"daemon set ready", "{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: x}, status: {desiredNumberScheduled: 1, updatedNumberScheduled: 1, numberAvailable: 1}}", done("1 of 1 ready")},
		{"replica set", "{apiVersion: apps/v1, kind: ReplicaSet, metadata: {name: x}, spec: {replicas: 1}, status: {replicas: 1, availableReplicas: 1}}", done("1 of 1 ready")},
		{"job runs", "{apiVersion: batch/v1, kind: Job, metadata: {name: x}, spec: {completions: 3}, status: {succeeded: 1}}", waiting("1 of 3 complete")},
		{"job complete", "{apiVersion: batch/v1, kind: Job, metadata: {name: x}, status: {conditions: [{type: Complete, status: 'True'}]}}", done("complete")},
		{"job failed", "{apiVersion: batch/v1, kind: Job, metadata: {name: x}, status: {conditions: [{type: Failed, status: 'True', reason: BackoffLimitExceeded, message: too often}]}}", failed("BackoffLimitExceeded: too often")},
		{"pod starting", "{apiVersion: v1, kind: Pod, metadata: {name: x}, status: {phase: Pending}}", waiting("starting")},
		{"pod ready", "{apiVersion: v1, kind: Pod, metadata: {name: x}, status: {phase: Running, conditions: [{type: Ready, status: 'True'}]}}", done("ready")},
		{"pod complete", "{apiVersion: v1, kind: Pod, metadata: {name: x}, status: {phase: Succeeded}}", done("complete")},
		{"pod evicted", "{apiVersion: v1, kind: Pod, metadata: {name: x}, status: {phase: Failed, reason: Evicted, message: no disk}}", failed("Evicted: no disk")},
		{"claim pending", "{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: x}, status: {phase: Pending}}", waiting("waits for a volume")},
		{"claim bound", "{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: x}, status: {phase: Bound}}", done("bound")},
		{"claim lost", "{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: x}, status: {phase: Lost}}", failed("has lost its volume; restore that, or delete the claim")},
		{"definition", "{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: x}, status: {conditions: [{type: Established, status: 'True'}]}}", done("established")},
		{"anything else", "{apiVersion: v1, kind: ConfigMap, metadata: {name: x}}", done("there")},
		{"leaving", "{apiVersion: v1, kind: ConfigMap, metadata: {name: x, deletionTimestamp: '2030-01-01T00:00:00Z'}}", waiting("being removed")},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := ready(object(t, c.text)); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func pod(t *testing.T, text string) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object(t, "{apiVersion: v1, kind: Pod, "+strings.TrimPrefix(text, "{")).Object, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProblems(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"well", "{status: {phase: Running, containerStatuses: [{name: c, state: {running: {}}}]}}", ""},
		{"on its way", "{status: {containerStatuses: [{name: c, state: {waiting: {reason: ContainerCreating}}}]}}", ""},
		{"held up", "{status: {containerStatuses: [{name: c, state: {waiting: {reason: ContainerCreating, message: 'FailedMount: secrets \"x\" not found'}}}]}}", "FailedMount: secrets \"x\" not found"},
		{"image", "{status: {containerStatuses: [{name: c, state: {waiting: {reason: ErrImagePull, message: \"no such\\n image\"}}}]}}", "ErrImagePull: no such image"},
		{"image again", "{status: {containerStatuses: [{name: c, state: {waiting: {reason: ImagePullBackOff, message: 'Back-off pulling image \"x\": ErrImagePull: no such image'}}}]}}", "ErrImagePull: no such image"},
		{"crashing", "{status: {containerStatuses: [{name: c, state: {waiting: {reason: CrashLoopBackOff, message: back-off}}, lastState: {terminated: {exitCode: 2, reason: Error, message: bad}}}]}}", "CrashLoopBackOff: exit code 2: bad"},
		{"out of memory", "{status: {containerStatuses: [{name: c, state: {waiting: {reason: CrashLoopBackOff}}, lastState: {terminated: {exitCode: 137, reason: OOMKilled}}}]}}", "CrashLoopBackOff: OOMKilled, exit code 137"},
		{"no room", "{status: {conditions: [{type: PodScheduled, status: 'False', reason: Unschedulable, message: 0/1 nodes}]}}", "Unschedulable: 0/1 nodes"},
		{"failed once, tried again", "{spec: {restartPolicy: Always}, status: {containerStatuses: [{name: c, state: {terminated: {exitCode: 1}}}]}}", ""},
		{"not to be started", "{spec: {restartPolicy: Never}, status: {phase: Failed, containerStatuses: [{name: c, state: {terminated: {exitCode: 128, reason: StartError, message: no such program}}}]}}", "StartError: exit code 128: no such program"},
		{"failed for good", "{spec: {restartPolicy: Never}, status: {phase: Failed, containerStatuses: [{name: c, state: {terminated: {exitCode: 1}}}]}}", "Error: exit code 1"},
		{"init first", "{status: {initContainerStatuses: [{name: i, state: {waiting: {reason: InvalidImageName}}}]}}", "InvalidImageName"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := podProblem(pod(t, c.text)); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestSurvey(t *testing.T) {
	web := object(t, "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web, namespace: ns, generation: 1, uid: u}, spec: {replicas: 1, selector: {matchLabels: {app: web}}}, status: {observedGeneration: 1}}")
	claim := object(t, "{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: data, namespace: ns}, status: {phase: Pending}}")
	broken := pod(t, "{metadata: {name: web-1, namespace: ns, labels: {app: web}}, spec: {containers: []}, status: {containerStatuses: [{name: c, state: {waiting: {reason: ImagePullBackOff, message: gone}}}]}}")
	elsewhere := pod(t, "{metadata: {name: web-1, namespace: other, labels: {app: web}}, status: {containerStatuses: [{name: c, state: {waiting: {reason: ErrImagePull}}}]}}")
	user := pod(t, "{metadata: {name: u, namespace: ns}, spec: {containers: [], volumes: [{name: v, persistentVolumeClaim: {claimName: data}}]}}")
	newer := web.DeepCopy()
	newer.SetGeneration(2)
	anew := web.DeepCopy()
	anew.SetUID("other")
	ref := func(u *unstructured.Unstructured) Ref { return refOf(Object{Unstructured: u}) }
	for _, c := range []struct {
		name    string
		object  *unstructured.Unstructured
		there   bool
		applied *unstructured.Unstructured
		pods    []*corev1.Pod
		want    string
	}{
		{"absent", web, false, nil, nil, "not there"},
		{"no pods yet", web, true, web, nil, "0 of 1 updated"},
		{"a broken pod", web, true, nil, []*corev1.Pod{elsewhere, broken}, "0 of 1 updated: ImagePullBackOff: gone"},
		{"a pod elsewhere", web, true, nil, []*corev1.Pod{elsewhere}, "0 of 1 updated"},
		{"the cache is behind", web, true, newer, nil, "starting"},
		{"the cache has the one before", web, true, anew, nil, "starting"},
		{"a claim that nobody uses", claim, true, nil, nil, "bound when it is first used"},
		{"a claim that is waited for", claim, true, nil, []*corev1.Pod{user}, "waits for a volume"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := ref(c.object)
			d := Deployment{Refs: []Ref{r, {Version: "v1", Kind: "ConfigMap", Name: "x"}}, applied: map[Ref]*unstructured.Unstructured{r: c.applied}}
			key := r
			key.Version = ""
			objects := map[Ref]*unstructured.Unstructured{}
			if c.there {
				objects[key] = c.object
			}
			got := d.survey(objects, c.pods)
			if len(got) != 1 || got[0].text() != c.want {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestSettling(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 10, 0, time.UTC)
	const running = "status: {containerStatuses: [{name: c, state: {running: {startedAt: '2030-01-01T00:00:%s'}}}]}}"
	for _, c := range []struct {
		name, text string
		want       time.Duration
	}{
		{"a moment ago", "{spec: {restartPolicy: Always, containers: [{name: c}]}, " + fmt.Sprintf(running, "09Z"), time.Second},
		{"long ago", "{spec: {restartPolicy: Always, containers: [{name: c}]}, " + fmt.Sprintf(running, "01Z"), 0},
		{"asked by a probe", "{spec: {restartPolicy: Always, containers: [{name: c, readinessProbe: {tcpSocket: {port: 1}}}]}, " + fmt.Sprintf(running, "09Z"), 0},
		{"ended already", "{spec: {restartPolicy: Always, containers: [{name: c}]}, status: {containerStatuses: [{name: c, state: {terminated: {exitCode: 1}}}]}}", settle},
		{"meant to end", "{spec: {restartPolicy: Never, containers: [{name: c}]}, status: {containerStatuses: [{name: c, state: {terminated: {exitCode: 0}}}]}}", 0},
		{"by a clock ahead of ours", "{spec: {restartPolicy: Always, containers: [{name: c}]}, " + fmt.Sprintf(running, "30Z"), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := settling([]*corev1.Pod{pod(t, c.text)}, now); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}
