package ca_test

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/api/apitest"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// framings are ways to send what is no message of a call, with the reason that it is refused for.
var framings = []struct {
	name  string
	body  []byte
	whole bool
	want  api.Reason
}{
	{"no message", nil, true, api.MessageMalformed},
	{"a compressed message without its encoding", apitest.Frame(1, 2, []byte{8, 1}), true, api.MessageMalformed},
	{"a flag that there is not", apitest.Frame(7, 2, []byte{8, 1}), true, api.MessageMalformed},
	{"half a header", []byte{0, 0}, true, api.MessageMalformed},
	{"half a message", apitest.Frame(0, 8, []byte{8, 1}), true, api.MessageMalformed},
	{"a header and no message", apitest.Frame(0, 8, nil), true, api.MessageMalformed},
	{"bytes that do not parse", apitest.Frame(0, 3, []byte{0xff, 0xff, 0xff}), true, api.MessageMalformed},
	{"8 MiB, announced", apitest.Frame(0, 8<<20, nil), false, api.MessageTooLarge},
	{"4 GiB, announced", apitest.Frame(0, 1<<32-1, nil), false, api.MessageTooLarge},
	{"two messages", append(apitest.Frame(0, 0, nil), apitest.Frame(0, 0, nil)...), true, api.MessageMalformed},
	{"a message and a bit", append(apitest.Frame(0, 0, nil), 0), true, api.MessageMalformed},
}

// TestFraming refuses what is not framed as a message by a reason, with an id under which it is found, counts it, and puts
// it on record where the caller is known: on every call of both ports that takes one message.
//
// threat: J06, J08
func TestFraming(t *testing.T) {
	s := start(t, withHealth(catest.Options{}))
	n := newNode(t, s, "node-1")
	n.session()
	agents := func(own bool) net.Conn {
		c, err := s.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
		if own {
			config.Certificates = []tls.Certificate{{Certificate: [][]byte{n.svid.Certificates[0].Raw, n.svid.Certificates[1].Raw}, PrivateKey: n.svid.PrivateKey}}
		}
		return tls.Client(c, config)
	}
	l := bufconn.Listen(1 << 20)
	server := s.CA().NewAdminServer(catest.AsUser(0))
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(l) }()
	defer func() { server.Stop(); <-served }()
	admin := func() net.Conn {
		c, err := l.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, at := range []struct {
		name, call, source string
		dial               func() net.Conn
	}{
		{"a stranger", apiv1.Authority_AttestAgent_FullMethodName, "sample", func() net.Conn { return agents(false) }},
		{"a probe", "/grpc.health.v1.Health/Check", "sample", func() net.Conn { return agents(false) }},
		{"an agent", apiv1.Authority_Issue_FullMethodName, "refusals", func() net.Conn { return agents(true) }},
		{"an agent", "/grpc.health.v1.Health/Watch", "refusals", func() net.Conn { return agents(true) }},
		{"an agent", "/grpc.health.v1.Health/List", "refusals", func() net.Conn { return agents(true) }},
		{"an operator", apiv1.Admin_GetStatus_FullMethodName, "", admin},
		{"an operator", apiv1.Admin_ListAudit_FullMethodName, "", admin},
	} {
		for _, tt := range framings {
			name := at.name + " calls " + at.call + " with " + tt.name
			before := refusalsOf(t, s, tt.want)
			a := apitest.Speak(t, at.dial(), at.call, tt.body, tt.whole)
			if a.Info.GetReason() != string(tt.want) || a.Headers["grpc-status"] != "3" {
				t.Errorf("%s: status %s (%s), reason %q, want %s", name, a.Headers["grpc-status"], a.Headers["grpc-message"], a.Info.GetReason(), tt.want)
				continue
			}
			if got := refusalsOf(t, s, tt.want) - before; got != 1 {
				t.Errorf("%s: %v refusals were counted", name, got)
			}
			found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{CorrelationId: a.Info.GetMetadata()["correlation_id"]})
			if at.source == "refusals" && (len(found) != 1 || found[0].GetSource() != at.source || found[0].GetReason() != string(tt.want) || found[0].GetCaller() == "") {
				t.Errorf("%s: on record is %v", name, found)
			}
		}
	}
}

// refusalsOf is how many refusals of a reason were counted.
func refusalsOf(t *testing.T, s *catest.Server, reason api.Reason) float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(s.CA().Metrics())
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "signet_refusals_total" && m.GetLabel()[0].GetValue() == string(reason) {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// logging has the log of a CA written to out.
func logging(out io.Writer) catest.Options {
	return catest.Options{Config: func(cfg *ca.Config) { cfg.Log = slog.New(slog.NewTextHandler(out, nil)) }}
}

// String returns what was said so far.
func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// TestHeaderFaults pins what gRPC's transport answers by itself, before there is a call that anybody here could refuse:
// with a status of its own, without a reason, to the sender alone, whose own words may be in it. Nothing of it is logged,
// counted or kept.
//
// threat: J08
func TestHeaderFaults(t *testing.T) {
	log := &said{}
	s := start(t, logging(log))
	const word = "s-e-s-a-m-e!" // no base64
	for _, tt := range []struct {
		name, header, value string
		want                codes.Code
	}{
		{"a timeout that is none", "grpc-timeout", word, codes.Internal},
		{"a binary header that is not binary", "x-token-bin", word, codes.Internal},
		{"an encoding that is not known", "grpc-encoding", word, codes.Unimplemented},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := s.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			a := apitest.Speak(t, tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}), apiv1.Authority_AttestAgent_FullMethodName,
				apitest.Frame(0, 0, nil), true, tt.header, tt.value)
			if got := a.Headers["grpc-status"]; got != strconv.Itoa(int(tt.want)) || a.Info != nil {
				t.Errorf("status %s, reason %v, want %d and none", got, a.Info, tt.want)
			}
		})
	}
	if strings.Contains(log.String(), word) {
		t.Error("a stranger's header was logged")
	}
	if found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Kinds: []string{"refuse"}}); len(found) != 0 {
		t.Errorf("on record: %v", found)
	}
}
