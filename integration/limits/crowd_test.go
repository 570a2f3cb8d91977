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

	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
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
	address, err := daemontest.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
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
