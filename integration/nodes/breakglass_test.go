//go:build cluster && linux

package nodes_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// breakGlass: a certificate opens nothing until its line is in the CA's configuration, then everything to somebody who can
// have no token, through the API server and without one, and nothing any more once the line is out.
func (s *suite) breakGlass(t *testing.T) {
	s.namespace(t, "e2e-glass")
	guard := s.person(t, "e2e-glass", "guard") // who has the way to the CA, and may have no token of any role
	s.Must(t, "create", "rolebinding", "-n", signetNamespace, "e2e-guard", "--clusterrole=signet-viewer", "--serviceaccount=e2e-glass:guard")
	t.Cleanup(func() {
		s.afterwards(t, "delete", "rolebinding", "-n", signetNamespace, "e2e-guard", "--ignore-not-found")
	})
	dir := t.TempDir()
	file := filepath.Join(dir, "safe-1.pem")
	line, err := exec.CommandContext(t.Context(), s.signet, "break-glass", "create", "safe-1", "--trust-domain=cluster.local", "--file="+file).Output()
	value, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "operators: {")
	if err != nil || !ok {
		t.Fatalf("break-glass create: %v: %s", err, line)
	}
	look := []string{"--break-glass=" + file, "audit", "--since=1h"}
	if out, code := s.as(t, guard, look...); code != 1 || !strings.Contains(out, "SGN-0910") {
		t.Errorf("before its line is there: exit code %d: %s", code, out)
	}

	was := s.Must(t, "get", "configmap", "-n", signetNamespace, "signet-ca", "-o", `jsonpath={.data.ca\.yaml}`)
	listen := regexp.MustCompile(`(?m)^( +)listen: 127\.0\.0\.1:8444$`)
	if !listen.MatchString(was) {
		t.Fatalf("the CA has no port for operators: %s", was)
	}
	s.configure(t, listen.ReplaceAllString(was, "$0\n${1}"+strings.TrimSuffix(value, "}")))
	restored := false
	restore := func() {
		s.configure(t, was)
		restored = true
	}
	t.Cleanup(func() {
		if !restored { // the test has failed, and those that follow want what was installed
			s.afterwards(t, "patch", "configmap", "-n", signetNamespace, "signet-ca", "--type=merge", "-p", caYAML(was))
			s.afterwards(t, "rollout", "restart", "-n", signetNamespace, "statefulset/signet-ca")
		}
	})
	if out, code := s.as(t, guard, "authority", "list"); code != 1 || !strings.Contains(out, "SGN-0912") {
		t.Errorf("the guard has a token: exit code %d: %s", code, out)
	}
	if out, code := s.as(t, guard, look...); code != 0 {
		t.Errorf("through the API server: exit code %d: %s", code, out)
	}
	node := strings.Fields(s.Must(t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))[0]
	if out, code := s.as(t, guard, "--break-glass="+file, "node", "ban", node, "--dry-run"); code != 0 {
		t.Errorf("what is for an emergency: exit code %d: %s", code, out)
	}
	uses := 2
	if len(s.Nodes) > 0 {
		s.withoutAPIServer(t, dir)
		uses++
	}
	s.glassSeen(t, uses)
	restore()
	if out, code := s.as(t, guard, look...); code != 1 || !strings.Contains(out, "SGN-0910") {
		t.Errorf("after its line was taken out: exit code %d: %s", code, out)
	}
}

func caYAML(text string) string {
	patch, err := json.Marshal(map[string]any{"data": map[string]string{"ca.yaml": text}})
	if err != nil {
		panic(err) // strings always encode
	}
	return string(patch)
}

// configure has the CA run with another configuration.
func (s *suite) configure(t *testing.T, text string) {
	t.Helper()
	s.Must(t, "patch", "configmap", "-n", signetNamespace, "signet-ca", "--type=merge", "-p", caYAML(text))
	s.Must(t, "rollout", "restart", "-n", signetNamespace, "statefulset/signet-ca")
	s.Must(t, "rollout", "status", "-n", signetNamespace, "statefulset/signet-ca", "--timeout=3m")
}

// withoutAPIServer runs on the CA's node what docs/operators.md says for the day without an API server, while there is none.
func (s *suite) withoutAPIServer(t *testing.T, dir string) {
	t.Helper()
	manual, err := os.ReadFile("../../docs/operators.md")
	if err != nil {
		t.Fatal(err)
	}
	var says []string
	for _, block := range regexp.MustCompile("(?s)```\n(.*?)```").FindAllStringSubmatch(string(manual), -1) {
		if strings.Contains(block[1], "pgrep -x signet-ca") {
			says = append(says, block[1])
		}
	}
	if len(says) != 2 || !strings.Contains(says[0], "--break-glass safe-1.pem") || !strings.Contains(says[1], "admin.sock") {
		t.Fatalf("docs/operators.md says %q", says)
	}
	bundle := s.Must(t, "get", "configmap", "-n", signetNamespace, "signet-bundle", "-o", `jsonpath={.data.bundle\.pem}`)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(bundle), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Control.Pause(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Control.Resume(); err != nil {
			t.Error(err)
		}
	}()
	for _, lines := range says {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		out, err := s.Nodes[0].Command(ctx, "sh", "-ec", "cd "+dir+"; PATH="+filepath.Dir(s.signet)+":$PATH\n"+lines).CombinedOutput()
		cancel()
		if err != nil || len(out) == 0 {
			t.Errorf("%s: %v: %s", lines, err, out)
		}
	}
}

