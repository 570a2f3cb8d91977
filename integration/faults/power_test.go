//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
)

// powerLife is a life of a store: it is made, takes every step of a rotation, outgrows the room that it has reserved, shrinks, and
// is replaced by a backup. done is called after each of them, which is durable by then.
func powerLife(ctx context.Context, dir string, done func(n int)) error {
	roots, _, err := readStep(dir)
	if err != nil {
		return err
	}
	var s ca.Store
	var closeStore func() error
	reopen := func() (err error) {
		s, closeStore, err = store.Open(ctx, storeIn(dir), true)
		return err
	}
	replica := func(name string, n int) func() error {
		return func() error {
			return s.SaveReplica(ctx, ca.Replica{Name: name, Minted: []ca.Minted{{Root: strings.Repeat("x", n)}}})
		}
	}
	steps := []func() error{
		reopen,
		func() error {
			j, err := journal.New(td, roots[0])
			if err == nil {
				_, err = s.Swap(ctx, 0, j)
			}
			return err
		},
		replica("ca-0", 1),
	}
	for n := range rotationSteps {
		steps = append(steps, func() error { return take(ctx, s, n, roots) })
		switch n {
		case 3:
			steps = append(steps, replica("large", 16<<10))
		case 13:
			steps = append(steps, replica("large", 1<<20)) // beyond what is reserved
		case 14:
			steps = append(steps, replica("large", 1)) // and what is written from now on goes into pages that are free again
		case 8:
			steps = append(steps, func() error { return errors.Join(closeStore(), reopen()) })
		}
	}
	steps = append(steps,
		func() error {
			snap, err := store.Snap(ctx, s)
			if err := errors.Join(err, closeStore()); err != nil {
				return err
			}
			snap.Journal.Epoch += 7
			_, err = store.Put(ctx, storeIn(dir), snap, true)
			return err
		},
		reopen,
		replica("ca-1", 1),
		func() error { return closeStore() })
	for i, do := range steps {
		if err := do(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
		done(i)
	}
	return nil
}

// powerChild is such a life. That a step is done is seen by a call that has no effect.
func powerChild(dir string) {
	err := powerLife(context.Background(), dir, func(n int) { unix.Unlinkat(unix.AT_FDCWD, filepath.Join(dir, fmt.Sprint("ack-", n)), 0) })
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// TestPowerFails records every write and sync of a store's life, through all steps of a rotation, and then fails the power between
// any two of them: of what was not synced any part may be on disk, in any order, and of each write any sectors. The same goes for
// the names in the folder. Each image opens, and holds what was durable last or what was being written. None is refused, none is
// made anew. And as a proof of the proof: if no sync did anything, there would be images that do not.
//
// SIGNET_TEST_IMAGES=50000 tries that many.
//
// threat: E01, E02
func TestPowerFails(t *testing.T) {
	limit := 600
	if testing.Short() {
		limit = 150
	}
	if exhaustive() {
		limit = 5000
	}
	if n, err := strconv.Atoi(os.Getenv("SIGNET_TEST_IMAGES")); err == nil {
		limit = n
	}
	s := stepSubject{}
	roots := encodeRoots(t, rotationRoots(t))
	dir := quickFolder(t)
	s.fill(t, dir, roots)
	states := []*store.Snapshot{nil} // before the first step; what each leaves, by a life that nobody records
	if err := powerLife(t.Context(), dir, func(int) {
		s, err := peekState(storeIn(dir))
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, s)
	}); err != nil {
		t.Fatal(err)
	}
	dir = quickFolder(t)
	s.fill(t, dir, roots)
	rec := recorder{t: t, w: &warden{root: dir}}
	rec.w.decide = rec.record
	if code, said := child(t, rec.w, "power", dir); code != 0 {
		t.Fatalf("it ended with %d: %s", code, said)
	}
	images := newImages(t, dir, states)
	for pass := 0; images.tried < limit && pass < 1+limit/60; pass++ { // the first has all whole subsets, each one after that others at random
		images.replay(rec.events, pass, limit)
	}
	t.Logf("%d calls, %d syncs, %d images of whole writes, %d in all: %v", len(rec.events), images.syncs, images.whole, images.tried, images.found)
	if images.acks != len(states)-1 {
		t.Errorf("%d steps were recorded, there are %d", images.acks, len(states)-1)
	}
	if images.bad != nil {
		t.Error(images.bad)
	}
	if images.found["before"] == 0 || images.found["after"] == 0 || images.found["none"] == 0 || images.syncs < 40 {
		t.Error("one of them was not seen")
	}
	lie := newImages(t, dir, states)
	lie.replay(slices.DeleteFunc(slices.Clone(rec.events), func(e event) bool { return e.name == "fdatasync" }), 1, limit)
	if lie.bad == nil {
		t.Errorf("%d images of a disk that syncs nothing are good as well", lie.tried)
	}
}

// peekState is stateOf while a process has the store open; without it, nil.
func peekState(c store.Config) (*store.Snapshot, error) {
	data, err := os.ReadFile(c.Path)
	if err != nil {
		return nil, err
	}
	copied := c.Path + ".copy"
	defer os.Remove(copied)
	if err := os.WriteFile(copied, data, 0o600); err != nil {
		return nil, err
	}
	return stateOf(store.Config{Path: copied})
}

// event is one call that was recorded.
type event struct {
	name     string
	ino      uint64 // of the file that is open, or that has the first path; 0: it is made by this call
	path, to string
	data     []byte
	off      int64 // or the size
}

// recorder keeps what a process does to the files of its folder.
type recorder struct {
	t      testing.TB
	w      *warden
	events []event
}

// record looks at a call before it is made.
func (r *recorder) record(c call) (act, unix.Errno) {
	e := event{name: c.name, path: filepath.Join(r.w.root, c.file)}
	at := e.path
	switch {
	case c.path < 0:
		at = fmt.Sprintf("/proc/%d/fd/%d", r.w.pid, int32(c.args[0]))
	case c.name == "linkat" || strings.HasPrefix(c.name, "rename"):
		e.path, e.to = readString(r.w.pid, c.args[1]), e.path
		at = e.path
	}
	if info, err := os.Stat(at); err == nil {
		e.ino = info.Sys().(*syscall.Stat_t).Ino
	}
	switch c.name {
	case "openat":
		if c.args[2]&unix.O_CREAT == 0 || e.ino != 0 {
			return pass, 0
		}
	case "write", "pwrite64":
		data, err := readMemory(r.w.pid, c.args[1], int(c.args[2]))
		if err != nil || len(data) != int(c.args[2]) || c.name == "write" {
			r.t.Errorf("%s: %d bytes were recorded: %v", c, len(data), err)
		}
		e.data, e.off = data, int64(c.args[3])
	case "ftruncate":
		e.off = int64(c.args[1])
	case "fallocate":
		e.off = int64(c.args[2] + c.args[3])
	case "fdatasync", "fsync", "linkat", "renameat", "renameat2", "unlinkat":
	default:
		if c.change && c.name != "fchmod" {
			r.t.Errorf("%s is not understood", c)
		}
		return pass, 0
	}
	r.events = append(r.events, e)
	return pass, 0
}

// inode is a file: what of it is durable, and what was done to it since.
type inode struct {
	ino     uint64
	durable []byte
	pending []fileOp
}

// fileOp changes a file: it writes data, or without it changes the size, which for a reservation can only grow.
type fileOp struct {
	off  int64
	data []byte
	size int64
	grow bool
}

// nameOp makes or takes away a name of the folder.
type nameOp struct {
	name string
	node *inode // nil: it is taken away
}

// images replays a recording, and makes the images that a failure of the power may leave after each call.
type images struct {
	t      *testing.T
	dir    string // whose calls were recorded
	path   string // where images are made
	states []*store.Snapshot

	tried, syncs, acks int
	whole              int   // images of the first pass
	bad                error // the first image that is
	found              map[string]int
	seen               map[uint64]bool
	hash               maphash.Seed
	random             *rand.Rand

	live        map[string]*inode // by name, as the process sees them
	byNumber    map[uint64]*inode
	names       []nameOp
	namesSynced int
}

func newImages(t *testing.T, dir string, states []*store.Snapshot) *images {
	return &images{t: t, dir: dir, path: filepath.Join(quickFolder(t), fileStore), states: states, found: map[string]int{}, seen: map[uint64]bool{},
		hash: maphash.MakeSeed(), random: rand.New(rand.NewPCG(1, 2))}
}

// replay goes through all calls once. In the first pass it makes the images that need no chance, and compares the files at the
// end with those that are there: then nothing was done to them that was not recorded.
func (m *images) replay(events []event, pass, limit int) {
	m.live, m.byNumber, m.names, m.namesSynced = map[string]*inode{}, map[uint64]*inode{}, nil, 0
	m.acks, m.syncs = 0, 0
	for _, e := range events {
		if !m.step(e) || m.bad != nil || pass > 0 && m.tried >= limit {
			continue
		}
		for _, node := range m.nodes(m.names, m.namesSynced) {
			m.fail(node, pass)
		}
	}
	for path, node := range m.live {
		if pass > 0 {
			return
		}
		m.whole = m.tried
		if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, apply(node.durable, node.pending)) {
			m.t.Errorf("%s is not what was recorded: %v", path, err)
		}
	}
}

