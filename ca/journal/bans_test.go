package journal

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

var banTime = time.Date(2026, 11, 23, 5, 0, 0, 0, time.UTC)

func ban(cluster, uid string) Ban {
	return Ban{Cluster: cluster, NodeUID: uid, Node: "node-1", At: banTime, By: "uid:0", Reason: "stolen"}
}

// TestBans bans and allows at random and compares with a map: a record's bans are those that were made and not taken back,
// each node once, in order, and the record is valid and stays what it is when it is written and read.
func TestBans(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	j, want := newJournal(t), map[[2]string]Ban{}
	for range 150 {
		b := ban(string('a'+rune(r.IntN(3))), string('a'+rune(r.IntN(8))))
		b.At = b.At.Add(time.Duration(r.IntN(1000)) * time.Second)
		before := slices.Clone(j.Bans)
		next := j.WithoutBan(b.Cluster, b.NodeUID)
		if delete(want, [2]string{b.Cluster, b.NodeUID}); r.IntN(3) > 0 {
			var err error
			if next, err = j.WithBan(b); err != nil {
				t.Fatal(err)
			}
			want[[2]string{b.Cluster, b.NodeUID}] = b
		}
		if diff := cmp.Diff(before, j.Bans); diff != "" {
			t.Fatalf("the record that was there was changed (-before +after):\n%s", diff)
		}
		j = next
		if len(j.Bans) != len(want) || !slices.IsSortedFunc(j.Bans, compareBans) {
			t.Fatalf("%d bans, want %d in order: %+v", len(j.Bans), len(want), j.Bans)
		}
		for _, cluster := range []string{"a", "b", "c", "d"} {
			for _, uid := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i"} {
				got, ok := j.Banned(cluster, uid)
				made, is := want[[2]string{cluster, uid}]
				if ok != is || got != made {
					t.Fatalf("ban of %s, %s: %+v (%t), want %+v (%t)", cluster, uid, got, ok, made, is)
				}
			}
		}
		data, err := j.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := Decode(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(j, back); diff != "" {
			t.Fatalf("there and back (-want +got):\n%s", diff)
		}
	}
}

// TestOlderRecord changes a record of schema 1, which makes it one of schema 2 and no higher: whoever knows only the first must
// not take it for one without bans, and whoever knows the second reads it.
func TestOlderRecord(t *testing.T) {
	data, err := os.ReadFile("testdata/schema-1.json")
	if err != nil {
		t.Fatal(err)
	}
	old, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	banned, err := old.WithBan(ban("c", "n"))
	if err != nil {
		t.Fatal(err)
	}
	keyed, err := old.WithTicketKey(TicketKey{ID: "0011223344556677", At: banTime, Sealed: []byte("s")})
	if err != nil {
		t.Fatal(err)
	}
	for name, j := range map[string]Journal{"ban": banned, "no ban": old.WithoutBan("c", "n"), "ticket key": keyed} {
		if j.Schema != 2 || j.Validate() != nil || j.Generation() != old.Generation() {
			t.Errorf("%s: schema %d, generation %s: %v", name, j.Schema, j.Generation(), j.Validate())
		}
	}
	if old.Schema != 1 || len(old.Bans) != 0 {
		t.Errorf("the old record was changed: %+v", old)
	}
}

func TestBansRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Journal)
	}{
		{"no cluster", func(j *Journal) { j.Bans[0].Cluster = "" }},
		{"no UID", func(j *Journal) { j.Bans[0].NodeUID = "" }},
		{"no time", func(j *Journal) { j.Bans[0].At = time.Time{} }},
		{"nobody", func(j *Journal) { j.Bans[0].By = "" }},
		{"long cluster", func(j *Journal) { j.Bans[0].Cluster = strings.Repeat("a", maxCluster+1) }},
		{"long UID", func(j *Journal) { j.Bans[0].NodeUID = strings.Repeat("a", maxName+1) }},
		{"long name", func(j *Journal) { j.Bans[0].Node = strings.Repeat("a", maxName+1) }},
		{"long by", func(j *Journal) { j.Bans[0].By = strings.Repeat("a", MaxBanText+1) }},
		{"long reason", func(j *Journal) { j.Bans[0].Reason = strings.Repeat("a", MaxBanText+1) }},
		{"no text", func(j *Journal) { j.Bans[0].Reason = "\xff" }},
		{"one node twice", func(j *Journal) { j.Bans[1] = j.Bans[0] }},
		{"out of order", func(j *Journal) { slices.Reverse(j.Bans) }},
		{"too many", func(j *Journal) {
			j.Bans = nil
			for i := range MaxBans + 1 {
				j.Bans = append(j.Bans, ban("c", string(rune(0x4e00+i))))
			}
		}},
		{"schema 1", func(j *Journal) { j.Schema = 1 }},
		{"ticket key without an id", func(j *Journal) { j.TicketKeys = []TicketKey{{At: banTime, Sealed: []byte("s")}} }},
		{"ticket key in upper case", func(j *Journal) {
			j.TicketKeys = []TicketKey{{ID: "00112233445566FF", At: banTime, Sealed: []byte("s")}}
		}},
		{"empty ticket key", func(j *Journal) { j.TicketKeys = []TicketKey{{ID: "00112233445566ff", At: banTime}} }},
		{"ticket key twice", func(j *Journal) {
			k := TicketKey{ID: "00112233445566ff", At: banTime, Sealed: []byte("s")}
			j.TicketKeys = []TicketKey{k, k}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := newJournal(t)
			j.Bans = []Ban{ban("a", "a"), ban("b", "b")}
			if err := j.Validate(); err != nil {
				t.Fatal(err)
			}
			tt.change(&j)
			if err := j.Validate(); api.ReasonOf(err) != api.StateCorrupt {
				t.Errorf("valid: %v", err)
			}
		})
	}
	if _, err := newJournal(t).WithBan(Ban{Cluster: "c", NodeUID: "n"}); api.ReasonOf(err) != api.StateCorrupt {
		t.Errorf("a ban by nobody: %v", err)
	}
}

// TestBansBounded fills a record with bans until it takes no more. What it took can be written and read again, and there
// is room for one in place of another.
func TestBansBounded(t *testing.T) {
	uid := func(i int) string { return strings.Repeat("n", 40) + string(rune(0x4e00+i)) }
	for _, tt := range []struct {
		name string
		text string // of each ban
		want int    // bans at least
	}{
		{"short", "stolen", MaxBans},
		{"long", strings.Repeat("x", MaxBanText), 500},
		{"long once written", strings.Repeat("<", MaxBanText), 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j, next := newJournal(t), ban("https://kubernetes.default.svc", uid(0))
			next.Reason = tt.text
			one, err := json.Marshal(next)
			if err != nil {
				t.Fatal(err)
			}
			for len(j.Bans) < min(MaxBans, maxBanBytes/len(one))-3 { // the last ones one by one
				j.Bans = append(j.Bans, next)
				next.NodeUID = uid(len(j.Bans))
			}
			full := error(nil)
			for range 10 {
				more, err := j.WithBan(next)
				if full = err; err != nil {
					break
				}
				j, next.NodeUID = more, uid(len(more.Bans))
			}
			if api.ReasonOf(full) != api.StateFull || len(j.Bans) < tt.want || len(j.Bans) > MaxBans {
				t.Fatalf("%d bans: %v", len(j.Bans), full)
			}
			data, err := j.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Decode(data); err != nil {
				t.Fatal(err)
			}
			again := j.Bans[0]
			again.Reason = ""
			if _, err := j.WithBan(again); err != nil {
				t.Errorf("no room for another ban of the same node: %v", err)
			}
			less := j.WithoutBan(j.Bans[0].Cluster, j.Bans[0].NodeUID)
			if _, err := less.WithBan(j.Bans[0]); err != nil {
				t.Errorf("no room in place of one that was taken back: %v", err)
			}
		})
	}
}

// TestEncodeBounded writes no record that could not be read again.
func TestEncodeBounded(t *testing.T) {
	j := newJournal(t)
	j.Authorities[0].SealedKey = make([]byte, maxBytes)
	if _, err := j.Encode(); api.ReasonOf(err) != api.StateCorrupt {
		t.Errorf("written: %v", err)
	}
}
