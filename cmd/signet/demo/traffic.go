package demo

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/internal/latest"
)

// The headers in which the peers say whom they spoke to.
const (
	headerXFCC         = "x-forwarded-client-cert" // payments to the backend: who called
	headerCallerCert   = "x-demo-caller-cert"      // payments to the backend: the caller's certificate, URL-encoded PEM
	headerUpstreamID   = "x-demo-upstream-id"      // checkout to the client: whom it reached
	headerUpstreamCert = "x-demo-upstream-cert"    // checkout to the client: the certificate of that one, URL-encoded PEM
	echo               = "x-demo-echo-"            // the backend to the client: what it was told
)

const (
	workers        = 8                     // requests under way at once
	interval       = 12 * time.Millisecond // between two requests: about 80 a second
	requestTimeout = 5 * time.Second       // a request that takes longer has failed
	maxFailures    = 5                     // that the report tells in full
)

// backend is the program behind payments: it tells what it was told about the caller.
func backend(w http.ResponseWriter, r *http.Request) {
	for _, h := range []string{headerXFCC, headerCallerCert} {
		w.Header().Set(echo+h, r.Header.Get(h))
	}
	io.WriteString(w, "paid\n")
}

// seen is what the traffic so far has shown of one side, from its peer's verification.
type seen struct {
	certificates int           // different ones
	serial       string        // of the newest
	notAfter     time.Time     // of the newest
	leastLife    time.Duration // left of any certificate when it was used
	lifeAtChange time.Duration // left of the one before, when the newest came
}

// counts is the traffic so far.
type counts struct {
	requests, failed   int
	failures           []string  // the first maxFailures
	first              time.Time // when the first answer came
	checkout, payments seen
}

// traffic sends requests to checkout, each on a new connection, and checks what comes back: an answer in which a side is
// not who it should be is a failure. It is safe for concurrent use.
type traffic struct {
	url                string
	checkout, payments string // the SPIFFE IDs that must be seen
	client             *http.Client
	now                latest.Value[counts]

	mu    sync.Mutex
	c     counts
	certs map[string]*x509.Certificate // parsed, by the header's value
	order map[string]bool              // serials seen, by "side serial"
}

func newTraffic(front netip.AddrPort, checkout, payments string) *traffic {
	return &traffic{
		url: "http://" + front.String() + "/pay", checkout: checkout, payments: payments,
		client: &http.Client{Timeout: requestTimeout, Transport: &http.Transport{DisableKeepAlives: true}},
		certs:  map[string]*x509.Certificate{}, order: map[string]bool{},
	}
}

// run sends requests until ctx ends, and returns when the last one has been answered.
func (t *traffic) run(ctx context.Context) {
	ticks := make(chan struct{})
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range ticks {
				t.count(t.request())
			}
		})
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			select {
			case ticks <- struct{}{}:
			case <-ctx.Done(): // all workers wait for answers
			}
		}
	}
	close(ticks)
	wg.Wait()
}

// answer is what one request showed.
type answer struct {
	caller, upstream *x509.Certificate
}

func (t *traffic) request() (answer, error) {
	resp, err := t.client.Get(t.url) // the end of the demo lets it finish: it is bounded by the client's timeout
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return answer{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("status %d: %s", resp.StatusCode, strings.TrimSpace(string(body)))
	}
	if id := xfccURI(resp.Header.Get(echo + headerXFCC)); id != t.checkout {
		return answer{}, fmt.Errorf("payments took the caller for %q", id)
	}
	if id := resp.Header.Get(headerUpstreamID); id != t.payments {
		return answer{}, fmt.Errorf("checkout took its upstream for %q", id)
	}
	caller, err := t.certificate(resp.Header.Get(echo + headerCallerCert))
	if err != nil {
		return answer{}, fmt.Errorf("certificate of checkout: %w", err)
	}
	upstream, err := t.certificate(resp.Header.Get(headerUpstreamCert))
	if err != nil {
		return answer{}, fmt.Errorf("certificate of payments: %w", err)
	}
	for id, cert := range map[string]*x509.Certificate{t.checkout: caller, t.payments: upstream} {
		if got, err := x509svid.IDFromCert(cert); err != nil || got.String() != id {
			return answer{}, fmt.Errorf("certificate is not that of %s", id)
		}
	}
	return answer{caller, upstream}, nil
}

// xfccURI returns the URI of an x-forwarded-client-cert header of one element.
func xfccURI(header string) string {
	for part := range strings.SplitSeq(header, ";") {
		if uri, ok := strings.CutPrefix(part, "URI="); ok {
			return uri
		}
	}
	return ""
}

// certificate parses the value of a header once; there are few different ones.
func (t *traffic) certificate(header string) (*x509.Certificate, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.certs[header]; c != nil {
		return c, nil
	}
	text, err := url.PathUnescape(header)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("header holds no PEM")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err == nil {
		t.certs[header] = c
	}
	return c, err
}

func (t *traffic) count(a answer, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.c.requests++
	now := time.Now()
	if err != nil {
		t.c.failed++
		if len(t.c.failures) < maxFailures {
			t.c.failures = append(t.c.failures[:len(t.c.failures):len(t.c.failures)], now.Format("15:04:05.000 ")+err.Error())
		}
	} else {
		if t.c.first.IsZero() {
			t.c.first = now
		}
		t.see(&t.c.checkout, checkout, a.caller, now)
		t.see(&t.c.payments, payments, a.upstream, now)
	}
	t.now.Set(t.c)
}

func (t *traffic) see(s *seen, side string, cert *x509.Certificate, now time.Time) {
	serial := cert.SerialNumber.Text(16)
	if key := side + " " + serial; !t.order[key] {
		t.order[key] = true
		s.certificates++
		s.lifeAtChange = time.Until(s.notAfter)
		s.serial, s.notAfter = serial, cert.NotAfter
	}
	if left := cert.NotAfter.Sub(now); s.leastLife == 0 || left < s.leastLife {
		s.leastLife = left
	}
}

// follow calls changed whenever a side shows a new certificate after its first, until ctx ends. Changes that come together
// are told as one.
func (t *traffic) follow(ctx context.Context, changed func(side string, s seen)) {
	last := map[string]int{checkout: 1, payments: 1}
	for {
		c, next := t.now.Get()
		for side, s := range map[string]seen{checkout: c.checkout, payments: c.payments} {
			if s.certificates > last[side] {
				last[side] = s.certificates
				changed(side, s)
			}
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		}
	}
}

// await returns when ok says so of the traffic so far. It fails after limit, and says what was waited for.
func (t *traffic) await(ctx context.Context, limit time.Duration, what string, ok func(counts) bool) (counts, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s within %s", what, limit))
	defer cancel()
	for {
		c, changed := t.now.Get()
		if ok(c) {
			return c, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return c, context.Cause(ctx)
		}
	}
}
