//go:build linux

// Command bench measures Signet on the machine that it runs on: signet-ca and signet-agent as processes of their own, pinned
// to processors that nobody else of us uses, beside the ceiling, which is the bare cryptography of an SVID in a loop on those
// same processors. Every ratio is of two figures of one round, so that a slow machine makes both smaller, and a figure that
// was taken while others used the machine is taken again, or not given at all.
//
//	bench [--bin DIR] [--out FILE] [--only NAME,...] [--rounds N] [--short]
//	bench --guard FILE [--short] [--keep]
//	bench --render FILE.json [--out FILE.md]
//
// It ends with 0 when it gave every figure, with 3 when it refused some, because the machine was too noisy for them or lacks
// what they need (the table says which and why), and with 1 when it failed. With --guard it ends with 1 when a ratio is worse
// than the file's by more than a fifth each time that it is measured, else with 0: noise is no loss.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
)

const exitNoisy = 3

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // whoever asks twice does not wait for what is tidied up
	var err error
	switch args := os.Args[1:]; {
	case len(args) > 2 && args[0] == "pin":
		err = pin(args[1], args[2:])
	case len(args) == 2 && args[0] == "child":
		err = serveChild(ctx, args[1], os.Stdin, os.Stdout)
	default:
		err = command(ctx, args)
	}
	switch {
	case errors.Is(err, errNoisy):
		say("%v", err)
		os.Exit(exitNoisy)
	case err != nil:
		say("%v", err)
		os.Exit(1)
	}
}

// benches are all there are, in the order in which they run.
var benches = []benchmark{
	{"issuance", benchIssuance},
	{"inprocess", benchInProcess},
	{"attestation", benchAttestation},
	{"review", benchReview},
	{"sds", benchSDS},
	{"fanout", benchFanout},
	{"svids", benchSVIDs},
	{"herd", benchHerd},
	{"idle", benchIdle},
	{"rotation", benchRotation},
	{"drill", benchDrill},
	{"replace", benchReplace},
}

type benchmark struct {
	name string
	run  func(context.Context, *bench) error
}

// short are those that the guard's short form consists of.
var short = []string{"issuance", "inprocess", "attestation", "sds"}
