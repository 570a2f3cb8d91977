//go:build integration

package limits

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/sds"
)

// What a flood may cost a neighbour: ten times what it takes in quiet, or as much as a busy machine may take for no time
// at all, whichever is more; and a newcomer has what he came for within a time that is no more than a delay.
const (
	mostTimes = 10
	podBound  = 250 * time.Millisecond
	nodeBound = 500 * time.Millisecond // who makes this flood takes his part of the same cores

	podNewcomer  = 2 * time.Second  // less than it takes until silent connections are ended for their silence
	nodeNewcomer = 10 * time.Second // three calls, each behind the flood
)

// bounded measures in turns, in quiet and beside a flood, and wants the flood to cost others nothing to speak of. Machines
// are busy with other things, too, so one of three rounds must show it.
func bounded(t *testing.T, least, latest time.Duration, quiet func() []time.Duration, loud func() (neighbours []time.Duration, newcomer time.Duration)) {
	t.Helper()
	var why string
	for range 3 {
		before := quiet()
		beside, newcomer := loud()
		bound := max(mostTimes*median(before), least)
		t.Logf("quiet: %s; beside the flood: %s; ratio of medians %.1f; a newcomer: %v", quantiles(before), quantiles(beside),
			float64(median(beside))/float64(median(before)), newcomer.Round(10*time.Microsecond))
		switch {
		case median(beside) > bound:
			why = fmt.Sprintf("half of it takes above %v beside a flood, and %v in quiet", bound, median(before))
		case newcomer > latest:
			why = fmt.Sprintf("a newcomer has nothing for %v beside a flood", newcomer)
		default:
			return
		}
	}
	t.Error(why)
}

// podFloods are what one pod can do on a socket that it shares. Each is done again and again, on connections of four
// workers; what is left open stays so until ctx ends.
var podFloods = []struct {
	name string
	keep bool // what one has begun
	one  func(ctx context.Context, p *pest) error
}{
	{"streams", true, func(ctx context.Context, p *pest) error {
		st, err := stream(ctx, p.conn, p.header)
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err // and leave it open
	}},
	{"refusals", false, func(ctx context.Context, p *pest) error {
		st, err := stream(ctx, p.conn, p.header)
		if err != nil {
			return err
		}
		for {
			r, err := st.Recv()
			if err != nil {
				return err
			}
			for ctx.Err() == nil {
				if err := answer(st, r, "no, and no again"); err != nil {
					return err
				}
			}
		}
	}},
	{"reconnects", false, func(ctx context.Context, p *pest) error {
		c := plain(p.t, p.path)
		defer c.Close()
		st, err := stream(ctx, c, p.header)
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}},
	{"junk tokens", false, func(ctx context.Context, p *pest) error {
		st, err := stream(ctx, p.conn, p.header[:len(p.header)-8]+"AAAAAAAA")
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}},
	{"junk tokens on connections of their own", false, func(ctx context.Context, p *pest) error {
		c := plain(p.t, p.path)
		defer c.Close()
		st, err := stream(ctx, c, p.header[:len(p.header)-8]+"AAAAAAAA")
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}},
	{"silent connections", true, func(ctx context.Context, p *pest) error {
		c, err := net.Dial("unix", p.path)
		if err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		p.wg.Go(func() { // a place that it does not have is no use to it
			io.Copy(io.Discard, c) // the server speaks first
			stop()
			c.Close()
		})
		return nil
	}},
}

// pest is one worker of a pod that floods.
type pest struct {
	t            *testing.T
	path, header string
	conn         *grpc.ClientConn
	wg           *sync.WaitGroup
}

// The environment of a process that is a flood: which one, of what, and who it is.
const (
	podFlood       = "SIGNET_TEST_POD_FLOOD"
	podFloodSocket = "SIGNET_TEST_POD_FLOOD_SOCKET"
	podFloodHeader = "SIGNET_TEST_POD_FLOOD_HEADER"
)

