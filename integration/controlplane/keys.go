package controlplane

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-ca/signet/internal/canary"
)

// writeKeys makes the cluster's CA, the certificates of its components and of its administrator, and the key of its tokens.
func writeKeys(dir string) error {
	caKey, err := canary.NewKey()
	if err != nil {
		return err
	}
	ca := template("kubernetes", nil)
	ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign
	if err := writeCertificate(dir, "ca", ca, ca, caKey, caKey); err != nil {
		return err
	}
	for _, c := range []struct {
		file, name string
		groups     []string
	}{
		{"apiserver", "kube-apiserver", nil},
		{"admin", "admin", []string{"system:masters"}},
		{"controllers", "system:kube-controller-manager", nil},
	} {
		key, err := canary.NewKey()
		if err != nil {
			return err
		}
		if err := writeCertificate(dir, c.file, template(c.name, c.groups), ca, key, caKey); err != nil {
			return err
		}
	}
	tokens, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, "sa.key"), "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(tokens))
}

func template(name string, groups []string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name, Organization: groups},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
}

func writeCertificate(dir, file string, cert, issuer *x509.Certificate, key *ecdsa.PrivateKey, issuerKey crypto.Signer) error {
	der, err := x509.CreateCertificate(rand.Reader, cert, issuer, key.Public(), issuerKey)
	if err != nil {
		return err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, file)
	return errors.Join(writePEM(path+".crt", "CERTIFICATE", der), writePEM(path+".key", "EC PRIVATE KEY", private))
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
