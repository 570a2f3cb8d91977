//go:build envoy

package envoy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Envoy itself accepts every bootstrap.
func TestEnvoyAcceptsBootstraps(t *testing.T) {
	path, err := Find(os.Getenv("SIGNET_ENVOY"))
	if err != nil {
		t.Skipf("no Envoy: %v", err)
	}
	for name, p := range proxies() {
		t.Run(name, func(t *testing.T) {
			text, err := Bootstrap(p)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "envoy.yaml")
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
			// Its exit code tells nothing: with google_grpc, 1.40 may crash on its way out of this mode, after the verdict.
			out, _ := exec.CommandContext(t.Context(), path, "--mode", "validate", "-c", file, "--log-level", "warning").CombinedOutput()
			if !strings.Contains(string(out), "' OK\n") {
				t.Errorf("%s", out)
			}
			for line := range strings.Lines(string(out)) {
				if strings.Contains(line, "[warning]") || strings.Contains(line, "deprecated") {
					t.Errorf("Envoy warns: %s", line)
				}
			}
		})
	}
}
