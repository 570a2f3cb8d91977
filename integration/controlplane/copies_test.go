//go:build cluster

package controlplane_test

import (
	"context"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	seen "github.com/signet-ca/signet/ca/cluster"
)

// rotated is a CA that shows its bundle in a real cluster, and rotates its root.
type rotated struct {
	*trust
	admin apiv1.AdminClient
}

// adminOf connects to the admin service of a CA.
func adminOf(t *testing.T, c *ca.CA) apiv1.AdminClient {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := c.NewAdminServer(catest.AsUser(0))
	background(t, func(context.Context) error { server.Serve(l); return nil })
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return apiv1.NewAdminClient(conn)
}

func (r *rotated) status(t *testing.T) *apiv1.Rotation {
	t.Helper()
	resp, err := r.admin.RotationStatus(t.Context(), &apiv1.RotationStatusRequest{})
	if err != nil {
		t.Fatal(api.FromStatus(err))
	}
	return resp.GetRotation()
}

// found returns why who is not ready for the activation is not, by name, as status says it: those who stand in the way, or the others.
func (r *rotated) found(t *testing.T, blocking bool) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, g := range r.status(t).GetGates() {
		for _, b := range g.GetBlockers() {
			if g.GetDo() == "activate" && (b.GetPass() == "") == blocking {
				found[b.GetName()] = b.GetWhy()
			}
		}
	}
	return found
}

// active reports whether the root of an operation is active.
func (r *rotated) active(t *testing.T, id string) bool {
	t.Helper()
	return slices.ContainsFunc(r.status(t).GetAuthorities(), func(a *apiv1.RotationRoot) bool { return a.GetId() == id && a.GetState() == "active" })
}

func copyNamed(namespace string) string { return "configmap/" + namespace + "/" + seen.BundleConfigMap }

// TestRotationCopies rotates the root where the bundle cannot be copied to two namespaces of a real cluster, since one has a ConfigMap of
// that name that is somebody else's, and in the other the API server refuses it. Both are named as the reason to wait, and are passed
// over after the limit; of a namespace that ends nothing is said.
func TestRotationCopies(t *testing.T) {
	w := newTrust(t)
	for _, ns := range []string{"taken", "full", "ending"} {
		w.create(t, "/api/v1/namespaces", object{"metadata": object{"name": ns}})
	}
	w.create(t, "/api/v1/namespaces/taken/configmaps", object{"metadata": object{"name": seen.BundleConfigMap}, "data": object{"mine": "1"}})
	w.create(t, kinds["ValidatingAdmissionPolicy"], object{"metadata": object{"name": "full"}, "spec": object{
		"matchConstraints": object{"resourceRules": []object{{"apiGroups": []string{""}, "apiVersions": []string{"*"}, "operations": []string{"CREATE", "UPDATE"}, "resources": []string{"configmaps"}}}},
		"validations":      []object{{"expression": "request.namespace != 'full'", "message": "full", "reason": "Forbidden"}},
	}})
	w.create(t, kinds["ValidatingAdmissionPolicyBinding"], object{"metadata": object{"name": "full"}, "spec": object{"policyName": "full", "validationActions": []string{"Deny"}}})
	w.becomes(t, "the namespace is closed", func() bool {
		err := w.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/full/configmaps?dryRun=All", object{"metadata": object{"name": "x"}}, nil)
		return err != nil && strings.Contains(err.Error(), "full")
	})
	background(t, w.p.Run)
	s := catest.New(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Publisher = w.p }})
	s.WaitReady()
	r := &rotated{w, adminOf(t, s.CA())}
	w.label(t, "ending", true)
	w.label(t, "shop", true)
	w.becomes(t, "the first copies", func() bool { return w.holds(t, "shop", s.CA().Bundle()) && w.holds(t, "ending", s.CA().Bundle()) })
	for _, ns := range []string{"taken", "full"} {
		w.label(t, ns, true)
	}
	w.becomes(t, "both are seen to ask", func() bool {
		return w.metric(t, "signet_bundle_copies", "state", "foreign") == 1 && w.metric(t, "signet_bundle_copies", "state", "outdated") == 1
	})
	w.remove(t, "/api/v1/namespaces/ending") // nobody empties it here: it goes on ending

	const limit = 30 * time.Second
	begun, err := r.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "one", Reason: "test",
		Limits: &apiv1.RotationLimits{Soak: durationpb.New(time.Second), Straggler: durationpb.New(limit)}})
	if err != nil {
		t.Fatal(api.FromStatus(err))
	}
	fresh := begun.GetRotation().GetOperation().GetAuthority()
	var passed map[string]string
	w.becomes(t, "the two are all that is waited for", func() bool {
		found := r.found(t, true)
		passed = r.found(t, false)
		return len(found) == 2 && strings.Contains(found[copyNamed("taken")], "shows none so far; it cannot be written: BUNDLE_FOREIGN") &&
			strings.Contains(found[copyNamed("full")], "shows none so far; it cannot be written: PUBLISH_FORBIDDEN") || r.active(t, fresh)
	})
	if r.active(t, fresh) {
		t.Fatal("nobody was waited for")
	}
	for _, name := range []string{copyNamed(system), copyNamed("shop"), "clustertrustbundle/" + trustBundle} {
		if passed[name] == "" {
			t.Errorf("%s shows the bundle, and nobody says that it is not known who read it", name)
		}
	}
	if len(passed) != 3 {
		t.Errorf("named are %v", passed)
	}
	w.becomes(t, "the new root is active", func() bool { return r.active(t, fresh) })
	if took := r.status(t).GetNow().AsTime().Sub(begun.GetRotation().GetOperation().GetBegun().AsTime()); took < limit {
		t.Errorf("after %s, before the limit of %s", took, limit)
	}
	w.becomes(t, "every place that can be written shows what there is in the end", func() bool { // the old root may go at once
		b := s.CA().Bundle()
		return w.holds(t, "shop", b) && w.holds(t, system, b) && w.trusts(t, b)
	})
}
