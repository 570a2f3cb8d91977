package issuance

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// NewIntermediateCSR makes the request for an intermediate of td, proven by its own key: PKCS #10, DER. It asks for all
// that an upstream may copy: a subject of its own, the ID of the trust domain, a CA with path length 0, and where
// excludeNames is set, that DNS names and IP addresses are excluded. It asks for no key usage, which some upstreams compare
// with their own. Errors are those of CheckKey, and api.ConfigInvalid for an argument.
func NewIntermediateCSR(td spiffeid.TrustDomain, key crypto.Signer, excluded bool) ([]byte, error) {
	if key == nil {
		return nil, api.E(api.ConfigInvalid, "a request needs a key")
	}
	if excluded && !CanExcludeNames(td) {
		return nil, api.E(api.ConfigInvalid, "no SVID of this trust domain verifies under an authority that excludes names")
	}
	template, err := authorityTemplate(td, "intermediate", key.Public())
	if err != nil {
		return nil, err
	}
	template.MaxPathLenZero = true
	if excluded {
		excludeNames(template)
	}
	u, err := build(template, template, key.Public(), key.Public()) // for its extensions as crypto/x509 writes them
	if err != nil {
		return nil, api.Wrap(api.LintFailed, err, "the request could not be built")
	}
	r := &x509.CertificateRequest{Subject: template.Subject, URIs: template.URIs}
	for _, e := range u.preview.Extensions {
		if e.Id.Equal(oidBasicConstraints) || e.Id.Equal(oidNameConstraints) {
			r.ExtraExtensions = append(r.ExtraExtensions, e)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		return nil, api.Wrap(api.Internal, err, "the key did not sign its request")
	}
	return der, nil
}

// ParseIntermediateCSR returns the key of a request for an intermediate of td, for upstreams that sign themselves. What
// else it asks for is theirs to decide. The errors are api.CSRTooLarge, api.CSRMalformed, api.CSRSignature where the key
// is not proven, api.IDMismatch where it is not of td, and those of CheckKey.
func ParseIntermediateCSR(der []byte, td spiffeid.TrustDomain) (crypto.PublicKey, error) {
	if len(der) > api.MaxCSRBytes {
		return nil, api.E(api.CSRTooLarge, "the request has %d bytes, at most %d are read", len(der), api.MaxCSRBytes)
	}
	r, err := splitRequest(der)
	if err != nil {
		return nil, api.E(api.CSRMalformed, "the request is not exactly one PKCS#10 request in DER")
	}
	pub, err := parseRequestKey(r.spki, Keys{Ed25519: true})
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, api.E(api.CSRMalformed, "the request does not parse")
	}
	if len(parsed.URIs) != 1 || parsed.URIs[0].String() != td.IDString() || td.Name() == "" {
		return nil, api.E(api.IDMismatch, "the request is not for the trust domain")
	}
	if err := checkPossession(pub, r.algorithm.FullBytes, r.info.FullBytes, r.signature); err != nil {
		return nil, err
	}
	return pub, nil
}

// Fingerprint is the SHA-256 of a key's SubjectPublicKeyInfo in lower-case hex; empty for a key that does not encode.
func Fingerprint(pub crypto.PublicKey) string {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// A CrossCheck is the cross certificate that an upstream answered with, and what it is to connect.
type CrossCheck struct {
	TrustDomain spiffeid.TrustDomain
	Cross       *x509.Certificate
	Older       *x509.Certificate // that signed it
	Newer       *x509.Certificate // whose subject and key it has
}

// CheckCross reports whether a cross certificate leads those who hold only the older root to what is issued under the newer
// one: its subject, key and key identifier are the newer root's, it is signed by the older one and names its key, it may
// sign authorities with a path length of exactly 1, it is of the trust domain, admits SVIDs, and is valid now. The error is
// api.UpstreamCross; nothing of the answer is in its text.
func CheckCross(r CrossCheck, now time.Time) error {
	if err := checkCross(r, now); err != nil {
		return api.Wrap(api.UpstreamCross, err, "the cross certificate "+err.Error())
	}
	return nil
}

func checkCross(r CrossCheck, now time.Time) error {
	c := r.Cross
	if c == nil || r.Older == nil || r.Newer == nil {
		return errors.New("or a root that it connects is not there")
	}
	switch {
	case c.Equal(r.Newer) || c.Equal(r.Older) || r.Newer.Equal(r.Older):
		return errors.New("is one of the roots, or they are one")
	case !sameKey(c.PublicKey, r.Newer.PublicKey):
		return errors.New("is not for the newer root's key")
	case !bytes.Equal(c.RawSubject, r.Newer.RawSubject) || hasEmptySubject(c):
		return errors.New("does not have the newer root's subject")
	case len(c.SubjectKeyId) == 0 || !bytes.Equal(c.SubjectKeyId, r.Newer.SubjectKeyId):
		return errors.New("does not have the newer root's key identifier")
	case !bytes.Equal(c.AuthorityKeyId, r.Older.SubjectKeyId):
		return errors.New("does not name the older root's key")
	case maxPathLen(c) != 1:
		return errors.New("does not have a path length of 1")
	case sameTrustDomain(c, r.TrustDomain) != nil:
		return errors.New("has the ID of something else than the trust domain")
	case !signedBy(c, r.Older):
		return errors.New("is not signed by the older root")
	}
	path := []*x509.Certificate{c, r.Older}
	for i, p := range path {
		if err := checkPathCertificate(p, i+1, i == 1); err != nil { // an intermediate is below it
			return err
		}
	}
	workload, err := spiffeid.FromSegments(r.TrustDomain, "probe")
	if err != nil {
		return err
	}
	if admits(path, workload, nil) != nil {
		return errors.New("or the older root constrains names so that SVIDs do not verify")
	}
	if err := verifyPath(path, now); err != nil {
		return errors.New("does not verify, or not now")
	}
	return nil
}
