//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

// figure tells what was measured: in the test's log, and in the file that SIGNET_FIGURES names, since nobody is shown the
// log of a test that passed.
func figure(t *testing.T, format string, args ...any) {
	t.Helper()
	t.Logf(format, args...)
	path := os.Getenv("SIGNET_FIGURES")
	if path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
}

// memory prints what the CA and the agents need, as kubelet sees it.
func (s *suite) memory(t *testing.T) {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
		}
	}
	if err := s.Get(t.Context(), &list, "nodes"); err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, node := range list.Items {
		nodes.Eventually(t, "kubelet's statistics", func(ctx context.Context) error { // it gathers them every ten seconds or so
			text, err := s.Kubectl(ctx, "", "get", "--raw", "/api/v1/nodes/"+node.Metadata.Name+"/proxy/stats/summary")
			if err != nil {
				return err
			}
			var summary struct {
				Pods []struct {
					PodRef     struct{ Name, Namespace string }
					Containers []struct {
						Name   string
						Memory struct{ RSSBytes int64 }
					}
				}
			}
			if err := json.Unmarshal([]byte(text), &summary); err != nil {
				return err
			}
			for _, p := range summary.Pods {
				for _, c := range p.Containers {
					if p.PodRef.Namespace == signetNamespace && c.Memory.RSSBytes > 0 {
						found++
						figure(t, "memory of %s's container %s on %s: %.1f MiB", p.PodRef.Name, c.Name, node.Metadata.Name, float64(c.Memory.RSSBytes)/(1<<20))
					}
				}
			}
			return nil
		})
	}
	if found == 0 {
		t.Error("kubelet knows of no memory of Signet's")
	}
}
