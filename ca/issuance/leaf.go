package issuance

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// Limits of a Profile, and what its zero values stand for. They hold whatever a configuration says.
const (
	DefaultTTL = time.Hour
	MinTTL     = 10 * time.Second
	MaxTTL     = 24 * time.Hour

	DefaultBackdate = 30 * time.Second
	MaxBackdate     = 2 * time.Minute

	DefaultRenewFrom = 0.3
	DefaultRenewTo   = 0.5
)

// A Profile says how long leaves live and when they are renewed. Its zero value is the default.
type Profile struct {
	TTL      time.Duration // from now to NotAfter; zero: DefaultTTL; at least MinTTL, at most MaxTTL
	Backdate time.Duration // from NotBefore to now, for clocks that are behind; zero: DefaultBackdate; at most MaxBackdate

	// RenewFrom and RenewTo are parts of the lifetime. The moment to renew is drawn evenly between them, so that leaves
	// that were issued together are not renewed together. Zero: DefaultRenewFrom, DefaultRenewTo. As long as RenewTo is at
	// most a half, at least half of the lifetime is left at whatever moment the CA goes away.
	RenewFrom, RenewTo float64
}

// resolve puts defaults in place of zeros. What is out of bounds is api.ConfigInvalid.
func (p Profile) resolve() (Profile, error) {
	p.TTL = cmp.Or(p.TTL, DefaultTTL)
	p.Backdate = cmp.Or(p.Backdate, DefaultBackdate)
	p.RenewFrom, p.RenewTo = cmp.Or(p.RenewFrom, DefaultRenewFrom), cmp.Or(p.RenewTo, DefaultRenewTo)
	switch {
	case p.TTL < MinTTL || p.TTL > MaxTTL:
		return p, api.E(api.ConfigInvalid, "the lifetime of SVIDs is not between %s and %s", MinTTL, MaxTTL)
	case p.Backdate < 0 || p.Backdate > MaxBackdate:
		return p, api.E(api.ConfigInvalid, "the backdate of SVIDs is not between 0s and %s", MaxBackdate)
	case !(0 < p.RenewFrom && p.RenewFrom <= p.RenewTo && p.RenewTo < 1): // as it stands, false for NaN
		return p, api.E(api.ConfigInvalid, "the renewal of SVIDs is not within their lifetime")
	}
	return p, nil
}

// A Request says whose key is to be certified. Every part of it comes from the CA: the ID from attestation, the key from
// a CSR that proved its possession, the DNS names from policy.
type Request struct {
	ID        spiffeid.ID
	PublicKey crypto.PublicKey // any type that CheckKey knows
	DNSNames  []string         // mostly none
}

// Prepared is a leaf that was built and checked and waits for its signature.
type Prepared struct {
	issuer   *Issuer
	unsigned *unsigned
	id       spiffeid.ID
	renewAt  time.Time
	spent    atomic.Bool // Sign was called
}

// Issued is a leaf that may leave the CA.
type Issued struct {
	Leaf    *x509.Certificate
	Chain   [][]byte // DER, the leaf first, without the root; not to be modified
	ID      spiffeid.ID
	RenewAt time.Time // when to ask for the next one
}

// Prepare builds the leaf for r under iss and checks it. It is to be valid from a little before now, for the profile's TTL
// but not beyond any certificate on the way to the root. Nothing is signed, and nothing is kept. The error is an
// *api.Error:
//
//   - api.SignerUnavailable when the issuer is expired or about to;
//   - api.IDMalformed, api.IDMismatch for an ID that is no workload's or of another trust domain;
//   - CheckKey's, or api.KeyReused for a key of an authority;
//   - api.ConfigInvalid for a profile out of bounds;
//   - api.LintFailed for a leaf that would break a rule, or whose DNS names the issuer must not sign.
func Prepare(p Profile, r Request, iss *Issuer, now time.Time) (*Prepared, error) {
	p, err := p.resolve()
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second) // all that a certificate can say
	if err := iss.usable(p.TTL, now); err != nil {
		return nil, err
	}
	if err := checkRequest(r, iss); err != nil {
		return nil, err
	}
	c, err := castOf(p, r, iss, now)
	if err != nil {
		return nil, err
	}
	u, err := iss.mold.pour(c)
	if err != nil {
		return nil, api.Wrap(api.LintFailed, err, "the certificate could not be built")
	}
	if err := checkLeaf(u.preview, r, iss, now); err != nil {
		return nil, err
	}
	lifetime := c.notAfter.Sub(now)
	return &Prepared{issuer: iss, unsigned: u, id: r.ID, renewAt: now.Add(p.DrawRenewal(lifetime))}, nil
}

// checkRequest refuses what must not be built at all.
func checkRequest(r Request, iss *Issuer) error {
	if _, err := api.ParseWorkloadID(r.ID.String()); err != nil {
		return api.E(api.IDMalformed, "the identity is not that of a workload")
	}
	if !r.ID.MemberOf(iss.td) {
		return api.E(api.IDMismatch, "the identity belongs to another trust domain than the intermediate")
	}
	if err := CheckKey(r.PublicKey, Keys{Ed25519: true}); err != nil {
		return err
	}
	isTheirs := func(c *x509.Certificate) bool { return sameKey(r.PublicKey, c.PublicKey) }
	if slices.ContainsFunc(iss.chain, isTheirs) || isTheirs(iss.root) {
		return api.E(api.KeyReused, "the key is that of an authority")
	}
	if len(r.DNSNames) > 0 && iss.constrained {
		if err := admits(iss.path, r.ID, r.DNSNames); err != nil {
			return api.Wrap(api.LintFailed, err, "the intermediate must not sign these DNS names")
		}
	}
	return nil
}

