package controlplane

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-ca/signet/internal/canary"
)

// writeKeys makes the cluster's CA, the certificates of its components and of its administrator, and the key of its tokens.
func writeKeys(dir string, address netip.Addr) error {
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
		{"scheduler", "system:kube-scheduler", nil},
	} {
		cert := template(c.name, c.groups)
		if c.file == "apiserver" {
			cert.IPAddresses = append(cert.IPAddresses, address.AsSlice(), netip.MustParsePrefix(Services).Addr().Next().AsSlice())
			cert.DNSNames = []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
		}
		if err := certify(dir, c.file, cert, ca, caKey); err != nil {
			return err
		}
	}
	tokens, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	return writePEM(filepath.Join(dir, "sa.key"), "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(tokens))
}

// Certify writes a key and the certificate of a component with that name, of those groups, at that address, as FILE.key and
// FILE.crt in the control plane's folder.
func (c *ControlPlane) Certify(file, name string, groups []string, address netip.Addr) error {
	pair, err := tls.LoadX509KeyPair(filepath.Join(c.Dir, "ca.crt"), filepath.Join(c.Dir, "ca.key"))
	if err != nil {
		return err
	}
	cert := template(name, groups)
	cert.IPAddresses = []net.IP{address.AsSlice()}
	return certify(c.Dir, file, cert, pair.Leaf, pair.PrivateKey.(crypto.Signer))
}

func certify(dir, file string, cert, issuer *x509.Certificate, issuerKey crypto.Signer) error {
	key, err := canary.NewKey()
	if err != nil {
		return err
	}
	return writeCertificate(dir, file, cert, issuer, key, issuerKey)
}

func template(name string, groups []string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name, Organization: groups},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(72 * time.Hour), BasicConstraintsValid: true, // tests set clocks
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
