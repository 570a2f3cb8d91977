//go:build integration

package limits

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/daemon"
)

// TestCrowd floods the agents' port with connections from everywhere. Health answers, an agent that is there has its SVIDs,
// and one that comes gets in.
//
// threat: J07
func TestCrowd(t *testing.T) {
	p := newPort(t, daemon.Limits{})
	n := p.agent("node-1")
	health := daemon.HTTP{Address: freePort(t), NotReady: p.CA().NotReady, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { health.Task().Run(ctx) })

	held := make(chan net.Conn, 20000)
	var came atomic.Int64
	for w := range 4 { // each connection is kept for as long as it may
		wg.Go(func() {
			for i := 0; ctx.Err() == nil && i < 5000; i++ {
				if c, err := from(2+(i*4+w)%200, p.addr); err == nil {
					came.Add(1)
					held <- c
				}
			}
		})
	}
	probe := &http.Client{Timeout: longEnough, Transport: &http.Transport{DisableKeepAlives: true}}
	settle(t, func() string {
		resp, err := probe.Get("http://" + health.Address + "/readyz")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
			return string(body)
		}
		return ""
	})
	var issued, attested []time.Duration
	tries := 0
	for i := range 20 {
		issued = append(issued, n.issue())
		began := time.Now()
		settle(t, func() string {
			tries++
			if _, err := p.attest("node-" + string(rune('a'+i))); err != nil {
				return err.Error()
			}
			return ""
		})
		attested = append(attested, time.Since(began))
	}
	cancel()
	wg.Wait()
	close(held)
	for c := range held {
		c.Close()
	}
	t.Logf("%d connections came; SVIDs %s; new agents %s in %d tries", came.Load(), quantiles(issued), quantiles(attested), tries)
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// floodAddress tells a process that it is the flood of TestMemory, and of what.
const floodAddress = "SIGNET_TEST_FLOOD"

// TestMemory has strangers, in a process of their own, send as much as they can, on as many connections and calls as they
// can. What the CA's process holds meanwhile fits into a small container.
//
// threat: J20
func TestMemory(t *testing.T) {
	if addr := os.Getenv(floodAddress); addr != "" {
		flood(&port{t: t, addr: addr})
		return
	}
	p := newPort(t, daemon.Limits{Rate: 100000, PerPeer: 1000})
	n := p.agent("node-1")
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc + m.StackInuse)
	}
	before := heap()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestMemory$", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), floodAddress+"="+p.addr)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var most int64
	lines := bufio.NewScanner(stdout)
	for lines.Scan() && lines.Text() != "flooded" {
		most = max(most, heap()-before)
	}
	most = max(most, heap()-before)
	n.issue()
	stdin.Close()
	io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the flood: %v", err)
	}
	t.Logf("%d KiB at most are held of a flood", most>>10)
	if most > 48<<20 {
		t.Errorf("%d bytes are held of strangers", most)
	}
}

// flood opens connections, fills what it may on each, and keeps them until it is told to end.
func flood(p *port) {
	block := call(attestPath)
	chunk := make([]byte, 16<<10)
	copy(chunk, []byte{0, 0, 16, 0, 0}) // the length of a message that may be: 1 MiB
	var all []*raw
	for i := range 400 {
		r, err := p.raw(2+i%200, nil)
		if err != nil {
			continue
		}
		all = append(all, r)
		for stream := range uint32(3) { // just not what ends the connection at once
			if r.open(2*stream+1, block) != nil || r.WriteData(2*stream+1, false, chunk) != nil {
				break
			}
		}
		if i%50 == 49 {
			fmt.Println("flooding")
		}
	}
	fmt.Println("flooded")
	io.Copy(io.Discard, os.Stdin)
	for _, r := range all {
		r.conn.Close()
	}
}

// TestNeighbourNode has one agent ask for more than there is, while another asks for its own.
//
// threat: J19
func TestNeighbourNode(t *testing.T) {
	p := newPort(t, daemon.Limits{})
	good, greedy := p.agent("node-1"), p.agent("node-2")
	pod := p.Pod("shop", "greedy", "greedy", "node-2")
	items := make([]*apiv1.IssueItem, api.MaxBatch)
	for i := range items {
		items[i] = greedy.item(pod)
	}
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	measure := func() (all []time.Duration) {
		for range rounds {
			all = append(all, good.issue())
		}
		return all
	}
	measure() // warm
	quiet := measure()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var answered, refused atomic.Int64
	for range 16 { // 1,024 requests of one pod at once, and again as each batch is answered
		wg.Go(func() {
			for ctx.Err() == nil {
				resp, err := greedy.client.Issue(ctx, &apiv1.IssueRequest{Items: items})
				if err != nil {
					continue
				}
				for _, r := range resp.GetResults() {
					if r.GetSvid() != nil {
						answered.Add(1)
					} else {
						refused.Add(1)
					}
				}
			}
		})
	}
	settle(t, func() string {
		if answered.Load()+refused.Load() == 0 {
			return "the flood has not begun"
		}
		return ""
	})
	loud := measure()
	cancel()
	wg.Wait()
	t.Logf("quiet: %s", quantiles(quiet))
	t.Logf("beside a flood (%d issued, %d refused): %s", answered.Load(), refused.Load(), quantiles(loud))
	t.Logf("ratio of medians: %.1f", float64(median(loud))/float64(median(quiet)))
	if worst := loud[len(loud)-1]; worst > 20*time.Second {
		t.Errorf("an SVID took %v beside a flood of another node", worst)
	}
}

// TestCostOfRefusal says what a request costs that is refused before anybody is known. Nothing is asserted of the figures.
//
// threat: J08
func TestCostOfRefusal(t *testing.T) {
	p := newPort(t, daemon.Limits{Rate: 1000000, PerPeer: 1000, Bytes: 1 << 30, Patience: time.Hour})
	_, csr := newCSR(t)
	token := p.Evidence(p.AgentPod("node-1"), api.AgentAudience(p.TD), time.Hour)
	forged := append([]byte(nil), token.Data...)
	forged[len(forged)-4] ^= 1
	for _, tt := range []struct {
		name  string
		token []byte
		want  api.Reason
	}{
		{"junk", []byte("junk"), api.TokenMalformed},
		{"a token with a forged signature", forged, api.TokenSignature},
	} {
		client := apiv1.NewAuthorityClient(p.dial(nil))
		var rounds []time.Duration
		for range 7 {
			const calls = 300
			began := time.Now()
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for range calls / 8 {
						_, err := client.AttestAgent(t.Context(), &apiv1.AttestAgentRequest{
							Evidence: &apiv1.Evidence{Kind: token.Kind, Data: tt.token}, Csr: csr, Protocol: api.Protocol,
						})
						if r := api.ReasonOf(api.FromStatus(err)); r != tt.want && r != api.Overloaded {
							t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
						}
					}
				})
			}
			wg.Wait()
			rounds = append(rounds, time.Since(began)/(calls/8*8))
		}
		t.Logf("%s: %s a request, client included", tt.name, quantiles(rounds))
	}
	var rounds []time.Duration
	for i := range 7 {
		const conns = 200
		began := time.Now()
		for range conns {
			r, err := p.raw(2+i, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.WriteGoAway(0, http2.ErrCodeNo, nil)
			r.conn.Close()
		}
		rounds = append(rounds, time.Since(began)/conns)
	}
	t.Logf("a handshake: %s, client included", quantiles(rounds))
}
