package app

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/test/golden"
)

func objectMeta(namespace, name, app string, owner types.UID) metav1.ObjectMeta {
	m := metav1.ObjectMeta{
		Namespace: namespace, Name: name, UID: types.UID(namespace + "/" + name), Labels: map[string]string{"app": name},
		CreationTimestamp: metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)),
	}
	if app != "" {
		m.Labels[api.LabelApp] = app
	}
	if owner != "" {
		m.OwnerReferences = []metav1.OwnerReference{{UID: owner, Controller: ptr.To(true)}}
	}
	return m
}

func container(image string, hostPort int32) corev1.PodSpec {
	c := corev1.Container{Name: "c", Image: image}
	if hostPort != 0 {
		c.Ports = []corev1.ContainerPort{{HostPort: hostPort, ContainerPort: 80}}
	}
	return corev1.PodSpec{Containers: []corev1.Container{c}}
}

func snapshot(t *testing.T) Snapshot {
	crashing := corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{
		Name: "c", RestartCount: 4, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 2}},
	}}}
	front := objectMeta("shop", "front-1", "shop", "shop/front-rs")
	front.Labels["app"] = "front"
	return Snapshot{
		Nodes: []*corev1.Node{
			{ObjectMeta: metav1.ObjectMeta{Name: "one"}, Status: corev1.NodeStatus{
				Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.7"}},
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}, {Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue, Reason: "Full"}},
			}},
		},
		Deployments: []*appsv1.Deployment{{
			ObjectMeta: objectMeta("shop", "front", "shop", ""),
			Spec:       appsv1.DeploymentSpec{Replicas: ptr.To[int32](1), Template: corev1.PodTemplateSpec{Spec: container("front:1", 0)}},
			Status:     appsv1.DeploymentStatus{Replicas: 1, UpdatedReplicas: 1, ReadyReplicas: 1, AvailableReplicas: 1},
		}},
		ReplicaSets: []*appsv1.ReplicaSet{{ObjectMeta: objectMeta("shop", "front-rs", "shop", "shop/front")}},
		StatefulSets: []*appsv1.StatefulSet{{
			ObjectMeta: objectMeta("shop", "db", "shop", ""),
			Spec:       appsv1.StatefulSetSpec{Replicas: ptr.To[int32](2), Template: corev1.PodTemplateSpec{Spec: container("db:1", 0)}},
			Status:     appsv1.StatefulSetStatus{Replicas: 1},
		}},
		CronJobs: []*batchv1.CronJob{{ObjectMeta: objectMeta("shop", "report", "shop", ""), Spec: batchv1.CronJobSpec{Schedule: "@daily"}}},
		Pods: []*corev1.Pod{
			{ObjectMeta: front, Spec: container("front:1", 0), Status: corev1.PodStatus{Phase: corev1.PodRunning}},
			{ObjectMeta: objectMeta("shop", "db-0", "shop", "shop/db"), Spec: container("db:1", 0), Status: crashing},
			{ObjectMeta: objectMeta("default", "lone", "", ""), Spec: container("lone:1", 8080), Status: corev1.PodStatus{
				Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
			}},
			{ObjectMeta: objectMeta("kube-system", "own", "", ""), Spec: container("own:1", 0)},
		},
		Services: []*corev1.Service{
			{ObjectMeta: objectMeta("shop", "front", "shop", ""), Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": "front"}, Ports: []corev1.ServicePort{{Port: 80, NodePort: 30080, Protocol: corev1.ProtocolTCP}},
			}},
			{ObjectMeta: objectMeta("other", "front", "", ""), Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": "front"}, Ports: []corev1.ServicePort{{Port: 81}},
			}},
		},
	}
}

func TestSummarize(t *testing.T) {
	got, err := json.MarshalIndent(Summarize(snapshot(t), false), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	golden.Check(t, "testdata/status.json", string(got))
	if all := Summarize(snapshot(t), true); len(all.Apps) != 3 {
		t.Errorf("with the system's: %+v", all.Apps)
	}
}

func TestSummarizeNodes(t *testing.T) {
	node := func(change func(*corev1.Node)) Snapshot {
		n := snapshot(t).Nodes[0]
		change(n)
		return Snapshot{Nodes: []*corev1.Node{n}}
	}
	for _, c := range []struct {
		name string
		s    Snapshot
		want bool
	}{
		{"ready", node(func(*corev1.Node) {}), true},
		{"cordoned", node(func(n *corev1.Node) { n.Spec.Unschedulable = true }), false},
		{"tainted", node(func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Effect: corev1.TaintEffectNoSchedule}} }), false},
		{"not ready", node(func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionFalse }), false},
		{"no node", Snapshot{}, false},
	} {
		if got := Summarize(c.s, false).Ready; got != c.want {
			t.Errorf("%s: ready is %v", c.name, got)
		}
	}
}

func TestURL(t *testing.T) {
	for _, c := range []struct {
		proto corev1.Protocol
		name  string
		port  int32
		want  string
	}{
		{"TCP", "", 80, "http://h:80"},
		{"TCP", "https", 8443, "https://h:8443"},
		{"TCP", "", 443, "https://h:443"},
		{"TCP", "postgres", 5432, "tcp://h:5432"},
		{"UDP", "dns", 53, "udp://h:53"},
	} {
		if got := url(c.proto, c.name, "h", c.port); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
	}
}

