// Package apitest speaks to a gRPC server in HTTP/2 frames of its own, for tests of what no client library would send.
package apitest

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
)

// Answer is the end of a call on the wire.
type Answer struct {
	Headers map[string]string
	Info    *errdetails.ErrorInfo // nil where no reason came
}

// Speak makes a call with frames of its own: more are header fields, body is what comes as data; whole says that it is all.
func Speak(t testing.TB, c net.Conn, path string, body []byte, whole bool, more ...string) Answer {
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
		a := Answer{Headers: map[string]string{}}
		for _, field := range h.Fields {
			a.Headers[field.Name] = field.Value
		}
		if !h.StreamEnded() && a.Headers["grpc-status"] == "" {
			continue
		}
		if bin := a.Headers["grpc-status-details-bin"]; bin != "" {
			raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(bin, "="))
			st := &statuspb.Status{}
			if err == nil {
				err = proto.Unmarshal(raw, st)
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range st.GetDetails() {
				if info := (&errdetails.ErrorInfo{}); d.UnmarshalTo(info) == nil {
					a.Info = info
				}
			}
		}
		return a
	}
}

// Frame is a message as gRPC frames it: a flag, the size that it says it has, and what comes of it.
func Frame(flag byte, size int, message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{flag}, uint32(size)), message...)
}
