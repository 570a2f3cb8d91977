package main

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

func TestParseSpan(t *testing.T) {
	const day = 24 * time.Hour
	tests := []struct {
		in   string
		want time.Duration // zero: refused
	}{
		{"90m", 90 * time.Minute}, {"36h", 36 * time.Hour}, {"7d", 7 * day}, {"1d12h", 36 * time.Hour}, {"30d", 30 * day}, {"0d1s", time.Second},
		{"", 0}, {"d", 0}, {"0", 0}, {"0d", 0}, {"-1h", 0}, {"-1d", 0}, {"1d-25h", 0}, {"1d1d", 0}, {"1.5d", 0}, {"7", 0}, {"+1d", 0},
		{"70000d", 0}, {"9999d", 0}, {"2562047h", 0}, {"1w", 0}, {"1 d", 0}, {"1\x00d", 0},
	}
	for _, tt := range tests {
		got, err := parseSpan(tt.in)
		if (err == nil) != (tt.want != 0) || got != tt.want {
			t.Errorf("%q: %s, %v; want %s", tt.in, got, err, tt.want)
		}
	}
}

// A duration that is taken is above zero, bounded, and the same when it is written and read again.
func FuzzParseSpan(f *testing.F) {
	for _, s := range []string{"90m", "7d", "1d12h", "-1d", "65535d", "1e9h", "0.5h", "d", "1dd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseSpan(text)
		if err != nil {
			return
		}
		if d <= 0 || d > maxSpan {
			t.Fatalf("%q is %s", text, d)
		}
		s := span(d)
		if again, err := parseSpan(s.String()); err != nil || again != d {
			t.Fatalf("%q is %s, and that is %s: %v", text, d, again, err)
		}
	})
}

func TestParseWhom(t *testing.T) {
	const uid = "11111111-1111-4111-8111-111111111111"
	tests := []struct {
		args      string
		namespace string
		want      string // scope and name; empty: refused
	}{
		{"node node-b", "", "node node-b"}, {"node/node-b", "", "node node-b"}, {"node " + uid, "", "node " + uid},
		{"namespace shop", "", "namespace shop"}, {"namespace/shop", "", "namespace shop"},
		{"pod shop/web-1", "", "pod shop/web-1"}, {"pod/shop/web-1", "", "pod shop/web-1"}, {"pod web-1", "shop", "pod shop/web-1"},
		{"pod shop/web-1", "shop", "pod shop/web-1"}, {"pod " + uid, "", "pod " + uid},
		{"pod shop/web-1", "bank", ""}, {"pod web-1", "", ""}, {"pod shop/web-1/x", "", ""}, {"pod /web-1", "", ""}, {"pod shop/", "", ""},
		{"node node-b", "shop", ""}, {"node a/b", "", ""}, {"replica ca-0", "", ""}, {"replica/ca-0", "", ""}, {"node", "", ""}, {"node-b", "", ""},
		{"node \x1b[2J", "", ""}, {"namespace Shop", "", ""}, {"node -x", "", ""}, {"", "", ""},
	}
	for _, tt := range tests {
		w, err := parseWhom(strings.Split(tt.args, " "), tt.namespace, "")
		if got := w.String(); (err == nil) != (tt.want != "") || err == nil && got != tt.want {
			t.Errorf("%q in %q: %q, %v; want %q", tt.args, tt.namespace, got, err, tt.want)
		}
	}
}

// Whom an excuse speaks of is one of three kinds, and named by what no terminal and no shell acts upon.
func FuzzParseWhom(f *testing.F) {
	f.Add("node", "node-b", "")
	f.Add("pod", "shop/web-1", "shop")
	f.Add("pod/shop/web-1", "", "")
	f.Fuzz(func(t *testing.T, first, second, namespace string) {
		args := []string{first, second}
		if second == "" {
			args = args[:1]
		}
		w, err := parseWhom(args, namespace, "")
		if err != nil {
			return
		}
		if w.scope != "node" && w.scope != "namespace" && w.scope != "pod" || !plainWord(w.name) || strings.Count(w.name, "/") > 1 {
			t.Fatalf("%q, %q, %q: %v", first, second, namespace, w)
		}
		if again, err := parseWhom([]string{w.scope + "/" + w.name}, "", ""); err != nil || again != w {
			t.Fatalf("%v is %v when it is said again: %v", w, again, err)
		}
	})
}

