package api

import "time"

// Release is an application as it was deployed once: an immutable record, one
// object of kind Release in the application's namespace.
type Release struct {
	App    string `json:"app"`
	Number int    `json:"number"`
	// Created is when, Author who and Source from where it was deployed.
	Created time.Time `json:"created"`
	Author  string    `json:"author"`
	Source  string    `json:"source"`
	// Digest is of all objects: equal ones are equal releases.
	Digest string `json:"digest"`
	// Objects are those that were applied, JSON, compressed with gzip, without
	// what is in their Secrets: that is in a Secret of the release's own name.
	Objects []byte `json:"-"`

	State   ReleaseState `json:"state"`
	Message string       `json:"message,omitempty"` // why it is Failed
	// Images are the digests of what its tags meant then.
	Images map[string]string `json:"images,omitempty"`
}

// ReleaseState is where a release is in its life.
type ReleaseState string

const (
	// ReleaseDeploying is being deployed, or was when its deployer was killed.
	ReleaseDeploying ReleaseState = "Deploying"
	// ReleaseDeployed is what the application is now.
	ReleaseDeployed ReleaseState = "Deployed"
	// ReleaseReplaced was Deployed until a later one was.
	ReleaseReplaced ReleaseState = "Replaced"
	// ReleaseFailed did not get ready.
	ReleaseFailed ReleaseState = "Failed"
)

// Of the kind Release.
const (
	ReleaseVersion  = "v1alpha1"
	ReleaseKind     = "Release"
	ReleaseResource = "releases"
)
