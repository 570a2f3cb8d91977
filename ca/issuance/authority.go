package issuance

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"net"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// authorityBackdate is how long before now an authority becomes valid, for clocks that are behind.
const authorityBackdate = DefaultBackdate

// NewRoot makes a self-signed authority of td that lives for ttl. It has no path length constraint, a subject and a key
// identifier of its own, and the ID of the trust domain. The key must pass CheckKey; other errors are api.ConfigInvalid
// for an argument, api.LintFailed for an outcome that breaks a rule.
func NewRoot(td spiffeid.TrustDomain, key crypto.Signer, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	if ttl < time.Second {
		return nil, api.E(api.ConfigInvalid, "the lifetime of a root is not positive")
	}
	if key == nil {
		return nil, api.E(api.ConfigInvalid, "a root needs a key")
	}
	template, err := authorityTemplate(td, "root", key.Public())
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	template.NotBefore, template.NotAfter = now.Add(-authorityBackdate), now.Add(ttl).Truncate(time.Second)
	template.MaxPathLen = -1
	return signAuthority(template, template, key.Public(), key, LintRoot)
}

// An IntermediateRequest says what kind of intermediate a parent is to sign.
type IntermediateRequest struct {
	TrustDomain spiffeid.TrustDomain
	PublicKey   crypto.PublicKey
	NotAfter    time.Time // at the latest; the parent's own end comes first

	// ExcludeNames keeps the intermediate from vouching for any DNS name or IP address, whoever gets hold of its key. Set
	// it where CanExcludeNames allows and no DNS names are issued.
	ExcludeNames bool
}

// SignIntermediate makes an authority that may sign leaves only (path length 0), under parent. The key must pass CheckKey.
// Other errors are api.ConfigInvalid for an argument, api.UpstreamRefused for a parent that cannot sign it, and
// api.LintFailed for an outcome that breaks a rule.
func SignIntermediate(parent *x509.Certificate, parentKey crypto.Signer, r IntermediateRequest, now time.Time) (*x509.Certificate, error) {
	template, err := intermediateTemplate(parent, parentKey, r, now)
	if err != nil {
		return nil, err
	}
	c, err := signAuthority(template, parent, r.PublicKey, parentKey, LintIntermediate)
	if err != nil {
		return nil, err
	}
	if err := checkPath(r.TrustDomain, []*x509.Certificate{c, parent}, nil); err != nil {
		return nil, refusal(err)
	}
	return c, nil
}

// CheckParent reports whether the first certificate of path, which leads to a root, could now sign an intermediate of td
// below which SVIDs verify, and signs nothing: the intermediate is looked at as it would be, for a key that is forgotten at
// once, with all that is above it. The names are DNS names that SVIDs can get. The errors are those of SignIntermediate and,
// for what those above forbid, those of CheckIntermediate.
func CheckParent(path []*x509.Certificate, parentKey crypto.Signer, td spiffeid.TrustDomain, names []string, now time.Time) error {
	if len(path) == 0 {
		return api.E(api.UpstreamRefused, "there is no parent to sign")
	}
	parent := path[0]
	key, err := GenerateKey(KeyP256)
	if err != nil {
		return err
	}
	r := IntermediateRequest{TrustDomain: td, PublicKey: key.Public(), NotAfter: now.Add(time.Hour)}
	template, err := intermediateTemplate(parent, parentKey, r, now)
	if err != nil {
		return err
	}
	u, err := build(template, parent, r.PublicKey, parentKey.Public())
	if err != nil {
		return api.Wrap(api.LintFailed, err, "the authority could not be built")
	}
	if err := LintIntermediate(u.preview); err != nil {
		return err
	}
	return refusal(checkPath(td, slices.Concat([]*x509.Certificate{u.preview}, path), names))
}

