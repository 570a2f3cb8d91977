package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// newTestApp is an app without a terminal and with the given environment.
func newTestApp(env map[string]string) (*app, *bytes.Buffer, *bytes.Buffer) {
	var stdout, stderr bytes.Buffer
	return &app{
		name: "signet", stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr,
		getenv: func(k string) string { return env[k] },
		now:    func() time.Time { return testNow },
		tty:    func(io.Writer) bool { return env["TTY"] != "" },
		poll:   time.Millisecond, silence: maxSilence,
	}, &stdout, &stderr
}

// walk calls f for every command of the tree.
func walk(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, s := range c.Commands() {
		walk(s, f)
	}
}

// The help of every command starts with an example, every command says what it is for, and -o has one meaning.
func TestEveryCommand(t *testing.T) {
	a, _, _ := newTestApp(nil)
	walk(a.root(), func(c *cobra.Command) {
		t.Run(c.CommandPath(), func(t *testing.T) {
			if c.Short == "" {
				t.Error("no short description")
			}
			if c.IsAdditionalHelpTopicCommand() {
				return
			}
			var help bytes.Buffer
			a.help(c, &help)
			if !strings.HasPrefix(help.String(), "Examples:\n  ") {
				t.Errorf("help does not start with an example:\n%s", help.String())
			}
			if o := c.Flags().Lookup("output"); o != nil && !strings.HasPrefix(o.Usage, "format: ") {
				t.Errorf("-o is %q; it is always a format", o.Usage)
			}
		})
	})
}

// Each example is a command line that parses.
func TestExamplesParse(t *testing.T) {
	a, _, _ := newTestApp(nil)
	root := a.root()
	walk(root, func(c *cobra.Command) {
		for line := range strings.Lines(c.Example) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), "   #")
			line, _, _ = strings.Cut(strings.TrimSpace(line), " >")
			line, _, _ = strings.Cut(strings.TrimSpace(line), " |")
			args, ours := strings.CutPrefix(strings.TrimSpace(line), "signet ")
			if !ours || strings.Contains(args, "'") {
				continue
			}
			found, rest, err := root.Find(strings.Fields(args))
			if err != nil || found == root {
				t.Errorf("%q: no such command: %v", line, err)
				continue
			}
			if err := found.ParseFlags(rest); err != nil {
				t.Errorf("%q: %v", line, err)
			}
		}
	})
}

func TestInvocation(t *testing.T) {
	tests := []struct {
		argv []string
		name string
		args string
	}{
		{nil, "signet", ""},
		{[]string{"/usr/bin/signet", "a", "b"}, "signet", "a b"},
		{[]string{"signet.exe", "a"}, "signet", "a"},
		{[]string{"/k/kubectl-signet", "a"}, "kubectl signet", "a"},
		{[]string{"kubectl_complete-signet", "a", ""}, "kubectl signet", "__complete a "},
	}
	for _, tt := range tests {
		if name, args := invocation(tt.argv); name != tt.name || strings.Join(args, " ") != tt.args {
			t.Errorf("%q: %q %q", tt.argv, name, args)
		}
	}
}

func TestSocketPath(t *testing.T) {
	tests := []struct{ flag, env, want string }{
		{"", "", defaultSocket},
		{"", "/env.sock", "/env.sock"},
		{"/flag.sock", "/env.sock", "/flag.sock"},
		{"unix:///flag.sock", "", "/flag.sock"},
		{"unix:/flag.sock", "", "/flag.sock"},
		{"unix:rel.sock", "", "rel.sock"},
	}
	for _, tt := range tests {
		a, _, _ := newTestApp(map[string]string{socketEnv: tt.env})
		a.socket = tt.flag
		if got := a.socketPath(); got != tt.want {
			t.Errorf("flag %q, environment %q: %q, want %q", tt.flag, tt.env, got, tt.want)
		}
	}
}

