//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
)

// patience is how long a process is waited for, on a machine that is busy with other things.
const patience = time.Minute

// server is a signet-ca with its configuration and its state, which outlives each of its processes.
type server struct {
	t          testing.TB
	path       string
	dir, state string
	address    string
	client     *client
	p          *process
	serving    chan struct{} // closed when the agents' port is open
}

// newServer makes a root in the folder state, and where that is empty in one of its own.
func newServer(t testing.TB, state string) *server {
	t.Helper()
	tokens := newTokens(t)
	c, err := newClient(tokens)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, path: binary(t), dir: folder(t), state: state, client: c}
	if state == "" {
		s.state = filepath.Join(s.dir, "state")
	}
	s.address = configure(t, s.dir, s.state, tokens)
	if said, err := initAgain(s.dir); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	return s
}

// start starts the CA under a warden and waits until it serves or has ended.
func (s *server) start(decide func(call) (act, unix.Errno)) {
	s.t.Helper()
	s.serving = make(chan struct{})
	open := false
	line := func(l string) {
		var said struct{ Msg, What string }
		if json.Unmarshal([]byte(l), &said) == nil && said.Msg == "serving" && said.What == "grpc" && !open {
			open = true
			close(s.serving)
		}
	}
	w := &warden{root: s.state, decide: decide}
	s.p = start(s.t, w, line, nil, s.path, "run", "--config", filepath.Join(s.dir, "ca.yaml"))
	select {
	case <-s.serving:
	case <-s.p.ended():
	case <-time.After(patience):
		s.t.Fatalf("it neither serves nor ends:\n%s", s.p.said())
	}
}

// use issues n SVIDs, or as many as it can until the CA is away, and returns why it ended early.
func (s *server) use(n int) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	defer s.client.close()
	if err := s.client.open(ctx, s.address); err != nil {
		return err
	}
	return s.client.issueAll(ctx, n)
}

// stop ends the CA as an operator would and fails unless it ends well.
func (s *server) stop() {
	s.t.Helper()
	s.p.cmd.Process.Signal(syscall.SIGTERM)
	if code := s.wait(); code != 0 {
		s.t.Errorf("asked to end, it ended with %d:\n%s", code, s.p.said())
	}
}

// wait returns how the process ended.
func (s *server) wait() int {
	s.t.Helper()
	select {
	case <-s.p.ended():
	case <-time.After(patience):
		s.t.Fatalf("it does not end:\n%s", s.p.said())
	}
	if err := s.p.warden.err(); err != nil {
		s.t.Error(err)
	}
	return s.p.end()
}

// judge looks at what a process left behind.
func (s *server) judge(when string) {
	s.t.Helper()
	s.judgeLedger(when)
	if err := lookAtInit(s.state); err != nil {
		s.t.Errorf("%s: the store: %v", when, err)
	}
}

// judgeLedger fails unless every certificate that reached the client is on record, once. The CA may be running.
func (s *server) judgeLedger(when string) {
	s.t.Helper()
	found, err := scan(filepath.Join(s.state, "ledger"))
	if err != nil && !(errors.Is(err, fs.ErrNotExist) && s.client.held() == 0) {
		s.t.Fatalf("%s: the ledger: %v", when, err)
	}
	for serial, n := range found {
		if serial != "" && n != 1 {
			s.t.Errorf("%s: %s is on record %d times", when, serial, n)
		}
	}
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	for _, serial := range s.client.serials {
		if found[strings.TrimLeft(serial, "0")] == 0 && found[serial] == 0 {
			s.t.Errorf("%s: %s was issued and is not on record", when, serial)
		}
	}
}

// recorded reports whether a call is a write of the ledger or the store.
func recorded(c call) bool {
	return c.changes() && (strings.HasPrefix(c.file, "ledger") || c.file == "signet.db")
}

