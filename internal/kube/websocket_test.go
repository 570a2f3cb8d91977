package kube

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
)

// read returns all messages of a server that says wire, and what the client answers.
func read(wire []byte) (messages []string, answer []byte, err error) {
	var out bytes.Buffer
	s := &webSocket{r: bufio.NewReader(bytes.NewReader(wire)), w: &out}
	for {
		m, err := s.receive()
		if err != nil {
			return messages, out.Bytes(), err
		}
		messages = append(messages, string(m))
	}
}

func TestWebSocketReceive(t *testing.T) {
	long := strings.Repeat("x", 200)
	for _, row := range []struct {
		name string
		wire string
		want []string
		err  error // nil: any
	}{
		{"one", "\x82\x02hi\x88\x00", []string{"hi"}, io.EOF},
		{"text", "\x81\x02hi", []string{"hi"}, io.EOF},
		{"in parts, and a ping between", "\x02\x01h\x89\x01p\x80\x01i", []string{"hi"}, io.EOF},
		{"longer", "\x82\x7e\x00\xc8" + long, []string{long}, io.EOF},
		{"long length", "\x82\x7f\x00\x00\x00\x00\x00\x00\x00\xc8" + long, []string{long}, io.EOF},
		{"empty", "\x82\x00", []string{""}, io.EOF},
		{"pong alone", "\x8a\x00", nil, io.EOF},
		{"masked", "\x82\x82abcdhi", nil, errFrame},
		{"reserved bit", "\xc2\x02hi", nil, errFrame},
		{"unknown", "\x83\x02hi", nil, errFrame},
		{"part without a first", "\x80\x02hi", nil, errFrame},
		{"second first", "\x02\x01h\x82\x01i", nil, errFrame},
		{"ping in parts", "\x09\x00", nil, errFrame},
		{"long ping", "\x89\x7e\x00\xc8" + long, nil, errFrame},
		{"cut in its head", "\x82\x7e\x00", nil, io.ErrUnexpectedEOF},
		{"cut", "\x82\x05hi", nil, io.ErrUnexpectedEOF},
		{"too long", "\x82\x7f\x00\x00\x00\x00\x00\x04\x00\x01", nil, nil},
		{"endless", "\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff", nil, nil},
		{"too long in parts", "\x02\x02hi\x80\x7f\x00\x00\x00\x00\x00\x04\x00\x00", nil, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, _, err := read([]byte(row.wire))
			if strings.Join(got, "|") != strings.Join(row.want, "|") || err == nil || row.err != nil && !errors.Is(err, row.err) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	if _, answer, _ := read([]byte("\x89\x01p")); len(answer) != 7 || answer[0] != 0x8a || answer[1] != 0x81 {
		t.Errorf("a ping is answered by %x", answer)
	}
}

// unmask returns the payload of one frame of a client.
func unmask(t testing.TB, frame []byte) (op byte, data []byte) {
	t.Helper()
	if len(frame) < 6 || frame[0]&0xF0 != 0x80 || frame[1]&0x80 == 0 {
		t.Fatalf("%x", frame[:min(len(frame), 16)])
	}
	op, n, rest := frame[0]&0xF, uint64(frame[1]&0x7F), frame[2:]
	switch n {
	case 126:
		n, rest = uint64(binary.BigEndian.Uint16(rest)), rest[2:]
	case 127:
		n, rest = binary.BigEndian.Uint64(rest), rest[8:]
	}
	if uint64(len(rest)) != n+4 {
		t.Fatalf("%d bytes, want %d", len(rest)-4, n)
	}
	for i, b := range rest[4:] {
		data = append(data, b^rest[i&3])
	}
	return op, data
}

func TestWebSocketSend(t *testing.T) {
	for _, n := range []int{0, 1, 124, 125, 126, 1<<16 - 1, 1 << 16} {
		var out bytes.Buffer
		s := &webSocket{w: &out}
		want := bytes.Repeat([]byte("ab"), n)[:n]
		if err := s.send(opBinary, []byte{7}, want); err != nil {
			t.Fatal(err)
		}
		if op, got := unmask(t, out.Bytes()); op != opBinary || !bytes.Equal(got, append([]byte{7}, want...)) {
			t.Errorf("%d bytes: op %d, %d bytes", n, op, len(got))
		}
	}
}

// RFC 6455 section 1.3 has the example.
func TestAcceptKey(t *testing.T) {
	if got := acceptKey("dGhlIHNhbXBsZSBub25jZQ=="); got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		t.Error(got)
	}
	if one, two := newKey(), newKey(); one == two {
		t.Error("a key is there twice")
	}
}

func FuzzWebSocket(f *testing.F) {
	for _, s := range []string{"\x82\x02hi\x88\x00", "\x02\x01h\x89\x01p\x80\x01i", "\x82\x7e\x00\xc8", "\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff", "\x83\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		messages, _, err := read(wire)
		total := 0
		for _, m := range messages {
			total += len(m)
			if len(m) > maxFrame {
				t.Errorf("a message of %d bytes", len(m))
			}
		}
		if err == nil || total > len(wire) {
			t.Errorf("%d bytes of %d, %v", total, len(wire), err)
		}
	})
}
