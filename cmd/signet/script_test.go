package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/signet-ca/signet/internal/daemon/daemontest"
)

var update = flag.Bool("update", false, "rewrite the expected output in testdata/script")

// TestMain lets scripts run this binary under its names. They see a fixed time; what a terminal is, they say themselves.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"signet":                  underTest,
		"kubectl-signet":          underTest,
		"kubectl_complete-signet": underTest,
		"signet-as-built":         main,
	})
}

func underTest() {
	a := &app{
		stdin:   os.Stdin,
		stdout:  os.Stdout,
		stderr:  os.Stderr,
		getenv:  os.Getenv,
		now:     func() time.Time { return testNow },
		tty:     func(w io.Writer) bool { return os.Getenv("TEST_TTY") != "" || isTerminal(w) },
		poll:    20 * time.Millisecond,
		silence: maxSilence,
		version: "v0.0.0-test",
	}
	os.Exit(a.main(os.Args))
}

// A world is what one script runs against.
type world struct {
	tb     testing.TB
	admin  *fakeAdmin
	socket string
	stop   func() // ends the admin service; nil when it does not run
}

type worldKey struct{}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			// Below the script's own folder the path could be too long for a socket.
			dir, err := os.MkdirTemp("", "sgn")
			if err != nil {
				return err
			}
			w := &world{tb: t, admin: newFakeAdmin(t), socket: filepath.Join(dir, "admin.sock")}
			env.Values[worldKey{}] = w
			env.Setenv("SOCKET", w.socket)
			env.Setenv("SIGNET_ADMIN_SOCKET", w.socket)
			env.Defer(func() {
				if w.stop != nil {
					w.stop()
				}
				os.RemoveAll(dir)
			})
			w.stop, err = serveAdmin(w.socket, w.admin)
			return err
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Getuid() == 0, nil
			}
			return false, errors.New("unknown condition")
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"ca":      cmdCA,
			"cluster": cmdCluster,
			"await":   cmdAwait,
			"files":   cmdFiles,
			"looks":   cmdLooks,
			"told":    cmdTold,
			"exits":   daemontest.Exit,
			"mint":    cmdMint,
			"tls":     cmdTLS,
		},
	})
}

func worldOf(ts *testscript.TestScript) *world { return ts.Value(worldKey{}).(*world) }

// cmdCA is `ca SCENE`, `ca stop` or `ca start`.
func cmdCA(ts *testscript.TestScript, _ bool, args []string) {
	w := worldOf(ts)
	switch args[0] {
	case "stop":
		w.stop()
		w.stop = nil
	case "start":
		var err error
		w.stop, err = serveAdmin(w.socket, w.admin)
		ts.Check(err)
	default:
		w.admin.play(args[0])
	}
}

// cmdLooks is `looks N`: wait until the CA was asked N more times.
func cmdLooks(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	worldOf(ts).admin.waitLooks(n)
}

// cmdTold is `told WATCHER N`: wait until the watcher of a rotation that came as number WATCHER was sent N messages.
func cmdTold(ts *testscript.TestScript, _ bool, args []string) {
	watcher, err := strconv.Atoi(args[0])
	ts.Check(err)
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	worldOf(ts).admin.waitTold(watcher, n)
}

// cmdAwait is `await FILE`: wait until it is there.
func cmdAwait(ts *testscript.TestScript, _ bool, args []string) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 12_000 { // a minute
		if _, err := os.Lstat(ts.MkAbs(args[0])); err == nil {
			return
		}
		<-tick.C
	}
	ts.Fatalf("no %s", args[0])
}

// cmdFiles is `files FOLDER [NAME:MODE...]`: these are in it, and nothing else.
func cmdFiles(ts *testscript.TestScript, _ bool, args []string) {
	entries, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	var have []string
	for _, e := range entries {
		info, err := e.Info()
		ts.Check(err)
		have = append(have, fmt.Sprintf("%s:%04o", e.Name(), info.Mode().Perm()))
	}
	if want := args[1:]; !slices.Equal(have, want) {
		ts.Fatalf("in the folder: %v, want %v", have, want)
	}
}

// cmdMint is `mint KIND FILE`: write a certificate chain that breaks what KIND says, with its key.
func cmdMint(ts *testscript.TestScript, _ bool, args []string) {
	chain, ok := mint(worldOf(ts).tb, args[0])
	if !ok {
		ts.Fatalf("no such kind")
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), chain.pem(), 0o600))
}

// cmdTLS is `tls KIND ADDRESS-VARIABLE`: a server on loopback, or at a Unix socket, that shows a chain of "mint good".
func cmdTLS(ts *testscript.TestScript, _ bool, args []string) {
	kind, variable := args[0], args[1]
	network, address := "tcp", "127.0.0.1:0"
	if kind == "unix" {
		network, address = "unix", worldOf(ts).socket+".tls"
	}
	l, err := net.Listen(network, address)
	ts.Check(err)
	chain, _ := mint(worldOf(ts).tb, "good")
	conf := &tls.Config{Certificates: []tls.Certificate{chain.tls()}}
	switch kind {
	case "mtls12":
		conf.MaxVersion = tls.VersionTLS12
		conf.ClientAuth = tls.RequireAnyClientCert
	case "mtls13":
		conf.ClientAuth = tls.RequireAnyClientCert
	}
	var wg sync.WaitGroup
	wg.Go(func() { serveTLS(&wg, l, kind, conf) })
	ts.Defer(func() { l.Close(); wg.Wait() })
	ts.Setenv(variable, l.Addr().String())
}

func serveTLS(wg *sync.WaitGroup, l net.Listener, kind string, conf *tls.Config) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer conn.Close()
			switch kind {
			case "plain":
				io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
			case "silent":
				io.Copy(io.Discard, conn)
			default:
				if c := tls.Server(conn, conf); c.Handshake() == nil {
					io.Copy(io.Discard, c)
				}
			}
		})
	}
}
