package ready

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/mem"
)

// counted is a pool that knows how many of its buffers are out, and when one was taken.
type counted struct {
	out   atomic.Int64
	taken chan struct{}
}

func (p *counted) Get(n int) *[]byte {
	p.out.Add(1)
	select {
	case p.taken <- struct{}{}:
	default:
	}
	return new(make([]byte, n))
}

func (p *counted) Put(*[]byte) { p.out.Add(-1) }

var _ mem.BufferPool = (*counted)(nil)

// pairs are two ends of a connection each: through the kernel, and in memory.
var pairs = []struct {
	name string
	make func(t *testing.T) (here, there net.Conn)
}{
	{"unix", func(t *testing.T) (here, there net.Conn) {
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if there, err = net.Dial("unix", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if here, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		return here, there
	}},
	{"in memory", func(*testing.T) (here, there net.Conn) { return net.Pipe() }},
}

func TestReadOnReady(t *testing.T) {
	for _, tt := range pairs {
		t.Run(tt.name, func(t *testing.T) {
			here, there := tt.make(t)
			defer here.Close()
			defer there.Close()
			pool, r := &counted{taken: make(chan struct{}, 1)}, NewReader(here)
			go func() {
				there.Write([]byte("one and "))
				there.Write([]byte("two"))
				there.Close()
			}()
			var got bytes.Buffer
			var err error
			for err == nil {
				var buf *[]byte
				var n int
				if buf, n, err = r.ReadOnReady(5, pool); err != nil {
					if buf != nil || n != 0 {
						t.Errorf("an error, and %d bytes", n)
					}
					break
				}
				if n < 1 || n > 5 || len(*buf) != 5 {
					t.Fatalf("%d bytes in a buffer of %d", n, len(*buf))
				}
				got.Write((*buf)[:n])
				pool.Put(buf)
			}
			if got.String() != "one and two" || !errors.Is(err, io.EOF) {
				t.Errorf("read %q, then %v", got.String(), err)
			}
			if n := pool.out.Load(); n != 0 {
				t.Errorf("%d buffers are out", n)
			}
		})
	}
}

// Who waits holds no buffer, and a deadline or the end of the connection ends the wait.
func TestWaitHoldsNothing(t *testing.T) {
	for _, end := range []struct {
		name string
		do   func(here net.Conn)
		want error
	}{
		{"deadline", func(here net.Conn) { here.SetReadDeadline(time.Now().Add(-time.Second)) }, os.ErrDeadlineExceeded},
		{"closed here", func(here net.Conn) { here.Close() }, net.ErrClosed},
	} {
		t.Run(end.name, func(t *testing.T) {
			here, there := pairs[0].make(t)
			defer here.Close()
			defer there.Close()
			pool, r := &counted{taken: make(chan struct{}, 1)}, NewReader(here)
			ended := make(chan error, 1)
			go func() {
				_, _, err := r.ReadOnReady(5, pool)
				ended <- err
			}()
			<-pool.taken // it has looked once
			for limit := time.Now().Add(30 * time.Second); pool.out.Load() != 0; time.Sleep(time.Millisecond) {
				if time.Now().After(limit) {
					t.Fatal("a buffer is held while nothing comes")
				}
			}
			end.do(here)
			if err := <-ended; !errors.Is(err, end.want) {
				t.Errorf("ended with %v, want %v", err, end.want)
			}
			if n := pool.out.Load(); n != 0 {
				t.Errorf("%d buffers are out", n)
			}
		})
	}
}

func TestReset(t *testing.T) {
	here, there := pairs[0].make(t)
	defer there.Close()
	here.Close()
	pool := &counted{taken: make(chan struct{}, 1)}
	if buf, n, err := NewReader(here).ReadOnReady(5, pool); err == nil || buf != nil || n != 0 {
		t.Errorf("of a closed connection %d bytes were read: %v", n, err)
	}
	if n := pool.out.Load(); n != 0 {
		t.Errorf("%d buffers are out", n)
	}
}
