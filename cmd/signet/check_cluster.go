package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// The names that an installation has; the chart gives them.
const (
	defaultNamespace = "signet-system"
	driverName       = "csi.signet.dev"
	caName           = "signet-ca"    // of StatefulSet, Service, ConfigMap and ServiceAccount
	agentName        = "signet-agent" // of DaemonSet, ConfigMap and ServiceAccount
	bundleName       = "signet-bundle"

	operatorsNamespace = "signet-operators" // of the ServiceAccounts of people
	operatorsPort      = 8444               // in the CA's pod
	labelName          = "app.kubernetes.io/name"
	labelPartOf        = "app.kubernetes.io/part-of"
	labelCopy          = "signet.dev/bundle"                                  // of a namespace that wants a copy of the bundle
	labelProfile       = "security.openshift.io/csi-ephemeral-volume-profile" // of a CSIDriver
	labelEnforce       = "pod-security.kubernetes.io/enforce"                 // of a namespace
	volumeYAML         = "csi: {driver: csi.signet.dev, readOnly: true}"
)

// A kubeFlags says which cluster a command means, with kubectl's flags.
type kubeFlags struct{ kubeconfig, context, namespace string }

func (k *kubeFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&k.kubeconfig, "kubeconfig", "", "`PATH` of the kubeconfig (default as kubectl: $KUBECONFIG, then ~/.kube/config)")
	c.Flags().StringVar(&k.context, "context", "", "`NAME` of a context of the kubeconfig (default its current one)")
	c.Flags().StringVarP(&k.namespace, "namespace", "n", defaultNamespace, "`NAMESPACE` that Signet is installed in")
	c.MarkFlagFilename("kubeconfig")
}

// namespaceShape is what the API server lets a namespace be called: the value goes into paths and into lines to type.
var namespaceShape = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// openCluster prepares a client of the cluster that k means. The caller closes it.
func (a *app) openCluster(k *kubeFlags) (*kube.Operator, error) {
	if !namespaceShape.MatchString(k.namespace) {
		return nil, usageError{fmt.Errorf("%q is not the name of a namespace", k.namespace)}
	}
	cluster, err := kube.OpenOperator(kube.OperatorConfig{
		Kubeconfig: k.kubeconfig, Context: k.context, UserAgent: "signet/" + cmp.Or(a.clientVersion().Version, "devel"), Timeout: a.timeout,
	})
	if err != nil {
		return nil, &failure{
			err:  api.Wrap(api.ClusterUnavailable, err, "no cluster is known: "+err.Error()),
			why:  "Which cluster is meant is read from the kubeconfig, as kubectl does.",
			next: "kubectl config get-contexts",
		}
	}
	return cluster, nil
}

// unreachable says that nothing could be asked of the API server.
func (a *app) unreachable(cluster *kube.Operator, err error) error {
	f := &failure{next: "kubectl cluster-info"}
	switch {
	case errors.Is(err, context.DeadlineExceeded), os.IsTimeout(err):
		f.err = api.Wrap(api.ClusterUnavailable, err, "the API server at "+cluster.Server()+" did not answer within "+a.timeout.String())
	default:
		f.err = api.Wrap(api.ClusterUnavailable, err, "the API server at "+cluster.Server()+" cannot be asked: "+brief(err))
	}
	return f
}

// brief is an error without the URL that the HTTP client puts before it.
func brief(err error) string {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	return clip(err.Error(), maxFound)
}

// maxFound bounds, in bytes, what is repeated of foreign text.
const maxFound = 400

