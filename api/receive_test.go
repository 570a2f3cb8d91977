package api

import (
	"context"
	"errors"
	"io"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Where gRPC does not offer its frames, what its RecvMsg says is sorted into reasons, and all else is left as it is.
func TestReceiveWithoutFrames(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want Reason // empty: as it came
	}{
		{"a message", nil, ""},
		{"the end", io.EOF, ""},
		{"the caller went away", status.Error(codes.Canceled, ""), ""},
		{"too late", status.Error(codes.DeadlineExceeded, ""), ""},
		{"no encoding", status.Error(codes.Unimplemented, ""), ""},
		{"a frame that is none", status.Error(codes.Internal, ""), MessageMalformed},
		{"too large", status.Error(codes.ResourceExhausted, ""), MessageTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Receive(t.Context(), &wrapperspb.StringValue{}, 100, func(any) error { return tt.err })
			if tt.want != "" && ReasonOf(err) != tt.want || tt.want == "" && !errors.Is(err, tt.err) {
				t.Errorf("%v, want %s", err, tt.want)
			}
			err = ReceiveOnly(t.Context(), &wrapperspb.StringValue{}, 100, func(any) error { return tt.err })
			if tt.err == io.EOF && ReasonOf(err) != MessageMalformed || tt.err == nil && err != nil {
				t.Errorf("as the only one: %v", err)
			}
		})
	}
	err := Receive(t.Context(), &wrapperspb.StringValue{}, 100, func(m any) error {
		m.(proto.Message).ProtoReflect().SetUnknown(unreadMark)
		return nil
	})
	if ReasonOf(err) != MessageMalformed {
		t.Errorf("what did not parse: %v", err)
	}
}

// call is gRPC's own stream of a call: its frames, and its end.
type call struct {
	grpc.ServerTransportStream
	in    []byte
	err   error // after them
	ended *status.Status
}

func (c *call) ReadMessageHeader(header []byte) error {
	if len(c.in) == 0 {
		return c.err
	}
	c.in = c.in[copy(header, c.in):]
	return nil
}

func (c *call) Read(n int) (mem.BufferSlice, error) {
	if n > len(c.in) {
		return nil, io.ErrUnexpectedEOF
	}
	data := mem.BufferSlice{mem.SliceBuffer(c.in[:n])}
	c.in = c.in[n:]
	return data, nil
}

func (c *call) WriteStatus(st *status.Status) error {
	c.ended = st
	return nil
}

// waiting is a call that cannot be ended from elsewhere.
type waiting struct {
	grpc.ServerTransportStream
	frames
}

func (waiting) ReadMessageHeader([]byte) error { panic("nobody could end this") }

func TestReceiver(t *testing.T) {
	c := &call{in: []byte("\x00\x00\x00\x00\x03\x0a\x01x" + "\x00\x00\x00\x00\x63" + "\x01\x00\x00\x00\x00" + "\x00\x00\x00\x00\x09\x0a"), err: io.EOF}
	r := NewReceiver(grpc.NewContextWithServerTransportStream(t.Context(), c))
	none := func(any) error { t.Error("RecvMsg was asked"); return nil }
	for _, want := range []Reason{"", MessageTooLarge, MessageMalformed, MessageMalformed} {
		if err := r.Wait(); err != nil {
			t.Fatal(err)
		}
		m := &wrapperspb.StringValue{}
		if err := r.Receive(m, 10, none); want != "" && ReasonOf(err) != want || want == "" && (err != nil || m.GetValue() != "x") {
			t.Errorf("%v, %v; want %q", m, err, want)
		}
	}
	c.in = nil
	if err := r.Wait(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if r.End(status.Error(codes.Aborted, "x")); c.ended.Code() != codes.Aborted {
		t.Errorf("ended with %v", c.ended)
	}
	if r.End(nil); c.ended.Code() != codes.OK {
		t.Errorf("ended with %v", c.ended)
	}
}

// Where gRPC does not offer its frames, or no way to end a call, nobody waits for a header, and RecvMsg is asked.
func TestReceiverWithoutFrames(t *testing.T) {
	for name, ctx := range map[string]context.Context{
		"no stream": t.Context(),
		"no end":    grpc.NewContextWithServerTransportStream(t.Context(), waiting{}),
	} {
		t.Run(name, func(t *testing.T) {
			r := NewReceiver(ctx)
			if err := r.Wait(); err != nil {
				t.Fatal(err)
			}
			if err := r.Receive(&wrapperspb.StringValue{}, 10, func(any) error { return io.EOF }); !errors.Is(err, io.EOF) {
				t.Errorf("%v, want what RecvMsg said", err)
			}
			r.End(nil)
		})
	}
}
