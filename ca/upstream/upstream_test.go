package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// setups says for each driver how a test opens it. A driver without one fails TestConformance: nothing is linked into the
// CA that was not seen to mint.
var setups = map[string]func(t *testing.T) (Config, Parts){
	"selfsigned": func(t *testing.T) (Config, Parts) {
		return Config{Kind: "selfsigned"}, Parts{Sealer: newSealer(t)}
	},
}

// TestConformance holds every driver to what ca.Upstream and ca.Founder promise, as the CA checks it.
//
// spiffe
func TestConformance(t *testing.T) {
	for kind := range setups {
		if !slices.Contains(Kinds(), kind) {
			t.Errorf("there is a setup for %q, which is no driver", kind)
		}
	}
	for _, kind := range Kinds() {
		t.Run(kind, func(t *testing.T) {
			setup, ok := setups[kind]
			if !ok {
				t.Fatalf("driver %q has no setup: add one, so that it is tested", kind)
			}
			c, p := setup(t)
			up := open(t, c, p)
			f, ok := up.(ca.Founder)
			if !ok {
				t.Skip("the driver's roots are made elsewhere") // its setup must bring a root once there is such a driver
			}
			root, cert := found(t, f, td)
			if other, _ := found(t, f, td); other.ID == root.ID || bytes.Equal(other.Certificate, root.Certificate) {
				t.Error("two roots are the same")
			}
			for _, exclude := range []bool{false, true} {
				mintAndSign(t, up, root, cert, exclude)
			}
			t.Run("canceled", func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				if chain, err := up.Mint(ctx, request(t, root)); err == nil && len(chain) == 0 { // either will do, but it comes
					t.Error("neither an intermediate nor an error")
				}
			})
		})
	}
}

// mintAndSign has up sign an intermediate, checks it as the CA does, and issues a leaf below it.
func mintAndSign(t *testing.T, up ca.Upstream, root journal.Authority, cert *x509.Certificate, exclude bool) {
	t.Helper()
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	r := ca.MintRequest{TrustDomain: td, Root: root, PublicKey: key.Public(), NotAfter: now.Add(48 * time.Hour), ExcludeNames: exclude}
	chain, err := up.Mint(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	roots := []*x509.Certificate{cert}
	checked, err := issuance.CheckIntermediate(issuance.IntermediateCheck{
		TrustDomain: td, PublicKey: key.Public(), Chain: chain, Roots: roots, MinLifetime: 47 * time.Hour,
	}, now)
	if err != nil {
		t.Fatalf("the CA would refuse the intermediate: %v", err)
	}
	if checked.NotAfter.After(r.NotAfter) {
		t.Errorf("the intermediate lives until %s, longer than was asked for (%s)", checked.NotAfter, r.NotAfter)
	}
	if slices.Contains(checked.Warnings, issuance.WarnNames) == exclude {
		t.Errorf("with ExcludeNames %t the warnings are %v", exclude, checked.Warnings)
	}
	issuer, err := issuance.NewIssuer(td, checked.Chain, checked.Root, key)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
	prepared, err := issuance.Prepare(issuance.Profile{}, issuance.Request{ID: id, PublicKey: publicKey(t)}, issuer, now)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := prepared.Sign()
	if err != nil {
		t.Fatal(err)
	}
	if err := issuance.Verify(append([]*x509.Certificate{issued.Leaf}, checked.Chain...), roots, id, now); err != nil {
		t.Errorf("a leaf below the intermediate does not verify: %v", err)
	}
}

func TestOpen(t *testing.T) {
	sealer := newSealer(t)
	tests := []struct {
		name   string
		config Config
		parts  Parts
		want   api.Reason // empty: it opens
	}{
		{"default", Config{}, Parts{sealer}, ""},
		{"shortest", Config{Kind: "selfsigned", TTL: 24 * time.Hour}, Parts{sealer}, ""},
		{"P-384", Config{Key: "ecdsa-p384"}, Parts{sealer}, ""},
		{"unknown kind", Config{Kind: "vault?"}, Parts{sealer}, api.ConfigInvalid},
		{"kind in capitals", Config{Kind: "Selfsigned"}, Parts{sealer}, api.ConfigInvalid},
		{"short ttl", Config{TTL: 24*time.Hour - 1}, Parts{sealer}, api.ConfigInvalid},
		{"negative ttl", Config{TTL: -time.Hour}, Parts{sealer}, api.ConfigInvalid},
		{"unknown key", Config{Key: "dsa-1024"}, Parts{sealer}, api.ConfigInvalid},
		{"key that not every verifier knows", Config{Key: "ed25519"}, Parts{sealer}, api.ConfigInvalid},
		{"no seal key", Config{}, Parts{}, api.SealKeyMissing},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			up, err := Open(tt.config, tt.parts)
			switch {
			case tt.want == "" && (err != nil || up == nil):
				t.Errorf("Open = %v, %v", up, err)
			case tt.want != "" && (api.ReasonOf(err) != tt.want || up != nil):
				t.Errorf("Open = %v, %v; want %s", up, err, tt.want)
			}
		})
	}
}

func TestRegisterTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a second driver of the same name was taken")
		}
	}()
	Register("selfsigned", openSelfsigned)
}

func TestRootFollowsConfig(t *testing.T) {
	tests := []struct {
		config Config
		ttl    time.Duration
		key    string
	}{
		{Config{}, 87600 * time.Hour, "ECDSA P-256"},
		{Config{TTL: 24 * time.Hour, Key: "ecdsa-p384"}, 24 * time.Hour, "ECDSA P-384"},
	}
	for _, tt := range tests {
		t.Run(tt.key, func(t *testing.T) {
			now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
			a, err := open(t, tt.config, Parts{newSealer(t)}).(ca.Founder).Found(t.Context(), td, now)
			if err != nil {
				t.Fatal(err)
			}
			cert := parse(t, a)
			if got := cert.NotAfter.Sub(now); got != tt.ttl {
				t.Errorf("the root lives for %s, want %s", got, tt.ttl)
			}
			if got := issuance.KeyName(cert.PublicKey); got != tt.key {
				t.Errorf("the root has a key of %s, want %s", got, tt.key)
			}
		})
	}
}

// TestSealed is the reason of the driver's shape: a key is opened by its seal key, for its authority, of its trust domain,
// and by nothing else. What does not open never leads to a new root.
//
// spiffe: ID-09
func TestSealed(t *testing.T) {
	sealer := newSealer(t)
	up := open(t, Config{}, Parts{sealer})
	root, _ := found(t, up.(ca.Founder), td)
	another, _ := found(t, up.(ca.Founder), td)
	otherTD := spiffeid.RequireTrustDomainFromString("example.com")

	tests := []struct {
		name   string
		up     ca.Upstream
		change func(r *ca.MintRequest)
		want   api.Reason
	}{
		{"another seal key", open(t, Config{}, Parts{newSealer(t)}), func(*ca.MintRequest) {}, api.SealKeyWrong},
		{"sealed key of another authority", up, func(r *ca.MintRequest) { r.Root.SealedKey = another.SealedKey }, api.SealKeyWrong},
		{"certificate and key under another id", up, func(r *ca.MintRequest) { r.Root.ID = another.ID }, api.SealKeyWrong},
		{"certificate of another authority", up, func(r *ca.MintRequest) { r.Root.Certificate = another.Certificate }, api.UpstreamRefused},
		{"another trust domain", up, func(r *ca.MintRequest) { r.TrustDomain = otherTD }, api.SealKeyWrong},
		{"changed", up, func(r *ca.MintRequest) { r.Root.SealedKey[len(r.Root.SealedKey)-1] ^= 1 }, api.SealKeyWrong},
		{"changed nonce", up, func(r *ca.MintRequest) { r.Root.SealedKey[1] ^= 1 }, api.SealKeyWrong},
		{"cut", up, func(r *ca.MintRequest) { r.Root.SealedKey = r.Root.SealedKey[:8] }, api.SealKeyWrong},
		{"none", up, func(r *ca.MintRequest) { r.Root.SealedKey = nil }, api.StateCorrupt},
		{"of a later format", up, func(r *ca.MintRequest) { r.Root.SealedKey[0] = 2 }, api.StateCorrupt},
		{"no key inside", up, func(r *ca.MintRequest) {
			r.Root.SealedKey = sealer.Seal([]byte("nothing"), sealContext(td, root.ID))
		}, api.StateCorrupt},
		{"a key inside that cannot sign", up, func(r *ca.MintRequest) {
			r.Root.SealedKey = sealer.Seal(exchangeKey(t), sealContext(td, root.ID))
		}, api.StateCorrupt},
		{"no certificate", up, func(r *ca.MintRequest) { r.Root.Certificate = []byte{0x30} }, api.StateCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := request(t, root)
			r.Root.SealedKey = bytes.Clone(root.SealedKey)
			tt.change(&r)
			chain, err := tt.up.Mint(t.Context(), r)
			if api.ReasonOf(err) != tt.want || chain != nil {
				t.Errorf("Mint = %d certificates, %v; want %s", len(chain), err, tt.want)
			}
		})
	}
	if _, err := up.Mint(t.Context(), request(t, root)); err != nil {
		t.Errorf("the untouched root no longer mints: %v", err)
	}
}

