package audit

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"
)

// What is written is what json.Marshal writes, whichever members an entry has and whatever stands in them.
func TestAppendEntryIsMarshal(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	texts := []string{
		"", "x", "spiffe://example.org/ns/shop/sa/cart", "0b7ffe5c-3a4f", "quote\"", "back\\slash", "<a href='&'>", "new\nline", "\x00", "\x7f", "c\u00e4rt",
		"\u2028", "\xff\xfe", "\U0001f600", strings.Repeat("long ", 300),
	}
	times := []time.Time{
		{}, time.Unix(0, 0), time.Date(2026, 11, 23, 1, 2, 3, 456789000, time.FixedZone("", 3600)), time.Date(2049, 1, 1, 0, 0, 0, 1, time.UTC),
		time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	compare := func(e Entry) {
		t.Helper()
		want, wantErr := json.Marshal(e)
		got, err := appendEntry(nil, &e)
		if (err != nil) != (wantErr != nil) || err == nil && string(got) != string(want) {
			t.Fatalf("got\n%s, %v, want\n%s, %v", got, err, want, wantErr)
		}
	}
	fill := func(v reflect.Value) {
		switch p := v.Addr().Interface().(type) {
		case *time.Time:
			*p = times[random.IntN(len(times))]
		case *[]string:
			for range random.IntN(3) {
				*p = append(*p, texts[random.IntN(len(texts))])
			}
		case *uint64:
			*p = random.Uint64()
		case *bool:
			*p = true
		default:
			v.SetString(texts[random.IntN(len(texts))])
		}
	}
	compare(Entry{})
	fields := reflect.TypeFor[Entry]().NumField()
	for i := range fields { // each alone: a field that was added and is not written is found here
		for range 50 {
			var e Entry
			fill(reflect.ValueOf(&e).Elem().Field(i))
			compare(e)
		}
	}
	for range 5000 {
		var e Entry
		for i := range fields {
			if random.IntN(2) == 0 {
				fill(reflect.ValueOf(&e).Elem().Field(i))
			}
		}
		compare(e)
	}
}

func BenchmarkAppendEntry(b *testing.B) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 123456789, time.UTC)
	e := Entry{
		Time: at, Kind: KindIssue, CorrelationID: "0b7ffe5c3a4f0b7f", SPIFFEID: "spiffe://example.org/ns/shop/sa/cart",
		Cluster: "https://kubernetes.default.svc.cluster.local", Namespace: "shop", ServiceAccount: "cart", ServiceAccountUID: "4f3c",
		Pod: "cart-1", PodUID: "8d2e", Node: "node-1", NodeUID: "77aa", TokenID: "9e1f", Serial: strings.Repeat("4f", 20),
		NotAfter: at.Add(time.Hour).Truncate(time.Second), Issuer: strings.Repeat("c3", 20),
	}
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = appendEntry(make([]byte, 0, entryBytes), &e)
		}
	})
	b.Run("json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = json.Marshal(e)
		}
	})
}