// intermediateTemplate is the intermediate that parent is to sign.
func intermediateTemplate(parent *x509.Certificate, parentKey crypto.Signer, r IntermediateRequest, now time.Time) (*x509.Certificate, error) {
	if err := mayParent(parent, parentKey, 1, r.PublicKey, now); err != nil {
		return nil, err
	}
	if err := sameTrustDomain(parent, r.TrustDomain); err != nil {
		return nil, err
	}
	if !r.NotAfter.After(now) {
		return nil, api.E(api.ConfigInvalid, "the intermediate would end before it begins")
	}
	if r.ExcludeNames && !CanExcludeNames(r.TrustDomain) {
		return nil, api.E(api.ConfigInvalid, "no SVID of this trust domain verifies under an authority that excludes names")
	}
	template, err := authorityTemplate(r.TrustDomain, "intermediate", r.PublicKey)
	if err != nil {
		return nil, err
	}
	within(template, parent, r.NotAfter, now)
	template.MaxPathLenZero = true
	if r.ExcludeNames {
		excludeNames(template)
	}
	return template, nil
}

// CrossSign makes a certificate for root's subject and key that parent, an older root of the same trust domain, signs. In
// a chain behind an intermediate of root it leads those who hold only the older root to trust the intermediate. Its path
// length is 1. Both roots may be ones that an upstream made; the key of the newer must pass CheckKey. Never make one under a root that is
// suspected: it would keep that root's trust alive. The errors are those of SignIntermediate.
func CrossSign(td spiffeid.TrustDomain, parent *x509.Certificate, parentKey crypto.Signer, root *x509.Certificate, now time.Time) (*x509.Certificate, error) {
	if root == nil {
		return nil, api.E(api.ConfigInvalid, "there is no root to sign")
	}
	if err := mayParent(parent, parentKey, 2, root.PublicKey, now); err != nil {
		return nil, err
	}
	switch {
	case isAuthority(root) != nil || len(root.SubjectKeyId) == 0 || hasEmptySubject(root):
		return nil, api.E(api.ConfigInvalid, "the root to be cross-signed is no authority, or has no subject or key identifier")
	case !root.NotAfter.After(now):
		return nil, api.E(api.ConfigInvalid, "the root to be cross-signed has expired")
	}
	for _, c := range []*x509.Certificate{parent, root} {
		if err := sameTrustDomain(c, td); err != nil {
			return nil, err
		}
	}
	template, err := authorityTemplate(td, "root", root.PublicKey)
	if err != nil {
		return nil, err
	}
	within(template, parent, root.NotAfter, now)
	template.RawSubject, template.SubjectKeyId = root.RawSubject, root.SubjectKeyId
	template.MaxPathLen = 1
	return signAuthority(template, parent, root.PublicKey, parentKey, LintCross)
}

// CanCross returns the error that CrossSign would return for this parent, whatever the root; nil where it would sign.
func CanCross(td spiffeid.TrustDomain, parent *x509.Certificate, parentKey crypto.Signer, now time.Time) error {
	if err := mayParent(parent, parentKey, 2, nil, now); err != nil {
		return err
	}
	return sameTrustDomain(parent, td)
}

// mayParent refuses a parent that cannot sign an authority with pub, below which there are to be below-1 more.
func mayParent(parent *x509.Certificate, key crypto.Signer, below int, pub crypto.PublicKey, now time.Time) error {
	switch {
	case parent == nil || key == nil:
		return api.E(api.UpstreamRefused, "there is no parent to sign")
	case !sameKey(key.Public(), parent.PublicKey):
		return api.E(api.UpstreamRefused, "the parent's key does not belong to its certificate")
	case isAuthority(parent) != nil || signsCertificates(parent) != nil:
		return api.E(api.UpstreamRefused, "the parent may not sign certificates")
	case len(parent.SubjectKeyId) == 0 || hasEmptySubject(parent):
		return api.E(api.UpstreamRefused, "the parent has no subject or no key identifier to be found by")
	case maxPathLen(parent) >= 0 && maxPathLen(parent) < below:
		return api.E(api.UpstreamRefused, "the parent's path length allows no authority below it")
	case now.Before(parent.NotBefore) || !now.Before(parent.NotAfter):
		return api.E(api.UpstreamRefused, "the parent has expired or is not valid yet")
	case sameKey(pub, parent.PublicKey):
		return api.E(api.KeyReused, "the key is the parent's own")
	}
	return nil
}

