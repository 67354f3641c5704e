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
	"tutti.dev/tutti/internal/image"
)

// getImage finds a container's image and those that are volumes of it, pulls
// them if their policies want that, and holds them for the pod.
func (x *actor) getImage(ctx context.Context, s pod.Step) {
	p := x.desired()
	c, _ := containerOf(p, s.Container)
	main, fault := x.findImage(ctx, p, c, c.Image, c.ImagePullPolicy)
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if fault != nil || v.Image == nil || !mounts(c, v.Name) {
			continue
		}
		var img held
		if img, fault = x.findImage(ctx, p, c, v.Image.Reference, v.Image.PullPolicy); fault == nil {
			if err := x.a.Volumes.MountImage(p.UID, v.Name, img.layers); err != nil {
				fault = &imageFault{pod.ReasonErrImagePull, err, startFirst}
			}
		}
	}
	if fault != nil {
		if ctx.Err() == nil {
			x.container(s.ID, func(k *pod.Container) {
				k.Fault = k.Fault.Next(time.Now(), fault.reason, fault.err.Error(), fault.first, pullMost)
			})
		}
		return
	}
	x.mu.Lock()
	x.images[c.Name] = main
	x.mu.Unlock()
	x.container(s.ID, func(k *pod.Container) { k.Image, k.ImageID, k.Fault = true, imageID(main.Image), nil })
}

func mounts(c *v1.Container, volume string) bool {
	return slices.ContainsFunc(c.VolumeMounts, func(m v1.VolumeMount) bool { return m.Name == volume })
}

// imageFault says why an image cannot be had, with the API's word for it, and
// how long to wait before the second attempt.
type imageFault struct {
	reason string
	err    error
	first  time.Duration
}

// findImage finds an image that a container wants, as its program or as a
// volume.
func (x *actor) findImage(ctx context.Context, p *v1.Pod, c *v1.Container, name string, policy v1.PullPolicy) (held, *imageFault) {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		err := fmt.Errorf("Failed to apply default image tag %q: couldn't parse image name %q: %w", name, name, err)
		x.a.event(p, c.Name, v1.EventTypeWarning, "InspectFailed", err.Error())
		return held{}, &imageFault{pod.ReasonImageName, err, pullFirst}
	}
	img, err := x.a.Images.Get(ctx, name)
	switch {
	case err != nil && !errors.Is(err, image.ErrNotFound):
		return held{}, &imageFault{pod.ReasonErrImagePull, fmt.Errorf("look up image %s: %w", name, err), pullFirst}
	case policy == v1.PullNever && err != nil:
		err := fmt.Errorf("Container image %q is not present with pull policy of Never", name)
		x.a.event(p, c.Name, v1.EventTypeWarning, events.ErrImageNeverPullPolicy, err.Error())
		return held{}, &imageFault{pod.ReasonImageNever, err, pullFirst}
	case err == nil && policy != v1.PullAlways:
		x.a.event(p, c.Name, v1.EventTypeNormal, events.PulledImage, fmt.Sprintf("Container image %q already present on machine", name))
	default:
		if img, err = x.pull(ctx, p, c, name, ref); err != nil {
			return held{}, &imageFault{pod.ReasonErrImagePull, err, pullFirst}
		}
	}
	layers, err := x.a.Images.Hold(ctx, img, x.uid)
	if err != nil {
		return held{}, &imageFault{pod.ReasonErrImagePull, fmt.Errorf("hold image %s: %w", name, err), startFirst}
	}
	return held{img, layers}, nil
}

func (x *actor) pull(ctx context.Context, p *v1.Pod, c *v1.Container, name string, ref reference.Named) (image.Image, error) {
	x.a.event(p, c.Name, v1.EventTypeNormal, events.PullingImage, fmt.Sprintf("Pulling image %q", name))
	begun := time.Now()
	auths, err := x.a.auths(ctx, p, ref)
	if err != nil {
		return image.Image{}, err
	}
	img, err := x.a.Images.Pull(ctx, name, auths)
	if err != nil {
		if ctx.Err() == nil {
			x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedToPullImage, fmt.Sprintf("Failed to pull image %q: %v", name, err))
			x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedToPullImage, "Error: "+pod.ReasonErrImagePull)
		}
		return img, err
	}
	x.a.event(p, c.Name, v1.EventTypeNormal, events.PulledImage, fmt.Sprintf("Successfully pulled image %q in %s. Image size: %d bytes.",
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
	ref, err := reference.ParseNormalizedNamed(img.Name)
	if err != nil {
		return img.Digest
	}
	return ref.Name() + "@" + img.Digest
}
