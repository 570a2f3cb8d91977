package sds

import (
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/api/apitest"
)

// framings are ways to send what is no message of a call, with the reason that it is refused for.
var framings = []struct {
	name  string
	body  []byte
	whole bool
	want  api.Reason
	unary bool // no fault on a stream
}{
	{"no message", nil, true, api.MessageMalformed, true},
	{"a compressed message without its encoding", apitest.Frame(1, 2, []byte{10, 0}), true, api.MessageMalformed, false},
	{"a flag that there is not", apitest.Frame(7, 2, []byte{10, 0}), true, api.MessageMalformed, false},
	{"half a header", []byte{0, 0}, true, api.MessageMalformed, false},
	{"half a message", apitest.Frame(0, 8, []byte{10, 0}), true, api.MessageMalformed, false},
	{"a header and no message", apitest.Frame(0, 8, nil), true, api.MessageMalformed, false},
	{"bytes that do not parse", apitest.Frame(0, 3, []byte{0xff, 0xff, 0xff}), true, api.MessageMalformed, false},
	{"8 MiB, announced", apitest.Frame(0, 8<<20, nil), false, api.MessageTooLarge, false},
	{"4 GiB, announced", apitest.Frame(0, 1<<32-1, nil), false, api.MessageTooLarge, false},
	{"two messages", append(apitest.Frame(0, 0, nil), apitest.Frame(0, 0, nil)...), true, api.MessageMalformed, true},
	{"a message and a bit", append(apitest.Frame(0, 0, nil), 0), true, api.MessageMalformed, false},
}

// TestFraming refuses what is not framed as a message by a reason, counted by its hook, on every call; gRPC would answer
// that it is a fault of ours.
//
// threat: D11, D12
func TestFraming(t *testing.T) {
	p := newPod(t)
	p.set(1)
	var mu sync.Mutex
	heard := map[string]int{}
	hook := func(protocol string, reason api.Reason) {
		mu.Lock()
		defer mu.Unlock()
		heard[protocol+" "+string(reason)]++
	}
	var log strings.Builder
	srv := New(Config{Source: p, Log: slog.New(slog.NewTextHandler(&locked{mu: &mu, w: &log}, nil)), Hooks: Hooks{Refused: hook, Closed: hook}})
	lis := bufconn.Listen(1 << 20)
	g := grpc.NewServer(ServerOptions()...)
	srv.Register(g)
	served := make(chan struct{})
	go func() { defer close(served); g.Serve(lis) }()
	defer func() { srv.Close(); g.Stop(); <-served }()
	for _, call := range []struct {
		protocol, name string
		stream         bool
	}{
		{protocolFetch, "FetchSecrets", false}, {ProtocolSotW, "StreamSecrets", true}, {ProtocolDelta, "DeltaSecrets", true},
	} {
		for _, tt := range framings {
			if call.stream && tt.unary {
				continue
			}
			name := call.name + ": " + tt.name
			c, err := lis.DialContext(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			key := call.protocol + " " + string(tt.want)
			mu.Lock()
			before := heard[key]
			mu.Unlock()
			a := apitest.Speak(t, c, "/envoy.service.secret.v3.SecretDiscoveryService/"+call.name, tt.body, tt.whole)
			if a.Info.GetReason() != string(tt.want) || a.Headers["grpc-status"] != "3" || a.Info.GetMetadata()["correlation_id"] == "" {
				t.Errorf("%s: status %s (%s), reason %v, want %s", name, a.Headers["grpc-status"], a.Headers["grpc-message"], a.Info, tt.want)
			}
			mu.Lock()
			if got := heard[key] - before; got != 1 {
				t.Errorf("%s: counted %d times", name, got)
			}
			mu.Unlock()
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if lines := strings.Count(log.String(), "protocol=fetch"); lines < 1 || lines > 3 { // a busy machine may take longer than quietTime
		t.Errorf("%d lines about fetches", lines)
	}
}

// locked is a writer for several.
type locked struct {
	mu *sync.Mutex
	w  io.Writer
}

// Write implements io.Writer.
func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
