package upstream

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

func init() { Register("selfsigned", openSelfsigned) }

const (
	defaultRootTTL = 10 * 365 * 24 * time.Hour
	minRootTTL     = 24 * time.Hour
)

// selfsigned is a root that Signet manages itself: its key lies sealed in the record and is opened only for the moment of
// a signature.
type selfsigned struct {
	sealer *ca.Sealer
	ttl    time.Duration
	key    issuance.KeyKind

	answers answers
}

func openSelfsigned(c Config, p Parts) (ca.Upstream, error) {
	if p.Sealer == nil {
		return nil, api.E(api.SealKeyMissing, "a self-managed root needs a seal key")
	}
	if c.TTL == 0 {
		c.TTL = defaultRootTTL
	}
	if c.TTL < minRootTTL {
		return nil, api.E(api.ConfigInvalid, "upstream.ttl of %s is shorter than %s", c.TTL, minRootTTL)
	}
	kind := issuance.KeyKind(c.Key)
	switch kind {
	case "":
		kind = issuance.KeyP256
	case issuance.KeyP256, issuance.KeyP384:
	default: // every verifier must know a root's key: there are Envoy builds without Ed25519
		return nil, api.E(api.ConfigInvalid, "upstream.key %.32q is not %s or %s", c.Key, issuance.KeyP256, issuance.KeyP384)
	}
	return &selfsigned{sealer: p.Sealer, ttl: c.TTL, key: kind}, nil
}

// Found implements ca.Founder.
func (s *selfsigned) Found(_ context.Context, td spiffeid.TrustDomain, now time.Time) (journal.Authority, error) {
	key, err := issuance.GenerateKey(s.key)
	if err != nil {
		return journal.Authority{}, err
	}
	root, err := issuance.NewRoot(td, key, s.ttl, now)
	if err != nil {
		return journal.Authority{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return journal.Authority{}, err
	}
	id := hex.EncodeToString(root.SubjectKeyId)
	return journal.Authority{ID: id, State: journal.Active, Certificate: root.Raw, SealedKey: s.sealer.Seal(der, sealContext(td, id))}, nil
}

// Mint implements ca.Upstream.
func (s *selfsigned) Mint(_ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
	return s.answers.once(r, time.Now(), func() ([]*x509.Certificate, error) {
		pub, err := issuance.ParseIntermediateCSR(r.CSR, r.TrustDomain)
		if err != nil {
			return nil, err
		}
		root, key, err := s.open(r.TrustDomain, r.Root)
		if err != nil {
			return nil, err
		}
		cert, err := issuance.SignIntermediate(root, key, issuance.IntermediateRequest{
			TrustDomain:  r.TrustDomain,
			PublicKey:    pub,
			NotAfter:     r.NotAfter,
			ExcludeNames: r.ExcludeNames,
		}, time.Now())
		if err != nil {
			return nil, err
		}
		return []*x509.Certificate{cert}, nil
	})
}

// WatchRoots implements ca.Upstream: every root of it is in the record.
func (*selfsigned) WatchRoots(ctx context.Context, _ func([]*x509.Certificate)) error {
	<-ctx.Done()
	return nil
}

// Probe implements ca.Upstream.
func (s *selfsigned) Probe(_ context.Context, td spiffeid.TrustDomain, root journal.Authority) error {
	cert, key, err := s.open(td, root)
	if err != nil {
		return err
	}
	return issuance.CheckParent([]*x509.Certificate{cert}, key, td, nil, time.Now())
}

// CrossSign implements ca.CrossSigner.
func (s *selfsigned) CrossSign(_ context.Context, td spiffeid.TrustDomain, older journal.Authority, newer *x509.Certificate) (*x509.Certificate, error) {
	cert, key, err := s.open(td, older)
	if err != nil {
		return nil, err
	}
	return issuance.CrossSign(td, cert, key, newer, time.Now())
}

// CanCross implements ca.CrossProber.
func (s *selfsigned) CanCross(_ context.Context, td spiffeid.TrustDomain, older journal.Authority) error {
	cert, key, err := s.open(td, older)
	if err != nil {
		return err
	}
	return issuance.CanCross(td, cert, key, time.Now())
}

// open returns a root and its key, which it must be the key of for anything to be signed.
func (s *selfsigned) open(td spiffeid.TrustDomain, a journal.Authority) (*x509.Certificate, crypto.Signer, error) {
	if len(a.SealedKey) == 0 {
		return nil, nil, api.E(api.UpstreamRoot, "the record holds no key of the active root: it lives in another upstream, and to leave that is a rotation")
	}
	cert, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return nil, nil, api.Wrap(api.StateCorrupt, err, "the root's certificate does not parse")
	}
	der, err := s.sealer.Open(a.SealedKey, sealContext(td, a.ID))
	if err != nil {
		return nil, nil, err
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, nil, api.E(api.StateCorrupt, "the root's key does not parse")
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, nil, api.E(api.StateCorrupt, "the root's key cannot sign")
	}
	return cert, key, nil
}

func sealContext(td spiffeid.TrustDomain, id string) string { return td.Name() + "/" + id }
