//go:build cluster && linux

package nodes_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/integration/nodes"
	"github.com/signet-ca/signet/internal/canary"
)

// Audiences of the trust domain that the manual installs.
const (
	workloadAudience = "signet:cluster.local"
	agentAudience    = "signet-agent:cluster.local"
)

// A thief owns a node: he speaks to the CA from there, with its agent's token and with whatever tokens he has.
type thief struct {
	s    *suite
	node string
	pid  int    // of something in the node's network
	ca   string // address

	certificate tls.Certificate // of its agent, as the CA gave it to him
	client      apiv1.AuthorityClient
	session     apiv1.Authority_SessionClient
}

// newThief is on one of our nodes and has nothing yet. He calls himself the agent of a node that may be another one.
func (s *suite) newThief(t *testing.T, from *nodes.Node, node string) *thief {
	t.Helper()
	address := s.Must(t, "get", "service", "-n", signetNamespace, "signet-ca", "-o", "jsonpath={.spec.clusterIP}")
	return &thief{s: s, node: node, pid: kubeletOf(t, from), ca: net.JoinHostPort(address, "8443")}
}

// kubeletOf is the process of kubelet on one of our nodes. There are no others here: processes have a namespace of ours.
func kubeletOf(t *testing.T, n *nodes.Node) int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		line, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(line), "\x00")
		if len(args) < 2 || args[1] != "kubelet" || !slices.Contains(args, "--hostname-override="+n.Name) {
			continue // or it is what starts it
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	t.Fatalf("%s has no kubelet", n.Name)
	return 0
}

// dial connects to an address from the thief's node, with a certificate where there is one. Who the CA is does not matter
// here: what counts is what it gives away.
func (f *thief) dial(t *testing.T, certificates ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///ca",
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certificates})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialIn(ctx, f.pid, f.ca) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func newRequest(t *testing.T) (certificate tls.Certificate, csr []byte) {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{PrivateKey: key}, csr
}

func evidence(token string) *apiv1.Evidence {
	return &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
}

// again calls f until it says something of the caller, and not that the CA or the API server cannot be asked just now.
func again(t *testing.T, f func() error) error {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		err := f()
		switch refused(err) {
		case api.DirectoryUnavailable, api.ReviewerUnavailable, api.ReviewerOverloaded, api.Overloaded, api.CAUnavailable, api.DeadlineExceeded:
		default:
			return err
		}
		if time.Now().After(end) {
			return err
		}
		select {
		case <-t.Context().Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// refused is the reason of a refusal; empty where there is none.
func refused(err error) api.Reason {
	if err == nil {
		return ""
	}
	return api.ReasonOf(err)
}

// attest asks for the SVID of an agent and keeps it.
func (f *thief) attest(t *testing.T, token string, certificates ...tls.Certificate) error {
	t.Helper()
	return again(t, func() error { return f.attestOnce(t, token, certificates...) })
}

func (f *thief) attestOnce(t *testing.T, token string, certificates ...tls.Certificate) error {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	certificate, csr := newRequest(t)
	resp, err := apiv1.NewAuthorityClient(f.dial(t, certificates...)).AttestAgent(ctx, &apiv1.AttestAgentRequest{Evidence: evidence(token), Csr: csr, Protocol: api.Protocol})
	if err != nil {
		return api.FromStatus(err)
	}
	certificate.Certificate = resp.GetChain()
	f.certificate = certificate
	return nil
}

// open opens a session by the SVID that he has, and with an agent's token.
func (f *thief) open(t *testing.T, token string) error {
	t.Helper()
	return again(t, func() error { return f.openOnce(t, token) })
}

func (f *thief) openOnce(t *testing.T, token string) error {
	client := apiv1.NewAuthorityClient(f.dial(t, f.certificate))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	patience := time.AfterFunc(time.Minute, cancel)
	defer patience.Stop()
	stream, err := client.Session(ctx)
	if err != nil {
		return api.FromStatus(err)
	}
	hello := &apiv1.Hello{Protocol: api.Protocol, Version: "thief", Evidence: evidence(token)}
	// An error of Send is told by Recv, with its reason.
	_ = stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}})
	if _, err := stream.Recv(); err != nil {
		return api.FromStatus(err)
	}
	f.client, f.session = client, stream
	return nil
}

// ended waits for the end of the session, and returns why.
func (f *thief) ended() error {
	for {
		if _, err := f.session.Recv(); err != nil {
			return api.FromStatus(err)
		}
	}
}

// enter makes him the agent of his node, in a session.
func (f *thief) enter(t *testing.T) {
	t.Helper()
	token := f.s.agentToken(t, f.node)
	if err := f.attest(t, token); err != nil {
		t.Fatal(err)
	}
	if err := f.open(t, token); err != nil {
		t.Fatal(err)
	}
}

// issue asks for the SVID that a token is for, for a volume, and returns it or why not.
func (f *thief) issue(t *testing.T, client apiv1.AuthorityClient, token, volume string) (certificate tls.Certificate, err error) {
	t.Helper()
	err = again(t, func() (err error) {
		certificate, err = issueOnce(t, client, token, volume)
		return err
	})
	return certificate, err
}

