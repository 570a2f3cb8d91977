// Package upstream holds the drivers of ca.Upstream, one file each: where the root's key lives. docs/upstreams.md tells
// operators about each.
//
// A driver is not believed: what it returns is checked by the CA before it is used, and a refused answer changes nothing.
package upstream

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
)

// Config says which upstream to use.
type Config struct {
	// Kind is the driver: "selfsigned", whose root's key lies sealed in the record, or "disk", whose key lies in files. See
	// docs/upstreams.md. After a switch, roots of the other kind are signed under until a rotation has removed them: those in
	// the record always, those in files while the section disk is there. Default: selfsigned.
	Kind string `yaml:"kind"`
	// TTL is the lifetime of a root that is made by selfsigned, from 24h on. Default: 87600h (ten years).
	TTL time.Duration `yaml:"ttl"`
	// Key is the kind of a root's key that is made by selfsigned: ecdsa-p256, ecdsa-p384. Default: ecdsa-p256.
	Key string `yaml:"key"`
	// The files of kind disk.
	Disk DiskConfig `yaml:"disk"`
}

// Parts is what a driver may need of the CA.
type Parts struct {
	Sealer   *ca.Sealer    // for keys that lie in the record
	DNSNames []string      // samples of those that SVIDs can get: what would keep them from verifying is not taken for a root
	Longest  time.Duration // for how long an SVID is valid at most: what ends too soon for it is not taken either
}

// A Driver opens an upstream.
type Driver func(c Config, p Parts) (ca.Upstream, error)

var drivers = map[string]Driver{}

// Register adds a driver; it is called from init and panics on a name that is taken.
func Register(kind string, d Driver) {
	if _, ok := drivers[kind]; ok {
		panic("upstream: driver " + kind + " is registered twice")
	}
	drivers[kind] = d
}

// Kinds returns the names of all drivers, sorted.
func Kinds() []string { return slices.Sorted(maps.Keys(drivers)) }

// Open opens the upstream that c describes, and beside it the one of before a switch, as far as there is what that needs.
func Open(c Config, p Parts) (ca.Upstream, error) {
	if c.Kind == "" {
		c.Kind = "selfsigned"
	}
	d, ok := drivers[c.Kind]
	if !ok {
		return nil, api.E(api.ConfigInvalid, "upstream.kind %.32q is unknown; there are %s", c.Kind, fmt.Sprint(Kinds()))
	}
	up, err := d(c, p)
	switch {
	case err != nil:
		return nil, err
	case c.Kind != "selfsigned" && p.Sealer != nil:
		sealed, err := openSelfsigned(Config{}, p) // which makes no root
		return &both{next: up, sealed: sealed, other: up}, err
	case c.Kind == "selfsigned" && c.Disk != (DiskConfig{}):
		files, err := openDisk(c, p)
		if err != nil {
			return nil, err
		}
		return &both{next: up, sealed: up, other: files}, nil
	}
	return up, nil
}

// maxAnswers is how many answers are remembered: a replica asks for one at a time, and again with the same ID within minutes.
const maxAnswers = 64

// answers remembers what was signed for which request, so that a driver that signs itself does so once. The zero value is
// ready for use.
type answers struct {
	mu   sync.Mutex
	last []answer // oldest first
}

type answer struct {
	request ca.MintRequest
	chain   []*x509.Certificate
}

// once returns what sign returned for this very request, or calls it; one at a time. Another request with an ID that was
// answered is UpstreamRefused. What sign fails for is not remembered.
func (a *answers) once(r ca.MintRequest, now time.Time, sign func() ([]*x509.Certificate, error)) ([]*x509.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = slices.DeleteFunc(a.last, func(old answer) bool { return !old.request.NotAfter.After(now) })
	if r.ID == "" {
		return sign()
	}
	if i := slices.IndexFunc(a.last, func(old answer) bool { return old.request.ID == r.ID }); i >= 0 {
		old := a.last[i]
		if !same(old.request, r) {
			return nil, api.E(api.UpstreamRefused, "the id of the request was used for another one")
		}
		return slices.Clone(old.chain), nil
	}
	chain, err := sign()
	if err != nil {
		return nil, err
	}
	if len(a.last) == maxAnswers {
		a.last = slices.Delete(a.last, 0, 1)
	}
	a.last = append(a.last, answer{r, slices.Clone(chain)})
	return chain, nil
}

// same reports whether two requests want the same.
func same(a, b ca.MintRequest) bool {
	return a.ID == b.ID && a.TrustDomain == b.TrustDomain && a.Root.ID == b.Root.ID && bytes.Equal(a.Root.Certificate, b.Root.Certificate) &&
		bytes.Equal(a.CSR, b.CSR) && a.NotAfter.Equal(b.NotAfter) && a.ExcludeNames == b.ExcludeNames
}
