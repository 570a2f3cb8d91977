//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/internal/envoy"
)

// What is excused, and nothing else: a connection that broke without a word about certificates, to or from a peer that was
// killed, and at a moment when it was dead.
func TestJudge(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	dead := func(from, to int) *outages {
		o := &outages{list: []outage{{from: at(from)}}}
		if to != -1 { // else it is dead still
			o.list[0].to = at(to)
		}
		return o
	}
	dial := func(err error) error {
		return &url.Error{Op: "Get", URL: "https://x", Err: &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)}}
	}
	proxy := func(reason, why string) error {
		return &answer{503, "upstream connect error or disconnect/reset before headers. reset reason: " + reason, why}
	}
	alert := &url.Error{Op: "Get", URL: "https://x", Err: &net.OpError{Op: "remote error", Err: tls.AlertError(42)}}
	refused := &url.Error{Op: "Get", URL: "https://x", Err: fmt.Errorf("x509svid: could not verify leaf certificate: %w", errors.New("x509: certificate signed by unknown authority"))}
	_, otherID := spiffeid.FromString("https://x")
	long := dead(-50, 5000)
	for _, tt := range []struct {
		name string
		err  error
		ends []*outages
		want verdict
	}{
		{"an answer", nil, nil, passed},
		{"an answer while it is dead", nil, []*outages{long}, passed},
		{"nobody listens, and nobody was killed", dial(syscall.ECONNREFUSED), []*outages{{}, {}}, failed},
		{"nobody listens, and the server is dead", dial(syscall.ECONNREFUSED), []*outages{{}, long}, excused},
		{"nobody listens, and the client is dead", dial(syscall.ECONNREFUSED), []*outages{long, {}}, excused},
		{"nobody listens, and it is not ready yet", dial(syscall.ECONNREFUSED), []*outages{{}, dead(-50, -1)}, excused},
		{"killed meanwhile", dial(syscall.ECONNRESET), []*outages{{}, dead(50, -1)}, excused},
		{"ready meanwhile", dial(syscall.ECONNRESET), []*outages{{}, dead(-50, 50)}, excused},
		{"ready again before", dial(syscall.ECONNREFUSED), []*outages{{}, dead(-50, -10)}, failed},
		{"killed after", dial(syscall.ECONNRESET), []*outages{{}, dead(110, -1)}, failed},
		{"ended without a word, while dead", &url.Error{Op: "Get", URL: "http://x", Err: io.EOF}, []*outages{long}, excused},
		{"broken off, while dead", io.ErrUnexpectedEOF, []*outages{long}, excused},
		{"an alert, while dead", alert, []*outages{long}, failed},
		{"a certificate, while dead", refused, []*outages{long}, failed},
		{"another identity, while dead", otherID, []*outages{long}, failed},
		{"no answer in time, while dead", &url.Error{Op: "Get", URL: "http://x", Err: context.DeadlineExceeded}, []*outages{long}, failed},
		{"a timeout of the network, while dead", dial(syscall.ETIMEDOUT), []*outages{long}, failed},
		{"Envoy finds nobody, while dead", proxy("remote connection failure", "delayed_connect_error:_Connection_refused"), []*outages{long}, excused},
		{"Envoy finds nobody, and has no words", proxy("remote connection failure", ""), []*outages{long}, excused},
		{"Envoy is cut off, while dead", proxy("connection termination", ""), []*outages{long}, excused},
		{"Envoy finds nobody, and nobody was killed", proxy("remote connection failure", ""), []*outages{{}, {}}, failed},
		{"Envoy refuses a certificate, while dead", proxy("remote connection failure", "TLS_error:|268435581:SSL_routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:TLS_error_end"), []*outages{long}, failed},
		{"Envoy hears an alert, while dead", proxy("connection termination", "TLS_error:|268436498:SSL_routines:OPENSSL_internal:SSLV3_ALERT_CERTIFICATE_EXPIRED"), []*outages{long}, failed},
		{"Envoy waits too long, while dead", proxy("connection timeout", ""), []*outages{long}, failed},
		{"Envoy says something else, while dead", &answer{403, "remote connection failure", ""}, []*outages{long}, failed},
		{"an answer with the words of a broken connection in it", &answer{500, "EOF", ""}, []*outages{long}, failed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := judge(tt.err, began, at(100), tt.ends...); got != tt.want {
				t.Errorf("%v is %d, want %d", tt.err, got, tt.want)
			}
		})
	}
}

// A report passes only with every rotation made, a connection of each kind, and nothing failed, refused or resumed.
func TestReportJudges(t *testing.T) {
	good := func() *Report {
		return &Report{Rotations: 2, Took: []time.Duration{time.Second, 3 * time.Second}, Pairs: map[string]int{"go-go": 1}, Handshakes: map[string]int{"go-go": 9}}
	}
	if err := good().judge(nil); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*Report){
		"a failed handshake":             func(r *Report) { r.Failed = 1 },
		"refused, says an Envoy":         func(r *Report) { r.Envoys.Refused = 1 },
		"resumed, says an Envoy":         func(r *Report) { r.Envoys.Resumed = 1 },
		"a rotation too few":             func(r *Report) { r.Took = r.Took[1:] },
		"a pair that never spoke":        func(r *Report) { r.Pairs["envoy-envoy"] = 4 },
		"no connection, for all the kin": func(r *Report) { r.Handshakes["go-go"] = 0 },
	} {
		r := good()
		spoil(r)
		if r.judge(nil) == nil {
			t.Errorf("%s is no failure", name)
		}
	}
	if why := errors.New("broken"); !errors.Is(good().judge(why), why) {
		t.Error("what broke it is no failure")
	}
	if p50, p99 := percentile(good().Took, 50), percentile(good().Took, 99); p50 != time.Second || p99 != 3*time.Second {
		t.Errorf("p50 %s, p99 %s", p50, p99)
	}
}

// One seed gives the same draws, and each kind of victim comes before one comes twice more than another.
func TestDraws(t *testing.T) {
	draw := func(seed uint64) []trouble {
		s := newSoak(Config{Seed: seed, Rotations: 12, Kills: 12, Envoys: 1, TTL: 10 * time.Second})
		s.world = &world{nodes: []*node{{name: "a"}, {name: "b"}, {name: "c"}}}
		s.peers = []*peer{{name: "go"}, {name: "envoy", proxy: new(envoy.Proxy)}}
		var all []trouble
		for n := range 12 {
			all = append(all, s.draw(n))
		}
		return all
	}
	for seed := range uint64(50) {
		a, b := draw(seed), draw(seed)
		kinds := map[string]int{}
		for i := range a {
			if a[i].String() != b[i].String() {
				t.Fatalf("seed %d: %s, and then %s", seed, a[i], b[i])
			}
			kinds[a[i].victim]++
			if a[i].agent != nil && a[i].agent.name == a[i].slow.name {
				t.Errorf("seed %d: %s", seed, a[i])
			}
		}
		if kinds["signet-ca"] != 4 || kinds["agent"] != 4 || kinds["envoy"] != 4 {
			t.Errorf("seed %d: %v", seed, kinds)
		}
	}
}
