package issuance

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// A Warning names a weakness of an intermediate that its upstream chose and that the CA can live with.
type Warning string

// The warnings.
const (
	WarnPathLength     Warning = "path-length"            // it may sign further authorities
	WarnNames          Warning = "names-not-excluded"     // it may vouch for DNS names although none are issued
	WarnURIConstraints Warning = "uri-name-constraints"   // some verifiers reject every chain with such a constraint
	WarnNoID           Warning = "no-trust-domain-id"     // it does not say which trust domain it is of
	WarnNotAfter       Warning = "outlives-its-authority" // leaves are cut to the shorter life of an authority above it
)

// Text says what a warning is about.
func (w Warning) Text() string {
	switch w {
	case WarnPathLength:
		return "the intermediate has no path length of 0, so it may sign further authorities"
	case WarnNames:
		return "the intermediate does not exclude DNS names and IP addresses, although none are issued"
	case WarnURIConstraints:
		return "an authority above the SVIDs constrains URIs, and rustls and pyca/cryptography reject every such chain"
	case WarnNoID:
		return "the intermediate does not carry the ID of the trust domain"
	case WarnNotAfter:
		return "the intermediate outlives an authority above it, whose end is the end of its SVIDs too"
	}
	return string(w)
}

// An IntermediateCheck is what an upstream answered, and what was wanted of it.
type IntermediateCheck struct {
	TrustDomain spiffeid.TrustDomain
	PublicKey   crypto.PublicKey    // that was to be certified
	Chain       []*x509.Certificate // as it came: the intermediate first, the rest in any order, perhaps with the root
	Roots       []*x509.Certificate // that it may lead to
	Authorities []*x509.Certificate // that are in use, besides: no subject of theirs may be the intermediate's
	MinLifetime time.Duration       // from now; less is refused
	Skew        time.Duration       // by which the upstream's clock may be ahead
	DNSNames    []string            // that leaves may have; nil when none are issued
}

// An Intermediate passed its check.
type Intermediate struct {
	Chain     []*x509.Certificate // to present after a leaf: the intermediate first, in order, without the root
	Root      *x509.Certificate
	NotBefore time.Time // of the last to become valid: at most IntermediateCheck.Skew from now
	NotAfter  time.Time // of the first to expire, the root included
	Warnings  []Warning
}

// LeastLife is for how long an intermediate under root has to be valid at least where the longest SVID lives for longest: for two of
// those, but the root's own end is not the fault of those below it.
func LeastLife(longest time.Duration, root *x509.Certificate, now time.Time) time.Duration {
	return max(longest, min(2*longest, root.NotAfter.Sub(now)))
}

// CheckIntermediate checks an intermediate that came from an upstream, whatever the upstream promised. Each question has
// a reason of its own, in this order:
//
//   - the answer is a chain, once what it repeats is dropped (api.UpstreamAnswer);
//   - it is for the key that was sent, and that key is accepted (api.UpstreamKey);
//   - signatures lead from it to one of the roots (api.UpstreamChain), not to another (api.UpstreamRoot), and none of
//     them is weak (api.UpstreamAlgorithm);
//   - every certificate on the way may issue SVIDs for servers and clients, and the intermediate sign revocation lists as well
//     (api.UpstreamAuthority), with room for one below (api.UpstreamPathLength), and names the key that signed it; the
//     intermediate has a subject of its own, which no authority in use has (api.UpstreamSubject);
//   - it is of this trust domain and of no other (api.UpstreamTrustDomain), and no name constraint keeps SVIDs from
//     verifying (api.UpstreamConstraints);
//   - it is valid now, but for the skew (api.UpstreamClock), and for long enough (api.UpstreamLifetime);
//   - crypto/x509 verifies the very same path (api.UpstreamChain).
//
// That an SVID below it verifies is shown by issuing one, which needs the key: api.UpstreamProbe is the caller's. Nothing
// of the answer is in the text of an error.
func CheckIntermediate(r IntermediateCheck, now time.Time) (*Intermediate, error) {
	good, err := checkIntermediate(r, now)
	return good, refusal(err)
}

