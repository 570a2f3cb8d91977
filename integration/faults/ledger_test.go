//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-ca/signet/internal/audit"
)

// smallest makes the smallest ledger, so that a few entries fill a segment.
var smallest = audit.Options{SegmentSize: audit.MinSegment, RefusalBytes: audit.MinRefusals}

// ledgerChild fills one segment of a ledger and begins the next, refuses somebody now and then, and does a little more
// after a clean stop. It goes on after an error, as a server does until it is ended, to show what is taken then.
func ledgerChild(dir string) {
	ctx := context.Background()
	ledger := filepath.Join(dir, "ledger")
	failed := false
	said := func(what, serial string, err error) {
		switch {
		case err == nil:
			fmt.Println("done", serial)
			return
		case errors.Is(err, audit.ErrFailed):
			fmt.Println("unknown", serial, err)
		default:
			fmt.Println("fail", serial, what, err)
		}
		failed = true
	}
	n := 0
	for life, entries := range []int{21, 2} {
		l, err := audit.Open(ledger, smallest)
		if err != nil {
			said("open", fmt.Sprint("open-", life), err)
			continue
		}
		for range entries {
			n++
			e := audit.Entry{Kind: audit.KindIssue, Serial: fmt.Sprintf("%04x", n), Detail: strings.Repeat("d", 60_000)}
			fmt.Println("try", e.Serial)
			said("append", e.Serial, l.Append(ctx, e))
			if n%10 == 1 {
				_, err := l.Refuse(ctx, audit.Entry{Kind: audit.KindRefuse, Reason: "TOKEN_EXPIRED", Caller: fmt.Sprint("caller-", n), CorrelationID: fmt.Sprint(n)})
				fmt.Println("refused", err)
			}
		}
		if err := l.Close(); err != nil {
			said("close", fmt.Sprint("close-", life), err)
		}
	}
	if failed {
		os.Exit(1)
	}
}

// scan reads a ledger from outside: how often each serial is there.
func scan(dir string) (map[string]int, error) {
	found := map[string]int{}
	for rec, err := range audit.Scan(dir) {
		if err != nil {
			return found, err
		}
		if rec.Kind != audit.KindMint {
			found[rec.Serial]++
		}
	}
	return found, nil
}

func judgeLedger(r run) error {
	dir := filepath.Join(r.dir, "ledger")
	found := map[string]int{}
	if _, err := os.Stat(dir); err == nil {
		if found, err = scan(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("scanning: %w", err)
		}
	}
	acknowledged := map[string]bool{}
	unknown := false
	for line := range strings.Lines(r.said) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch serial := f[1]; f[0] {
		case "done":
			acknowledged[serial] = true
			if found[serial] != 1 {
				return fmt.Errorf("%s was acknowledged and is there %d times", serial, found[serial])
			}
			if unknown && serial <= "0015" {
				return fmt.Errorf("%s was taken after a write of unknown outcome", serial)
			}
		case "unknown":
			unknown = true
		case "fail":
			if found[serial] != 0 {
				return fmt.Errorf("%s is there, and the error said that it is not", serial)
			}
		}
	}
	onRing := strings.HasPrefix(filepath.Base(r.fault.at.file), "refusals-")
	if onRing && !r.fault.sticky && r.fault.do != die && r.fault.do != tear && (len(acknowledged) != 23 || r.code != 0) {
		return fmt.Errorf("what befell the ring of refusals cost the ledger %d entries", 23-len(acknowledged))
	}
	l, err := audit.Open(dir, smallest)
	if err != nil {
		return fmt.Errorf("opening it again: %w", err)
	}
	err = l.Append(context.Background(), audit.Entry{Kind: audit.KindIssue, Serial: "ffff"})
	if err := errors.Join(err, l.Close()); err != nil {
		return fmt.Errorf("going on: %w", err)
	}
	again, err := scan(dir)
	if err != nil {
		return fmt.Errorf("scanning after going on: %w", err)
	}
	found["ffff"]++
	for serial, n := range found {
		if again[serial] != n {
			return fmt.Errorf("%s was there %d times, and is there %d times after going on", serial, n, again[serial])
		}
	}
	if len(again) != len(found) {
		return fmt.Errorf("%d entries became %d", len(found), len(again))
	}
	return nil
}

// TestLedger proves every call of the ledger: what was acknowledged is there once and whole, what was refused for want of
// room is not there, nothing is taken after a write of unknown outcome, what befalls refusals costs no entry, and whatever
// was left can be opened and gone on with.
//
// threat: E01, E03, E27
func TestLedger(t *testing.T) {
	subject{
		run:    func(t testing.TB, w *warden) (int, string) { return child(t, w, "ledger", w.root) },
		judge:  judgeLedger,
		loose:  true,
		sample: true,
	}.enumerate(t)
}
