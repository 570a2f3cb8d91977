package main

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func TestCorrelationID(t *testing.T) {
	const id, other = "4be1f0a7c2d95e38", "9a0c5512f3e48d76"
	tests := []struct{ in, want, err string }{
		{id, id, ""},
		{" " + id + "\n", id, ""},
		{strings.ToUpper(id), id, ""},
		{"correlation id " + id + ".", id, ""},
		{`"correlation_id":"` + id + `"`, id, ""},
		{"correlation_id=" + id + ",", id, ""},
		{"decision.cli.signet.dev/" + id, id, ""},
		{"(" + id + ") and again " + id, id, ""},
		{id + " " + other, "", "more than one"},
		{id + other, "", "none in"}, // 32 digits: a trace id
		{"x" + id, "", "none in"},
		{id[:15], "", "none in"},
		{"a1a1a1a1-" + id, "", "none in"}, // a part of a UID
		{"", "", "none in"},
		{"SGN-0106", "", "signet explain SGN-0106"},
		{"TOKEN_AUDIENCE", "", "signet explain SGN-0106"},
		{strings.Repeat("4a", 20), "", "signet audit --serial " + strings.Repeat("4a", 20)},
		{strings.Repeat("word ", 1000), "", "none in what was given"},
	}
	for _, tt := range tests {
		got, err := correlationID(tt.in)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %q, %v", tt.in, got, err)
		}
	}
}

func FuzzCorrelationID(f *testing.F) {
	for _, seed := range []string{"", "4be1f0a7c2d95e38", "id 4BE1F0A7C2D95E38,", "4be1f0a7c2d95e38 9a0c5512f3e48d76", "SGN-0106", "\xff\x00", "4A:3B"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id, err := correlationID(text)
		switch {
		case err == nil && (!isCorrelationID(id) || !strings.Contains(strings.ToLower(text), id)):
			t.Errorf("%q is not in the text", id)
		case err != nil && id != "":
			t.Errorf("%q, and an error", id)
		}
	})
}

// An id that comes from a peer goes into a line to type only if it is one.
func TestForeignCorrelationID(t *testing.T) {
	for id, typed := range map[string]bool{
		"": false, "4be1f0a7c2d95e38": true, "$(reboot)": false, "4be1f0a7c2d95e38;reboot": false, "4be1f0a7c2d95e38\nreboot": false, "4BE1F0A7C2D95E38": false,
	} {
		a, _, stderr := newTestApp(nil)
		a.started = true
		e := api.E(api.CAUnavailable, "no")
		e.CorrelationID = id
		a.exitCode(a.root(), &failure{err: e, next: "ls"})
		if got := strings.Contains(stderr.String(), "signet why"); got != typed {
			t.Errorf("%q is typed: %v\n%s", id, got, stderr)
		}
		if !strings.Contains(stderr.String(), "\n  next  ls\n") {
			t.Errorf("the next step is not first:\n%s", stderr)
		}
	}
}

// What the first use of a token is, among all that is on record of it.
func TestFirstUse(t *testing.T) {
	entry := func(seq uint64, kind, cluster, reason string) *apiv1.AuditEntry {
		return &apiv1.AuditEntry{Seq: seq, Kind: kind, Cluster: cluster, Reason: reason}
	}
	const replayed = string(api.TokenReplayedElsewhere)
	tests := []struct {
		name   string
		record []*apiv1.AuditEntry
		want   uint64
	}{
		{"nothing", nil, 0},
		{"an issuance", []*apiv1.AuditEntry{entry(1, kindIssue, "c", ""), entry(2, kindIssue, "c", "")}, 1},
		{"refused before it was issued for", []*apiv1.AuditEntry{entry(1, kindRefuse, "c", "CSR_MALFORMED"), entry(2, kindIssue, "c", "")}, 2},
		{"only refused", []*apiv1.AuditEntry{entry(1, kindRefuse, "c", "CSR_MALFORMED"), entry(2, kindRefuse, "c", "WEAK_KEY")}, 1},
		{"only such refusals", []*apiv1.AuditEntry{entry(1, kindRefuse, "c", replayed)}, 0},
		{"the same id of another issuer", []*apiv1.AuditEntry{entry(1, kindIssue, "other", ""), entry(2, kindIssue, "c", "")}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, _, _ := newTestApp(nil)
			ch := &channel{AdminClient: &fixedAudit{entries: tt.record}, path: "/s"}
			first, err := a.firstUse(t.Context(), ch, &auditEntry{Cluster: "c", Reason: replayed, TokenID: "t"})
			if err != nil {
				t.Fatal(err)
			}
			var got uint64
			if first != nil {
				got = first.Seq
			}
			if got != tt.want {
				t.Errorf("entry %d, want %d", got, tt.want)
			}
		})
	}
}

// fixedAudit answers each call with the same entries.
type fixedAudit struct {
	apiv1.AdminClient
	grpc.ClientStream
	entries []*apiv1.AuditEntry
	ended   bool
}

func (s *fixedAudit) ListAudit(context.Context, *apiv1.ListAuditRequest, ...grpc.CallOption) (grpc.ServerStreamingClient[apiv1.ListAuditResponse], error) {
	return s, nil
}

func (s *fixedAudit) Recv() (*apiv1.ListAuditResponse, error) {
	if s.ended {
		return nil, io.EOF
	}
	s.ended = true
	return &apiv1.ListAuditResponse{Entries: s.entries}, nil
}

// A refusal that came again is one decision, with the higher count; two outcomes of one request are two.
func TestDecisionsOfOneID(t *testing.T) {
	refused := func(seq, count uint64, reason api.Reason) *apiv1.AuditEntry {
		return &apiv1.AuditEntry{Source: "refusals", Seq: seq, Time: ago(0), Kind: kindRefuse, Reason: string(reason), Count: count}
	}
	issued := &apiv1.AuditEntry{Source: "ledger", Seq: 9, Time: ago(0), Kind: kindIssue}
	tests := []struct {
		name   string
		record []*apiv1.AuditEntry
		want   []uint64 // sequence numbers
	}{
		{"once", []*apiv1.AuditEntry{refused(1, 0, api.WeakKey)}, []uint64{1}},
		{"counted", []*apiv1.AuditEntry{refused(1, 0, api.WeakKey), refused(2, 37, api.WeakKey)}, []uint64{2}},
		{"counted, something in between", []*apiv1.AuditEntry{refused(1, 0, api.WeakKey), issued, refused(2, 37, api.WeakKey)}, []uint64{2, 9}},
		{"counted, the sum first", []*apiv1.AuditEntry{refused(2, 37, api.WeakKey), refused(1, 0, api.WeakKey)}, []uint64{2}},
		{"recorded, then refused", []*apiv1.AuditEntry{issued, refused(1, 0, api.LintFailed)}, []uint64{9, 1}},
		{"two reasons", []*apiv1.AuditEntry{refused(1, 0, api.WeakKey), refused(2, 0, api.LintFailed)}, []uint64{1, 2}},
		{"without end", slices.Repeat([]*apiv1.AuditEntry{issued}, 1000), slices.Repeat([]uint64{9}, maxDecisions)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, _, _ := newTestApp(nil)
			l, err := a.decisions(t.Context(), &channel{AdminClient: &fixedAudit{entries: tt.record}, path: "/s"}, "4be1f0a7c2d95e38")
			if err != nil {
				t.Fatal(err)
			}
			var got []uint64
			for _, d := range l.Items {
				got = append(got, d.Entry.Seq)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("entries %d, want %d", got, tt.want)
			}
		})
	}
}
