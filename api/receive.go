package api

import (
	"context"
	"encoding/binary"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// frames is the part of gRPC's own stream from which RecvMsg reads.
type frames interface {
	ReadMessageHeader(header []byte) error
	Read(n int) (mem.BufferSlice, error)
}

// ending is the part of it that ends the call.
type ending interface {
	WriteStatus(st *status.Status) error
}

// Receive reads the next message of a call into m, a proto.Message, as a server's RecvMsg does. RecvMsg answers what is not
// framed as a message itself, before it returns: as an internal error of ours, without a reason. So the frame is read here,
// and its faults are refusals like any other: MessageTooLarge above limit bytes, MessageMalformed for all else. It returns
// io.EOF when the caller has sent everything, and a status of gRPC when the call ended meanwhile.
//
// Next is the RecvMsg of the call. It is asked where gRPC does not offer its frames: then the answer is gRPC's own, and the
// error only says which refusal it was.
func Receive(ctx context.Context, m any, limit int, next func(any) error) error {
	var r Receiver
	if _, ok := m.(proto.Message); ok {
		r.frames, _ = grpc.ServerTransportStreamFromContext(ctx).(frames)
	}
	if err := r.Wait(); err != nil {
		return err
	}
	return r.Receive(m, limit, next)
}

// A Receiver is Receive in two halves, for a call on which nothing comes for hours: a goroutine that waits needs little of a
// stack, one that reads a message needs more and keeps it as long as it lives. The zero Receiver asks RecvMsg alone. It is for
// one goroutine at a time, but for End.
type Receiver struct {
	frames frames // nil where gRPC does not offer them
	ending ending // nil where frames is
	header [5]byte
}

// NewReceiver returns a Receiver for the call of ctx.
func NewReceiver(ctx context.Context) Receiver {
	stream := grpc.ServerTransportStreamFromContext(ctx)
	f, ok := stream.(frames)
	e, can := stream.(ending)
	if !ok || !can { // nobody waits where nobody could end it
		return Receiver{}
	}
	return Receiver{frames: f, ending: e}
}

// Wait returns when a message has begun, which Receive is called for next, or with the error with which Receive would. Where
// gRPC does not offer its frames it returns at once, and Receive waits.
func (r *Receiver) Wait() error {
	if r.frames == nil {
		return nil
	}
	if err := r.frames.ReadMessageHeader(r.header[:]); err != nil { // flag, length (gRPC over HTTP/2, "Length-Prefixed-Message")
		return cutShort(err, io.EOF)
	}
	return nil
}

// Receive reads the message that Wait has waited for, as the function of that name does.
func (r *Receiver) Receive(m any, limit int, next func(any) error) error {
	msg, isProto := m.(proto.Message)
	if r.frames == nil || !isProto {
		return received(m, next(m))
	}
	if r.header[0] != 0 { // 1 is compressed, which nobody may be here; there is no other
		return E(MessageMalformed, "the message is compressed, or not framed as gRPC frames one")
	}
	size := binary.BigEndian.Uint32(r.header[1:])
	if uint64(size) > uint64(max(limit, 0)) {
		return tooLarge()
	}
	data, err := r.frames.Read(int(size))
	if err != nil {
		return cutShort(err, errCut())
	}
	defer data.Free()
	if err := encoding.GetCodecV2("proto").Unmarshal(data, msg); err != nil {
		proto.Reset(msg)
		return errUnread()
	}
	return nil
}

// End ends the call with the status that err is, before its handler returns, and so ends a Wait: nothing else does. The handler
// returns the same status; gRPC sends one. Where gRPC does not offer its frames it does nothing. It may be called from any
// goroutine.
func (r *Receiver) End(err error) {
	if r.ending != nil {
		_ = r.ending.WriteStatus(status.Convert(err)) // it fails where the caller is gone
	}
}

// ReceiveOnly is Receive for a call whose caller sends one message: none and a second are MessageMalformed.
func ReceiveOnly(ctx context.Context, m any, limit int, next func(any) error) error {
	err := Receive(ctx, m, limit, next)
	if errors.Is(err, io.EOF) {
		return E(MessageMalformed, "the call came without a message")
	}
	f, ok := grpc.ServerTransportStreamFromContext(ctx).(frames)
	if err != nil || !ok {
		return err
	}
	var header [5]byte
	if err := f.ReadMessageHeader(header[:]); !errors.Is(err, io.EOF) {
		if err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
			return E(MessageMalformed, "the call came with more than one message")
		}
		return cutShort(err, io.EOF)
	}
	return nil
}

// received sorts what gRPC's own RecvMsg returned.
func received(m any, err error) error {
	if err == nil {
		return CheckRead(m)
	}
	switch status.Code(err) {
	case codes.Internal:
		return Wrap(MessageMalformed, err, "the message is compressed, or not framed as gRPC frames one")
	case codes.ResourceExhausted:
		return tooLarge()
	}
	return err
}

// cutShort sorts what ended reading. At the end of what the caller sent it returns end.
func cutShort(err, end error) error {
	switch {
	case errors.Is(err, io.EOF):
		return end
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errCut()
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unavailable, "the connection ended")
}

func errCut() error    { return E(MessageMalformed, "the message ends early") }
func errUnread() error { return E(MessageMalformed, "the message is not one of this call") }
func tooLarge() error  { return E(MessageTooLarge, "the message is larger than any of this call") }
