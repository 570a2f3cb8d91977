//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// errProcessors is why nothing at all can be measured.
var errProcessors = errors.New("two processors at least are needed, one for the server, one for the clients")

// options are what the command line says.
type options struct {
	bin    string
	out    string
	only   []string
	rounds int
	short  bool

	profile string
	guard   string
	keep    bool
	render  string
	noise   float64 // processors that others may have on average while something is measured
}

func parse(args []string) (o options, err error) {
	var names []string
	for _, b := range benches {
		names = append(names, b.name)
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("only", "", "only these, with commas between them: "+strings.Join(names, ", "))
	flags.StringVar(&o.bin, "bin", "bin", "the folder of signet-ca and signet-agent")
	flags.StringVar(&o.out, "out", "", "a file for the figures as JSON; with --render for the page")
	flags.StringVar(&o.profile, "profile", "", "a file for a profile of the CA's processor time at 64 clients, for pprof; nothing is measured then")
	flags.StringVar(&o.guard, "guard", "", "a file of ratios to compare with: it fails where one has become worse by a fifth")
	flags.BoolVar(&o.keep, "keep", false, "with --guard: write the ratios of now into that file instead")
	flags.StringVar(&o.render, "render", "", "a file that --out wrote: print its page, and measure nothing")
	flags.Float64Var(&o.noise, "noise", 0.15, "processors that others may have, on average, while something is measured")
	flags.IntVar(&o.rounds, "rounds", 0, "how often each figure is taken, from 3 on; 0: 5, or 3 with --short")
	flags.BoolVar(&o.short, "short", false, "the figures of the guard alone, in about a minute")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if o.rounds == 0 {
		o.rounds = 5
		if o.short {
			o.rounds = 3
		}
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.rounds < 3:
		return o, errors.New("--rounds: at least 3, or there is no spread")
	case o.keep && o.guard == "":
		return o, errors.New("--keep: into which file? say --guard as well")
	}
	switch {
	case *only != "":
		o.only = strings.Split(*only, ",")
	case o.short:
		o.only = short
	default:
		o.only = names
	}
	for _, name := range o.only {
		if !slices.Contains(names, name) {
			return o, fmt.Errorf("there is no bench %q; there are %s", name, strings.Join(names, ", "))
		}
	}
	return o, nil
}

func command(ctx context.Context, args []string) error {
	o, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return nil
	case err != nil:
		return err
	case o.render != "":
		return renderFile(o.render, o.out)
	case o.profile != "":
		return profile(ctx, o)
	case o.guard != "" && !o.keep:
		return guard(ctx, o)
	}
	d, err := measure(ctx, o)
	if d.figures == nil {
		return err
	}
	d.print(os.Stdout)
	if o.out != "" {
		err = errors.Join(err, d.write(o.out))
	}
	if err == nil && o.keep {
		return keep(o.guard, d.figures)
	}
	if err != nil {
		return err
	}
	return d.refused()
}

// measure runs the benches that are asked for. What one that failed did not measure is refused, and the others still run.
func measure(ctx context.Context, o options) (document, error) {
	b, err := newBench(o)
	if err != nil {
		return document{}, err
	}
	defer b.close()
	defer context.AfterFunc(ctx, b.abandon)()
	for _, x := range benches {
		if !slices.Contains(o.only, x.name) {
			continue
		}
		b.figures.bench, b.now = x.name, ""
		began := time.Now()
		failed := x.run(ctx, b)
		if ctx.Err() != nil {
			return document{}, errors.New("interrupted")
		}
		if failed != nil {
			failed = fmt.Errorf("%s: %w", x.name, failed)
			b.say("%v%s", failed, b.logs())
			err = errors.Join(err, failed)
			for _, f := range b.figures.list {
				if f.Runs == 0 && f.Refused == "" {
					f.Refused = "its bench failed"
				}
			}
		}
		b.say("%s took %v", x.name, time.Since(began).Round(time.Second))
	}
	return document{newAbout(b), b.figures}, err
}

// bench is one run of this program.
type bench struct {
	options
	self           string // path of this program
	dir            string // of everything that is written
	server, client cpus
	figures        *figures
	began          time.Time
	now            string // what is being measured, for who watches
	pause          func() // after a round that others disturbed

	mu        sync.Mutex // guards what follows
	children  []*process // that were started
	abandoned bool       // none is started any more
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
		return nil, errProcessors
	}
	dir, err := os.MkdirTemp("", "signet-bench-") // on a disk where there is one: the ledger's price is a part of an SVID's
	if err != nil {
		return nil, err
	}
	half := len(all) / 2
	b := &bench{options: o, self: self, dir: dir, server: all[:half], client: all[half:], figures: newFigures(), began: time.Now(), pause: func() { time.Sleep(time.Second) }}
	b.say("%d processors, %d of them the server's; %s; %s", len(all), half, runtime.Version(), modelName())
	return b, nil
}

func (b *bench) close() { _ = os.RemoveAll(b.dir) }

// abandon ends every child at once, so that whoever waits for one of them does so no longer and tidies up.
func (b *bench) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.abandoned = true
	for _, p := range b.children {
		if p.in != nil {
			_ = p.cmd.Process.Kill() // an error says that it has ended
		}
	}
}

// stage says what is measured from now on.
func (b *bench) stage(format string, args ...any) { b.now = ", " + fmt.Sprintf(format, args...) }

// rounds runs rounds until enough of them were quiet, or too many were not.
func (b *bench) rounds(one func() (quiet bool, err error)) error {
	good := 0
	for try := 0; good < b.options.rounds && try < patience*b.options.rounds; try++ {
		noisy := ""
		if bad := try - good; bad > 0 {
			noisy = fmt.Sprintf(", %d were too noisy", bad)
		}
		b.say("%s%s: round %d of %d%s", b.figures.bench, b.now, good+1, b.options.rounds, noisy)
		quiet, err := one()
		if err != nil {
			return err
		}
		if quiet {
			good++
		} else {
			b.pause()
		}
	}
	return nil
}

// say tells on standard error what goes on.
func (b *bench) say(format string, args ...any) { say(format, args...) }

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...) }

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
