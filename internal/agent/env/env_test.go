package env

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/image"
)

type objects struct {
	configMaps map[string]map[string]string
	secrets    map[string]map[string][]byte
}

func (o objects) GetConfigMap(_ context.Context, _, name string) (*v1.ConfigMap, error) {
	data, ok := o.configMaps[name]
	if !ok {
		return nil, apierrors.NewNotFound(v1.Resource("configmaps"), name)
	}
	return &v1.ConfigMap{Data: data}, nil
}

func (o objects) GetSecret(_ context.Context, _, name string) (*v1.Secret, error) {
	data, ok := o.secrets[name]
	if !ok {
		return nil, apierrors.NewNotFound(v1.Resource("secrets"), name)
	}
	return &v1.Secret{Data: data}, nil
}

func service(namespace, name, ip string) *v1.Service {
	return &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       v1.ServiceSpec{ClusterIP: ip, Ports: []v1.ServicePort{{Port: 443, Protocol: v1.ProtocolTCP}}},
	}
}

func field(path string) *v1.EnvVarSource {
	return &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}
}

func limit(container, name, divisor string) *v1.EnvVarSource {
	return &v1.EnvVarSource{ResourceFieldRef: &v1.ResourceFieldSelector{ContainerName: container, Resource: name, Divisor: resource.MustParse(divisor)}}
}

