//go:build cluster && linux

package nodes_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// latency prints how long programs wait for their first SVID in namespaces, and under ServiceAccounts, that were created
// a moment before: one at a time, so that what is measured is not how long a container waits for a processor. What it
// fails for is far above what it prints: it is a guard against seconds, not a measurement.
func (s *suite) latency(t *testing.T) {
	var all []report
	for i := range 30 {
		ns := fmt.Sprintf("fresh-%d", i)
		t.Cleanup(func() { s.deleteNamespace(t, ns) })
		var objects strings.Builder
		fmt.Fprintf(&objects, "{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": %q, \"labels\": {%q: \"\"}}}\n---\n", ns, testLabel)
		fmt.Fprintf(&objects, "{\"apiVersion\": \"v1\", \"kind\": \"ServiceAccount\", \"metadata\": {\"name\": \"fresh\", \"namespace\": %q}}\n---\n", ns)
		objects.WriteString(pod{namespace: ns, name: ns + "-pod", app: "fresh", account: "fresh", node: s.node(i % 2), args: `["svid"]`}.json(s))
		s.Apply(t, objects.String())
		all = slices.AppendSeq(all, maps.Values(s.reports(t, ns, "fresh", 1)))
	}
	if half := s.tell(t, all); half > 2*time.Second {
		t.Errorf("half of the programs waited %v and more", half)
	}
}

// crowd creates many pods at once, SIGNET_PODS of them or 200: about a minute on two cores. Each has its SVID; how long that
// takes is printed, and no more, since here most of it is the wait for a processor.
func (s *suite) crowd(t *testing.T) {
	n := 200
	if text := os.Getenv("SIGNET_PODS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	s.namespace(t, "crowd")
	var objects strings.Builder
	for i := range n {
		objects.WriteString(pod{namespace: "crowd", name: fmt.Sprintf("crowd-%d", i), app: "crowd", args: `["svid"]`}.json(s) + "---\n")
	}
	s.Apply(t, objects.String())
	s.tell(t, slices.Collect(maps.Values(s.reports(t, "crowd", "crowd", n))))
	s.memory(t)
	if log := s.Must(t, "logs", "-n", signetNamespace, "signet-ca-0", "-c", "ca"); strings.Contains(log, "throttl") {
		t.Error("the API server throttles the CA")
	}
}

// tell prints the latencies of these pods and returns what half of them took from the program's start.
func (s *suite) tell(t *testing.T, all []report) time.Duration {
	t.Helper()
	var started, queued, again, created []time.Duration
	for _, r := range all {
		started = append(started, time.Duration(r.SVID-r.Started)*time.Microsecond)
		queued = append(queued, time.Duration(r.Queued)*time.Microsecond)
		again = append(again, time.Duration(r.Again)*time.Microsecond)
		created = append(created, time.UnixMicro(r.SVID).Sub(r.created))
	}
	slices.Sort(started)
	slices.Sort(queued)
	slices.Sort(again)
	slices.Sort(created)
	at := func(d []time.Duration, percent int) time.Duration {
		return d[(len(d)-1)*percent/100].Round(100 * time.Microsecond)
	}
	figure(t, "from the program's start to its SVID, %d pods: p50 %v, p99 %v, at most %v", len(all), at(started, 50), at(started, 99), at(started, 100))
	figure(t, "its threads, all together, waited meanwhile for a processor: p50 %v, p99 %v, at most %v", at(queued, 50), at(queued, 99), at(queued, 100))
	figure(t, "once more by the same program, on a new connection: p50 %v, p99 %v, at most %v", at(again, 50), at(again, 99), at(again, 100))
	figure(t, "from the pod's creation (whole seconds) to its SVID: p50 %v, p99 %v, at most %v", at(created, 50), at(created, 99), at(created, 100))
	return at(started, 50)
}
