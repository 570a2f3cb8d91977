package journal

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/canary"
)

// t0 is when the tests of rotations begin.
var t0 = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// root is a root whose key a test has.
type root struct {
	Authority
	cert *x509.Certificate
	key  crypto.Signer
}

// makeRoot makes a root with a name of its own that lives from a minute before t0, changed as a test wants.
func makeRoot(t testing.TB, name string, life time.Duration, change ...func(*x509.Certificate)) root {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	ski := make([]byte, 20)
	rand.Read(ski)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: t0.Add(-time.Minute), NotAfter: t0.Add(life), Subject: pkix.Name{CommonName: name},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: ski,
	}
	for _, f := range change {
		f(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return root{Authority: Authority{ID: hex.EncodeToString(ski), State: Active, Certificate: der, SealedKey: []byte("sealed " + name)}, cert: cert, key: key}
}

// by returns the root with a certificate signed by an older one.
func (r root) by(t testing.TB, older root) Authority {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: t0.Add(-time.Minute), NotAfter: older.cert.NotAfter, Subject: r.cert.Subject,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: r.cert.SubjectKeyId, MaxPathLen: 1,
	}
	if r.cert.NotAfter.Before(c.NotAfter) {
		c.NotAfter = r.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, c, older.cert, r.cert.PublicKey, older.key)
	if err != nil {
		t.Fatal(err)
	}
	a := r.Authority
	a.Cross, a.CrossBy = der, older.ID
	return a
}

// pool returns n roots that live for ten years.
func pool(t testing.TB, n int) []root {
	t.Helper()
	roots := make([]root, n)
	for i := range roots {
		roots[i] = makeRoot(t, fmt.Sprintf("root %d", i), 10*365*24*time.Hour)
	}
	return roots
}

func journalOf(t testing.TB, a root) Journal {
	t.Helper()
	j, err := New(td, a.Authority)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func request(id string) Request { return Request{ID: id, By: "uid:0", Why: "because"} }

func planned(id string, a Authority) StartRequest {
	return StartRequest{Request: request(id), Kind: Planned, Authority: a}
}

// must returns the record that an operation made.
func must(t testing.TB) func(Journal, error) Journal {
	return func(j Journal, err error) Journal {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
}

// held is the bundle of a record.
func heldOf(t testing.TB, j Journal) Held {
	t.Helper()
	h, err := j.held()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// ready is the evidence of a small fleet that has everything: two replicas, two agents, a pod on each.
func ready(t testing.TB, j Journal, now time.Time) Acks {
	t.Helper()
	h, active := heldOf(t, j), j.ActiveAuthority().ID
	acks := Acks{Copies: []Copy{{Kind: "ConfigMap", Name: "signet-bundle", Held: h, At: now.Add(-time.Hour)}}}
	for _, name := range []string{"ca-0", "ca-1"} {
		acks.Replicas = append(acks.Replicas, Replica{Name: name, Reachable: true, Ready: true, Signs: active,
			Intermediates: []Intermediate{{Root: active, NotAfter: now.Add(24 * time.Hour)}}, Leaves: map[string]time.Time{active: now.Add(time.Hour)}})
	}
	for i, name := range []string{"node-a", "node-b"} {
		acks.Agents = append(acks.Agents, Agent{Cluster: "https://k8s.test", Node: name, NodeUID: "uid-" + name, Connected: true, Seen: now, Until: now.Add(time.Hour), Held: h, Root: active,
			Pods: []Pod{{Namespace: "shop", Name: fmt.Sprintf("web-%d", i), UID: fmt.Sprintf("pod-%d", i), Roots: []string{active}, Streams: []Stream{{Bundle: true, Acked: h}}}}})
	}
	return acks
}

// step takes the next step and fails where there is none.
func step(t testing.TB, j Journal, now time.Time, acks Acks) Journal {
	t.Helper()
	s, blockers := Next(j, now, acks)
	if !s.Is() {
		t.Fatalf("no step: %+v", blockers)
	}
	return must(t)(Apply(j, s, now))
}

// state returns where an authority stands; Removed where it is gone.
func stateOf(j Journal, id string) State {
	if i := j.find(id); i >= 0 {
		return j.Authorities[i].State
	}
	return Removed
}

// goldenRotation is the record of schema-3.json: in the middle of a rotation, with a bit of everything.
func goldenRotation(t testing.TB) Journal {
	roots := pool(t, 3)
	j := journalOf(t, roots[0])
	j.Epoch, j.Number = 2, 2
	j = must(t)(Start(j, planned("first", roots[1].by(t, roots[0])), t0))
	j = step(t, j, t0, ready(t, j, t0))
	j = must(t)(Abort(j, request("first"), t0.Add(time.Minute)))
	last := roots[2].by(t, roots[0])
	last.SealedKey, last.Upstream = nil, "vault"
	j = must(t)(Start(j, StartRequest{Request: request("second"), Kind: Switch, Authority: last, Automatic: true}, t0.Add(time.Hour)))
	j = step(t, j, t0.Add(time.Hour), ready(t, j, t0))
	j.Authorities[0].SealedKey = []byte("sealed")
	return must(t)(j.WithExcuse(Excuse{Scope: ScopePod, Name: "shop/web-0", Reason: "test", By: "uid:0", Until: t0.Add(3 * time.Hour)}, t0.Add(2*time.Hour)))
}

func checkGoldenRotation(t *testing.T, j Journal) {
	o := j.Operation
	if o == nil || o.ID != "second" || o.Kind != Switch || !o.Automatic || o.Latest.IsZero() || o.Straggler != time.Hour || len(j.Past) != 1 ||
		j.Past[0].Outcome != Aborted || len(j.Gone) != 1 || j.Gone[0].Tainted || len(j.Excuses) != 1 || j.Authorities[1].CrossBy != j.Authorities[0].ID ||
		j.Authorities[1].Upstream != "vault" || j.Authorities[1].Times.Published.IsZero() || !bytes.Equal(j.Authorities[0].SealedKey, []byte("sealed")) {
		t.Errorf("read as %+v", j)
	}
	if s, blockers := Next(j, t0.Add(2*time.Hour), Acks{}); s.Is() || len(blockers) == 0 {
		t.Errorf("step %v, blockers %+v", s, blockers)
	}
}
