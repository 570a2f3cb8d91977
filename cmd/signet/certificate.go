package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// The extensions that are read beyond what crypto/x509 keeps of them (RFC 5280 sections 4.2.1.3 and 4.2.1.6).
const (
	oidKeyUsage       = "2.5.29.15"
	oidSubjectAltName = "2.5.29.17"
)

// maxRSABits is above what anybody uses, and low enough that one check of a signature stays cheap.
const maxRSABits = 8192

// A certView is one certificate.
type certView struct {
	Subject        string   `json:"subject"`
	Issuer         string   `json:"issuer"`
	Serial         string   `json:"serial"` // lower-case hex
	NotBefore      string   `json:"notBefore"`
	NotAfter       string   `json:"notAfter"`
	Key            string   `json:"key"` // "ECDSA P-256" and the like
	Signature      string   `json:"signature"`
	IsCA           bool     `json:"isCA"`
	KeyUsage       []string `json:"keyUsage,omitempty"`
	ExtKeyUsage    []string `json:"extKeyUsage,omitempty"`
	URIs           []string `json:"uris,omitempty"` // as they stand in the certificate, not normalised
	DNSNames       []string `json:"dnsNames,omitempty"`
	IPs            []string `json:"ips,omitempty"`
	Emails         []string `json:"emails,omitempty"`
	KeyID          string   `json:"keyID,omitempty"`
	AuthorityKeyID string   `json:"authorityKeyID,omitempty"`
	SHA256         string   `json:"sha256"`
	PEM            string   `json:"pem"`
}

func newCertView(c *x509.Certificate) certView {
	sum := sha256.Sum256(c.Raw)
	v := certView{
		Subject:        c.Subject.String(),
		Issuer:         c.Issuer.String(),
		Serial:         serialOf(c),
		NotBefore:      stamp(c.NotBefore),
		NotAfter:       stamp(c.NotAfter),
		Key:            keyName(c.PublicKey),
		Signature:      c.SignatureAlgorithm.String(),
		IsCA:           c.IsCA,
		KeyUsage:       keyUsages(c.KeyUsage),
		ExtKeyUsage:    extKeyUsages(c),
		URIs:           rawURIs(c),
		DNSNames:       c.DNSNames,
		Emails:         c.EmailAddresses,
		KeyID:          hex.EncodeToString(c.SubjectKeyId),
		AuthorityKeyID: hex.EncodeToString(c.AuthorityKeyId),
		SHA256:         hex.EncodeToString(sum[:]),
		PEM:            pemOf(c),
	}
	for _, ip := range c.IPAddresses {
		v.IPs = append(v.IPs, ip.String())
	}
	return v
}

func pemOf(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func serialOf(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }

// keyName names type and size of a public key.
func keyName(pub any) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return "unknown"
}

// costly reports whether c's key takes too long to check signatures with.
func costly(c *x509.Certificate) bool {
	k, ok := c.PublicKey.(*rsa.PublicKey)
	return ok && k.N.BitLen() > maxRSABits
}

func keyUsages(u x509.KeyUsage) []string {
	names := []string{"digitalSignature", "contentCommitment", "keyEncipherment", "dataEncipherment", "keyAgreement", "keyCertSign", "cRLSign",
		"encipherOnly", "decipherOnly"}
	var set []string
	for i, n := range names {
		if u&(1<<i) != 0 {
			set = append(set, n)
		}
	}
	return set
}

func extKeyUsages(c *x509.Certificate) []string {
	var set []string
	for _, u := range c.ExtKeyUsage {
		switch u {
		case x509.ExtKeyUsageAny:
			set = append(set, "any")
		case x509.ExtKeyUsageServerAuth:
			set = append(set, "serverAuth")
		case x509.ExtKeyUsageClientAuth:
			set = append(set, "clientAuth")
		default:
			set = append(set, u.OID().String())
		}
	}
	for _, oid := range c.UnknownExtKeyUsage {
		set = append(set, oid.String())
	}
	return set
}

// extension returns the value of an extension, and whether it is there and critical.
func extension(c *x509.Certificate, oid string) (value []byte, present, critical bool) {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.String() == oid })
	if i < 0 {
		return nil, false, false
	}
	return c.Extensions[i].Value, true, c.Extensions[i].Critical
}

// rawURIs returns the URI names as they were written. crypto/x509 keeps them as url.URL, whose String is not always
// what stood there, and a SPIFFE ID is never normalised.
func rawURIs(c *x509.Certificate) []string {
	value, _, _ := extension(c, oidSubjectAltName)
	var names cryptobyte.String
	in := cryptobyte.String(value)
	if !in.ReadASN1(&names, cbasn1.SEQUENCE) {
		return nil
	}
	var uris []string
	for !names.Empty() {
		var name cryptobyte.String
		var tag cbasn1.Tag
		if !names.ReadAnyASN1(&name, &tag) {
			return uris
		}
		if tag == cbasn1.Tag(6).ContextSpecific() {
			uris = append(uris, string(name))
		}
	}
	return uris
}
