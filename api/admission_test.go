package api

import (
	"testing"
	"time"
)

// What holds nothing, or nothing that is good any more, is due before what lasts, and behind what ends in a moment.
func TestDueBy(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for _, tt := range []struct {
		name string
		held time.Time
		want time.Duration
	}{
		{"nothing", time.Time{}, FirstPatience},
		{"nothing, as it crosses the wire", time.Unix(0, 0), FirstPatience},
		{"expired", now.Add(-time.Hour), FirstPatience},
		{"expires now", now, FirstPatience},
		{"a moment", now.Add(time.Second), time.Second},
		{"long", now.Add(time.Hour), time.Hour},
	} {
		if got := DueBy(tt.held, now).Sub(now); got != tt.want {
			t.Errorf("%s: due in %v, want %v", tt.name, got, tt.want)
		}
	}
}
