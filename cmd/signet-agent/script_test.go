package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
	"github.com/signet-ca/signet/sds"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"signet-agent": func() { os.Exit(program().Main()) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:   "testdata/script",
		Setup: func(env *testscript.Env) error { return setup(t, env) },
		Cmds: daemontest.Commands(map[string]daemontest.Command{
			"ca":    caCommand,
			"token": tokenCommand,
			"sds":   sdsCommand,
		}),
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "tmpfs":
				return volatile("/dev/shm"), nil
			case "disk":
				return !volatile(os.TempDir()), nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
	})
}

// volatile reports whether what is written to a folder can never reach a disk.
func volatile(dir string) bool {
	dir, err := os.MkdirTemp(dir, "signet-agent-test-")
	if err != nil {
		return false
	}
	defer os.RemoveAll(dir)
	_, _, err = agent.OpenDirCache(dir, false)
	return err == nil
}

// goodConfig is the configuration that every script begins with, in agent.yaml.
const goodConfig = `apiVersion: signet.dev/v1
kind: AgentConfig
trustDomain: example.org
development: true
ca: {address: "%[1]s", bundleFile: %[2]s/bundle.pem}
tokenFile: %[2]s/token
sharedSocket: %[2]s/run/agent.sock
cache: {dir: %[2]s/cache}
http: "%[3]s"
`

// scene is what one script plays in: a CA whose port is a relay in this process, and the tokens of a cluster.
type scene struct {
	ca       *catest.Server
	pods     map[string]attestortest.Pod
	address  string // of the CA
	mu       sync.Mutex
	listener net.Listener // nil while the CA is away
	wg       sync.WaitGroup
}

type sceneKey struct{}

// setup writes agent.yaml, token and bundle.pem into a short folder $D, for the address of a Unix socket is short, and sets
// HTTP and CA to ports that were free a moment ago. $SHM is a folder on a tmpfs.
func setup(t *testing.T, env *testscript.Env) error {
	dir, err := os.MkdirTemp("", "ag")
	if err != nil {
		return err
	}
	env.Defer(func() { os.RemoveAll(dir) })
	shm, err := os.MkdirTemp("/dev/shm", "signet-agent-test-")
	if err != nil {
		shm = filepath.Join(dir, "shm")
	}
	env.Defer(func() { os.RemoveAll(shm) })
	address, err := daemontest.FreeAddress()
	if err != nil {
		return err
	}
	web, err := daemontest.FreeAddress()
	if err != nil {
		return err
	}
	s := &scene{ca: catest.New(t, catest.Options{}), pods: map[string]attestortest.Pod{}, address: address}
	env.Values[sceneKey{}] = s
	env.Defer(s.stop)
	for name, value := range map[string]string{"D": dir, "SHM": shm, "CA": address, "HTTP": web} {
		env.Setenv(name, value)
	}
	s.ca.WaitReady()
	var bundle []byte
	for _, r := range s.ca.CA().Bundle().Roots {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
	}
	own := s.ca.Evidence(s.ca.AgentPod(nodeName), api.AgentAudience(s.ca.TD), time.Hour)
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "agent.yaml"), fmt.Appendf(nil, goodConfig, address, dir, web), 0o600),
		os.WriteFile(filepath.Join(dir, "bundle.pem"), bundle, 0o644),
		os.WriteFile(filepath.Join(dir, "token"), own.Data, 0o600),
	)
}

func sceneOf(ts *testscript.TestScript) *scene { return ts.Value(sceneKey{}).(*scene) }

// caCommand is "ca start" or "ca stop".
func caCommand(ts *testscript.TestScript, _ bool, args []string) {
	s := sceneOf(ts)
	if args[0] == "stop" {
		s.stop()
		return
	}
	l, err := net.Listen("tcp", s.address)
	ts.Check(err)
	s.mu.Lock()
	s.listener = l
	s.mu.Unlock()
	s.wg.Go(func() {
		var relays sync.WaitGroup
		ctx, cancel := context.WithCancel(context.Background())
		defer relays.Wait()
		defer cancel()
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			relays.Go(func() { s.relay(ctx, in) })
		}
	})
}

// relay joins a connection to the CA in memory until either side or ctx ends.
func (s *scene) relay(ctx context.Context, in net.Conn) {
	defer in.Close()
	out, err := s.ca.Dial(ctx)
	if err != nil {
		return
	}
	defer out.Close()
	stop := context.AfterFunc(ctx, func() {
		in.Close()
		out.Close()
	})
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		io.Copy(out, in)
		out.Close()
	})
	wg.Go(func() {
		io.Copy(in, out)
		in.Close()
	})
	wg.Wait()
}

func (s *scene) stop() {
	s.mu.Lock()
	l := s.listener
	s.listener = nil
	s.mu.Unlock()
	if l != nil {
		l.Close()
	}
	s.wg.Wait()
}

// tokenCommand is "token POD FILE [AUDIENCE]": it writes a fresh token of that pod.
func tokenCommand(ts *testscript.TestScript, _ bool, args []string) {
	s := sceneOf(ts)
	pod, ok := s.pods[args[0]]
	if !ok {
		pod = s.ca.Pod("shop", args[0], "web", nodeName)
		s.pods[args[0]] = pod
	}
	audience := api.WorkloadAudience(s.ca.TD)
	if len(args) > 2 {
		audience = args[2]
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), s.ca.Evidence(pod, audience, time.Hour).Data, 0o600))
}

// sdsCommand is "[!] sds SOCKET TOKEN-FILE NAME ...": it fetches secrets as a proxy would and prints "NAME SPIFFE-ID", or
// with ! the reason why there are none.
func sdsCommand(ts *testscript.TestScript, neg bool, args []string) {
	token, err := os.ReadFile(ts.MkAbs(args[1]))
	ts.Check(err)
	conn, err := grpc.NewClient("unix:"+ts.MkAbs(args[0]), grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	resp, err := secret.NewSecretDiscoveryServiceClient(conn).FetchSecrets(
		metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+string(token)),
		&discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: args[2:]})
	if neg {
		if err == nil {
			ts.Fatalf("secrets came")
		}
		fmt.Fprintln(ts.Stdout(), api.ReasonOf(api.FromStatus(err)))
		return
	}
	ts.Check(err)
	var lines []string
	for _, a := range resp.GetResources() {
		one := &tls.Secret{}
		ts.Check(a.UnmarshalTo(one))
		what := "roots"
		if c := one.GetTlsCertificate(); c != nil {
			block, _ := pem.Decode(c.GetCertificateChain().GetInlineBytes())
			what = fmt.Sprintf("SVID of %d bytes", len(block.Bytes))
		}
		lines = append(lines, one.GetName()+" "+what)
	}
	slices.Sort(lines)
	fmt.Fprintln(ts.Stdout(), strings.Join(lines, "\n"))
}
