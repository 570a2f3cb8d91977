//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
	"github.com/signet-ca/signet/internal/durable"
)

// binary returns the path of signet-ca, which `make build` made. Its process hides what a warden must read of it (the paths
// and the bytes that it writes) from all but root.
func binary(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can see what the CA's process does")
	}
	dir := os.Getenv("SIGNET_BIN")
	if dir == "" {
		t.Fatal("SIGNET_BIN is not set: run this by `make test`, which builds the programs first")
	}
	return filepath.Join(dir, "signet-ca")
}

// caConfig is the configuration of the CA; its state, and nothing else, lies in the folder state.
const caConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: example.org
development: true
replica: ca-0
listen: %s
adminSocket: %s/admin.sock
http: none
store: {kind: bolt, path: %[3]s/signet.db}
seal: {keyFile: %[3]s/seal/key}
ledger: {dir: %[3]s/ledger, segmentSize: 1MiB, refusalBytes: 256KiB}
policyFile: %[2]s/policy.yaml
publish: {dir: %[3]s/bundle}
mintBudget: 10000
issuers:
  - issuer: https://kubernetes.default.svc.cluster.local
    jwks: {file: %[2]s/jwks.json}
directory: {kind: none}
`

// configure writes the configuration of a CA into dir, its state below state, and returns the address that it will serve.
func configure(t testing.TB, dir, state string, tokens *attestortest.Issuer) string {
	t.Helper()
	address, err := daemontest.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "ca.yaml"), fmt.Appendf(nil, caConfig, address, dir, state), 0o600),
		os.WriteFile(filepath.Join(dir, "policy.yaml"), []byte("apiVersion: signet.dev/v1\nkind: Policy\nnamespaces: [shop]\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "jwks.json"), tokens.JWKS(), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func newTokens(t testing.TB) *attestortest.Issuer {
	t.Helper()
	tokens, err := attestortest.NewIssuer(attestortest.Config{Issuer: "https://kubernetes.default.svc.cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

// initAgain runs init once more, and undisturbed.
func initAgain(dir string) (string, error) {
	out, err := exec.Command(os.Getenv("SIGNET_BIN")+"/signet-ca", "init", "--config", filepath.Join(dir, "ca.yaml")).CombinedOutput()
	return string(out), err
}

// lookAtInit returns StateMissing where there is no record, nil where there is one whose root's key opens, and what is
// wrong otherwise: a half of a root that run would take.
func lookAtInit(state string) error {
	s, closeStore, err := store.Open(context.Background(), store.Config{Path: filepath.Join(state, "signet.db")}, false)
	if err != nil {
		return err
	}
	j, _, err := s.Load(context.Background())
	if err := errors.Join(err, closeStore()); err != nil {
		return err
	}
	key, err := durable.ReadPrivate(filepath.Join(state, "seal/key"), 64)
	if err != nil {
		return fmt.Errorf("a record without its seal key: %w", err)
	}
	sealer, err := ca.NewSealer(key)
	if err != nil {
		return err
	}
	root := j.ActiveAuthority()
	if _, err := sealer.Open(root.SealedKey, j.TrustDomain+"/"+root.ID); err != nil {
		return fmt.Errorf("a record whose root's key does not open: %w", err)
	}
	return nil
}

// judgeInit: there is a whole root or none; where there is none, init makes one.
func judgeInit(r run) error {
	state := filepath.Join(r.dir, "state")
	before := lookAtInit(state)
	switch {
	case before != nil && api.ReasonOf(before) != api.StateMissing:
		return before
	case before != nil && r.code == 0:
		return errors.New("init says that it is done, and there is no root")
	case r.code == 1 && !strings.Contains(r.said, "signet-ca: "):
		return errors.New("it failed without a word")
	case strings.Contains(r.said, string(api.StateCorrupt)):
		return errors.New("a disk that fails was taken for a damaged store")
	}
	said, err := initAgain(r.dir)
	switch {
	case before == nil && (err == nil || !strings.Contains(said, string(api.StateExists))):
		return fmt.Errorf("init beside a record: %v\n%s", err, said)
	case before != nil && err != nil:
		return fmt.Errorf("init again: %w\n%s", err, said)
	}
	if err := lookAtInit(state); err != nil {
		return fmt.Errorf("after init again: %w", err)
	}
	if left, _ := filepath.Glob(filepath.Join(state, "seal/.signet-tmp-*")); len(left) > 0 && before != nil {
		return fmt.Errorf("a copy of the seal key was left: %s", left)
	}
	return nil
}

// TestInit proves every call of `signet-ca init` that touches its state: wherever it was killed or failed, there is a whole
// root or none, and where there is none it can be run again.
//
// threat: E01, E03
func TestInit(t *testing.T) {
	path, tokens := binary(t), newTokens(t)
	subject{
		prepare: func(t testing.TB, dir string) { configure(t, dir, filepath.Join(dir, "state"), tokens) },
		run: func(t testing.TB, w *warden) (int, string) {
			dir := w.root
			w.root = filepath.Join(dir, "state") // its configuration is another matter
			p := start(t, w, nil, nil, path, "init", "--config", filepath.Join(dir, "ca.yaml"))
			code := p.end()
			if err := w.err(); err != nil {
				t.Error(err)
			}
			return code, p.said()
		},
		judge: judgeInit,
	}.enumerate(t)
}
