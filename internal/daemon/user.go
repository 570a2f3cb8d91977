package daemon

import (
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// LocalUsers returns the credentials of a gRPC server on a Unix socket. They let everybody in and say which user the
// kernel saw connect, so that whoever may not call is told so with a reason; a connection that is not from a Unix socket
// is ended. Without TLS: the socket is the proof of identity, in both directions.
func LocalUsers() credentials.TransportCredentials {
	return localUsers{insecure.NewCredentials()}
}

type localUsers struct {
	credentials.TransportCredentials
}

// localUser is what is known of the other side.
type localUser struct {
	credentials.AuthInfo
	uid int
}

// UserID returns the user on the other side, as the kernel knows it.
func (u localUser) UserID() int { return u.uid }

// ServerHandshake implements credentials.TransportCredentials.
func (l localUsers) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	unix := raw
	if c, ok := raw.(*Conn); ok {
		unix = c.Conn
	}
	uid, err := peerUID(unix)
	if err != nil {
		return nil, nil, err
	}
	conn, info, err := l.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return conn, localUser{info, uid}, nil
}

// Clone implements credentials.TransportCredentials.
func (l localUsers) Clone() credentials.TransportCredentials {
	return localUsers{l.TransportCredentials.Clone()}
}
