package app

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"
)

func notFound(err error) bool { return apierrors.IsNotFound(err) }

var (
	// typedPatch is how server-side apply begins its complaints.
	typedPatch = regexp.MustCompile(`^failed to create typed patch object \([^)]*\): (?:errors: )?`)
	undeclared = regexp.MustCompile(`\.?([^\s:]+): field not declared in schema`)
	cannot     = regexp.MustCompile(`^\S+ in version "[^"]*" cannot be handled as a \S+: (?:strict decoding error: )?`)
	wrongType  = regexp.MustCompile(`, got &(?:value\.valueUnstructured)?\{(?:Value:)?(.*?)\}`)
	// grammar is how a rule that has been told in words ends.
	grammar   = regexp.MustCompile(` \(e\.g\. '[^)]*regex used for validation is '[^']*'\)`)
	invalid   = regexp.MustCompile(`^\S+ "[^"]*" is invalid: `)
	duplicate = regexp.MustCompile(`\s+`)
)

// plain is what the server said, in one line, without what the reader knows.
func plain(err error) string {
	text := err.Error()
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		text = status.Status().Message
	}
	text = typedPatch.ReplaceAllString(text, "")
	text = cannot.ReplaceAllString(text, "")
	text = invalid.ReplaceAllString(text, "")
	text = grammar.ReplaceAllString(text, "")
	text = undeclared.ReplaceAllString(text, `unknown field "$1"`)
	text = wrongType.ReplaceAllString(text, ", got $1")
	return strings.TrimSpace(duplicate.ReplaceAllString(text, " "))
}

// explain turns the server's refusal of an object into an error that names
// file, object, what is wrong and, where there is one, the cure.
func explain(o Object, err error) error {
	text := plain(err)
	if strings.Contains(text, "unknown field") {
		text += fmt.Sprintf(" (`tutti kubectl explain %s` lists the fields)", strings.ToLower(o.GetKind()))
	}
	if utilnet.IsConnectionRefused(err) {
		return err
	}
	return o.errorf("%s", text)
}