func checkIntermediate(r IntermediateCheck, now time.Time) (*Intermediate, error) {
	chain, err := distinct(r.Chain)
	if err != nil {
		return nil, err
	}
	c := chain[0]
	if !sameKey(r.PublicKey, c.PublicKey) {
		return nil, flaw{api.UpstreamKey, "the intermediate is for another key than the one that was sent"}
	}
	if err := CheckKey(c.PublicKey, Keys{Ed25519: true}); err != nil {
		return nil, flaw{api.UpstreamKey, "the intermediate's key is not acceptable"}
	}
	path, err := climb(chain, r.Roots)
	if err != nil {
		return nil, err
	}
	if err := checkPath(r.TrustDomain, path, r.DNSNames); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(slices.Concat(r.Authorities, path[1:]), func(a *x509.Certificate) bool { return a != nil && bytes.Equal(a.RawSubject, c.RawSubject) }) {
		return nil, flaw{api.UpstreamSubject, "the intermediate has the subject of another authority"}
	}
	notBefore, notAfter := validity(path)
	left := notAfter.Sub(now)
	switch {
	case notBefore.After(now.Add(r.Skew)):
		return nil, flaw{api.UpstreamClock, fmt.Sprintf("the intermediate or an authority above it is valid only in %s", notBefore.Sub(now).Truncate(time.Second))}
	case left < 0:
		return nil, flaw{api.UpstreamLifetime, "the intermediate or an authority above it has expired"}
	case left < r.MinLifetime:
		return nil, flaw{api.UpstreamLifetime, fmt.Sprintf("the intermediate lives for %s, at least %s are needed", left.Truncate(time.Second), r.MinLifetime)}
	}
	at := now
	if notBefore.After(now) {
		at = notBefore
	}
	if err := verifyPath(path, at); err != nil {
		return nil, err
	}
	return &Intermediate{
		Chain:     path[:len(path)-1],
		Root:      path[len(path)-1],
		NotBefore: notBefore,
		NotAfter:  notAfter,
		Warnings:  warnings(path, r.DNSNames),
	}, nil
}

// checkPath reports whether leaves of td can be issued under path, which leads from an intermediate to a root. The names
// are DNS names that they will have. The error is a flaw.
func checkPath(td spiffeid.TrustDomain, path []*x509.Certificate, names []string) error {
	if err := checkTrustDomain(td); err != nil {
		return err
	}
	for i, c := range path {
		if err := checkPathCertificate(c, i, i == len(path)-1); err != nil {
			return fmt.Errorf("certificate %d of the path %w", i+1, err)
		}
		if i+1 < len(path) && len(path[i+1].SubjectKeyId) != 0 && (i == 0 || len(c.AuthorityKeyId) != 0) &&
			!bytes.Equal(c.AuthorityKeyId, path[i+1].SubjectKeyId) {
			return flaw{api.UpstreamSubject, fmt.Sprintf("certificate %d of the path names another issuer's key, or none", i+1)}
		}
	}
	c := path[0]
	if len(c.SubjectKeyId) == 0 || hasEmptySubject(c) || bytes.Equal(c.RawSubject, c.RawIssuer) {
		return flaw{api.UpstreamSubject, "the intermediate has no subject or no key identifier of its own"}
	}
	if sameTrustDomain(c, td) != nil {
		return flaw{api.UpstreamTrustDomain, "the intermediate has the ID of something else than the trust domain"}
	}
	workload, err := spiffeid.FromSegments(td, "probe")
	if err != nil {
		return err
	}
	if err := admits(path, workload, names); err != nil {
		return flaw{api.UpstreamConstraints, "an authority on the path constrains names so that SVIDs do not verify"}
	}
	return nil
}

