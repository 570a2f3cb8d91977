package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// maxNamed bounds how many things of one kind a check names one by one; the rest is counted.
const maxNamed = 10

// A checkup is one look at an installation.
type checkup struct {
	a       *app
	cluster *kube.Operator
	kf      *kubeFlags
	now     time.Time // by the API server's clock
	minor   int       // of Kubernetes 1.x; 0: not known
	report  *checkReport

	config configuration
	agents map[string]*kPod  // by node
	policy map[string]string // what PodSecurity enforces, by namespace; of namespaces that say it
	copies []string          // namespaces that want a copy of the bundle
	bundle map[string]string // data of the published one; nil: it could not be read
}

// checks are all that is looked at, in the order in which it is told: what a check finds the later ones use.
func (i *checkup) checks() []func(context.Context) {
	return []func(context.Context){
		i.checkNamespaces, i.readConfiguration, i.checkDriver, i.checkAuthority, i.checkState, i.checkService, i.checkAgents, i.checkNodes, i.checkUpgrade,
		i.checkBundle, i.checkCopies, i.checkTrustBundle, i.checkPermissions, i.checkOperators, i.checkUpstream, i.checkSharedSocket, i.checkPods,
	}
}

// checkOnce looks at everything once. The error is that the API server could not be asked at all.
func (a *app) checkOnce(ctx context.Context, cluster *kube.Operator, kf *kubeFlags) (*checkReport, error) {
	i := &checkup{a: a, cluster: cluster, kf: kf, report: &checkReport{
		header: newHeader("CheckList", ""), Result: resultGood, Server: cluster.Server(), Namespace: kf.namespace, Items: []*checkRow{},
	}}
	if err := i.checkServer(ctx); err != nil {
		return nil, err
	}
	if !i.checkInstalled(ctx) {
		return i.report, nil
	}
	for _, check := range i.checks() {
		check(ctx)
	}
	return i.report, nil
}

// add tells one thing.
func (i *checkup) add(check, result, object, found, do string) *checkRow {
	row := &checkRow{header: newHeader("Check", check), Result: result, Object: object, Found: clip(found, 2*maxFound), Do: i.a.asCalled(do)}
	i.report.Items = append(i.report.Items, row)
	i.report.Result = worst(i.report.Result, result)
	return row
}

func (i *checkup) good(check, object, format string, args ...any) {
	i.add(check, resultGood, object, fmt.Sprintf(format, args...), "")
}

// cannot tells that something could not be looked at, and why.
func (i *checkup) cannot(check, object, what string, err error) {
	if errors.Is(err, kube.ErrForbidden) {
		i.add(check, resultUnknown, object, "your user may not "+what, i.kf.kubectl("auth", "can-i", "--list")).settled = true
		return
	}
	i.add(check, resultUnknown, object, "the API server was asked to "+what+" in vain: "+brief(err), i.kf.signet("check"))
}

// namespaced is how an object is named in a row.
func namespaced(namespace, kind, name string) string { return namespace + "/" + kind + "/" + name }

// in is the path of something in a namespace; a name may come from an object.
func in(group, namespace, resource, name string) string {
	p := "/apis/" + group
	if strings.Count(group, "/") == 0 {
		p = "/api/" + group
	}
	if namespace != "" {
		p += "/namespaces/" + url.PathEscape(namespace)
	}
	p += "/" + resource
	if name != "" && name != "." && name != ".." {
		p += "/" + url.PathEscape(name)
	}
	return p
}

func (i *checkup) get(ctx context.Context, path string, into any) error {
	_, err := i.cluster.Read(ctx, path, into)
	return err
}

// The oldest version of Kubernetes whose tokens name the node of their pod (ServiceAccountTokenPodNodeInfo), and the one
// from which a CSI driver may have tokens apart from what is logged (CSIServiceAccountTokenSecrets); both on by default.
const (
	minorNodeClaim = 30
	minorSecrets   = 35
)

// Bounds of a clock's error. Certificates are backdated by 30 seconds.
const (
	skewWarning = 10 * time.Second
	skewBad     = time.Minute
)

// checkServer asks for the version, by which it also learns whether anything can be asked, and what time it is.
func (i *checkup) checkServer(ctx context.Context) error {
	var v struct {
		Major      string `json:"major"`
		Minor      string `json:"minor"`
		GitVersion string `json:"gitVersion"`
	}
	sent := i.a.now()
	date, err := i.cluster.Read(ctx, "/version", &v)
	answered := i.a.now()
	if err != nil {
		return i.a.unreachable(i.cluster, err)
	}
	name := clip(v.GitVersion, 64)
	if n, err := fmt.Sscanf(v.Minor, "%d", &i.minor); n != 1 || err != nil || v.Major != "1" {
		i.minor = 0
	}
	switch {
	case !i.cluster.Verified():
		i.add("api-server", resultWarning, "", "Kubernetes "+name+" answers, but nothing proves that it is your API server: the kubeconfig asks for no verified TLS",
			"add certificate-authority-data to the cluster in the kubeconfig, and remove insecure-skip-tls-verify")
	default:
		i.good("api-server", "", "Kubernetes %s answers", name)
	}
	switch {
	case i.minor == 0:
		i.add("version", resultUnknown, "", "the version "+name+" is of a form that is not known here", i.kf.kubectl("version")).settled = true
	case i.minor < minorNodeClaim:
		i.add("version", resultBad, "", fmt.Sprintf("tokens of Kubernetes %s do not name the node of their pod, so every request would be refused as %s", name, api.NodeUnverifiable),
			fmt.Sprintf("upgrade to Kubernetes 1.%d or later", minorNodeClaim)).settled = true
	case i.minor < minorSecrets:
		i.add("version", resultWarning, "", fmt.Sprintf("Kubernetes %s hands tokens to volume plugins only where others may log them (serviceAccountTokenInSecrets came with 1.%d)", name, minorSecrets),
			fmt.Sprintf("upgrade to Kubernetes 1.%d or later", minorSecrets)).settled = true
	default:
		i.good("version", "", "Kubernetes %s has all that is needed", name)
	}
	i.checkClock(sent, answered, date)
	return nil
}

