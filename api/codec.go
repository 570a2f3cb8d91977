package api

import (
	"bytes"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// ServerCodec is gRPC's own codec for protobuf, but for what does not parse. gRPC answers that itself, as an internal error
// of ours without a reason, before anybody here hears of it; so it arrives as an empty message with a mark on it, and
// whoever receives it calls CheckRead first. A sender who makes the mark himself is refused for the same reason. So is a message of
// more than 16,384 others: an empty one is two bytes on the wire and two hundred in memory, before anybody can look at it.
func ServerCodec() encoding.CodecV2 { return codec{encoding.GetCodecV2("proto")} }

type codec struct{ encoding.CodecV2 }

// unreadMark is an unknown field of the highest number there is.
var unreadMark = protowire.AppendVarint(protowire.AppendTag(nil, protowire.MaxValidNumber, protowire.VarintType), 1)

// Bounds of what is in one message, and from what size on that is looked at: what is smaller cannot take much.
const (
	maxNested  = 16384
	weighedAt  = 64 << 10
	maxNesting = 16 // far above what there is
)

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if ok && data.Len() > weighedAt {
		whole := data.MaterializeToBuffer(mem.DefaultBufferPool())
		defer whole.Free()
		if nested(m.ProtoReflect().Descriptor(), whole.ReadOnlyData(), maxNesting) > maxNested {
			m.ProtoReflect().SetUnknown(unreadMark)
			return nil
		}
		data = mem.BufferSlice{whole}
	}
	err := c.CodecV2.Unmarshal(data, v)
	if ok && err != nil {
		proto.Reset(m)
		m.ProtoReflect().SetUnknown(unreadMark)
		return nil
	}
	return err
}

// nested counts the messages in an encoded one, up to the depth that is given, without decoding any; it stops above maxNested, and
// where the bytes do not parse.
func nested(of protoreflect.MessageDescriptor, data []byte, depth int) int {
	n := 0
	for len(data) > 0 && depth > 0 && n <= maxNested {
		number, kind, size := protowire.ConsumeField(data)
		if size < 0 {
			break
		}
		field := of.Fields().ByNumber(number)
		if field != nil && field.Message() != nil && kind == protowire.BytesType {
			_, _, tag := protowire.ConsumeTag(data)
			inner, _ := protowire.ConsumeBytes(data[tag:])
			n += 1 + nested(field.Message(), inner, depth-1)
		}
		data = data[size:]
	}
	return n
}

// CheckRead refuses a message that was received and could not be parsed (MessageMalformed).
func CheckRead(v any) error {
	if m, ok := v.(proto.Message); ok && bytes.Equal(m.ProtoReflect().GetUnknown(), unreadMark) {
		return errUnread()
	}
	return nil
}
