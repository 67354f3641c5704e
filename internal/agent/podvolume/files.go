package podvolume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	k8svolume "k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	"k8s.io/kubernetes/pkg/volume/downwardapi"
	"k8s.io/kubernetes/pkg/volume/secret"
	volumeutil "k8s.io/kubernetes/pkg/volume/util"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/volume"
)

// files is a volume whose content comes from objects of the API. All kinds
// are projections: a configMap volume is one of a single ConfigMap.
type files struct {
	kind    string
	sources []v1.VolumeProjection
	mode    *int32
}

// filesOf returns nil for a volume of another kind.
func filesOf(v *v1.Volume) *files {
	switch {
	case v.ConfigMap != nil:
		return &files{"configMap", []v1.VolumeProjection{{ConfigMap: &v1.ConfigMapProjection{
			LocalObjectReference: v.ConfigMap.LocalObjectReference, Items: v.ConfigMap.Items, Optional: v.ConfigMap.Optional,
		}}}, modeOr0644(v.ConfigMap.DefaultMode)}
	case v.Secret != nil:
		return &files{"secret", []v1.VolumeProjection{{Secret: &v1.SecretProjection{
			LocalObjectReference: v1.LocalObjectReference{Name: v.Secret.SecretName}, Items: v.Secret.Items, Optional: v.Secret.Optional,
		}}}, modeOr0644(v.Secret.DefaultMode)}
	case v.DownwardAPI != nil:
		return &files{"downwardAPI", []v1.VolumeProjection{{DownwardAPI: &v1.DownwardAPIProjection{Items: v.DownwardAPI.Items}}}, modeOr0644(v.DownwardAPI.DefaultMode)}
	case v.Projected != nil:
		return &files{"projected", v.Projected.Sources, modeOr0644(v.Projected.DefaultMode)}
	}
	return nil
}

func modeOr0644(mode *int32) *int32 { return ptr.To(ptr.Deref(mode, 0o644)) }

func always(*files) bool { return true }

func usesDownwardAPI(f *files) bool {
	for _, s := range f.sources {
		if s.DownwardAPI != nil {
			return true
		}
	}
	return false
}

// filesState is what a pod's files were last written from.
type filesState struct {
	versions map[key]string
	tokens   map[tokenKey]token
	timer    *time.Timer
}

type tokenKey struct {
	audience string
	seconds  int64
}

type token struct {
	value string
	renew time.Time
}

func (s *filesState) stopTimer() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// writeFiles brings those volumes of the pod up to date that are written from
// objects and that which chooses. The caller holds p.mu.
func (m *Manager) writeFiles(ctx context.Context, p *pod, which func(*files) bool) error {
	collected := &collection{m: m, pod: p.pod, before: p.files.versions, versions: map[key]string{}, tokens: maps.Clone(p.files.tokens)}
	if collected.tokens == nil {
		collected.tokens = map[tokenKey]token{}
	}
	type job struct {
		name    string
		files   *files
		payload map[string]volumeutil.FileProjection
		err     error
	}
	var jobs []*job
	everything := true
	for i := range p.pod.Spec.Volumes {
		v := &p.pod.Spec.Volumes[i]
		if f := filesOf(v); f != nil {
			if which(f) {
				jobs = append(jobs, &job{name: v.Name, files: f})
			} else {
				everything = false
			}
		}
	}
	if len(jobs) == 0 {
		return nil
	}
	if err := m.mountMemory(); err != nil {
		return err
	}
	var reading sync.WaitGroup
	for _, j := range jobs {
		reading.Go(func() { j.payload, j.err = collected.payload(ctx, j.files) })
	}
	reading.Wait()
	var errs []error
	passing := false // some error may go away unannounced
	for _, j := range jobs {
		if j.err == nil {
			dir := m.layout.MemoryVolume(string(p.pod.UID), j.files.kind, j.name)
			if j.err = write(p.pod, dir, j.payload); j.err == nil {
				p.made[j.name] = made{path: dir, readOnly: true}
			}
		}
		if j.err != nil {
			errs = append(errs, setUpError(j.name, j.err))
			passing = passing || !apierrors.IsNotFound(j.err)
		}
	}
	p.files.tokens = collected.tokens
	if everything {
		p.files.versions = collected.versions
	} else {
		if p.files.versions == nil {
			p.files.versions = map[key]string{}
		}
		maps.Copy(p.files.versions, collected.versions)
	}
	m.objects.use(p.pod.UID, p.files.versions)
	m.scheduleRenewal(p, passing && p.done)
	return errors.Join(errs...)
}

