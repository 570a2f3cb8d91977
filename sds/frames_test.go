package sds

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	pb "google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// answer is the end of a call on the wire.
type answer struct {
	headers map[string]string
	info    *errdetails.ErrorInfo // nil where no reason came
}

// speak makes a call with frames of its own: more are header fields, body is what comes as data; whole says that it is all.
func speak(t *testing.T, c net.Conn, path string, body []byte, whole bool, more ...string) answer {
	t.Helper()
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	f := http2.NewFramer(c, c)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	fields := append([]string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "ca", "content-type", "application/grpc", "te", "trailers"}, more...)
	for i := 0; i+1 < len(fields); i += 2 {
		e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	go func() { // the other side may have said all before it has read all
		f.WriteSettings()
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: whole && len(body) == 0})
		for len(body) > 0 {
			n := min(len(body), 16<<10)
			if f.WriteData(1, whole && n == len(body), body[:n]) != nil {
				return
			}
			body = body[n:]
		}
	}()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("%s: no answer: %v", path, err)
		}
		h, ok := frame.(*http2.MetaHeadersFrame)
		if !ok {
			continue
		}
		a := answer{headers: map[string]string{}}
		for _, field := range h.Fields {
			a.headers[field.Name] = field.Value
		}
		if !h.StreamEnded() && a.headers["grpc-status"] == "" {
			continue
		}
		if bin := a.headers["grpc-status-details-bin"]; bin != "" {
			raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(bin, "="))
			st := &statuspb.Status{}
			if err == nil {
				err = pb.Unmarshal(raw, st)
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range st.GetDetails() {
				if info := (&errdetails.ErrorInfo{}); d.UnmarshalTo(info) == nil {
					a.info = info
				}
			}
		}
		return a
	}
}

func frame(flag byte, size int, message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flag}, uint32(size)), message...)
}

// framings are ways to send what is no message of a call, with the reason that it is refused for.
var framings = []struct {
	name  string
	body  []byte
	whole bool
	want  api.Reason
	unary bool // no fault on a stream
}{
	{"no message", nil, true, api.MessageMalformed, true},
	{"a compressed message without its encoding", frame(1, 2, []byte{10, 0}), true, api.MessageMalformed, false},
	{"a flag that there is not", frame(7, 2, []byte{10, 0}), true, api.MessageMalformed, false},
	{"half a header", []byte{0, 0}, true, api.MessageMalformed, false},
	{"half a message", frame(0, 8, []byte{10, 0}), true, api.MessageMalformed, false},
	{"a header and no message", frame(0, 8, nil), true, api.MessageMalformed, false},
	{"bytes that do not parse", frame(0, 3, []byte{0xff, 0xff, 0xff}), true, api.MessageMalformed, false},
	{"8 MiB, announced", frame(0, 8<<20, nil), false, api.MessageTooLarge, false},
	{"4 GiB, announced", frame(0, 1<<32-1, nil), false, api.MessageTooLarge, false},
	{"two messages", append(frame(0, 0, nil), frame(0, 0, nil)...), true, api.MessageMalformed, true},
	{"a message and a bit", append(frame(0, 0, nil), 0), true, api.MessageMalformed, false},
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
	srv := New(Config{Source: p, Hooks: Hooks{Refused: hook, Closed: hook}})
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
			a := speak(t, c, "/envoy.service.secret.v3.SecretDiscoveryService/"+call.name, tt.body, tt.whole)
			if a.info.GetReason() != string(tt.want) || a.headers["grpc-status"] != "3" || a.info.GetMetadata()["correlation_id"] == "" {
				t.Errorf("%s: status %s (%s), reason %v, want %s", name, a.headers["grpc-status"], a.headers["grpc-message"], a.info, tt.want)
			}
			mu.Lock()
			if got := heard[key] - before; got != 1 {
				t.Errorf("%s: counted %d times", name, got)
			}
			mu.Unlock()
		}
	}
}
