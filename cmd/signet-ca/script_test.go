package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
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

// TestScripts runs the real command. What a file is refused for is in refused.txtar, what comes of a backup in backup.txtar.
//
// threat: E05, E06, E07, E08
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata/script",
		Setup: setup,
		Cmds: daemontest.Commands(map[string]daemontest.Command{
			"health":    healthCommand,
			"schema":    schemaCommand,
			"key":       keyCommand,
			"nosecrets": noSecretsCommand,
			"authority": authorityCommand,
			"refuses":   refusesCommand,
			"flip":      flipCommand,
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

// refusesCommand is "refuses CONFIG STORE REASON WORDS ...": each command ends with 1 and that reason, and leaves the store as it is.
func refusesCommand(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[1])
	before, statErr := os.ReadFile(path)
	for _, words := range args[3:] {
		err := ts.Exec("signet-ca", append(strings.Fields(words), "--config", ts.MkAbs(args[0]))...)
		exit, ok := errors.AsType[*exec.ExitError](err)
		if said := ts.ReadFile("stderr"); !ok || exit.ExitCode() != 1 || !strings.Contains(said, args[2]+", SGN-0") || strings.Contains(said, "panic") {
			ts.Fatalf("signet-ca %s: %v, want it refused with %s: %s", words, err, args[2], said)
		}
		if after, err := os.ReadFile(path); !bytes.Equal(before, after) || (err == nil) != (statErr == nil) {
			ts.Fatalf("signet-ca %s changed the store (%v)", words, err)
		}
	}
}

// flipCommand is "flip FILE TEXT": it flips a bit in every place where FILE has that text.
func flipCommand(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	data, err := os.ReadFile(path)
	ts.Check(err)
	flipped := []byte(args[1])
	flipped[len(flipped)/2] ^= 1
	if !bytes.Contains(data, []byte(args[1])) {
		ts.Fatalf("%s is not in %s", args[1], args[0])
	}
	ts.Check(os.WriteFile(path, bytes.ReplaceAll(data, []byte(args[1]), flipped), 0o600))
}

// authorityCommand is "authority DIR NAME [root|below]": it writes the files of a root to DIR, or of an intermediate below it
// that may sign one more, as an enterprise hands them out: key.pem, chain.pem, roots.pem.
func authorityCommand(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(100 * 24 * time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			BasicConstraintsValid: true, IsCA: true,
		}
	}
	make := func(c, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		if parent == nil {
			parent, parentKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), parentKey)
		ts.Check(err)
		signed, err := x509.ParseCertificate(der)
		ts.Check(err)
		return signed, key
	}
	root, key := make(template(args[1]+" root"), nil, nil)
	chain := [][]byte{root.Raw}
	if len(args) > 2 && args[2] == "below" {
		c := template(args[1] + " issuer")
		c.MaxPathLen = 1
		issuer, issuerKey := make(c, root, key)
		chain, key = [][]byte{issuer.Raw, root.Raw}, issuerKey
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	ts.Check(err)
	var certs []byte
	for _, der := range chain {
		certs = append(certs, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	for name, data := range map[string][]byte{
		"key.pem":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		"chain.pem": certs,
		"roots.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}),
	} {
		ts.Check(os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
}