// checkPathCertificate checks one certificate of a path, below which there are below authorities.
func checkPathCertificate(c *x509.Certificate, below int, root bool) error {
	switch {
	case isAuthority(c) != nil:
		return flaw{api.UpstreamAuthority, "is not an authority"}
	case signsCertificates(c) != nil:
		return flaw{api.UpstreamAuthority, "may not sign certificates"}
	case below == 0 && c.KeyUsage&x509.KeyUsageCRLSign == 0: // what is above has its own rules
		return flaw{api.UpstreamAuthority, "may not sign revocation lists"}
	case !root && keyUsageCritical(c) != nil:
		return flaw{api.UpstreamAuthority, "has a key usage that is not critical"}
	case !bothUsagesBelow(c):
		return flaw{api.UpstreamAuthority, "may not issue for both servers and clients"}
	case maxPathLen(c) >= 0 && maxPathLen(c) < below:
		return flaw{api.UpstreamPathLength, "has a path length that allows no SVID below"}
	case !root && !strongSignature(c.SignatureAlgorithm): // a root is trusted for itself, not for its signature
		return flaw{api.UpstreamAlgorithm, "is signed with an algorithm that is not accepted"}
	}
	if err := checkPathKey(c.PublicKey); err != nil {
		return flaw{api.UpstreamAlgorithm, err.Error()}
	}
	return nil
}

func warnings(path []*x509.Certificate, dnsNames []string) []Warning {
	c := path[0]
	var w []Warning
	if maxPathLen(c) != 0 {
		w = append(w, WarnPathLength)
	}
	if dnsNames == nil && !slices.ContainsFunc(path, excludesNames) {
		w = append(w, WarnNames)
	}
	if slices.ContainsFunc(path, func(c *x509.Certificate) bool { return len(c.PermittedURIDomains)+len(c.ExcludedURIDomains) > 0 }) {
		w = append(w, WarnURIConstraints)
	}
	if names := namesOf(c); names.err == nil && len(names.uris) == 0 {
		w = append(w, WarnNoID)
	}
	if _, notAfter := validity(path); notAfter.Before(c.NotAfter) {
		w = append(w, WarnNotAfter)
	}
	return w
}

func constrainsNames(c *x509.Certificate) bool { return extension(c, oidNameConstraints) != nil }

// excludesNames reports whether c excludes every DNS name and every address of both kinds.
func excludesNames(c *x509.Certificate) bool {
	var four, six bool
	for _, n := range c.ExcludedIPRanges {
		if ones, bits := n.Mask.Size(); ones == 0 {
			four, six = four || bits == 32, six || bits == 128
		}
	}
	return slices.Contains(c.ExcludedDNSDomains, "") && four && six
}

// CanExcludeNames reports whether SVIDs of td verify under an authority that excludes DNS names and IP addresses. They do
// not when the name of td reads as an IPv4 address: crypto/x509 compares URIs with constraints of every kind, and refuses
// to compare one with an address as its host.
func CanExcludeNames(td spiffeid.TrustDomain) bool {
	id, err := spiffeid.FromSegments(td, "probe")
	if err != nil || checkTrustDomain(td) != nil {
		return false
	}
	template := new(x509.Certificate)
	excludeNames(template)
	return probe(template, id, nil) == nil
}

// admits reports whether the name constraints along a path let a leaf with these names through.
func admits(path []*x509.Certificate, id spiffeid.ID, dnsNames []string) error {
	for _, c := range path {
		ext := extension(c, oidNameConstraints)
		if ext == nil {
			continue
		}
		if err := probe(&x509.Certificate{ExtraExtensions: []pkix.Extension{*ext}}, id, dnsNames); err != nil {
			return err
		}
	}
	return nil
}

// probe verifies a leaf with these names under an authority with the given constraints, both made for the occasion with a
// key that is forgotten at once. The rules are so the verifier's own, with all their corners, and not a copy of them.
func probe(authority *x509.Certificate, id spiffeid.ID, dnsNames []string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	at := time.Unix(0, 0).UTC()
	authority.SerialNumber, authority.Subject = newSerial(), pkix.Name{CommonName: "probe"}
	authority.NotBefore, authority.NotAfter = at, at
	authority.BasicConstraintsValid, authority.IsCA = true, true
	leaf := &x509.Certificate{
		SerialNumber: newSerial(), NotBefore: at, NotAfter: at,
		URIs: []*url.URL{id.URL()}, DNSNames: dnsNames,
	}
	root, err := selfSign(authority, authority, key)
	if err != nil {
		return err
	}
	if leaf, err = selfSign(leaf, root, key); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

func selfSign(template, parent *x509.Certificate, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
