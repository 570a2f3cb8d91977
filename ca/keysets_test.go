package ca

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/internal/latest"
)

// turning is a key set during whose reading something else happens.
type turning struct {
	latest.Value[[]byte]
	reads int
	at    int // of reads; 0: never
	do    func()
}

// Snapshot implements KeySets. It is read by goroutines that take turns.
func (k *turning) Snapshot() ([]byte, <-chan struct{}) {
	if k.reads++; k.reads == k.at {
		k.do()
	}
	return k.Get()
}

// That a cluster is away, or is no more, is told as well where it comes while a change of a key set is being told.
func TestKeySetsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := &turning{}
		keys.Set([]byte("first"))
		c := &CA{cfg: Config{KeySets: map[string]KeySets{"a": keys}}}
		c.sights = newSights(Config{Directory: &seer{}, Grace: time.Hour, Sealer: &Sealer{}, KeySets: c.cfg.KeySets}, began)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- c.keepKeySets(ctx) }()
		told := func(jwks string, away bool) {
			t.Helper()
			synctest.Wait()
			sets := c.keySets.Load().GetSets()
			if len(sets) != 1 || string(sets[0].GetJwks()) != jwks || (sets[0].GetAwaySince() != nil) != away {
				t.Errorf("told %v, want %s, away %t", sets, jwks, away)
			}
		}
		told("first", false)
		for name, next := range map[string]map[string]time.Time{"second": {"a": began}, "third": nil} {
			c.sights.away.Set(nil)
			if next == nil {
				c.sights.away.Set(map[string]time.Time{"a": began})
			}
			told(string(keys.Load()), next == nil)
			keys.at, keys.do = keys.reads+2, func() { c.sights.away.Set(next) } // the first is that of who awaits changes
			keys.Set([]byte(name))
			told(name, next != nil)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
