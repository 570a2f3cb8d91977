package agent_test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

var seed = flag.Uint64("seed", 0, "of TestFaults; 0 for a new one")

// promise is how soon every pod that lives and shows a valid token has an identity once the CA is back.
const promise = 2 * time.Minute

// site is a node: an agent that is restarted now and then, and its pods.
type site struct {
	t     *testing.T
	s     *catest.Server
	name  string
	cache *memory
	own   attestor.Prover

	mu    sync.Mutex
	node  *node
	since time.Time // when node was started
	lives []*life
}

// life is one pod with one proxy, whose stream is opened with each fresh token and each restart of the agent.
type life struct {
	site  *site
	w     *workload
	end   context.CancelFunc
	ended chan struct{}

	mu       sync.Mutex // guards what follows
	token    attestor.Evidence
	tokenEnd time.Time
	id       *agent.Identity
	best     agent.Held // the newest SVID that it was given
	good     time.Time  // since when the pod lives and has a valid token; zero while not
	gone     bool
}

func (x *site) start() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.node = newNode(x.t, x.s, x.name, func(c *agent.Config) {
		c.Cache, c.Prover, c.Keepalive, c.Log = x.cache, x.own, time.Hour, nil // for speed, no more is said than is asked here
	})
	x.node.start()
	x.since = time.Now()
	for _, l := range x.lives {
		l.mu.Lock()
		l.id = nil // its stream has ended with the agent
		l.mu.Unlock()
		l.connect(x.node)
	}
}

// frugal returns the same token for 48 minutes, as kubelet does.
func frugal(p attestor.Prover) attestor.Prover {
	var mu sync.Mutex
	var token attestor.Evidence
	var until time.Time
	return proverFunc(func(ctx context.Context) (e attestor.Evidence, err error) {
		mu.Lock()
		defer mu.Unlock()
		if !time.Now().Before(until) {
			if token, err = p.Prove(ctx); err != nil {
				return token, err
			}
			until = time.Now().Add(tokenLife * 8 / 10)
		}
		return token, nil
	})
}

func (x *site) restart() {
	x.mu.Lock()
	old := x.node
	x.mu.Unlock()
	old.stop()
	x.start()
}

func (x *site) addPod(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	ctx, end := context.WithCancel(x.t.Context())
	l := &life{site: x, w: newWorkload(x.s, name, x.name), end: end, ended: make(chan struct{})}
	x.lives = append(x.lives, l)
	go l.live(ctx)
}

// removePod ends the oldest pod.
func (x *site) removePod() {
	x.mu.Lock()
	l := x.lives[0]
	x.lives = x.lives[1:]
	x.mu.Unlock()
	l.mu.Lock()
	l.gone, l.good = true, time.Time{} // before anybody can be refused for it
	l.mu.Unlock()
	x.s.Pods.Remove(l.w.pod)
	l.end()
	<-l.ended
}

// live refreshes the token as kubelet does, sometimes late, and opens a stream with each.
func (l *life) live(ctx context.Context) {
	defer close(l.ended)
	for ctx.Err() == nil {
		l.mu.Lock()
		l.token, l.tokenEnd = l.w.token(tokenLife), time.Now().Add(tokenLife).Truncate(time.Second)
		if l.good.IsZero() {
			l.good = time.Now()
		}
		l.mu.Unlock()
		l.site.mu.Lock()
		n := l.site.node
		l.site.mu.Unlock()
		l.connect(n)
		refresh := tokenLife * 8 / 10
		if rand.IntN(10) == 0 {
			refresh = tokenLife + time.Duration(rand.IntN(3600))*time.Second
		}
		select {
		case <-ctx.Done():
		case <-time.After(refresh):
		}
	}
}

// connect admits the pod with its newest token, as its proxy does when a stream has ended.
func (l *life) connect(n *node) {
	l.mu.Lock()
	token := l.token
	valid := time.Now().Before(l.tokenEnd)
	l.mu.Unlock()
	if len(token.Data) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(l.site.t.Context(), time.Minute)
	go func() {
		defer cancel()
		id, _, err := n.Admit(ctx, token, "shared")
		l.site.mu.Lock()
		defer l.site.mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		switch {
		case n != l.site.node: // the agent was restarted meanwhile, and this stream has ended with it
		case err == nil:
			l.id = id
		case valid && !l.gone && api.ReasonOf(err) != api.KeysUnavailable && time.Now().Before(l.tokenEnd):
			l.site.t.Errorf("%s: a good token is answered with %v", l.w.pod.Name, err)
		}
	}()
}

