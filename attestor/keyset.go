package attestor

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
)

// Limits of a key set. One that is above them is refused as a whole.
const (
	MaxKeySetBytes = 1 << 20
	MaxKeys        = 64 // entries, usable or not

	minRSABits      = 2048
	maxRSABits      = 4096         // go-jose's own limit too
	maxKeySetValues = 64 * MaxKeys // JSON values; certificates and unknown members count
)

// Keys is the key set of one issuer, as a token check sees it. It is safe for concurrent use.
type Keys interface {
	// Lookup returns the public key with this kid, if it may verify signatures of this algorithm (RFC 7518 section 3.1).
	// It fails with api.TokenSignature where there is none, and with api.KeysUnavailable while no set was ever read. It
	// may wait for a newer set, for a bounded time.
	Lookup(ctx context.Context, kid, alg string) (crypto.PublicKey, error)
}

// StaticKeys are the keys of one JWKS that never changes: what a CA pushed to an agent.
func StaticKeys(jwks []byte) (Keys, error) {
	set, err := ParseKeySet(jwks)
	if err != nil {
		return nil, err
	}
	return staticKeys{set}, nil
}

type staticKeys struct{ set *KeySet }

func (s staticKeys) Lookup(_ context.Context, kid, alg string) (crypto.PublicKey, error) {
	if key, ok := s.set.Find(kid, alg); ok {
		return key, nil
	}
	return nil, errSignature()
}

// ByKeySets makes an attestor of ServiceAccount tokens by key sets (JWKS) that never change, by the "iss" of the tokens:
// what a CA pushed to an agent. One set that ParseKeySet refuses makes it fail as a whole, so that no issuer is lost
// unseen; so do no sets at all, with api.ConfigInvalid.
func ByKeySets(sets map[string][]byte) (Attestor, error) {
	keys := make(map[string]Keys, len(sets))
	for issuer, jwks := range sets {
		k, err := StaticKeys(jwks)
		if err != nil {
			return nil, err
		}
		keys[issuer] = k
	}
	a, err := NewServiceAccount(ServiceAccountConfig{Issuers: keys})
	if err != nil {
		return nil, err // and not a nil *ServiceAccount in an Attestor
	}
	return a, nil
}

// KeySet holds the public keys of a JWKS that may verify tokens. It does not change.
type KeySet struct {
	keys    map[keyRef]crypto.PublicKey
	jwks    []byte
	len     int
	ignored []string
}

// keyRef is what a token says of its key. That the algorithm is part of it is what keeps a token from choosing how a key
// is used.
type keyRef struct {
	kid string
	alg string
}

// ParseKeySet reads a JWKS (RFC 7517 section 5) of at most MaxKeySetBytes and MaxKeys entries.
//
// It keeps the keys that are for signatures, bear a kid, and are RSA of 2048 to 4096 bits, P-256, P-384, P-521 or
// Ed25519; an entry that is anything else is ignored alone (RFC 7517 section 5). Private and symmetric keys are ignored
// with every other entry of their kid: what is published is no secret. So are different keys that claim one kid and one
// algorithm: which of them is meant would be a guess. A set without any usable key is an error.
//
// Errors hold no part of the set.
func ParseKeySet(jwks []byte) (*KeySet, error) {
	if len(jwks) > MaxKeySetBytes {
		return nil, fmt.Errorf("key set is above %d bytes", MaxKeySetBytes)
	}
	m, err := parseObject(jwks, maxKeySetValues)
	if err != nil {
		return nil, fmt.Errorf("key set is %w", err)
	}
	list, ok := m["keys"].([]any)
	if !ok {
		return nil, errors.New("key set has no list of keys")
	}
	if len(list) > MaxKeys {
		return nil, fmt.Errorf("key set has %d keys, above %d", len(list), MaxKeys)
	}
	s := &KeySet{keys: make(map[keyRef]crypto.PublicKey)}
	entries := s.readEntries(list)
	if len(entries) == 0 {
		return nil, fmt.Errorf("key set has no usable key among %d", len(list))
	}
	s.publish(entries)
	return s, nil
}

// Find returns the key with this kid, if it may verify signatures of this algorithm.
func (s *KeySet) Find(kid, alg string) (crypto.PublicKey, bool) {
	k, ok := s.keys[keyRef{kid, alg}]
	return k, ok
}

// Len is the number of usable keys; at least 1.
func (s *KeySet) Len() int { return s.len }

// JWKS is the set in one canonical form, with the usable keys only: equal sets have equal bytes. The caller must not
// change it.
func (s *KeySet) JWKS() []byte { return s.jwks }

// Ignored says, for people, why entries are not in the set; one line each, without any part of a key.
func (s *KeySet) Ignored() []string { return slices.Clone(s.ignored) }

// entry is one usable key.
type entry struct {
	index int // in the set it came from
	kid   string
	algs  []string // that it may be used with
	key   publicKey
	alg   string // that its publisher names; may be empty
}

type publicKey interface {
	Equal(crypto.PublicKey) bool
}

// errSecret marks an entry that holds a private or a symmetric key.
var errSecret = errors.New("a secret was published with it")