// checkClock compares this machine's clock with that of the API server, which tells whole seconds.
func (i *checkup) checkClock(sent, answered, date time.Time) {
	if i.now = date; date.IsZero() {
		i.now = answered
		i.add("clock", resultUnknown, "", "the API server does not say what time it is", "timedatectl").settled = true
		return
	}
	skew := time.Duration(0) // what the time of the way and the cut-off second cannot explain
	switch {
	case date.After(answered):
		skew = date.Sub(answered)
	case date.Add(time.Second).Before(sent):
		skew = sent.Sub(date.Add(time.Second))
	}
	if skew <= skewWarning {
		i.good("clock", "", "this machine and the API server agree")
		return
	}
	result := resultWarning
	if skew > skewBad {
		result = resultBad
	}
	i.add("clock", result, "", fmt.Sprintf("this machine's clock and the API server's are %s apart; nodes whose clocks are apart refuse each other's certificates", skew.Round(time.Second)),
		"timedatectl   # here and on the nodes: which one is wrong, and is it synchronised?").settled = true
}

// checkInstalled tells whether there is anything to look at.
func (i *checkup) checkInstalled(ctx context.Context) bool {
	for _, path := range []string{
		in("apps/v1", i.kf.namespace, "statefulsets", caName), in("apps/v1", i.kf.namespace, "daemonsets", agentName),
		in("storage.k8s.io/v1", "", "csidrivers", driverName),
	} {
		if err := i.get(ctx, path, new(kObject)); !errors.Is(err, kube.ErrNotFound) {
			return true // or it cannot be told: then the checks say why
		}
	}
	i.add("installed", resultBad, "namespace/"+i.kf.namespace, "Signet is not installed here", "signet install | "+i.kf.kubectl("apply", "-f", "-"))
	return false
}

// checkNamespaces reads what namespaces say about themselves, and whether agents may run in ours.
func (i *checkup) checkNamespaces(ctx context.Context) {
	i.policy = map[string]string{}
	there := false
	err := kube.Each(ctx, i.cluster, in("v1", "", "namespaces", ""), nil, func(n kObject) error {
		if level := n.Metadata.Labels[labelEnforce]; level != "" {
			i.policy[n.Metadata.Name] = level
		}
		if n.Metadata.Labels[labelCopy] == "true" && n.Metadata.Name != i.kf.namespace && n.Metadata.DeletionTimestamp.IsZero() {
			i.copies = append(i.copies, n.Metadata.Name)
		}
		there = there || n.Metadata.Name == i.kf.namespace
		return nil
	})
	slices.Sort(i.copies)
	object := "namespace/" + i.kf.namespace
	switch level := i.policy[i.kf.namespace]; {
	case err != nil:
		i.policy = nil
		i.cannot("namespace", object, "list namespaces", err)
	case !there:
		i.add("namespace", resultBad, object, "there is no such namespace", "signet install | "+i.kf.kubectl("apply", "-f", "-"))
	case level != "" && level != "privileged":
		i.add("namespace", resultBad, object, "PodSecurity enforces "+clip(level, 32)+" here, so no agent may have its hostPath volumes",
			i.kf.kubectl("label", "namespace", i.kf.namespace, "--overwrite")+" "+labelEnforce+"=privileged")
	default:
		i.good("namespace", object, "PodSecurity lets agents run")
	}
}

// newestWarning returns what the newest warning about an object says; "" where there is none, or none may be read.
func (i *checkup) newestWarning(ctx context.Context, namespace, uid string) string {
	type event struct {
		Type          string    `json:"type"`
		Reason        string    `json:"reason"`
		Message       string    `json:"message"`
		LastTimestamp time.Time `json:"lastTimestamp"`
		EventTime     time.Time `json:"eventTime"`
		Metadata      kMeta     `json:"metadata"`
	}
	var newest event
	at := func(e event) time.Time {
		for _, t := range []time.Time{e.LastTimestamp, e.EventTime} {
			if !t.IsZero() {
				return t
			}
		}
		return e.Metadata.CreationTimestamp
	}
	query := url.Values{"fieldSelector": {"involvedObject.uid=" + uid}}
	err := kube.Each(ctx, i.cluster, in("v1", namespace, "events", ""), query, func(e event) error {
		if e.Type == "Warning" && (newest.Reason == "" || at(e).After(at(newest))) {
			newest = e
		}
		return nil
	})
	if err != nil || newest.Reason == "" {
		return ""
	}
	return clip(newest.Reason+": "+newest.Message, maxFound)
}
