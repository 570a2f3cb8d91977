package agent

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

// noteRefusal is TLS that notes where the CA has refused what was shown to it. In TLS 1.3 a client learns that only with its first
// read (RFC 8446 section 4.4.2.4), by an alert; for gRPC it is a connection that broke, like any other.
type noteRefusal struct {
	credentials.TransportCredentials
	refused *atomic.Bool
}

// ClientHandshake implements credentials.TransportCredentials.
func (c noteRefusal) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return alertedConn{conn, c.refused}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (c noteRefusal) Clone() credentials.TransportCredentials {
	return noteRefusal{c.TransportCredentials.Clone(), c.refused}
}

// alertedConn notes an alert of the other side.
type alertedConn struct {
	net.Conn
	refused *atomic.Bool
}

// alertTime is for how long is read what the other side said before it closed the connection: it is there, or on its way.
const alertTime = 100 * time.Millisecond

// Write reads what the other side said, where the connection is broken already: gRPC would close it unread, and its reason with it.
func (c alertedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil && c.SetReadDeadline(time.Now().Add(alertTime)) == nil {
		c.Read(make([]byte, 1))
	}
	return n, err
}

func (c alertedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" { // as crypto/tls has it
		c.refused.Store(true)
	}
	return n, err
}
