package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/distribution/reference"
	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"k8s.io/kubernetes/pkg/credentialprovider/secrets"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/image"
)

// getImage finds a container's image, pulls it if its policy wants that, and
// holds it for the pod.
func (x *actor) getImage(ctx context.Context, s pod.Step) {
	p := x.desired()
	c, _ := containerOf(p, s.Container)
	fail := func(reason string, err error, first time.Duration) {
		if ctx.Err() != nil {
			return
		}
		x.container(s.ID, func(k *pod.Container) {
			k.Fault = k.Fault.Next(time.Now(), reason, err.Error(), first, pullMost)
		})
	}
	ref, err := reference.ParseNormalizedNamed(c.Image)
	if err != nil {
		x.a.event(p, c.Name, v1.EventTypeWarning, "InspectFailed", fmt.Sprintf("Failed to apply default image tag %q: couldn't parse image name %q: %v", c.Image, c.Image, err))
		fail(pod.ReasonImageName, fmt.Errorf("Failed to apply default image tag %q: couldn't parse image name %q: %w", c.Image, c.Image, err), pullFirst)
		return
	}
	img, err := x.a.Images.Get(ctx, c.Image)
	switch {
	case err != nil && !errors.Is(err, image.ErrNotFound):
		fail(pod.ReasonErrImagePull, fmt.Errorf("look up image %s: %w", c.Image, err), pullFirst)
		return
	case c.ImagePullPolicy == v1.PullNever && err != nil:
		err := fmt.Errorf("Container image %q is not present with pull policy of Never", c.Image)
		x.a.event(p, c.Name, v1.EventTypeWarning, events.ErrImageNeverPullPolicy, err.Error())
		fail(pod.ReasonImageNever, err, pullFirst)
		return
	case err == nil && c.ImagePullPolicy != v1.PullAlways:
		x.a.event(p, c.Name, v1.EventTypeNormal, events.PulledImage, fmt.Sprintf("Container image %q already present on machine", c.Image))
	default:
		if img, err = x.pull(ctx, p, c, ref); err != nil {
			fail(pod.ReasonErrImagePull, err, pullFirst)
			return
		}
	}
	layers, err := x.a.Images.Hold(ctx, img, x.uid)
	if err != nil {
		fail(pod.ReasonErrImagePull, fmt.Errorf("hold image %s: %w", c.Image, err), startFirst)
		return
	}
	x.mu.Lock()
	x.images[c.Name] = held{img, layers}
	x.mu.Unlock()
	x.container(s.ID, func(k *pod.Container) { k.Image, k.ImageID, k.Fault = true, imageID(img), nil })
}

func (x *actor) pull(ctx context.Context, p *v1.Pod, c *v1.Container, ref reference.Named) (image.Image, error) {
	x.a.event(p, c.Name, v1.EventTypeNormal, events.PullingImage, fmt.Sprintf("Pulling image %q", c.Image))
	begun := time.Now()
	auths, err := x.a.auths(ctx, p, ref)
	if err != nil {
		return image.Image{}, err
	}
	img, err := x.a.Images.Pull(ctx, c.Image, auths)
	if err != nil {
		if ctx.Err() == nil {
			x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedToPullImage, fmt.Sprintf("Failed to pull image %q: %v", c.Image, err))
			x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedToPullImage, "Error: "+pod.ReasonErrImagePull)
		}
		return img, err
	}
	x.a.event(p, c.Name, v1.EventTypeNormal, events.PulledImage, fmt.Sprintf("Successfully pulled image %q in %s. Image size: %d bytes.",
		c.Image, time.Since(begun).Truncate(time.Millisecond), img.Size))
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
