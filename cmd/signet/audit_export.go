package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/internal/durable"
)

func (a *app) auditExportCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "export",
		Short: "Write what is on record as lines of JSON, oldest first",
		Long: "Write what is on record, all of it unless filters say less, as one AuditEntry in JSON a line, the oldest first.\n" +
			"A file is made with mode 0600, never written over another one, and there only when it is whole.",
		Example: "  signet audit export --file audit-2026-11.jsonl --since 2026-11-01 --until 2026-12-01\n" +
			"  signet audit export | gzip > audit.jsonl.gz",
		Args: noArgs,
	}
	f := a.auditFilterFlags(c)
	c.Flags().StringVar(&file, "file", "-", "write to this `FILE`; - is stdout")
	c.MarkFlagFilename("file")
	c.RunE = func(c *cobra.Command, _ []string) error {
		switch err := f.check(); {
		case err != nil:
			return err
		case file == "":
			return usageError{errors.New("--file is empty")}
		case file == "-":
			_, err := a.exportTo(c.Context(), f, sink{a.stdout, "stdout"})
			return err
		}
		return a.exportToFile(c.Context(), f, file)
	}
	return c
}

// exportTo writes all that the filter lets through and returns how many entries that is.
func (a *app) exportTo(ctx context.Context, f *auditFilter, w io.Writer) (n int, err error) {
	out := bufio.NewWriterSize(w, 64<<10)
	err = a.eachAudit(ctx, f, 0, func(e *auditEntry) error {
		n++
		return writeLine(out, e)
	})
	return n, errors.Join(err, out.Flush())
}

// exportToFile makes the file, or leaves nothing behind: also when a signal ends it, after which the process ends by
// that signal.
func (a *app) exportToFile(ctx context.Context, f *auditFilter, path string) error {
	signals := make(chan os.Signal, 1)
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(sig) { // by nohup, say
			signal.Notify(signals, sig)
		}
	}
	defer signal.Stop(signals)
	w, err := newExportFile(path)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var caught os.Signal
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case caught = <-signals:
			cancel()
		case <-ctx.Done():
		}
	})
	n, err := a.exportTo(ctx, f, sink{w.tmp, path})
	cancel()
	wg.Wait()
	if caught == nil && err == nil {
		if err = (sink{name: path}).failed(w.keep()); err == nil {
			a.say("%s in %s", plural(n, "entry"), path)
			return nil
		}
	}
	w.drop()
	if caught != nil {
		signal.Reset(caught)
		if self, ferr := os.FindProcess(os.Getpid()); ferr == nil && self.Signal(caught) == nil {
			<-time.After(time.Second) // the signal ends the process before
		}
	}
	return err
}

// An exportFile is a file in the making. Its path is taken by an empty file until it is whole.
type exportFile struct {
	path string
	tmp  *os.File
}

func newExportFile(path string) (*exportFile, error) {
	place, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil, usageError{fmt.Errorf("--file %s exists already, and nothing is written over", path)}
	case err != nil:
		return nil, usageError{fmt.Errorf("--file: %w", err)}
	}
	if err := place.Close(); err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	tmp, err := os.OpenFile(filepath.Join(filepath.Dir(path), ".signet-audit-"+rand.Text()), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return &exportFile{path: path, tmp: tmp}, nil
}

// keep puts the whole file in place, safe from a power failure.
func (w *exportFile) keep() error {
	err := w.tmp.Sync()
	if err = errors.Join(err, w.tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(w.tmp.Name(), w.path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(w.path))
}

// drop removes what there is. Errors do not matter: there already is one to tell.
func (w *exportFile) drop() {
	w.tmp.Close()
	os.Remove(w.tmp.Name())
	os.Remove(w.path)
}

// A tally counts what has come so far, for whoever waits.
type tally struct {
	n  atomic.Int64
	at atomic.Int64 // Unix time of the newest
}

func (t *tally) add(e *auditEntry) {
	t.n.Add(1)
	if !e.time.IsZero() {
		t.at.Store(e.time.Unix())
	}
}

// How long nothing is said of waiting, and how often it is said anew.
const (
	patience = 2 * time.Second
	repaint  = 500 * time.Millisecond
)

// waiting tells a terminal what is waited for, once that takes longer than patience, until the returned function is
// called; calling it again does nothing.
func (a *app) waiting(where string, t *tally) (stop func()) {
	if !a.tty(a.stderr) || a.getenv("TERM") == "dumb" {
		return func() {}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-done:
			return
		case <-time.After(patience):
		}
		tick := time.NewTicker(repaint)
		defer tick.Stop()
		for {
			n := t.n.Load()
			line := "reading the record of the CA at " + where + ": " + plural(int(n), "entry")
			if n > 0 {
				line += ", at " + stamp(time.Unix(t.at.Load(), 0))
			}
			fmt.Fprint(a.stderr, "\r"+scrub(line)+"; Ctrl-C ends it\x1b[K")
			select {
			case <-done:
				fmt.Fprint(a.stderr, "\r\x1b[K")
				return
			case <-tick.C:
			}
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
}