// Whatever a CA tells of a rotation is shown without a control character, in every format, and nothing panics.
func FuzzRotation(f *testing.F) {
	fake := newFakeAdmin(f)
	for _, scene := range []string{"shop", "publishing", "blocked", "many", "nocross", "draining", "backing", "emergency", "troubled", "aborted", "hostile"} {
		data, err := proto.Marshal(fake.rotation(scene))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		in := new(apiv1.Rotation)
		if proto.Unmarshal(data, in) != nil {
			return
		}
		showRotation(t, in)
	})
}

func showRotation(t *testing.T, in *apiv1.Rotation) {
	t.Helper()
	v := newRotation(in, testNow)
	d := newDecision("RotationStart", "x", v)
	p := &planView{header: newHeader("RotationPlan", "new"), Forecast: v.Forecast, now: testNow}
	if p.Forecast == nil {
		p.Forecast = newForecast(&apiv1.RotationForecast{})
	}
	results := []result{{object: v, text: v.text}, {object: d, text: d.begun}, {object: p, text: p.text},
		{object: d, text: func(bool) []block {
			return []block{d.excused(whom{scope: "pod", name: "a/b"}), d.unexcused(whom{scope: "pod", name: "a/b"})}
		}},
		{object: d, text: func(bool) []block { return d.forced("activate") }}}
	if v.Operation != nil {
		d := newDecision("RotationForce", v.Operation.ID, v)
		d.DryRun = true
		results = append(results, result{object: d, text: func(bool) []block { return d.forced("activate") }},
			result{object: d, text: func(bool) []block { return []block{{pairs: abortMeans(v)}, {pairs: rollbackMeans(v)}} }})
	}
	var out bytes.Buffer
	for _, r := range results {
		for _, format := range []string{"table", "wide", "json", "yaml", "name"} {
			if err := (&output{format: format}).render(&out, r); err != nil {
				t.Fatalf("%s: %v", format, err)
			}
		}
	}
	a, stdout, _ := newTestApp(map[string]string{"TTY": "1", "NO_COLOR": "1"})
	a.stdout = io.Discard
	fo := &follower{a: a, o: &output{format: "table"}}
	if _, err := fo.show(v); err != nil {
		t.Fatal(err)
	}
	if err := v.finding(); err != nil {
		a.say("%v", err)
	}
	out.WriteString(scrub(v.line()))
	for _, s := range []string{out.String(), stdout.String()} {
		for _, r := range s {
			if r != '\n' && !printable(r) {
				t.Fatalf("%q reaches the terminal in:\n%s", r, s)
			}
		}
	}
	if !utf8.Valid(out.Bytes()) {
		t.Fatal("not UTF-8")
	}
}

// Times and durations that are none break nothing, and neither does an answer without anything.
func TestRotationOfNonsense(t *testing.T) {
	never := &timestamppb.Timestamp{Seconds: 1 << 60}
	for name, in := range map[string]*apiv1.Rotation{
		"nothing":   nil,
		"empty":     {Operation: &apiv1.RotationOperation{}},
		"nil parts": {Gates: []*apiv1.RotationGate{nil, {Blockers: []*apiv1.RotationBlocker{nil}}}, Past: []*apiv1.RotationOperation{{}}, Authorities: []*apiv1.RotationRoot{nil}, Excuses: []*apiv1.RotationExcuse{nil}},
		"bad times": {Now: never, Operation: &apiv1.RotationOperation{Begun: never, Limits: &apiv1.RotationLimits{Soak: &durationpb.Duration{Seconds: 1 << 60}}},
			Forecast: &apiv1.RotationForecast{Steps: []*apiv1.RotationForecastStep{{Do: "activate", Latest: never}}}, Schedule: &apiv1.RotationSchedule{Expires: never}},
		"huge": {Operation: &apiv1.RotationOperation{Id: strings.Repeat("x", 1<<16)}, Gates: []*apiv1.RotationGate{{Blocking: 1<<32 - 1, Passed: 1<<32 - 1}}, Agents: 1<<32 - 1},
	} {
		t.Run(name, func(t *testing.T) { showRotation(t, in) })
	}
}

