//go:build integration

package endtoend

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// binary returns the path of one of our programs, which `make build` made.
func binary(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("SIGNET_BIN")
	if dir == "" {
		t.Fatal("SIGNET_BIN is not set: run this by `make test`, which builds the programs first")
	}
	return filepath.Join(dir, name)
}

// report is the part of `signet demo -o json` that these tests read.
type report struct {
	Kind   string `json:"kind"`
	Passed bool   `json:"passed"`
	Peers  string `json:"peers"`
	Sides  []struct {
		Name      string `json:"name"`
		SPIFFEID  string `json:"spiffeID"`
		Protocol  string `json:"protocol"`
		Rotations int    `json:"rotations"`
	} `json:"sides"`
	Traffic struct {
		Requests, Failed, Handshakes, Resumed int
	} `json:"traffic"`
	Outages []struct {
		Program          string
		Requests, Failed int
		Renewed          bool
	} `json:"outages"`
	Refused []struct {
		Who     string
		Refused bool
	} `json:"refused"`
}

func runDemo(t *testing.T, args ...string) report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(t, "signet"), append([]string{"demo", "-o", "json"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("signet demo: %v\n%s", err, stderr.String())
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("its report does not parse: %v\n%s", err, out)
	}
	return r
}

// judge asserts the promise: new mutual TLS connections all the time, SVIDs rotating under them, the CA killed, the agent
// killed, and not one failure; both identities as attested, and strangers refused.
func judge(t *testing.T, r report) {
	t.Helper()
	if !r.Passed || r.Kind != "DemoReport" {
		t.Errorf("the demo did not pass: %+v", r)
	}
	if r.Traffic.Failed != 0 || r.Traffic.Requests < 200 {
		t.Errorf("%d of %d requests failed, want 0 of at least 200", r.Traffic.Failed, r.Traffic.Requests)
	}
	if r.Traffic.Handshakes < r.Traffic.Requests || r.Traffic.Resumed != 0 {
		t.Errorf("%d handshakes (%d resumed) for %d requests, want a new one for each", r.Traffic.Handshakes, r.Traffic.Resumed, r.Traffic.Requests)
	}
	want := map[string]string{
		"checkout": "spiffe://demo.signet/ns/demo/sa/checkout",
		"payments": "spiffe://demo.signet/ns/demo/sa/payments",
	}
	for _, s := range r.Sides {
		if s.SPIFFEID != want[s.Name] {
			t.Errorf("%s was seen as %q, want %q", s.Name, s.SPIFFEID, want[s.Name])
		}
		if s.Rotations < 3 {
			t.Errorf("%s rotated %d times, want at least 3", s.Name, s.Rotations)
		}
		delete(want, s.Name)
	}
	if len(want) > 0 {
		t.Errorf("nothing is said of %v", want)
	}
	killed := map[string]bool{}
	for _, o := range r.Outages {
		killed[o.Program] = o.Failed == 0 && o.Requests > 0 && o.Renewed
	}
	if !killed["signet-ca"] || !killed["signet-agent"] {
		t.Errorf("outages without traffic, with failures or without renewals after them: %+v", r.Outages)
	}
	if len(r.Refused) < 2 {
		t.Errorf("refused were %+v, want an intruder and a client without a certificate", r.Refused)
	}
	for _, f := range r.Refused {
		if !f.Refused {
			t.Errorf("%s got in", f.Who)
		}
	}
}

// spiffe
func TestDemoWithGoPeers(t *testing.T) {
	r := runDemo(t, "--no-envoy")
	judge(t, r)
	if strings.Contains(r.Peers, "Envoy") {
		t.Errorf("peers are %q, want Go programs", r.Peers)
	}
}

var sdsSocket = regexp.MustCompile(`serves SDS on (\S+)/agent\.sock`)

// TestInterrupt ends the demo in the middle, as Ctrl-C does, having looked at it with the operator's tool: nothing is left
// of its processes and its folder.
func TestInterrupt(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(t, "signet"), "demo")
	cmd.Env = append(os.Environ(), "NO_COLOR=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	talk, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	folder := ""
	in := bufio.NewScanner(io.MultiReader(talk, out))
	for in.Scan() {
		if m := sdsSocket.FindStringSubmatch(in.Text()); m != nil {
			folder = m[1]
		}
		if strings.Contains(in.Text(), "caller is") {
			break
		}
	}
	if folder == "" {
		t.Fatalf("the demo did not say where its socket is: %v", in.Err())
	}
	look(t, filepath.Join(folder, "admin.sock"))
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for in.Scan() {
	}
	if err := cmd.Wait(); err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			t.Fatal(err)
		}
	}
	if code := cmd.ProcessState.ExitCode(); code == 0 {
		t.Error("an interrupted demo exits with 0: it did not show what it is for")
	}
	if _, err := os.Stat(folder); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
	if left := processesOf(t, folder); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

// look asks the running CA what it knows.
func look(t *testing.T, socket string) {
	t.Helper()
	signet := func(args ...string) string {
		out, err := exec.CommandContext(t.Context(), binary(t, "signet"), append(args, "--socket", socket)...).CombinedOutput()
		if err != nil {
			t.Errorf("signet %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	var wide string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); { // the acknowledgements arrive with the agent's next report
		wide = signet("svid", "list", "-o", "wide")
		if strings.Count(wide, "ACK") > 2 && strings.Contains(wide, "sa/payments") && strings.Contains(wide, "sa/checkout") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	for _, want := range []string{"spiffe://demo.signet/ns/demo/sa/checkout", "spiffe://demo.signet/ns/demo/sa/payments", "ACK", "ROOTCA"} {
		if !strings.Contains(wide, want) {
			t.Errorf("svid list -o wide does not show %q:\n%s", want, wide)
		}
	}
	if a := signet("authority", "list"); !strings.Contains(a, "root") || !strings.Contains(a, "intermediate") {
		t.Errorf("authority list shows not both kinds:\n%s", a)
	}
	if b := signet("bundle", "show", "-o", "spiffe"); !strings.Contains(b, "spiffe_sequence") {
		t.Errorf("bundle show -o spiffe is not a SPIFFE bundle:\n%s", b)
	}
}

// processesOf returns the command lines that name the folder.
func processesOf(t *testing.T, folder string) []string {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, l := range lines {
		data, err := os.ReadFile(l)
		if err == nil && strings.Contains(string(data), folder) {
			left = append(left, strings.ReplaceAll(string(data), "\x00", " "))
		}
	}
	return left
}
