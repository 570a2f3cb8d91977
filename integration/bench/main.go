//go:build linux

// Command bench measures Signet on the machine that it runs on: signet-ca and signet-agent as processes of their own, pinned
// to processors that nobody else of us uses, beside the ceiling, which is the bare cryptography of an SVID in a loop on those
// same processors. Every ratio is of two figures of one round, so that a slow machine makes both smaller, and a figure that
// was taken while others used the machine is taken again, or not given at all.
//
//	bench [--bin DIR] [--out FILE] [--only NAME,...] [--rounds N] [--short]
//
// It ends with 0 when it gave every figure, with 3 when the machine was too noisy for some of them, with 1 when it failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

const exitNoisy = 3

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
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
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitNoisy)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are what the command line says.
type options struct {
	bin    string
	out    string
	only   []string
	rounds int
	short  bool

	profile string
	guard   string
	noise   float64 // processors that others may have on average while something is measured
}

// benches are all there are, in the order in which they run.
var benches = []struct {
	name string
	run  func(context.Context, *bench) error
}{
	{"issuance", benchIssuance},
	{"sds", benchSDS},
	{"fanout", benchFanout},
	{"idle", benchIdle},
}

func command(ctx context.Context, args []string) error {
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("only", "", "only these, with commas between them: issuance, sds, fanout, idle")
	flags.StringVar(&o.bin, "bin", "bin", "the folder of signet-ca and signet-agent")
	flags.StringVar(&o.out, "out", "", "a file for the figures as JSON")
	flags.StringVar(&o.profile, "profile", "", "a file for a profile of the CA's processor time at 64 clients, for pprof; nothing is measured then")
	flags.StringVar(&o.guard, "guard", "", "a file of ratios to compare with: it fails where one has become worse by a fifth")
	flags.Float64Var(&o.noise, "noise", 0.15, "processors that others may have, on average, while something is measured")
	flags.IntVar(&o.rounds, "rounds", 0, "how often each figure is taken, from 3 on; 0: 5, or 3 with --short")
	flags.BoolVar(&o.short, "short", false, "the figures of the guard alone, in about a minute")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if o.rounds == 0 {
		o.rounds = 5
		if o.short {
			o.rounds = 3
		}
	}
	if o.profile != "" {
		return profile(ctx, o)
	}
	if o.rounds < 3 {
		return errors.New("--rounds: at least 3, or there is no spread")
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if !slices.ContainsFunc(benches[:], func(b struct {
			name string
			run  func(context.Context, *bench) error
		}) bool {
			return b.name == name
		}) {
			return fmt.Errorf("there is no bench %q", name)
		}
	}
	return run(ctx, o)
}

// run runs the benches that are asked for, prints the table and writes the file.
func run(ctx context.Context, o options) error {
	b, err := newBench(o)
	if err != nil {
		return err
	}
	defer b.close()
	for _, x := range benches {
		if len(o.only) > 0 && !slices.Contains(o.only, x.name) {
			continue
		}
		b.say("%s", x.name)
		if err := x.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w%s", x.name, err, b.logs())
		}
	}
	b.figures.print(os.Stdout)
	if o.out != "" {
		if err := b.figures.write(o.out); err != nil {
			return err
		}
	}
	if o.guard != "" {
		return b.figures.guard(o.guard)
	}
	return b.figures.refused()
}

// bench is one run of this program.
type bench struct {
	options
	self           string // path of this program
	dir            string // of everything that is written
	server, client cpus
	figures        *figures
}

func newBench(o options) (*bench, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"signet-ca", "signet-agent"} {
		if _, err := os.Stat(filepath.Join(o.bin, name)); err != nil {
			return nil, fmt.Errorf("%s is not in %s: `make bench` builds it first", name, o.bin)
		}
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return nil, err
	}
	all, err := usable()
	if err != nil {
		return nil, err
	}
	if len(all) < 2 {
		return nil, errors.New("two processors at least are needed: one for the server, one for the clients")
	}
	dir, err := os.MkdirTemp("", "signet-bench-") // on a disk where there is one: the ledger's price is a part of an SVID's
	if err != nil {
		return nil, err
	}
	half := len(all) / 2
	b := &bench{options: o, self: self, dir: dir, server: all[:half], client: all[half:], figures: newFigures()}
	b.say("%d processors, %d of them the server's; %s; %s", len(all), half, runtime.Version(), modelName())
	return b, nil
}

func (b *bench) close() { _ = os.RemoveAll(b.dir) }

// say tells on standard error what goes on.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

// logs returns the ends of the programs' logs, for an error.
func (b *bench) logs() string {
	var s strings.Builder
	files, _ := filepath.Glob(filepath.Join(b.dir, "*", "*.log"))
	for _, f := range files {
		text, _ := os.ReadFile(f)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Fprintf(&s, "\n%s:\n%s", filepath.Base(f), strings.Join(lines[max(0, len(lines)-8):], "\n"))
	}
	return s.String()
}
