package ca

import (
	"crypto/sha256"
	"maps"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// memory is what this replica remembers of what it did: which place each token serves, which identity each public key
// belongs to, which pods hold an SVID, and which nodes. Every entry ends by itself: a token's at its expiry, the others with the SVID.
// It is bounded by what was issued, and only attested requests reach it.
type memory struct {
	mu     sync.Mutex
	tokens map[string]place                // by issuer and jti
	keys   map[[sha256.Size]byte]keyHolder // by SHA-256 of the SubjectPublicKeyInfo
	pods   map[string]time.Time            // by issuer and pod UID: until when it holds an SVID
	nodes  map[nodeKey]*holder             // which hold SVIDs
}

// nodeKey tells nodes apart, over all clusters and for ever.
type nodeKey struct{ cluster, uid string }

// holder is a node, and until when the SVIDs are good that pods on it hold, by what they are for.
type holder struct {
	name string
	ids  map[spiffeid.ID]time.Time
}

type place struct {
	nodeUID, volume string
	until           time.Time
}

type keyHolder struct {
	id    spiffeid.ID
	until time.Time
}

func newMemory() *memory {
	return &memory{tokens: map[string]place{}, keys: map[[sha256.Size]byte]keyHolder{}, pods: map[string]time.Time{}, nodes: map[nodeKey]*holder{}}
}

// bindToken ties a token to one node and volume; TokenReplayedElsewhere when it is tied to another.
func (m *memory) bindToken(issuer, jti, nodeUID, volume string, until time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := issuer + "\x00" + jti
	if p, ok := m.tokens[k]; ok && (p.nodeUID != nodeUID || p.volume != volume) {
		return api.E(api.TokenReplayedElsewhere, "the token was already used on another node or volume")
	}
	m.tokens[k] = place{nodeUID, volume, until}
	return nil
}

// bindKey ties a public key to an identity until its SVID expires; KeyReused when an unexpired SVID of another identity
// has it.
func (m *memory) bindKey(spki [sha256.Size]byte, id spiffeid.ID, now, until time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	h, ok := m.keys[spki]
	if ok && h.id != id && now.Before(h.until) {
		return api.E(api.KeyReused, "the key was certified for another identity")
	}
	if until.After(h.until) || h.id != id {
		m.keys[spki] = keyHolder{id, until}
	}
	return nil
}

func (m *memory) notePod(issuer, uid string, until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods[issuer+"\x00"+uid] = until
}

// noteNode remembers that a pod on that node was issued an SVID.
func (m *memory) noteNode(k nodeKey, name string, id spiffeid.ID, until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.nodes[k]
	if h == nil {
		h = &holder{name, map[spiffeid.ID]time.Time{}}
		m.nodes[k] = h
	}
	if until.After(h.ids[id]) {
		h.ids[id] = until
	}
}

// holders calls f for each node that holds an SVID of this replica which has not expired; f must not keep ids.
func (m *memory) holders(now time.Time, f func(k nodeKey, name string, ids map[spiffeid.ID]time.Time)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweepNodes(now)
	for k, h := range m.nodes {
		f(k, h.name, h.ids)
	}
}

// sweepNodes forgets what has expired; the caller holds mu.
func (m *memory) sweepNodes(now time.Time) {
	for k, h := range m.nodes {
		maps.DeleteFunc(h.ids, func(_ spiffeid.ID, until time.Time) bool { return !now.Before(until) })
		if len(h.ids) == 0 {
			delete(m.nodes, k)
		}
	}
}

// holds reports whether this replica issued an SVID to the pod that has not expired.
func (m *memory) holds(issuer, uid string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return now.Before(m.pods[issuer+"\x00"+uid])
}

func (m *memory) sweep(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, p := range m.tokens {
		if !now.Before(p.until) {
			delete(m.tokens, k)
		}
	}
	for k, h := range m.keys {
		if !now.Before(h.until) {
			delete(m.keys, k)
		}
	}
	m.sweepNodes(now)
	for k, until := range m.pods {
		if !now.Before(until) {
			delete(m.pods, k)
		}
	}
}