// node is the file of a call. The first call on one that was just made tells its number.
func (m *images) node(e event) *inode {
	if n := m.live[e.path]; n != nil && (n.ino == 0 || n.ino == e.ino) {
		n.ino = e.ino
		m.byNumber[e.ino] = n
		return n
	}
	return m.byNumber[e.ino]
}

// step does what one call did; false where a failure after it is no other than one before it.
func (m *images) step(e event) bool {
	switch e.name {
	case "openat":
		node := &inode{}
		m.live[e.path] = node
		m.names = append(m.names, nameOp{e.path, node})
	case "pwrite64", "ftruncate", "fallocate":
		node := m.node(e)
		if node == nil {
			m.t.Fatalf("%s of a file that was never made: %s", e.name, e.path)
		}
		op := fileOp{off: e.off, data: e.data}
		if e.name != "pwrite64" {
			op = fileOp{size: e.off, grow: e.name == "fallocate"}
		}
		node.pending = append(node.pending, op)
	case "fdatasync", "fsync":
		m.syncs++
		if e.path == m.dir {
			m.namesSynced = len(m.names)
		} else if node := m.node(e); node != nil {
			node.durable, node.pending = apply(node.durable, node.pending), nil
		}
	case "linkat":
		m.live[e.to] = m.node(e)
		m.names = append(m.names, nameOp{e.to, m.live[e.to]})
	case "renameat", "renameat2":
		node := m.node(e)
		m.live[e.to] = node
		delete(m.live, e.path)
		m.names = append(m.names, nameOp{e.to, node}, nameOp{name: e.path})
	case "unlinkat":
		if strings.HasPrefix(filepath.Base(e.path), "ack-") {
			m.acks++
			break
		}
		if m.live[e.path] == nil {
			return false
		}
		delete(m.live, e.path)
		m.names = append(m.names, nameOp{name: e.path})
	}
	return true
}

