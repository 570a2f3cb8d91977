//go:build integration

package pods

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
)

// state is what is kept of pods for the agent's next start: its cache, and beside that its volumes with their tokens.
func (w *world) state() (cached, remembered []string) {
	w.t.Helper()
	cached, _ = filepath.Glob(filepath.Join(w.dir, "cache", "pod-*"))
	remembered, _ = filepath.Glob(filepath.Join(w.dir, "cache", "volumes", "*"))
	return cached, remembered
}

func wantRefused(t *testing.T, err error, want api.Reason) {
	t.Helper()
	if got := api.ReasonOf(api.FromStatus(err)); err == nil || got != want {
		t.Errorf("kubelet is answered with %v, want %s", err, want)
	}
}

// A pod gets its own identity on its own socket, as any user, without showing anything; when it is gone, so is everything.
//
// spiffe
func TestSocketOfAPod(t *testing.T) {
	w := newWorld(t)
	w.startCA()
	w.awaitBundle()
	w.startAgent()
	w.awaitGet("/readyz", "ok")
	one := volume{w.pod("shop", "web-1", "web"), "signet"}
	two := volume{w.pod("shop", "web-2", "web"), "signet"}
	for _, v := range []volume{one, two} {
		if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil {
			t.Fatal(err)
		}
	}
	first, second := w.read(one), w.read(two)
	if first.Serial == second.Serial {
		t.Error("two pods of one ServiceAccount were given one SVID")
	}
	t.Logf("the first read took %s", first.Took)
	if got := w.sds(one); got != first.Serial {
		t.Errorf("over SDS the pod has %s, over the Workload API %s", got, first.Serial)
	}

	// A second volume of one pod is the same identity, with the same token; the first may go without harm.
	other := volume{one.Pod, "another"}
	token := w.token(one.Pod, "")
	for _, v := range []volume{one, other} {
		if err := w.kubelet.publish(v, token); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.read(other); got.Serial != first.Serial {
		t.Error("the second volume of a pod is another identity")
	}
	watch := w.watch(one)
	watch.next(t)
	w.awaitGet("/metrics", `signet_workloadapi_streams{call="FetchX509SVID"} 1`, "signet_agent_svids 2", "signet_agent_volumes 3",
		"signet_agent_kubelet_registered 1", "signet_agent_first_svid_duration_seconds_count 2")
	if err := w.kubelet.unpublish(one); err != nil {
		t.Fatal(err)
	}
	// Who still listens is told to use it no more (SPIFFE Workload API section 5.2.1).
	select {
	case err := <-watch.errors:
		if status.Code(err) != codes.PermissionDenied || api.ReasonOf(api.FromStatus(err)) != api.PodDeleted {
			t.Errorf("the stream ended with %v", err)
		}
	case <-time.After(patience):
		t.Error("the stream of a volume that is gone goes on")
	}
	if got := w.read(other); got.Serial != first.Serial {
		t.Error("the pod lost its identity with one of two volumes")
	}
	cached, remembered := w.state()
	if len(cached) != 2 || len(remembered) != 2 {
		t.Errorf("kept are %v and %v", cached, remembered)
	}
	for _, v := range []volume{other, two} {
		if err := w.kubelet.unpublish(v); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(w.kubelet.parent(v)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("of %s there is left: %v", v.Name, err)
		}
	}
	if cached, remembered := w.state(); len(cached) != 0 || len(remembered) != 0 {
		t.Errorf("left are %v and %v", cached, remembered)
	}
	w.awaitGet("/metrics", "signet_agent_svids 0", "signet_agent_volumes 0")
}

// awaitBundle waits until the CA has published its bundle.
func (w *world) awaitBundle() {
	w.t.Helper()
	eventually(w.t, "the bundle", func() error {
		_, err := os.Stat(filepath.Join(w.dir, "bundle", "bundle.json"))
		return err
	})
}

// A token that the pod's author supplies, and one that is not of this very pod, gets a volume nothing.
func TestTokensOfOthers(t *testing.T) {
	w := newWorld(t)
	w.startCA()
	w.awaitBundle()
	w.startAgent()
	w.awaitGet("/readyz", "ok")
	victim, thief := w.pod("shop", "vault-0", "vault"), w.pod("shop", "web-1", "web")
	v := volume{thief, "signet"}
	stolen, own := w.token(victim, ""), w.token(thief, "")
	named := func(token string) string {
		return fmt.Sprintf(`{%q:{"token":%q,"expirationTimestamp":"2040-01-02T15:04:05Z"}}`, audience, token)
	}
	elsewhere := thief
	elsewhere.NodeName, elsewhere.NodeUID = "node-2", "node-2-uid"
	for _, tt := range []struct {
		name   string
		token  string
		change func(*csipb.NodePublishVolumeRequest)
		want   api.Reason
	}{
		{"beside kubelet's, as an attribute", own, func(r *csipb.NodePublishVolumeRequest) { r.VolumeContext[tokens] = named(stolen) }, api.VolumeRefused},
		{"his own, as an attribute", own, func(r *csipb.NodePublishVolumeRequest) { r.VolumeContext[tokens] = named(own); r.Secrets = nil }, api.VolumeRefused},
		{"beside kubelet's, as a secret", own, func(r *csipb.NodePublishVolumeRequest) { r.Secrets["token"] = stolen }, api.VolumeRefused},
		{"another pod's", stolen, nil, api.PodMismatch},
		{"of another node", w.token(elsewhere, ""), nil, api.NodeMismatch},
		{"for another audience", w.token(thief, "vault"), nil, api.TokenAudience},
		{"unsigned", "eyJhbGciOiJub25lIn0" + own[strings.Index(own, "."):], nil, api.TokenSignature},
		{"no token", "password", nil, api.TokenMalformed},
	} {
		change := func(r *csipb.NodePublishVolumeRequest) {
			if tt.change != nil {
				tt.change(r)
			}
		}
		t.Run(tt.name, func(t *testing.T) { wantRefused(t, w.kubelet.publish(v, tt.token, change), tt.want) })
	}
	if cached, remembered := w.state(); len(cached)+len(remembered) != 0 {
		t.Errorf("kept are %v and %v", cached, remembered)
	}
	if _, err := os.Lstat(w.kubelet.target(v)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a folder: %v", err)
	}
	// The volume itself is none the worse for it. A token that nobody signed gets a socket, and the CA's answer behind it.
	if err := w.kubelet.publish(v, own[:strings.LastIndex(own, ".")+1]+stolen[strings.LastIndex(stolen, ".")+1:]); err != nil {
		t.Fatal(err)
	}
	w.awaitGet("/metrics", `signet_agent_renewals_total{result="failed"}`, "signet_agent_svids 0")
	if err := w.kubelet.publish(v, own); err != nil {
		t.Fatal(err)
	}
	w.read(v)
}

// The agent is killed while the CA is away: the next one serves what that one held at once, and lets new pods wait.
//
// threat: D16
func TestAgentKilledWhileTheCAIsAway(t *testing.T) {
	w := newWorld(t)
	w.startCA()
	w.awaitBundle()
	w.startAgent()
	v := volume{w.pod("shop", "web-1", "web"), "signet"}
	if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil {
		t.Fatal(err)
	}
	before := w.read(v)
	w.stopCA()
	w.agent.signal(syscall.SIGKILL)

	began := time.Now()
	w.agent = w.start("signet-agent", "agent.yaml")
	after := w.read(v) // before kubelet has noticed
	took := time.Since(began)
	if after.Serial != before.Serial {
		t.Errorf("the pod has another SVID, though there is no CA: %s", after.Serial)
	}
	if got := w.sds(v); got != before.Serial {
		t.Errorf("over SDS it has %s", got)
	}
	t.Logf("served again %s after the start, of which the read took %s", took, after.Took)
	if took > 30*time.Second {
		t.Errorf("served again after %s", took)
	}
	w.kubelet.register()
	w.awaitGet("/readyz", "ok") // it holds an identity

	late := volume{w.pod("shop", "web-2", "web"), "signet"}
	began = time.Now()
	if err := w.kubelet.publish(late, w.token(late.Pod, "")); err != nil {
		t.Fatal(err)
	}
	t.Logf("without a CA a volume is published in %s", time.Since(began))
	watch := w.watch(late)
	if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil { // kubelet brings the next token
		t.Fatal(err)
	}
	select {
	case <-watch.contexts:
		t.Error("a new pod was given an identity, though there is no CA")
	case err := <-watch.errors:
		t.Errorf("a new pod does not wait: %v", err)
	default:
	}
	w.startCA()
	if svid, _ := watch.next(t); svid.ID.String() != "spiffe://example.org/ns/shop/sa/web" {
		t.Errorf("the new pod is %s", svid.ID)
	}
	if got := w.read(v); got.ID != before.ID {
		t.Errorf("the old one is %s", got.ID)
	}
}

// An agent that starts before its CA lives, says what is missing, and takes volumes; all is well when the CA comes.
func TestAgentBeforeTheCA(t *testing.T) {
	w := newWorld(t)
	w.startCA() // once, for its bundle
	w.awaitBundle()
	w.stopCA()
	w.agent = w.start("signet-agent", "agent.yaml")
	w.awaitGet("/readyz", "not ready: there is no session with the CA and no identity is held", "connection refused", "CA_UNAVAILABLE",
		"not ready: kubelet has not registered the volume plugin")
	w.kubelet.register()
	v := volume{w.pod("shop", "web-1", "web"), "signet"}
	if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil {
		t.Fatal(err)
	}
	watch := w.watch(v)
	if got, err := w.get("/readyz"); err != nil || strings.Contains(got, "kubelet") || !strings.Contains(got, "session") {
		t.Errorf("missing are %q, %v", got, err)
	}
	w.startCA()
	watch.next(t)
	w.awaitGet("/readyz", "ok")
}

// The node was switched off: the tmpfs is empty, and the sockets are files that nobody listens on. kubelet asks again for each
// volume, and the pods get their identities anew.
func TestNodeRebooted(t *testing.T) {
	w := newWorld(t)
	w.startCA()
	w.awaitBundle()
	w.startAgent()
	v := volume{w.pod("shop", "web-1", "web"), "signet"}
	if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil {
		t.Fatal(err)
	}
	before := w.read(v)
	w.agent.signal(syscall.SIGKILL)
	if err := os.RemoveAll(filepath.Join(w.dir, "cache")); err != nil {
		t.Fatal(err)
	}
	w.startAgent()
	if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil {
		t.Fatal(err)
	}
	if after := w.read(v); after.Serial == before.Serial {
		t.Error("the SVID is the one from before, which was only in memory")
	}
	if err := w.kubelet.unpublish(v); err != nil {
		t.Fatal(err)
	}
}
