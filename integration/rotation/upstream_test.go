//go:build integration

package rotation

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"
)

// root writes a root of somebody else's and its key into the folder, as upstream.kind disk reads it, and returns its key id.
func (w *world) root(name string) string {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		w.t.Fatal(err)
	}
	id := sha256.Sum256(point)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, SubjectKeyId: id[:20],
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.write("up.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	w.write("up.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return fmt.Sprintf("%x", c.SubjectKeyId)
}

// TestUpstream goes from a root that is sealed in the record to one in files, as docs/upstreams.md says it, and then to another one
// in the same files, without a start. Each is announced, used once a rotation says so, and no connection fails meanwhile.
func TestUpstream(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for SVIDs to expire")
	}
	t.Parallel()
	w := newWorld(t, 2, short)
	a, b := w.peer(w.agents[0], "web", false), w.peer(w.agents[1], "db", true)
	pair, back := w.connect(a, b), w.connect(b, a)
	sealed := w.active()

	first := w.root("first")
	w.configure(fmt.Sprintf("{kind: disk, disk: {keyFile: %[1]s/up.key, certificateFile: %[1]s/up.crt}}", w.dir))
	w.ca.kill()
	w.ca.start()
	w.connected(2)
	w.announced(first, sealed)
	updates := a.Updates()
	eventually(t, "SVIDs are renewed under the sealed root meanwhile", func(context.Context) error {
		if a.Updates() < updates+2 {
			return errors.New("not yet")
		}
		return nil
	})
	w.must(0, "rotate", "start", "--id=first", "--reason=to files", "--soak=1s")
	if out := w.must(0, "authority", "show", first); !strings.Contains(out, "by "+sealed) {
		t.Errorf("the sealed root has not signed the one in files:\n%s", out)
	}
	w.await("the root in files is the only one", ended("first", "done"))
	if roots := w.roots(); roots[first] != "active" || roots[sealed] != "removed" {
		t.Errorf("the roots are %v", roots)
	}
	pair.more(t, 10)
	back.more(t, 10)

	second := w.root("second")
	w.announced(second, first)
	w.must(0, "rotate", "start", "--id=second", "--reason=another", "--soak=1s", "--without-cross")
	w.await("the second root in files is the only one", ended("second", "done"))
	if roots := w.roots(); roots[second] != "active" || roots[first] != "removed" {
		t.Errorf("the roots are %v", roots)
	}
	for _, p := range []*peer{a, b} {
		if p.trusts(sealed) || !p.trusts(second) {
			t.Errorf("%s does not trust the root in files alone", p.name)
		}
	}
	pair.more(t, 10)
	back.more(t, 10)
}

// announced waits until a root is announced, while another one is active.
func (w *world) announced(root, active string) {
	w.t.Helper()
	eventually(w.t, "the root in files is announced", func(context.Context) error {
		if roots := w.roots(); roots[root] != "announced" || roots[active] != "active" {
			return fmt.Errorf("the roots are %v", roots)
		}
		return nil
	})
}