// nodes returns the files that may have the store's name after the power failed, nil for none.
func (m *images) nodes(names []nameOp, synced int) (found []*inode) {
	pending := names[synced:]
	if len(pending) > 8 {
		m.t.Fatalf("%d names that are not durable", len(pending))
	}
	for subset := range 1 << len(pending) {
		var node *inode
		for i, op := range names {
			if op.name == storeIn(m.dir).Path && (i < synced || subset&(1<<(i-synced)) != 0) {
				node = op.node
			}
		}
		if !slices.Contains(found, node) {
			found = append(found, node)
		}
	}
	return found
}

// fail makes the images of one file: whole writes in all combinations, or torn and in any order.
func (m *images) fail(node *inode, pass int) {
	if node == nil {
		m.check(nil, false)
		return
	}
	base, pending := node.durable, node.pending
	switch {
	case len(pending) == 0:
		if pass == 0 {
			m.check(base, true)
		}
	case pass == 0 && len(pending) <= 6:
		for subset := range 1 << len(pending) {
			var kept []fileOp
			for i, op := range pending {
				if subset&(1<<i) != 0 {
					kept = append(kept, op)
				}
			}
			m.check(apply(base, kept), true)
		}
	default:
		for range 4 {
			var kept []fileOp
			for _, i := range m.random.Perm(len(pending)) {
				kept = append(kept, m.torn(pending[i])...)
			}
			m.check(apply(base, kept), true)
		}
	}
}

