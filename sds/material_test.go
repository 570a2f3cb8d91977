package sds

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// spiffe
// threat: D18, D19
func TestNewIdentityRefuses(t *testing.T) {
	a := newAuthority(t, td)
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	template := func(f func(*x509.Certificate)) func() *x509svid.SVID {
		return func() *x509svid.SVID { return a.svid(ownID, f) }
	}
	change := func(f func(*x509svid.SVID)) func() *x509svid.SVID {
		return func() *x509svid.SVID {
			s := a.svid(ownID)
			f(s)
			return s
		}
	}
	for _, tt := range []struct {
		name string
		svid func() *x509svid.SVID
	}{
		{"nil", func() *x509svid.SVID { return nil }},
		{"no certificate", change(func(s *x509svid.SVID) { s.Certificates = nil })},
		{"no key", change(func(s *x509svid.SVID) { s.PrivateKey = nil })},
		{"another's key", change(func(s *x509svid.SVID) { s.PrivateKey = newKey(t) })},
		{"key that stays in its device", change(func(s *x509svid.SVID) { s.PrivateKey = device{s.PrivateKey.(*ecdsa.PrivateKey)} })},
		{"another's ID", change(func(s *x509svid.SVID) { s.ID = spiffeid.RequireFromString(elseID) })},
		{"two URIs", template(func(c *x509.Certificate) { c.URIs = append(c.URIs, uri(elseID)) })},
		{"no URI", template(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"payments.prod"} })},
		{"no path", template(func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://" + td)} })},
		{"not spiffe", template(func(c *x509.Certificate) { c.URIs = []*url.URL{uri("https://" + td + "/x")} })},
		{"longer than an ID may be", func() *x509svid.SVID {
			return a.svid("spiffe://" + td + "/" + strings.Repeat("a", api.MaxIDBytes))
		}},
		{"an authority", template(func(c *x509.Certificate) { c.IsCA = true })},
		{"may sign certificates", template(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })},
		{"may not sign handshakes", template(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })},
		{"root in the chain", change(func(s *x509svid.SVID) { s.Certificates = append(s.Certificates, a.root) })},
		{"self-signed", func() *x509svid.SVID {
			key, tmpl := newKey(t), leafTemplate(ownID)
			tmpl.Subject.CommonName = "x"
			return &x509svid.SVID{ID: spiffeid.RequireFromString(ownID), PrivateKey: key,
				Certificates: []*x509.Certificate{a.sign(tmpl, nil, key.Public(), key)}}
		}},
		{"chain in the wrong order", change(func(s *x509svid.SVID) { slices.Reverse(s.Certificates) })},
		{"another's intermediate", change(func(s *x509svid.SVID) { s.Certificates[1] = newAuthority(t, td).inter })},
		{"a leaf in the chain", change(func(s *x509svid.SVID) { s.Certificates = append(s.Certificates, a.svid(elseID).Certificates[0]) })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewIdentity(tt.svid())
			if err == nil || api.ReasonOf(err) != api.SVIDRejected {
				t.Fatalf("error = %v, want %s", err, api.SVIDRejected)
			}
		})
	}
}

// device is a key that signs and cannot be exported.
type device struct{ key *ecdsa.PrivateKey }

func (d device) Public() crypto.PublicKey { return d.key.Public() }
func (d device) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return d.key.Sign(r, digest, o)
}

// spiffe: X-02
func TestIdentityEncoding(t *testing.T) {
	a := newAuthority(t, td)
	svid := a.svid(ownID, func(c *x509.Certificate) { c.DNSNames = []string{"payments.prod.svc"} })
	i, err := NewIdentity(svid)
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range map[string]*encoded{NameDefault: i.word, ownID: i.uri} {
		s := decode(t, e)
		if s.GetName() != name || e.resource.GetName() != name {
			t.Errorf("secret %q in resource %q, want both %q", s.GetName(), e.resource.GetName(), name)
		}
		back, err := x509svid.Parse(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), s.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
		if err != nil {
			t.Fatal(err)
		}
		if back.ID != svid.ID || len(back.Certificates) != 2 || !back.Certificates[0].Equal(svid.Certificates[0]) {
			t.Errorf("%s: the SVID did not survive", name)
		}
		if want := i.Serial() + "-" + e.digest; e.resource.GetVersion() != want {
			t.Errorf("version %q, want %q", e.resource.GetVersion(), want)
		}
	}
	again, err := NewIdentity(svid)
	if err != nil {
		t.Fatal(err)
	}
	if again.word.digest != i.word.digest {
		t.Error("one SVID has two digests")
	}
	svid.Certificates = svid.Certificates[:1]
	shorter, err := NewIdentity(svid)
	if err != nil {
		t.Fatal(err)
	}
	if shorter.word.digest == i.word.digest || shorter.Serial() != i.Serial() {
		t.Error("another chain for the same leaf must be another content of the same serial")
	}
}

