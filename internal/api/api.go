// Package api holds the words that tutti shares with the world: the names it
// gives to objects, its version, the layout of the data directory and the
// language of the control socket. It imports nothing but the standard
// library, so that every room may use it.
package api

// Version of tutti and the commit it was built from; set by the linker.
var (
	Version = "dev"
	Commit  = ""
)

// Names that tutti gives to objects.
const (
	// Group is the API group of what tutti adds.
	Group = "tutti.dev"
	// FieldManager owns the fields that tutti applies.
	FieldManager = "tutti"
	// LabelApp marks each object, and each pod, of an application that tutti
	// deployed; its value is the application's name.
	LabelApp = "tutti.dev/app"
	// LabelInventory marks the ConfigMap that lists an application's objects.
	LabelInventory = "tutti.dev/inventory"
	// LabelPartOf is the recommended Kubernetes label for the application that
	// an object belongs to; it names an application before its folder does.
	LabelPartOf = "app.kubernetes.io/part-of"
	// LabelVersion is the recommended Kubernetes label for what version of
	// itself an object is.
	LabelVersion = "app.kubernetes.io/version"
	// AnnotationAfter on a workload lists what must be how far before it is
	// made or changed: "Deployment/db=ready,Job/migrate=ready".
	AnnotationAfter = "app.tutti.dev/after"
	// AnnotationHostIP on a Service of type LoadBalancer is the one address of
	// the machine that its ports are on.
	AnnotationHostIP = "tutti.dev/host-ip"
	// AnnotationKeepName on a ConfigMap or Secret, "true", keeps its name as it
	// was written, because others look it up.
	AnnotationKeepName = "tutti.dev/keep-name"
	// AnnotationProbePeriod is a probe's period below a second.
	AnnotationProbePeriod = "probes.tutti.dev/period"
	// LabelInstance groups what another deployer (Helm, for one) installed.
	LabelInstance = "app.kubernetes.io/instance"
)

// How far AnnotationAfter waits: until a pod has been started, or until what
// their kind calls ready, complete for a Job.
const (
	AfterStarted = "started"
	AfterReady   = "ready"
)

// MachineIP is what a machine's pods know it by, on every machine.
const MachineIP = "10.41.0.1"

// EnvDataDir is the environment variable that stands for --data-dir.
const EnvDataDir = "TUTTI_DATA_DIR"

// DefaultDataDir is where everything of a machine is kept.
const DefaultDataDir = "/var/lib/tutti"

// RegistryGroup is the API group by which roles speak of the registry. Its one
// resource is virtual: nothing is stored in the API.
const (
	RegistryGroup    = "registry.tutti.dev"
	RegistryResource = "repositories"
	// MirrorResource is for other registries whose images are mirrored; it is
	// of no namespace.
	MirrorResource = "mirrors"
)

// NoRegistry as a port means that there is no registry.
const NoRegistry = -1

// NoMirrors as mirrors means that there are none.
const NoMirrors = "none"

// Settings are what a machine is told once and keeps: they are written to
// DataDir.Config at the first start. Empty fields mean the defaults.
type Settings struct {
	// Address is where the API listens for other machines: an address of this
	// machine, or 0.0.0.0. Without it the API is for this machine alone.
	Address string `json:"address,omitempty"`
	// Port of the API.
	Port int `json:"port,omitempty"`
	// RegistryPort is where images are served, next to the API's addresses;
	// NoRegistry turns that off.
	RegistryPort int `json:"registryPort,omitempty"`
	// Mirrors are other registries whose images the registry fetches and
	// keeps: HOST or HOST=URL, separated by commas; NoMirrors turns that off.
	Mirrors string `json:"mirrors,omitempty"`
	// EvictionHard is what to keep free on the machine before pods are evicted,
	// as a kubelet's flag of that name has it: memory.available<100Mi,…
	EvictionHard string `json:"evictionHard,omitempty"`
	// SystemReserved is what is kept from all pods together for the machine
	// itself, as a kubelet's flag of that name has it: memory=1Gi,cpu=500m,…
	SystemReserved string `json:"systemReserved,omitempty"`
	// NodeName is how the cluster calls this machine.
	NodeName string `json:"nodeName,omitempty"`
	// ClusterCIDR and ServiceCIDR are where pods and Services get addresses.
	ClusterCIDR string `json:"clusterCIDR,omitempty"`
	ServiceCIDR string `json:"serviceCIDR,omitempty"`
	// UnsafeSysctls are the kernel's settings that pods may change for
	// themselves beside the safe ones, separated by commas: net.core.*
	UnsafeSysctls string `json:"unsafeSysctls,omitempty"`
	// Agent is a machine without a control plane: it has joined the cluster of
	// another.
	Agent bool `json:"agent,omitempty"`
}