// check holds the invariants against what a pod is given now.
func (l *life) check(caSince, agentSince time.Time) {
	t, now := l.site.t, time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !now.Before(l.tokenEnd) {
		l.good = time.Time{}
	}
	if l.id == nil {
		return
	}
	h := l.id.Held().Load()
	if h.SVID != nil {
		if !now.Before(notAfter(h)) {
			t.Errorf("%s is served an SVID that expired %s ago", l.w.pod.Name, now.Sub(notAfter(h)))
		}
		if l.best.SVID == nil || notAfter(h).After(notAfter(l.best)) {
			l.best = h
		}
		return
	}
	if refused := h.Refused(); refused != nil && !l.gone && !l.good.IsZero() {
		t.Errorf("%s is refused: %v", l.w.pod.Name, refused)
	}
	if l.best.SVID != nil && now.Before(notAfter(l.best)) {
		t.Errorf("%s lost an SVID that was good for %s more", l.w.pod.Name, notAfter(l.best).Sub(now))
	}
	if l.good.IsZero() || caSince.IsZero() {
		return
	}
	last := caSince
	for _, at := range []time.Time{agentSince, l.good} {
		if at.After(last) {
			last = at
		}
	}
	if waits := now.Sub(last); waits > promise {
		t.Errorf("%s has waited %s for an identity, all being well; last failure %v", l.w.pod.Name, waits, h.Refusal)
	}
}

// TestFaults lets eight agents with pods of their own live for three days in which the CA is stopped and killed for up to
// six hours, agents are restarted, tokens come late and pods come and go. An SVID that is good is never lost, one that is
// not is never served, and whoever may have an identity has one two minutes after the CA is back.
func TestFaults(t *testing.T) {
	const agents, pods = 8, 2
	span := 3 * 24 * time.Hour
	if testing.Short() {
		span = 12 * time.Hour
	}
	n := *seed
	if n == 0 {
		n = rand.Uint64()
	}
	t.Logf("-seed %d", n)
	// Longer lives than by default: handshakes and signatures are what the time goes into.
	o := catest.Options{Policy: ca.PolicyFile{TTL: 2 * time.Hour}, Config: func(c *ca.Config) {
		c.AgentTTL, c.SessionAge = 3*time.Hour, 3*time.Hour
	}}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		dice := rand.New(rand.NewPCG(n, 0))
		between := func(low, high time.Duration) time.Duration { return low + time.Duration(dice.Int64N(int64(high-low))) }
		var sites []*site
		for i := range agents {
			x := &site{t: t, s: s, name: fmt.Sprint("node-", i), cache: newMemory(), own: frugal(ownToken(s, fmt.Sprint("node-", i)))}
			x.start()
			for j := range pods {
				x.addPod(fmt.Sprintf("pod-%d-%d", i, j))
			}
			sites = append(sites, x)
		}
		caSince := time.Now() // zero while it is away
		nextCA, nextFault := time.Now().Add(time.Hour), time.Now().Add(10*time.Minute)
		counts := map[string]int{}
		for end := time.Now().Add(span); time.Now().Before(end) && !t.Failed(); time.Sleep(7 * time.Second) {
			if !time.Now().Before(nextCA) {
				switch {
				case caSince.IsZero():
					s.Start()
					s.WaitReady()
					caSince, nextCA = time.Now(), time.Now().Add(between(5*time.Minute, 9*time.Hour))
				case dice.IntN(2) == 0:
					s.Stop()
					counts["CA stopped"]++
				default:
					s.Kill()
					counts["CA killed"]++
				}
				if !time.Now().Before(nextCA) {
					caSince, nextCA = time.Time{}, time.Now().Add(time.Duration(float64(between(10*time.Second, 6*time.Hour))*dice.Float64()*dice.Float64()*dice.Float64()))
				}
			}
			if !time.Now().Before(nextFault) {
				nextFault = time.Now().Add(between(time.Minute, time.Hour))
				x := sites[dice.IntN(agents)]
				if dice.IntN(2) == 0 {
					x.restart()
					counts["agent restarted"]++
				} else {
					x.removePod()
					x.addPod(fmt.Sprintf("pod-%s-%d", x.name, counts["pod replaced"]))
					counts["pod replaced"]++
				}
			}
			synctest.Wait() // what happens at this very moment has happened
			for _, x := range sites {
				x.mu.Lock()
				for _, l := range x.lives {
					l.check(caSince, x.since)
				}
				x.mu.Unlock()
			}
		}
		if caSince.IsZero() {
			s.Start()
		}
		for _, x := range sites {
			for range pods {
				x.removePod()
			}
			x.node.stop()
		}
		t.Log(counts)
	})
}