// readEntries returns the usable entries, and notes why the others are not.
func (s *KeySet) readEntries(list []any) []entry {
	var entries []entry
	secret := make(map[string]bool) // kids of secrets
	for i, v := range list {
		m, _ := v.(map[string]any)
		e, err := readEntry(m)
		if err != nil {
			s.ignore(i, err)
			if kid, ok := m["kid"].(string); ok && errors.Is(err, errSecret) {
				secret[kid] = true
			}
			continue
		}
		e.index = i
		entries = append(entries, e)
	}
	ambiguous := ambiguousIDs(entries)
	return slices.DeleteFunc(entries, func(e entry) bool {
		switch {
		case secret[e.kid]:
			s.ignore(e.index, errSecret)
		case ambiguous[e.kid]:
			s.ignore(e.index, errors.New("its kid names another key as well"))
		default:
			return false
		}
		return true
	})
}

func (s *KeySet) ignore(index int, why error) {
	s.ignored = append(s.ignored, fmt.Sprintf("entry %d: %v", index, why))
}

// ambiguousIDs returns the kids under which different keys claim the same algorithm.
func ambiguousIDs(entries []entry) map[string]bool {
	seen, ambiguous := make(map[keyRef]publicKey), make(map[string]bool)
	for _, e := range entries {
		for _, alg := range e.algs {
			ref := keyRef{e.kid, alg}
			if other, ok := seen[ref]; ok && !other.Equal(e.key) {
				ambiguous[e.kid] = true
			}
			seen[ref] = e.key
		}
	}
	return ambiguous
}

// publish makes the lookup table and the canonical form.
func (s *KeySet) publish(entries []entry) {
	var keys []jose.JSONWebKey
	for _, e := range entries {
		for _, alg := range e.algs {
			s.keys[keyRef{e.kid, alg}] = e.key
		}
		k := jose.JSONWebKey{Key: e.key, KeyID: e.kid, Algorithm: e.alg, Use: "sig"}
		if !slices.ContainsFunc(keys, func(o jose.JSONWebKey) bool {
			return o.KeyID == k.KeyID && o.Algorithm == k.Algorithm && e.key.Equal(o.Key)
		}) {
			keys = append(keys, k)
		}
	}
	slices.SortStableFunc(keys, func(a, b jose.JSONWebKey) int {
		return cmp.Or(cmp.Compare(a.KeyID, b.KeyID), cmp.Compare(a.Algorithm, b.Algorithm), cmp.Compare(fmt.Sprintf("%T", a.Key), fmt.Sprintf("%T", b.Key)))
	})
	s.len = len(keys)
	s.jwks, _ = json.Marshal(jose.JSONWebKeySet{Keys: keys}) // of keys that were parsed from JSON: cannot fail
}

// readEntry reads one JWK (RFC 7517 section 4, RFC 7518 section 6, RFC 8037 section 2).
func readEntry(m map[string]any) (entry, error) {
	str := func(name string) string { v, _ := m[name].(string); return v }
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"} {
		if _, ok := m[name]; ok {
			return entry{}, errSecret
		}
	}
	if str("kty") == "oct" {
		return entry{}, errSecret
	}
	e := entry{kid: str("kid")}
	if err := checkUse(m); err != nil {
		return entry{}, err
	}
	if e.kid == "" || len(e.kid) > maxKeyIDBytes {
		return entry{}, errors.New("kid is missing or too long")
	}
	if len(str("n")) > base64.RawURLEncoding.EncodedLen(maxRSABits/8)+4 {
		return entry{}, fmt.Errorf("RSA key is above %d bits", maxRSABits)
	}
	var err error
	if e.key, err = parseKey(m); err != nil {
		return entry{}, err
	}
	e.algs = algorithmsOf(e.key)
	if v, ok := m["alg"]; ok {
		if e.alg, _ = v.(string); !slices.Contains(e.algs, e.alg) {
			return entry{}, errors.New("alg is not one for tokens, or not for this key")
		}
		e.algs = []string{e.alg}
	}
	return e, nil
}

// checkUse wants a key that may verify, or does not say (RFC 7517 sections 4.2 and 4.3).
func checkUse(m map[string]any) error {
	if use, ok := m["use"]; ok && use != "sig" {
		return errors.New("use is not sig")
	}
	if v, ok := m["key_ops"]; ok {
		if ops, _ := v.([]any); !slices.Contains(ops, any("verify")) {
			return errors.New("key_ops does not hold verify")
		}
	}
	return nil
}

// parseKey parses the public key of a JWK, and refuses one that is not of a kind and size that tokens are signed with.
func parseKey(m map[string]any) (publicKey, error) {
	bare := map[string]any{} // the key alone: certificates and the like beside it are not heeded
	for _, name := range []string{"kty", "crv", "n", "e", "x", "y"} {
		if v, ok := m[name]; ok {
			bare[name] = v
		}
	}
	data, err := json.Marshal(bare)
	if err != nil {
		return nil, errors.New("key is malformed")
	}
	var k jose.JSONWebKey
	if err := k.UnmarshalJSON(data); err != nil || !k.Valid() || !k.IsPublic() {
		return nil, errors.New("key is malformed, or of a kty that we do not know")
	}
	if key, ok := k.Key.(*rsa.PublicKey); ok {
		bits := key.N.BitLen()
		switch {
		case bits < minRSABits || bits > maxRSABits:
			return nil, fmt.Errorf("RSA key of %d bits", bits)
		case key.N.Bit(0) == 0 || key.E&1 == 0 || key.E < 3 || key.E > 1<<31-1:
			return nil, errors.New("RSA key is malformed")
		}
	}
	if algorithmsOf(k.Key) == nil {
		return nil, errors.New("key is of a kind that tokens are not signed with")
	}
	key, ok := k.Key.(publicKey)
	if !ok {
		return nil, errors.New("key is of a kind that tokens are not signed with")
	}
	return key, nil
}
