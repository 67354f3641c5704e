// Package env computes what a container's program is started with: its
// environment and its argument list, by the rules of a kubelet.
package env

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/api/v1/resource"
	podshelper "k8s.io/kubernetes/pkg/apis/core/pods"
	"k8s.io/kubernetes/pkg/fieldpath"
	"k8s.io/kubernetes/pkg/kubelet/envvars"
	envfile "k8s.io/kubernetes/pkg/kubelet/util/env"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"

	"tutti.dev/tutti/internal/image"
)

// ErrNoCommand says that neither the container nor its image names a program.
var ErrNoCommand = errors.New("no command specified; the image names none, so give the container one")

// Source gives the objects that an environment may be taken from. A missing
// object is an API "not found" error.
type Source interface {
	GetConfigMap(ctx context.Context, namespace, name string) (*v1.ConfigMap, error)
	GetSecret(ctx context.Context, namespace, name string) (*v1.Secret, error)
}

// Input is everything the environment of one container depends on.
type Input struct {
	Pod       *v1.Pod // status carries podIPs and hostIPs
	Container *v1.Container
	Objects   Source
	// Services are those of the cluster; the right ones are chosen here.
	Services []*v1.Service
	// Allocatable of the node stands in for limits that are not set.
	Allocatable v1.ResourceList
	// VolumePath returns where a volume of the pod is on this machine, for
	// variables taken from a file; nil if the pod has no such variables.
	VolumePath func(volume string) (string, error)
}

// Expand returns the variables that the pod gives to the container, as
// NAME=value, sorted by name. The text of an error is meant for the pod's
// owner (reason CreateContainerConfigError).
func Expand(ctx context.Context, in Input) ([]string, error) {
	e := expansionOf{Input: in, configMaps: map[string]*v1.ConfigMap{}, secrets: map[string]*v1.Secret{}}
	vars := map[string]string{}
	for _, from := range in.Container.EnvFrom {
		if err := e.addAll(ctx, vars, from); err != nil {
			return nil, err
		}
	}
	services := serviceVariables(in.Pod, in.Services)
	mapping := expansion.MappingFuncFor(vars, services)
	for _, v := range in.Container.Env {
		value, present := expansion.Expand(v.Value, mapping), true
		if v.Value == "" && v.ValueFrom != nil {
			var err error
			if value, present, err = e.valueFrom(ctx, v.ValueFrom); err != nil {
				return nil, err
			}
		}
		if present {
			vars[v.Name] = value
		}
	}
	for name, value := range services {
		if _, ok := vars[name]; !ok {
			vars[name] = value
		}
	}
	list := make([]string, 0, len(vars))
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		if strings.ContainsRune(vars[name], 0) {
			return nil, fmt.Errorf("environment variable %s holds a NUL byte", name)
		}
		list = append(list, name+"="+vars[name])
	}
	return list, nil
}

// expansionOf remembers the objects read, so that one container sees one
// version of each.
type expansionOf struct {
	Input
	configMaps map[string]*v1.ConfigMap
	secrets    map[string]*v1.Secret
}

func (e *expansionOf) addAll(ctx context.Context, vars map[string]string, from v1.EnvFromSource) error {
	switch {
	case from.ConfigMapRef != nil:
		cm, err := e.configMap(ctx, from.ConfigMapRef.Name, from.ConfigMapRef.Optional)
		if err != nil || cm == nil {
			return err
		}
		for k, v := range cm.Data {
			vars[from.Prefix+k] = v
		}
	case from.SecretRef != nil:
		secret, err := e.secret(ctx, from.SecretRef.Name, from.SecretRef.Optional)
		if err != nil || secret == nil {
			return err
		}
		for k, v := range secret.Data {
			vars[from.Prefix+k] = string(v)
		}
	}
	return nil
}

