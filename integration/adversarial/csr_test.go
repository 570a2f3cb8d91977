package adversarial

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// csrAsker asks with certificate requests of the workload, all with one token.
type csrAsker struct {
	*rig
	token []byte
}

func (a csrAsker) ask(row, name string, der []byte, harmless string, want ...api.Reason) {
	a.t.Helper()
	item := &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: a.token}, Csr: der, Volume: "volume"}
	a.variant(variant{row: row, name: name, item: item, want: want, harmless: harmless})
}

func (a csrAsker) variant(v variant) { a.t.Helper(); a.rig.ask(v) }

// withCSRs runs a suite of at least so many requests.
func withCSRs(t *testing.T, least int, f func(t *testing.T, a csrAsker)) {
	t.Helper()
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		f(t, csrAsker{r, r.token()})
		r.tell(least)
	})
}

// Parts of a request, in DER.
var (
	oidSAN       = []byte{6, 3, 0x55, 0x1d, 17}
	oidExtension = []byte{6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 14}
	ecdsaSHA256  = tlv(0x30, []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2})
	ownURI       = general(6, webID)
)

// general is a GeneralName of a string type.
func general(kind byte, s string) []byte { return tlv(0x80|kind, []byte(s)) }

func extension(oid []byte, value []byte) []byte { return tlv(0x30, oid, tlv(4, value)) }
func san(names ...[]byte) []byte                { return extension(oidSAN, tlv(0x30, names...)) }
func extensions(all ...[]byte) []byte           { return tlv(0x30, oidExtension, tlv(0x31, tlv(0x30, all...))) }

