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

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/durable"
)

// initCommand makes the root and tells the operator what to keep.
func initCommand() daemon.Command[*loaded] {
	var ifNeeded bool
	return daemon.Command[*loaded]{
		Name:  "init",
		Short: "Make the root of a new trust domain, once",
		Long: `Make the root of a new trust domain, once: the record, the root, and the seal key where there is none.

It refuses where there is a record, and where a bundle of the trust domain is published already: a lost volume is not a
new root. It never replaces anything. With an upstream that has a root of its own, it takes up that one and makes none.

With --if-needed it is good, and changes nothing, where there is a record: so it can run before each start, in an init
container. A record that is lost while its bundle is published is refused all the same.`,
		Flags: func(c *cobra.Command) {
			c.Flags().BoolVar(&ifNeeded, "if-needed", false, "succeed, and change nothing, where there is a record already")
		},
		Do: func(ctx context.Context, l *loaded, out io.Writer) error {
			b, err := initialise(ctx, l)
			if ifNeeded && api.ReasonOf(err) == api.StateExists {
				_, err = fmt.Fprintf(out, "trust domain  %s\nthere is a record already: nothing to do\n", l.td)
				return err
			}
			if err != nil {
				return err
			}
			return tellOfRoot(b, l, out)
		},
	}
}

func tellOfRoot(b *ca.Bundle, l *loaded, out io.Writer) error {
	fmt.Fprintf(out, "trust domain  %s\ngeneration    %s\n", b.TrustDomain, b.Generation)
	for _, r := range b.Roots {
		fmt.Fprintf(out, "root          %x, until %s\n", r.SubjectKeyId, r.NotAfter.Format("2006-01-02"))
	}
	opens := "the root's key"
	if l.Upstream.Kind != "" && l.Upstream.Kind != "selfsigned" {
		opens = "the keys in the record"
	}
	_, err := fmt.Fprintf(out, "seal key      %s: keep a copy apart from the store, nothing else opens %s\n", l.Seal.KeyFile, opens)
	return err
}

func initialise(ctx context.Context, l *loaded) (b *ca.Bundle, err error) {
	if err := makeFolders(l); err != nil {
		return nil, err
	}
	// What must not be there is asked before anything is made; this CA's own record first, so that with --if-needed it
	// starts again while the cluster is away.
	if err := noRecord(ctx, l.Store); err != nil {
		return nil, err
	}
	p, err := openPublisher(l, slog.New(slog.DiscardHandler), nil)
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
				return nil, api.E(api.BundlePublished, "there is no state at %s, but a bundle is published in %s already, so a root of trust domain %q exists or existed somewhere", l.Store.Path, p.where, l.td)
			}
		}
	}
	if err := makeSealKey(l.Seal); err != nil {
		return nil, err
	}
	sealer, err := readSealer(l.Seal)
	if err != nil {
		return nil, err
	}
	up, err := upstream.Open(l.Upstream, upstream.Parts{Sealer: sealer, DNSNames: l.policy.DNSNames(), Longest: l.longest()})
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
	return ca.Init(ctx, l.td, s, founder, p.Publisher, sealer)
}

// makeFolders makes those of the files that the CA keeps: on an empty volume there are none.
func makeFolders(l *loaded) error {
	paths := []string{l.Store.Path}
	for _, is := range l.Issuers {
		paths = append(paths, is.JWKS.Persist, is.Watch.Persist)
	}
	for _, path := range paths {
		if path == "" {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
	}
	return nil
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
