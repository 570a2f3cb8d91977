//go:build linux

package main

import (
	"errors"
	"io"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A verdict is what became of one connection.
type verdict int

const (
	passed  verdict = iota
	excused         // see judge
	failed
)

// judge is the rule. A connection that did not lead to an answer has failed, with one exception: it broke without a word about
// certificates (see broken and brokenBehind), one of its two ends is an Envoy that was killed, and the connection was being made
// at a moment between the kill and the time when that Envoy was ready again. Nothing is excused for a CA or an agent that was
// killed or held: nobody connects to those. A certificate that is refused is a failure whenever it happens, and so is an answer
// that does not come in time.
func judge(err error, began, ended time.Time, ends ...*outages) verdict {
	if err == nil {
		return passed
	}
	if !broken(err) && !brokenBehind(err) {
		return failed
	}
	for _, o := range ends {
		if o.during(began, ended) {
			return excused
		}
	}
	return failed
}

// broken reports whether a connection of our own was refused by a machine on which nobody listens, or ended without a word. A TLS
// alert is a word; it comes as a *net.OpError around none of these.
func broken(err error) bool {
	if _, ok := errors.AsType[*answer](err); ok {
		return false
	}
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// An answer is what an Envoy, or whoever is behind it, says in the place of an answer.
type answer struct {
	status int
	body   string
	why    string // of an upstream's TLS; empty: it said nothing
}

// Error returns its words.
func (a *answer) Error() string {
	said := strings.TrimSpace(a.body)
	if a.why != "" {
		said += " (" + a.why + ")"
	}
	return said
}

// behind is what an Envoy says of an upstream that was not there, or that ended without a word. It says the same of one whose
// certificate it refuses, so its TLS library must have had nothing to say: nobodyThere is what it may tell then.
var (
	behind      = regexp.MustCompile(`^upstream connect error or disconnect/reset before headers\. reset reason: (?:connection termination|remote connection failure)$`)
	nobodyThere = regexp.MustCompile(`^(?:(?:delayed|immediate)[ _]connect[ _]error:[ _](?:Connection[ _]refused|Connection[ _]reset[ _]by[ _]peer|111|104))?$`)
)

// brokenBehind reports whether an Envoy that we called had no connection to the one behind it.
func brokenBehind(err error) bool {
	a, ok := errors.AsType[*answer](err)
	return ok && a.status == 503 && behind.MatchString(strings.TrimSpace(a.body)) && nobodyThere.MatchString(a.why)
}

// outages are the times at which a peer was dead because of us. The zero value is a peer that never was.
type outages struct {
	mu   sync.Mutex
	list []outage
}

// An outage lasts from the moment before the kill until the peer is ready again; to is zero until then.
type outage struct{ from, to time.Time }

func (o *outages) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = append(o.list, outage{from: time.Now()})
}

func (o *outages) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list[len(o.list)-1].to = time.Now()
}

// during reports whether one of them has a moment in common with this time.
func (o *outages) during(from, to time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range o.list {
		if !to.Before(x.from) && (x.to.IsZero() || !from.After(x.to)) {
			return true
		}
	}
	return false
}
