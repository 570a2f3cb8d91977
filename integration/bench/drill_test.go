//go:build linux

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
)

// A secret is rid of a root when its bundle does not hold it, and its chain is not under it.
func TestRootIn(t *testing.T) {
	gone, other := newRoot(t), newRoot(t)
	inline := func(pem []byte) *core.DataSource {
		return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: pem}}
	}
	bundle := func(pems ...[]byte) *tlsv3.Secret {
		var all []byte
		for _, p := range pems {
			all = append(all, p...)
		}
		return &tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(all)}}}
	}
	chain := func(pem []byte) *tlsv3.Secret {
		return &tlsv3.Secret{Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(pem)}}}
	}
	for name, tt := range map[string]struct {
		secret *tlsv3.Secret
		in     bool
	}{
		"bundle with it":     {bundle(other.pem, gone.pem), true},
		"bundle without it":  {bundle(other.pem), false},
		"SVID under it":      {chain(gone.leaf), true},
		"SVID under another": {chain(other.leaf), false},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := proto.Marshal(tt.secret)
			if err != nil {
				t.Fatal(err)
			}
			if in, err := gone.in(b); err != nil || in != tt.in {
				t.Errorf("%v, %v; want %v", in, err, tt.in)
			}
		})
	}
	if _, err := gone.in([]byte("no secret")); err == nil {
		t.Error("what is no secret was read")
	}
}

// founded is a root with a leaf right under it.
type founded struct {
	root
	leaf []byte // PEM
}

func newRoot(t *testing.T) founded {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	sign := func(c, parent *x509.Certificate) []byte {
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: now, NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der := sign(ca, ca)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	leaf := sign(&x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: now, NotAfter: now.Add(time.Hour)}, cert)
	block := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	return founded{root{cert.SubjectKeyId, block(der)}, block(leaf)}
}

// What the bench decides on is what it says: nobody is waited for where all have acknowledged, everybody where nobody has.
func TestDecide(t *testing.T) {
	for _, late := range []bool{false, true} {
		var d decider
		if err := d.make(t.Context(), fleet{Agents: 3, Pods: 2, Late: late}); err != nil {
			t.Fatal(err)
		}
		if _, err := d.decide(); err != nil {
			t.Errorf("late: %v: %v", late, err)
		}
	}
}
