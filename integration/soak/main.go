//go:build linux

// Command soak rotates the root again and again under traffic, and counts the TLS handshakes that fail: none may.
//
// It runs a CA, the agents of a few nodes and pairs of peers as processes of their own: real Envoys, and Go programs that use
// go-spiffe over the Workload API. Each pair makes new mutual TLS connections all the time, without reuse and without resumed
// sessions, while rotations follow one another by the real command line. In each of them one agent is held (SIGSTOP) for a while,
// and a CA, an agent or an Envoy, drawn by chance, is killed (SIGKILL) and started again.
//
//	soak [--bin DIR] [--envoy PATH] [--rotations N] [--seed N] [--envoys N] [--gos N] [--mixed] [--nodes N] [--ttl D] [--pace D] [--keep]
//
// What counts is strict, and is in verdict.go: whatever goes wrong is a failure, but for a connection that breaks without a word
// about certificates, to or from an Envoy that was killed, and while that is dead. Such are counted apart.
//
// It ends with 0 when no handshake failed and every rotation came to its end, with 1 otherwise. The seed is printed, and gives the
// same draws again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/signet-ca/signet/internal/envoy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // whoever asks twice does not wait for what is tidied up
	if err := command(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cfg := Config{Log: stderr}
	f := flag.NewFlagSet("soak", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&cfg.Bin, "bin", "bin", "folder with signet, signet-ca and signet-agent")
	f.StringVar(&cfg.Envoy, "envoy", os.Getenv("SIGNET_ENVOY"), "path of Envoy (default $SIGNET_ENVOY)")
	f.IntVar(&cfg.Rotations, "rotations", 20, "how many, one after the other")
	f.Uint64Var(&cfg.Seed, "seed", 0, "of what is left to chance; 0 draws one")
	f.IntVar(&cfg.Envoys, "envoys", 4, "pairs of two Envoys")
	f.IntVar(&cfg.Gos, "gos", 2, "pairs of two Go programs")
	f.BoolVar(&cfg.Mixed, "mixed", true, "two pairs more: an Envoy that calls a Go program, and the other way round")
	f.IntVar(&cfg.Nodes, "nodes", 3, "nodes, each with an agent; at least 2")
	f.DurationVar(&cfg.TTL, "ttl", 20*time.Second, "lifetime of SVIDs; a rotation takes as long, and a little more")
	f.BoolVar(&cfg.Keep, "keep", false, "keep the logs even when it passes")
	f.DurationVar(&cfg.Pace, "pace", 40*time.Millisecond, "between two connections of a pair")
	if err := f.Parse(args); err != nil {
		return err
	}
	cfg.Kills = cfg.Rotations
	if cfg.Seed == 0 {
		cfg.Seed = rand.Uint64()
	}
	switch {
	case f.NArg() > 0:
		return fmt.Errorf("it takes no argument, and not %q", f.Arg(0))
	case cfg.Nodes < 2 || cfg.Rotations < 1:
		return errors.New("it takes two nodes and one rotation at least")
	}
	path, err := envoy.Find(cfg.Envoy)
	if err != nil {
		return fmt.Errorf("no Envoy: %w (--envoy PATH or $SIGNET_ENVOY names one)", err)
	}
	cfg.Envoy = path
	r, err := Run(ctx, cfg)
	if r != nil {
		if werr := r.write(stdout); err == nil {
			err = werr
		}
	}
	return err
}