// sameTrustDomain refuses an authority that says that it belongs to another trust domain than td. One that does not say is
// an upstream's, which serves what it serves.
func sameTrustDomain(c *x509.Certificate, td spiffeid.TrustDomain) error {
	names := namesOf(c)
	if names.err == nil && len(names.uris) == 0 {
		return nil
	}
	if theirs, err := names.trustDomain(); err != nil || theirs != td {
		return api.E(api.ConfigInvalid, "the authorities belong to different trust domains")
	}
	return nil
}

// authorityTemplate is what every authority of td has. Verifiers look for an issuer by its subject and try each that has
// it, so no two authorities have the same: the random serial number in the name sees to that.
func authorityTemplate(td spiffeid.TrustDomain, role string, pub crypto.PublicKey) (*x509.Certificate, error) {
	if err := checkTrustDomain(td); err != nil {
		return nil, api.Wrap(api.ConfigInvalid, err, err.Error())
	}
	if err := CheckKey(pub, Keys{Ed25519: true}); err != nil {
		return nil, err
	}
	spki, err := encodeKey(pub)
	if err != nil {
		return nil, api.Wrap(api.KeyType, err, "the key does not encode")
	}
	id, err := keyID(spki)
	if err != nil {
		return nil, api.Wrap(api.Internal, err, "the key does not decode")
	}
	name := td.Name() + " " + role
	if len(name) > 64 { // RFC 5280 appendix A.1, ub-common-name; half a name would read like another's
		name = "Signet " + role
	}
	var unique [8]byte
	rand.Read(unique[:])
	return &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{Organization: []string{"Signet"}, CommonName: name, SerialNumber: hex.EncodeToString(unique[:])},
		URIs:                  []*url.URL{td.ID().URL()},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          id,
	}, nil
}

// within sets the lifetime of an authority from now to notAfter, as far as its parent lives.
func within(template, parent *x509.Certificate, notAfter, now time.Time) {
	template.NotBefore = now.UTC().Truncate(time.Second).Add(-authorityBackdate)
	if template.NotBefore.Before(parent.NotBefore) {
		template.NotBefore = parent.NotBefore
	}
	template.NotAfter = notAfter.UTC().Truncate(time.Second)
	if template.NotAfter.After(parent.NotAfter) {
		template.NotAfter = parent.NotAfter
	}
}

// excludeNames excludes every DNS name and every IP address. Names of URI type are not constrained: two verifiers in use
// reject any chain with such a constraint.
func excludeNames(template *x509.Certificate) {
	template.PermittedDNSDomainsCritical = true // of the whole extension
	template.ExcludedDNSDomains = []string{""}  // the empty suffix, which every name has (RFC 5280 section 4.2.1.10)
	template.ExcludedIPRanges = []*net.IPNet{
		{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	}
}

// signAuthority builds an authority, lints it, signs it, and checks the outcome.
func signAuthority(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer, check func(*x509.Certificate) error) (*x509.Certificate, error) {
	u, err := build(template, parent, pub, key.Public())
	if err != nil {
		return nil, api.Wrap(api.LintFailed, err, "the authority could not be built")
	}
	if err := check(u.preview); err != nil {
		return nil, err
	}
	c, err := u.sign(key)
	if err != nil {
		return nil, api.Wrap(api.UpstreamRefused, err, "the parent's key did not sign")
	}
	if parent == template {
		parent = c // self-signed
	}
	if err := c.CheckSignatureFrom(parent); err != nil {
		return nil, api.Wrap(api.LintFailed, err, "the fresh authority does not verify under its parent")
	}
	if err := check(c); err != nil {
		return nil, err
	}
	return c, nil
}
