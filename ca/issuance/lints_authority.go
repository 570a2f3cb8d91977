package issuance

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// authorityLints are the rules for every authority that Signet makes.
var authorityLints = []lint{
	{"authority", "SPIFFE X509-SVID section 4.1", false, certificate(isAuthority)},
	{"key-usage", "SPIFFE X509-SVID section 4.3", false, certificate(keyUsageCritical)},
	{"certificate-signing", "SPIFFE X509-SVID sections 3.2, 4.3", false, certificate(signsCertificates)},
	{"trust-domain-id", "SPIFFE X509-SVID section 3.2", false, authorityID},
	{"signature-algorithm", "NIST SP 800-131A section 3", false, signatureAlgorithm},

	{"version", "RFC 5280 section 4.1.2.1", true, version3},
	{"basic-constraints", "RFC 5280 section 4.2.1.9", true, basicConstraints},
	{"usages-alone", "SPIFFE X509-SVID section 3.2, appendix A", true, onlyAuthorityUsages},
	{"serial", "RFC 5280 section 4.1.2.2", true, serial},
	{"name-constraints", "RFC 5280 section 4.2.1.10", true, criticalConstraints},
	{"lifetime", "RFC 5280 section 4.1.2.5", true, authorityLifetime},
	{"extensions", "Signet profile", true, authorityExtensions},
}

var rootLints = []lint{
	{"own-subject", "Signet profile", true, ownSubject},
	{"key-identifiers", "RFC 5280 section 4.2.1.2; RFC 7093 section 2", true, keyIdentifiers},
	{"self-signed", "Signet profile", true, selfSigned},
	{"path-length", "Signet profile", true, pathLength(-1)},
}

var intermediateLints = []lint{
	{"own-subject", "Signet profile", true, ownSubject},
	{"key-identifiers", "RFC 5280 section 4.2.1.2; RFC 7093 section 2", true, keyIdentifiers},
	{"not-self-signed", "Signet profile", true, notSelfSigned},
	{"authority-key-identifier", "RFC 5280 section 4.2.1.1", true, authorityKeyIdentifier},
	{"path-length", "Signet profile", true, pathLength(0)},
}

// crossLints leave subject and key identifier alone: they are the root's, whoever made it.
var crossLints = []lint{
	{"not-self-signed", "Signet profile", true, notSelfSigned},
	{"authority-key-identifier", "RFC 5280 section 4.2.1.1", true, authorityKeyIdentifier},
	{"path-length", "Signet profile", true, pathLength(1)},
}

func isAuthority(c *x509.Certificate) error {
	if !c.BasicConstraintsValid || !c.IsCA {
		return errors.New("it is not an authority")
	}
	return nil
}

func signsCertificates(c *x509.Certificate) error {
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("it may not sign certificates")
	}
	return nil
}

func authorityID(c *look) error {
	_, err := c.names.trustDomain()
	return err
}

// onlyAuthorityUsages keeps an authority from being presented in a handshake: it could not sign there.
func onlyAuthorityUsages(c *look) error {
	if c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || extension(c.Certificate, oidExtKeyUsage) != nil {
		return errors.New("its usages are not just to sign certificates and revocation lists")
	}
	return nil
}

// ownSubject: verifiers find an issuer by its subject, and try every one that has it.
func ownSubject(c *look) error {
	if c.Subject.SerialNumber == "" || c.Subject.CommonName == "" {
		return errors.New("the subject has no common name or no serial number of its own")
	}
	return nil
}

func criticalConstraints(c *look) error {
	if ext := extension(c.Certificate, oidNameConstraints); ext != nil && !ext.Critical {
		return errors.New("name constraints are not critical")
	}
	return nil
}

func authorityLifetime(c *look) error {
	if !c.NotAfter.After(c.NotBefore) {
		return errors.New("the lifetime is not positive")
	}
	return nil
}

func authorityExtensions(c *look) error {
	return onlyExtensions(c.Certificate, oidSubjectAltName, oidKeyUsage, oidBasicConstraints, oidSubjectKeyID, oidAuthorityKeyID, oidNameConstraints)
}

func selfSigned(c *look) error {
	if !bytes.Equal(c.RawIssuer, c.RawSubject) || len(c.AuthorityKeyId) != 0 && !bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId) {
		return errors.New("issuer and subject differ")
	}
	return nil
}

func notSelfSigned(c *look) error {
	if bytes.Equal(c.RawIssuer, c.RawSubject) {
		return errors.New("issuer and subject are the same")
	}
	return nil
}

// pathLength wants a path length constraint of n; -1 stands for none.
func pathLength(n int) func(*look) error {
	return func(c *look) error {
		if maxPathLen(c.Certificate) != n {
			return errors.New("the path length constraint is wrong")
		}
		return nil
	}
}

// maxPathLen returns the path length constraint of an authority, -1 for none, which crypto/x509 has two values for.
func maxPathLen(c *x509.Certificate) int {
	if c.MaxPathLen == 0 && !c.MaxPathLenZero {
		return -1
	}
	return c.MaxPathLen
}

// trustDomain returns the trust domain whose ID, without a path, is the one URI of an authority.
func (n *sanNames) trustDomain() (spiffeid.TrustDomain, error) {
	uri, err := n.uri()
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	id, err := spiffeid.FromString(uri)
	if err != nil || id.Path() != "" || id.String() != uri {
		return spiffeid.TrustDomain{}, errors.New("the URI is not the ID of a trust domain")
	}
	return id.TrustDomain(), checkTrustDomain(id.TrustDomain())
}

func hasEmptySubject(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, []byte{0x30, 0}) }

func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) *pkix.Extension {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) })
	if i < 0 {
		return nil
	}
	return &c.Extensions[i]
}

// onlyExtensions refuses every extension but those. crypto/x509 has seen to it that none is there twice.
func onlyExtensions(c *x509.Certificate, oids ...asn1.ObjectIdentifier) error {
	for _, e := range c.Extensions {
		if !slices.ContainsFunc(oids, e.Id.Equal) {
			return errors.New("there is an extension that does not belong there")
		}
	}
	return nil
}
