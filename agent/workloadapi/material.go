package workloadapi

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// maxResponseBytes bounds a response: gRPC clients take no larger one unless they were told to.
const maxResponseBytes = 4 << 20

// material is what a workload has, as it crosses the wire: encoded once, shared by all its streams, never changed.
type material struct {
	identity *identity // nil while there is none
	trust    *trust    // nil until there is trust; never withdrawn
	svids    *response // nil without either of them
	bundles  *response // nil without trust
	refused  error
}

// response is one complete message.
type response struct {
	message    proto.Message
	digest     [sha256.Size]byte // equal digests are equal messages
	serial     string
	generation uint64
	hash       [sha256.Size]byte
	notAfter   time.Time // from when on the message must not be sent; zero: never
}

// identity is what is made of the SVIDs of a Snapshot.
type identity struct {
	td       spiffeid.TrustDomain
	svids    []*workload.X509SVID // without their bundles
	digest   [sha256.Size]byte
	serial   string
	notAfter time.Time // of the one that expires first
}

// trust is what is made of the bundles of a Snapshot.
type trust struct {
	td         spiffeid.TrustDomain
	own        []byte
	foreign    map[string][]byte // by the ID of their trust domain
	digest     [sha256.Size]byte
	generation uint64
	hash       [sha256.Size]byte
}

// current returns what the workload has now, and a channel that is closed when that has changed.
func (s *Server) current() (material, <-chan struct{}) {
	s.currentMu.Lock()
	defer s.currentMu.Unlock()
	snap, changed := s.cfg.Source.Get()
	if snap != s.seen && snap != nil {
		s.seen = snap
		s.held = s.next(s.held, snap)
	}
	return s.held, changed
}

// next returns what follows m. What cannot be served does not replace what can.
func (s *Server) next(m material, snap *Snapshot) material {
	m.refused = snap.Refused
	if snap.Bundle != nil {
		if t, err := newTrust(snap); err == nil {
			m.trust = t
		} else {
			s.log.Error("trust bundle not served, keeping the last", "error", err)
		}
	}
	if len(snap.SVIDs) == 0 {
		m.identity = nil
	} else if i, err := newIdentity(snap.SVIDs); err == nil {
		m.identity = i
	} else {
		s.log.Error("identity not served, keeping the last", "error", err)
	}
	if m.trust == nil {
		return m
	}
	if r := m.trust.response(); fits(r) {
		m.bundles = r
	} else {
		s.log.Error("bundles not served, keeping the last", "error", errTooLarge())
	}
	switch {
	case m.identity == nil:
		m.svids = nil
	case m.identity.td != m.trust.td:
		s.log.Error("identity not served, keeping the last", "error", api.E(api.SVIDRejected, "the SVID is of another trust domain than the bundle"))
	default:
		if r := m.identity.response(m.trust); fits(r) {
			m.svids = r
		} else {
			s.log.Error("identity not served, keeping the last", "error", errTooLarge())
		}
	}
	return m
}

func fits(r *response) bool { return proto.Size(r.message) <= maxResponseBytes }

func errTooLarge() error {
	return api.E(api.BundleRejected, "the response would be larger than %d bytes, which clients do not take", maxResponseBytes)
}

// newIdentity encodes SVIDs in their order. It refuses with SVIDRejected what must never reach a workload: what is not an
// X509-SVID of its SPIFFE ID (SPIFFE X509-SVID sections 2 to 5), a key that is not the leaf's or cannot be exported, a root
// in the chain.
func newIdentity(svids []*x509svid.SVID) (*identity, error) {
	i := &identity{}
	h := sha256.New()
	for n, svid := range svids {
		certs, chain, key, err := checkSVID(svid)
		if err != nil {
			return nil, err
		}
		leaf := certs[0]
		if n == 0 {
			i.td, i.serial, i.notAfter = svid.ID.TrustDomain(), hex.EncodeToString(leaf.SerialNumber.Bytes()), leaf.NotAfter
		}
		if svid.ID.TrustDomain() != i.td {
			return nil, api.E(api.SVIDRejected, "the SVIDs are of different trust domains")
		}
		if leaf.NotAfter.Before(i.notAfter) {
			i.notAfter = leaf.NotAfter
		}
		add(h, []byte(svid.ID.String()))
		add(h, chain) // and so the key, whose public half is in it
		i.svids = append(i.svids, &workload.X509SVID{SpiffeId: svid.ID.String(), X509Svid: chain, X509SvidKey: key})
	}
	h.Sum(i.digest[:0])
	return i, nil
}

