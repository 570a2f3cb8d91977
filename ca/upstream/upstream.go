// Package upstream holds the drivers of ca.Upstream, one file each: where the root's key lives.
//
// A driver is not believed: what it returns is checked by the CA before it is used, and a refused answer changes nothing.
package upstream

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
)

// Config says which upstream to use. Only the section of its kind is read.
type Config struct {
	// Kind is the driver: "selfsigned". Default: selfsigned.
	Kind string `yaml:"kind"`
	// TTL is the lifetime of a root that is made by selfsigned, from 24h on. Default: 87600h (ten years).
	TTL time.Duration `yaml:"ttl"`
	// Key is the kind of a root's key that is made by selfsigned: ecdsa-p256, ecdsa-p384. Default: ecdsa-p256.
	Key string `yaml:"key"`
}

// Parts is what a driver may need of the CA.
type Parts struct {
	Sealer *ca.Sealer // for keys that lie in the record
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

// Open opens the upstream that c describes.
func Open(c Config, p Parts) (ca.Upstream, error) {
	if c.Kind == "" {
		c.Kind = "selfsigned"
	}
	d, ok := drivers[c.Kind]
	if !ok {
		return nil, api.E(api.ConfigInvalid, "upstream.kind %.32q is unknown; there are %s", c.Kind, fmt.Sprint(Kinds()))
	}
	return d(c, p)
}