// Of the tries of a Job one problem is told, not one for each; and of the runs
// of a CronJob those of the newest, since the next may have gone well.
func TestOneProblemOfAJob(t *testing.T) {
	job := &batchv1.Job{ObjectMeta: objectMeta("shop", "import", "shop", ""), Status: batchv1.JobStatus{Conditions: []batchv1.JobCondition{
		{Type: batchv1.JobFailed, Status: corev1.ConditionTrue, Reason: "BackoffLimitExceeded", Message: "Job has reached the specified backoff limit"}}}}
	cron := &batchv1.CronJob{ObjectMeta: objectMeta("shop", "report", "shop", "")}
	for _, c := range []struct {
		name  string
		s     Snapshot
		exits []int32 // of one pod after the other
		jobs  []string
		want  string
	}{
		{"a Job", Snapshot{Jobs: []*batchv1.Job{job}}, []int32{1, 2, 3}, []string{"import", "import", "import"}, "Error: exit code 3"},
		{"a CronJob", Snapshot{CronJobs: []*batchv1.CronJob{cron}}, []int32{1, 2}, []string{"report-1", "report-2"}, "Error: exit code 2"},
		{"a CronJob that is well again", Snapshot{CronJobs: []*batchv1.CronJob{cron}}, []int32{1, 0}, []string{"report-1", "report-2"}, ""},
	} {
		for i, exit := range c.exits {
			if c.s.CronJobs != nil {
				c.s.Jobs = append(c.s.Jobs, &batchv1.Job{ObjectMeta: objectMeta("shop", c.jobs[i], "shop", cron.UID)})
			}
			p := &corev1.Pod{ObjectMeta: objectMeta("shop", c.jobs[i]+"-"+string(rune('a'+i)), "shop", "")}
			p.OwnerReferences = []metav1.OwnerReference{{Kind: "Job", UID: types.UID("shop/" + c.jobs[i]), Controller: ptr.To(true)}}
			p.CreationTimestamp.Time = p.CreationTimestamp.Add(time.Duration(i) * time.Minute)
			p.Status = corev1.PodStatus{Phase: corev1.PodFailed, ContainerStatuses: []corev1.ContainerStatus{{
				Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: exit}}}}}
			if exit == 0 {
				p.Status.Phase = corev1.PodSucceeded
			}
			c.s.Pods = append(c.s.Pods, p)
		}
		slices.Reverse(c.s.Pods) // no order is promised
		if got := strings.Join(Summarize(c.s, false).Apps[0].Services[0].Problems, "|"); got != c.want {
			t.Errorf("%s: problems are %q, want %q", c.name, got, c.want)
		}
	}
}

func TestVersion(t *testing.T) {
	labelled := metav1.ObjectMeta{Labels: map[string]string{api.LabelVersion: "1.2"}}
	for _, c := range []struct {
		pod      metav1.ObjectMeta
		image    string
		workload map[string]string
		want     string
	}{
		{labelled, "web:9", nil, "1.2"},
		{metav1.ObjectMeta{}, "web:9", labelled.Labels, "1.2"},
		{metav1.ObjectMeta{}, "registry:5000/team/web:9", nil, "9"},
		{metav1.ObjectMeta{}, "registry:5000/team/web", nil, "latest"},
		{metav1.ObjectMeta{}, "web:9@sha256:0123456789abcdef", nil, "9"},
		{metav1.ObjectMeta{}, "web@sha256:0123456789abcdef", nil, "0123456789ab"},
		{metav1.ObjectMeta{}, "", nil, ""},
	} {
		spec := container(c.image, 0)
		if c.image == "" {
			spec.Containers = nil
		}
		if got := version(c.pod, spec, c.workload); got != c.want {
			t.Errorf("%s: got %q, want %q", c.image, got, c.want)
		}
	}
}

// Figures that go up and down are no news; what begins or ends is.
func TestSteady(t *testing.T) {
	status := func(change func(*Status)) string {
		s := Summarize(snapshot(t), false)
		s.Connections = []Connection{{From: Peer{Kind: PeerOutside, Name: "192.0.2.9"}, To: Peer{Kind: "Deployment", Name: "front"}, Port: 80, Open: 1, Addresses: 1}}
		change(&s)
		text, err := json.Marshal(s.Steady())
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	before := status(func(*Status) {})
	for _, c := range []struct {
		name   string
		change func(*Status)
		news   bool
	}{
		{"more connections", func(s *Status) { s.Connections[0].Open, s.Connections[0].Bytes = 9, 100 }, false},
		{"they ended", func(s *Status) { s.Connections[0].Open, s.Connections[0].Recent = 0, 1 }, false},
		{"another one outside", func(s *Status) { s.Connections[0].From.Name, s.Connections[0].Addresses = "", 2 }, false},
		{"more memory", func(s *Status) { s.Apps[0].Services[0].Usage, s.Nodes[0].Usage = &Usage{1, 2}, &Usage{1, 2} }, false},
		{"no answer", func(s *Status) { s.Connections[0].Waiting = 2 }, true},
		{"forgotten", func(s *Status) { s.Connections = nil }, true},
		{"a restart", func(s *Status) { s.Apps[0].Services[0].Restarts++ }, true},
	} {
		if got := status(c.change) != before; got != c.news {
			t.Errorf("%s: news is %v", c.name, got)
		}
	}
}
