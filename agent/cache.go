package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/durable"
)

// Cache keeps what an agent needs to serve at once after a restart, CA or no CA: SVIDs with their keys, the bundle, key
// sets and tokens. It holds keys, so it must never reach a disk. Methods are safe for concurrent use; Put replaces a
// whole entry or nothing. What is lost from a cache is only fetched again.
type Cache interface {
	// Put replaces the entry of that name.
	Put(name string, data []byte) error
	// Delete removes the entry of that name, if there is one.
	Delete(name string) error
	// All yields every entry; the data is nil where it cannot be read, or was open to others.
	All() iter.Seq2[string, []byte]
}

// DirCache is a Cache in a folder of mode 0700 on a tmpfs.
type DirCache struct{ dir string }

const (
	cacheSuffix   = ".json"
	maxCacheEntry = 1 << 20
)

// OpenDirCache returns the cache in dir, which is made where it is missing. It is refused with CacheUnsafe where it could
// reach a disk: not on a tmpfs, or on a machine with swap; lax (for development) turns that into the returned warning. What
// a killed process left half written is removed: dir belongs to one agent.
func OpenDirCache(dir string, lax bool) (c *DirCache, warning error, err error) {
	if err := durable.MkdirPrivate(dir); err != nil {
		return nil, nil, api.Wrap(api.FileUnsafe, err, fmt.Sprintf("the cache folder: %v", err))
	}
	if err := checkVolatile(dir); err != nil {
		unsafe := api.Wrap(api.CacheUnsafe, err, err.Error())
		if !lax {
			return nil, nil, unsafe
		}
		warning = unsafe
	}
	if err := durable.RemoveTemporary(dir); err != nil {
		return nil, nil, api.Wrap(api.FileUnsafe, err, fmt.Sprintf("the cache folder: %v", err))
	}
	return &DirCache{dir}, warning, nil
}

// Put implements Cache.
func (c *DirCache) Put(name string, data []byte) error {
	return durable.WriteFile(filepath.Join(c.dir, name+cacheSuffix), data, 0o600)
}

