package main

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
)

// A finding is one rule that a chain breaks.
type finding struct {
	Level       level  `json:"level"`
	Rule        string `json:"rule"`        // stable, to match on
	Certificate int    `json:"certificate"` // 1 is the leaf
	Message     string `json:"message"`
	Source      string `json:"source"` // where the rule is written
}

// A level tells what a finding means for the exit code.
type level string

// The levels.
const (
	levelError   level = "ERROR"   // verifiers must or do refuse it: exit code 3
	levelWarning level = "WARNING" // against a recommendation
)

// A rules run collects the findings of one certificate.
type rules struct {
	number int
	found  []finding
}

func (r *rules) breaks(rule, source, format string, args ...any) {
	r.found = append(r.found, finding{Level: levelError, Rule: rule, Certificate: r.number, Message: fmt.Sprintf(format, args...), Source: source})
}

func (r *rules) warns(rule, source, format string, args ...any) {
	r.breaks(rule, source, format, args...)
	r.found[len(r.found)-1].Level = levelWarning
}

// inspect checks certs, leaf first, against the rules of SPIFFE X509-SVID and of RFC 5280 that a verifier applies. Roots
// may be nil: then trust is not asked.
func inspect(certs, roots []*x509.Certificate, now time.Time) []finding {
	found := []finding{}
	for i, c := range certs {
		r := &rules{number: i + 1}
		if i == 0 {
			leafRules(r, c)
		} else {
			authorityRules(r, c, certs[0])
		}
		commonRules(r, c, now)
		if i+1 < len(certs) {
			linkRules(r, c, certs[i+1])
		}
		found = append(found, r.found...)
	}
	if roots != nil {
		r := &rules{number: 1}
		trustRules(r, certs, roots, now)
		found = append(found, r.found...)
	}
	return found
}

// leafRules are those of SPIFFE X509-SVID for what a workload shows.
func leafRules(r *rules, c *x509.Certificate) {
	switch uris := rawURIs(c); len(uris) {
	case 0:
		r.breaks("X-01", "X509-SVID 2", "there is no URI name, so no SPIFFE ID")
	case 1:
		idRules(r, uris[0])
	default:
		r.breaks("X-01", "X509-SVID 2", "there are %d URI names; an SVID has exactly one", len(uris))
	}
	if c.IsCA {
		r.breaks("X-08", "X509-SVID 4.1", "it is a CA certificate; a leaf must not be one")
	}
	leafUsageRules(r, c)
	if _, present, critical := extension(c, oidSubjectAltName); present && !critical && emptySubject(c) {
		r.breaks("X-04", "RFC 5280 4.2.1.6", "the subject is empty and the alternative name is not critical")
	}
}

func leafUsageRules(r *rules, c *x509.Certificate) {
	_, present, critical := extension(c, oidKeyUsage)
	switch {
	case !present:
		r.breaks("X-09", "X509-SVID 4.3", "there is no key usage")
	case !critical:
		r.breaks("X-09", "X509-SVID 4.3", "key usage is not critical")
	}
	if present && c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		r.breaks("X-10", "X509-SVID 4.3", "key usage has no digitalSignature")
	}
	if c.KeyUsage&x509.KeyUsageCertSign != 0 {
		r.breaks("X-10", "X509-SVID 4.3", "key usage has keyCertSign; a leaf signs no certificates")
	}
	if c.KeyUsage&x509.KeyUsageCRLSign != 0 {
		r.breaks("X-10", "X509-SVID 4.3", "key usage has cRLSign; a leaf signs no revocation lists")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
		r.warns("X-11", "X509-SVID 4.4", "there is no extended key usage; some servers and clients want one")
		return
	}
	for _, want := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if !hasUsage(c, want) {
			r.breaks("X-11", "X509-SVID 4.4", "extended key usage has no %s", want)
		}
	}
}

func hasUsage(c *x509.Certificate, want x509.ExtKeyUsage) bool {
	return slices.Contains(c.ExtKeyUsage, want)
}

func emptySubject(c *x509.Certificate) bool { return len(c.RawSubject) <= 2 } // an empty SEQUENCE

// idRules are those of SPIFFE-ID. go-spiffe decides; what it refuses is then sorted by the part that is wrong.
func idRules(r *rules, uri string) {
	const source = "SPIFFE-ID 2"
	if len(uri) > api.MaxIDBytes {
		r.breaks("ID-07", "SPIFFE-ID 2.3", "the SPIFFE ID has %d bytes; the limit is %d", len(uri), api.MaxIDBytes)
		return
	}
	id, err := spiffeid.FromString(uri)
	if err == nil {
		if id.Path() == "" {
			r.breaks("X-03", "X509-SVID 5.2", "the SPIFFE ID has no path: it names a trust domain, not a workload")
		}
		if n := len(id.TrustDomain().Name()); n > maxTrustDomain {
			r.breaks("ID-07", "SPIFFE-ID 2.3", "the trust domain has %d bytes; the limit is %d", n, maxTrustDomain)
		}
		return
	}
	scheme, rest, _ := strings.Cut(uri, "://")
	td, path, _ := strings.Cut(rest, "/")
	switch _, tdErr := spiffeid.TrustDomainFromString(td); {
	case !strings.EqualFold(scheme, "spiffe"), rest == "", td == "", strings.ContainsAny(uri, "?#"):
		r.breaks("ID-01", source, "%q is not a SPIFFE ID: %v", uri, err)
	case scheme != "spiffe", strings.ToLower(td) != td:
		r.breaks("ID-08", source, "%q is not written in lower case where it must be: %v", uri, err)
	case strings.ContainsAny(td, "@:"):
		r.breaks("ID-02", source, "%q has a user or a port: %v", uri, err)
	case tdErr != nil:
		r.breaks("ID-03", "SPIFFE-ID 2.1", "the trust domain of %q is malformed: %v", uri, err)
	case strings.Contains(path, "%"), strings.Trim(path, ".") == "", badSegments(path):
		r.breaks("ID-05", "SPIFFE-ID 2.2", "the path of %q is malformed: %v", uri, err)
	default:
		r.breaks("ID-06", "SPIFFE-ID 2.2", "the path of %q is malformed: %v", uri, err)
	}
}