// A look that takes long says what it waits for: the one before a decision too.
func TestPatient(t *testing.T) {
	v := &apiv1.RotationStatusResponse{Rotation: &apiv1.Rotation{TrustDomain: "example.org"}}
	for _, tt := range []struct {
		takes time.Duration
		want  string
	}{{patience - time.Millisecond, ""}, {patience + time.Millisecond, "waiting for the CA: it is to say where the rotation stands\n"}} {
		synctest.Test(t, func(t *testing.T) {
			a, _, stderr := newTestApp(nil)
			slow := slowAdmin{takes: tt.takes, resp: v}
			if _, err := a.rotation(t.Context(), &channel{AdminClient: slow}); err != nil {
				t.Error(err)
			}
			if got := stderr.String(); got != tt.want {
				t.Errorf("%s: said %q, want %q", tt.takes, got, tt.want)
			}
		})
	}
}

// A slowAdmin takes its time to say where the rotation stands.
type slowAdmin struct {
	apiv1.AdminClient
	takes time.Duration
	resp  *apiv1.RotationStatusResponse
}

func (s slowAdmin) RotationStatus(context.Context, *apiv1.RotationStatusRequest, ...grpc.CallOption) (*apiv1.RotationStatusResponse, error) {
	time.Sleep(s.takes)
	return s.resp, nil
}

// A terminal that is small gets no more lines than it has, and none that is wider: what was painted can be painted over.
func TestPaint(t *testing.T) {
	fake := newFakeAdmin(t)
	a, stdout, _ := newTestApp(map[string]string{"TTY": "1", "NO_COLOR": "1"})
	f := &follower{a: a, o: &output{format: "wide"}}
	v := newRotation(fake.rotation("many"), testNow)
	for range 2 {
		if err := f.paint(v); err != nil {
			t.Fatal(err)
		}
	}
	width, height := screen(stdout)
	first, second, ok := strings.Cut(stdout.String(), "\x1b[48A\x1b[J")
	if !ok || first != second {
		t.Fatalf("what was painted is not painted over:\n%s", stdout)
	}
	lines := strings.Split(strings.TrimSuffix(first, "\n"), "\n")
	if len(lines) >= height {
		t.Errorf("%d lines on a screen of %d", len(lines), height)
	}
	for _, l := range lines {
		if n := utf8.RuneCountInString(l); n >= width {
			t.Errorf("%d columns on a screen of %d: %s", n, width, l)
		}
	}
	if last := lines[len(lines)-1]; !strings.Contains(last, "more lines: signet rotate status") {
		t.Errorf("the last line is %q", last)
	}
}

// A step that anybody blocks makes the whole wait, unless another can be taken.
func TestJudge(t *testing.T) {
	gate := func(do string, blocking uint32) *apiv1.RotationGate {
		return &apiv1.RotationGate{Do: do, Blocking: blocking}
	}
	op := &apiv1.RotationOperation{Id: "x"}
	tests := []struct {
		name string
		in   *apiv1.Rotation
		want string
		next string
		exit bool
	}{
		{"none", &apiv1.Rotation{}, rotationNone, "", false},
		{"no gate", &apiv1.Rotation{Operation: op}, rotationMoving, "", false},
		{"open", &apiv1.Rotation{Operation: op, Gates: []*apiv1.RotationGate{gate("publish", 0)}}, rotationMoving, "publish", false},
		{"shut", &apiv1.Rotation{Operation: op, Gates: []*apiv1.RotationGate{gate("activate", 2)}}, rotationWaiting, "activate", true},
		{"one of two open", &apiv1.Rotation{Operation: op, Gates: []*apiv1.RotationGate{gate("activate", 2), gate("remove", 0)}}, rotationMoving, "remove", false},
		{"two shut", &apiv1.Rotation{Operation: op, Gates: []*apiv1.RotationGate{gate("activate", 2), gate("remove", 1)}}, rotationWaiting, "activate", true},
		{"trouble", &apiv1.Rotation{Operation: op, TroubleReason: "X"}, rotationTrouble, "", true},
		{"trouble without a rotation", &apiv1.Rotation{Trouble: "x"}, rotationTrouble, "", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := newRotation(tt.in, testNow)
			next := ""
			if g := v.next(); g != nil {
				next = g.Step
			}
			if v.State != tt.want || next != tt.next || (v.finding() != nil) != tt.exit {
				t.Errorf("%s, next %q, finding %v", v.State, next, v.finding())
			}
		})
	}
}