// Delete implements Cache.
func (c *DirCache) Delete(name string) error {
	err := os.Remove(filepath.Join(c.dir, name+cacheSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// All implements Cache.
func (c *DirCache) All() iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		entries, err := os.ReadDir(c.dir)
		if err != nil {
			return
		}
		for _, e := range entries {
			name, ok := strings.CutSuffix(e.Name(), cacheSuffix)
			if !ok {
				continue
			}
			data, err := durable.ReadPrivate(filepath.Join(c.dir, e.Name()), maxCacheEntry)
			if err != nil {
				data = nil
			}
			if !yield(name, data) {
				return
			}
		}
	}
}

// entry is what every entry is wrapped in: what was learnt in one trust domain is worth nothing in another.
type entry struct {
	TrustDomain string          `json:"trustDomain"`
	Content     json.RawMessage `json:"content"`
}

// Names of the entries; an identity's is "pod-" and a hash of its key.
const (
	entryTrust   = "trust"
	entrySelf    = "self"
	entryKeySets = "keysets"
	entryPod     = "pod-"
)

type cachedTrust struct {
	Sequence uint64   `json:"sequence"`
	Roots    [][]byte `json:"roots"`
}

type cachedSVID struct {
	Chain   [][]byte  `json:"chain"`
	Key     []byte    `json:"key"` // PKCS#8
	RenewAt time.Time `json:"renewAt"`
	Ticket  []byte    `json:"ticket,omitempty"` // an earlier build writes none, and reads none
}

type cachedIdentity struct {
	Issuer            string     `json:"issuer"`
	PodUID            string     `json:"podUID"`
	ServiceAccountUID string     `json:"serviceAccountUID"`
	Namespace         string     `json:"namespace"`
	PodName           string     `json:"podName"`
	EvidenceKind      string     `json:"evidenceKind"`
	Evidence          []byte     `json:"evidence"`
	EvidenceEnd       time.Time  `json:"evidenceEnd"`
	Volume            string     `json:"volume"`
	SVID              cachedSVID `json:"svid"`
}

func (a *Agent) cacheTrust(t *Trust) {
	c := cachedTrust{Sequence: t.Generation.Sequence()}
	for _, r := range t.Bundle.X509Authorities() {
		c.Roots = append(c.Roots, r.Raw)
	}
	a.put(entryTrust, c)
}

func (a *Agent) cacheSelf(c *credential) {
	if s, err := freeze(c.svid, c.renewAt, c.ticket); err == nil {
		a.put(entrySelf, s)
	}
}

func (a *Agent) cacheKeySets(k KeySets) { a.put(entryKeySets, k) }

func (a *Agent) cacheIdentity(id *Identity, h Held) {
	s, err := freeze(h.SVID, h.RenewAt, []byte(h.ticket))
	if err != nil {
		return
	}
	id.mu.Lock()
	c := cachedIdentity{
		Issuer: id.key.issuer, PodUID: id.key.podUID, ServiceAccountUID: id.key.serviceAccountUID,
		Namespace: id.pod.Namespace, PodName: id.pod.Name,
		EvidenceKind: id.proof.evidence.Kind, Evidence: id.proof.evidence.Data, EvidenceEnd: id.proof.end, Volume: id.proof.volume,
		SVID: s,
	}
	id.mu.Unlock()
	id.cacheMu.Lock()
	defer id.cacheMu.Unlock()
	if !id.dropped {
		a.put(id.entry(), c)
	}
}

// uncache removes an identity's entry; for ever where it is kept no more, whatever its last renewal would still write.
func (a *Agent) uncache(id *Identity, forEver bool) {
	if a.cfg.Cache == nil {
		return
	}
	id.cacheMu.Lock()
	defer id.cacheMu.Unlock()
	id.dropped = id.dropped || forEver
	if err := a.cfg.Cache.Delete(id.entry()); err != nil {
		a.log.Warn("cache entry not removed", "error", err)
	}
}

func (id *Identity) entry() string {
	h := sha256.Sum256([]byte(id.key.issuer + "\x00" + id.key.podUID + "\x00" + id.key.serviceAccountUID))
	return entryPod + hex.EncodeToString(h[:16])
}

// put writes an entry. A failure costs only the next restart its warmth, so it is said and not more.
func (a *Agent) put(name string, v any) {
	if a.cfg.Cache == nil {
		return
	}
	content, err := json.Marshal(v)
	var data []byte
	if err == nil {
		data, err = json.Marshal(entry{a.cfg.TrustDomain.Name(), content})
	}
	if err == nil {
		err = a.cfg.Cache.Put(name, data)
	}
	if err != nil {
		a.log.Warn("cache not written", "entry", name, "error", err)
	}
}

func freeze(s *x509svid.SVID, renewAt time.Time, ticket []byte) (cachedSVID, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.PrivateKey)
	if err != nil {
		return cachedSVID{}, err
	}
	c := cachedSVID{Key: key, RenewAt: renewAt, Ticket: ticket}
	for _, cert := range s.Certificates {
		c.Chain = append(c.Chain, cert.Raw)
	}
	return c, nil
}

// thaw returns an SVID that is good now. The error is ClockSkew where it will only be later.
func (a *Agent) thaw(c cachedSVID, now time.Time) (*x509svid.SVID, error) {
	s, err := a.check(c.Chain, c.Key, now)
	if err == nil {
		return s, nil
	}
	if certs, perr := parseChain(c.Chain); perr == nil && now.Before(certs[0].NotBefore) {
		if e := a.clockSkew(certs, "what is in the cache", now); e != nil {
			return nil, e
		}
	}
	return nil, err
}

