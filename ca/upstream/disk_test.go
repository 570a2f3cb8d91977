package upstream

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

// files is a folder of an upstream's files.
type files struct{ dir string }

func newFiles(t *testing.T) files { return files{t.TempDir()} }

func (f files) path(name string) string { return filepath.Join(f.dir, name) }

func (f files) config(roots bool) Config {
	c := Config{Kind: "disk", Disk: DiskConfig{KeyFile: f.path("tls.key"), CertificateFile: f.path("tls.crt")}}
	if roots {
		c.Disk.RootsFile = f.path("ca.crt")
	}
	return c
}

// write puts an authority's files in place, one after the other.
func (f files) write(t *testing.T, a authority) {
	t.Helper()
	f.put(t, "tls.key", 0o600, keyPEM(t, a.key))
	f.put(t, "tls.crt", 0o644, certsPEM(a.chain...))
	f.put(t, "ca.crt", 0o644, certsPEM(a.root))
}

func (f files) put(t *testing.T, name string, mode os.FileMode, data []byte) {
	t.Helper()
	_ = os.Remove(f.path(name))
	if err := os.WriteFile(f.path(name), data, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.path(name), mode); err != nil {
		t.Fatal(err)
	}
}

// authority is a key with its chain, which leads to root.
type authority struct {
	key   crypto.Signer
	chain []*x509.Certificate
	root  *x509.Certificate
}

func newRoot(t *testing.T) authority {
	t.Helper()
	return rootOf(t, newKey(t))
}

func rootOf(t *testing.T, key crypto.Signer) authority {
	t.Helper()
	root, err := issuance.NewRoot(td, key, 365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return authority{key, []*x509.Certificate{root}, root}
}

// authority is a's root as it stands in a record.
func (a authority) authority() journal.Authority {
	return journal.Authority{ID: hex.EncodeToString(a.root.SubjectKeyId), State: journal.Active, Certificate: a.root.Raw}
}

// below returns an intermediate of a that may sign one more, but for what edit makes of it.
func (a authority) below(t *testing.T, edit func(*x509.Certificate)) authority {
	t.Helper()
	key := newKey(t)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "an enterprise's issuer"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * 24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1, SubjectKeyId: []byte(issuance.Fingerprint(key.Public())[:20]),
	}
	if edit != nil {
		edit(c)
	}
	return authority{key, append([]*x509.Certificate{sign(t, c, a.chain[0], key.Public(), a.key)}, a.chain...), a.root}
}

func sign(t *testing.T, c, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func keyPEM(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func certsPEM(certs ...*x509.Certificate) []byte {
	var all []byte
	for _, c := range certs {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return all
}

// TestDiskKeys mints under keys of every kind and in every form in which they are stored.
func TestDiskKeys(t *testing.T) {
	block := func(kind string, der []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	p256, p384, p521 := newKey(t).(*ecdsa.PrivateKey), ecKey(t, elliptic.P384()), ecKey(t, elliptic.P521())
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	sec1, sec1Err := x509.MarshalECPrivateKey(p256)
	parameters := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}})
	for _, tt := range []struct {
		name string
		key  crypto.Signer
		file []byte
	}{
		{"P-256 in PKCS #8", p256, keyPEM(t, p256)},
		{"P-256 in SEC 1", p256, block("EC PRIVATE KEY", sec1, sec1Err)},
		{"P-256 in SEC 1 as OpenSSL writes it", p256, append(parameters, block("EC PRIVATE KEY", sec1, sec1Err)...)},
		{"P-384", p384, keyPEM(t, p384)},
		{"P-521", p521, keyPEM(t, p521)},
		{"RSA in PKCS #8", rsa2048, keyPEM(t, rsa2048)},
		{"RSA in PKCS #1", rsa2048, block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsa2048), nil)},
		{"Ed25519", ed, keyPEM(t, ed)},
		{"with text around it", p256, slices.Concat([]byte("Bag Attributes\n  friendlyName: root\n"), keyPEM(t, p256), []byte("\n# end\n"))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFiles(t)
			a := foreignRoot(t, tt.key)
			f.write(t, a)
			f.put(t, "tls.key", 0o600, tt.file)
			up := open(t, f.config(false), Parts{})
			mintAndSign(t, up, a.authority(), a.root, true)
		})
	}
}