// torn returns what is left of an operation: some of its sectors of 512 bytes, all of them, or none.
func (m *images) torn(op fileOp) []fileOp {
	switch m.random.IntN(4) {
	case 0:
		return nil
	case 1:
		return []fileOp{op}
	}
	if op.data == nil {
		return []fileOp{op}
	}
	var kept []fileOp
	const sector = 512
	from, to := 0, len(op.data) // a run of sectors is lost, or each by chance
	run := m.random.IntN(2) == 0
	if run {
		from = m.random.IntN(len(op.data)/sector+1) * sector
		to = min(from+(1+m.random.IntN(8))*sector, len(op.data))
	}
	for at := 0; at < len(op.data); at += sector {
		lost := run && at >= from && at < to || !run && m.random.IntN(2) == 0
		if !lost {
			kept = append(kept, fileOp{off: op.off + int64(at), data: op.data[at:min(at+sector, len(op.data))]})
		}
	}
	return kept
}

// apply returns an image after some operations; the one that it gets is not changed.
func apply(image []byte, ops []fileOp) []byte {
	image = slices.Clone(image)
	for _, op := range ops {
		end := op.off + int64(len(op.data))
		if op.data == nil {
			end = op.size
			if !op.grow && int64(len(image)) > end {
				image = image[:end]
			}
		}
		if n := end - int64(len(image)); n > 0 {
			image = append(image, make([]byte, n)...)
		}
		copy(image[op.off:], op.data)
	}
	return image
}

// check opens an image as whoever comes next does. Of the same image at the same step it is done once.
func (m *images) check(image []byte, exists bool) {
	var h maphash.Hash
	h.SetSeed(m.hash)
	fmt.Fprint(&h, m.acks, exists)
	h.Write(image)
	if m.seen[h.Sum64()] {
		return
	}
	m.seen[h.Sum64()] = true
	m.tried++
	before, after := m.states[m.acks], m.states[min(m.acks+1, len(m.states)-1)]
	var got *store.Snapshot
	if exists {
		if err := writeSparse(m.path, image); err != nil {
			m.t.Fatal(err)
		}
		var err error
		if got, err = stateOf(store.Config{Path: m.path}); err != nil {
			m.bad = fmt.Errorf("after step %d, image %d: %w", m.acks, m.tried, err)
			return
		}
	}
	switch {
	case sameState(got, after) && after != nil:
		m.found["after"]++
	case sameState(got, before) && got == nil:
		m.found["none"]++
	case sameState(got, before):
		m.found["before"]++
	default:
		m.bad = fmt.Errorf("after step %d, image %d: neither as before nor as after:\n%s", m.acks, m.tried, cmp.Diff(before, got))
	}
}

// writeSparse writes a file whose zeros at the end take no time.
func writeSparse(path string, data []byte) error {
	used := len(bytes.TrimRight(data, "\x00"))
	return errors.Join(os.WriteFile(path, data[:used], 0o600), os.Truncate(path, int64(len(data))))
}
