package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/canary"
)

func newTicketKey(id byte) ticketKey {
	k := ticketKey{id: [ticketKeyID]byte{id}, key: make([]byte, ticketKeySize)}
	rand.Read(k.key)
	return k
}

func ticketLeaf(change ...func(*x509.Certificate)) *x509.Certificate {
	c := &x509.Certificate{
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ns/shop/sa/web"}}, NotAfter: time.Unix(1_800_003_600, 0),
		SerialNumber: big.NewInt(77), RawSubjectPublicKeyInfo: []byte("a key"),
	}
	for _, f := range change {
		f(c)
	}
	return c
}

func ticketClaims(change ...func(*attestor.Claims)) attestor.Claims {
	c := attestor.Claims{
		Issuer: "https://a", Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "sa-1", PodName: "web-0", PodUID: "pod-1",
		NodeName: "node-1", NodeUID: "node-uid-1", TokenID: "jti-1", IssuedAt: time.Unix(1_800_000_000, 0),
	}
	for _, f := range change {
		f(&c)
	}
	return c
}

// A ticket admits what it was made for and a later token of the same pod, and nothing that differs in any part of it.
func TestTicketAdmits(t *testing.T) {
	made := ticketOf(ticketWorkload, ticketClaims(), "csi", ticketLeaf())
	leaf := func(f func(*x509.Certificate)) ticket {
		return ticketOf(ticketWorkload, ticketClaims(), "csi", ticketLeaf(f))
	}
	claims := func(f func(*attestor.Claims)) ticket {
		return ticketOf(ticketWorkload, ticketClaims(f), "csi", ticketLeaf())
	}
	for _, tt := range []struct {
		name  string
		shown ticket
		want  string // in the refusal; empty: admitted
	}{
		{"the same", ticketOf(ticketWorkload, ticketClaims(), "csi", ticketLeaf()), ""},
		{"a later token", claims(func(c *attestor.Claims) { c.TokenID, c.IssuedAt = "jti-2", c.IssuedAt.Add(time.Second) }), ""},
		{"an earlier token", claims(func(c *attestor.Claims) { c.TokenID, c.IssuedAt = "jti-0", c.IssuedAt.Add(-time.Second) }), "token"},
		{"another token of that second", claims(func(c *attestor.Claims) { c.TokenID = "jti-2" }), ""},
		{"a later token by the other door", ticketOf(ticketWorkload, ticketClaims(func(c *attestor.Claims) { c.TokenID = "jti-2" }), "shared", ticketLeaf()), ""},
		{"an earlier token by the other door", ticketOf(ticketWorkload, ticketClaims(func(c *attestor.Claims) {
			c.TokenID, c.IssuedAt = "jti-0", c.IssuedAt.Add(-time.Second)
		}), "shared", ticketLeaf()), "token"},
		{"a later token of another node by the other door", ticketOf(ticketWorkload, ticketClaims(func(c *attestor.Claims) {
			c.TokenID, c.NodeUID = "jti-2", "node-uid-2"
		}), "shared", ticketLeaf()), "node"},
		{"another kind", ticketOf(ticketAgent, ticketClaims(), "csi", ticketLeaf()), "kind of identity"},
		{"another volume", ticketOf(ticketWorkload, ticketClaims(), "shared", ticketLeaf()), "volume"},
		{"another cluster", claims(func(c *attestor.Claims) { c.Issuer = "https://b" }), "cluster"},
		{"another pod", claims(func(c *attestor.Claims) { c.PodUID = "pod-2" }), "pod"},
		{"another ServiceAccount", claims(func(c *attestor.Claims) { c.ServiceAccountUID = "sa-2" }), "ServiceAccount"},
		{"another node", claims(func(c *attestor.Claims) { c.NodeUID = "node-uid-2" }), "node"},
		{"another identity", leaf(func(c *x509.Certificate) { c.URIs[0].Path = "/ns/shop/sa/db" }), "SPIFFE ID"},
		{"another key", leaf(func(c *x509.Certificate) { c.RawSubjectPublicKeyInfo = []byte("b key") }), "key"},
		{"another serial", leaf(func(c *x509.Certificate) { c.SerialNumber = big.NewInt(78) }), "certificate"},
		{"another end", leaf(func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) }), "certificate"},
		{"no identity", leaf(func(c *x509.Certificate) { c.URIs = nil }), "SPIFFE ID"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := made.admits(tt.shown)
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || api.ReasonOf(err) != api.TicketMismatch || !strings.HasSuffix(api.AsError(err).Detail, tt.want) {
				t.Errorf("%v, want %s of another %s", err, api.TicketMismatch, tt.want)
			}
		})
	}
}

