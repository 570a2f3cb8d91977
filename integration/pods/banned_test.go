//go:build integration

package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// try runs the operator's tool.
func (w *world) try(args ...string) (code int, stdout, stderr string) {
	w.t.Helper()
	cmd := exec.CommandContext(w.t.Context(), binary(w.t, "signet"), append(args, "--socket", filepath.Join(w.dir, "admin.sock"), "--timeout", patience.String())...)
	var talk strings.Builder
	cmd.Stderr = &talk
	out, err := cmd.Output()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		w.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out), talk.String()
}

// signet runs the operator's tool, which must exit with that code.
func (w *world) signet(want int, args ...string) (stdout, stderr string) {
	w.t.Helper()
	code, stdout, stderr := w.try(args...)
	if code != want {
		w.t.Fatalf("signet %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, stdout, stderr)
	}
	return stdout, stderr
}

// nodeAnswer is what these tests read of `signet node`'s objects.
type nodeAnswer struct {
	Changed       bool
	SessionsEnded int
	CorrelationID string
	Node          struct {
		Connected  bool
		SPIFFEIDs  []string
		ValidUntil time.Time
		Ban        *struct {
			By, Reason string
			ValidUntil time.Time
		}
	}
}

func (w *world) node(args ...string) nodeAnswer {
	w.t.Helper()
	out, _ := w.signet(0, append(append([]string{"node"}, args...), "-o", "json")...)
	var a nodeAnswer
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		w.t.Fatalf("%v\n%s", err, out)
	}
	return a
}

// A node is banned, with the real programs: its agent loses its session within seconds and says why, what its pod holds goes
// on being served, nothing of the ban is lost with a CA that is killed, and an agent that comes anew is let in only once the
// node is allowed.
//
// threat: B06
func TestBannedNode(t *testing.T) {
	w := newWorld(t)
	w.startCA()
	w.awaitBundle()
	w.startAgent()
	w.awaitGet("/readyz", "ok")
	v := volume{w.pod("shop", "web-1", "web"), "signet"}
	if err := w.kubelet.publish(v, w.token(v.Pod, "")); err != nil {
		t.Fatal(err)
	}
	held := w.read(v)
	const id = "spiffe://example.org/ns/shop/sa/web"
	eventually(t, "signet node list", func() error {
		out, _ := w.signet(0, "node", "list", "--no-headers")
		if f := strings.Fields(out); len(f) != 5 || f[0] != nodeName || f[3] != "1" || f[4] != "-" {
			return fmt.Errorf("it is %q", out)
		}
		return nil
	})

	if d := w.node("ban", nodeName, "--dry-run"); !d.Changed || d.SessionsEnded != 1 || !d.Node.Connected || len(d.Node.SPIFFEIDs) != 1 || d.Node.SPIFFEIDs[0] != id {
		t.Errorf("a ban would touch %+v", d)
	}
	_, why := w.signet(2, "node", "ban", nodeName)
	if !strings.Contains(why, "--yes") {
		t.Errorf("without anybody to ask: %s", why)
	}
	d := w.node("ban", nodeName, "--reason", "stolen", "--yes")
	if !d.Changed || d.Node.Ban == nil || d.Node.Ban.Reason != "stolen" || d.Node.ValidUntil.IsZero() || d.Node.Ban.ValidUntil.Before(d.Node.ValidUntil) {
		t.Errorf("the ban: %+v", d)
	}
	w.awaitGet("/readyz", string(api.NodeBanned))
	w.awaitGet("/metrics", "signet_agent_banned 1", "signet_agent_connected 0", "signet_agent_svids 1")
	if got := w.read(v); got.Serial != held.Serial {
		t.Error("the pod is served something else than what it held")
	}
	if out, _ := w.signet(0, "why", d.CorrelationID); !strings.Contains(out, "a node was banned") || !strings.Contains(out, "stolen") {
		t.Errorf("signet why says\n%s", out)
	}

	w.ca.signal(syscall.SIGKILL)
	w.startCA()
	eventually(t, "the CA's return", func() error {
		code, out, talk := w.try("node", "list", "--no-headers", "--banned")
		if code != 0 || !strings.HasPrefix(out, nodeName+" ") {
			return fmt.Errorf("exit code %d: %q, %q", code, out, talk)
		}
		return nil
	})
	if d := w.node("ban", nodeName, "--yes"); d.Changed {
		t.Errorf("banned twice: %+v", d)
	}
	w.agent.signal(syscall.SIGKILL)
	w.startAgent()
	w.awaitGet("/readyz", string(api.NodeBanned))
	if got := w.read(v); got.Serial != held.Serial {
		t.Error("an agent that was restarted serves something else than what was held")
	}

	if d := w.node("allow", nodeName, "--reason", "found", "--yes"); !d.Changed {
		t.Errorf("not allowed: %+v", d)
	}
	w.agent.signal(syscall.SIGKILL) // or it would come back within two minutes
	w.startAgent()
	w.awaitGet("/readyz", "ok")
	next := volume{w.pod("shop", "web-2", "web"), "signet"}
	if err := w.kubelet.publish(next, w.token(next.Pod, "")); err != nil {
		t.Fatal(err)
	}
	w.read(next)
	out, _ := w.signet(0, "audit", "--node", nodeName, "--kind", "ban-node,allow-node", "--no-headers")
	if strings.Count(out, "\n") != 2 || strings.Count(out, nodeName) != 2 {
		t.Errorf("on record:\n%s", out)
	}
	if refused, _ := w.signet(0, "audit", "--reason", string(api.NodeBanned), "--no-headers"); refused == "" {
		t.Error("no refusal is on record")
	}
}
