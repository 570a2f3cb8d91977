package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxRoots bounds a bundle; a rotation has three, and a hundred of one subject would make Go's verifier give up.
const maxRoots = 64

// Trust is the trust bundle at one generation. It is never changed once made.
type Trust struct {
	Generation api.Generation // zero for a bundle that came without one
	Hash       [sha256.Size]byte
	Bundle     *x509bundle.Bundle
}

// NewTrust returns a Trust of these roots; there must be at least one and at most 64, each a certificate that may sign
// certificates (SPIFFE X509-SVID section 4.1).
func NewTrust(td spiffeid.TrustDomain, g api.Generation, roots []*x509.Certificate) (*Trust, error) {
	if len(roots) == 0 || len(roots) > maxRoots {
		return nil, fmt.Errorf("a trust bundle of %d roots, want 1 to %d", len(roots), maxRoots)
	}
	for _, r := range roots {
		if !r.BasicConstraintsValid || !r.IsCA || r.KeyUsage != 0 && r.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, errors.New("a trust bundle with a certificate that is not an authority")
		}
	}
	return &Trust{Generation: g, Hash: api.BundleHash(roots), Bundle: x509bundle.FromX509Authorities(td, roots)}, nil
}

// ParseTrust reads a published bundle: the SPIFFE format, whose sequence is the generation, or PEM, which has none.
func ParseTrust(td spiffeid.TrustDomain, data []byte) (*Trust, error) {
	if block, _ := pem.Decode(data); block != nil {
		b, err := x509bundle.Parse(td, data)
		if err != nil {
			return nil, err
		}
		return NewTrust(td, api.Generation{}, b.X509Authorities())
	}
	return parseSPIFFE(td, data)
}

// parseSPIFFE reads the X.509 half of a bundle document (SPIFFE Trust Domain and Bundle section 4). It passes over what it
// does not know, as section 4.2 asks: go-spiffe refuses the whole document for one such entry, and a later version of the
// CA may well publish one.
func parseSPIFFE(td spiffeid.TrustDomain, data []byte) (*Trust, error) {
	var doc struct {
		Keys     []json.RawMessage `json:"keys"`
		Sequence uint64            `json:"spiffe_sequence"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for _, raw := range doc.Keys {
		var entry struct {
			Type         string   `json:"kty"`
			Use          string   `json:"use"`
			Certificates [][]byte `json:"x5c"` // base64 of DER (RFC 7517 section 4.7), as encoding/json has it
		}
		if json.Unmarshal(raw, &entry) != nil || entry.Use != "x509-svid" || len(entry.Certificates) == 0 {
			continue
		}
		switch entry.Type {
		case "EC", "RSA", "OKP":
		default:
			continue
		}
		c, err := x509.ParseCertificate(entry.Certificates[0])
		if err != nil {
			return nil, err
		}
		roots = append(roots, c)
	}
	return NewTrust(td, api.FromSequence(doc.Sequence), roots)
}

func trustFromProto(td spiffeid.TrustDomain, p *apiv1.Bundle) (*Trust, error) {
	if len(p.GetRoots()) > maxRoots {
		return nil, fmt.Errorf("a trust bundle of %d roots, want at most %d", len(p.GetRoots()), maxRoots)
	}
	var roots []*x509.Certificate
	for _, der := range p.GetRoots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		roots = append(roots, c)
	}
	t, err := NewTrust(td, api.Generation{Epoch: p.GetEpoch(), Number: p.GetNumber()}, roots)
	if err != nil {
		return nil, err
	}
	if string(p.GetHash()) != string(t.Hash[:]) {
		return nil, fmt.Errorf("the hash of the trust bundle does not fit its roots")
	}
	return t, nil
}

// applyTrust takes over a bundle from the CA if it follows from the one that is held. A lower generation is refused; the
// same one with other roots is an alarm; what cannot be used is refused too. None of them changes anything.
func (a *Agent) applyTrust(p *apiv1.Bundle) error {
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	held := a.trust.Load()
	next, err := follow(held, p)
	if err != nil {
		a.metrics.trustRefused.Inc()
		a.log.Error("trust bundle refused, keeping the one that is held", attrs(api.AsError(err))...)
		return err
	}
	if next != held || !a.trustKept {
		a.cacheTrust(next)
		a.trustKept = true
	}
	if next == held {
		return nil
	}
	a.take(next)
	a.log.Info("trust bundle applied", "generation", next.Generation.String(), "roots", len(next.Bundle.X509Authorities()))
	return nil
}

// take holds a bundle from now on. What is held under a root that is not in it is refused by everybody who has it as well, so that is
// renewed at once and not when it would be due. The caller holds trustMu.
func (a *Agent) take(next *Trust) {
	held := a.trust.Load()
	a.trust.Set(next)
	a.metrics.setTrust(next)
	a.touch()
	gone := map[string]bool{}
	for _, r := range held.Bundle.X509Authorities() {
		if !next.Bundle.HasX509Authority(r) {
			gone[hex.EncodeToString(r.SubjectKeyId)] = true
		}
	}
	if len(gone) == 0 {
		return
	}
	if n := a.hasten(gone, held.Bundle.X509Authorities(), goneWithin); n > 0 {
		a.log.Warn("a root is gone under which there are SVIDs: they are renewed now", "identities", n)
	}
}

// takePublished takes over the published bundle where it is of a higher generation than the one that is held, and reports whether it
// was. It is for an agent that was away while the root under which it knew the CA was removed: by the CA alone it would never learn of
// another one. The file is the one that was believed at its first start.
func (a *Agent) takePublished() bool {
	if a.cfg.Published == nil {
		return false
	}
	next, err := a.cfg.Published()
	if err != nil {
		a.log.Warn("the CA is not known by the bundle that is held, and the published one cannot be read", "error", err)
		return false
	}
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	held := a.trust.Load()
	if next.Generation.Sequence() <= held.Generation.Sequence() {
		return false
	}
	if !next.Generation.Believable(time.Now()) {
		a.log.Error("the published bundle has a generation which no CA can have come to: it is not taken", "generation", next.Generation.String())
		return false
	}
	a.cacheTrust(next)
	a.trustKept = true
	a.take(next)
	a.log.Warn("the CA is not known by the bundle that was held: took the published one", "held", held.Generation.String(), "generation", next.Generation.String())
	return true
}

// follow returns the bundle to hold after held: the one from the CA, or held itself where it is the same.
func follow(held *Trust, p *apiv1.Bundle) (*Trust, error) {
	next, err := trustFromProto(held.Bundle.TrustDomain(), p)
	if err != nil {
		return nil, api.Wrap(api.BundleRejected, err, fmt.Sprintf("the CA sent a trust bundle that cannot be used: %v", err))
	}
	was, is := held.Generation.Sequence(), next.Generation.Sequence()
	switch {
	case !next.Generation.Believable(time.Now()):
		return nil, api.E(api.BundleRejected, "the CA sent a trust bundle of generation %s, which no CA can have come to", next.Generation)
	case is < was:
		return nil, api.E(api.BundleRollback, "the CA sent the trust bundle of generation %s, generation %s is held", next.Generation, held.Generation)
	case is == was && next.Hash != held.Hash:
		return nil, api.E(api.BundleEquivocation, "the CA sent another trust bundle for generation %s than the one that is held", held.Generation)
	case is == was:
		return held, nil
	}
	return next, nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source with the newest bundle.
func (a *Agent) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return a.trust.Load().Bundle.GetX509BundleForTrustDomain(td)
}
