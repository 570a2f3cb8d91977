package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/canary"
)

// TestRestoreOverLater: what the store that is replaced knows counts. A backup that trusts a root which was compromised since is
// refused; bans that it does not have are kept; and its generation is passed.
//
// threat: E24
func TestRestoreOverLater(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	now := time.Now()
	newRoot := func() journal.Authority {
		key, err := canary.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		root, err := issuance.NewRoot(td, key, 24*time.Hour, now)
		if err != nil {
			t.Fatal(err)
		}
		return journal.Authority{State: journal.Prepared, ID: hex.EncodeToString(root.SubjectKeyId), Certificate: root.Raw, SealedKey: []byte("sealed")}
	}
	backup, err := journal.New(td, newRoot())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l := &loaded{td: td}
	l.Seal.KeyFile = filepath.Join(dir, "key")
	l.Store.Path = filepath.Join(dir, "signet.db")
	l.Publish.Dir = filepath.Join(dir, "bundle")
	key := ca.NewSealKey()
	sealer, err := ca.NewSealer(key)
	if err != nil {
		t.Fatal(err)
	}
	data, err := store.Snapshot{Journal: backup}.Seal(sealer, now)
	file := filepath.Join(dir, "backup")
	if err := errors.Join(err, os.WriteFile(l.Seal.KeyFile, key, 0o600), os.WriteFile(file, data, 0o600)); err != nil {
		t.Fatal(err)
	}
	put := func(j journal.Journal) {
		t.Helper()
		if _, err := store.Put(t.Context(), l.Store, store.Snapshot{Journal: j}, true); err != nil {
			t.Fatal(err)
		}
	}

	banned, err := backup.WithBan(journal.Ban{Cluster: "https://issuer", NodeUID: "uid-1", Node: "node-1", By: "uid:0", Reason: "stolen", At: now})
	if err != nil {
		t.Fatal(err)
	}
	later := api.Generation{Epoch: api.EpochAt(now) + 100, Number: 7} // a restore an hour later has a higher one by the clock
	banned.Epoch, banned.Number = later.Epoch, later.Number
	restored := api.Generation{Epoch: later.Epoch + 1, Number: 1}.String()
	put(banned)
	plan, err := planRestore(t.Context(), l, restoreFlags{replace: true}, file)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := plan.snapshot.Journal.Banned("https://issuer", "uid-1"); !ok || !slices.Equal(plan.Bans, []string{"node-1 uid-1"}) || plan.LostBans != nil || plan.ShownGeneration != later.String() || plan.Generation != restored {
		t.Errorf("bans %v, shown %s, restored to %s", plan.Bans, plan.ShownGeneration, plan.Generation)
	}
	var text strings.Builder
	for _, row := range plan.rows("would become") {
		text.WriteString(strings.Join(row[:], ": ") + "\n")
	}
	for _, want := range []string{"ban kept: node-1 uid-1\n", "would become: generation " + restored + "\n", "replaces: a store of generation " + later.String() + "\n"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("people are not told %q:\n%s", want, text.String())
		}
	}

	// Somebody may write where the bundle is published. What a CA can have come to counts, wherever it comes from; more than that does not.
	top := api.EpochAt(now) + 1<<16
	for _, tt := range []struct {
		name   string
		shown  api.Generation
		want   uint32 // epoch
		warned bool
	}{
		{"as high as there can be", api.Generation{Epoch: top, Number: 1}, top + 1, false},
		{"higher than there can be", api.Generation{Epoch: top + 2, Number: 1}, later.Epoch + 1, true},
		{"the last number", api.FromSequence(math.MaxUint64), later.Epoch + 1, true},
	} {
		doc := fmt.Sprintf(`{"keys":[],"spiffe_sequence":%d}`, tt.shown.Sequence())
		if err := errors.Join(os.MkdirAll(l.Publish.Dir, 0o755), os.WriteFile(filepath.Join(l.Publish.Dir, "bundle.json"), []byte(doc), 0o644)); err != nil {
			t.Fatal(err)
		}
		plan, err := planRestore(t.Context(), l, restoreFlags{replace: true}, file)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		g := plan.snapshot.Journal.Generation()
		if warned := len(plan.Warnings) > 0 && strings.Contains(plan.Warnings[0], tt.shown.String()); g.Epoch != tt.want || warned != tt.warned || !g.Believable(now) {
			t.Errorf("%s: restored to %s, warnings %q", tt.name, g, plan.Warnings)
		}
	}
	if err := os.RemoveAll(l.Publish.Dir); err != nil {
		t.Fatal(err)
	}

	tainted, err := journal.Taint(backup, journal.TaintRequest{
		Request: journal.Request{ID: "fire", By: "uid:0", Why: "stolen"}, Compromised: backup.Authorities[0].ID, Authority: newRoot(),
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	put(tainted)
	if _, err := planRestore(t.Context(), l, restoreFlags{replace: true}, file); api.ReasonOf(err) != api.AuthorityRefused {
		t.Errorf("a root that was compromised since: %v", err)
	}
	if _, err := planRestore(t.Context(), l, restoreFlags{}, file); api.ReasonOf(err) != api.StateExists {
		t.Errorf("without --replace: %v", err)
	}
	foreign := tainted
	foreign.TrustDomain = "example.com"
	put(foreign)
	if _, err := planRestore(t.Context(), l, restoreFlags{replace: true}, file); api.ReasonOf(err) != api.StateForeign {
		t.Errorf("over the store of another trust domain: %v", err)
	}
}
