package api

import (
	"errors"
	"io"
	"testing"

	"google.golang.org/grpc/codes"
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