func TestExpand(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "app.env"), []byte("COLOUR='blue'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "secret.env")
	if err := os.WriteFile(outside, []byte("COLOUR='red'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "out.env")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	source := objects{
		configMaps: map[string]map[string]string{"cm": {"A": "from-cm", "B": "b"}},
		secrets:    map[string]map[string][]byte{"s": {"A": []byte("from-secret"), "nul": {0}}},
	}
	services := []*v1.Service{
		service("default", "kubernetes", "10.43.0.1"),
		service("shop", "web", "10.43.0.9"),
		service("shop", "headless", "None"),
		service("other", "db", "10.43.0.8"),
	}
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: "u1", Labels: map[string]string{"app": "x"}},
		Spec: v1.PodSpec{
			NodeName: "n1", ServiceAccountName: "sa", EnableServiceLinks: ptr.To(false),
			Containers: []v1.Container{{Name: "other", Resources: v1.ResourceRequirements{Limits: v1.ResourceList{"memory": resource.MustParse("64Mi")}}}},
		},
		Status: v1.PodStatus{
			PodIP: "10.42.0.7", PodIPs: []v1.PodIP{{IP: "10.42.0.7"}, {IP: "fd00::7"}},
			HostIP: "192.0.2.1", HostIPs: []v1.HostIP{{IP: "192.0.2.1"}},
		},
	}
	linked := pod.DeepCopy()
	linked.Spec.EnableServiceLinks = ptr.To(true)
	configKey := func(name, key string, optional bool) *v1.EnvVarSource {
		return &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{
			LocalObjectReference: v1.LocalObjectReference{Name: name}, Key: key, Optional: ptr.To(optional)}}
	}
	secretKey := func(name, key string, optional bool) *v1.EnvVarSource {
		return &v1.EnvVarSource{SecretKeyRef: &v1.SecretKeySelector{
			LocalObjectReference: v1.LocalObjectReference{Name: name}, Key: key, Optional: ptr.To(optional)}}
	}
	pathKey := func(path string) *v1.EnvVarSource {
		return &v1.EnvVarSource{FileKeyRef: &v1.FileKeySelector{VolumeName: "v", Path: path, Key: "COLOUR"}}
	}
	fileKey := func(key string, optional bool) *v1.EnvVarSource {
		return &v1.EnvVarSource{FileKeyRef: &v1.FileKeySelector{VolumeName: "v", Path: "app.env", Key: key, Optional: ptr.To(optional)}}
	}
	fromConfigMap := func(name, prefix string, optional bool) v1.EnvFromSource {
		return v1.EnvFromSource{Prefix: prefix, ConfigMapRef: &v1.ConfigMapEnvSource{
			LocalObjectReference: v1.LocalObjectReference{Name: name}, Optional: ptr.To(optional)}}
	}
	fromSecret := v1.EnvFromSource{SecretRef: &v1.SecretEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "s"}}}

	for name, test := range map[string]struct {
		pod  *v1.Pod
		from []v1.EnvFromSource
		env  []v1.EnvVar
		want []string // some of the result; "!NAME" must be absent
		err  string
	}{
		"references to earlier variables only": {
			env:  []v1.EnvVar{{Name: "X", Value: "$(Y)-$(Z)"}, {Name: "Y", Value: "y"}, {Name: "Z", Value: "<$(Y)>"}, {Name: "E", Value: "$$(Y)"}},
			want: []string{"X=$(Y)-$(Z)", "Y=y", "Z=<y>", "E=$(Y)"},
		},
		"env over envFrom, later envFrom over earlier": {
			from: []v1.EnvFromSource{fromConfigMap("cm", "", false), {SecretRef: &v1.SecretEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "none"}, Optional: ptr.To(true)}}},
			env:  []v1.EnvVar{{Name: "B", Value: "own-$(A)"}},
			want: []string{"A=from-cm", "B=own-from-cm"},
		},
		"prefix":                      {from: []v1.EnvFromSource{fromConfigMap("cm", "P_", false)}, want: []string{"P_A=from-cm", "!A"}},
		"missing config map":          {from: []v1.EnvFromSource{fromConfigMap("none", "", false)}, err: `configmaps "none" not found`},
		"missing optional config map": {from: []v1.EnvFromSource{fromConfigMap("none", "", true)}, want: []string{"!A"}},
		"NUL in a secret":             {from: []v1.EnvFromSource{fromSecret}, err: "environment variable nul holds a NUL byte"},
		"keys": {
			env:  []v1.EnvVar{{Name: "A", ValueFrom: configKey("cm", "A", false)}, {Name: "S", ValueFrom: secretKey("s", "A", false)}},
			want: []string{"A=from-cm", "S=from-secret"},
		},
		"missing key":          {env: []v1.EnvVar{{Name: "A", ValueFrom: configKey("cm", "Q", false)}}, err: "couldn't find key Q in ConfigMap shop/cm"},
		"missing secret key":   {env: []v1.EnvVar{{Name: "A", ValueFrom: secretKey("s", "Q", false)}}, err: "couldn't find key Q in Secret shop/s"},
		"missing optional key": {env: []v1.EnvVar{{Name: "A", ValueFrom: configKey("cm", "Q", true)}, {Name: "B", ValueFrom: secretKey("none", "Q", true)}}, want: []string{"!A", "!B"}},
		"fields": {
			env: []v1.EnvVar{
				{Name: "NODE", ValueFrom: field("spec.nodeName")}, {Name: "SA", ValueFrom: field("spec.serviceAccountName")},
				{Name: "IP", ValueFrom: field("status.podIP")}, {Name: "IPS", ValueFrom: field("status.podIPs")},
				{Name: "HOST", ValueFrom: field("status.hostIP")}, {Name: "HOSTS", ValueFrom: field("status.hostIPs")},
				{Name: "NAME", ValueFrom: field("metadata.name")}, {Name: "UID", ValueFrom: field("metadata.uid")},
				{Name: "APP", ValueFrom: field("metadata.labels['app']")},
			},
			want: []string{"NODE=n1", "SA=sa", "IP=10.42.0.7", "IPS=10.42.0.7,fd00::7", "HOST=192.0.2.1", "HOSTS=192.0.2.1", "NAME=p", "UID=u1", "APP=x"},
		},
		"resources": {
			env: []v1.EnvVar{
				{Name: "OWN", ValueFrom: limit("", "limits.cpu", "1m")},
				{Name: "NODE", ValueFrom: limit("", "limits.memory", "1Mi")},
				{Name: "OTHER", ValueFrom: limit("other", "limits.memory", "1Mi")},
				{Name: "OTHERCPU", ValueFrom: limit("other", "limits.cpu", "1")},
			},
			want: []string{"OWN=250", "NODE=1024", "OTHER=64", "OTHERCPU=2"},
		},
		"service links off": {want: []string{"KUBERNETES_SERVICE_HOST=10.43.0.1", "!WEB_SERVICE_HOST"}},
		"service links on": {
			pod:  linked,
			env:  []v1.EnvVar{{Name: "WEB_SERVICE_PORT", Value: "mine"}, {Name: "URL", Value: "http://$(WEB_SERVICE_HOST)"}},
			want: []string{"KUBERNETES_SERVICE_HOST=10.43.0.1", "WEB_SERVICE_HOST=10.43.0.9", "WEB_SERVICE_PORT=mine", "URL=http://10.43.0.9", "!HEADLESS_SERVICE_HOST", "!DB_SERVICE_HOST"},
		},
		"file":                  {env: []v1.EnvVar{{Name: "C", ValueFrom: fileKey("COLOUR", false)}}, want: []string{"C=blue"}},
		"file is a way out":     {env: []v1.EnvVar{{Name: "C", ValueFrom: pathKey("out.env")}}, err: "couldn't parse env file"},
		"file is a pipe":        {env: []v1.EnvVar{{Name: "C", ValueFrom: pathKey("pipe")}}, err: "couldn't parse env file"},
		"file key missing":      {env: []v1.EnvVar{{Name: "C", ValueFrom: fileKey("SIZE", false)}}, err: `environment variable key "SIZE" not found in file "app.env" of volume "v"`},
		"file key not required": {env: []v1.EnvVar{{Name: "C", ValueFrom: fileKey("SIZE", true)}}, want: []string{"!C"}},
	} {
		t.Run(name, func(t *testing.T) {
			if test.pod == nil {
				test.pod = pod
			}
			got, err := Expand(t.Context(), Input{
				Pod: test.pod, Objects: source, Services: services,
				Container: &v1.Container{
					EnvFrom: test.from, Env: test.env,
					Resources: v1.ResourceRequirements{Limits: v1.ResourceList{"cpu": resource.MustParse("250m")}},
				},
				Allocatable: v1.ResourceList{"cpu": resource.MustParse("2"), "memory": resource.MustParse("1Gi")},
				VolumePath:  func(string) (string, error) { return dir, nil },
			})
			if test.err != "" {
				if err == nil || err.Error() != test.err {
					t.Fatalf("error %v, want %s", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range test.want {
				absent, isAbsent := strings.CutPrefix(want, "!")
				if isAbsent {
					if slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, absent+"=") }) {
						t.Errorf("%s is set in %q", absent, got)
					}
				} else if !slices.Contains(got, want) {
					t.Errorf("no %s in %q", want, got)
				}
			}
		})
	}
}