func spkiOf(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// request makes a request of these attributes that key signed.
func request(t testing.TB, key crypto.Signer, attributes ...[]byte) []byte {
	t.Helper()
	return signed(t, key, tlv(0x30, []byte{2, 1, 0}, tlv(0x30), spkiOf(t, key.Public()), tlv(0xa0, attributes...)))
}

// signed signs what a request says with ECDSA and SHA-256.
func signed(t testing.TB, key crypto.Signer, info []byte) []byte {
	t.Helper()
	return tlv(0x30, info, ecdsaSHA256, tlv(3, []byte{0}, signature(t, key, info)))
}

func signature(t testing.TB, key crypto.Signer, info []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(info)
	sig, err := ecdsa.SignASN1(rand.Reader, key.(*ecdsa.PrivateKey), digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// TestRequestDER breaks each element of a request in each way, once with the signature that was there and once signed
// again, so that nothing but the form can be what is refused.
//
// threat: C20
func TestRequestDER(t *testing.T) {
	least, each := 2000, 1
	if testing.Short() {
		least, each = 600, 3
	}
	withCSRs(t, least, func(t *testing.T, a csrAsker) {
		asked := 0
		good := signed(t, a.key, tlv(0x30, []byte{2, 1, 0}, tlv(0x30, tlv(0x31, tlv(0x30, []byte{6, 3, 0x55, 4, 3}, tlv(12, []byte(stranger))))),
			spkiOf(t, a.key.Public()), tlv(0xa0, extensions(san(ownURI)))))
		a.ask("C20", "untouched", good, "")
		tree := parse(t, good, "", func(path string) int {
			switch path {
			case "/0/2": // the signature
				return 1
			case "/0/0/3/0/1/0/0/1": // the value of the extension
				return 0
			}
			return -1
		})[0]
		tree.walk(func(n *node) {
			for name, f := range sorted(breakages()) {
				broken := tree.encode(func(at *node, body []byte) []byte {
					if at == n {
						return f(at.tag, body)
					}
					return nil
				})
				if asked++; bytes.Equal(broken, good) || asked%each != 0 {
					continue // it was so already, or it is left to a longer run
				}
				want, harmless := rightFor(n.path, name)
				a.ask("C20", n.path+" "+name, broken, harmless, want...)
				if again, ok := resigned(t, a.key, tree.children[0], n, f); ok {
					if strings.HasPrefix(n.path, "/0/0/1") {
						harmless = "the subject is skipped, whatever it holds"
					}
					a.ask("C20", n.path+" "+name+", signed", again, harmless, want...)
				}
			}
		})
	})
}

// resigned breaks an element of what is signed, and signs the result.
func resigned(t testing.TB, key crypto.Signer, info, n *node, f func(byte, []byte) []byte) ([]byte, bool) {
	t.Helper()
	inside := false
	der := info.encode(func(at *node, body []byte) []byte {
		if at == n {
			inside = true
			return f(at.tag, body)
		}
		return nil
	})
	if !inside || n == info {
		return nil, false
	}
	return signed(t, key, der), true
}

// rightFor tells which reasons are right for a request that is broken at path, and whether it may mean the same.
func rightFor(path, how string) (want []api.Reason, harmless string) {
	want = []api.Reason{api.CSRMalformed, api.CSRSignature}
	switch {
	case strings.HasPrefix(path, "/0/0/2"): // key
		want = append(want, api.KeyType, api.WeakKey)
	case strings.HasPrefix(path, "/0/0/3"): // attributes
		want = append(want, api.CSRForbiddenExtension, api.CSRExtraSAN, api.CSRURICount, api.IDMalformed, api.IDMismatch)
		if how == "left out" || how == "empty" || how == "twice" {
			harmless = "a request may name nothing"
		}
	}
	return want, harmless
}

// TestRequestBytes changes single bytes: no byte of a request is without meaning.
//
// threat: C17, C20
func TestRequestBytes(t *testing.T) {
	withCSRs(t, 300, func(t *testing.T, a csrAsker) {
		good := request(t, a.key, extensions(san(ownURI)))
		rnd := seed(3)
		want := []api.Reason{api.CSRMalformed, api.CSRSignature, api.CSRForbiddenExtension, api.CSRExtraSAN, api.CSRURICount, api.IDMalformed,
			api.IDMismatch, api.KeyType, api.WeakKey, api.KeyTooLarge}
		for i := range 200 {
			bad := slices.Clone(good)
			bad[rnd.IntN(len(bad))] ^= 1 << rnd.IntN(8)
			a.ask("C17", fmt.Sprint("a bit, number ", i), bad, "", want...)
		}
		for i := range len(good) / 2 {
			a.ask("C20", fmt.Sprint("cut after ", 2*i), good[:2*i], "", api.CSRMalformed)
		}
		for _, tail := range []string{"\x00", "\x05\x00", "\n", "x", string(good)} {
			a.ask("C20", "behind it "+clip(tail), append(slices.Clone(good), tail...), "", api.CSRMalformed)
			a.ask("C20", "before it "+clip(tail[:1]), append([]byte(tail[:1]), good...), "", api.CSRMalformed)
		}
	})
}

// TestRequestSignature proves possession of the wrong key, or of none.
//
// threat: C17, C18, C19
func TestRequestSignature(t *testing.T) {
	withCSRs(t, 30, func(t *testing.T, a csrAsker) {
		other := newKey(t)
		info := tlv(0x30, []byte{2, 1, 0}, tlv(0x30), spkiOf(t, a.key.Public()), tlv(0xa0))
		with := func(algorithm, sig []byte) []byte { return tlv(0x30, info, algorithm, tlv(3, []byte{0}, sig)) }
		good := signature(t, a.key, info)
		var pair struct{ R, S asn1.RawValue }
		if _, err := asn1.Unmarshal(good, &pair); err != nil {
			t.Fatal(err)
		}
		for name, sig := range sorted(map[string][]byte{
			"by another key": signature(t, other, info), "of something else": signature(t, a.key, append(slices.Clone(info), 0)),
			"empty": {}, "zeros": make([]byte, 70), "r and s zero": tlv(0x30, []byte{2, 1, 0}, []byte{2, 1, 0}), "r and s one": tlv(0x30, []byte{2, 1, 1}, []byte{2, 1, 1}),
			"r and s swapped": tlv(0x30, pair.S.FullBytes, pair.R.FullBytes), "r twice": tlv(0x30, pair.R.FullBytes, pair.R.FullBytes),
			"raw": slices.Concat(pair.R.Bytes, pair.S.Bytes), "a null behind": append(slices.Clone(good), 5, 0), "a third number": tlv(0x30, pair.R.FullBytes, pair.S.FullBytes, []byte{2, 1, 0}),
			"r negative": tlv(0x30, tlv(2, []byte{0xff}), pair.S.FullBytes), "long s": tlv(0x30, pair.R.FullBytes, tlv(2, []byte{0}, pair.S.Bytes)),
			"infinite": tlv(0x30, tlv(9, []byte{0x40}), pair.S.FullBytes), "10 KiB": make([]byte, 10<<10),
		}) {
			want := one(api.CSRSignature)
			a.ask("C17", "signature "+name, with(ecdsaSHA256, sig), "", want...)
		}
		oid := func(b ...byte) []byte { return tlv(0x30, tlv(6, b)) }
		pkcs1 := func(n byte) []byte {
			return tlv(0x30, tlv(6, []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, n}), []byte{5, 0})
		}
		for name, algorithm := range sorted(map[string][]byte{
			"ECDSA with SHA-1": oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1), "ECDSA with SHA-224": oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 1), "ECDSA with SHA-384": oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3),
			"ECDSA with SHA-512": oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 4), "ECDSA with SHA3-256": oid(0x60, 0x86, 0x48, 1, 0x65, 3, 4, 3, 10), "RSA with MD2": pkcs1(2), "RSA with MD5": pkcs1(4), "RSA with SHA-1": pkcs1(5),
			"RSA with SHA-256": pkcs1(11), "RSA with SHA-224": pkcs1(14), "RSA-PSS": pkcs1(10), "Ed25519": oid(0x2b, 0x65, 0x70), "Ed448": oid(0x2b, 0x65, 0x71), "DSA with SHA-1": oid(0x2a, 0x86, 0x48, 0xce, 0x38, 4, 3),
			"ECDSA with SHA-256 and null": tlv(0x30, []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}, []byte{5, 0}), "nothing": tlv(0x30), "a curve": oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7), "unknown": oid(0x2a, 3),
		}) {
			a.ask("C17", "algorithm "+name, with(algorithm, good), "", api.CSRSignature)
		}
		// The keys of others. The agent's belongs to another identity, as would any other workload's.
		neighbour, its := a.Pod(stranger, "db-0", "db", here), newKey(t)
		theirs := a.item(a.Evidence(neighbour, api.WorkloadAudience(a.TD), 3600e9).Data)
		theirs.Csr = newCSR(t, its)
		a.variant(variant{row: "C19", name: "a neighbour's first", item: theirs, is: "spiffe://example.org/ns/" + stranger + "/sa/db", key: its.Public()})
		a.ask("C19", "a neighbour's key", newCSR(t, its), "", api.KeyReused)
		agent := newKey(t)
		fresh := a.AgentPod("node-9")
		evidence := wire(a.Evidence(fresh, api.AgentAudience(a.TD), 3600e9))
		if _, err := a.door.AttestAgent(t.Context(), &apiv1.AttestAgentRequest{Evidence: evidence, Csr: newCSR(t, agent), Protocol: api.Protocol}); err != nil {
			t.Fatal(err)
		}
		a.ask("C18", "an agent's key", newCSR(t, agent), "", api.KeyReused)
	})
}
