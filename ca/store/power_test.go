package store_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
)

// recordedSteps is a life of a store: it is made, written, outgrows the room that it has reserved, shrinks, and is replaced by a
// backup. done is called after each step, which is durable by then.
func recordedSteps(ctx context.Context, dir string, done func(n int)) error {
	data, err := os.ReadFile(filepath.Join(dir, fileNext))
	if err != nil {
		return err
	}
	j, err := journal.Decode(data)
	if err != nil {
		return err
	}
	c := store.Config{Path: filepath.Join(dir, fileStore)}
	var s ca.Store
	var closeStore func() error
	var rev ca.Revision
	reopen := func() (err error) {
		s, closeStore, err = store.Open(ctx, c, true)
		return err
	}
	swap := func() error {
		j.Number++
		next, err := s.Swap(ctx, rev, j)
		rev = next
		return err
	}
	large := func(n int) ca.Replica {
		return ca.Replica{Name: "large", Minted: []ca.Minted{{Root: strings.Repeat("x", n)}}}
	}
	for i, do := range []func() error{
		reopen,
		swap,
		swap,
		func() error { return s.SaveReplica(ctx, ca.Replica{Name: "ca-0"}) },
		func() error { return s.SaveReplica(ctx, large(16<<10)) },
		swap,
		func() error { return s.SaveReplica(ctx, large(1<<20)) }, // beyond what is reserved
		func() error { return s.SaveReplica(ctx, large(1)) },
		swap, // into pages that are free again
		func() error { return errors.Join(closeStore(), reopen()) },
		swap,
		func() error {
			snap, err := store.Snap(ctx, s)
			if err := errors.Join(err, closeStore()); err != nil {
				return err
			}
			snap.Journal.Epoch += 7
			_, err = store.Put(ctx, c, snap, true)
			return err
		},
		func() error {
			err := reopen()
			if err == nil {
				j, rev, err = s.Load(ctx)
			}
			return err
		},
		swap,
		func() error { return closeStore() },
	} {
		if err := do(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
		done(i)
	}
	return nil
}

// TestPowerFails records every write and sync of a store's life with strace, and then fails the power between any two of them: of
// what was not synced any part may be on disk, in any order, and of each write any sectors. The same goes for the names in the
// folder. Each image opens, and holds what was durable last or what was being written. None is refused, none is made anew.
//
// SIGNET_TEST_IMAGES=50000 tries that many.
//
// threat: E01, E02
func TestPowerFails(t *testing.T) {
	limit := 800
	if testing.Short() {
		limit = 60
	}
	if n, err := strconv.Atoi(os.Getenv("SIGNET_TEST_IMAGES")); err == nil {
		limit = n
	}
	// What each step leaves, from a run that nobody records.
	record, err := newJournal(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, fileNext), record, 0o600); err != nil {
		t.Fatal(err)
	}
	states := []*store.Snapshot{nil} // before the first step
	if err := recordedSteps(t.Context(), dir, func(int) {
		s, err := peekState(store.Config{Path: filepath.Join(dir, fileStore)})
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, s)
	}); err != nil {
		t.Fatal(err)
	}

	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, fileNext), record, 0o600); err != nil {
		t.Fatal(err)
	}
	trace := filepath.Join(t.TempDir(), "trace")
	out, err := strace(t, "record", dir, "-o", trace, "-xx", "-s", "33554432", "-e",
		"trace=openat,close,pwrite64,fdatasync,fsync,ftruncate,fallocate,linkat,renameat,renameat2,unlinkat").CombinedOutput()
	if strings.Contains(string(out), "ptrace") {
		t.Skipf("processes cannot be traced here: %s", out)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	images := newImages(t, dir, states)
	events := readTrace(t, trace)
	for pass := 0; images.tried < limit && pass < 1+limit/60; pass++ { // the first has all whole subsets, each one after that others at random
		images.replay(events, pass, limit)
	}
	t.Logf("%d calls, %d syncs, %d images: %v", len(events), images.syncs, images.tried, images.found)
	if images.acks != len(states)-1 {
		t.Errorf("%d steps were recorded, there are %d", images.acks, len(states)-1)
	}
	if images.found["before"] == 0 || images.found["after"] == 0 || images.found["none"] == 0 || images.syncs < 20 {
		t.Error("one of them was not seen")
	}
}

// peekState is stateOf while a process has the store open.
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

// event is one call to the system.
type event struct {
	name   string
	fd     int
	paths  []string
	data   []byte
	a, b   int64 // length and offset, or size
	result int
}

// readTrace reads what strace wrote. A call that another thread interrupted is in two lines.
func readTrace(t *testing.T, path string) (events []event) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 256<<20)
	halves := map[string]string{}
	for lines.Scan() {
		line := lines.Text()
		pid, rest, _ := strings.Cut(line, " ")
		if head, ok := strings.CutSuffix(line, " <unfinished ...>"); ok {
			halves[pid] = head
			continue
		}
		if i := strings.Index(rest, " resumed>"); strings.HasPrefix(strings.TrimSpace(rest), "<... ") && i > 0 {
			line = halves[pid] + rest[i+len(" resumed>"):]
		}
		_, line, _ = strings.Cut(strings.TrimLeft(line, " "), " ")
		name, args, ok := strings.Cut(strings.TrimLeft(line, " "), "(")
		end := strings.LastIndex(args, "= ")
		if !ok || end < 0 || strings.ContainsAny(name, " -+") {
			continue // a signal, or the end of the process
		}
		events = append(events, parseCall(t, name, strings.TrimSuffix(strings.TrimRight(args[:end], " "), ")"), strings.Fields(args[end+2:])[0]))
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return events
}

