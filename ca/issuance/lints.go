package issuance

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/signet-ca/signet/api"
)

// A lint is one rule about one certificate. To add one, write its function and a row in the list it belongs to.
type lint struct {
	name  string
	rule  string            // where the rule stands
	house bool              // ours, stricter than the specifications: not asked of certificates of others
	check func(*look) error // says what is wrong, without names or keys of the certificate
}

// look is a certificate while it is looked at. Its names are read once, for all rules.
type look struct {
	*x509.Certificate
	names sanNames
}

func lookAt(c *x509.Certificate) *look { return &look{c, namesOf(c)} }

// LintLeaf checks a leaf against every rule for the SVIDs that Signet issues. The error is api.LintFailed and names each
// rule that is broken.
func LintLeaf(c *x509.Certificate) error { return apply(leafLints, lookAt(c), true) }

// LintRoot is LintLeaf for a self-signed authority that Signet makes.
func LintRoot(c *x509.Certificate) error {
	return apply(slices.Concat(authorityLints, rootLints), lookAt(c), true)
}

// LintIntermediate is LintLeaf for an authority that signs leaves and that Signet makes.
func LintIntermediate(c *x509.Certificate) error {
	return apply(slices.Concat(authorityLints, intermediateLints), lookAt(c), true)
}

// LintCross is LintLeaf for the certificate of a root that an older root signed.
func LintCross(c *x509.Certificate) error {
	return apply(slices.Concat(authorityLints, crossLints), lookAt(c), true)
}

// certificate is a rule that is asked elsewhere, too.
func certificate(rule func(*x509.Certificate) error) func(*look) error {
	return func(c *look) error { return rule(c.Certificate) }
}

func apply(lints []lint, c *look, house bool) error {
	var broken []string
	for _, l := range lints {
		if l.house && !house {
			continue
		}
		if err := l.check(c); err != nil {
			broken = append(broken, fmt.Sprintf("%s: %v (%s)", l.name, err, l.rule))
		}
	}
	if broken == nil {
		return nil
	}
	return api.E(api.LintFailed, "%s", strings.Join(broken, "; "))
}

// leafLints are the rules for a leaf. The first part is what X509-SVID asks of every issuer and every validator.
var leafLints = []lint{
	{"one-uri", "SPIFFE X509-SVID section 2", false, oneURI},
	{"workload-id", "SPIFFE X509-SVID sections 3.1, 5.2; SPIFFE-ID section 2", false, leafID},
	{"not-an-authority", "SPIFFE X509-SVID section 4.1", false, notAnAuthority},
	{"key-usage", "SPIFFE X509-SVID section 4.3", false, certificate(keyUsageCritical)},
	{"digital-signature", "SPIFFE X509-SVID section 4.3", false, digitalSignature},
	{"no-authority-usage", "SPIFFE X509-SVID section 4.3", false, noAuthorityUsage},
	{"both-extended-usages", "SPIFFE X509-SVID section 4.4", false, certificate(bothExtendedUsages)},
	{"critical-san", "SPIFFE X509-SVID section 3.1, RFC 5280 section 4.1.2.6", false, criticalSAN},
	{"signature-algorithm", "NIST SP 800-131A section 3", false, signatureAlgorithm},

	{"version", "RFC 5280 section 4.1.2.1", true, version3},
	{"basic-constraints", "RFC 5280 section 4.2.1.9", true, basicConstraints},
	{"key-usage-alone", "Signet profile", true, onlyDigitalSignature},
	{"extended-usages-alone", "Signet profile", true, onlyBothExtendedUsages},
	{"empty-subject", "Signet profile", true, emptySubject},
	{"serial", "RFC 5280 section 4.1.2.2", true, serial},
	{"other-names", "Signet profile", true, otherNames},
	{"key-identifiers", "RFC 5280 sections 4.2.1.1, 4.2.1.2; RFC 7093 section 2", true, keyIdentifiers},
	{"authority-key-identifier", "RFC 5280 section 4.2.1.1", true, authorityKeyIdentifier},
	{"lifetime", "Signet profile", true, leafLifetime},
	{"extensions", "Signet profile", true, leafExtensions},
}

var errURICount = errors.New("there is not exactly one URI")