// glassSeen looks where the use of a break-glass certificate has to show.
func (s *suite) glassSeen(t *testing.T, uses int) {
	t.Helper()
	out, code := s.tool(t, "audit", "--since=1h", "--kind=operator", "-o", "json")
	if n := strings.Count(out, `"break-glass:safe-1"`); code != 0 || n < uses {
		t.Errorf("the ledger has %d of %d uses: exit code %d: %.2000s", n, uses, code, out)
	}
	if out := s.Must(t, "logs", "-n", signetNamespace, "signet-ca-0", "-c", "ca"); strings.Count(out, "break-glass certificate used") < uses {
		t.Errorf("the CA's log does not tell of all uses: %s", out)
	}
	metrics := s.Must(t, "get", "--raw", "/api/v1/namespaces/"+signetNamespace+"/pods/signet-ca-0:9080/proxy/metrics")
	m := regexp.MustCompile(`(?m)^signet_break_glass_calls_total (\d+)`).FindStringSubmatch(metrics)
	if m == nil {
		t.Fatal("there is no signet_break_glass_calls_total")
	}
	if n, err := strconv.Atoi(m[1]); err != nil || n < uses {
		t.Errorf("signet_break_glass_calls_total is %s, want %d", m[1], uses)
	}
}

// loopback: what listens in the CA's pod, and what a process there is given that has no credential: nothing.
func (s *suite) loopback(t *testing.T) {
	s.Own(t)
	pids, err := s.Nodes[0].Processes("signet-ca")
	if err != nil || len(pids) != 1 {
		t.Fatalf("processes of the CA: %v, %v", pids, err)
	}
	listening, err := listeners(pids[0])
	if want := []string{"*:8443", "*:9080", "127.0.0.1:8444"}; err != nil || !slices.Equal(listening, want) {
		t.Fatalf("%v listen in the CA's pod, want %v (%v)", listening, want, err)
	}
	dial := func(address string) func(context.Context, string) (net.Conn, error) {
		return func(ctx context.Context, _ string) (net.Conn, error) { return dialIn(ctx, pids[0], address) }
	}
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/var/run/secrets/kubernetes.io/serviceaccount/token", pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "own.pem") // a certificate as the owner's, that the CA's configuration does not have
	if out, err := exec.CommandContext(t.Context(), s.signet, "break-glass", "create", "safe-1", "--trust-domain=cluster.local", "--file="+file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	glass, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, token string
		certificate []tls.Certificate
		want        api.Reason
	}{
		{"nothing", "", nil, api.TokenMissing},
		{"the CA's own token for the API server", string(own), nil, api.TokenBound},
		{"a certificate of one's own", "", []tls.Certificate{glass}, api.OperatorRequired},
	} {
		t.Run(row.name, func(t *testing.T) {
			conn, err := grpc.NewClient("passthrough:///operators", grpc.WithContextDialer(dial("127.0.0.1:8444")),
				grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: row.certificate})))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if row.token != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+strings.TrimSpace(row.token))
			}
			admin := apiv1.NewAdminClient(conn)
			_, look := admin.GetStatus(ctx, &apiv1.GetStatusRequest{})
			_, ban := admin.BanNode(ctx, &apiv1.BanNodeRequest{Node: s.node(1), Reason: "no right"})
			for _, err := range []error{look, ban} {
				if got := api.ReasonOf(api.FromStatus(err)); got != row.want {
					t.Errorf("%v, want %s", err, row.want)
				}
			}
		})
	}
	t.Run("without TLS", func(t *testing.T) {
		conn, err := grpc.NewClient("passthrough:///operators", grpc.WithContextDialer(dial("127.0.0.1:8444")), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if r, err := apiv1.NewAdminClient(conn).GetStatus(ctx, &apiv1.GetStatusRequest{}); err == nil {
			t.Errorf("it answers %v", r)
		}
	})
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialIn(ctx, pids[0], "127.0.0.1:9080")
		},
	}}
	for path, code := range map[string]int{"/livez": 200, "/readyz": 200, "/metrics": 200, "/": 404, "/debug/pprof/": 404, "/debug/vars": 404, "/signet.v1.Admin/GetStatus": 404} {
		resp, err := client.Get("http://signet-ca" + path)
		if err != nil {
			t.Error(err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != code || strings.Contains(string(body), "eyJ") || strings.Contains(string(body), "PRIVATE") {
			t.Errorf("%s: %s, want %d: %v: %.300s", path, resp.Status, code, err, body)
		}
	}
}

// listeners are the addresses that somebody listens on in a process's network, by TCP or UDP.
func listeners(pid int) ([]string, error) {
	var all []string
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(f)
		lines.Scan() // the heading
		for lines.Scan() {
			fields := strings.Fields(lines.Text())
			const listens, unconnected = "0A", "07"
			if len(fields) < 4 || fields[3] != listens && fields[3] != unconnected {
				continue
			}
			host, port, _ := strings.Cut(fields[1], ":")
			n, err := strconv.ParseUint(port, 16, 16)
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			switch {
			case strings.Trim(host, "0") == "":
				host = "*"
			case host == "0100007F":
				host = "127.0.0.1"
			}
			if !strings.HasPrefix(table, "tcp") {
				host = "udp " + host
			}
			all = append(all, fmt.Sprintf("%s:%d", host, n))
		}
		if err := errors.Join(lines.Err(), f.Close()); err != nil {
			return nil, err
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// dialIn connects from within the network of a process. The thread has its own network again when it returns: it cannot be
// let go, for processes that it started would end with it.
func dialIn(ctx context.Context, pid int, address string) (net.Conn, error) {
	there, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer there.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	conn, dialErr := new(net.Dialer).DialContext(ctx, "tcp4", address) // a socket is of the network that it was made in
	if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
		panic(err) // tests that follow would be lost in there
	}
	return conn, dialErr
}