// maxTrustDomain is the longest name of a trust domain in bytes (SPIFFE-ID section 2.3).
const maxTrustDomain = 255

func badSegments(path string) bool {
	for s := range strings.SplitSeq(path, "/") {
		if s == "" || s == "." || s == ".." {
			return true
		}
	}
	return false
}

// authorityRules are those for every certificate above the leaf.
func authorityRules(r *rules, c, leaf *x509.Certificate) {
	if !c.IsCA {
		r.breaks("X-05", "X509-SVID 4.1", "it stands above a leaf and is not a CA certificate")
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		r.breaks("X-05", "X509-SVID 4.3", "it stands above a leaf and its key usage has no keyCertSign")
	}
	if _, present, critical := extension(c, oidKeyUsage); present && !critical {
		r.breaks("X-09", "X509-SVID 4.3", "key usage is not critical")
	}
	uris := rawURIs(c)
	switch {
	case len(uris) == 0: // allowed: the URI of an authority is a recommendation
		return
	case len(uris) > 1:
		r.breaks("X-01", "X509-SVID 2", "there are %d URI names; there may be one", len(uris))
		return
	}
	id, err := spiffeid.FromString(uris[0])
	switch {
	case err != nil:
		idRules(r, uris[0])
	case id.Path() != "":
		r.breaks("X-06", "X509-SVID 3.2", "the SPIFFE ID of an authority has no path; this one is %q", id)
	default:
		if of, err := x509svid.IDFromCert(leaf); err == nil && of.TrustDomain() != id.TrustDomain() {
			r.breaks("ID-09", "SPIFFE-ID 2.1", "it is an authority of %s, not of %s", id.TrustDomain(), of.TrustDomain())
		}
	}
}

// commonRules are those for any certificate.
func commonRules(r *rules, c *x509.Certificate, now time.Time) {
	const source = "RFC 5280 4.1.2.5"
	switch {
	case now.After(c.NotAfter):
		r.breaks("EXPIRED", source, "it expired at %s, %s ago", stamp(c.NotAfter), until(now, c.NotAfter, ""))
	case now.Before(c.NotBefore):
		r.breaks("NOT-YET-VALID", source, "it is valid only from %s, in %s", stamp(c.NotBefore), until(c.NotBefore, now, ""))
	}
	if c.SerialNumber.Sign() <= 0 || len(c.SerialNumber.Bytes()) > 20 {
		r.breaks("SERIAL", "RFC 5280 4.1.2.2", "the serial number is not positive, or longer than 20 bytes")
	}
	switch c.SignatureAlgorithm {
	case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.ECDSAWithSHA1:
		r.breaks("WEAK-SIGNATURE", "RFC 9155", "it is signed with %s, which can be forged", c.SignatureAlgorithm)
	}
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() < 2048 {
			r.breaks("WEAK-KEY", "NIST SP 800-131A", "an RSA key of %d bits can be broken", k.N.BitLen())
		}
		if costly(c) {
			r.breaks("HUGE-KEY", "crypto/tls", "an RSA key of %d bits is refused by verifiers; its signatures were not checked", k.N.BitLen())
		}
	case *ecdsa.PublicKey:
		if k.Params().BitSize < 256 {
			r.breaks("WEAK-KEY", "NIST SP 800-131A", "%s can be broken", keyName(k))
		}
	}
}

// linkRules check that c was signed by the certificate behind it.
func linkRules(r *rules, c, issuer *x509.Certificate) {
	if costly(issuer) {
		return
	}
	if err := c.CheckSignatureFrom(issuer); err != nil {
		r.breaks("X-13", "RFC 5280 6.1", "it is not signed by the certificate behind it: %v", err)
	}
}

// trustRules verify the chain as a peer would, against the roots of its own trust domain.
func trustRules(r *rules, certs, roots []*x509.Certificate, now time.Time) {
	if slices.ContainsFunc(append(certs[:len(certs):len(certs)], roots...), costly) {
		r.breaks("X-13", "RFC 5280 6.1", "it was not verified: a key in the chain or the bundle is too large")
		return
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err == nil {
		_, _, err = x509svid.Verify(certs, x509bundle.FromX509Authorities(id.TrustDomain(), roots), x509svid.WithTime(now))
	}
	if err != nil {
		r.breaks("X-13", "X509-SVID 5.1", "it does not verify under the bundle: %v", err)
	}
}