// spiffe, B-04, B-08
// threat: D23
func TestNewTrustRefuses(t *testing.T) {
	a, b := newAuthority(t, td), newAuthority(t, "other.example")
	leaf := a.svid(ownID).Certificates[0]
	for _, tt := range []struct {
		name   string
		own    *x509bundle.Bundle
		others []*x509bundle.Bundle
	}{
		{"nil", nil, nil},
		{"D23: empty", x509bundle.New(a.td), nil},
		{"a leaf", a.bundle(leaf), nil},
		{"a leaf in another's", a.bundle(), []*x509bundle.Bundle{x509bundle.FromX509Authorities(b.td, []*x509.Certificate{leaf})}},
		{"own among others", a.bundle(), []*x509bundle.Bundle{a.bundle()}},
		{"another twice", a.bundle(), []*x509bundle.Bundle{b.bundle(), b.bundle()}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewTrust(tt.own, tt.others, 1)
			if err == nil || api.ReasonOf(err) != api.BundleRejected {
				t.Fatalf("error = %v, want %s", err, api.BundleRejected)
			}
		})
	}
}

// spiffe: B-04, B-08
func TestTrustEncoding(t *testing.T) {
	a, b := newAuthority(t, td), newAuthority(t, "other.example")
	empty := x509bundle.New(spiffeid.RequireTrustDomainFromString("revoked.example"))
	second := a.newRoot()
	generation := api.Generation{Epoch: 2, Number: 7}
	trust, err := NewTrust(a.bundle(second), []*x509bundle.Bundle{b.bundle(), empty}, generation.Sequence())
	if err != nil {
		t.Fatal(err)
	}
	roots := map[string][]*x509.Certificate{td: {a.root, second}, "other.example": {b.root}}
	for name, tt := range map[string]struct {
		e       *encoded
		domains []string
	}{
		NameRootCA:       {trust.word, []string{td}},
		"spiffe://" + td: {trust.uri, []string{td}},
		NameAll:          {trust.all, []string{td, "other.example"}},
	} {
		s := decode(t, tt.e)
		if s.GetName() != name {
			t.Errorf("secret %q, want %q", s.GetName(), name)
		}
		got := validator(t, s)
		if len(got) != len(tt.domains) {
			t.Errorf("%s: trust domains %v, want %v", name, got, tt.domains)
		}
		for _, d := range tt.domains {
			if !sameCerts(got[d], roots[d]) {
				t.Errorf("%s: roots of %s are not those of its bundle", name, d)
			}
		}
		if want := "2.7-" + tt.e.digest; tt.e.resource.GetVersion() != want {
			t.Errorf("%s: version %q, want %q", name, tt.e.resource.GetVersion(), want)
		}
	}
	if trust.Hash() != api.BundleHash([]*x509.Certificate{second, a.root}) || trust.Generation() != generation.Sequence() || trust.TrustDomain() != a.td {
		t.Error("hash, generation or trust domain are not those of the bundle")
	}
	reordered, err := NewTrust(x509bundle.FromX509Authorities(a.td, []*x509.Certificate{second, a.root}), []*x509bundle.Bundle{empty, b.bundle()}, 1)
	if err != nil {
		t.Fatal(err)
	}
	if reordered.all.digest != trust.all.digest || !bytes.Equal(reordered.all.resource.Resource.Value, trust.all.resource.Resource.Value) {
		t.Error("the order of roots or bundles changes what is sent")
	}
}

func decode(t testing.TB, e *encoded) *tls.Secret {
	t.Helper()
	s := &tls.Secret{}
	if err := proto.Unmarshal(e.resource.GetResource().GetValue(), s); err != nil {
		t.Fatal(err)
	}
	return s
}

// validator returns the roots by trust domain of a secret that must be a SPIFFE validator and nothing else.
func validator(t testing.TB, s *tls.Secret) map[string][]*x509.Certificate {
	t.Helper()
	ctx := s.GetValidationContext()
	custom := ctx.GetCustomValidatorConfig()
	if ctx.GetTrustedCa() != nil || custom.GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("%s: validator %q, want that of SPIFFE alone", s.GetName(), custom.GetName())
	}
	config := &tls.SPIFFECertValidatorConfig{}
	if err := custom.GetTypedConfig().UnmarshalTo(config); err != nil {
		t.Fatal(err)
	}
	domains := map[string][]*x509.Certificate{}
	for _, d := range config.GetTrustDomains() {
		rest := d.GetTrustBundle().GetInlineBytes()
		for {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			domains[d.GetName()] = append(domains[d.GetName()], c)
		}
		if len(domains[d.GetName()]) == 0 {
			t.Errorf("%s: trust domain %s without roots", s.GetName(), d.GetName())
		}
	}
	return domains
}

func sameCerts(a, b []*x509.Certificate) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(c *x509.Certificate) bool { return !slices.ContainsFunc(b, c.Equal) })
}

// Streams share what was encoded once: nothing is encoded per stream or per push.
func TestSharedEncoding(t *testing.T) {
	a := newAuthority(t, td)
	m := &Material{Identity: a.identity(ownID), Trust: a.trust(1)}
	var first []*encoded
	for range 3 {
		s := newSession(m.Identity.ID())
		if _, err := s.handle(ask{whole: true, subscribe: []string{NameDefault, NameRootCA, NameAll}}); err != nil {
			t.Fatal(err)
		}
		r, err := s.next(m, time.Now())
		if err != nil || len(r.secrets) != 3 {
			t.Fatalf("next: %v, %v", r, err)
		}
		if first == nil {
			first = r.secrets
		}
		resp, dresp := sotw.encode(r), delta.encode(r)
		for i, e := range first {
			if &resp.Resources[i].Value[0] != &e.resource.Resource.Value[0] || dresp.Resources[i] != e.resource {
				t.Errorf("%s was encoded again", e.resource.Name)
			}
		}
	}
}
