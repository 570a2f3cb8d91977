package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/audit"
	"github.com/signet-ca/signet/internal/daemon"
)

const (
	defaultRetention = 90 * 24 * time.Hour
	maxSize          = 16 << 30 // of what the ledger reserves
)

// options are what the ledger is opened with.
func (c ledgerConfig) options() (o audit.Options, err error) {
	size := func(name, text, def string, least int64) int64 {
		n, perr := parseSize(cmp.Or(text, def))
		if perr != nil || n < least || n > maxSize {
			err = errors.Join(err, fmt.Errorf("ledger.%s %.32q is not a size from %dKiB to 16GiB", name, text, least>>10))
		}
		return n
	}
	o = audit.Options{
		SegmentSize:  size("segmentSize", c.SegmentSize, "64MiB", audit.MinSegment),
		RefusalBytes: size("refusalBytes", c.RefusalBytes, "16MiB", audit.MinRefusals),
		Retention:    c.Retention,
	}
	if c.Retention < 0 {
		err = errors.Join(err, errors.New("ledger.retention cannot be negative"))
	}
	return o, err
}

// parseSize reads a number of bytes with its unit. A bare number is none, for nobody knows its unit.
func parseSize(text string) (int64, error) {
	for unit, shift := range map[string]int{"KiB": 10, "MiB": 20, "GiB": 30} {
		digits, ok := strings.CutSuffix(text, unit)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 32)
		if err != nil || digits[0] == '0' {
			break
		}
		return int64(n) << shift, nil
	}
	return 0, errors.New("it is not a number with KiB, MiB or GiB")
}

func openLedger(ctx context.Context, c ledgerConfig, log *slog.Logger) (*audit.Log, error) {
	o, err := c.options()
	if err != nil {
		return nil, err
	}
	o.Log = log
	ledger, err := audit.Open(c.Dir, o)
	if err != nil {
		reason := api.LedgerFailed
		if _, ok := errors.AsType[*audit.CorruptError](err); ok {
			reason = api.LedgerDamaged
		}
		return nil, api.Wrap(reason, err, fmt.Sprintf("the ledger in %s cannot be opened: %v", c.Dir, err))
	}
	if cut := ledger.Cut(); cut > 0 {
		log.WarnContext(ctx, "cut a torn write off the ledger: nobody was told of what it held", "bytes", cut)
	}
	return ledger, nil
}

// ledgerDir is the folder that a command is about.
func ledgerDir(load func() (*loaded, error), word string) (string, error) {
	if word != "" {
		return word, nil
	}
	l, err := load()
	if err != nil {
		return "", err
	}
	return l.Ledger.Dir, nil
}

func verifyCommand(ctx context.Context, load func() (*loaded, error), word string, out io.Writer) error {
	dir, err := ledgerDir(load, word)
	if err != nil {
		return err
	}
	r, err := audit.Verify(ctx, dir)
	if err != nil {
		return unreadable(dir, err)
	}
	fmt.Fprintf(out, "segments  %d\n", r.Segments)
	if r.Last > 0 {
		fmt.Fprintf(out, "entries   %d to %d\nfrom      %s\nto        %s\n", r.First, r.Last, r.Oldest.UTC().Format(time.RFC3339), r.Newest.UTC().Format(time.RFC3339))
	}
	fmt.Fprintf(out, "refusals  %d\n", r.Refusals)
	if r.Torn > 0 {
		fmt.Fprintf(out, "torn      %d bytes at the end: a write that was interrupted, or goes on now\n", r.Torn)
	}
	if r.RingDamage > 0 {
		fmt.Fprintf(out, "torn      %d files of refusals cannot be read to their end\n", r.RingDamage)
	}
	for _, err := range r.Damage {
		fmt.Fprintf(out, "damaged   %v\n", err)
	}
	if len(r.Damage) > 0 {
		return &daemon.Findings{Text: fmt.Sprintf("the ledger is damaged in %d places; keep the folder, and look at the disk", len(r.Damage))}
	}
	return nil
}

func exportCommand(ctx context.Context, load func() (*loaded, error), word string, out io.Writer) error {
	dir, err := ledgerDir(load, word)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(out, 64<<10)
	lines := json.NewEncoder(w)
	lines.SetEscapeHTML(false)
	for rec, err := range audit.Export(ctx, dir, audit.Query{}) {
		if err == nil {
			err = lines.Encode(rec)
		}
		if err != nil {
			return errors.Join(unreadable(dir, err), w.Flush())
		}
	}
	return w.Flush()
}

// unreadable is the error of a ledger that cannot be read.
func unreadable(dir string, err error) error {
	if _, ok := errors.AsType[*audit.CorruptError](err); ok {
		return api.Wrap(api.LedgerDamaged, err, err.Error())
	}
	if errors.Is(err, fs.ErrNotExist) {
		return api.E(api.InputUnreadable, "there is no ledger in %s", dir)
	}
	return err
}
