package main

import (
	"errors"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/conversion"
)

const group = "tests.tutti.dev"

// Website is a page with a greeting, served by some pods. Its schema is in deploy.yaml.
type Website struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   WebsiteSpec   `json:"spec"`
	Status WebsiteStatus `json:"status,omitempty"`
}

// WebsiteSpec is what the page shall be.
type WebsiteSpec struct {
	Greeting    string `json:"greeting"`
	Title       string `json:"title,omitempty"` // the webhook's default is the object's name
	Tier        string `json:"tier,omitempty"`
	Replicas    *int32 `json:"replicas,omitempty"`
	MaxReplicas *int32 `json:"maxReplicas,omitempty"`
}

// WebsiteStatus is how far it is.
type WebsiteStatus struct {
	Replicas      int32              `json:"replicas"`
	ReadyReplicas int32              `json:"readyReplicas"`
	Selector      string             `json:"selector,omitempty"`
	Conditions    []metav1.Condition `json:"conditions,omitempty"`
}

// WebsiteList is what a list of them answers.
type WebsiteList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Website `json:"items"`
}

// OldWebsite is version v1beta1, which calls the greeting a text.
type OldWebsite struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   OldWebsiteSpec `json:"spec"`
	Status WebsiteStatus  `json:"status,omitempty"`
}

// OldWebsiteSpec differs from [WebsiteSpec] by one name.
type OldWebsiteSpec struct {
	Text        string `json:"text"`
	Title       string `json:"title,omitempty"`
	Tier        string `json:"tier,omitempty"`
	Replicas    *int32 `json:"replicas,omitempty"`
	MaxReplicas *int32 `json:"maxReplicas,omitempty"`
}

func register(s *runtime.Scheme) {
	v1 := schema.GroupVersion{Group: group, Version: "v1"}
	s.AddKnownTypes(v1, &Website{}, &WebsiteList{})
	metav1.AddToGroupVersion(s, v1)
	old := schema.GroupVersion{Group: group, Version: "v1beta1"}
	s.AddKnownTypeWithName(old.WithKind("Website"), &OldWebsite{})
	metav1.AddToGroupVersion(s, old)
}

// Hub makes v1 the version through which all others are converted.
func (*Website) Hub() {}

// ConvertTo makes a v1 of a v1beta1.
func (o *OldWebsite) ConvertTo(hub conversion.Hub) error {
	w, ok := hub.(*Website)
	if !ok {
		return fmt.Errorf("convert to %T", hub)
	}
	if o.Spec.Text == "inconvertible" {
		return errors.New("this text cannot be a greeting")
	}
	c := o.DeepCopyObject().(*OldWebsite)
	w.ObjectMeta, w.Status = c.ObjectMeta, c.Status
	w.Spec = WebsiteSpec{Greeting: c.Spec.Text, Title: c.Spec.Title, Tier: c.Spec.Tier, Replicas: c.Spec.Replicas, MaxReplicas: c.Spec.MaxReplicas}
	return nil
}

// ConvertFrom makes a v1beta1 of a v1.
func (o *OldWebsite) ConvertFrom(hub conversion.Hub) error {
	w, ok := hub.(*Website)
	if !ok {
		return fmt.Errorf("convert from %T", hub)
	}
	c := w.DeepCopyObject().(*Website)
	o.ObjectMeta, o.Status = c.ObjectMeta, c.Status
	o.Spec = OldWebsiteSpec{Text: c.Spec.Greeting, Title: c.Spec.Title, Tier: c.Spec.Tier, Replicas: c.Spec.Replicas, MaxReplicas: c.Spec.MaxReplicas}
	return nil
}

// DeepCopyObject copies the object.
func (w *Website) DeepCopyObject() runtime.Object {
	c := *w
	c.ObjectMeta = *w.ObjectMeta.DeepCopy()
	c.Spec.Replicas, c.Spec.MaxReplicas = copied(w.Spec.Replicas), copied(w.Spec.MaxReplicas)
	c.Status = w.Status.copied()
	return &c
}

// DeepCopyObject copies the object.
func (o *OldWebsite) DeepCopyObject() runtime.Object {
	c := *o
	c.ObjectMeta = *o.ObjectMeta.DeepCopy()
	c.Spec.Replicas, c.Spec.MaxReplicas = copied(o.Spec.Replicas), copied(o.Spec.MaxReplicas)
	c.Status = o.Status.copied()
	return &c
}

// DeepCopyObject copies the list.
func (l *WebsiteList) DeepCopyObject() runtime.Object {
	c := *l
	c.ListMeta = *l.ListMeta.DeepCopy()
	c.Items = nil
	for i := range l.Items {
		c.Items = append(c.Items, *l.Items[i].DeepCopyObject().(*Website))
	}
	return &c
}

func (s WebsiteStatus) copied() WebsiteStatus {
	conditions := s.Conditions
	s.Conditions = nil
	for _, c := range conditions {
		s.Conditions = append(s.Conditions, *c.DeepCopy())
	}
	return s
}

func copied(n *int32) *int32 {
	if n == nil {
		return nil
	}
	c := *n
	return &c
}