func parseCall(t *testing.T, name, args, result string) event {
	t.Helper()
	e := event{name: name}
	var err error
	if e.result, err = strconv.Atoi(result); err != nil {
		t.Fatal(err)
	}
	var texts [][]byte
	parts := strings.Split(args, `"`) // every other one is a text, all of it in hex
	for i, part := range parts {
		if i%2 == 0 {
			if i > 0 && strings.HasPrefix(part, "...") {
				t.Fatalf("%s: its text was cut off", name)
			}
			continue
		}
		text, err := hex.DecodeString(strings.ReplaceAll(part, `\x`, ""))
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, text)
		parts[i] = "_"
	}
	words := strings.Split(strings.Join(parts, ""), ", ")
	number := func(i int) int64 {
		n, err := strconv.ParseInt(words[i], 10, 64)
		if err != nil {
			t.Fatalf("%s(%s): %v", name, words, err)
		}
		return n
	}
	switch name {
	case "openat", "linkat", "renameat", "renameat2", "unlinkat":
		for _, text := range texts {
			e.paths = append(e.paths, string(text))
		}
	case "pwrite64":
		e.fd, e.data, e.a, e.b = int(number(0)), texts[0], number(2), number(3)
		if int64(e.result) != e.a || len(e.data) != e.result {
			t.Fatalf("wrote %d of %d bytes, %d were recorded", e.result, e.a, len(e.data))
		}
	case "ftruncate":
		e.fd, e.a = int(number(0)), number(1)
	case "fallocate":
		e.fd, e.a = int(number(0)), number(2)+number(3)
	default:
		e.fd = int(number(0))
	}
	return e
}

// inode is a file: what of it is durable, and what was done to it since.
type inode struct {
	durable []byte
	pending []fileOp
}

// fileOp is a write, or with no data a size that the file grows to (grow) or has from then on.
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
	found              map[string]int
	seen               map[uint64]bool
	hash               maphash.Seed
	random             *rand.Rand
}

func newImages(t *testing.T, dir string, states []*store.Snapshot) *images {
	place := t.TempDir()
	if fast, err := os.MkdirTemp("/dev/shm", "signet-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(fast) })
		place = fast
	}
	return &images{t: t, dir: dir, path: filepath.Join(place, fileStore), states: states, found: map[string]int{}, seen: map[uint64]bool{},
		hash: maphash.MakeSeed(), random: rand.New(rand.NewPCG(1, 2))}
}

// replay goes through all calls once. In the first pass it makes the images that need no chance.
func (m *images) replay(events []event, pass, limit int) {
	fds, live := map[int]*inode{}, map[string]*inode{}
	var names []nameOp
	namesSynced := 0
	m.acks, m.syncs = 0, 0
	inside := func(path string) bool { return filepath.Dir(path) == m.dir && filepath.Base(path) != fileNext }
	folder := map[int]bool{}
	ops, last := 0, [5]int{}
	for _, e := range events {
		switch e.name {
		case "openat":
			switch {
			case e.result < 0:
			case e.paths[0] == m.dir:
				folder[e.result] = true
			case inside(e.paths[0]):
				node := live[e.paths[0]]
				if node == nil {
					node = &inode{}
					live[e.paths[0]] = node
					names = append(names, nameOp{e.paths[0], node})
				}
				fds[e.result] = node
			}
		case "close":
			delete(fds, e.fd)
			delete(folder, e.fd)
		case "pwrite64":
			if node := fds[e.fd]; node != nil {
				node.pending = append(node.pending, fileOp{off: e.b, data: e.data})
				ops++
			}
		case "ftruncate", "fallocate":
			if node := fds[e.fd]; node != nil && e.result == 0 {
				node.pending = append(node.pending, fileOp{size: e.a, grow: e.name == "fallocate"})
				ops++
			}
		case "fdatasync", "fsync":
			if node := fds[e.fd]; node != nil {
				m.syncs++
				node.durable, node.pending = apply(node.durable, node.pending), nil
			}
			if folder[e.fd] {
				m.syncs++
				namesSynced = len(names)
			}
		case "linkat":
			if e.result == 0 && inside(e.paths[1]) {
				live[e.paths[1]] = live[e.paths[0]]
				names = append(names, nameOp{e.paths[1], live[e.paths[0]]})
			}
		case "renameat", "renameat2":
			if e.result == 0 && inside(e.paths[1]) {
				node := live[e.paths[0]]
				live[e.paths[1]] = node
				delete(live, e.paths[0])
				names = append(names, nameOp{e.paths[1], node}, nameOp{name: e.paths[0]})
			}
		case "unlinkat":
			if strings.HasPrefix(filepath.Base(e.paths[0]), "ack-") {
				m.acks++
				break
			}
			if e.result == 0 && inside(e.paths[0]) {
				delete(live, e.paths[0])
				names = append(names, nameOp{name: e.paths[0]})
			}
		}
		now := [5]int{m.acks, len(names), namesSynced, m.syncs, ops}
		if now == last || pass > 0 && m.tried >= limit { // nothing that a failure would change, or enough
			continue
		}
		last = now
		for _, node := range m.nodes(names, namesSynced) {
			m.fail(node, pass)
		}
	}
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
			if op.name == filepath.Join(m.dir, fileStore) && (i < synced || subset&(1<<(i-synced)) != 0) {
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
			m.t.Fatalf("after step %d, image %d: %v", m.acks, m.tried, err)
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
		m.t.Fatalf("after step %d, image %d: neither as before nor as after:\n%s", m.acks, m.tried, cmp.Diff(before, got))
	}
}

// writeSparse writes a file whose zeros at the end take no time.
func writeSparse(path string, data []byte) error {
	used := len(bytes.TrimRight(data, "\x00"))
	return errors.Join(os.WriteFile(path, data[:used], 0o600), os.Truncate(path, int64(len(data))))
}
