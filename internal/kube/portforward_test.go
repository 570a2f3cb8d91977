package kube_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/kube"
)

// node is the far side of a port-forward: it upgrades, says the port's number on both channels, and hands over to f.
func node(t *testing.T, f func(n *nodeConn)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/namespaces/signet-system/pods/signet-ca-0/portforward" || r.URL.RawQuery != "ports=8444" || r.ProtoMajor != 1 ||
			r.Header.Get("Authorization") != "Bearer "+bearer || r.Header.Get("Sec-Websocket-Protocol") != "v4.channel.k8s.io" {
			t.Errorf("%s %s %v", r.Proto, r.URL, r.Header)
		}
		sum := sha1.Sum([]byte(r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n"+
			"Sec-WebSocket-Accept: "+base64.StdEncoding.EncodeToString(sum[:])+"\r\n\r\n")
		n := &nodeConn{conn, buffered.Reader}
		n.say(0, []byte{0xfc, 0x20})
		n.say(1, []byte{0xfc, 0x20})
		f(n)
	}
}

type nodeConn struct {
	net.Conn
	r *bufio.Reader
}

// say sends data on a channel.
func (n *nodeConn) say(channel byte, data []byte) {
	frame := binary.BigEndian.AppendUint64([]byte{0x82, 127}, uint64(len(data)+1))
	n.Write(append(append(frame, channel), data...))
}

// hear returns the data of the next frame; nil at the end.
func (n *nodeConn) hear() []byte {
	var head [2]byte
	if _, err := io.ReadFull(n.r, head[:]); err != nil {
		return nil
	}
	size := uint64(head[1] & 0x7f)
	switch size {
	case 126:
		var b [2]byte
		io.ReadFull(n.r, b[:])
		size = uint64(binary.BigEndian.Uint16(b[:]))
	case 127:
		var b [8]byte
		io.ReadFull(n.r, b[:])
		size = binary.BigEndian.Uint64(b[:])
	}
	data := make([]byte, size+4)
	if _, err := io.ReadFull(n.r, data); err != nil {
		return nil
	}
	mask, data := data[:4], data[4:]
	for i := range data {
		data[i] ^= mask[i&3]
	}
	return data
}

func echo(n *nodeConn) {
	for {
		data := n.hear()
		if data == nil {
			return
		}
		n.say(0, data[1:])
	}
}

func forward(t *testing.T, ctx context.Context, o *kube.Operator) (net.Conn, error) {
	t.Helper()
	conn, err := o.PortForward(ctx, "signet-system", "signet-ca-0", 8444)
	if conn != nil {
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(time.Minute))
	}
	return conn, err
}

// TestPortForward speaks to a port of a pod in both directions, through an API server with and without HTTP/2.
func TestPortForward(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, http2)
			s.answer(node(t, echo))
			conn, err := forward(t, t.Context(), s.operator(t))
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte("0123456789"), 30_000)
			written := make(chan error, 1)
			go func() {
				_, err := conn.Write(want)
				written <- err
			}()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("what came back differs, %v", err)
			}
			if err := <-written; err != nil {
				t.Error(err)
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			if _, err := conn.Write([]byte("x")); err == nil {
				t.Error("it goes on after its end")
			}
		})
	}
}

// TestPortForwardEnds says why a connection has ended.
func TestPortForwardEnds(t *testing.T) {
	for _, row := range []struct {
		name string
		node func(*nodeConn)
		want string // of the error; empty: io.EOF
	}{
		{"the pod closes", func(n *nodeConn) { n.say(0, []byte("bye")) }, ""},
		{"the node has no such port", func(n *nodeConn) { n.say(1, []byte("connection refused\x1b[2J")); n.hear() }, `the node says: "connection refused\x1b[2J"`},
		{"an unknown channel", func(n *nodeConn) { n.say(2, nil); n.hear() }, "not those of a WebSocket"},
		{"an empty message", func(n *nodeConn) { n.Write([]byte{0x82, 0}); n.hear() }, "not those of a WebSocket"},
		{"no frames", func(n *nodeConn) { io.WriteString(n, "HTTP/1.1 400 Bad Request\r\n\r\n"); n.hear() }, "broke off"},
		{"in the middle", func(n *nodeConn) { n.Write([]byte{0x82, 5, 0}) }, "broke off"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newServer(t, false)
			s.answer(node(t, row.node))
			conn, err := forward(t, t.Context(), s.operator(t))
			if err != nil {
				t.Fatal(err)
			}
			_, err = io.ReadAll(conn)
			if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
				t.Error(err)
			}
		})
	}
	t.Run("the caller has had enough", func(t *testing.T) {
		s := newServer(t, false)
		s.answer(node(t, echo))
		ctx, cancel := context.WithCancelCause(t.Context())
		conn, err := forward(t, ctx, s.operator(t))
		if err != nil {
			t.Fatal(err)
		}
		enough := errors.New("enough")
		cancel(enough)
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, enough) {
			t.Error(err)
		}
	})
}

// TestPortForwardRefused tells what is wrong before there is a connection, and follows nobody elsewhere.
func TestPortForwardRefused(t *testing.T) {
	other := newServer(t, false)
	other.answer(func(http.ResponseWriter, *http.Request) { t.Error("another server was asked") })
	for _, row := range []struct {
		name   string
		answer http.HandlerFunc
		want   error // nil: any
	}{
		{"forbidden", reply(403, `{"message":"no"}`), kube.ErrForbidden},
		{"no pod", reply(404, `{"message":"no"}`), kube.ErrNotFound},
		{"success, but no upgrade", reply(200, `{}`), nil},
		{"another protocol", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "SPDY/3.1")
			w.WriteHeader(101)
		}, nil},
		{"the wrong key", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "websocket")
			w.Header().Set("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
			w.Header().Set("Sec-WebSocket-Accept", "AAAA")
			w.WriteHeader(101)
		}, nil},
		{"redirected", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) }, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newServer(t, false)
			s.answer(row.answer)
			_, err := forward(t, t.Context(), s.operator(t))
			if err == nil || row.want != nil && !errors.Is(err, row.want) || strings.Contains(err.Error(), bearer) {
				t.Error(err)
			}
		})
	}
	t.Run("after Close", func(t *testing.T) {
		s := newServer(t, false)
		s.answer(node(t, echo))
		o := s.operator(t)
		o.Close()
		if _, err := forward(t, t.Context(), o); err == nil {
			t.Error("it goes on")
		}
	})
}
