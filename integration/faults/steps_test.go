//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/durable"
)

// The files in the folder of a child.
const (
	fileStore  = "signet.db"
	fileRoots  = "roots.json"  // journal.Authority, of which the first is the one of the first record
	fileNumber = "number"      // of the step to take
	fileSealed = "sealed"      // the backup that is restored
	fileBackup = "backup.made" // the one that is made
)

// rotationBegan is when the first step is taken; each takes a day.
var rotationBegan = time.Date(2026, 11, 1, 2, 3, 4, 5, time.UTC)

// rotationStep is one change of the record, as whoever makes it decides it on the record that he has loaded.
type rotationStep struct {
	name string
	do   func(j journal.Journal, roots []journal.Authority, now time.Time) (journal.Journal, error)
}

func request(id string) journal.Request { return journal.Request{ID: id, By: "uid:0", Why: "test"} }

func prepareStep(id string, root int) rotationStep {
	return rotationStep{"prepare", func(j journal.Journal, roots []journal.Authority, now time.Time) (journal.Journal, error) {
		return journal.Start(j, journal.StartRequest{Request: request(id), Kind: journal.Planned, Authority: roots[root]}, now)
	}}
}

func taintStep(id string, root int) rotationStep {
	return rotationStep{"taint", func(j journal.Journal, roots []journal.Authority, now time.Time) (journal.Journal, error) {
		return journal.Taint(j, journal.TaintRequest{Request: request(id), Compromised: j.ActiveAuthority().ID, Authority: roots[root]}, now)
	}}
}

// nextStep is the one that the evidence of a fleet which has everything lets be taken.
func nextStep(want journal.Do) rotationStep {
	return rotationStep{string(want), func(j journal.Journal, _ []journal.Authority, now time.Time) (journal.Journal, error) {
		roots, err := j.Roots()
		if err != nil {
			return j, err
		}
		active := j.ActiveAuthority().ID
		held := journal.Held{Generation: j.Generation(), Hash: api.BundleHash(roots)}
		s, found := journal.Next(j, now, journal.Acks{
			Replicas: []journal.Replica{{Name: "ca-0", Reachable: true, Signs: active, Ready: true, Leaves: map[string]time.Time{active: now.Add(time.Hour)},
				Intermediates: []journal.Intermediate{{Root: active, NotAfter: now.Add(24 * time.Hour)}}}},
			Agents: []journal.Agent{{Cluster: "https://k8s.test", Node: "node-0", NodeUID: "uid-0", Connected: true, Seen: now, Until: now.Add(time.Hour), Held: held, Root: active}},
		})
		if s.Do != want {
			return j, fmt.Errorf("the next step is %q, want %s: %+v", s.Do, want, found)
		}
		return journal.Apply(j, s, now)
	}}
}

func requestStep(name, id string, f func(journal.Journal, journal.Request, time.Time) (journal.Journal, error)) rotationStep {
	return rotationStep{name, func(j journal.Journal, _ []journal.Authority, now time.Time) (journal.Journal, error) {
		return f(j, request(id), now)
	}}
}

// rotationSteps is a life of roots, with every step that a rotation has.
var rotationSteps = []rotationStep{
	prepareStep("first", 1),
	nextStep(journal.Publish),
	{"excuse", func(j journal.Journal, _ []journal.Authority, now time.Time) (journal.Journal, error) {
		return j.WithExcuse(journal.Excuse{Scope: journal.ScopeNode, Name: "node-9", Reason: "test", By: "uid:0", Until: now.Add(time.Hour)}, now)
	}},
	nextStep(journal.Activate),
	nextStep(journal.Remove),
	prepareStep("second", 2),
	nextStep(journal.Publish),
	requestStep("abort", "second", journal.Abort),
	prepareStep("third", 3),
	nextStep(journal.Publish),
	nextStep(journal.Activate),
	requestStep("rollback", "third", journal.Rollback),
	nextStep(journal.Remove),
	taintStep("fourth", 4),
	nextStep(journal.Publish),
	nextStep(journal.Activate),
	nextStep(journal.Remove),
}

// take takes a step on an open store, as the CA does.
func take(ctx context.Context, s ca.Store, n int, roots []journal.Authority) error {
	j, rev, err := s.Load(ctx)
	if err != nil {
		return err
	}
	next, err := rotationSteps[n].do(j, roots, rotationBegan.Add(time.Duration(n)*24*time.Hour))
	if err != nil {
		return err
	}
	_, err = s.Swap(ctx, rev, next)
	return err
}

// rotationRoots are as many roots as the steps need, each cross-signed by the first where that is the active one then.
func rotationRoots(t testing.TB) (roots []journal.Authority) {
	t.Helper()
	for range 5 {
		key, err := issuance.GenerateKey(issuance.KeyP256)
		if err != nil {
			t.Fatal(err)
		}
		root, err := issuance.NewRoot(td, key, 10*365*24*time.Hour, rotationBegan)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, journal.Authority{ID: hex.EncodeToString(root.SubjectKeyId), State: journal.Prepared, Certificate: root.Raw, SealedKey: bytes.Repeat([]byte{1}, 200)})
	}
	return roots
}

