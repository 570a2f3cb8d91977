//go:build cluster && linux

package nodes_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/integration/nodes"
)

// SVIDs live for an hour, and are renewed at 30 to 50 % of it.
const (
	// awayToken is the life of kubelet's tokens in these tests: shorter than that of SVIDs, so that no token is good any more
	// while an SVID lives that was there before.
	awayToken = 45 * time.Minute
	tokenOver = awayToken + time.Minute
)

// later has so much time pass for everybody at once: clocks go forward, as if the machine under all of them had slept. Timers
// do not: who waits has to look at the clock by himself. Set are the clocks of all that runs; what is started afterwards, a
// container for instance, has the old time.
func (s *suite) later(t *testing.T, d time.Duration) {
	t.Helper()
	s.ahead += d
	all, err := s.Everybody()
	if err != nil {
		t.Fatal(err)
	}
	nodes.SetClocks(t, s.ahead, all...)
}

// shortLived installs Signet with the lifetimes of these tests, or changes what is installed.
func (s *suite) shortLived(t *testing.T, grace string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), s.signet, "install", "--image-repository="+s.Registry).Output()
	if err != nil {
		t.Fatalf("signet install: %v", err)
	}
	text := string(out)
	for _, change := range [][2]string{
		{"expirationSeconds: 3600\n", fmt.Sprintf("expirationSeconds: %d\n", int(awayToken.Seconds()))}, // not the CA's own
		{"      kind: kube\n", "      kind: kube\n      grace: " + grace + "\n"},
		{`signet.dev/config-sha256: "`, `signet.dev/config-sha256: "` + grace + "-"},
	} {
		if !strings.Contains(text, change[0]) {
			t.Fatalf("the manifests have no %q", change[0])
		}
		text = strings.ReplaceAll(text, change[0], change[1])
	}
	s.Apply(t, text)
	s.Must(t, "rollout", "status", "-n", signetNamespace, "statefulset/signet-ca", "--timeout=3m")
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
}

// inside runs the operator's tool on the CA's node, at the CA's own socket: it needs no API server.
func (s *suite) inside(t *testing.T, args ...string) (string, error) {
	t.Helper()
	socket := filepath.Join("/proc", strconv.Itoa(s.caProcess(t)), "root/run/signet-ca/admin.sock")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, s.signet, append([]string{"--socket=" + socket}, args...)...).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return string(out), err
}

// A decision is what the ledger says of one, as far as these tests ask.
type decision struct {
	Type, Namespace, Pod, SPIFFEID, Node, Reason, Detail, Caller string
	Grace                                                        bool
	Time, Last                                                   time.Time // of a refusal that came several times, the first and the last
}

// after reports whether a decision was made since then, perhaps again.
func (d decision) after(t time.Time) bool { return d.Time.After(t) || d.Last.After(t) }

// decisions are those on record for which a question has yes as its answer.
func (s *suite) decisions(t *testing.T, wanted func(decision) bool) ([]decision, error) {
	t.Helper()
	out, err := s.inside(t, "audit", "--all", "--since=1h", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []decision }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("%w: %.200s", err, out)
	}
	var found []decision
	for _, d := range list.Items {
		if wanted(d) {
			found = append(found, d)
		}
	}
	return found, nil
}

// onLedger waits until there are so many decisions of a kind, and returns them.
func (s *suite) onLedger(t *testing.T, what string, n int, wanted func(decision) bool) []decision {
	t.Helper()
	var found []decision
	nodes.Eventually(t, what, func(context.Context) (err error) {
		if found, err = s.decisions(t, wanted); err == nil && len(found) < n {
			err = fmt.Errorf("%d of %d are on record", len(found), n)
		}
		return err
	})
	return found
}

// renewedByTicket are the marked renewals of a pod since a time.
func renewedByTicket(pod string, since time.Time) func(decision) bool {
	return func(d decision) bool { return d.Grace && d.Pod == pod && d.Type == "issue" && d.after(since) }
}

// now is the time by the clocks of the cluster.
func (s *suite) now() time.Time { return time.Now().Add(s.ahead) }