// What a failed request means: the reason, and the exit code that follows from it.
func TestCallFailed(t *testing.T) {
	unavailable := status.Error(codes.Unavailable, "connection error")
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Err: &os.SyscallError{Syscall: "connect", Err: err}}
	}
	tests := []struct {
		name    string
		err     error
		dialErr error
		reason  api.Reason
		why     string
		exit    int
	}{
		{"no socket", unavailable, dial(syscall.ENOENT), api.CAUnavailable, "no such socket", exitFailed},
		{"nobody listens", unavailable, dial(syscall.ECONNREFUSED), api.CAUnavailable, "nobody listens", exitFailed},
		{"may not open", unavailable, dial(fs.ErrPermission), api.AdminForbidden, "belongs to the user", exitFailed},
		{"path too long", unavailable, dial(syscall.EINVAL), api.CAUnavailable, "invalid argument", exitFailed},
		{"broke later", unavailable, nil, api.CAUnavailable, "connection failed", exitFailed},
		{"may not ask", api.ToStatus(api.E(api.AdminForbidden, "no")).Err(), nil, api.AdminForbidden, "belongs to the user", exitFailed},
		{"deadline", context.DeadlineExceeded, nil, api.DeadlineExceeded, "It listens", exitTimeout},
		{"deadline by status", status.Error(codes.DeadlineExceeded, "x"), nil, api.DeadlineExceeded, "It listens", exitTimeout},
		{"foreign server", status.Error(codes.Unimplemented, "unknown service"), nil, api.Internal, "should not happen", exitFailed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, _, stderr := newTestApp(nil)
			a.started = true
			err := a.callFailed(&channel{path: "/s", dialErr: tt.dialErr}, tt.err)
			if got := api.ReasonOf(err); got != tt.reason {
				t.Errorf("reason %s, want %s", got, tt.reason)
			}
			if got := a.exitCode(a.root(), err); got != tt.exit {
				t.Errorf("exit code %d, want %d", got, tt.exit)
			}
			for _, want := range []string{tt.reason.Code(), tt.why, "\n  next  "} {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("%q is not in:\n%s", want, stderr)
				}
			}
		})
	}
}

func TestExitCode(t *testing.T) {
	tests := []struct {
		name    string
		err     error
		started bool
		want    int
		text    string
	}{
		{"good", nil, true, exitGood, ""},
		{"cobra's own", errors.New("unknown flag: --x"), false, exitUsage, "usage: unknown flag: --x\n  next  signet --help\n"},
		{"usage seen by the command", usageError{errors.New("no")}, true, exitUsage, "usage: no\n"},
		{"findings", &findings{summary: "1 error"}, true, exitFindings, "1 error\n"},
		{"an error of another package", errors.New("disk full"), true, exitFailed, "error SGN-0999: disk full\n"},
		{"a reason of another package", api.E(api.NotFound, "gone"), true, exitFailed, "error SGN-0902: gone\n"},
		{"a deadline of another package", context.DeadlineExceeded, true, exitTimeout, "error SGN-0903: "},
		{"control characters", errors.New("a\x1b[31mb\nc"), true, exitFailed, `a\x1b[31mb\nc` + "\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, _, stderr := newTestApp(nil)
			root := a.root()
			a.started = tt.started
			if got := a.exitCode(root, tt.err); got != tt.want {
				t.Errorf("exit code %d, want %d", got, tt.want)
			}
			if !strings.Contains(stderr.String(), tt.text) || tt.text == "" && stderr.Len() > 0 {
				t.Errorf("stderr:\n%s", stderr)
			}
		})
	}
}