func clip(s string, n int) string {
	s = strings.TrimSpace(s)
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// safeWord is what goes into a line to type; names of the cluster are such words, and anything else is somebody's trick.
var safeWord = regexp.MustCompile(`^[A-Za-z0-9/][A-Za-z0-9.,:_/=@-]*$`)

// ourFlags are the flags in lines to type; what else begins with a dash is somebody's trick as well.
var ourFlags = regexp.MustCompile(`^(-[nAlcof]|-|--(all-containers|list|previous|overwrite|wait|yes|delete-state|pods-only))$`)

// kubectl is a line to type that means the same cluster.
func (k *kubeFlags) kubectl(words ...string) string { return k.line("kubectl", words...) }

// signet is a line to type that means the same installation.
func (k *kubeFlags) signet(command string, words ...string) string {
	line := k.line("signet "+command, words...)
	if k.namespace != defaultNamespace {
		line += " -n " + k.namespace
	}
	return line
}

func (k *kubeFlags) line(command string, words ...string) string {
	line := []string{command}
	if k.kubeconfig != "" {
		line = append(line, "--kubeconfig", quoted(k.kubeconfig))
	}
	if k.context != "" {
		line = append(line, "--context", quoted(k.context))
	}
	for _, w := range words {
		if !safeWord.MatchString(w) && !ourFlags.MatchString(w) {
			w = "NAME"
		}
		line = append(line, w)
	}
	return strings.Join(line, " ")
}

// quoted protects a word that the user gave from the shell.
func quoted(s string) string {
	if safeWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// What is read of objects: everything else is dropped while it is read.
type kMeta struct {
	Namespace         string            `json:"namespace"`
	Name              string            `json:"name"`
	UID               string            `json:"uid"`
	Labels            map[string]string `json:"labels"`
	Annotations       map[string]string `json:"annotations"`
	Generation        int64             `json:"generation"`
	CreationTimestamp time.Time         `json:"creationTimestamp"`
	DeletionTimestamp time.Time         `json:"deletionTimestamp"` // when it should be gone; zero while it may stay
	OwnerReferences   []kOwner          `json:"ownerReferences"`
}

type kOwner struct {
	Kind       string `json:"kind"`
	Name       string `json:"name"`
	Controller bool   `json:"controller"`
}

type kObject struct {
	Metadata kMeta `json:"metadata"`
}

type kCondition struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
}

type kPod struct {
	Metadata kMeta `json:"metadata"`
	Spec     struct {
		NodeName string `json:"nodeName"`
		Volumes  []struct {
			Name string `json:"name"`
			CSI  *struct {
				Driver   string `json:"driver"`
				ReadOnly bool   `json:"readOnly"`
			} `json:"csi"`
		} `json:"volumes"`
	} `json:"spec"`
	Status struct {
		Phase      string       `json:"phase"`
		Reason     string       `json:"reason"`
		Message    string       `json:"message"`
		Conditions []kCondition `json:"conditions"`
		Inits      []kContainer `json:"initContainerStatuses"`
		Containers []kContainer `json:"containerStatuses"`
	} `json:"status"`
}

type kContainer struct {
	Name         string    `json:"name"`
	Ready        bool      `json:"ready"`
	RestartCount int       `json:"restartCount"`
	State        kRunState `json:"state"`
	LastState    kRunState `json:"lastState"`
}

type kRunState struct {
	Waiting *struct {
		Reason  string `json:"reason"`
		Message string `json:"message"`
	} `json:"waiting"`
	Running *struct {
		StartedAt time.Time `json:"startedAt"`
	} `json:"running"`
	Terminated *kTerminated `json:"terminated"`
}

type kTerminated struct {
	ExitCode   int       `json:"exitCode"`
	Signal     int       `json:"signal"`
	Reason     string    `json:"reason"`
	Message    string    `json:"message"`
	FinishedAt time.Time `json:"finishedAt"`
}

// condition returns the condition of that type.
func (p *kPod) condition(kind string) (kCondition, bool) {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c, true
		}
	}
	return kCondition{}, false
}

func (p *kPod) ready() bool {
	c, ok := p.condition("Ready")
	return ok && c.Status == "True" && p.Metadata.DeletionTimestamp.IsZero()
}

// volume says whether the pod has a volume of the driver, and whether each is read-only, as the agent wants it.
func (p *kPod) volume(driver string) (has, readOnly bool) {
	readOnly = true
	for _, v := range p.Spec.Volumes {
		if v.CSI != nil && v.CSI.Driver == driver {
			has, readOnly = true, readOnly && v.CSI.ReadOnly
		}
	}
	return has, readOnly
}

// controller is what made the pod, where that is known: "Deployment web".
func (p *kPod) controller() string {
	for _, o := range p.Metadata.OwnerReferences {
		if !o.Controller {
			continue
		}
		if hash := p.Metadata.Labels["pod-template-hash"]; o.Kind == "ReplicaSet" && hash != "" {
			if name, ok := strings.CutSuffix(o.Name, "-"+hash); ok {
				return "deployment/" + name
			}
		}
		return strings.ToLower(o.Kind) + "/" + o.Name
	}
	return ""
}
