package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

// mixed makes a ledger with decisions, refusals and a sample: number n at minute n, in turn.
func mixed(t *testing.T, n int) (*Log, time.Time) {
	t.Helper()
	l := open(t, folder(t))
	start := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for i := range n {
		e := Entry{Time: start.Add(time.Duration(i) * time.Minute), CorrelationID: fmt.Sprint("id-", i), Kind: KindIssue, PodUID: fmt.Sprint("pod-", i),
			Detail: strings.Repeat("x", 9000), Namespace: []string{"shop", "a<b", "bank"}[i%3]}
		var err error
		switch i % 10 {
		case 3, 4:
			e.Kind = KindRefuse
			_, err = l.Refuse(t.Context(), e)
		case 5:
			e.Kind = KindRefuse
			l.sample.second = 0 // a second later, as it were
			l.Sample(e)
		default:
			err = l.Append(t.Context(), e)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return l, start
}

// Whatever is asked for, the answer is what a plain look at everything gives.
func TestRecords(t *testing.T) {
	const n = 300
	l, start := mixed(t, n)
	if parts := l.snapshot().parts; len(parts) < 2 {
		t.Fatalf("%d segments, want some", len(parts))
	}
	at := func(i int) time.Time { return start.Add(time.Duration(i) * time.Minute) }
	kept := map[string]bool{} // the ring has not room for all
	for _, rec := range refusalsOf(t, l.dir) {
		kept[rec.CorrelationID] = true
	}
	for _, tc := range []struct {
		name string
		q    Query
		want func(i int) bool // nil: all
		last int
	}{
		{"all", Query{}, nil, n},
		{"since", Query{Since: at(200)}, func(i int) bool { return i >= 200 }, n},
		{"until", Query{Until: at(20)}, func(i int) bool { return i < 20 }, n},
		{"between", Query{Since: at(150), Until: at(160)}, func(i int) bool { return i >= 150 && i < 160 }, n},
		{"nothing", Query{Since: at(n)}, func(int) bool { return false }, n},
		{"one by its id", Query{Values: []string{"id-7"}, Match: func(r *Record) bool { return r.CorrelationID == "id-7" }}, func(i int) bool { return i == 7 }, n},
		{"a value that JSON writes otherwise", Query{Values: []string{"a<b"}, Match: func(r *Record) bool { return r.Namespace == "a<b" }}, func(i int) bool { return i%3 == 1 }, n},
		{"by a function", Query{Match: func(r *Record) bool { return r.Kind == KindRefuse }}, func(i int) bool { return i%10 >= 3 && i%10 <= 5 }, n},
		{"last", Query{Last: 7}, nil, 7},
		{"last of few", Query{Last: 50, Values: []string{"bank"}, Match: func(r *Record) bool { return r.Namespace == "bank" }}, func(i int) bool { return i%3 == 2 }, 50},
		{"last before", Query{Last: 5, Until: at(30)}, func(i int) bool { return i < 30 }, 5},
		{"last since", Query{Last: 1000, Since: at(280)}, func(i int) bool { return i >= 280 }, 1000},
		{"last, more than fit into memory", Query{Last: maxLast + 1}, nil, n},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var want []string
			for i := range n {
				id := fmt.Sprint("id-", i)
				if (tc.want == nil || tc.want(i)) && (i%10 != 3 && i%10 != 4 || kept[id]) {
					want = append(want, id)
				}
			}
			want = want[max(0, len(want)-tc.last):]
			var got []string
			for rec, err := range l.Records(t.Context(), tc.q) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, rec.CorrelationID)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
			var exported []string
			for rec, err := range Export(t.Context(), l.dir, tc.q) {
				if err != nil {
					t.Fatal(err)
				}
				exported = append(exported, rec.CorrelationID)
			}
			if tc.q.Last == 0 { // the sample is in memory alone
				want = slices.DeleteFunc(want, func(id string) bool { return strings.HasSuffix(id, "5") })
				if diff := cmp.Diff(want, exported); diff != "" {
					t.Errorf("exported (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// A reader who leaves, or whose context ends, is done at once; one who meets damage is told of it after what is good.
func TestRecordsEnds(t *testing.T) {
	l, _ := mixed(t, 200)
	for range l.Records(t.Context(), Query{}) {
		break
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	for _, err := range l.Records(ctx, Query{}) {
		if n++; n == 3 {
			cancel()
		}
		if n > 5 || err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, %d records after its context ended", err, n)
			}
			break
		}
	}
	for _, q := range []Query{{Last: 3}, {Last: maxLast + 1}} {
		for _, err := range l.Records(ctx, q) {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		}
	}
	p := l.snapshot().parts[0]
	f, err := os.OpenFile(p.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("X"), MinSegment/2); err != nil {
		t.Fatal(err)
	}
	good := 0
	var last error
	for _, err := range l.Records(t.Context(), Query{}) {
		if last = err; err == nil {
			good++
		}
	}
	if _, ok := errors.AsType[*CorruptError](last); !ok || good < 20 {
		t.Errorf("%d records, then %v", good, last)
	}
}

// Its metrics are what they say.
func TestMetrics(t *testing.T) {
	l := open(t, folder(t))
	waitFor(t, l, func() bool { return l.spare != nil })
	for n := range 3 {
		if err := l.Append(t.Context(), entry(n)); err != nil {
			t.Fatal(err)
		}
		l.Refuse(t.Context(), refusal(1))
		l.Sample(Entry{})
	}
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(l); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var name strings.Builder
			name.WriteString(f.GetName())
			for _, label := range m.GetLabel() {
				name.WriteString("/" + label.GetValue())
			}
			got[name.String()] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	if room := got["signet_ledger_room_bytes"]; room > 2*MinSegment || room < 2*MinSegment-10_000 || got["signet_ledger_filesystem_free_bytes"] <= 0 {
		t.Errorf("room %v, free %v", room, got["signet_ledger_filesystem_free_bytes"])
	}
	delete(got, "signet_ledger_room_bytes")
	delete(got, "signet_ledger_filesystem_free_bytes")
	want := map[string]float64{
		"signet_ledger_entries_total": 3, "signet_ledger_syncs_total": 3, "signet_ledger_full_total": 0, "signet_ledger_next_segment": 1,
		"signet_ledger_segments": 1, "signet_ledger_segments_removed_total": 0, "signet_ledger_refusals_writable": 1,
		"signet_ledger_refusals_total/written": 1, "signet_ledger_refusals_total/coalesced": 2, "signet_ledger_refusals_total/dropped": 0,
		"signet_ledger_refusals_unrecorded_total": 3,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// Who looks for one correlation id finds it without what is older being read, and what is elsewhere of the same time.
func TestRecordsByID(t *testing.T) {
	l, start := mixed(t, 300)
	parts := l.snapshot().parts
	if len(parts) < 2 {
		t.Fatalf("%d segments, want some", len(parts))
	}
	at := func(i int) time.Time { return start.Add(time.Duration(i) * time.Minute) }
	if _, err := l.Refuse(t.Context(), Entry{Time: at(299), CorrelationID: "id-299", Kind: KindRefuse, PodUID: "again"}); err != nil {
		t.Fatal(err)
	}
	ids := func(id string) (got []string, last error) {
		for rec, err := range l.Records(t.Context(), Query{ID: id}) {
			if err != nil {
				return got, err
			}
			got = append(got, rec.Source+" "+rec.CorrelationID)
		}
		return got, nil
	}
	for id, want := range map[string][]string{
		"id-0": {"ledger id-0"}, "id-298": {"ledger id-298"}, "id-293": {"refusals id-293"}, "id-295": {"sample id-295"},
		"id-299": {"ledger id-299", "refusals id-299"}, "id-29": {"ledger id-29"}, "id-300": nil,
	} {
		if got, err := ids(id); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v, want %q", id, got, err, want)
		}
	}
	f, err := os.OpenFile(parts[0].path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("X"), MinSegment/2); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"id-298", "id-293", "id-295", "id-299"} {
		if got, err := ids(id); err != nil || len(got) == 0 {
			t.Errorf("%s is newer than the damage: %q, %v", id, got, err)
		}
	}
	if _, err := ids("id-300"); err == nil {
		t.Error("nothing is told of damage, and something was missed perhaps")
	}
}

// A refusal that came again is one record to whoever asks for the last, or for its id.
func TestRecordsFolded(t *testing.T) {
	l := open(t, folder(t))
	for n := range 3 {
		for range 4 {
			if _, err := l.Refuse(t.Context(), refusal(n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	dir := l.dir
	if err := l.Close(); err != nil { // which writes the sums
		t.Fatal(err)
	}
	if got := refusalsOf(t, dir); len(got) != 6 {
		t.Fatalf("%d lines, want 6", len(got))
	}
	l = open(t, dir)
	for _, q := range []Query{{Last: 2}, {ID: refusal(2).CorrelationID}} {
		n := 0
		for rec, err := range l.Records(t.Context(), q) {
			if n++; err != nil || rec.Count != 4 {
				t.Errorf("%+v: %+v, %v", q, rec, err)
			}
		}
		if want := max(1, q.Last); n != want {
			t.Errorf("%+v: %d records, want %d", q, n, want)
		}
	}
}

// However many of the last are wanted, they are the last of one moment: what comes while they are read is not among them.
func TestRecordsLastOfOneMoment(t *testing.T) {
	l, _ := mixed(t, 10)
	more := []Record{}
	q := Query{Last: maxLast + 1}
	calls := 0
	q.Match = func(*Record) bool {
		if calls++; calls == 10 { // the first look is nearly over
			for n := range 3 {
				if _, err := l.Refuse(t.Context(), Entry{Kind: KindRefuse, CorrelationID: fmt.Sprint("new-", n), PodUID: fmt.Sprint("new-", n)}); err != nil {
					t.Error(err)
				}
			}
		}
		return true
	}
	for rec, err := range l.Records(t.Context(), q) {
		if err != nil {
			t.Fatal(err)
		}
		more = append(more, rec)
	}
	if len(more) != 10 || strings.HasPrefix(more[9].CorrelationID, "new-") {
		t.Errorf("%d records, want the 10 that there were", len(more))
	}
}