// floodAsPod floods until its standard input ends. Without a socket it makes one of its own, with all behind it.
func floodAsPod(t *testing.T, name string) {
	path, header := os.Getenv(podFloodSocket), os.Getenv(podFloodHeader)
	if path == "" {
		s, m := newSocket(t, daemon.SharedSocket(nil), sds.Config{Peer: daemon.PeerOf}), newMaker(t)
		pod, h := s.token("bad")
		s.material(pod.UID).Set(m.next(t))
		path, header = s.path, h
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	})
	var done, failed atomic.Int64
	for _, flood := range podFloods {
		if flood.name != name {
			continue
		}
		for range 4 {
			p := &pest{t: t, path: path, header: header, wg: &wg}
			wg.Go(func() {
				p.conn = plain(t, p.path)
				defer p.conn.Close()
				for ctx.Err() == nil {
					one, stop := context.WithTimeout(ctx, 5*time.Second)
					if flood.keep {
						stop()
						one, stop = context.WithCancel(ctx)
						context.AfterFunc(ctx, stop)
					}
					if err := flood.one(one, p); err != nil {
						failed.Add(1)
					}
					if !flood.keep {
						stop()
					}
					if done.Add(1) == 4 {
						fmt.Println("flooding")
					}
				}
			})
		}
	}
	wg.Wait()
	fmt.Printf("flooded: %d, of which refused or in vain: %d\n", done.Load(), failed.Load())
}

// startPod starts a flood as a process of its own, so that the kernel tells it from its neighbours. stop ends it and returns
// what it says of itself.
func startPod(t *testing.T, name, path, header string) (stop func() string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNeighbourPod$", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), podFlood+"="+name, podFloodSocket+"="+path, podFloodHeader+"="+header)
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
	lines := bufio.NewScanner(stdout)
	for lines.Scan() && lines.Text() != "flooding" {
	}
	return func() (said string) {
		stdin.Close()
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "flooded: ") {
				said = lines.Text()
			}
		}
		if err := cmd.Wait(); err != nil || said == "" {
			t.Errorf("the flood has ended by itself: %v", err)
		}
		return said
	}
}

// TestNeighbourPod has one pod, in a process of its own, flood the socket that it shares, in every way, under the limits
// that signet-agent has. Meanwhile its neighbour's rotations are timed, in turns with the same flood of another socket, and so
// is the first SVID of a pod that has just come.
//
// threat: D06, D07, D09, D21
func TestNeighbourPod(t *testing.T) {
	if name := os.Getenv(podFlood); name != "" {
		floodAsPod(t, name)
		return
	}
	s, m := newSocket(t, daemon.SharedSocket(nil), sds.Config{Peer: daemon.PeerOf}), newMaker(t)
	good, goodHeader := s.token("good")
	bad, badHeader := s.token("bad")
	made := []*sds.Material{m.next(t), m.next(t)}
	s.material(good.UID).Set(made[0])
	s.material(bad.UID).Set(made[1])
	conn := plain(t, s.path)
	defer conn.Close()
	st, err := stream(t.Context(), conn, goodHeader)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := st.Recv(); err != nil || answer(st, r, "") != nil {
		t.Fatal(api.FromStatus(err))
	}
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	serial := 0
	measure := func() (all []time.Duration) {
		t.Helper()
		tick := time.NewTicker(15 * time.Millisecond) // below the rate at which a stream is read
		defer tick.Stop()
		for range rounds {
			<-tick.C
			serial++
			all = append(all, push(t, s, good.UID, made[serial%2], st))
		}
		return all
	}
	measure() // warm
	for _, flood := range podFloods {
		t.Run(flood.name, func(t *testing.T) {
			// What the flood itself takes of the same cores is no matter of ours, so it goes on elsewhere in the quiet turns.
			elsewhere := func() []time.Duration {
				stop := startPod(t, flood.name, "", "")
				defer stop()
				return measure()
			}
			bounded(t, podBound, podNewcomer, elsewhere, func() ([]time.Duration, time.Duration) {
				stop := startPod(t, flood.name, s.path, badHeader)
				loud := measure()
				newcomer := s.arrive(t, "fresh", made[0])
				t.Log(stop())
				return loud, newcomer
			})
		})
	}
}

