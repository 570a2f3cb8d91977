package daemon

import (
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// Plain returns the credentials of a gRPC server without TLS behind a Listener: calls can then ask by ConnOf over which
// connection they came.
func Plain() credentials.TransportCredentials {
	return plain{insecure.NewCredentials()}
}

type plain struct {
	credentials.TransportCredentials
}

// plainInfo is what is known of the other side: nothing but the connection.
type plainInfo struct {
	credentials.AuthInfo
	conn *Conn
}

// ServerHandshake implements credentials.TransportCredentials.
func (p plain) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := p.TransportCredentials.ServerHandshake(raw)
	if c, ok := raw.(*Conn); ok && err == nil {
		info = plainInfo{info, c}
	}
	return conn, info, err
}

// Clone implements credentials.TransportCredentials.
func (p plain) Clone() credentials.TransportCredentials { return plain{p.TransportCredentials.Clone()} }