// valueFrom reports false when the source is optional and absent.
func (e *expansionOf) valueFrom(ctx context.Context, from *v1.EnvVarSource) (string, bool, error) {
	switch {
	case from.FieldRef != nil:
		value, err := Field(e.Pod, from.FieldRef)
		return value, true, err
	case from.ResourceFieldRef != nil:
		value, err := Resource(e.Pod, e.Container, from.ResourceFieldRef, e.Allocatable)
		return value, true, err
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		cm, err := e.configMap(ctx, ref.Name, ref.Optional)
		if err != nil || cm == nil {
			return "", false, err
		}
		value, ok := cm.Data[ref.Key]
		if !ok && !isTrue(ref.Optional) {
			return "", false, fmt.Errorf("couldn't find key %v in ConfigMap %v/%v", ref.Key, e.Pod.Namespace, ref.Name)
		}
		return value, ok, nil
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		secret, err := e.secret(ctx, ref.Name, ref.Optional)
		if err != nil || secret == nil {
			return "", false, err
		}
		value, ok := secret.Data[ref.Key]
		if !ok && !isTrue(ref.Optional) {
			return "", false, fmt.Errorf("couldn't find key %v in Secret %v/%v", ref.Key, e.Pod.Namespace, ref.Name)
		}
		return string(value), ok, nil
	case from.FileKeyRef != nil:
		return e.fileKey(from.FileKeyRef)
	}
	return "", false, errors.New("environment variable source is empty or not known")
}

func (e *expansionOf) fileKey(ref *v1.FileKeySelector) (string, bool, error) {
	if e.VolumePath == nil {
		return "", false, fmt.Errorf("cannot find the volume %q referenced by FileKeyRef", ref.VolumeName)
	}
	dir, err := e.VolumePath(ref.VolumeName)
	if err != nil {
		return "", false, fmt.Errorf("cannot find the volume %q referenced by FileKeyRef: %w", ref.VolumeName, err)
	}
	file, err := openInVolume(dir, ref.Path)
	if err != nil {
		// The error would name paths of the machine.
		return "", false, errors.New("couldn't parse env file")
	}
	defer file.Close()
	value, err := envfile.ParseEnv(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), ref.Key)
	switch {
	case err != nil:
		return "", false, errors.New("couldn't parse env file") // as above
	case value == "" && isTrue(ref.Optional):
		return "", false, nil
	case value == "":
		return "", false, fmt.Errorf("environment variable key %q not found in file %q of volume %q", ref.Key, ref.Path, ref.VolumeName)
	}
	return value, true, nil
}

// openInVolume opens a regular file of a volume that containers of the pod may
// change meanwhile: links lead nowhere else, and nothing makes it wait.
func openInVolume(dir, path string) (*os.File, error) {
	handle, err := pathrs.OpenInRoot(dir, path)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	if info, err := handle.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(os.ErrInvalid, err)
	}
	return pathrs.Reopen(handle, os.O_RDONLY)
}

// configMap returns nil without an error when the object is optional and absent.
func (e *expansionOf) configMap(ctx context.Context, name string, optional *bool) (*v1.ConfigMap, error) {
	if cm, ok := e.configMaps[name]; ok {
		return cm, nil
	}
	cm, err := e.Objects.GetConfigMap(ctx, e.Pod.Namespace, name)
	if err != nil {
		if apierrors.IsNotFound(err) && isTrue(optional) {
			return nil, nil
		}
		return nil, err
	}
	e.configMaps[name] = cm
	return cm, nil
}

func (e *expansionOf) secret(ctx context.Context, name string, optional *bool) (*v1.Secret, error) {
	if s, ok := e.secrets[name]; ok {
		return s, nil
	}
	s, err := e.Objects.GetSecret(ctx, e.Pod.Namespace, name)
	if err != nil {
		if apierrors.IsNotFound(err) && isTrue(optional) {
			return nil, nil
		}
		return nil, err
	}
	e.secrets[name] = s
	return s, nil
}

func isTrue(b *bool) bool { return b != nil && *b }