// foreignRoot is a root as others make them: without the ID of a trust domain.
func foreignRoot(t *testing.T, key crypto.Signer, edit ...func(*x509.Certificate)) authority {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "an enterprise's root"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(100 * 24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true, SubjectKeyId: []byte("the key of the root."),
	}
	for _, e := range edit {
		e(c)
	}
	root := sign(t, c, c, key.Public(), key)
	return authority{key, []*x509.Certificate{root}, root}
}

// belowRoot makes an intermediate of a root that edit has changed.
func belowRoot(edit func(*x509.Certificate)) func(*testing.T) authority {
	return func(t *testing.T) authority { return foreignRoot(t, newKey(t), edit).below(t, nil) }
}

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestDiskRefuses puts hostile and mistaken files in place. None is used, none of them stops what was good before, and no
// error has anything of a key in it.
//
// threat: E21
func TestDiskRefuses(t *testing.T) {
	other := newRoot(t)
	p224 := ecKey(t, elliptic.P224())
	put := func(name string, data []byte) func(*testing.T, files, authority) {
		return func(t *testing.T, f files, _ authority) { f.put(t, name, 0o600, data) }
	}
	mode := func(name string, mode os.FileMode) func(*testing.T, files, authority) {
		return func(t *testing.T, f files, _ authority) {
			if err := os.Chmod(f.path(name), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(name string) func(*testing.T, files, authority) {
		return func(t *testing.T, f files, _ authority) {
			if err := os.Remove(f.path(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	instead := func(name string, make func(path string) error) func(*testing.T, files, authority) {
		return func(t *testing.T, f files, a authority) {
			remove(name)(t, f, a)
			if err := make(f.path(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	chain := func(change func(t *testing.T, a authority) []byte) func(*testing.T, files, authority) {
		return func(t *testing.T, f files, a authority) { f.put(t, "tls.crt", 0o644, change(t, a)) }
	}
	block := func(kind string, headers map[string]string) func(*testing.T, files, authority) {
		return func(t *testing.T, f files, a authority) {
			p, _ := pem.Decode(keyPEM(t, a.key))
			f.put(t, "tls.key", 0o600, pem.EncodeToMemory(&pem.Block{Type: kind, Headers: headers, Bytes: p.Bytes}))
		}
	}
	tests := []struct {
		name   string
		change func(*testing.T, files, authority)
		want   api.Reason
		say    string
	}{
		{"no key", remove("tls.key"), api.UpstreamUnavailable, "key file"},
		{"no certificate", remove("tls.crt"), api.UpstreamUnavailable, "certificate file"},
		{"no roots", remove("ca.crt"), api.UpstreamUnavailable, "roots file"},
		{"a key that the group can read", mode("tls.key", 0o640), api.FileUnsafe, "0640"},
		{"a key that all can read", mode("tls.key", 0o644), api.FileUnsafe, "0644"},
		{"a certificate that all can write", mode("tls.crt", 0o666), api.FileUnsafe, "can write"},
		{"roots that the group can write", mode("ca.crt", 0o664), api.FileUnsafe, "can write"},
		{"a key that is a link", instead("tls.key", func(p string) error { return os.Symlink("elsewhere", p) }), api.FileUnsafe, "symbolic link"},
		{"a key that is a FIFO", instead("tls.key", func(p string) error { return syscall.Mkfifo(p, 0o600) }), api.FileUnsafe, "regular"},
		{"a certificate that is a FIFO", instead("tls.crt", func(p string) error { return syscall.Mkfifo(p, 0o600) }), api.FileUnsafe, "regular"},
		{"a certificate that is a folder", instead("tls.crt", func(p string) error { return os.Mkdir(p, 0o700) }), api.FileUnsafe, "regular"},
		{"an empty key", put("tls.key", nil), api.UpstreamFiles, "no private key"},
		{"an empty certificate", put("tls.crt", nil), api.UpstreamFiles, "no certificate"},
		{"a large key", put("tls.key", make([]byte, maxKeyFile+1)), api.FileUnsafe, "larger"},
		{"a large certificate", put("tls.crt", bytes.Repeat([]byte("-----BEGIN CERTIFICATE-----\n"), maxCertsFile/28+1)), api.UpstreamFiles, "larger"},
		{"begun and never ended", put("ca.crt", bytes.Repeat([]byte("-----BEGIN CERTIFICATE-----\n"), maxCertsFile/28)), api.UpstreamFiles, "not PEM"},
		{"a key in DER", func(t *testing.T, f files, a authority) {
			p, _ := pem.Decode(keyPEM(t, a.key))
			f.put(t, "tls.key", 0o600, p.Bytes)
		}, api.UpstreamFiles, "not PEM"},
		{"a key cut short", func(t *testing.T, f files, a authority) {
			k := keyPEM(t, a.key)
			f.put(t, "tls.key", 0o600, k[:len(k)-40])
		}, api.UpstreamFiles, "not PEM"},
		{"two keys", func(t *testing.T, f files, a authority) {
			f.put(t, "tls.key", 0o600, append(keyPEM(t, a.key), keyPEM(t, other.key)...))
		}, api.UpstreamFiles, "more than one"},
		{"a certificate as a key", func(t *testing.T, f files, a authority) { f.put(t, "tls.key", 0o600, certsPEM(a.root)) }, api.UpstreamFiles, "not a private key"},
		{"a key under a wrong label", block("RSA PRIVATE KEY", nil), api.UpstreamFiles, "does not parse"},
		{"encrypted PKCS #8", block("ENCRYPTED PRIVATE KEY", nil), api.UpstreamKeyEncrypted, "passphrase"},
		{"encrypted the old way", block("EC PRIVATE KEY", map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00"}), api.UpstreamKeyEncrypted, "passphrase"},
		{"a key that cannot sign", func(t *testing.T, f files, _ authority) {
			f.put(t, "tls.key", 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: exchangeKey(t)}))
		}, api.UpstreamFiles, "can sign"},
		{"a weak key", func(t *testing.T, f files, _ authority) { f.put(t, "tls.key", 0o600, keyPEM(t, p224)) }, api.UpstreamAlgorithm, "P-224"},
		{"another key", put("tls.key", keyPEM(t, other.key)), api.UpstreamFiles, "does not belong"},
		{"a key among the certificates", chain(func(t *testing.T, a authority) []byte { return append(certsPEM(a.chain...), keyPEM(t, a.key)...) }), api.UpstreamFiles, "not a certificate"},
		{"a certificate that does not parse", chain(func(t *testing.T, a authority) []byte {
			return append(certsPEM(a.chain...), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{0x30, 0}})...)
		}), api.UpstreamFiles, "certificate 3"},
		{"too many certificates", chain(func(t *testing.T, a authority) []byte {
			all := a.chain
			for range maxChainPEM {
				all = append(all, newRoot(t).root)
			}
			return certsPEM(all...)
		}), api.UpstreamFiles, "more than 9"},
		{"the chain upside down", chain(func(t *testing.T, a authority) []byte { return certsPEM(a.chain[1], a.chain[0]) }), api.UpstreamFiles, "does not belong"},
		{"other roots", func(t *testing.T, f files, _ authority) { f.put(t, "ca.crt", 0o644, certsPEM(other.root)) }, api.UpstreamFiles, "do not lead"},
		{"a root that is none", func(t *testing.T, f files, a authority) { f.put(t, "ca.crt", 0o644, certsPEM(a.chain[0], a.root)) }, api.UpstreamFiles, "not self-signed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFiles(t)
			a := newRoot(t).below(t, nil)
			f.write(t, a)
			running := open(t, f.config(true), Parts{})
			if err := running.Probe(t.Context(), td, a.authority()); err != nil {
				t.Fatal(err)
			}
			tt.change(t, f, a)

			// At a start there is nothing else.
			fresh := open(t, f.config(true), Parts{})
			chain, err := fresh.Mint(t.Context(), request(t, a.authority()))
			wantRefusal(t, err, tt.want, tt.say)
			if chain != nil {
				t.Error("it was signed all the same")
			}
			wantRefusal(t, fresh.Probe(t.Context(), td, a.authority()), tt.want, tt.say)
			_, err = fresh.(ca.Founder).Found(t.Context(), td, time.Now())
			wantRefusal(t, err, tt.want, tt.say)

			// What ran goes on, and says so.
			mintAndSign(t, running, a.authority(), a.root, false)
			wantRefusal(t, running.Probe(t.Context(), td, a.authority()), tt.want, "goes on")

			f.write(t, a)
			for what, up := range map[string]ca.Upstream{"the old one": running, "the new one": fresh} {
				if err := up.Probe(t.Context(), td, a.authority()); err != nil {
					t.Errorf("the files are good again, and %s says %v", what, err)
				}
			}
		})
	}
}

func wantRefusal(t *testing.T, err error, want api.Reason, say string) {
	t.Helper()
	if api.ReasonOf(err) != want || !strings.Contains(err.Error(), say) {
		t.Errorf("error %v, want %s with %q", err, want, say)
	}
	if err != nil && (strings.Contains(err.Error(), "BEGIN") || len(err.Error()) > 600) {
		t.Errorf("the error tells too much: %v", err)
	}
}

// TestDiskFounds takes up what can be the first root of the trust domain, and nothing under which no SVID would verify.
//
// threat: F04, F07
func TestDiskFounds(t *testing.T) {
	tests := []struct {
		name  string
		make  func(t *testing.T) authority
		roots bool
		want  api.Reason
	}{
		{"a root", newRoot, false, ""},
		{"a root with itself beside it", newRoot, true, ""},
		{"a root of others", func(t *testing.T) authority { return foreignRoot(t, newKey(t)) }, false, ""},
		{"an intermediate", func(t *testing.T) authority { return newRoot(t).below(t, nil) }, true, ""},
		{"an intermediate without roots", func(t *testing.T) authority { return newRoot(t).below(t, nil) }, false, api.UpstreamFiles},
		{"an intermediate for leaves only", func(t *testing.T) authority {
			return newRoot(t).below(t, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
		}, true, api.UpstreamRefused},
		{"one that may not sign", func(t *testing.T) authority {
			return newRoot(t).below(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
		}, true, api.UpstreamRefused},
		{"one for other names", func(t *testing.T) authority {
			return newRoot(t).below(t, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} })
		}, true, api.UpstreamConstraints},
		{"below a root with room for one", belowRoot(func(c *x509.Certificate) { c.MaxPathLen = 1 }), true, api.UpstreamPathLength},
		{"below a root for other names", belowRoot(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} }), true, api.UpstreamConstraints},
		{"below a root for other DNS names", belowRoot(func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"com"} }), true, api.UpstreamConstraints},
		{"below a root for servers", belowRoot(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), true, api.UpstreamAuthority},
		{"two below a root with room for two", func(t *testing.T) authority {
			return belowRoot(func(c *x509.Certificate) { c.MaxPathLen = 2 })(t).below(t, nil)
		}, true, api.UpstreamPathLength},
		{"two below a root with room for three", func(t *testing.T) authority {
			return foreignRoot(t, newKey(t), func(c *x509.Certificate) { c.MaxPathLen = 3 }).below(t, func(c *x509.Certificate) { c.MaxPathLen = 2 }).below(t, nil)
		}, true, ""},
		{"expired", func(t *testing.T) authority {
			return newRoot(t).below(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
		}, true, api.UpstreamFiles},
		{"not valid yet", func(t *testing.T) authority {
			return newRoot(t).below(t, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) })
		}, true, api.UpstreamFiles},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFiles(t)
			a := tt.make(t)
			f.write(t, a)
			up := open(t, f.config(tt.roots), Parts{DNSNames: []string{"a.svc"}})
			got, err := up.(ca.Founder).Found(t.Context(), td, time.Now())
			if api.ReasonOf(err) != tt.want && (err != nil || tt.want != "") {
				t.Fatalf("Found: %v, want %s", err, tt.want)
			}
			if perr := up.Probe(t.Context(), td, a.authority()); api.ReasonOf(perr) != tt.want && (perr != nil || tt.want != "") {
				t.Errorf("Probe: %v, want %s", perr, tt.want)
			}
			if err != nil {
				return
			}
			if !bytes.Equal(got.Certificate, a.root.Raw) || len(got.SealedKey) != 0 {
				t.Error("another root, or one with a key")
			}
			mintAndSign(t, up, got, a.root, true)
		})
	}
}

// TestDiskFoundsTooShort: files whose end comes before an intermediate would be of use are no root for a rotation, but where the root itself ends.
func TestDiskFoundsTooShort(t *testing.T) {
	ends := func(in time.Duration) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotAfter = time.Now().Add(in) }
	}
	for _, tt := range []struct {
		name string
		make func(t *testing.T) authority
		want api.Reason
	}{
		{"an intermediate that ends before two SVIDs", func(t *testing.T) authority { return newRoot(t).below(t, ends(90*time.Minute)) }, api.UpstreamLifetime},
		{"one that ends after two", func(t *testing.T) authority { return newRoot(t).below(t, ends(3*time.Hour)) }, ""},
		{"a root that ends before two", func(t *testing.T) authority { return foreignRoot(t, newKey(t), ends(90*time.Minute)) }, ""},
		{"a root that ends before one", func(t *testing.T) authority { return foreignRoot(t, newKey(t), ends(30*time.Minute)) }, api.UpstreamLifetime},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFiles(t)
			f.write(t, tt.make(t))
			up := open(t, f.config(true), Parts{Longest: time.Hour})
			_, err := up.(ca.Founder).Found(t.Context(), td, time.Now())
			if api.ReasonOf(err) != tt.want && (err != nil || tt.want != "") {
				t.Errorf("Found: %v, want %s", err, tt.want)
			}
		})
	}
}