// rotationStates returns the records before the first step, and after each.
func rotationStates(t testing.TB, roots []journal.Authority) []journal.Journal {
	t.Helper()
	j, err := journal.New(td, roots[0])
	if err != nil {
		t.Fatal(err)
	}
	states := []journal.Journal{j}
	for n, s := range rotationSteps {
		j, err := s.do(states[n], roots, rotationBegan.Add(time.Duration(n)*24*time.Hour))
		if err == nil {
			j, err = decoded(j)
		}
		if err != nil {
			t.Fatalf("step %d, %s: %v", n, s.name, err)
		}
		states = append(states, j)
	}
	return states
}

// decoded is a record as it is read back.
func decoded(j journal.Journal) (journal.Journal, error) {
	data, err := j.Encode()
	if err != nil {
		return j, err
	}
	return journal.Decode(data)
}

// testSealer seals under a key that this process and its children know.
func testSealer() (*ca.Sealer, error) { return ca.NewSealer(bytes.Repeat([]byte{7}, ca.SealKeyBytes)) }

// lateReplica is what is saved of a replica.
var lateReplica = ca.Replica{Name: "ca-9", Minted: []ca.Minted{{Root: "ab"}}}

// stepChildren are what is done to a store at once, besides the steps of a rotation.
var stepChildren = map[string]func(dir string) error{
	"create": func(dir string) error {
		_, closeStore, err := store.Open(context.Background(), storeIn(dir), true)
		return errors.Join(err, closeIf(closeStore))
	},
	"step": func(dir string) error {
		roots, n, err := readStep(dir)
		if err != nil {
			return err
		}
		return withStore(dir, func(ctx context.Context, s ca.Store) error { return take(ctx, s, n, roots) })
	},
	"replica": func(dir string) error {
		return withStore(dir, func(ctx context.Context, s ca.Store) error { return s.SaveReplica(ctx, lateReplica) })
	},
	"backup": func(dir string) error {
		s, err := store.Peek(context.Background(), storeIn(dir))
		if err != nil {
			return err
		}
		sealer, err := testSealer()
		if err != nil {
			return err
		}
		data, err := s.Seal(sealer, rotationBegan)
		if err != nil {
			return err
		}
		return durable.CreateFile(filepath.Join(dir, fileBackup), data, 0o600)
	},
	"restore": func(dir string) error { return restore(dir, false) },
	"replace": func(dir string) error { return restore(dir, true) },
}

func storeIn(dir string) store.Config { return store.Config{Path: filepath.Join(dir, fileStore)} }