// TestNeverInClear searches the stored record for the root's private key in every form in which it could lie there.
func TestNeverInClear(t *testing.T) {
	sealer := newSealer(t)
	root, _ := found(t, open(t, Config{}, Parts{sealer}).(ca.Founder), td)
	j, err := journal.New(td, root)
	if err != nil {
		t.Fatal(err)
	}
	record, err := j.Encode()
	if err != nil {
		t.Fatal(err)
	}
	der, err := sealer.Open(root.SealedKey, sealContext(td, root.ID))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	key := parsed.(*ecdsa.PrivateKey)
	if !key.PublicKey.Equal(parse(t, root).PublicKey) {
		t.Fatal("what is sealed is not the root's key, so the search below would prove nothing")
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	// The record is JSON, in which bytes are base64: look into what it decodes to as well.
	haystacks := map[string][]byte{"record": record, "sealed key": root.SealedKey, "certificate": root.Certificate}
	for name, secret := range map[string][]byte{"PKCS #8": der, "SEC 1": sec1, "scalar": scalar} {
		for _, form := range [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(base64.StdEncoding.EncodeToString(secret))} {
			for where, hay := range haystacks {
				if bytes.Contains(hay, form) {
					t.Errorf("the %s of the root's key lies in clear in the %s", name, where)
				}
			}
		}
	}
	if !bytes.Contains(record, []byte(base64.StdEncoding.EncodeToString(root.SealedKey))) {
		t.Error("the sealed key is not in the record, so the search above proved nothing")
	}
}

// TestSealedAnew proves that two seals of one key tell nothing about each other.
func TestSealedAnew(t *testing.T) {
	s := newSealer(t)
	if a, b := s.Seal([]byte("key"), "c"), s.Seal([]byte("key"), "c"); bytes.Equal(a, b) {
		t.Error("sealing twice gave the same bytes")
	}
}

func newSealer(t *testing.T) *ca.Sealer {
	t.Helper()
	s, err := ca.NewSealer(ca.NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func open(t *testing.T, c Config, p Parts) ca.Upstream {
	t.Helper()
	up, err := Open(c, p)
	if err != nil {
		t.Fatal(err)
	}
	return up
}

// found makes a root and checks what must hold of every root.
func found(t *testing.T, f ca.Founder, td spiffeid.TrustDomain) (journal.Authority, *x509.Certificate) {
	t.Helper()
	a, err := f.Found(t.Context(), td, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert := parse(t, a)
	if err := issuance.LintRoot(cert); err != nil {
		t.Error(err)
	}
	if len(cert.URIs) != 1 || cert.URIs[0].String() != td.IDString() {
		t.Errorf("the root carries %v, want the ID of its trust domain alone", cert.URIs)
	}
	if a.State != journal.Active {
		t.Errorf("the root is %s", a.State)
	}
	if _, err := journal.New(td, a); err != nil {
		t.Errorf("the root does not fit into a record: %v", err)
	}
	return a, cert
}

func parse(t *testing.T, a journal.Authority) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func request(t *testing.T, root journal.Authority) ca.MintRequest {
	t.Helper()
	return ca.MintRequest{TrustDomain: td, Root: root, PublicKey: publicKey(t), NotAfter: time.Now().Add(time.Hour)}
}

func publicKey(t *testing.T) crypto.PublicKey {
	t.Helper()
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		t.Fatal(err)
	}
	return key.Public()
}

// exchangeKey returns a key for key agreement only, as PKCS #8.
func exchangeKey(t *testing.T) []byte {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
