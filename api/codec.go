package api

import (
	"bytes"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// ServerCodec is gRPC's own codec for protobuf, but for what does not parse. gRPC answers that itself, as an internal error
// of ours without a reason, before anybody here hears of it; so it arrives as an empty message with a mark on it, and
// whoever receives it calls CheckRead first. A sender who makes the mark himself is refused for the same reason.
func ServerCodec() encoding.CodecV2 { return codec{encoding.GetCodecV2("proto")} }

type codec struct{ encoding.CodecV2 }

// unreadMark is an unknown field of the highest number there is.
var unreadMark = protowire.AppendVarint(protowire.AppendTag(nil, protowire.MaxValidNumber, protowire.VarintType), 1)

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	err := c.CodecV2.Unmarshal(data, v)
	if m, ok := v.(proto.Message); ok && err != nil {
		proto.Reset(m)
		m.ProtoReflect().SetUnknown(unreadMark)
		return nil
	}
	return err
}

// CheckRead refuses a message that was received and could not be parsed (MessageMalformed).
func CheckRead(v any) error {
	if m, ok := v.(proto.Message); ok && bytes.Equal(m.ProtoReflect().GetUnknown(), unreadMark) {
		return errUnread()
	}
	return nil
}