func issueOnce(t *testing.T, client apiv1.AuthorityClient, token, volume string) (tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	certificate, csr := newRequest(t)
	resp, err := client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Evidence: evidence(token), Csr: csr, Volume: volume}}})
	if err != nil {
		return tls.Certificate{}, api.FromStatus(err)
	}
	if len(resp.GetResults()) != 1 {
		t.Fatalf("%d results", len(resp.GetResults()))
	}
	if r := resp.GetResults()[0].GetRefusal(); r != nil {
		return tls.Certificate{}, api.E(api.Reason(r.GetReason()), "%s", r.GetMessage())
	}
	certificate.Certificate = resp.GetResults()[0].GetSvid().GetChain()
	return certificate, nil
}

// try asks with a token.
func (f *thief) try(t *testing.T, token string) error {
	t.Helper()
	_, err := f.issue(t, f.client, token, "stolen")
	return err
}

// until asks with a token until it is refused, for one of these reasons, and returns when it was for the first time.
func (f *thief) until(t *testing.T, token string, want ...api.Reason) time.Time {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		err := f.try(t, token)
		switch reason := refused(err); {
		case slices.Contains(want, reason):
			return time.Now()
		case reason != "":
			t.Errorf("%v, want %v", err, want)
			return time.Now()
		case time.Now().After(end):
			t.Errorf("after a minute: %v, want %v", err, want)
			return time.Now()
		}
		select {
		case <-t.Context().Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// uid is that of an object.
func (s *suite) uid(t *testing.T, args ...string) string {
	t.Helper()
	return s.Must(t, append([]string{"get", "-o", "jsonpath={.metadata.uid}"}, args...)...)
}

// bound has the API server issue a token bound to a pod, to whoever may: more are arguments of kubectl.
func (s *suite) bound(t *testing.T, namespace, pod string, audiences []string, more ...string) string {
	t.Helper()
	token, err := s.tryBound(t, namespace, pod, audiences, more...)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func (s *suite) tryBound(t *testing.T, namespace, pod string, audiences []string, more ...string) (string, error) {
	t.Helper()
	account := s.Must(t, "get", "pod", "-n", namespace, pod, "-o", "jsonpath={.spec.serviceAccountName}")
	args := []string{"create", "token", "-n", namespace, account, "--bound-object-kind=Pod", "--bound-object-name=" + pod, "--bound-object-uid=" + s.uid(t, "pod", "-n", namespace, pod)}
	for _, a := range audiences {
		args = append(args, "--audience="+a)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := s.Kubectl(ctx, "", append(args, more...)...)
	return strings.TrimSpace(out), err
}

// agentPod is the agent's pod on a node.
func (s *suite) agentPod(t *testing.T, node string) string {
	t.Helper()
	var name string
	nodes.Eventually(t, "an agent on "+node, func(ctx context.Context) error {
		var list struct {
			Items []struct {
				Metadata struct {
					Name              string
					DeletionTimestamp *time.Time
				}
			}
		}
		if err := s.Get(ctx, &list, "pod", "-n", signetNamespace, "-l", "app.kubernetes.io/name=signet-agent", "--field-selector=spec.nodeName="+node); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Metadata.DeletionTimestamp == nil {
				name = p.Metadata.Name
				return nil
			}
		}
		return errors.New("there is none")
	})
	return name
}

// agentToken is one of the agent of a node.
func (s *suite) agentToken(t *testing.T, node string) string {
	t.Helper()
	return s.bound(t, signetNamespace, s.agentPod(t, node), []string{agentAudience})
}

// vouches says whether the API server takes a token for good.
func (s *suite) vouches(t *testing.T, token string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ask, err := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": map[string]any{"token": token, "audiences": []string{workloadAudience}}})
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.Kubectl(ctx, string(ask), "create", "-f", "-", "-o", "jsonpath={.status.authenticated}")
	if err != nil {
		t.Fatal(err)
	}
	return out == "true"
}

// goes deletes a pod without waiting for it, and returns its deletion time.
func (s *suite) goes(t *testing.T, namespace, pod string, grace int) time.Time {
	t.Helper()
	s.Must(t, "delete", "pod", "-n", namespace, pod, "--wait=false", fmt.Sprint("--grace-period=", grace))
	at, err := time.Parse(time.RFC3339, s.Must(t, "get", "pod", "-n", namespace, pod, "-o", "jsonpath={.metadata.deletionTimestamp}"))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// halt stops a process until thaw, and with it nsenter(1), which does as its child.
func halt(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parent int
	_, after, _ := strings.Cut(string(stat), ") ")
	if _, err := fmt.Sscanf(after, "%1s %d", new(string), &parent); err != nil || parent <= 1 {
		t.Fatalf("the parent of %d: %d, %v", pid, parent, err)
	}
	for _, p := range []int{parent, pid} { // nsenter first: then it sees no stop of its child, which it would follow later
		if err := syscall.Kill(p, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	thaw = func() {
		for _, p := range []int{pid, parent} { // the child first, for the same reason
			_ = syscall.Kill(p, syscall.SIGCONT)
		}
	}
	t.Cleanup(thaw)
	return thaw
}

// cutOff checks that a refusal came soon enough after what it follows from. The bound is that of a machine that may do nothing
// for seconds; what it took is told.
func cutOff(t *testing.T, what string, since, refused time.Time) {
	t.Helper()
	took := max(0, refused.Sub(since)) // kubelet may have told of a pod's end before its deletion time
	figure(t, "%s: refused after %v", what, took.Round(10*time.Millisecond))
	if took > 5*time.Second+25*time.Second {
		t.Errorf("%s: refused after %v", what, took)
	}
}
