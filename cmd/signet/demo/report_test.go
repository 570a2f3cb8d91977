package demo

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

func goodReport() Report {
	return Report{
		APIVersion: "cli.signet.dev/v1", Kind: "DemoReport", TrustDomain: trustDomain, Peers: "Envoy 1.40.0", Millis: 12000, Ready: 300,
		FirstSVID: 8, Issuance: Issuance{SVIDs: 6, MeanMicros: 1400},
		Sides: []Side{
			{Name: checkout, ID: "spiffe://demo.signet/ns/demo/sa/checkout", Protocol: "SDS (delta)", FirstSVID: 90, Rotations: 3, LeastLife: 3500},
			{Name: payments, ID: "spiffe://demo.signet/ns/demo/sa/payments", Protocol: "SDS (state of the world)", FirstSVID: 160, Rotations: 4, LeastLife: 4500},
		},
		Traffic: Traffic{Requests: 900, PerSecond: 80, Handshakes: 900},
		Outages: []Outage{
			{Program: "signet-ca", Millis: 4000, Requests: 330, Renewed: true},
			{Program: "signet-agent", Millis: 1000, Requests: 84, Renewed: true},
		},
		Refused: []Refusal{
			{Who: "spiffe://demo.signet/ns/demo/sa/intruder", Refused: true, Counted: 1, Why: "tls: unknown certificate"},
			{Who: "a client without a certificate", Refused: true, Counted: 1, Why: "tls: certificate required"},
		},
	}
}

func TestJudge(t *testing.T) {
	tests := map[string]struct {
		change func(*Report)
		broke  error
		want   []string
	}{
		"all was shown":            {func(*Report) {}, nil, nil},
		"a request failed":         {func(r *Report) { r.Traffic.Failed = 1 }, nil, []string{"1 of 900 requests failed"}},
		"no request":               {func(r *Report) { r.Traffic = Traffic{} }, nil, []string{"no request was made"}},
		"a session was resumed":    {func(r *Report) { r.Traffic.Resumed = 2 }, nil, []string{"2 TLS sessions were resumed"}},
		"too few rotations":        {func(r *Report) { r.Sides[1].Rotations = 2 }, nil, []string{"payments rotated 2 times, not 3"}},
		"one side alone":           {func(r *Report) { r.Sides = r.Sides[:1] }, nil, []string{"only 1 of 2 sides were seen"}},
		"the agent was not killed": {func(r *Report) { r.Outages = r.Outages[:1] }, nil, []string{"1 of 2 programs were killed"}},
		"no renewal afterwards": {func(r *Report) { r.Outages[0].Renewed = false }, nil,
			[]string{"certificates were not renewed after signet-ca came back"}},
		"the intruder got in": {func(r *Report) { r.Refused[0].Refused = false }, nil,
			[]string{"spiffe://demo.signet/ns/demo/sa/intruder was not refused"}},
		"the refusal was somebody else's": {func(r *Report) { r.Refused[1].Counted = 0 }, nil,
			[]string{"a client without a certificate was not refused"}},
		"no intruder": {func(r *Report) { r.Refused = nil }, nil, []string{"0 of 2 strangers knocked"}},
		"it broke off": {func(r *Report) { r.Traffic.Failed = 7 }, errors.New("signet-ca ended by itself"),
			[]string{"signet-ca ended by itself", "7 of 900 requests failed"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := goodReport()
			r.Logs = "/tmp/logs"
			tt.change(&r)
			r.judge(tt.broke)
			if d := cmp.Diff(tt.want, r.Missing); d != "" || r.Passed != (tt.want == nil) {
				t.Errorf("passed %v\n%s", r.Passed, d)
			}
			err := r.err()
			if (err != nil) != (tt.want != nil) {
				t.Fatalf("error %v", err)
			}
			if err != nil && (api.ReasonOf(err) != api.DemoFailed || !strings.Contains(err.Error(), tt.want[0]) || !strings.Contains(err.Error(), "/tmp/logs")) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestReportForPeople(t *testing.T) {
	r := goodReport()
	r.judge(nil)
	var b strings.Builder
	if err := r.write(&b, false); err != nil {
		t.Fatal(err)
	}
	want := `peers       Envoy 1.40.0
ready       300 ms from nothing to the first answer
first SVID  8 ms after it was asked for; the CA takes 1.4 ms for one, its record on disk included
checkout    spiffe://demo.signet/ns/demo/sa/checkout, ready 90 ms after its start, 3 rotations by SDS (delta), never less than 3.5 s left
payments    spiffe://demo.signet/ns/demo/sa/payments, ready 160 ms after its start, 4 rotations by SDS (state of the world), never less than 4.5 s left
outage      signet-ca dead for 4.0 s: 330 requests, 0 failed
outage      signet-agent dead for 1.0 s: 84 requests, 0 failed
refused     spiffe://demo.signet/ns/demo/sa/intruder (tls: unknown certificate)
refused     a client without a certificate (tls: certificate required)
traffic     900 requests in 900 TLS handshakes, 0 resumed, 80 a second
0 failed
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
}

func TestReportOfAFailureForPeople(t *testing.T) {
	r := goodReport()
	r.Traffic.Failed, r.Traffic.Failures, r.Logs = 2, []string{"12:00:00.000 status 503"}, "/tmp/logs"
	r.Refused[0].Refused, r.Refused[0].Why = false, "there was an answer"
	r.judge(nil)
	var b strings.Builder
	if err := r.write(&b, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"ACCEPTED    spiffe://demo.signet/ns/demo/sa/intruder (there was an answer)\n", "FAILED      12:00:00.000 status 503\n",
		"MISSING     2 of 900 requests failed\n", "logs        /tmp/logs\n", "\n2 failed\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

func TestReportForPrograms(t *testing.T) {
	r := goodReport()
	r.judge(nil)
	var b strings.Builder
	if err := r.write(&b, true); err != nil {
		t.Fatal(err)
	}
	var got Report
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(r, got); d != "" {
		t.Error(d)
	}
	for _, want := range []string{`"apiVersion": "cli.signet.dev/v1"`, `"kind": "DemoReport"`, `"passed": true`, `"failed": 0`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %s in\n%s", want, b.String())
		}
	}
}
