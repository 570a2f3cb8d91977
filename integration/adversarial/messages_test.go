package adversarial

import (
	"context"
	"fmt"
	"io"
	"maps"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// raw sends and receives bytes as they are, in the name of protobuf.
type raw struct{}

// Marshal implements encoding.Codec.
func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

// Unmarshal implements encoding.Codec.
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }

// Name implements encoding.Codec.
func (raw) Name() string { return "proto" }

// unparsable are messages of nothing.
var unparsable = map[string][]byte{
	"three bytes of ones": {0xff, 0xff, 0xff}, "a text that is not UTF-8": {0x0a, 0x05, 0x0a, 0x03, 0xff, 0xfe, 0xfd}, "field 0": {0x00, 0x01}, "wire type 7": {0x0f}, "a group without end": {0x0b}, "an end without group": {0x0c},
	"length beyond the message": {0x0a, 0x7f, 0x00}, "length 2^63": {0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, "varint of 11 bytes": {0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, "JSON": []byte(`{"protocol":1}`),
}

// TestMessages sends what is no message of the call: it is the sender's fault, and is counted as such.
//
// threat: J08
func TestMessages(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		good, err := proto.Marshal(&apiv1.AttestAgentRequest{Evidence: wire(r.Evidence(r.agentPod, api.AgentAudience(r.TD), 3600e9)), Csr: r.csr, Protocol: api.Protocol})
		if err != nil {
			t.Fatal(err)
		}
		conn := r.dial(nil)
		messages := maps.Clone(unparsable)
		for i := range 20 {
			messages[fmt.Sprintf("cut, number %02d", i)] = good[:len(good)-3-i*20]
		}
		for name, in := range sorted(messages) {
			before, entries := r.metric("signet_refusals_total", string(api.MessageMalformed)), r.ledger.issued()
			var out []byte
			err := conn.Invoke(t.Context(), "/signet.v1.Authority/AttestAgent", &in, &out, grpc.ForceCodec(raw{}))
			if err == nil {
				t.Errorf("%s: it was answered", name)
				continue
			}
			a := r.statusOf(name, err)
			if a.reason != api.MessageMalformed {
				t.Errorf("%s: refused with %s (%s), want %s", name, a.reason, a.text, api.MessageMalformed)
			}
			r.checkText(name, variant{item: &apiv1.IssueItem{Csr: in}}, a)
			if n := r.metric("signet_refusals_total", string(api.MessageMalformed)) - before; n != 1 || r.ledger.issued() != entries {
				t.Errorf("%s: %v refusals were counted, or something was issued", name, n)
			}
			r.session(name, in)
		}
	})
}

// session sends a message on a stream of an agent, in the place of its Hello.
func (r *rig) session(name string, in []byte) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	stream, err := r.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/signet.v1.Authority/Session", grpc.ForceCodec(raw{}))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := stream.SendMsg(&in); err != nil && err != io.EOF {
		r.t.Fatal(err)
	}
	var out []byte
	if err := stream.RecvMsg(&out); err == nil {
		r.t.Errorf("%s: it is a session", name)
	} else if a := r.statusOf(name, err); a.reason != api.SessionProtocol && a.reason != api.ProtocolSkew { // some of the bytes are a Hello of another protocol
		r.t.Errorf("%s: the session ended with %s (%s), want %s", name, a.reason, a.text, api.SessionProtocol)
	}
}

// messages sends what is no message to each call of SDS.
func (s *socket) messages(good []string) {
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(s.t.Context(), metadata.Pairs("authorization", good[0])), patience)
	defer cancel()
	for name, in := range sorted(unparsable) {
		for _, call := range []string{"FetchSecrets", "StreamSecrets", "DeltaSecrets"} {
			s.count++
			name := call + ": " + name
			stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
				"/envoy.service.secret.v3.SecretDiscoveryService/"+call, grpc.ForceCodec(raw{}))
			if err != nil {
				s.t.Fatal(err)
			}
			if err := stream.SendMsg(&in); err != nil && err != io.EOF {
				s.t.Fatal(err)
			}
			stream.CloseSend()
			var out []byte
			if err := stream.RecvMsg(&out); err == nil {
				s.t.Errorf("%s: it was answered", name)
			} else if a := s.statusOf(name, err); a.reason != api.MessageMalformed {
				s.t.Errorf("%s: refused with %s (%s), want %s", name, a.reason, a.text, api.MessageMalformed)
			}
		}
	}
}
