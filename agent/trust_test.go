package agent_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/canary"
)

func pemOf(certs ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.Bytes()
}

// spiffe, B-01, B-04, B-05, B-06
func TestParseTrust(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString(domain)
	one, two := newRoot(t), newRoot(t)
	leafCert := sign(t, leaf(webID), one.inter, newKey(t).Public(), one.ikey)
	noSign := authority()
	noSign.KeyUsage = x509.KeyUsageDigitalSignature
	mute := sign(t, noSign, one.cert, newKey(t).Public(), one.key)
	x5c := func(certs ...*x509.Certificate) string {
		var all []string
		for _, c := range certs {
			all = append(all, `"`+base64.StdEncoding.EncodeToString(c.Raw)+`"`)
		}
		return "[" + strings.Join(all, ",") + "]"
	}
	key := func(use, kty, x5c string) string { return fmt.Sprintf(`{"use":%q,"kty":%q,"x5c":%s}`, use, kty, x5c) }
	doc := func(sequence string, keys ...string) string {
		return `{"keys":[` + strings.Join(keys, ",") + `],"spiffe_sequence":` + sequence + `,"spiffe_refresh_hint":300}`
	}
	good := key("x509-svid", "EC", x5c(one.cert))
	written := spiffebundle.New(td)
	written.AddX509Authority(one.cert)
	written.AddX509Authority(two.cert)
	written.SetSequenceNumber(2<<32 | 7)
	library, err := written.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, data string
		generation string  // of the bundle; empty: refused
		roots      []*root // of the bundle
	}{
		{"as go-spiffe writes it", string(library), "2.7", []*root{one, two}},
		{"PEM", string(pemOf(one.cert, two.cert)), "0.0", []*root{one, two}},
		{"PEM with a comment", "# roots\n" + string(pemOf(one.cert)), "0.0", []*root{one}},
		{"an unknown use", doc("4294967297", good, key("wit-svid", "EC", x5c(two.cert))), "1.1", []*root{one}},
		{"a JWT authority", doc("4294967297", good, `{"use":"jwt-svid","kty":"EC","kid":"x","crv":"P-256","x":"AA","y":"AA"}`), "1.1", []*root{one}},
		{"an unknown type of key", doc("4294967297", good, key("x509-svid", "AKP", x5c(two.cert))), "1.1", []*root{one}},
		{"no use", doc("4294967297", good, key("", "EC", x5c(two.cert))), "1.1", []*root{one}},
		{"no type of key", doc("4294967297", good, key("x509-svid", "", x5c(two.cert))), "1.1", []*root{one}},
		{"no certificate", doc("4294967297", good, key("x509-svid", "EC", "[]")), "1.1", []*root{one}},
		{"two certificates in one entry", doc("4294967297", key("x509-svid", "EC", x5c(one.cert, two.cert))), "1.1", []*root{one}},
		{"an entry that is no object", doc("4294967297", good, "7"), "1.1", []*root{one}},
		{"no sequence", `{"keys":[` + good + `]}`, "0.0", []*root{one}},

		{"nothing", "", "", nil},
		{"an empty object", "{}", "", nil},
		{"all revoked", doc("4294967297"), "", nil},
		{"nothing that is known", doc("4294967297", key("jwt-svid", "EC", x5c(one.cert))), "", nil},
		{"a list", "[" + good + "]", "", nil},
		{"cut off", doc("4294967297", good)[:200], "", nil},
		{"two documents", doc("4294967297", good) + doc("4294967297", good), "", nil},
		{"a sequence below zero", doc("-1", good), "", nil},
		{"a sequence that is no whole number", doc("1.5", good), "", nil},
		{"a certificate that does not parse", doc("4294967297", good, key("x509-svid", "EC", `["eA=="]`)), "", nil},
		{"a leaf", doc("4294967297", key("x509-svid", "EC", x5c(leafCert))), "", nil},
		{"an authority that may not sign", doc("4294967297", key("x509-svid", "EC", x5c(mute))), "", nil},
		{"PEM of a leaf", string(pemOf(one.cert, leafCert)), "", nil},
		{"PEM of a key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "", nil},
		{"65 roots", doc("1", slicesRepeat(good, 65)...), "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := agent.ParseTrust(td, []byte(tt.data))
			if tt.generation == "" {
				if err == nil {
					t.Fatalf("accepted with %d roots", len(got.Bundle.X509Authorities()))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var want []*x509.Certificate
			for _, r := range tt.roots {
				want = append(want, r.cert)
			}
			if got.Generation.String() != tt.generation || got.Hash != api.BundleHash(want) || len(got.Bundle.X509Authorities()) != len(want) {
				t.Errorf("generation %s with %d roots, want %s with %d", got.Generation, len(got.Bundle.X509Authorities()), tt.generation, len(want))
			}
			if got.Bundle.TrustDomain() != td {
				t.Errorf("of trust domain %s", got.Bundle.TrustDomain())
			}
		})
	}
}

func slicesRepeat(s string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = s
	}
	return all
}

func FuzzParseTrust(f *testing.F) {
	key, err := canary.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	c := sign(f, authority(), nil, key.Public(), key)
	f.Add(pemOf(c))
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":["` + base64.StdEncoding.EncodeToString(c.Raw) + `"]}],"spiffe_sequence":4294967297}`))
	f.Add([]byte(`{"keys":[]}`))
	td := spiffeid.RequireTrustDomainFromString(domain)
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := agent.ParseTrust(td, data)
		if err != nil {
			return
		}
		roots := got.Bundle.X509Authorities()
		if len(roots) == 0 || got.Hash != api.BundleHash(roots) {
			t.Errorf("%d roots", len(roots))
		}
		for _, r := range roots {
			if !r.IsCA {
				t.Error("a root that is no authority")
			}
		}
	})
}

// TestFirstTrust: of a bundle with a number to which no CA can have come nothing is believed, however an agent comes by it. Whoever held
// it would refuse every bundle that the CA has.
func TestFirstTrust(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString(domain)
	top := api.EpochAt(time.Now().AddDate(1, 0, 0)) + 1<<16
	for _, tt := range []struct {
		name string
		g    api.Generation
		want api.Reason // empty: it is taken
	}{
		{"without one", api.Generation{}, ""},
		{"the highest", api.Generation{Epoch: top, Number: 1}, ""},
		{"higher", api.Generation{Epoch: top + 2, Number: 1}, api.BundleRejected}, // an hour may be over by now
		{"the last", api.FromSequence(math.MaxUint64), api.BundleRejected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			first, err := agent.NewTrust(td, tt.g, []*x509.Certificate{newRoot(t).cert})
			if err != nil {
				t.Fatal(err)
			}
			cfg := agent.Config{TrustDomain: td, Dial: noDial, Prover: attestor.TokenFile{Path: "none"}, Verifier: attestor.ByKeySets, Trust: first}
			a, err := agent.New(cfg)
			if api.ReasonOf(err) != tt.want && !(err == nil && tt.want == "") {
				t.Fatalf("%v, want %q", err, tt.want)
			}
			if err == nil && a.Trust().Load() != first {
				t.Error("it holds another")
			}
		})
	}
}

func noDial(context.Context) (net.Conn, error) { return nil, errors.New("nobody is there") }
