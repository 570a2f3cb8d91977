//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

// debugContainer: one that somebody adds to a pod is the pod: with its volume it has the pod's identity, and no other.
func (s *suite) debugContainer(t *testing.T) {
	s.namespace(t, "debug")
	s.Apply(t, pod{namespace: "debug", name: "pod", args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "debug", "pod", "--for=condition=Ready")
	s.served(t, "debug", "pod")
	file := filepath.Join(t.TempDir(), "container.json")
	if err := os.WriteFile(file, []byte("{"+mounted+"}"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Must(t, "debug", "-n", "debug", "pod", "--container=added", "--image="+s.Registry+"/signet-probe:1", "--image-pull-policy=IfNotPresent",
		"--profile=restricted", "--custom="+file, "--arguments-only", "--", "svid")
	nodes.Eventually(t, "the container that was added has ended", func(ctx context.Context) error {
		var p struct {
			Status struct {
				EphemeralContainerStatuses []struct {
					State struct {
						Terminated *struct {
							ExitCode int
							Message  string
						}
					}
				}
			}
		}
		if err := s.Get(ctx, &p, "pod", "-n", "debug", "pod"); err != nil {
			return err
		}
		all := p.Status.EphemeralContainerStatuses
		if len(all) != 1 || all[0].State.Terminated == nil {
			return errors.New("it has not")
		}
		end := all[0].State.Terminated
		var r report
		if err := json.Unmarshal([]byte(end.Message), &r); err != nil || end.ExitCode != 0 || r.ID != "spiffe://cluster.local/ns/debug/sa/default" {
			t.Errorf("it ended with %+v (%v)", end, err)
		}
		return nil
	})
}
