// Package app deploys applications: it reads their objects from files, has
// the cluster check all of them, applies them, waits until they are ready,
// shows them and removes them. It is a client of the Kubernetes API and
// nothing else, so that it works on any cluster.
//
// An application is a name in a namespace. Its objects carry the label
// tutti.dev/app and are listed in an inventory, a ConfigMap, which is written
// before anything else is, so that whatever was applied can be removed.
package app

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Application is a name and the objects that make it.
type Application struct {
	Name    string
	Objects []Object
	// Namespace is where objects go that name none, unless the person says
	// another; "" is the kubeconfig's.
	Namespace string
	// Source is where it was read, for people.
	Source string
}

// Object is one object as it was read.
type Object struct {
	*unstructured.Unstructured
	File string // where it was read, for messages
}

// String names the object as a person would: "Deployment web".
func (o Object) String() string { return o.GetKind() + " " + o.GetName() }

func (o Object) groupKind() schema.GroupKind { return o.GroupVersionKind().GroupKind() }

// errorf is an error about this object: file, object, then what is wrong.
func (o Object) errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", o.File, o, fmt.Errorf(format, args...))
}

// CleanName makes an application's name of any text: what a label's value and
// an object's name may contain, "" when nothing is left.
func CleanName(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		default:
			return '-'
		}
	}, s)
	s = strings.Trim(s, "-")
	// The inventory's name is this with a prefix; it must stay a label's value.
	if limit := validation.DNS1123LabelMaxLength - len(inventoryPrefix); len(s) > limit {
		s = strings.TrimRight(s[:limit], "-")
	}
	return s
}
