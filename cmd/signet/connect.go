package main

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxAnswer bounds one answer of the CA; a listing of 100 000 SVIDs is about half of it.
const maxAnswer = 128 << 20

// A channel is a connection to the CA's admin service. It dials at the first request, and again after a break.
type channel struct {
	apiv1.AdminClient
	conn *grpc.ClientConn
	path string      // of the socket
	way  *clusterWay // nil: the socket

	mu      sync.Mutex
	dialErr error // of the last attempt, which gRPC reports only as text; guarded by mu
}

// connect prepares a channel to the CA that flags, environment or defaults name: by a socket of this machine, or through a
// cluster. The caller closes it.
func (a *app) connect() (*channel, error) {
	cluster, err := a.throughCluster()
	if err != nil {
		return nil, err
	}
	ch := &channel{path: a.socketPath()}
	if cluster {
		if ch.way, err = a.openWay(&a.operators); err != nil {
			return nil, err
		}
	}
	return openChannel(ch)
}

// openChannel completes a channel whose way is known.
func openChannel(ch *channel) (*channel, error) {
	options := []grpc.DialOption{
		// No TLS: the socket's permissions are the proof of identity, in both directions.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(ch.dial),
	}
	if ch.way != nil {
		options = []grpc.DialOption{
			grpc.WithTransportCredentials(credentials.NewTLS(ch.way.tls())),
			grpc.WithPerRPCCredentials(ch.way),
			grpc.WithContextDialer(ch.dialCluster),
		}
	}
	conn, err := grpc.NewClient("passthrough:///signet-ca", append(options,
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 2, MaxDelay: time.Second},
			// Without it, a CA that is busy for the length of a backoff would count as gone. --timeout bounds each request.
			MinConnectTimeout: time.Hour,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))...)
	if err != nil {
		return nil, err
	}
	ch.conn, ch.AdminClient = conn, apiv1.NewAdminClient(conn)
	return ch, nil
}

func (a *app) socketPath() string {
	path := a.socket
	if path == "" {
		path = a.getenv(socketEnv)
	}
	if path == "" {
		path = defaultSocket
	}
	if rest, ok := strings.CutPrefix(path, "unix:"); ok {
		path = strings.TrimPrefix(rest, "//")
	}
	return path
}

func (ch *channel) dial(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", ch.path)
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.dialErr = err
	return conn, err
}

func (ch *channel) dialCluster(ctx context.Context, _ string) (net.Conn, error) {
	conn, err := ch.way.dial(ctx)
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.dialErr = err
	return conn, err
}

// where tells people what is being spoken to.
func (ch *channel) where() string {
	if ch.way != nil {
		return ch.way.where()
	}
	return ch.path
}

// Close ends the connection.
func (ch *channel) Close() error {
	err := ch.conn.Close()
	if ch.way != nil {
		ch.way.close()
	}
	return err
}

// bounded returns the context of one request, which ends as --timeout says.
func (a *app) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if a.timeout > 0 {
		return context.WithTimeout(ctx, a.timeout)
	}
	return context.WithCancel(ctx)
}

// ask makes one request, bounded by --timeout, and turns what went wrong into a failure.
func ask[Q, R any](ctx context.Context, a *app, ch *channel, call func(context.Context, Q, ...grpc.CallOption) (R, error), req Q) (R, error) {
	ctx, cancel := a.bounded(ctx)
	defer cancel()
	resp, err := call(ctx, req)
	if err != nil {
		return resp, a.callFailed(ch, err)
	}
	return resp, nil
}

// once lets f use a channel of its own.
func once[R any](a *app, f func(*channel) (R, error)) (R, error) {
	ch, err := a.connect()
	if err != nil {
		var none R
		return none, err
	}
	defer ch.Close()
	return f(ch)
}

// callFailed says what an error of a request means to the one who typed the command.
func (a *app) callFailed(ch *channel, err error) error {
	f := &failure{err: api.AsError(api.FromStatus(err))}
	ch.mu.Lock()
	dialErr := ch.dialErr
	ch.mu.Unlock()
	if ch.way != nil {
		return a.clusterCallFailed(ch, f, dialErr)
	}
	switch {
	case f.err.Reason == api.DeadlineExceeded:
		f.err = api.Wrap(api.DeadlineExceeded, err, "the CA did not answer within "+a.timeout.String())
		f.why = "It listens at " + ch.path + " and is stopped, overloaded, or waits for its disk."
		f.next = "signet version --server --timeout 1m"
	case f.err.Reason == api.AdminForbidden:
		f.next, f.deaf = whoseSocket(ch.path), true
	case f.err.Reason != api.CAUnavailable || dialErr == nil:
	case errors.Is(dialErr, fs.ErrPermission):
		f.err = api.Wrap(api.AdminForbidden, dialErr, "this user may not open the CA's admin socket "+ch.path)
		f.next = whoseSocket(ch.path)
	default:
		f.err = api.Wrap(api.CAUnavailable, dialErr, "the CA cannot be reached at "+ch.path)
		f.why, f.next = whyNoConnection(dialErr), "signet-ca run, or name its socket: signet --socket PATH ..."
	}
	return f
}

// clusterCallFailed is callFailed where the CA is not reached by its socket.
func (a *app) clusterCallFailed(ch *channel, f *failure, dialErr error) error {
	if own, ok := errors.AsType[*failure](cmp.Or(ch.way.failure(), dialErr)); ok {
		return own
	}
	switch {
	case f.err.Reason == api.DeadlineExceeded:
		f.err = api.Wrap(api.DeadlineExceeded, f.err, "there was no answer from "+ch.where()+" within "+a.timeout.String())
		f.next = ch.way.f.signet("check")
	case f.err.Reason == api.CAUnavailable && dialErr != nil:
		f.err = api.Wrap(api.CAUnavailable, dialErr, "the CA cannot be reached at "+ch.where()+": "+brief(dialErr))
		f.next = ch.way.f.signet("check")
	case f.err.Reason == api.CAUnavailable && f.err.CorrelationID == "":
		f.err = api.Wrap(api.CAUnavailable, f.err, "the connection to "+ch.where()+" broke off: "+clip(f.err.Detail, maxFound))
		f.why = "The CA is ending, or has no SVID of its own to show: it makes none while it can put nothing on record. Its pod has another way in."
		f.next = ch.way.inside()
	case f.err.Reason == api.RoleRequired:
		for _, role := range operatorRoles {
			if strings.Contains(f.err.Detail, `"`+role+`", and`) {
				f.next = "signet --as-role " + role + " ..."
			}
		}
	case f.err.Reason == api.TokenAudience:
		f.why = "The CA is of another trust domain than its published bundle."
	}
	return f
}

func whoseSocket(path string) string {
	return "ls -ld " + path + "   # the owner is the user to run this as"
}

func whyNoConnection(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "There is no such socket: the CA does not run on this machine, or listens elsewhere."
	case errors.Is(err, syscall.ECONNREFUSED):
		return "The file is there and nobody listens: the CA has stopped."
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	return "The system says: " + err.Error() + "."
}
