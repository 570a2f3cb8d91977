package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.etcd.io/bbolt"

	"github.com/signet-ca/signet/attestor/attestortest"
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
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"http":      httpCommand,
			"health":    healthCommand,
			"schema":    schemaCommand,
			"edit":      editCommand,
			"key":       keyCommand,
			"mode":      modeCommand,
			"nosecrets": noSecretsCommand,
			"exit":      exitCommand,
			"term":      termCommand,
		},
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
	agents, err := freeAddress()
	if err != nil {
		return err
	}
	web, err := freeAddress()
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

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// httpCommand is "[!] http ADDRESS/PATH [PATTERN ...]": it waits, ten seconds at most, for an answer of 200 (with !, of
// something else) whose body every pattern matches.
func httpCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: http ADDRESS/PATH [PATTERN ...]")
	}
	var last string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		ok, body := ask(args[0])
		last = body
		if ok != neg && matches(ts, body, args[1:]) {
			return
		}
	}
	ts.Fatalf("%s answered last:\n%s", args[0], last)
}

func ask(target string) (ok bool, body string) {
	resp, err := http.Get("http://" + target)
	if err != nil {
		return false, err.Error()
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return false, err.Error()
	}
	return resp.StatusCode == http.StatusOK, string(data)
}

func matches(ts *testscript.TestScript, body string, patterns []string) bool {
	for _, p := range patterns {
		re, err := regexp.Compile("(?m)" + p)
		ts.Check(err)
		if !re.MatchString(body) {
			return false
		}
	}
	return true
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

// modeCommand is "mode FILE MODE": the file has exactly that mode.
func modeCommand(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	want, err := strconv.ParseUint(args[1], 8, 32)
	ts.Check(err)
	if info.Mode().Perm() != fs.FileMode(want) {
		ts.Fatalf("%s has mode %o, want %o", args[0], info.Mode().Perm(), want)
	}
}

// termCommand is "term": it sends SIGTERM to all that runs in the background.
func termCommand(ts *testscript.TestScript, _ bool, _ []string) {
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(syscall.SIGTERM))
	}
}

// exitCommand is "exit CODE COMMAND [ARG ...]": the command ends with that code.
func exitCommand(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if e, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); ok {
		code = e.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("%s ended with %d, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}