func TestScrub(t *testing.T) {
	tests := []struct{ in, want string }{
		{"", ""},
		{"plain, and \u00e4 \u4e16 \U0001f512", "plain, and \u00e4 \u4e16 \U0001f512"},
		{"a\nb\r\t", `a\nb\r\t`},
		{"\x1b]0;x\a", `\x1b]0;x\a`},
		{"\u202edesrever", `\u202edesrever`},
		{"zero\u200bwidth", `zero\u200bwidth`},
		{"\u0085 \u009b31m", `\u0085 \u009b31m`}, // C1 controls: terminals act on them
		{"\xff\xfe", `\xff\xfe`},
		{"\x00\x7f", `\x00\x7f`},
		{"\U000e0041", `\U000e0041`}, // tag characters
	}
	for _, tt := range tests {
		if got := scrub(tt.in); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestPen(t *testing.T) {
	tests := []struct {
		name string
		env  map[string]string
		want bool
	}{
		{"pipe", nil, false},
		{"terminal", map[string]string{"TTY": "1"}, true},
		{"terminal, NO_COLOR", map[string]string{"TTY": "1", "NO_COLOR": "1"}, false},
		{"terminal, NO_COLOR empty", map[string]string{"TTY": "1", "NO_COLOR": ""}, true},
		{"terminal, dumb", map[string]string{"TTY": "1", "TERM": "dumb"}, false},
		{"terminal, CLICOLOR=0", map[string]string{"TTY": "1", "CLICOLOR": "0"}, false},
		{"pipe, forced", map[string]string{"CLICOLOR_FORCE": "1"}, true},
		{"dumb, forced", map[string]string{"TERM": "dumb", "CLICOLOR_FORCE": "1"}, true},
		{"pipe, forced by 0", map[string]string{"CLICOLOR_FORCE": "0"}, false},
		{"forced, NO_COLOR", map[string]string{"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, _, _ := newTestApp(tt.env)
			if got := a.pen(a.stdout).on; got != tt.want {
				t.Errorf("colour %v, want %v", got, tt.want)
			}
		})
	}
}

func TestAckOf(t *testing.T) {
	const serial = "aa"
	tests := []struct {
		name string
		s    *apiv1.Stream
		want ackState
	}{
		{"nothing pushed", &apiv1.Stream{Names: []string{"default"}}, ackWait},
		{"SVID taken", &apiv1.Stream{Names: []string{"default"}, AckedSerial: serial, Acks: 1}, ackGood},
		{"older SVID taken", &apiv1.Stream{Names: []string{"default"}, AckedSerial: "99", Acks: 1}, ackWait},
		{"SVID by its ID", &apiv1.Stream{Names: []string{"spiffe://example.org/a"}, AckedSerial: "99", Acks: 1}, ackWait},
		{"bundle taken", &apiv1.Stream{Names: []string{"ROOTCA"}, WantsBundle: true, AckedGeneration: 5, PushedGeneration: 5, Acks: 1}, ackGood},
		{"bundle by its ID", &apiv1.Stream{Names: []string{"spiffe://example.org"}, WantsBundle: true, AckedGeneration: 5, PushedGeneration: 5, Acks: 1}, ackGood},
		{"older bundle taken", &apiv1.Stream{Names: []string{"ALL"}, WantsBundle: true, AckedGeneration: 4, PushedGeneration: 5, Acks: 1}, ackWait},
		{"both, SVID missing", &apiv1.Stream{Names: []string{"default", "ROOTCA"}, WantsBundle: true, AckedGeneration: 5, PushedGeneration: 5, Acks: 1}, ackWait},
		{"both", &apiv1.Stream{Names: []string{"default", "ROOTCA"}, WantsBundle: true, AckedSerial: serial, AckedGeneration: 5, PushedGeneration: 5, Acks: 2}, ackGood},
		{"rejected", &apiv1.Stream{Names: []string{"default"}, AckedSerial: serial, Acks: 1, Nack: "no"}, ackBad},
		{"subscribed to nothing yet", &apiv1.Stream{}, ackWait},
		{"Workload API, sent nothing", &apiv1.Stream{Protocol: protocolWorkloadAPI, Names: []string{"FetchX509SVID"}}, ackWait},
		{"Workload API, sent an older SVID", &apiv1.Stream{Protocol: protocolWorkloadAPI, PushedGeneration: 5, PushedSerial: "99"}, ackWait},
		{"Workload API, sent the SVID", &apiv1.Stream{Protocol: protocolWorkloadAPI, PushedGeneration: 5, PushedSerial: serial}, ackSent},
		{"Workload API, sent bundles", &apiv1.Stream{Protocol: protocolWorkloadAPI, PushedGeneration: 5}, ackSent},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ackOf(serial, tt.s); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}

func TestSumAcks(t *testing.T) {
	tests := []struct {
		states []ackState
		want   string
	}{
		{nil, "-"},
		{[]ackState{ackGood}, "ACK 1/1"},
		{[]ackState{ackGood, ackWait}, "WAIT 1/2"},
		{[]ackState{ackWait, ackGood}, "WAIT 1/2"},
		{[]ackState{ackSent}, "SENT 0/1"},
		{[]ackState{ackSent, ackGood}, "SENT 1/2"},
		{[]ackState{ackGood, ackSent}, "SENT 1/2"},
		{[]ackState{ackSent, ackWait}, "WAIT 0/2"},
		{[]ackState{ackWait, ackSent}, "WAIT 0/2"},
		{[]ackState{ackBad, ackWait, ackGood}, "NACK 1/3"},
		{[]ackState{ackWait, ackBad}, "NACK 0/2"},
	}
	for _, tt := range tests {
		var streams []streamView
		for _, s := range tt.states {
			streams = append(streams, streamView{State: s})
		}
		if got := sumAcks(streams).String(); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.states, got, tt.want)
		}
	}
}

// What an agent leaves out or makes up does not break the listing.
func TestSVIDViewOfNonsense(t *testing.T) {
	for name, h := range map[string]*apiv1.NodeHolding{
		"nothing":  nil,
		"empty":    {Holding: &apiv1.Holding{}},
		"no times": {Holding: &apiv1.Holding{SpiffeId: "x", Streams: []*apiv1.Stream{nil}}},
		"bad times": {Holding: &apiv1.Holding{
			NotAfter: &timestamppb.Timestamp{Seconds: 1 << 60}, RenewAt: &timestamppb.Timestamp{Nanos: -1}}},
		"huge generation": {Holding: &apiv1.Holding{Streams: []*apiv1.Stream{{WantsBundle: true, AckedGeneration: 1<<64 - 1, Acks: 1<<64 - 1}}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newSVIDList([]*apiv1.NodeHolding{h}, testNow)
			for _, format := range []string{"table", "wide", "json", "yaml", "name"} {
				o := &output{format: format}
				r := result{object: l, text: func(wide bool) []block {
					return []block{{table: svidTable(l.Items, testNow, wide)}}
				}}
				if err := o.render(io.Discard, r); err != nil {
					t.Errorf("%s: %v", format, err)
				}
			}
			if got := l.Items[0].expires(testNow); got == "" {
				t.Error("an empty cell")
			}
		})
	}
}

func TestUntil(t *testing.T) {
	tests := []struct {
		in   time.Duration
		want string
	}{
		{41 * time.Minute, "41m"}, {90 * time.Second, "90s"}, {0, "EXPIRED 0s"}, {-3 * time.Minute, "EXPIRED 3m"}, {25 * time.Hour, "25h"},
	}
	for _, tt := range tests {
		if got := until(testNow.Add(tt.in), testNow, "EXPIRED"); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.in, got, tt.want)
		}
	}
	if got := until(time.Time{}, testNow, "EXPIRED"); got != "-" {
		t.Errorf("no time: %q", got)
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		x, y string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"same", "same", 0}} {
		if got := distance(tt.x, tt.y); got != tt.want {
			t.Errorf("%q to %q: %d, want %d", tt.x, tt.y, got, tt.want)
		}
	}
}
