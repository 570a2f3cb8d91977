package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func TestMoment(t *testing.T) {
	tests := []struct{ in, want string }{
		{"2h", "2026-11-24T10:00:00Z"},
		{"1h30m", "2026-11-24T10:30:00Z"},
		{"0s", "2026-11-24T12:00:00Z"},
		{"7d", "2026-11-17T12:00:00Z"},
		{"1d12h", "2026-11-23T00:00:00Z"},
		{"2026-11-20", "2026-11-20T00:00:00Z"},
		{"2026-11-20T01:02:03+02:00", "2026-11-19T23:02:03Z"},
		{"2026-11-20T01:02:03.5Z", "2026-11-20T01:02:03Z"},
		{"", ""}, {"yesterday", ""}, {"2", ""}, {"-2h", ""}, {"d", ""}, {"-1d", ""}, {"1d-2h", ""}, {"1dx", ""}, {"65536d", ""}, {"1.5d", ""},
		{"65535d2562047h47m", ""}, {"2026-11-31", ""}, {"2026-11-20 12:00:00", ""}, {"2026-11-20T12:00:00", ""}, {"12:00", ""},
	}
	a, _, _ := newTestApp(nil)
	for _, tt := range tests {
		got := ""
		if at, err := a.moment(tt.in); err == nil {
			got = stamp(at.AsTime())
		}
		if got != tt.want {
			t.Errorf("%q: %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestSetSerial(t *testing.T) {
	whole := strings.Repeat("4a", 20)
	tests := []struct{ in, exact, prefix string }{
		{whole, whole, ""},
		{strings.ToUpper(whole), whole, ""},
		{"serial=" + strings.ToUpper(whole), whole, ""}, // openssl x509 -serial
		{"0x" + whole, whole, ""},
		{strings.TrimSuffix(strings.Repeat("4A:", 20), ":"), whole, ""}, // openssl x509 -text
		{strings.TrimSuffix(strings.Repeat("4a ", 20), " "), whole, ""},
		{"4a4a4a4a", "", "4a4a4a4a"},
		{"4", "", "4"},
	}
	for _, tt := range tests {
		f := new(auditFilter)
		if err := f.setSerial(tt.in); err != nil || f.req.Serial != tt.exact || f.serial != tt.prefix {
			t.Errorf("%q: exact %q, prefix %q, error %v", tt.in, f.req.Serial, f.serial, err)
		}
	}
	for _, bad := range []string{"", ":", "0x", "xyz", "-1", whole + "4", "4a\n", "4a4a4a4á"} {
		if err := new(auditFilter).setSerial(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestTimes(t *testing.T) {
	tests := []struct {
		count uint64
		last  time.Duration
		want  string
	}{
		{0, 0, ""}, {1, 0, ""}, {2, -1, "x2"}, {37, 70 * time.Second, "x37, last 12:01:10"}, {37, 13 * time.Hour, "x37, last 2026-11-25T01:00:00Z"},
		{3, 24 * time.Hour, "x3, last 2026-11-25T12:00:00Z"},
	}
	for _, tt := range tests {
		e := &auditEntry{Count: tt.count, time: testNow, last: testNow.Add(tt.last)}
		if tt.last < 0 {
			e.last = time.Time{}
		}
		if got := e.times(); got != tt.want {
			t.Errorf("%d, %s: %q, want %q", tt.count, tt.last, got, tt.want)
		}
	}
}

// What is written piece by piece is what the printers of the other commands make of the whole list.
func TestAuditWriterFormats(t *testing.T) {
	f := newFakeAdmin(t)
	for name, record := range map[string][]*apiv1.AuditEntry{
		"none": nil, "one": f.record()[:1], "all": f.record(), "hostile": hostileRecord(), "more than a part of a table": longRecord(auditRows + 1),
	} {
		for _, format := range []string{"table", "wide", "json", "yaml", "name", "jsonpath={.items[*].seq}"} {
			t.Run(name+"/"+format, func(t *testing.T) {
				a, stdout, _ := newTestApp(nil)
				o := &output{allowed: []string{format}}
				if err := o.Set(format); err != nil {
					t.Fatal(err)
				}
				l := &auditList{header: newHeader("AuditEntryList", ""), Items: []*auditEntry{}}
				w := newAuditWriter(a, o)
				for _, in := range record {
					e := newAuditEntry(in)
					l.Items = append(l.Items, e)
					if err := w.add(e); err != nil {
						t.Fatal(err)
					}
				}
				if err := w.end(""); err != nil {
					t.Fatal(err)
				}
				var want bytes.Buffer
				err := o.render(&want, result{object: l, text: func(wide bool) []block { return []block{{table: auditTable(l.Items, wide)}} }})
				if err != nil {
					t.Fatal(err)
				}
				got := stdout.String()
				if o.isText() { // widths may differ from part to part
					got, want = strings.Join(strings.Fields(got), " "), *bytes.NewBufferString(strings.Join(strings.Fields(want.String()), " "))
				}
				if format == "yaml" && name == "hostile" { // long lines are broken elsewhere
					got, want = strings.Join(strings.Fields(got), " "), *bytes.NewBufferString(strings.Join(strings.Fields(want.String()), " "))
				}
				if d := cmp.Diff(want.String(), got); d != "" {
					t.Errorf("-whole +pieces:\n%s", d)
				}
			})
		}
	}
}

// A full disk, or a reader that went away.
type brokenWriter struct{ left int }

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errors.New("no space left on device")
	}
	return len(p), nil
}

func TestAuditWriterFails(t *testing.T) {
	for _, format := range []string{"table", "json", "yaml", "name", "jsonpath={.items}"} {
		for _, room := range []int{0, 100, 5000} {
			a, _, _ := newTestApp(nil)
			a.stdout = &brokenWriter{left: room}
			o := new(output)
			o.allowed = []string{format}
			if err := o.Set(format); err != nil {
				t.Fatal(err)
			}
			w := newAuditWriter(a, o)
			var err error
			for _, in := range longRecord(1200) {
				if err = w.add(newAuditEntry(in)); err != nil {
					break
				}
			}
			if err == nil {
				err = w.end("")
			}
			if api.ReasonOf(err) != api.OutputFailed || err == nil {
				t.Errorf("%s with room for %d: error %v", format, room, err)
			}
		}
	}
}

func TestExportFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "out.jsonl")
	w, err := newExportFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newExportFile(path); err == nil {
		t.Error("two exports write one file")
	}
	w.drop()
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	// A link is not followed, wherever it points.
	for _, target := range []string{filepath.Join(dir, "precious"), filepath.Join(dir, "nothing")} {
		if err := os.WriteFile(filepath.Join(dir, "precious"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		link := target + ".link"
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
		if _, err := newExportFile(link); err == nil {
			t.Errorf("a link to %s is written through", filepath.Base(target))
		}
	}

	// A disk that is full.
	a, _, _ := newTestApp(nil)
	err = writeLine(sink{&brokenWriter{}, "stdout"}, newAuditEntry(nil))
	if api.ReasonOf(err) != api.OutputFailed || a.exitCode(a.root(), err) != exitFailed {
		t.Errorf("error %v", err)
	}

	// One that cannot be put in place leaves nothing of ours.
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	if w, err = newExportFile(filepath.Join(sub, "out.jsonl")); err != nil {
		t.Fatal(err)
	}
	w.tmp.Close()
	if err := w.keep(); err == nil {
		t.Error("a file that could not be synced was kept")
	}
	w.drop()
	if left, _ := os.ReadDir(sub); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// slowAudit is an answer whose pieces take their time.
type slowAudit struct {
	apiv1.AdminClient
	grpc.ClientStream
	ctx    context.Context
	pieces []time.Duration
	empty  bool // all but the last: the CA is still looking
}

func (s *slowAudit) ListAudit(ctx context.Context, _ *apiv1.ListAuditRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[apiv1.ListAuditResponse], error) {
	s.ctx = ctx
	return s, nil
}

func (s *slowAudit) Recv() (*apiv1.ListAuditResponse, error) {
	if len(s.pieces) == 0 {
		return nil, io.EOF
	}
	select {
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	case <-time.After(s.pieces[0]):
	}
	if s.pieces = s.pieces[1:]; s.empty && len(s.pieces) > 0 {
		return &apiv1.ListAuditResponse{}, nil
	}
	return &apiv1.ListAuditResponse{Entries: []*apiv1.AuditEntry{{Seq: 1}}}, nil
}

// --timeout bounds how long the CA says nothing, not how long the record is, nor how slowly it is read here.
func TestStreamAuditTimeout(t *testing.T) {
	tests := []struct {
		name    string
		timeout time.Duration
		pieces  []time.Duration
		reading time.Duration
		want    api.Reason
		entries int
	}{
		{"each in time", 10 * time.Second, []time.Duration{9 * time.Second, 9 * time.Second, 9 * time.Second}, 0, "", 3},
		{"a slow reader", 10 * time.Second, []time.Duration{9 * time.Second, 9 * time.Second}, time.Hour, "", 2},
		{"the first late", 10 * time.Second, []time.Duration{11 * time.Second}, 0, api.DeadlineExceeded, 0},
		{"a later one late", 10 * time.Second, []time.Duration{time.Second, 11 * time.Second}, 0, api.DeadlineExceeded, 1},
		{"without end", 0, []time.Duration{1000 * time.Hour}, 0, "", 1},
		{"signs of life", 10 * time.Second, slices.Repeat([]time.Duration{9 * time.Second}, 100), 0, "", 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, _, _ := newTestApp(nil)
				a.timeout = tt.timeout
				entries := 0
				ch := &channel{AdminClient: &slowAudit{pieces: tt.pieces, empty: tt.name == "signs of life"}, path: "/s"}
				err := a.streamAudit(t.Context(), ch, &apiv1.ListAuditRequest{}, new(tally), func(*auditEntry) error {
					entries++
					time.Sleep(tt.reading)
					return nil
				})
				var reason api.Reason
				if err != nil {
					reason = api.ReasonOf(err)
				}
				if reason != tt.want || entries != tt.entries {
					t.Errorf("%d entries, error %v", entries, err)
				}
			})
		})
	}
}

// Waiting is told to a terminal, after a while, and wiped away.
func TestWaiting(t *testing.T) {
	run := func(t *testing.T, env map[string]string, during time.Duration) string {
		var said string
		synctest.Test(t, func(t *testing.T) {
			a, _, stderr := newTestApp(env)
			var seen tally
			stop := a.waiting("/run/ca\x1b.sock", &seen)
			seen.add(&auditEntry{time: testNow})
			time.Sleep(during)
			stop()
			stop()
			said = stderr.String()
		})
		return said
	}
	if got := run(t, map[string]string{"TTY": "1"}, patience-time.Millisecond); got != "" {
		t.Errorf("said too soon: %q", got)
	}
	want := "\rreading the record of the CA at /run/ca\\x1b.sock: 1 entry, at 2026-11-24T12:00:00Z; Ctrl-C ends it\x1b[K"
	if got := run(t, map[string]string{"TTY": "1"}, patience+repaint+time.Millisecond); got != want+want+"\r\x1b[K" {
		t.Errorf("said %q", got)
	}
	for name, env := range map[string]map[string]string{"no terminal": nil, "dumb": {"TTY": "1", "TERM": "dumb"}} {
		if got := run(t, env, time.Minute); got != "" {
			t.Errorf("%s: said %q", name, got)
		}
	}
}

// Every line of an export is an object on its own, whatever the CA sends, and the same as -o json prints.
func TestWriteLine(t *testing.T) {
	for _, in := range append(hostileRecord(), newFakeAdmin(t).record()...) {
		var b bytes.Buffer
		e := newAuditEntry(in)
		if err := writeLine(&b, e); err != nil {
			t.Fatal(err)
		}
		u, err := tree(e)
		if err != nil {
			t.Fatal(err)
		}
		var got, want any
		whole, _ := json.Marshal(u.Object)
		if err := errors.Join(json.Unmarshal(b.Bytes(), &got), json.Unmarshal(whole, &want)); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-json +line:\n%s", d)
		}
		var v struct{ APIVersion, Kind string }
		if err := json.Unmarshal(b.Bytes(), &v); err != nil || v.Kind != "AuditEntry" || v.APIVersion != apiVersion || bytes.Count(b.Bytes(), []byte("\n")) != 1 {
			t.Errorf("%q: %v", b.String(), err)
		}
	}
}

// The two entries of a refusal that came again become one, where the first stood, and nothing is held back for ever.
func TestFold(t *testing.T) {
	refused := func(id string, at time.Duration, count uint64) *auditEntry {
		return &auditEntry{Type: kindRefuse, CorrelationID: id, Count: count, time: testNow.Add(at)}
	}
	issued := func(id string, at time.Duration) *auditEntry {
		return &auditEntry{Type: kindIssue, CorrelationID: id, time: testNow.Add(at)}
	}
	many := []*auditEntry{refused("a", 0, 1)}
	for range maxFold {
		many = append(many, issued("i", time.Second))
	}
	tests := []struct {
		name    string
		entries []*auditEntry
		before  int // given on before the end
		want    string
	}{
		{"issuances pass at once", []*auditEntry{issued("a", 0), issued("b", 0)}, 2, "a b"},
		{"a refusal waits", []*auditEntry{issued("a", 0), refused("b", 0, 1), issued("c", time.Minute)}, 1, "a bx1 c"},
		{"counted", []*auditEntry{refused("a", 0, 1), issued("b", time.Second), refused("c", time.Minute, 1), refused("a", 0, 37)}, 0, "ax37 b cx1"},
		{"counted already", []*auditEntry{refused("a", 0, 40), refused("a", 0, 37)}, 0, "ax40"},
		{"the same id for another time", []*auditEntry{refused("a", 0, 1), refused("a", time.Second, 2)}, 0, "ax1 ax2"},
		{"long enough", []*auditEntry{refused("a", 0, 1), issued("b", 3*time.Minute)}, 2, "ax1 b"},
		{"too many", many, len(many), "ax1" + strings.Repeat(" i", maxFold)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			f := fold{do: func(e *auditEntry) error {
				text := e.CorrelationID
				if e.Type == kindRefuse {
					text += fmt.Sprintf("x%d", e.Count)
				}
				got = append(got, text)
				return nil
			}}
			for _, e := range tt.entries {
				if err := f.add(e); err != nil {
					t.Fatal(err)
				}
			}
			if len(got) != tt.before {
				t.Errorf("given on before the end: %d, want %d", len(got), tt.before)
			}
			if err := f.flush(); err != nil || strings.Join(got, " ") != tt.want {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

// A CA that takes a connection and says nothing is waited for as long as --timeout says, and is not called gone.
func TestSilentCA(t *testing.T) {
	dir, err := os.MkdirTemp("", "sgn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s")) // the system takes connections, nobody answers them
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for _, args := range [][]string{{"svid", "list"}, {"audit"}, {"why", "4be1f0a7c2d95e38"}, {"audit", "export"}} {
		a, stdout, stderr := newTestApp(map[string]string{socketEnv: l.Addr().String()})
		if exit := a.main(slices.Concat([]string{"signet"}, args, []string{"--timeout", "300ms"})); exit != exitTimeout || stdout.Len() > 0 {
			t.Errorf("%v: exit code %d\n%s", args, exit, stderr)
		}
	}
}
