package ca_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// TestOwnCertificate: the certificate by which agents know the CA is signed by its intermediate as theirs are, and holds up the removal
// of a root by nothing, for it is replaced with the intermediate: at no moment does the CA show one that the bundle does not verify.
func TestOwnCertificate(t *testing.T) {
	for _, emergency := range []bool{false, true} {
		t.Run(fmt.Sprint("emergency ", emergency), func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				d := newDrill(t, catest.Options{}, 0) // nothing but the CA's own is ever issued
				time.Sleep(40 * time.Minute)          // it is not the one that came with the intermediate, and has most of its hour left
				old := d.active()
				if _, root := shows(t, d.Server); root != old {
					t.Fatalf("the CA shows a certificate under %s, and %s is active", root, old)
				}
				began := time.Now()
				if emergency {
					if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "first", Compromised: old, Reason: "a drill"}); err != nil {
						t.Fatal(api.FromStatus(err))
					}
				} else {
					d.begin("first")
				}
				for gone := false; !gone; {
					gone = d.state(old) == "gone"
					before := d.CA().Bundle()
					leaf, root := shows(t, d.Server)
					roots := slices.Concat(before.Roots, d.CA().Bundle().Roots) // the step may be taken between the two
					if _, _, err := x509svid.Verify(leaf, x509bundle.FromX509Authorities(d.TD, roots)); err != nil {
						t.Fatalf("%s after the beginning the CA shows a certificate under %s: %v", time.Since(began), root, err)
					}
					if gone && root != d.active() {
						t.Errorf("once the old root is gone the CA shows a certificate under %s", root)
					}
					if took := time.Since(began); took > 30*time.Second {
						t.Fatalf("the old root is %s after %s, and nothing but the CA's own certificate is under it; in its way: %q", d.state(old), took, d.blockers())
					}
					time.Sleep(20 * time.Millisecond)
				}
				d.over("first", "done")
			})
		})
	}
}

// shows returns the certificates that a CA shows on the agents' port, and the id of the root above them.
func shows(t testing.TB, s *catest.Server) (chain []*x509.Certificate, root string) {
	t.Helper()
	raw, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true})
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	chain = conn.ConnectionState().PeerCertificates
	return chain, hexOf(chain[1].AuthorityKeyId)
}
