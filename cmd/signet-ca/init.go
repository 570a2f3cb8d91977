package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
	"github.com/signet-ca/signet/internal/durable"
)

// initCommand makes the root and tells the operator what to keep.
func initCommand(ctx context.Context, l *loaded, out io.Writer) error {
	b, err := initialise(ctx, l)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "trust domain  %s\ngeneration    %s\n", b.TrustDomain, b.Generation)
	for _, r := range b.Roots {
		fmt.Fprintf(out, "root          %x, until %s\n", r.SubjectKeyId, r.NotAfter.Format("2006-01-02"))
	}
	fmt.Fprintf(out, "seal key      %s: keep a copy apart from the store, nothing else opens the root's key\n", l.Seal.KeyFile)
	return nil
}

func initialise(ctx context.Context, l *loaded) (b *ca.Bundle, err error) {
	if l.Store.Path != "" {
		if err := os.MkdirAll(filepath.Dir(l.Store.Path), 0o700); err != nil {
			return nil, err
		}
	}
	// What must not be there is asked before anything is made.
	p, err := openPublisher(l, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	if p.Publisher != nil {
		published, err := p.Published(ctx, l.td)
		if err != nil {
			return nil, err
		}
		if published {
			if _, serr := os.Lstat(l.Store.Path); errors.Is(serr, fs.ErrNotExist) {
				return nil, api.E(api.BundlePublished, "a bundle is published in %s already, so a root of trust domain %q exists or existed somewhere", p.where, l.td)
			}
		}
	}
	if err := noRecord(ctx, l.Store); err != nil {
		return nil, err
	}
	if err := makeSealKey(l.Seal); err != nil {
		return nil, err
	}
	sealer, err := readSealer(l.Seal)
	if err != nil {
		return nil, err
	}
	up, err := upstream.Open(l.Upstream, upstream.Parts{Sealer: sealer})
	if err != nil {
		return nil, err
	}
	founder, ok := up.(ca.Founder)
	if !ok {
		return nil, api.E(api.ConfigInvalid, "upstream.kind %q has roots of its own: there is nothing to init", l.Upstream.Kind)
	}
	s, closeStore, err := store.Open(ctx, l.Store, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeStore()) }()
	return ca.Init(ctx, l.td, s, founder, p.Publisher)
}

// noRecord refuses a store with a record in it. A new seal key beside one would hide that the right one is lost.
func noRecord(ctx context.Context, c store.Config) error {
	s, closeStore, err := store.Open(ctx, c, false)
	if err == nil {
		_, _, err = s.Load(ctx)
		err = errors.Join(err, closeStore())
	}
	switch {
	case err == nil:
		return api.E(api.StateExists, "there is a record already; init makes one only where there is none")
	case api.ReasonOf(err) == api.StateMissing:
		return nil
	}
	return err
}

// makeSealKey makes a seal key where there is none; one that is there is left alone. An init that was killed may have left
// a copy of it in a temporary file, or a key that is not on disk yet: the record must not outlive what opens it.
func makeSealKey(c sealConfig) error {
	dir := filepath.Dir(c.KeyFile)
	_, err := os.Lstat(c.KeyFile)
	if err == nil && c.MountedSecret {
		return nil
	}
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := durable.RemoveTemporary(dir); err != nil {
		return err
	}
	if missing {
		return durable.CreateFile(c.KeyFile, ca.NewSealKey(), 0o600)
	}
	return durable.SyncFile(c.KeyFile)
}
