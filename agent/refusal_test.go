package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
)

// TestRefusalBeforeWrite: a CA that has refused the identity, and closed, before anything was written on the connection has refused it
// all the same: gRPC writes first, and closes without a read where that fails.
func TestRefusalBeforeWrite(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(64 << 10)
	defer l.Close()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		raw, err := l.Accept()
		if err != nil {
			return
		}
		config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}}
		tls.Server(raw, config).Handshake()
		raw.Close()
	}()
	raw, err := l.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	refused := new(atomic.Bool)
	conn, _, err := noteRefusal{credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}), refused}.ClientHandshake(t.Context(), "ca", raw)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	<-closed
	if _, err := conn.Write([]byte("preface")); err == nil {
		t.Fatal("the connection is closed, and takes what is written")
	}
	if !refused.Load() {
		t.Error("nobody has seen that the CA refused it")
	}
}
