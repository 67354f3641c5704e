package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/distribution/reference"
	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"k8s.io/kubernetes/pkg/credentialprovider/secrets"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/image"
)

// getImage finds a container's image and those that are volumes of it, pulls
// them if their policies want that, and holds them for the pod.
func (x *actor) getImage(ctx context.Context, s pod.Step) {
	p := x.desired()
	c, _ := containerOf(p, s.Container)
	var img image.Image
	var layers []string
	var err error
	if !x.onMachine(c) {
		img, layers, err = x.a.holdImage(ctx, p, c.Name, c.Image, c.ImagePullPolicy)
	}
	if err == nil {
		err = x.mountImages(ctx, p, c)
	}
	if err != nil {
		if ctx.Err() != nil {
			return
		}
		reason, first := pod.ReasonErrImagePull, pullFirst
		var problem *imageProblem
		if errors.As(err, &problem) {
			reason, first = problem.reason, problem.first
		}
		x.container(s.ID, func(k *pod.Container) {
			k.Fault = k.Fault.Next(time.Now(), reason, err.Error(), first, pullMost)
		})
		return
	}
	x.mu.Lock()
	x.images[c.Name] = held{img, layers}
	x.mu.Unlock()
	x.container(s.ID, func(k *pod.Container) { k.Image, k.ImageID, k.Fault = true, imageID(img), nil })
}

// process tells whether the pod's containers are processes of the machine.
func (x *actor) process() bool {
	rt, err := x.runtime()
	return err == nil && rt == x.a.Runtimes[hostprocess.Handler]
}

// onMachine tells whether a container has the machine's own file system: there
// is no image to it.
func (x *actor) onMachine(c *v1.Container) bool { return x.process() && c.Image == hostprocess.Image }

// mountImages makes those volumes of a container that are images.
func (x *actor) mountImages(ctx context.Context, p *v1.Pod, c *v1.Container) error {
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if v.Image == nil || !slices.ContainsFunc(c.VolumeMounts, func(m v1.VolumeMount) bool { return m.Name == v.Name }) {
			continue
		}
		_, layers, err := x.a.holdImage(ctx, p, c.Name, v.Image.Reference, v.Image.PullPolicy)
		if err != nil {
			return err
		}
		if err := x.a.Volumes.MountImage(p.UID, v.Name, layers); err != nil {
			return &imageProblem{err, pod.ReasonErrImagePull, startFirst}
		}
	}
	return nil
}

// imageProblem is why there is no image when it is not the pull that failed.
type imageProblem struct {
	error
	reason string
	first  time.Duration
}

// holdImage finds an image, pulls it if the policy wants that, and holds it
// for the pod. Events are the container's; "" is the pod itself.
func (a *Agent) holdImage(ctx context.Context, p *v1.Pod, container, name string, policy v1.PullPolicy) (image.Image, []string, error) {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		err = fmt.Errorf("Failed to apply default image tag %q: couldn't parse image name %q: %w", name, name, err)
		a.event(p, container, v1.EventTypeWarning, "InspectFailed", err.Error())
		return image.Image{}, nil, &imageProblem{err, pod.ReasonImageName, pullFirst}
	}
	img, err := a.Images.Get(ctx, name)
	switch {
	case err != nil && !errors.Is(err, image.ErrNotFound):
		return img, nil, fmt.Errorf("look up image %s: %w", name, err)
	case policy == v1.PullNever && err != nil:
		err := fmt.Errorf("Container image %q is not present with pull policy of Never", name)
		a.event(p, container, v1.EventTypeWarning, events.ErrImageNeverPullPolicy, err.Error())
		return img, nil, &imageProblem{err, pod.ReasonImageNever, pullFirst}
	case err == nil && policy != v1.PullAlways:
		a.event(p, container, v1.EventTypeNormal, events.PulledImage, fmt.Sprintf("Container image %q already present on machine", name))
	default:
		if img, err = a.pull(ctx, p, container, name, ref); err != nil {
			return img, nil, err
		}
	}
	layers, err := a.Images.Hold(ctx, img, string(p.UID))
	if err != nil {
		return img, nil, &imageProblem{fmt.Errorf("hold image %s: %w", name, err), pod.ReasonErrImagePull, startFirst}
	}
	return img, layers, nil
}

func (a *Agent) pull(ctx context.Context, p *v1.Pod, container, name string, ref reference.Named) (image.Image, error) {
	a.event(p, container, v1.EventTypeNormal, events.PullingImage, fmt.Sprintf("Pulling image %q", name))
	begun := time.Now()
	auths, err := a.auths(ctx, p, ref)
	if err != nil {
		return image.Image{}, err
	}
	img, err := a.Images.Pull(ctx, name, auths)
	if err != nil {
		if ctx.Err() == nil {
			a.event(p, container, v1.EventTypeWarning, events.FailedToPullImage, fmt.Sprintf("Failed to pull image %q: %v", name, err))
			a.event(p, container, v1.EventTypeWarning, events.FailedToPullImage, "Error: "+pod.ReasonErrImagePull)
		}
		return img, err
	}
	a.event(p, container, v1.EventTypeNormal, events.PulledImage, fmt.Sprintf("Successfully pulled image %q in %s. Image size: %d bytes.",
		name, time.Since(begun).Truncate(time.Millisecond), img.Size))
	return img, nil
}

// auths are the credentials that the pod's pull secrets hold for an image, and
// what its namespace gives it.
func (a *Agent) auths(ctx context.Context, p *v1.Pod, ref reference.Named) ([]image.Auth, error) {
	var list []v1.Secret
	for _, s := range p.Spec.ImagePullSecrets {
		secret, err := a.Volumes.GetSecret(ctx, p.Namespace, s.Name)
		if err != nil {
			// As in a kubelet: the image may be public after all.
			a.event(p, "", v1.EventTypeWarning, "FailedToRetrieveImagePullSecret",
				fmt.Sprintf("Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", s.Name))
			continue
		}
		list = append(list, *secret)
	}
	keys, err := secrets.MakeDockerKeyring(list, &credentialprovider.BasicDockerKeyring{})
	if err != nil {
		return nil, fmt.Errorf("read image pull secrets: %w", err)
	}
	found, _ := keys.Lookup(ref.Name())
	var auths []image.Auth
	for _, f := range found {
		auths = append(auths, image.Auth{Username: f.Username, Password: f.Password, IdentityToken: f.IdentityToken, RegistryToken: f.RegistryToken})
	}
	if a.RegistryAuth != nil {
		if own, ok := a.RegistryAuth(p.Namespace, ref); ok {
			auths = append(auths, own)
		}
	}
	return auths, nil
}

// imageID is how the API names the very content of an image.
func imageID(img image.Image) string {
	if img.Name == "" {
		return hostprocess.Image
	}
	ref, err := reference.ParseNormalizedNamed(img.Name)
	if err != nil {
		return img.Digest
	}
	return ref.Name() + "@" + img.Digest
}