// Field returns the value of a downward API field of the pod.
func Field(pod *v1.Pod, ref *v1.ObjectFieldSelector) (string, error) {
	path, _, err := podshelper.ConvertDownwardAPIFieldLabel(ref.APIVersion, ref.FieldPath, "")
	if err != nil {
		return "", err
	}
	switch path {
	case "spec.nodeName":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return pod.Status.HostIP, nil
	case "status.hostIPs":
		return join(pod.Status.HostIPs, func(ip v1.HostIP) string { return ip.IP }), nil
	case "status.podIP":
		return pod.Status.PodIP, nil
	case "status.podIPs":
		return join(pod.Status.PodIPs, func(ip v1.PodIP) string { return ip.IP }), nil
	}
	return fieldpath.ExtractFieldPathAsString(pod, path)
}

func join[T any](list []T, text func(T) string) string {
	parts := make([]string, len(list))
	for i, v := range list {
		parts[i] = text(v)
	}
	return strings.Join(parts, ",")
}

// Resource returns a request or limit of a container; a limit that is not set
// is that of the pod, or else what the node can give. c is the container
// meant when ref names none.
func Resource(pod *v1.Pod, c *v1.Container, ref *v1.ResourceFieldSelector, allocatable v1.ResourceList) (string, error) {
	if resourcehelper.IsPodLevelLimitsSet(pod) {
		allocatable = maps.Clone(allocatable)
		for name, limit := range pod.Spec.Resources.Limits {
			if _, ok := allocatable[name]; ok && resourcehelper.IsSupportedPodLevelResource(name) && !limit.IsZero() {
				allocatable[name] = limit
			}
		}
	}
	if ref.ContainerName != "" {
		return resource.ExtractResourceValueByContainerNameAndNodeAllocatable(ref, pod, ref.ContainerName, allocatable)
	}
	if c == nil {
		return "", fmt.Errorf("resource %s: no container named", ref.Resource)
	}
	c = c.DeepCopy()
	resource.MergeContainerResourceLimits(c, allocatable)
	return resource.ExtractContainerResourceValue(ref, c)
}

// serviceVariables are the variables that tell a container of Services: the
// API server's always, those of its namespace when it wants them.
func serviceVariables(pod *v1.Pod, services []*v1.Service) map[string]string {
	chosen := map[string]*v1.Service{}
	for _, s := range services {
		if s.Spec.ClusterIP == "" || s.Spec.ClusterIP == v1.ClusterIPNone {
			continue
		}
		switch {
		case s.Namespace == pod.Namespace && (pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks):
			chosen[s.Name] = s
		case s.Namespace == metav1.NamespaceDefault && s.Name == "kubernetes":
			if _, ok := chosen[s.Name]; !ok {
				chosen[s.Name] = s
			}
		}
	}
	vars := map[string]string{}
	for _, v := range envvars.FromServices(slices.Collect(maps.Values(chosen))) {
		vars[v.Name] = v.Value
	}
	return vars
}

// Merge puts the pod's variables over those of the image and returns the
// complete environment.
func Merge(image, pod []string) []string {
	name := func(v string) string { n, _, _ := strings.Cut(v, "="); return n }
	own := map[string]bool{}
	for _, v := range pod {
		own[name(v)] = true
	}
	merged := make([]string, 0, len(image)+len(pod))
	for _, v := range image {
		if !own[name(v)] {
			merged = append(merged, v)
		}
	}
	return append(merged, pod...)
}

// Command returns the argument list of the container's program: $(NAME) is
// replaced from the variables that Expand returned, and what the container
// leaves out is the image's. A container's command sets the image's
// arguments aside as well.
func Command(c *v1.Container, img image.Config, vars []string) ([]string, error) {
	values := map[string]string{}
	for _, v := range vars {
		name, value, _ := strings.Cut(v, "=")
		values[name] = value
	}
	mapping := expansion.MappingFuncFor(values)
	expand := func(list []string) []string {
		out := make([]string, len(list))
		for i, s := range list {
			out[i] = expansion.Expand(s, mapping)
		}
		return out
	}
	entrypoint, args := expand(c.Command), expand(c.Args)
	if len(c.Command) == 0 {
		entrypoint = img.Entrypoint
		if len(c.Args) == 0 {
			args = img.Cmd
		}
	}
	argv := slices.Concat(entrypoint, args)
	if len(argv) == 0 || argv[0] == "" {
		return nil, ErrNoCommand
	}
	return argv, nil
}