// metric is one of the CA's or an agent's, by its whole name with labels, at the address of its metrics.
func metric(ctx context.Context, address, name string) (float64, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + `(?:\{[^}]*\})? (\S+)$`).FindStringSubmatch(string(text))
	if m == nil {
		return 0, fmt.Errorf("there is no %s", name)
	}
	return strconv.ParseFloat(m[1], 64)
}

// address is that of the metrics of the CA's pod, or of the agent's on a node.
func (s *suite) address(t *testing.T, what string) string {
	t.Helper()
	args, port := []string{"pod", "signet-ca-0", "-o", "jsonpath={.status.podIP}"}, "9080"
	if what != "" {
		args, port = []string{"pods", "-l", "app.kubernetes.io/name=signet-agent", "--field-selector", "spec.nodeName=" + what, "-o", "jsonpath={.items[0].status.podIP}"}, "9081"
	}
	return s.Must(t, append([]string{"get", "-n", signetNamespace}, args...)...) + ":" + port
}

// untilMetric waits until a metric is what it should be.
func untilMetric(t *testing.T, address, name string, good func(float64) bool) {
	t.Helper()
	nodes.Eventually(t, name, func(ctx context.Context) error {
		v, err := metric(ctx, address, name)
		if err == nil && !good(v) {
			err = fmt.Errorf("it is %v", v)
		}
		return err
	})
}

const clusterAway = "signet_ca_cluster_away_seconds"

func some(v float64) bool { return v > 0 }
func none(v float64) bool { return v == 0 }

// restarted kills a process of a container, and waits until another has taken its place: kubelet needs no API server for it.
func (s *suite) restarted(t *testing.T, n *nodes.Node, program string) {
	t.Helper()
	was, err := n.Processes(program)
	if err != nil || len(was) != 1 {
		t.Fatalf("processes of %s: %v, %v", program, was, err)
	}
	if err := syscall.Kill(was[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	nodes.Eventually(t, program+" runs again", func(context.Context) error {
		is, err := n.Processes(program)
		if err == nil && (len(is) != 1 || is[0] == was[0]) {
			err = errors.New("not yet")
		}
		return err
	})
}

// without cuts the CA off from the API server, and nobody else, until the function that it returns is called.
func (s *suite) without(t *testing.T) (back func()) {
	t.Helper()
	n, ca := s.Nodes[0], s.Must(t, "get", "pod", "-n", signetNamespace, "signet-ca-0", "-o", "jsonpath={.status.podIP}")
	apiServer, err := url.Parse(s.Control.URL)
	if err != nil {
		t.Fatal(err)
	}
	host, port := apiServer.Hostname(), apiServer.Port() // and not more of that machine: the tests ask the CA from there
	run := func(ctx context.Context, args ...string) {
		t.Helper()
		if out, err := n.Command(ctx, append([]string{"nft"}, args...)...).CombinedOutput(); err != nil {
			t.Errorf("nft %v: %v: %s", args, err, out)
		}
	}
	run(t.Context(), "add table ip e2e; add chain ip e2e cut { type filter hook forward priority -10; }; "+
		"add rule ip e2e cut ip saddr "+ca+" ip daddr "+host+" tcp dport "+port+" drop; add rule ip e2e cut ip saddr "+host+" tcp sport "+port+" ip daddr "+ca+" drop")
	var over bool
	back = func() {
		if !over {
			over = true
			run(context.Background(), "delete table ip e2e")
		}
	}
	t.Cleanup(back)
	return back
}

// away is the last of all: clocks go forward, and what is started afterwards would not know.
func (s *suite) away(t *testing.T) {
	s.Own(t)
	if os.Getenv(longVariable) == "" {
		t.Skip("`make e2e E2E_LONG=1` takes the API server away for longer than tokens live, which takes six minutes")
	}
	(&upgrader{suite: s, domain: "cluster.local"}).begin(t)
	for _, n := range s.Nodes { // agents remember the root that was there before
		n.Crash()
	}
	for _, n := range s.Nodes {
		n.Boot(t)
	}
	s.shortLived(t, "0s")
	s.namespace(t, "outage")
	for name, node := range map[string]string{"one": "node1", "two": "node2", "gone": "node2"} {
		s.Apply(t, pod{namespace: "outage", name: name, node: node, args: `["watch"]`}.json(s))
	}
	s.Wait(t, "pod", "-n", "outage", "--all", "--for=condition=Ready")
	for _, name := range []string{"one", "two", "gone"} {
		s.served(t, "outage", name)
	}
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"NoGrace", s.noGrace},
		{"CAAlone", s.caAlone},
		{"Outage", s.outage},
	} {
		if !t.Run(part.name, part.run) {
			return
		}
	}
}