// TestDiskSecret replaces a mounted Secret as kubelet does: a link to a folder is renamed over the one that was there. Files
// of two states never make one authority.
func TestDiskSecret(t *testing.T) {
	dir := t.TempDir()
	first := newRoot(t).below(t, nil)
	second := authority{root: first.root}
	{ // of the same root
		key := newKey(t)
		c := *first.chain[0]
		c.SerialNumber, c.SubjectKeyId = big.NewInt(2), []byte("another key, longer.")
		second.key = key
		second.chain = []*x509.Certificate{sign(t, &c, first.root, key.Public(), rootKeyOf(t, &first, &second))}
	}
	mount := func(name string, a authority) {
		t.Helper()
		f := files{filepath.Join(dir, name)}
		if err := os.Mkdir(f.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		f.write(t, a)
		if err := os.Chmod(f.path("tls.key"), 0o640); err != nil { // as with an fsGroup
			t.Fatal(err)
		}
		if err := os.Symlink(name, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	mount("..1", first)
	f := files{dir}
	for _, name := range []string{"tls.key", "tls.crt", "ca.crt"} {
		if err := os.Symlink(filepath.Join("..data", name), f.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	c := f.config(true)
	if _, err := open(t, c, Parts{}).Mint(t.Context(), request(t, first.authority())); api.ReasonOf(err) != api.FileUnsafe {
		t.Errorf("links without mountedSecret: %v", err)
	}
	c.Disk.MountedSecret = true
	up := open(t, c, Parts{})
	issuers := func() []byte {
		t.Helper()
		chain, err := up.Mint(t.Context(), request(t, first.authority()))
		if err != nil {
			t.Fatal(err)
		}
		return chain[0].AuthorityKeyId
	}
	if got := issuers(); !bytes.Equal(got, first.chain[0].SubjectKeyId) {
		t.Errorf("signed by %x", got)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() { // others mint while it is replaced
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := up.Mint(t.Context(), request(t, first.authority())); err != nil {
				t.Errorf("while the Secret is replaced: %v", err)
				return
			}
		}
	})
	for i, a := range []authority{second, first, second, first, second} {
		mount("..next"+string(rune('a'+i)), a)
		if got := issuers(); !bytes.Equal(got, a.chain[0].SubjectKeyId) {
			t.Errorf("after replacement %d it signs by %x", i, got)
		}
	}
	close(stop)
	wg.Wait()
}

// TestDiskOneByOne replaces the files one after the other, as a careless script does: until the last is there, what was
// read before goes on.
func TestDiskOneByOne(t *testing.T) {
	f := newFiles(t)
	root := newRoot(t)
	before, after := root.below(t, nil), root.below(t, nil)
	f.write(t, before)
	up := open(t, f.config(true), Parts{})
	signer := func() []byte {
		t.Helper()
		chain, err := up.Mint(t.Context(), request(t, root.authority()))
		if err != nil {
			t.Fatal(err)
		}
		return chain[0].AuthorityKeyId
	}
	if !bytes.Equal(signer(), before.chain[0].SubjectKeyId) {
		t.Fatal("signed by another")
	}
	f.put(t, "tls.key", 0o600, keyPEM(t, after.key))
	if !bytes.Equal(signer(), before.chain[0].SubjectKeyId) {
		t.Error("half of a change was taken")
	}
	wantRefusal(t, up.Probe(t.Context(), td, root.authority()), api.UpstreamFiles, "goes on")
	f.put(t, "tls.crt", 0o644, certsPEM(after.chain...))
	if !bytes.Equal(signer(), after.chain[0].SubjectKeyId) {
		t.Error("the change was not taken")
	}
	if err := up.Probe(t.Context(), td, root.authority()); err != nil {
		t.Error(err)
	}
}

// TestDiskQuiet reads nothing while nothing changes: a key is not fetched from a disk again and again.
func TestDiskQuiet(t *testing.T) {
	f := newFiles(t)
	a := newRoot(t)
	f.write(t, a)
	d := open(t, f.config(false), Parts{}).(*disk)
	set, err := d.look(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if again, err := d.look(t.Context(), time.Now()); again != set || err != nil {
			t.Fatal("it was read again")
		}
	}
	// What was not valid yet is looked at again without a change.
	later := time.Now().Add(time.Hour)
	c := *a.root
	c.NotBefore = later
	f.put(t, "tls.crt", 0o644, certsPEM(sign(t, &c, &c, a.key.Public(), a.key)))
	fresh := open(t, f.config(false), Parts{}).(*disk)
	if _, err := fresh.look(t.Context(), time.Now()); api.ReasonOf(err) != api.UpstreamFiles {
		t.Errorf("before it is valid: %v", err)
	}
	if set, err := fresh.look(t.Context(), later.Add(time.Second)); set == nil || err != nil {
		t.Errorf("once it is valid: %v", err)
	}
}

// TestDiskWatchNothing has no files at first: nothing is told, and they are found once they are there.
func TestDiskWatchNothing(t *testing.T) {
	f := newFiles(t)
	d := open(t, f.config(false), Parts{}).(*disk)
	d.pause = time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a := newRoot(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	told := make(chan *x509.Certificate, 1)
	wg.Go(func() {
		d.WatchRoots(ctx, func(roots []*x509.Certificate) {
			select {
			case told <- roots[0]:
			default:
			}
		})
	})
	f.write(t, a)
	select {
	case c := <-told:
		if !c.Equal(a.root) {
			t.Error("another root was told")
		}
	case <-ctx.Done():
		t.Fatal("the root was not told")
	}
}

// rootKeyOf makes both authorities' root anew, with a key that is returned.
func rootKeyOf(t *testing.T, first, second *authority) crypto.Signer {
	t.Helper()
	root := newRoot(t)
	*first = root.below(t, nil)
	second.root = root.root
	return root.key
}

func FuzzKeyFile(f *testing.F) {
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		f.Fatal(err)
	}
	good := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	f.Add(good)
	f.Add(append(good, good...))
	f.Add(good[:len(good)-10])
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: der}))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := parseKey(data)
		if err == nil && (key == nil || issuance.CheckAuthorityKey(key.Public()) != nil) {
			t.Fatal("a key was accepted that is none")
		}
		if err != nil && !slices.Contains([]api.Reason{api.UpstreamFiles, api.UpstreamKeyEncrypted, api.UpstreamAlgorithm}, api.ReasonOf(err)) {
			t.Fatal(err)
		}
	})
}

func FuzzCertificateFile(f *testing.F) {
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		f.Fatal(err)
	}
	root, err := issuance.NewRoot(td, key, time.Hour, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	good := certsPEM(root)
	f.Add(good)
	f.Add(append(good, good...))
	f.Add(good[:len(good)-10])
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, err := parseCertificates("the file", data, maxChainPEM)
		if err == nil && (len(certs) == 0 || len(certs) > maxChainPEM) {
			t.Fatalf("%d certificates", len(certs))
		}
		if err != nil && api.ReasonOf(err) != api.UpstreamFiles {
			t.Fatal(err)
		}
	})
}
