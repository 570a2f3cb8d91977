//go:build integration && envoy

package rotation

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/integration/envoytest"
	"github.com/signet-ca/signet/internal/envoy"
)

// proxy starts the Envoy of a workload that talks to peer, in or out.
func (w *world) proxy(a *agent, name, peer string, delta bool, in *envoy.Inbound, out *envoy.Outbound) *envoy.Envoy {
	w.t.Helper()
	_, token := w.workload(a, name)
	who := []spiffeid.ID{spiffeid.RequireFromPath(trustDomain, "/ns/shop/sa/"+peer)}
	if in != nil {
		in.Peers = who
	}
	if out != nil {
		out.Peers = who
	}
	e := envoytest.Run(w.t, envoy.Proxy{Name: name, SDS: envoy.SDS{Socket: a.socket(), TokenFile: token, Delta: delta}, Inbound: in, Outbound: out})
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	if _, err := e.Live(ctx); err != nil {
		w.t.Fatal(err)
	}
	return e
}

// TestEnvoyRefuses rotates while two Envoys speak mTLS, and a third one refuses each bundle, since its configuration takes it for a
// certificate of its own. That one is named with what it says, and passed over; of the others' connections, each made anew, none fails.
func TestEnvoyRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, short)
	backend := envoytest.Backend(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	payments := w.proxy(w.agents[0], "payments", "checkout", false, &envoy.Inbound{Backend: backend}, nil)
	door, err := payments.Listener(t.Context(), envoy.ListenerInbound)
	if err != nil {
		t.Fatal(err)
	}
	checkout := w.proxy(w.agents[1], "checkout", "payments", true, nil, &envoy.Outbound{Upstream: door, ConnectionPerRequest: true})
	front, err := checkout.Listener(t.Context(), envoy.ListenerOutbound)
	if err != nil {
		t.Fatal(err)
	}
	w.mistaken(w.agents[1], "mistaken")

	sent := 0
	get := func(ctx context.Context) error {
		sent++
		resp, body, err := envoytest.Get(ctx, "http://"+front.String()+"/")
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, body)
		}
		return err
	}
	load := func(what string, until func(*apiv1.Rotation) bool) {
		t.Helper()
		w.await(what, func(r *apiv1.Rotation) bool {
			if err := get(t.Context()); err != nil {
				t.Errorf("%s: request %d: %v", what, sent, err)
			}
			return t.Failed() || until(r)
		})
	}
	eventually(t, "checkout reaches payments", get)
	w.must(0, "rotate", "start", "--id=envoy", "--soak=1s", "--straggler=5s")
	words := ""
	load("the new root is active", func(r *apiv1.Rotation) bool {
		for _, g := range r.GetGates() {
			for _, b := range g.GetBlockers() {
				if b.GetName() == "pod/shop/mistaken" && b.GetNack() != "" {
					words = b.GetNack()
				}
			}
		}
		return newRootIs("active")(r)
	})
	if words == "" {
		t.Error("the Envoy that refuses was not named with its own words")
	}
	t.Logf("it says: %s", words)
	load("it is done", ended("envoy", "done"))
	t.Logf("%d connections, each with a handshake of its own", sent)
}

// mistaken starts an Envoy whose configuration asks for the bundle where a certificate and its key belong.
func (w *world) mistaken(a *agent, name string) {
	w.t.Helper()
	_, token := w.workload(a, name)
	text, err := envoy.Bootstrap(envoy.Proxy{Name: name, SDS: envoy.SDS{Socket: a.socket(), TokenFile: token}, Outbound: &envoy.Outbound{
		Peers: []spiffeid.ID{spiffeid.RequireFromPath(trustDomain, "/ns/shop/sa/payments")}, Upstream: envoytest.Backend(w.t, http.NotFoundHandler()),
	}})
	if err != nil {
		w.t.Fatal(err)
	}
	wrong := strings.Replace(string(text), "- name: default\n", "- name: ROOTCA\n", 1)
	if wrong == string(text) {
		w.t.Fatal("the bootstrap has changed")
	}
	file := filepath.Join(w.t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(file, []byte(wrong), 0o600); err != nil {
		w.t.Fatal(err)
	}
	e, err := envoy.Start(envoy.Command{Name: name, Path: envoytest.Binary(w.t), Args: []string{
		"-c", file, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(e.Kill)
	eventually(w.t, "it has refused the bundle", func(ctx context.Context) error {
		resp, err := w.admin.PlanRotation(ctx, &apiv1.PlanRotationRequest{})
		if err != nil {
			return err
		}
		for _, m := range resp.GetForecast().GetMissing() {
			if m.GetPod() == name && m.GetNack() != "" {
				return nil
			}
		}
		return fmt.Errorf("missing are %v", resp.GetForecast().GetMissing())
	})
}