// castOf says everything that a leaf is.
func castOf(p Profile, r Request, iss *Issuer, now time.Time) (*cast, error) {
	spki, err := encodeKey(r.PublicKey) // not as it came: what else came with it would be signed, too
	if err != nil {
		return nil, api.Wrap(api.KeyType, err, "the key does not encode")
	}
	id, err := keyID(spki)
	if err != nil {
		return nil, api.Wrap(api.Internal, err, "the key does not decode")
	}
	notBefore, notAfter := now.Add(-p.Backdate).Truncate(time.Second), now.Add(p.TTL).Truncate(time.Second)
	if notBefore.Before(iss.notBefore) {
		notBefore = iss.notBefore
	}
	if notAfter.After(iss.notAfter) {
		notAfter = iss.notAfter
	}
	return &cast{
		serial:    drawSerial(),
		notBefore: notBefore,
		notAfter:  notAfter,
		spki:      spki,
		keyID:     id,
		dnsNames:  r.DNSNames,
		uri:       r.ID.String(),
	}, nil
}

// checkLeaf compares a leaf with what was asked for, with its issuer and with the clock, and lints it.
func checkLeaf(c *x509.Certificate, r Request, iss *Issuer, now time.Time) error {
	parent := iss.chain[0]
	look := lookAt(c)
	id, err := look.names.workloadID()
	switch {
	case err != nil || id != r.ID:
		return api.E(api.LintFailed, "the certificate is for another identity")
	case !sameKey(r.PublicKey, c.PublicKey):
		return api.E(api.LintFailed, "the certificate is for another key")
	case !slices.Equal(c.DNSNames, r.DNSNames):
		return api.E(api.LintFailed, "the certificate has other DNS names")
	case !bytes.Equal(c.RawIssuer, parent.RawSubject) || !bytes.Equal(c.AuthorityKeyId, parent.SubjectKeyId):
		return api.E(api.LintFailed, "the certificate names another issuer")
	case now.Before(c.NotBefore) || !now.Before(c.NotAfter):
		return api.E(api.LintFailed, "the certificate is not valid now")
	case c.NotBefore.Before(iss.notBefore) || c.NotAfter.After(iss.notAfter):
		return api.E(api.LintFailed, "the certificate outlives its issuer")
	}
	return apply(leafLints, look, true)
}

// DrawRenewal draws the time from issue to renewal, evenly between the parts of the lifetime that the profile names.
func (p Profile) DrawRenewal(lifetime time.Duration) time.Duration {
	from, to := cmp.Or(p.RenewFrom, DefaultRenewFrom), cmp.Or(p.RenewTo, DefaultRenewTo)
	var b [8]byte
	rand.Read(b[:])
	evenly := float64(binary.BigEndian.Uint64(b[:])>>11) / (1 << 53) // in [0, 1)
	return time.Duration((from + (to-from)*evenly) * float64(lifetime))
}

// Serial is the serial number, as SerialString writes it.
func (p *Prepared) Serial() string { return SerialString(p.unsigned.preview.SerialNumber) }

// Hash is the SHA-256 of the DER of the to-be-signed certificate: what the ledger holds before there is a signature, and
// what anybody can compute from the certificate afterwards (RFC 5280 section 4.1.2).
func (p *Prepared) Hash() [sha256.Size]byte { return sha256.Sum256(p.unsigned.tbs) }

// ID is the identity that the leaf is for.
func (p *Prepared) ID() spiffeid.ID { return p.id }

// NotBefore is the first moment of the leaf's validity, in whole seconds, UTC.
func (p *Prepared) NotBefore() time.Time { return p.unsigned.preview.NotBefore }

// NotAfter is the last moment of the leaf's validity, in whole seconds, UTC.
func (p *Prepared) NotAfter() time.Time { return p.unsigned.preview.NotAfter }

// Sign signs what was prepared, and releases it only if it is that and its signature verifies under the issuer, whose path
// was verified when the Issuer was made (RFC 5280 section 6.1). It works once, also when called concurrently and whatever
// the outcome: a second signature would be a second certificate of which the ledger has no record. The error is api.SignerUnavailable when the key failed,
// api.LintFailed when what came back is not good, api.Internal for a second call.
func (p *Prepared) Sign() (*Issued, error) {
	if p.spent.Swap(true) {
		return nil, api.E(api.Internal, "a prepared certificate can be signed only once")
	}
	leaf, err := p.unsigned.signChecked(p.issuer.key, p.issuer.chain[0])
	switch {
	case errors.Is(err, errBadSignature):
		return nil, api.Wrap(api.LintFailed, err, "the fresh certificate does not verify under its issuer")
	case err != nil:
		return nil, api.Wrap(api.SignerUnavailable, err, "the intermediate's key did not sign")
	}
	return &Issued{
		Leaf:    leaf,
		Chain:   append([][]byte{leaf.Raw}, p.issuer.der...),
		ID:      p.id,
		RenewAt: p.renewAt,
	}, nil
}