func TestCommand(t *testing.T) {
	img := image.Config{Entrypoint: []string{"/entry", "$(A)"}, Cmd: []string{"cmd"}}
	for name, test := range map[string]struct {
		command, args []string
		img           image.Config
		want          []string
		err           error
	}{
		"image alone":        {img: img, want: []string{"/entry", "$(A)", "cmd"}},
		"args":               {img: img, args: []string{"$(A)", "$(NONE)"}, want: []string{"/entry", "$(A)", "a", "$(NONE)"}},
		"command":            {img: img, command: []string{"/run", "x$(A)"}, want: []string{"/run", "xa"}},
		"command and args":   {img: img, command: []string{"/run"}, args: []string{"$$(A)"}, want: []string{"/run", "$(A)"}},
		"nothing":            {err: ErrNoCommand},
		"args alone will do": {args: []string{"/bin/sh"}, want: []string{"/bin/sh"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Command(&v1.Container{Command: test.command, Args: test.args}, test.img, []string{"A=a"})
			if err != nil && err.Error() != "no command specified; the image names none, so give the container one" {
				t.Errorf("error %v", err)
			}
			if !errors.Is(err, test.err) || !slices.Equal(got, test.want) {
				t.Fatalf("got %q, %v; want %q, %v", got, err, test.want, test.err)
			}
		})
	}
}

func TestMerge(t *testing.T) {
	got := Merge([]string{"PATH=/bin", "A=image"}, []string{"A=pod", "B=b"})
	if want := []string{"PATH=/bin", "A=pod", "B=b"}; !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}