// restore takes from the cache what is still good and deletes the rest, but what is not good yet. The bundle comes first, for everything else must
// verify under it; where there is none, it is the one to begin with.
func (a *Agent) restore(now time.Time) {
	entries := map[string][]byte{}
	if a.cfg.Cache != nil {
		entries = maps.Collect(a.cfg.Cache.All())
	}
	use := func(name string, restore func(content []byte) error) {
		data, ok := entries[name]
		if !ok {
			return
		}
		content, err := a.unwrap(data)
		if err == nil {
			err = restore(content)
		}
		if err == nil {
			return
		}
		a.log.Warn("cache entry not used", "entry", name, "error", err)
		if api.ReasonOf(err) == api.ClockSkew {
			return // a clock that is behind must not cost what will be good again once it is right
		}
		if err := a.cfg.Cache.Delete(name); err != nil {
			a.log.Warn("cache entry not removed", "entry", name, "error", err)
		}
	}
	use(entryTrust, a.restoreTrust)
	if a.trust.Load() == nil {
		if a.cfg.Trust == nil || !a.cfg.Trust.Generation.Believable(now) {
			return // without a bundle nothing else can be checked
		}
		a.trust.Set(a.cfg.Trust)
	}
	use(entryKeySets, a.restoreKeySets)
	use(entrySelf, func(content []byte) error { return a.restoreSelf(content, now) })
	for name := range entries {
		if strings.HasPrefix(name, entryPod) {
			use(name, func(content []byte) error { return a.restoreIdentity(content, now) })
		}
	}
	if len(entries) > 0 {
		a.log.Info("cache restored", "identities", len(a.identities), "generation", a.trust.Load().Generation.String())
	}
}

// unwrap returns the content of an entry of our trust domain.
func (a *Agent) unwrap(data []byte) ([]byte, error) {
	if data == nil {
		return nil, errors.New("it cannot be read, or was open to others")
	}
	var e entry
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, errors.New("it is damaged")
	}
	if e.TrustDomain != a.cfg.TrustDomain.Name() {
		return nil, errors.New("it belongs to another trust domain")
	}
	return e.Content, nil
}

func (a *Agent) restoreTrust(data []byte) error {
	var c cachedTrust
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	var roots []*x509.Certificate
	for _, der := range c.Roots {
		r, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		roots = append(roots, r)
	}
	t, err := NewTrust(a.cfg.TrustDomain, api.FromSequence(c.Sequence), roots)
	if err != nil {
		return err
	}
	a.trust.Set(t)
	a.trustKept = true
	return nil
}

func (a *Agent) restoreKeySets(data []byte) error {
	var k KeySets
	if err := json.Unmarshal(data, &k); err != nil {
		return err
	}
	v, err := a.cfg.Verifier(k)
	if err != nil {
		return err
	}
	a.verifier.Set(v)
	return nil
}

func (a *Agent) restoreSelf(data []byte, now time.Time) error {
	var c cachedSVID
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	s, err := a.thaw(c, now)
	if err != nil {
		return err
	}
	uid, ok := api.NodeUID(s.ID, a.cfg.TrustDomain)
	if !ok {
		return errors.New("it is not an agent's identity")
	}
	// It may be that of the pod before this one, and by its ticket only that could renew it while the API server is away: so it
	// is due at once, and kept as long as there is no other.
	a.self.Set(&credential{svid: s, nodeUID: uid, renewAt: now, ticket: c.Ticket})
	a.metrics.selfEnd.Set(float64(s.Certificates[0].NotAfter.Unix()))
	return nil
}

func (a *Agent) restoreIdentity(data []byte, now time.Time) error {
	var c cachedIdentity
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	s, err := a.thaw(c.SVID, now)
	if err != nil {
		return err
	}
	if api.IsReserved(s.ID) {
		return errors.New("it is not a workload's identity")
	}
	k := podKey{c.Issuer, c.PodUID, c.ServiceAccountUID}
	id := newIdentity(k, Pod{Namespace: c.Namespace, Name: c.PodName, UID: c.PodUID}, a)
	id.proof = proof{evidence: attestor.Evidence{Kind: c.EvidenceKind, Data: c.Evidence}, volume: c.Volume, end: c.EvidenceEnd}
	id.held.Set(Held{SVID: s, ticket: string(c.SVID.Ticket), RenewAt: c.SVID.RenewAt})
	id.given.Store(true)
	// What its clients have acknowledged went with the process before this one; they come back in a moment and say so.
	id.ended, id.endedUntil = &apiv1.Stream{WantsBundle: true, Ended: true}, now.Add(reconnects)
	a.identities[k] = id
	return nil
}
