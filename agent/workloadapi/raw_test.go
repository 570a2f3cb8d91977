package workloadapi

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

// raw is a connection that speaks HTTP/2 and reads only what it is told to: a client that gRPC would never be.
type raw struct {
	t  testing.TB
	c  net.Conn
	fr *http2.Framer
	mu sync.Mutex // held while something is written
}

func (w *world) raw(window uint32) *raw {
	w.t.Helper()
	c, err := w.lis.DialContext(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	r := &raw{t: w.t, c: c, fr: http2.NewFramer(c, c)}
	r.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		w.t.Fatal(err)
	}
	r.write(func() error {
		return r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	})
	return r
}

func (r *raw) write(f func() error) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := f(); err != nil {
		r.t.Fatal(err)
	}
}

// data sends one request and ends what is sent on a stream.
func (r *raw) data(id uint32, request ...byte) {
	r.t.Helper()
	r.write(func() error { return r.fr.WriteData(id, true, request) })
}

// open lets n more bytes come on a connection and its first stream.
func (r *raw) open(n uint32) {
	r.t.Helper()
	r.write(func() error { return r.fr.WriteWindowUpdate(1, n) })
	r.write(func() error { return r.fr.WriteWindowUpdate(0, n) })
}

// call opens a stream; path and header are written without compression (RFC 7541 section 6.2.2).
func (r *raw) call(id uint32, path string, more ...string) {
	r.t.Helper()
	var block []byte
	add := func(name, value string) {
		block = append(block, 0, byte(len(name)))
		block = append(append(block, name...), byte(len(value)))
		block = append(block, value...)
	}
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {headerName, headerValue},
	} {
		add(f[0], f[1])
	}
	for i := 0; i < len(more); i += 2 {
		add(more[i], more[i+1])
	}
	r.write(func() error {
		return r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true})
	})
}

// pump reads and answers what keeps a connection alive, but opens no window, until the connection ends; the map
// holds the gRPC code of each stream that has ended.
func (r *raw) pump() <-chan map[uint32]string {
	done := make(chan map[uint32]string, 1)
	answer := func(f func() error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		f() // where that fails, so does reading
	}
	go func() {
		ends := map[uint32]string{}
		defer func() { done <- ends }()
		for {
			f, err := r.fr.ReadFrame()
			if err != nil {
				return
			}
			switch f := f.(type) {
			case *http2.PingFrame:
				if !f.IsAck() {
					answer(func() error { return r.fr.WritePing(true, f.Data) })
				}
			case *http2.SettingsFrame:
				if !f.IsAck() {
					answer(r.fr.WriteSettingsAck)
				}
			case *http2.MetaHeadersFrame:
				for _, h := range f.Fields {
					if h.Name == "grpc-status" {
						ends[f.StreamID] = h.Value
					}
				}
			}
		}
	}()
	return done
}

const (
	pathSVID    = "/SpiffeWorkloadAPI/FetchX509SVID"
	pathBundles = "/SpiffeWorkloadAPI/FetchX509Bundles"
)

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (rawCodec) Unmarshal(mem.BufferSlice, any) error { return nil }
