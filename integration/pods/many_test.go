//go:build integration

package pods

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// All pods of a node come at once: each gets its own identity, and when all are gone nothing is left. The figures are for
// people; what is asserted is that none is missing.
func TestManyPodsAtOnce(t *testing.T) {
	n := 200
	if testing.Short() {
		n = 40
	}
	w := newWorld(t)
	w.startCA()
	w.awaitBundle()
	w.startAgent()
	w.awaitGet("/readyz", "ok")
	volumes, tokens := make([]volume, n), make([]string, n)
	for i := range n {
		volumes[i] = volume{w.pod(fmt.Sprintf("team-%d", i%20), fmt.Sprintf("web-%d", i), "web"), "signet"}
		tokens[i] = w.token(volumes[i].Pod, "")
	}
	before := w.memory()
	published, served := make([]time.Duration, n), make([]time.Duration, n)
	serials := make([]string, n)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i, v := range volumes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			began := time.Now()
			if err := w.kubelet.publish(v, tokens[i]); err != nil {
				t.Errorf("%s: %v", v.Name, err)
				return
			}
			published[i] = time.Since(began)
			serial, err := w.fetch(v)
			if err != nil {
				t.Errorf("%s: %v", v.Name, err)
			}
			served[i], serials[i] = time.Since(began), serial
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	w.awaitGet("/metrics", fmt.Sprintf("signet_agent_svids %d", n), fmt.Sprintf("signet_agent_volumes %d", n))
	t.Logf("%d pods: published in %s, served in %s; the agent has %s, before it had %s", n, figures(published), figures(served), w.memory(), before)
	if slices.Sort(serials); len(slices.Compact(serials)) != n {
		t.Error("two pods have one SVID")
	}
	for _, v := range volumes {
		wg.Go(func() {
			if err := w.kubelet.unpublish(v); err != nil {
				t.Errorf("%s: %v", v.Name, err)
			}
		})
	}
	wg.Wait()
	if cached, remembered := w.state(); len(cached)+len(remembered) != 0 {
		t.Errorf("left are %d and %d", len(cached), len(remembered))
	}
}

// fetch returns the serial of a pod's SVID, as a program reads it.
func (w *world) fetch(v volume) (string, error) {
	folder, err := os.Open(w.kubelet.target(v))
	if err != nil {
		return "", err
	}
	defer folder.Close()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	for {
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(fmt.Sprintf("unix:///proc/self/fd/%d/agent.sock", folder.Fd())))
		if err == nil {
			return svid.Certificates[0].SerialNumber.Text(16), nil
		}
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return "", err
		}
	}
}

func figures(all []time.Duration) string {
	sorted := slices.Sorted(slices.Values(all))
	at := func(p int) time.Duration {
		return sorted[min(len(sorted)*p/100, len(sorted)-1)].Round(100 * time.Microsecond)
	}
	return fmt.Sprintf("p50 %s, p99 %s", at(50), at(99))
}

// memory returns what the agent's process has in memory.
func (w *world) memory() string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.agent.cmd.Process.Pid))
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return "unknown"
}