// push gives a pod something new, and returns the time to its arrival on st.
func push(t *testing.T, s *socket, uid string, m *sds.Material, st secret.SecretDiscoveryService_StreamSecretsClient) time.Duration {
	t.Helper()
	began := time.Now()
	s.material(uid).Set(m)
	r, err := st.Recv()
	took := time.Since(began)
	if err != nil {
		t.Fatal(api.FromStatus(err))
	}
	if err := answer(st, r, ""); err != nil {
		t.Fatal(err)
	}
	return took
}

// arrive has a pod come that nobody knows, and returns the time until it has its first SVID.
func (s *socket) arrive(t *testing.T, name string, m *sds.Material) time.Duration {
	t.Helper()
	pod, header := s.token(name)
	s.material(pod.UID).Set(m)
	began := time.Now()
	settle(t, func() string {
		ctx, cancel := context.WithTimeout(t.Context(), podNewcomer)
		defer cancel()
		c := plain(t, s.path)
		defer c.Close()
		st, err := stream(ctx, c, header)
		if err == nil {
			_, err = st.Recv()
		}
		if err != nil {
			return err.Error()
		}
		return ""
	})
	return time.Since(began)
}

// TestNeighbourNode has one agent ask for more than there is. Meanwhile another asks for its own, in turns with quiet, and
// a third comes and has its first SVID.
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
	bounded(t, nodeBound, nodeNewcomer, measure, func() ([]time.Duration, time.Duration) {
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
		began := time.Now()
		p.agent("node-3").issue()
		newcomer := time.Since(began)
		cancel()
		wg.Wait()
		t.Logf("%d issued to the flood, %d refused", answered.Load(), refused.Load())
		return loud, newcomer
	})
}

// TestCostOfRefusal has strangers refused on a connection that they have, in turns with handshakes. A refusal costs a small
// part of what the connection costs, and so cannot be the better way to flood.
//
// threat: J08
func TestCostOfRefusal(t *testing.T) {
	p := newPort(t, daemon.Limits{Rate: 1000000, PerPeer: 1000, Bytes: 1 << 30, Patience: time.Hour})
	_, csr := newCSR(t)
	token := p.Evidence(p.AgentPod("node-1"), api.AgentAudience(p.TD), time.Hour)
	forged := append([]byte(nil), token.Data...)
	copy(forged[len(forged)-8:], "AAAAAAAA") // whatever stood there, it is base64 still
	refuse := func(client apiv1.AuthorityClient, token []byte, want api.Reason) error {
		_, err := client.AttestAgent(t.Context(), &apiv1.AttestAgentRequest{
			Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: token}, Csr: csr, Protocol: api.Protocol,
		})
		if r := api.ReasonOf(api.FromStatus(err)); r != want && r != api.Overloaded {
			return fmt.Errorf("%w, want %s", errors.Join(err, errors.New("not refused as it should be")), want)
		}
		return nil
	}
	each := func(workers, times int, one func() error) time.Duration {
		t.Helper()
		began := time.Now()
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for range times / workers {
					if err := one(); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		return time.Since(began) / time.Duration(times)
	}
	handshake := func() error {
		r, err := p.raw(2, nil)
		if err != nil {
			return err
		}
		r.WriteGoAway(0, 0, nil)
		return r.conn.Close()
	}
	for _, tt := range []struct {
		name  string
		token []byte
		want  api.Reason
	}{
		{"junk", []byte("junk"), api.TokenMalformed},
		{"a token with a forged signature", forged, api.TokenSignature},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := apiv1.NewAuthorityClient(p.dial(nil))
			var ratio float64
			for range 3 {
				var refusals, handshakes []time.Duration
				for range 7 {
					handshakes = append(handshakes, each(8, 104, handshake))
					refusals = append(refusals, each(8, 296, func() error { return refuse(client, tt.token, tt.want) }))
				}
				ratio = float64(median(refusals)) / float64(median(handshakes))
				t.Logf("a refusal: %s, a handshake: %s, both with the client; ratio of medians %.2f", quantiles(refusals), quantiles(handshakes), ratio)
				if ratio <= 2 {
					return
				}
			}
			t.Errorf("a refusal costs %.1f handshakes", ratio)
		})
	}
}