// TestServerKilled kills the real CA at writes of its ledger and its store, while four callers issue, until 1,000 SVIDs were
// issued and each early write and many later ones were the last: no certificate that left is missing from the record, the
// record has no torn entry, and the CA starts again each time.
//
// threat: E01
func TestServerKilled(t *testing.T) {
	early, issuances := 40, 1000
	if exhaustive() {
		early = 1 << 20 // until a life sees all of them
	}
	rng := rand.New(rand.NewPCG(1, 2))
	s, killed, certificates := newServer(t, ""), 0, 0
	life := 1
	for ; life <= early || s.client.held() < issuances; life++ {
		if life%200 == 0 { // a short record is read sooner
			certificates += s.client.held()
			s = newServer(t, "")
		}
		at := life
		if life > early {
			at = early + rng.IntN(600)
		}
		n := 0
		s.start(func(c call) (act, unix.Errno) {
			if !recorded(c) {
				return pass, 0
			}
			if n++; n != at {
				return pass, 0
			}
			if life%2 == 0 && (c.name == "write" || c.name == "pwrite64") {
				return tear, 0
			}
			return die, 0
		})
		err := s.use(issuances)
		if err == nil { // it lived through all of it
			s.stop()
		} else if code := s.wait(); code != -1 {
			t.Fatalf("life %d, to be killed at write %d: it ended with %d, the client with %v:\n%s", life, at, code, err, s.p.said())
		} else {
			killed++
		}
		s.judge(fmt.Sprintf("life %d, killed at write %d", life, at))
		if exhaustive() && life%100 == 0 {
			t.Logf("%d lives", life) // this takes an hour and more
		}
		if t.Failed() || err == nil && exhaustive() {
			break
		}
	}
	s.start(passAll)
	if err := s.use(20); err != nil {
		t.Errorf("after %d lives: %v", life, err)
	}
	s.stop()
	s.judge("at the end")
	t.Logf("%d lives, %d killed, %d certificates", life, killed, certificates+s.client.held())
}

// TestServerFails gives the real CA a bad, a read-only or a full disk below its ledger or its store while it issues: it
// ends with exit code 1 and a reason where the outcome of a write is unknown, nothing leaves after that, and it starts
// again and goes on.
//
// threat: E03
func TestServerFails(t *testing.T) {
	for _, tc := range []struct {
		name  string
		call  string // whose 5th time, in a file of the ledger that is being written, fails
		errno unix.Errno
		do    act
	}{
		{"write EIO", "pwrite64", unix.EIO, fail},
		{"write EROFS", "pwrite64", unix.EROFS, fail},
		{"half a write and EIO", "pwrite64", unix.EIO, half},
		{"written and EIO", "pwrite64", unix.EIO, late},
		{"sync EIO", "fdatasync", unix.EIO, fail},
		{"sync EROFS", "fdatasync", unix.EROFS, fail},
		{"synced and EIO", "fdatasync", unix.EIO, late},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t, "")
			n, hit := 0, false
			s.start(func(c call) (act, unix.Errno) {
				if !strings.HasPrefix(c.file, "ledger/ledger-") || c.name != tc.call && !hit {
					return pass, 0
				}
				if hit && c.changes() {
					return fail, tc.errno
				}
				if n++; n == 5 {
					hit = true
					return tc.do, tc.errno
				}
				return pass, 0
			})
			err := s.use(400)
			if err == nil {
				t.Fatal("all was issued, on a disk that fails")
			}
			if code := s.wait(); code != 1 || !strings.Contains(s.p.said(), string(api.LedgerFailed)) {
				t.Errorf("it ended with %d, the client with %v:\n%s", code, err, s.p.said())
			}
			s.judge("failed")
			s.start(passAll)
			if err := s.use(20); err != nil {
				t.Errorf("started again: %v\n%s", err, s.p.said())
			}
			s.stop()
			s.judge("started again")
		})
	}
}

// TestServerStoreFails gives the CA a store that cannot be written as it books its first intermediate: it ends and says so,
// whatever the error, and starts again.
//
// threat: E03
func TestServerStoreFails(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EIO, unix.EROFS, unix.ENOSPC} {
		for _, name := range []string{"pwrite64", "fdatasync"} {
			t.Run(name+" "+unix.ErrnoName(errno), func(t *testing.T) {
				s := newServer(t, "")
				opened := false // the first sync is of what was found
				s.start(func(c call) (act, unix.Errno) {
					if c.file != "signet.db" {
						return pass, 0
					}
					if c.sync() && !opened {
						opened = true
						return pass, 0
					}
					if c.name == name {
						return fail, errno
					}
					return pass, 0
				})
				if code := s.wait(); code != 1 || !strings.Contains(s.p.said(), string(api.StateUnknown)) {
					t.Errorf("it ended with %d:\n%s", code, s.p.said())
				}
				s.start(passAll)
				if err := s.use(4); err != nil {
					t.Errorf("started again: %v\n%s", err, s.p.said())
				}
				s.stop()
				s.judge("started again")
			})
		}
	}
}
