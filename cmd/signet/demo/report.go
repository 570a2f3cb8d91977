package demo

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
)

// minRotations is how often the certificate of each side must have changed under traffic for the demo to have shown it.
const minRotations = 3

// Report is the outcome of a demo. Fields are only ever added. Times are in milliseconds.
type Report struct {
	APIVersion  string    `json:"apiVersion"`
	Kind        string    `json:"kind"`
	TrustDomain string    `json:"trustDomain"`
	Peers       string    `json:"peers"` // "Envoy 1.40.0" or "Go"
	Passed      bool      `json:"passed"`
	Missing     []string  `json:"missing,omitempty"` // what was not shown; empty when Passed
	Millis      int64     `json:"millis"`            // the whole demo
	Ready       int64     `json:"readyMillis"`       // from nothing to the first request answered
	FirstSVID   int64     `json:"firstSVIDMillis"`   // from a Go client's SDS request to its first SVID, with the CA's signature
	Issuance    Issuance  `json:"issuance"`
	Sides       []Side    `json:"sides"`
	Traffic     Traffic   `json:"traffic"`
	Outages     []Outage  `json:"outages"`
	Refused     []Refusal `json:"refused"`
	Logs        string    `json:"logs,omitempty"` // folder that was kept
}

// Side is one of the two workloads.
type Side struct {
	Name      string `json:"name"`
	ID        string `json:"spiffeID"` // as its peer verified it
	Protocol  string `json:"protocol"` // of its SDS stream
	FirstSVID int64  `json:"firstSVIDMillis"`
	// FirstSVID is the time from the start of the proxy, CA and agent being up, until it had its certificate and bundle.
	Rotations int   `json:"rotations"`           // changes of its certificate that its peer saw
	LeastLife int64 `json:"leastLifeLeftMillis"` // of any certificate at the moment it was used
}

// Issuance is the CA's own account, since it came back.
type Issuance struct {
	SVIDs      int   `json:"svids"`
	MeanMicros int64 `json:"meanMicros"` // from a request's turn to its SVID, ledger and signature included
}

// Traffic counts requests; each had a TLS connection of its own.
type Traffic struct {
	Requests   int      `json:"requests"`
	Failed     int      `json:"failed"`
	PerSecond  int      `json:"perSecond"`
	Handshakes uint64   `json:"handshakes"`         // that payments completed
	Resumed    uint64   `json:"resumed"`            // TLS sessions that skipped the check; must be 0
	Failures   []string `json:"failures,omitempty"` // the first few
}

// Outage is the time for which a program was dead, and what happened to the traffic meanwhile.
type Outage struct {
	Program  string `json:"program"`
	Millis   int64  `json:"millis"`
	Requests int    `json:"requests"`
	Failed   int    `json:"failed"`
	Renewed  bool   `json:"renewed"` // both sides had a new certificate after it
}

// Refusal is a connection that payments must not accept.
type Refusal struct {
	Who     string `json:"who"`
	Refused bool   `json:"refused"`
	Counted uint64 `json:"counted"` // by payments
	Why     string `json:"why"`     // what the one who was refused saw
}

// judge sets Passed and Missing. broke is why the demo ended early; nil when it did not.
func (r *Report) judge(broke error) {
	miss := func(format string, args ...any) { r.Missing = append(r.Missing, fmt.Sprintf(format, args...)) }
	r.Missing = nil
	if broke != nil {
		miss("%v", broke)
	}
	switch {
	case r.Traffic.Requests == 0:
		miss("no request was made")
	case r.Traffic.Failed > 0:
		miss("%d of %d requests failed", r.Traffic.Failed, r.Traffic.Requests)
	}
	if r.Traffic.Resumed > 0 {
		miss("%d TLS sessions were resumed", r.Traffic.Resumed)
	}
	if len(r.Sides) != 2 {
		miss("only %d of 2 sides were seen", len(r.Sides))
	}
	for _, s := range r.Sides {
		if s.Rotations < minRotations {
			miss("%s rotated %d times, not %d", s.Name, s.Rotations, minRotations)
		}
	}
	if len(r.Outages) != 2 {
		miss("%d of 2 programs were killed", len(r.Outages))
	}
	for _, o := range r.Outages {
		if !o.Renewed {
			miss("certificates were not renewed after %s came back", o.Program)
		}
	}
	if len(r.Refused) != 2 {
		miss("%d of 2 strangers knocked", len(r.Refused))
	}
	for _, f := range r.Refused {
		if !f.Refused || f.Counted == 0 {
			miss("%s was not refused", f.Who)
		}
	}
	r.Passed = len(r.Missing) == 0
}

// err is the report as the outcome of the command.
func (r *Report) err() error {
	if r.Passed {
		return nil
	}
	why := r.Missing[0]
	if n := len(r.Missing) - 1; n > 0 {
		why += fmt.Sprintf("; and %d more", n)
	}
	return api.E(api.DemoFailed, "%s; the logs are in %s", why, r.Logs)
}

func (r *Report) write(w io.Writer, asJSON bool) error {
	if asJSON {
		b, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", b)
		return err
	}
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s  %s\n", name, fmt.Sprintf(format, args...))
	}
	line("peers", "%s", r.Peers)
	line("ready", "%d ms from nothing to the first answer", r.Ready)
	if r.Issuance.SVIDs > 0 {
		line("first SVID", "%d ms after it was asked for; the CA takes %.1f ms for one, its record on disk included", r.FirstSVID, float64(r.Issuance.MeanMicros)/1000)
	}
	for _, s := range r.Sides {
		line(s.Name, "%s, ready %d ms after its start, %d rotations by %s, never less than %.1f s left",
			s.ID, s.FirstSVID, s.Rotations, s.Protocol, seconds(s.LeastLife))
	}
	for _, o := range r.Outages {
		line("outage", "%s dead for %.1f s: %d requests, %d failed", o.Program, seconds(o.Millis), o.Requests, o.Failed)
	}
	for _, f := range r.Refused {
		outcome := "refused"
		if !f.Refused {
			outcome = "ACCEPTED"
		}
		line(outcome, "%s (%s)", f.Who, f.Why)
	}
	line("traffic", "%d requests in %d TLS handshakes, %d resumed, %d a second", r.Traffic.Requests, r.Traffic.Handshakes, r.Traffic.Resumed, r.Traffic.PerSecond)
	for _, f := range r.Traffic.Failures {
		line("FAILED", "%s", f)
	}
	for _, m := range r.Missing {
		line("MISSING", "%s", m)
	}
	if r.Logs != "" {
		line("logs", "%s", r.Logs)
	}
	fmt.Fprintf(&b, "%d failed\n", r.Traffic.Failed)
	_, err := io.WriteString(w, b.String())
	return err
}

func seconds(millis int64) float64 { return (time.Duration(millis) * time.Millisecond).Seconds() }