func (m *Manager) mountMemory() error {
	m.memory.Lock()
	defer m.memory.Unlock()
	if m.memory.mounted {
		return nil
	}
	err := volume.Tmpfs{Mode: 0o700}.Mount(m.layout.Memory())
	m.memory.mounted = err == nil
	return err
}

// write publishes the payload: a container sees all of it or what was before.
func write(pod *v1.Pod, dir string, payload map[string]volumeutil.FileProjection) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := removeHalves(dir); err != nil {
		return err
	}
	w, err := volumeutil.NewAtomicWriter(dir, "pod "+string(pod.UID))
	if err != nil {
		return err
	}
	return w.Write(payload, func(string) error {
		return ownedAnew(pod, dir)
	})
}

// What upstream's writer makes besides what the pod sees: a link to the
// directory of the files, and those that it makes on the way.
const (
	hidden  = ".."
	current = "..data"
)

// removeHalves removes what a writer has left that was killed: upstream's
// stumbles over its own link and never looks for its own directories.
func removeHalves(dir string) error {
	target, err := os.Readlink(filepath.Join(dir, current))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, hidden) && name != current && name != target {
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// ownedAnew is owned whatever the pod's policy is: the files are new, though
// the directory may not be.
func ownedAnew(pod *v1.Pod, dir string) error {
	return k8svolume.NewVolumeOwnership(attributes{readOnly: true}, dir, fsGroup(pod), nil, nil).ChangePermissions()
}

// changed is called when an object that a pod uses has changed.
func (m *Manager) changed(uid types.UID, k key) {
	m.mu.Lock()
	p := m.pods[uid]
	m.mu.Unlock()
	if p != nil {
		m.refresh(p)
	}
}

// refresh writes again what has changed. What cannot be read, because it was
// deleted for instance, stays as it is.
func (m *Manager) refresh(p *pod) {
	ctx, cancel := context.WithTimeout(p.ctx, time.Minute)
	defer cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed || !p.done {
		return
	}
	if err := m.writeFiles(ctx, p, always); err != nil {
		m.cfg.Log.Info("volumes of a pod are not up to date", "namespace", p.pod.Namespace, "pod", p.pod.Name, "error", err)
	}
}

// scheduleRenewal sets the pod's one timer to when its first token is due, or
// soon after a failure that no watch will tell the end of.
func (m *Manager) scheduleRenewal(p *pod, failed bool) {
	p.files.stopTimer()
	var next time.Time
	for _, t := range p.files.tokens {
		if next.IsZero() || t.renew.Before(next) {
			next = t.renew
		}
	}
	if failed {
		next = time.Now().Add(retryAfter/2 + rand.N(retryAfter))
	}
	if !next.IsZero() {
		p.files.timer = time.AfterFunc(max(time.Until(next), 0), func() { m.refresh(p) })
	}
}

// collection reads what the volumes of one pod are written from.
type collection struct {
	m   *Manager
	pod *v1.Pod

	before   map[key]string // the versions of the last time
	mu       sync.Mutex
	versions map[key]string
	tokens   map[tokenKey]token
}

// payload reads the sources side by side and puts them together in order.
func (c *collection) payload(ctx context.Context, f *files) (map[string]volumeutil.FileProjection, error) {
	parts := make([]map[string]volumeutil.FileProjection, len(f.sources))
	work, ctx := errgroup.WithContext(ctx)
	for i := range f.sources {
		work.Go(func() (err error) {
			parts[i], err = c.part(ctx, &f.sources[i], f.mode)
			return err
		})
	}
	if err := work.Wait(); err != nil {
		return nil, err
	}
	payload := map[string]volumeutil.FileProjection{}
	for _, part := range parts {
		maps.Copy(payload, part)
	}
	return payload, nil
}

func (c *collection) part(ctx context.Context, s *v1.VolumeProjection, mode *int32) (map[string]volumeutil.FileProjection, error) {
	switch {
	case s.ConfigMap != nil:
		optional := ptr.Deref(s.ConfigMap.Optional, false)
		cm, err := c.m.objects.configMap(ctx, c.pod.Namespace, s.ConfigMap.Name)
		c.note(key{false, c.pod.Namespace, s.ConfigMap.Name}, cm, err, cm != nil && ptr.Deref(cm.Immutable, false))
		if apierrors.IsNotFound(err) && optional {
			cm, err = &v1.ConfigMap{}, nil
		}
		if err != nil {
			return nil, err
		}
		return configmap.MakePayload(s.ConfigMap.Items, cm, mode, optional)
	case s.Secret != nil:
		optional := ptr.Deref(s.Secret.Optional, false)
		obj, err := c.m.objects.secret(ctx, c.pod.Namespace, s.Secret.Name)
		c.note(key{true, c.pod.Namespace, s.Secret.Name}, obj, err, obj != nil && ptr.Deref(obj.Immutable, false))
		if apierrors.IsNotFound(err) && optional {
			obj, err = &v1.Secret{}, nil
		}
		if err != nil {
			return nil, err
		}
		return secret.MakePayload(s.Secret.Items, obj, mode, optional)
	case s.DownwardAPI != nil:
		return downwardapi.CollectData(s.DownwardAPI.Items, c.pod, nodeHost{allocatable: c.m.cfg.Allocatable}, mode)
	case s.ServiceAccountToken != nil:
		value, err := c.token(ctx, s.ServiceAccountToken)
		if err != nil {
			return nil, fmt.Errorf("get a token of service account %q: %w", c.pod.Spec.ServiceAccountName, err)
		}
		file := volumeutil.FileProjection{Data: []byte(value), Mode: *mode, FsUser: volumeutil.FsUserFrom(c.pod)}
		if file.FsUser != nil || fsGroup(c.pod) != nil {
			// The group's right to read comes with the ownership.
			file.Mode = 0o600
		}
		return map[string]volumeutil.FileProjection{filepath.Clean(s.ServiceAccountToken.Path): file}, nil
	}
	return nil, fmt.Errorf("projected source %s is not supported by tutti yet; leave it out", sourceName(*s))
}

// note remembers which version was read, so that it is watched from there.
// What cannot change is not watched.
func (c *collection) note(k key, object metav1.Object, err error, immutable bool) {
	version := ""
	switch {
	case err == nil && (immutable || k.name == rootCA):
		return
	case err == nil:
		version = object.GetResourceVersion()
	case !apierrors.IsNotFound(err):
		before, ok := c.before[k]
		if !ok {
			return
		}
		version = before
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if other, ok := c.versions[k]; ok && other != version {
		// Two volumes have read two versions: any news makes them agree.
		version = "several"
	}
	c.versions[k] = version
}

// token returns the pod's token for the audience, a new one when that is due.
func (c *collection) token(ctx context.Context, source *v1.ServiceAccountTokenProjection) (string, error) {
	k := tokenKey{source.Audience, ptr.Deref(source.ExpirationSeconds, 3600)}
	c.mu.Lock()
	have, ok := c.tokens[k]
	c.mu.Unlock()
	if ok && time.Now().Before(have.renew) {
		return have.value, nil
	}
	issued := time.Now()
	request, err := c.m.objects.token(ctx, c.pod, source)
	if err != nil {
		return "", err
	}
	// At four fifths of its life, not all at once, and daily in any case.
	// A clock that is wrong must not make this a loop.
	life := max(min(request.Status.ExpirationTimestamp.Sub(issued)*8/10, 24*time.Hour), time.Second/2)
	renew := issued.Add(life - rand.N(life/20))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tokens[k] = token{request.Status.Token, renew}
	return request.Status.Token, nil
}

// nodeHost is all of a volume host that the downward API looks at.
type nodeHost struct {
	k8svolume.VolumeHost
	allocatable func() v1.ResourceList
}

func (h nodeHost) GetNodeAllocatable() (v1.ResourceList, error) { return h.allocatable(), nil }