func oneURI(c *look) error {
	_, err := c.names.uri()
	return err
}

func leafID(c *look) error {
	if _, err := c.names.workloadID(); err != nil {
		return errors.New("the URI is not the ID of a workload in canonical form") // whose, is nobody's business
	}
	return nil
}

func notAnAuthority(c *look) error {
	if c.IsCA {
		return errors.New("it is an authority")
	}
	return nil
}

func keyUsageCritical(c *x509.Certificate) error {
	if ext := extension(c, oidKeyUsage); ext == nil || !ext.Critical {
		return errors.New("key usage is missing or not critical")
	}
	return nil
}

func digitalSignature(c *look) error {
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("it may not sign in a handshake")
	}
	return nil
}

func noAuthorityUsage(c *look) error {
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("it may sign certificates or revocation lists")
	}
	return nil
}

func bothExtendedUsages(c *x509.Certificate) error {
	if extension(c, oidExtKeyUsage) != nil &&
		!(slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)) {
		return errors.New("it is not for both servers and clients")
	}
	return nil
}

func criticalSAN(c *look) error {
	if c.names.err == nil && hasEmptySubject(c.Certificate) && !c.names.critical {
		return errors.New("the subject is empty and the alternative name not critical")
	}
	return c.names.err
}

func signatureAlgorithm(c *look) error {
	if !strongSignature(c.SignatureAlgorithm) {
		return errors.New("the signature's algorithm is not accepted")
	}
	return nil
}

func version3(c *look) error {
	if c.Version != 3 {
		return errors.New("it is not of version 3")
	}
	return nil
}

func basicConstraints(c *look) error {
	if ext := extension(c.Certificate, oidBasicConstraints); ext == nil || !ext.Critical || !c.BasicConstraintsValid {
		return errors.New("basic constraints are missing or not critical")
	}
	return nil
}

func onlyDigitalSignature(c *look) error {
	if c.KeyUsage != x509.KeyUsageDigitalSignature {
		return errors.New("it has usages beside digitalSignature")
	}
	return nil
}

func onlyBothExtendedUsages(c *look) error {
	if len(c.ExtKeyUsage) != 2 || len(c.UnknownExtKeyUsage) != 0 {
		return errors.New("extended usages are not just the two")
	}
	return bothExtendedUsages(c.Certificate)
}

func emptySubject(c *look) error {
	if !hasEmptySubject(c.Certificate) {
		return errors.New("the subject is not empty")
	}
	return nil
}

func serial(c *look) error {
	if c.SerialNumber == nil || c.SerialNumber.Sign() <= 0 || len(c.SerialNumber.Bytes()) != serialBytes || c.SerialNumber.BitLen() > 8*serialBytes-1 {
		return fmt.Errorf("the serial number is not a positive one of %d bytes", serialBytes)
	}
	return nil
}

func otherNames(c *look) error {
	if c.names.err != nil {
		return c.names.err
	}
	if c.names.others != 0 {
		return errors.New("there are names beside one URI and DNS names")
	}
	return checkDNSNames(c.DNSNames)
}

func keyIdentifiers(c *look) error {
	if want, err := keyID(c.RawSubjectPublicKeyInfo); err != nil || !slices.Equal(want, c.SubjectKeyId) {
		return errors.New("the subject key identifier is missing or not that of the key")
	}
	return nil
}

func authorityKeyIdentifier(c *look) error {
	if len(c.AuthorityKeyId) == 0 || slices.Equal(c.AuthorityKeyId, c.SubjectKeyId) {
		return errors.New("the authority key identifier is missing or its own")
	}
	return nil
}

func leafLifetime(c *look) error {
	if d := c.NotAfter.Sub(c.NotBefore); d <= 0 || d > MaxTTL+MaxBackdate {
		return errors.New("the lifetime is not positive or too long")
	}
	return nil
}

func leafExtensions(c *look) error {
	return onlyExtensions(c.Certificate, oidSubjectAltName, oidKeyUsage, oidExtKeyUsage, oidBasicConstraints, oidSubjectKeyID, oidAuthorityKeyID)
}

var (
	oidSubjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidNameConstraints  = asn1.ObjectIdentifier{2, 5, 29, 30}
	oidAuthorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
)
