package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.etcd.io/bbolt"

	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"signet-ca": func() { os.Exit(program().Main()) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata/script",
		Setup: setup,
		Cmds: daemontest.Commands(map[string]daemontest.Command{
			"health":    healthCommand,
			"schema":    schemaCommand,
			"key":       keyCommand,
			"nosecrets": noSecretsCommand,
		}),
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
	})
}

// config is the configuration that every script begins with, in ca.yaml.
const goodConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: example.org
replica: ca-0
listen: %s
adminSocket: %s/admin.sock
http: %s
store: {kind: bolt, path: %[2]s/state/signet.db}
seal: {keyFile: %[2]s/seal/key}
ledger: {dir: %[2]s/ledger}
policyFile: %[2]s/policy.yaml
publish: {dir: %[2]s/bundle}
issuers:
  - issuer: https://kubernetes.default.svc.cluster.local
    jwks: {file: %[2]s/jwks.json}
directory: {kind: file, path: %[2]s/pods.json}
`

// setup writes ca.yaml, policy.yaml, jwks.json and pods.json, and sets HTTP and GRPC to ports that were free a moment ago.
// The folder is a short one, for the address of a Unix socket is.
func setup(env *testscript.Env) error {
	dir, err := os.MkdirTemp("", "ca")
	if err != nil {
		return err
	}
	env.Defer(func() { os.RemoveAll(dir) })
	agents, err := daemontest.FreeAddress()
	if err != nil {
		return err
	}
	web, err := daemontest.FreeAddress()
	if err != nil {
		return err
	}
	env.Setenv("D", dir)
	env.Setenv("GRPC", agents)
	env.Setenv("HTTP", web)
	issuer, err := attestortest.NewIssuer(attestortest.Config{})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "ca.yaml"), fmt.Appendf(nil, goodConfig, agents, dir, web), 0o600),
		os.WriteFile(filepath.Join(dir, "policy.yaml"), []byte("apiVersion: signet.dev/v1\nkind: Policy\nnamespaces: [shop]\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "pods.json"), []byte(`{"pods":[]}`), 0o600),
		os.WriteFile(filepath.Join(dir, "jwks.json"), issuer.JWKS(), 0o600),
	)
}

// schemaCommand is "schema FILE N": it makes the stored record say that it has schema N.
func schemaCommand(ts *testscript.TestScript, _ bool, args []string) {
	db, err := bbolt.Open(ts.MkAbs(args[0]), 0o600, &bbolt.Options{Timeout: time.Second})
	ts.Check(err)
	defer db.Close()
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	ts.Check(db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("journal"))
		var record map[string]any
		if err := json.Unmarshal(b.Get([]byte("record")), &record); err != nil {
			return err
		}
		record["schema"] = n
		record["somethingNew"] = true
		data, err := json.Marshal(record)
		if err != nil {
			return err
		}
		rev := binary.BigEndian.Uint64(b.Get([]byte("revision")))
		return errors.Join(b.Put([]byte("record"), data), b.Put([]byte("revision"), binary.BigEndian.AppendUint64(nil, rev+1)))
	}))
}