// caAlone: the CA is cut off from the API server, which goes on. A pod that comes meanwhile waits.
func (s *suite) caAlone(t *testing.T) {
	ca := s.address(t, "")
	back := s.without(t)
	untilMetric(t, ca, clusterAway, some)
	s.Apply(t, pod{namespace: "outage", name: "waits", node: "node2", args: `["watch"]`}.json(s))
	s.agentSays(t, s.Nodes[1], `identity not renewed.*"(DIRECTORY|REVIEWER)_UNAVAILABLE".*outage/waits`)
	back()
	returned := time.Now()
	s.served(t, "outage", "waits")
	figure(t, "the CA alone was cut off: a pod that waited has its SVID %v after the return", time.Since(returned).Round(100*time.Millisecond))
	untilMetric(t, ca, clusterAway, none)
}

// outage: the API server is away for longer than tokens live. Who was known when it went is renewed with marks, over restarts
// of the CA and of an agent, and on a machine that slept meanwhile; who was deleted before is not, nor is what runs on a node
// that is banned.
func (s *suite) outage(t *testing.T) {
	two := s.Nodes[1]
	ca, agents := s.address(t, ""), []string{s.address(t, "node1"), s.address(t, "node2")}
	f := s.newThief(t, two, "node2")
	f.enter(t)
	token := s.bound(t, "outage", "gone", []string{workloadAudience})
	if err := f.try(t, token); err != nil {
		t.Fatal(err)
	}
	thaw := halt(t, kubeletOf(t, two)) // so that the pod goes on running
	s.goes(t, "outage", "gone", 1)
	f.until(t, token, api.PodDeleted)

	cut := s.now()
	if err := s.Control.Pause(); err != nil {
		t.Fatal(err)
	}
	resume := func() { _ = s.Control.Resume() }
	t.Cleanup(resume)
	untilMetric(t, ca, clusterAway, some)
	s.restarted(t, s.Nodes[0], "signet-ca")
	s.restarted(t, s.Nodes[0], "signet-agent")
	untilMetric(t, ca, clusterAway, some)
	for _, agent := range agents {
		untilMetric(t, agent, "signet_agent_connected", some)
	}

	// One of the two machines sleeps meanwhile.
	wake := two.Freeze(t)
	s.later(t, tokenOver)
	wake()
	passed := time.Now()
	for _, name := range []string{"one", "two"} {
		for _, d := range s.onLedger(t, name+" is renewed by its ticket", 1, renewedByTicket(name, cut)) {
			if !strings.Contains(d.Detail, "the token expired") {
				t.Errorf("%s was renewed on a token that was good: %q", name, d.Detail)
			}
		}
	}
	figure(t, "no API server for longer than tokens live: known pods are renewed %v after the machine woke", time.Since(passed).Round(100*time.Millisecond))
	s.onLedger(t, "agents are renewed by their tickets", 2, func(d decision) bool { return d.Grace && d.Type == "attest-agent" && d.after(cut) })
	s.onLedger(t, "the pod that was deleted before is refused", 1, func(d decision) bool {
		return d.Pod == "gone" && d.Reason == string(api.PodDeleted) && d.after(cut.Add(tokenOver))
	})
	if left, err := s.decisions(t, renewedByTicket("gone", cut)); err != nil || len(left) > 0 {
		t.Errorf("the pod that was deleted before was renewed: %+v, %v", left, err)
	}

	asked := s.now()
	if out, err := s.inside(t, "node", "ban", "node2", "--reason=outage", "--yes"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	banned := s.now()
	untilMetric(t, agents[1], "signet_agent_banned", some)
	s.later(t, tokenOver)
	s.onLedger(t, "one is renewed by its ticket again", 1, renewedByTicket("one", banned))
	s.onLedger(t, "the banned node is refused", 1, func(d decision) bool { return d.Reason == string(api.NodeBanned) && d.after(asked) })
	untilMetric(t, agents[0], "signet_agent_expired_total", none)
	if left, err := s.decisions(t, func(d decision) bool { return d.Type == "issue" && d.Node == "node2" && d.after(banned) }); err != nil || len(left) > 0 {
		t.Errorf("issued on a banned node: %+v, %v", left, err)
	}
	if out, err := s.inside(t, "node", "allow", "node2", "--reason=known", "--yes"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	resume()
	returned := time.Now()
	untilMetric(t, ca, clusterAway, none)
	thaw()
	figure(t, "the CA sees the cluster %v after the API server's return", time.Since(returned).Round(100*time.Millisecond))
	s.Apply(t, pod{namespace: "outage", name: "fresh", node: "node1", args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "outage", "fresh", "--for=condition=Ready")
	s.served(t, "outage", "fresh")
	figure(t, "a new pod has its SVID %v after the API server's return", time.Since(returned).Round(100*time.Millisecond))
	s.served(t, "outage", "two")
}

// held is an SVID of a thief, with what came with it.
type held struct {
	certificate tls.Certificate
	ticket      []byte
}

// renew asks for an SVID with a token and, where one is held that has a ticket, with that as well.
func (f *thief) renew(t *testing.T, token string, h held) (held, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	certificate, csr := newRequest(t)
	item := &apiv1.IssueItem{Evidence: evidence(token), Csr: csr, Volume: "stolen"}
	if h.ticket != nil {
		digest := api.RenewalDigest(h.ticket, csr)
		possession, err := h.certificate.PrivateKey.(crypto.Signer).Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		item.Renewal = &apiv1.Renewal{Ticket: h.ticket, Chain: h.certificate.Certificate, Possession: possession}
	}
	resp, err := f.client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	if err != nil {
		return held{}, api.FromStatus(err)
	}
	if len(resp.GetResults()) != 1 {
		t.Fatalf("%d results", len(resp.GetResults()))
	}
	if r := resp.GetResults()[0].GetRefusal(); r != nil {
		return held{}, api.E(api.Reason(r.GetReason()), "%s", r.GetMessage())
	}
	got := resp.GetResults()[0].GetSvid()
	certificate.Certificate = got.GetChain()
	return held{certificate, got.GetTicket()}, nil
}

// noGrace: with a grace of 0 nothing is renewed while the API server is away, whatever is shown.
func (s *suite) noGrace(t *testing.T) {
	f := s.newThief(t, s.Nodes[1], "node2")
	ca := s.address(t, "")
	token := s.bound(t, "outage", "two", []string{workloadAudience})
	f.enter(t)
	var h held
	if err := again(t, func() (err error) { h, err = f.renew(t, token, held{}); return err }); err != nil {
		t.Fatal(err)
	}
	if err := s.Control.Pause(); err != nil {
		t.Fatal(err)
	}
	resume := sync.OnceFunc(func() { _ = s.Control.Resume() })
	t.Cleanup(resume)
	untilMetric(t, ca, "signet_watch_age_seconds", func(v float64) bool { return v > 25 }) // which is more than it takes to be away
	for what, shown := range map[string]held{"with a ticket": h, "without": {}} {
		if _, err := f.renew(t, token, shown); !slices.Contains([]api.Reason{api.DirectoryUnavailable, api.ReviewerUnavailable}, refused(err)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	resume()
	if err := again(t, func() error { _, err := f.renew(t, token, held{}); return err }); err != nil {
		t.Errorf("after the return: %v", err)
	}
	text := s.Must(t, "get", "configmap", "-n", signetNamespace, "signet-ca", "-o", `jsonpath={.data.ca\.yaml}`)
	s.configure(t, strings.Replace(text, "grace: 0s", "grace: 4h", 1))
}
