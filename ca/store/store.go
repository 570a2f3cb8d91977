// Package store holds the drivers of ca.Store, one file each.
//
// A driver keeps one small record and is replaced as a whole; nothing of it leaks into the CA. All drivers pass the same
// conformance suite, which fails for a driver that has no setup in it.
package store

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
)

// Config says which store to open. Only the section of its kind is read.
type Config struct {
	// Kind is the driver: "bolt". Default: bolt.
	Kind string `yaml:"kind"`
	// Path of the file, for bolt. Required for bolt.
	Path string `yaml:"path"`
}

// A Driver opens a store. With create, one that does not exist yet is made; without, it is an error of reason
// StateMissing. The returned close function releases it.
type Driver func(ctx context.Context, c Config, create bool) (s ca.Store, close func() error, err error)

var drivers = map[string]Driver{}

// Register adds a driver; it is called from init and panics on a name that is taken.
func Register(kind string, d Driver) {
	if _, ok := drivers[kind]; ok {
		panic("store: driver " + kind + " is registered twice")
	}
	drivers[kind] = d
}

// Kinds returns the names of all drivers, sorted.
func Kinds() []string { return slices.Sorted(maps.Keys(drivers)) }

// Open opens the store that c describes.
func Open(ctx context.Context, c Config, create bool) (ca.Store, func() error, error) {
	if c.Kind == "" {
		c.Kind = "bolt"
	}
	d, ok := drivers[c.Kind]
	if !ok {
		return nil, nil, api.E(api.ConfigInvalid, "store.kind %q is unknown; there are %s", c.Kind, fmt.Sprint(Kinds()))
	}
	return d(ctx, c, create)
}