// What comes out of a ticket is what went in, under any key that is still there; a change of any byte, another length and an
// unknown key make it none.
func TestTicketSeal(t *testing.T) {
	old, fresh := newTicketKey(1), newTicketKey(2)
	both := ticketKeys{fresh, old}
	made := ticketOf(ticketAgent, ticketClaims(), agentVolume, ticketLeaf())
	for _, sealed := range [][]byte{both.seal(made), old.seal(made)} {
		if len(sealed) != ticketBytes || ticketBytes > api.MaxTicketBytes {
			t.Fatalf("a ticket of %d bytes", len(sealed))
		}
		if got, err := both.open(sealed); err != nil || got != made {
			t.Errorf("opened %+v (%v), want %+v", got, err, made)
		}
		for i := range sealed {
			changed := bytes.Clone(sealed)
			changed[i] ^= 1 << (i % 8)
			if _, err := both.open(changed); api.ReasonOf(err) != api.TicketInvalid || err == nil {
				t.Fatalf("byte %d changed: %v", i, err)
			}
		}
	}
	sealed := both.seal(made)
	if !bytes.Equal(sealed[1:ticketHeadBytes], fresh.id[:]) {
		t.Error("a new ticket is not under the newest key")
	}
	forged := newTicketKey(2).seal(made) // the id of a key is no secret
	for name, b := range map[string][]byte{"nothing": nil, "shorter": sealed[:ticketBytes-1], "longer": append(bytes.Clone(sealed), 0), "forged": forged} {
		if _, err := both.open(b); api.ReasonOf(err) != api.TicketInvalid || err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (ticketKeys{old}).open(sealed); api.ReasonOf(err) != api.TicketInvalid || err == nil {
		t.Errorf("under a key that is gone: %v", err)
	}
	if got := ticketKeys(nil).seal(made); got != nil {
		t.Error("a ticket under no key")
	}
	if s := fmt.Sprintf("%v %+v %#v %s", fresh, both, fresh, &fresh); strings.Contains(s, fmt.Sprint(fresh.key[:4])[1:]) {
		t.Errorf("a key is shown: %s", s)
	}
}

func FuzzTicket(f *testing.F) {
	keys := ticketKeys{newTicketKey(1), newTicketKey(2)}
	good := keys.seal(ticketOf(ticketWorkload, ticketClaims(), "csi", ticketLeaf()))
	f.Add(good)
	f.Add([]byte{})
	f.Add(good[:ticketHeadBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := keys.open(b)
		if err != nil {
			if api.ReasonOf(err) != api.TicketInvalid {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if !bytes.Equal(keys[0].seal(got), b) && !bytes.Equal(keys[1].seal(got), b) {
			t.Fatal("a ticket has two forms")
		}
	})
}

// What is shown as an SVID that is held is bounded before it is parsed, and refused with one reason whatever it is.
func FuzzHeld(f *testing.F) {
	key, err := canary.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	root, err := issuance.NewRoot(spiffeid.RequireTrustDomainFromString("example.org"), key, time.Hour, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(root.Raw, 1, []byte("a signature"))
	f.Add([]byte{0x30, 0}, 3, []byte(nil))
	f.Add([]byte(nil), 0, []byte(nil))
	f.Fuzz(func(t *testing.T, der []byte, n int, signature []byte) {
		chain := make([][]byte, min(max(n, 0), 100))
		for i := range chain {
			chain[i] = der
		}
		certs, err := parseHeld(chain)
		if err != nil {
			if api.ReasonOf(err) != api.HeldSVIDInvalid {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if len(certs) != len(chain) || len(certs) > maxHeldChain || len(der)*len(chain) > api.MaxHeldChainBytes {
			t.Fatalf("%d certificates of %d", len(certs), len(chain))
		}
		if err := checkPossession(certs[0], []byte("ticket"), []byte("csr"), signature); err == nil || api.ReasonOf(err) != api.PossessionUnproven {
			t.Fatalf("possession is proven by %d bytes: %v", len(signature), err)
		}
	})
}

// Each kind of key that an SVID may have proves its possession, by the digest of that ticket and that request alone.
func TestCheckPossession(t *testing.T) {
	for _, kind := range []issuance.KeyKind{issuance.KeyP256, issuance.KeyP384, issuance.KeyEd25519, issuance.KeyRSA2048} {
		key, err := issuance.GenerateKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		digest := api.RenewalDigest([]byte("ticket"), []byte("csr"))
		options := crypto.SignerOpts(crypto.SHA256)
		if kind == issuance.KeyEd25519 {
			options = crypto.Hash(0)
		}
		signature, err := key.Sign(rand.Reader, digest[:], options)
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{PublicKey: key.Public()}
		if err := checkPossession(leaf, []byte("ticket"), []byte("csr"), signature); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		for name, err := range map[string]error{
			"another ticket":  checkPossession(leaf, []byte("ticker"), []byte("csr"), signature),
			"another request": checkPossession(leaf, []byte("ticket"), []byte("css"), signature),
			"cut":             checkPossession(leaf, []byte("ticket"), []byte("csr"), signature[1:]),
			"nothing":         checkPossession(leaf, []byte("ticket"), []byte("csr"), nil),
			"without end":     checkPossession(leaf, []byte("ticket"), []byte("csr"), make([]byte, api.MaxPossessionBytes+1)),
			"no key":          checkPossession(&x509.Certificate{}, []byte("ticket"), []byte("csr"), signature),
		} {
			if err == nil || api.ReasonOf(err) != api.PossessionUnproven {
				t.Errorf("%s, %s: %v", kind, name, err)
			}
		}
	}
}

// Keys are replaced after their time, and kept for as long as a ticket under them lives.
func TestTicketKeysRotate(t *testing.T) {
	s, err := NewSealer(NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	j := emptyJournal(t)
	now := time.Unix(1_800_000_000, 0)
	var ids []string
	rotate := func() {
		t.Helper()
		if !ticketKeyDue(j, now) {
			t.Fatal("no key is due")
		}
		if j, err = withTicketKey(j, s, now); err != nil {
			t.Fatal(err)
		}
		if ticketKeyDue(j, now) || ticketKeyDue(j, now.Add(ticketKeyLife-time.Second)) {
			t.Error("a key is due at once")
		}
		ids = append(ids, j.TicketKeys[0].ID)
		now = now.Add(ticketKeyLife)
	}
	for i := range 6 {
		rotate()
		if want := min(i+1, 2); len(j.TicketKeys) != want {
			t.Errorf("%d keys after %d rotations, want %d", len(j.TicketKeys), i+1, want)
		}
	}
	opened, err := openTicketKeys(j, s)
	if err != nil || len(opened) != 2 {
		t.Fatalf("%d keys (%v)", len(opened), err)
	}
	if j.TicketKeys[0].ID != ids[5] || j.TicketKeys[1].ID != ids[4] {
		t.Error("the keys are not the newest, newest first")
	}
	// A clock that jumps makes keys in a row: the bound of the record holds.
	for range 6 {
		if j, err = withTicketKey(j, s, now); err != nil {
			t.Fatal(err)
		}
	}
	if len(j.TicketKeys) != journal.MaxTicketKeys {
		t.Errorf("%d keys", len(j.TicketKeys))
	}
	other, err := NewSealer(NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openTicketKeys(j, other); api.ReasonOf(err) != api.SealKeyWrong || err == nil {
		t.Errorf("under another seal key: %v", err)
	}
	swapped := j
	swapped.TicketKeys = append([]journal.TicketKey(nil), j.TicketKeys...)
	swapped.TicketKeys[0].Sealed = j.TicketKeys[1].Sealed
	if _, err := openTicketKeys(swapped, s); api.ReasonOf(err) != api.SealKeyWrong || err == nil {
		t.Errorf("under another id: %v", err)
	}
}

func emptyJournal(t *testing.T) journal.Journal {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	root, err := issuance.NewRoot(td, key, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	j, err := journal.New(td, journal.Authority{ID: hexID(root), Certificate: root.Raw, SealedKey: []byte("sealed")})
	if err != nil {
		t.Fatal(err)
	}
	return j
}
