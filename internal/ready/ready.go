// Package ready lets a gRPC server wait for what comes on a connection without holding a buffer for it meanwhile.
//
// A node has thousands of connections on which nothing comes for hours: Envoy opens one for each secret. gRPC does this by
// itself for the connections of package net alone, and ours are wrapped, because a connection that has no limits is never
// handed to it.
package ready

import (
	"errors"
	"io"
	"net"
	"syscall"

	"google.golang.org/grpc/mem"
)

// Reader reads from a connection once there is something to read. It is for one goroutine at a time.
type Reader struct {
	conn net.Conn
	raw  syscall.RawConn // nil where the connection has none, as those in memory
	read func(fd uintptr) bool

	// What a call of read is told and tells, here so that it allocates nothing.
	size int
	pool mem.BufferPool
	buf  *[]byte
	n    int
	err  error
}

// NewReader returns a Reader of c.
func NewReader(c net.Conn) *Reader {
	r := &Reader{conn: c}
	if s, ok := c.(syscall.Conn); ok {
		r.raw, _ = s.SyscallConn() // without it, as those that have none
	}
	r.read = r.try
	return r
}

// ReadOnReady waits until something has come, and only then takes a buffer of size bytes from pool and reads into it once.
// Where it returns no error there is a buffer with n bytes, which the caller gives back to the pool; with an error, which
// is io.EOF at the end, there is none. gRPC's server transport asks for it by this name.
func (r *Reader) ReadOnReady(size int, pool mem.BufferPool) (buf *[]byte, n int, err error) {
	if r.raw == nil {
		buf = pool.Get(size)
		if n, err = r.conn.Read(*buf); n == 0 {
			pool.Put(buf)
			return nil, 0, err
		}
		return buf, n, nil // an error comes again
	}
	r.size, r.pool = size, pool
	err = r.raw.Read(r.read)
	buf, n = r.buf, r.n
	if err == nil {
		err = r.err
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	r.pool, r.buf, r.n, r.err = nil, nil, 0, nil
	if err != nil {
		if buf != nil {
			pool.Put(buf)
		}
		return nil, 0, err
	}
	return buf, n, nil
}

// try reads once, and reports false where there is nothing to read yet.
func (r *Reader) try(fd uintptr) bool {
	r.buf = r.pool.Get(r.size)
	for {
		r.n, r.err = syscall.Read(int(fd), *r.buf)
		if !errors.Is(r.err, syscall.EINTR) {
			break
		}
	}
	if r.err == nil {
		return true
	}
	r.pool.Put(r.buf)
	r.buf, r.n = nil, 0
	return !errors.Is(r.err, syscall.EAGAIN)
}
