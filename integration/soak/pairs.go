//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// answerTime is how long an answer may take: a machine that has much else to do is no failure.
const answerTime = 60 * time.Second

// headerWhy is where an Envoy says what its TLS library had to say of the upstream.
const headerWhy = "x-soak-why"

// A pair is a client and the server that it calls, always anew.
type pair struct {
	kind           string // "envoy-envoy", "go-go", ...: the client, then the server
	client, server *peer
	call           func() error // makes one connection, and returns when the answer is there
	made           int          // connections that led to an answer; guarded by tally.mu
}

// get asks for an answer on a connection of its own.
func get(client *http.Client, url string) error {
	resp, err := client.Get(url) // it is bounded by the client's timeout
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = &answer{resp.StatusCode, string(body), resp.Header.Get(headerWhy)}
	}
	return err
}

// byEnvoy calls through an Envoy, which makes a new mutual TLS connection for each request.
func byEnvoy(p *peer) func() error {
	client := &http.Client{Timeout: answerTime, Transport: &http.Transport{DisableKeepAlives: true}}
	return func() error { return get(client, "http://"+p.listen.String()) }
}

// byGo calls as go-spiffe does it, on a new connection each time; Go resumes a session only where it is given a cache for them.
func byGo(p, server *peer) func() error {
	client := &http.Client{Timeout: answerTime, Transport: &http.Transport{
		DisableKeepAlives: true, TLSHandshakeTimeout: answerTime,
		TLSClientConfig: tlsconfig.MTLSClientConfig(p.source, p.source, tlsconfig.AuthorizeID(server.id)),
	}}
	return func() error { return get(client, "https://"+server.listen.String()) }
}

// run makes connections until ctx ends, and returns when the last has been judged.
func (p *pair) run(ctx context.Context, pace time.Duration, t *tally) {
	pause := time.NewTicker(pace)
	defer pause.Stop()
	for {
		began := time.Now()
		err := p.call()
		t.count(ctx, p, began, err)
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
	}
}

// A tally counts connections. It is safe for concurrent use.
type tally struct {
	generations func([sha]byte) string

	mu       sync.Mutex
	failures []string // the first few, with what both sides had
	failed   int
	excused  map[string]int // by kind
	made     map[string]int // by kind
	bad      map[string]int // failed, by kind
	words    map[string]int // of those that were excused
	changed  chan struct{}  // closed at the next count
}

func newTally(generations func([sha]byte) string) *tally {
	return &tally{generations: generations, excused: map[string]int{}, made: map[string]int{}, bad: map[string]int{}, words: map[string]int{}, changed: make(chan struct{})}
}

// maxFailures is how many are told in full.
const maxFailures = 20

func (t *tally) count(ctx context.Context, p *pair, began time.Time, err error) {
	ended := time.Now()
	v := judge(err, began, ended, &p.client.down, &p.server.down)
	text := ""
	if v == failed && t.failuresSoFar() < maxFailures {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		text = fmt.Sprintf("%s %s: %s calls %s: %v [%s] [%s]", began.Format("15:04:05.000"), p.kind, p.client.name, p.server.name, err,
			p.client.holds(ctx, t.generations), p.server.holds(ctx, t.generations))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch v {
	case passed:
		p.made++
		t.made[p.kind]++
	case excused:
		t.excused[p.kind]++
		t.words[words(err)]++
	case failed:
		t.fail(p.kind, text)
	}
	t.tell()
}

// refused counts what a server has said of a caller that it did not let in.
func (t *tally) refused(p *pair, line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fail(p.kind, fmt.Sprintf("%s %s: %s says: %s", time.Now().Format("15:04:05.000"), p.kind, p.server.name, line))
	t.tell()
}

// fail is called with mu held.
func (t *tally) fail(kind, text string) {
	t.failed++
	t.bad[kind]++
	if text != "" && len(t.failures) < maxFailures {
		t.failures = append(t.failures, text)
	}
}

// tell is called with mu held.
func (t *tally) tell() {
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *tally) failuresSoFar() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

// await waits until ok, which is called with mu held.
func (t *tally) await(ctx context.Context, ok func() bool) error {
	for {
		t.mu.Lock()
		good, changed := ok(), t.changed
		t.mu.Unlock()
		if good {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

// everywhere waits until each pair has made another connection than those so far, which ended well.
func (t *tally) everywhere(ctx context.Context, pairs []*pair) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("a pair has no connection after %s", patience))
	defer cancel()
	t.mu.Lock()
	want := make([]int, len(pairs))
	for i, p := range pairs {
		want[i] = p.made + 2 // one may have been under way
	}
	t.mu.Unlock()
	return t.await(ctx, func() bool {
		for i, p := range pairs {
			if p.made < want[i] {
				return false
			}
		}
		return true
	})
}