func closeIf(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

func withStore(dir string, f func(context.Context, ca.Store) error) error {
	ctx := context.Background()
	s, closeStore, err := store.Open(ctx, storeIn(dir), false)
	if err != nil {
		return err
	}
	return errors.Join(f(ctx, s), closeStore())
}

func readStep(dir string) (roots []journal.Authority, n int, err error) {
	data, err := os.ReadFile(filepath.Join(dir, fileRoots))
	if err == nil {
		err = json.Unmarshal(data, &roots)
	}
	if err != nil {
		return nil, 0, err
	}
	data, err = os.ReadFile(filepath.Join(dir, fileNumber))
	if err != nil {
		return nil, 0, err
	}
	n, err = strconv.Atoi(string(data))
	return roots, n, err
}

func restore(dir string, replace bool) error {
	data, err := os.ReadFile(filepath.Join(dir, fileSealed))
	if err != nil {
		return err
	}
	sealer, err := testSealer()
	if err != nil {
		return err
	}
	s, _, err := store.Unseal(data, td, sealer)
	if err != nil {
		return err
	}
	_, err = store.Put(context.Background(), storeIn(dir), s, replace)
	return err
}

// stepChild does one of them, and says how it ended.
func stepChild(name string) func(dir string) {
	return func(dir string) {
		if err := stepChildren[name](dir); err != nil {
			fmt.Println("fail", api.ReasonOf(err), err)
			os.Exit(1)
		}
		fmt.Println("done")
	}
}

// stepSubject is one of them, with the state before it and the one after; nil is no store.
type stepSubject struct {
	name, do      string // the child
	step          int
	before, after *store.Snapshot
	sealed        *store.Snapshot // what the backup in the folder holds
}

// TestSteps kills a process at each call, and in the middle of each write, with which it takes each step of a rotation, makes a
// store, saves a replica, makes a backup and restores one, where there is a store and where there is none. Whoever comes next
// finds the state before or the one after, whole, and the one after if the process said that it was done; and where it is the
// one before, he does it again, whatever was left behind.
//
// threat: E01
func TestSteps(t *testing.T) {
	roots := rotationRoots(t)
	states := rotationStates(t, roots)
	of := func(n int, more ...ca.Replica) *store.Snapshot {
		return &store.Snapshot{Journal: states[n], Replicas: append([]ca.Replica{{Name: "ca-0"}}, more...)}
	}
	subjects := []stepSubject{
		{"make a store", "create", 0, nil, &store.Snapshot{}, nil},
		{"save a replica", "replica", 0, of(3), of(3, lateReplica), nil},
		{"make a backup", "backup", 0, of(3), of(3), nil},
		{"restore where there is none", "restore", 0, nil, of(3), of(3)},
		{"restore in place of another", "replace", 0, of(12), of(3), of(3)},
	}
	for n, s := range rotationSteps {
		subjects = append(subjects, stepSubject{fmt.Sprint(s.name, " ", n), "step", n, of(n), of(n + 1), nil})
	}
	data := encodeRoots(t, roots)
	for _, s := range subjects {
		t.Run(s.name, func(t *testing.T) {
			template := folder(t)
			s.fill(t, template, data)
			var mu sync.Mutex
			found := map[string]int{}
			subject{
				prepare: func(t testing.TB, dir string) {
					if err := errors.Join(os.CopyFS(dir, os.DirFS(template)), private(storeIn(dir).Path)); err != nil {
						t.Error(err)
					}
				},
				run: func(t testing.TB, w *warden) (int, string) { return child(t, w, s.do, w.root) },
				judge: func(r run) error {
					which, err := s.judge(r)
					mu.Lock()
					defer mu.Unlock()
					found[which]++
					return err
				},
				deadly: true,
			}.enumerate(t)
			if t.Logf("%v", found); found["before"] < 3 || found["after"] < 2 {
				t.Error("too few were seen of one of them")
			}
		})
	}
}

func encodeRoots(t *testing.T, roots []journal.Authority) []byte {
	t.Helper()
	data, err := json.Marshal(roots)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// fill makes the folder in which processes are killed.
func (s stepSubject) fill(t *testing.T, dir string, roots []byte) {
	t.Helper()
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fileRoots, roots)
	write(fileNumber, []byte(strconv.Itoa(s.step)))
	if s.before != nil {
		if _, err := store.Put(t.Context(), storeIn(dir), *s.before, false); err != nil {
			t.Fatal(err)
		}
	}
	if s.sealed != nil {
		sealer, err := testSealer()
		if err != nil {
			t.Fatal(err)
		}
		data, err := s.sealed.Seal(sealer, rotationBegan)
		if err != nil {
			t.Fatal(err)
		}
		write(fileSealed, data)
	}
}

// private is what a store's file has to be, where there is one.
func private(path string) error {
	if err := os.Chmod(path, 0o600); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// judge says in which state a process left its folder, and what is wrong with that.
func (s stepSubject) judge(r run) (which string, err error) {
	which, err = s.state(r.dir)
	switch {
	case err != nil:
		return "", err
	case strings.Contains(r.said, "done") && which == "before":
		return "", errors.New("it said that it was done, and the state is the one before")
	case strings.Contains(r.said, "fail") && which == "after" && !strings.Contains(r.said, "fail "+string(api.StateUnknown)) && s.do == "step":
		return "", errors.New("it said that it failed, and it was done")
	case which == "after":
		return which, nil
	}
	if err := stepChildren[s.do](r.dir); err != nil {
		return "", fmt.Errorf("again: %w", err)
	}
	if now, err := s.state(r.dir); err != nil || now != "after" {
		return "", fmt.Errorf("done again, it is as %q: %w", now, err)
	}
	return which, nil
}

// state says which of the two states a folder is in.
func (s stepSubject) state(dir string) (string, error) {
	got, err := stateOf(storeIn(dir))
	if err != nil {
		return "", err
	}
	before, after := sameState(got, s.before), sameState(got, s.after)
	if s.do == "backup" && after {
		data, err := os.ReadFile(filepath.Join(dir, fileBackup))
		if errors.Is(err, fs.ErrNotExist) {
			return "before", nil
		} else if err != nil {
			return "", err
		}
		sealer, err := testSealer()
		if err != nil {
			return "", err
		}
		held, _, err := store.Unseal(data, td, sealer)
		if err != nil || !sameState(&held, s.before) {
			return "", fmt.Errorf("the backup is not whole: %w", err)
		}
	}
	switch {
	case after:
		return "after", nil
	case before:
		return "before", nil
	}
	return "", fmt.Errorf("neither as before nor as after:\n%s", cmp.Diff(s.before, got))
}

// stateOf returns what a store holds; nil where there is none, and an empty one where it holds no record.
func stateOf(c store.Config) (*store.Snapshot, error) {
	if _, err := os.Lstat(c.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	s, closeStore, err := store.Open(context.Background(), c, false)
	if err != nil {
		return nil, err
	}
	snap, err := store.Snap(context.Background(), s)
	if api.ReasonOf(err) == api.StateMissing {
		var replicas []ca.Replica
		replicas, err = s.Replicas(context.Background())
		snap = store.Snapshot{Replicas: replicas}
	}
	return &snap, errors.Join(err, closeStore())
}

func sameState(a, b *store.Snapshot) bool {
	return (a == nil) == (b == nil) && (a == nil || reflect.DeepEqual(*a, *b)) // thousands of times, and faster than cmp
}
