package kube

import (
	"bufio"
	"crypto/rand"
	"crypto/sha1" // RFC 6455 section 4.2.2 wants it; nothing rests on it
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// A webSocket is the client's side of a WebSocket (RFC 6455) over a connection that the API server has upgraded: as much of
// it as a port-forward needs. The Kubernetes modules that would bring one bring three more modules.
type webSocket struct {
	r *bufio.Reader
	w io.Writer

	mu sync.Mutex // held while a frame is written
}

// Opcodes of RFC 6455 section 5.2.
const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA
)

// maxFrame bounds one message, in bytes, in both directions. Nodes send 32 KiB at once.
const maxFrame = 256 << 10

var errFrame = errors.New("the other side's frames are not those of a WebSocket")

// acceptKey is the answer to a key of ours (RFC 6455 section 1.3).
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// newKey is a nonce of ours.
func newKey() string {
	var nonce [16]byte
	rand.Read(nonce[:])
	return base64.StdEncoding.EncodeToString(nonce[:])
}

// receive returns the next message, and io.EOF where the other side has closed. It answers what wants an answer.
func (s *webSocket) receive() ([]byte, error) {
	var message []byte
	for started := false; ; {
		op, final, data, err := s.frame(maxFrame - len(message))
		if err != nil {
			return nil, err
		}
		switch {
		case op == opPing:
			if err := s.send(opPong, data); err != nil {
				return nil, err
			}
			continue
		case op == opPong:
			continue
		case op == opClose:
			return nil, io.EOF
		case op == opContinuation != started, op > opBinary:
			return nil, errFrame
		}
		started = true
		if message = append(message, data...); final {
			return message, nil
		}
	}
}

// frame reads one frame of a server, which is not masked, of at most limit bytes.
func (s *webSocket) frame(limit int) (op byte, final bool, data []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(s.r, head[:]); err != nil {
		return 0, false, nil, err
	}
	op, final = head[0]&0x0F, head[0]&0x80 != 0
	control := op&0x8 != 0
	length := uint64(head[1] & 0x7F)
	if head[0]&0x70 != 0 || head[1]&0x80 != 0 || control && (!final || length > 125) {
		return 0, false, nil, errFrame
	}
	switch length {
	case 126:
		var n [2]byte
		if _, err := io.ReadFull(s.r, n[:]); err != nil {
			return 0, false, nil, unexpected(err)
		}
		length = uint64(binary.BigEndian.Uint16(n[:]))
	case 127:
		var n [8]byte
		if _, err := io.ReadFull(s.r, n[:]); err != nil {
			return 0, false, nil, unexpected(err)
		}
		length = binary.BigEndian.Uint64(n[:])
	}
	if length > uint64(max(limit, 0)) && !control {
		return 0, false, nil, fmt.Errorf("a message is above %d bytes", maxFrame)
	}
	data = make([]byte, length)
	if _, err := io.ReadFull(s.r, data); err != nil {
		return 0, false, nil, unexpected(err)
	}
	return op, final, data, nil
}

// unexpected is the end of a stream in the middle of a frame.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// send writes one message as one frame, masked, as a client has to. It is safe for concurrent use.
func (s *webSocket) send(op byte, parts ...[]byte) error {
	length := 0
	for _, p := range parts {
		length += len(p)
	}
	frame := []byte{0x80 | op}
	switch {
	case length <= 125:
		frame = append(frame, 0x80|byte(length))
	case length <= 1<<16-1:
		frame = binary.BigEndian.AppendUint16(append(frame, 0x80|126), uint16(length))
	default:
		frame = binary.BigEndian.AppendUint64(append(frame, 0x80|127), uint64(length))
	}
	var mask [4]byte
	rand.Read(mask[:])
	frame = append(frame, mask[:]...)
	i := 0
	for _, p := range parts {
		for _, b := range p {
			frame = append(frame, b^mask[i&3])
			i++
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.w.Write(frame)
	return err
}