// checkSVID returns the chain, leaf first, also as concatenated DER, and the key as PKCS#8 DER.
func checkSVID(svid *x509svid.SVID) (certs []*x509.Certificate, chain, key []byte, err error) {
	if svid == nil || len(svid.Certificates) == 0 || svid.PrivateKey == nil {
		return nil, nil, nil, api.E(api.SVIDRejected, "the SVID has no certificate or no key")
	}
	chain, key, err = svid.MarshalRaw()
	if err != nil {
		return nil, nil, nil, api.Wrap(api.SVIDRejected, err, "the private key cannot be exported")
	}
	// Parsing checks the leaf's names, usages and path, that the rest are authorities, and that the key is the leaf's.
	parsed, err := x509svid.ParseRaw(chain, key)
	if err != nil {
		return nil, nil, nil, api.Wrap(api.SVIDRejected, err, "the certificate is not an X509-SVID for this key")
	}
	if parsed.ID != svid.ID {
		return nil, nil, nil, api.E(api.SVIDRejected, "the certificate has another SPIFFE ID than the SVID")
	}
	if _, err := api.ParseWorkloadID(svid.ID.String()); err != nil {
		return nil, nil, nil, api.Wrap(api.SVIDRejected, err, "the SPIFFE ID is not one of a workload")
	}
	certs = parsed.Certificates
	for n, c := range certs {
		if bytes.Equal(c.RawSubject, c.RawIssuer) {
			return nil, nil, nil, api.E(api.SVIDRejected, "a root is in the chain")
		}
		if n > 0 && !bytes.Equal(certs[n-1].RawIssuer, c.RawSubject) {
			return nil, nil, nil, api.E(api.SVIDRejected, "the chain is not in order")
		}
	}
	return certs, chain, key, nil
}

// response makes the message of FetchX509SVID: each SVID with the bundle of its trust domain.
func (i *identity) response(t *trust) *response {
	m := &workload.X509SVIDResponse{FederatedBundles: t.foreign}
	for _, svid := range i.svids {
		m.Svids = append(m.Svids, &workload.X509SVID{
			SpiffeId: svid.SpiffeId, X509Svid: svid.X509Svid, X509SvidKey: svid.X509SvidKey, Bundle: t.own,
		})
	}
	return &response{
		message: m, digest: sha256.Sum256(append(i.digest[:], t.digest[:]...)),
		serial: i.serial, generation: t.generation, hash: t.hash, notAfter: i.notAfter,
	}
}

// newTrust encodes bundles. It refuses with BundleRejected an own bundle without authorities, an authority that is not one,
// and two bundles of one trust domain.
func newTrust(snap *Snapshot) (*trust, error) {
	t := &trust{td: snap.Bundle.TrustDomain(), generation: snap.Generation, foreign: map[string][]byte{}}
	if snap.Bundle.Empty() {
		return nil, api.E(api.BundleRejected, "the trust bundle has no authority")
	}
	var err error
	if t.own, err = encode(snap.Bundle); err != nil {
		return nil, err
	}
	t.hash = api.BundleHash(snap.Bundle.X509Authorities())
	seen := map[spiffeid.TrustDomain]bool{t.td: true}
	for _, b := range snap.Federated {
		if b == nil {
			return nil, api.E(api.BundleRejected, "there is no bundle where there should be one")
		}
		if seen[b.TrustDomain()] {
			return nil, api.E(api.BundleRejected, "there are two trust bundles of one trust domain")
		}
		seen[b.TrustDomain()] = true
		if b.Empty() {
			continue
		}
		if t.foreign[b.TrustDomain().IDString()], err = encode(b); err != nil {
			return nil, err
		}
	}
	h := sha256.New()
	add(h, []byte(t.td.IDString()))
	add(h, t.own)
	for _, id := range slices.Sorted(maps.Keys(t.foreign)) {
		add(h, []byte(id))
		add(h, t.foreign[id])
	}
	h.Sum(t.digest[:0])
	return t, nil
}

// encode returns the authorities of a bundle as concatenated DER. Their order means nothing; one order makes equal bundles
// equal bytes.
func encode(b *x509bundle.Bundle) ([]byte, error) {
	var all [][]byte
	for _, c := range b.X509Authorities() {
		if !c.BasicConstraintsValid || !c.IsCA {
			return nil, api.E(api.BundleRejected, "the trust bundle holds a certificate that is not an authority")
		}
		all = append(all, c.Raw)
	}
	slices.SortFunc(all, bytes.Compare)
	return bytes.Join(all, nil), nil
}

// response makes the message of FetchX509Bundles.
func (t *trust) response() *response {
	m := &workload.X509BundlesResponse{Bundles: map[string][]byte{t.td.IDString(): t.own}}
	maps.Copy(m.Bundles, t.foreign)
	return &response{message: m, digest: t.digest, generation: t.generation, hash: t.hash}
}

// add adds one field to a digest, so that no two lists of fields look alike.
func add(h hash.Hash, field []byte) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(field)))
	h.Write(n[:])
	h.Write(field)
}
