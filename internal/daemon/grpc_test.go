package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"
)

// TestServe ends a server with a stream in flight, in the fake time of a bubble.
func TestServe(t *testing.T) {
	tests := []struct {
		name    string
		handler grpc.StreamHandler
		want    codes.Code    // of the stream
		takes   time.Duration // from the end of the context to the end of the task
	}{
		{"finishes", func(_ any, s grpc.ServerStream) error {
			time.Sleep(2 * time.Second)
			return s.SendMsg(&emptypb.Empty{})
		}, codes.OK, 2 * time.Second},
		{"goes on", func(_ any, s grpc.ServerStream) error {
			<-s.Context().Done()
			return s.Context().Err()
		}, codes.Unavailable, 5 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := bufconn.Listen(1 << 16)
				server := grpc.NewServer(grpc.UnknownServiceHandler(tt.handler))
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- Serve("test", server, l, slog.New(slog.DiscardHandler)).Run(ctx) }()
				conn, err := grpc.NewClient("passthrough:///test",
					grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
					grpc.WithTransportCredentials(insecure.NewCredentials()))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/a/b")
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(stream.SendMsg(&emptypb.Empty{}), stream.CloseSend()); err != nil {
					t.Fatal(err)
				}
				synctest.Wait() // the handler runs
				start := time.Now()
				cancel()
				err = stream.RecvMsg(&emptypb.Empty{})
				if got := status.Code(err); got != tt.want {
					t.Errorf("the stream ended with %v, want %s", err, tt.want)
				}
				if err := <-ended; err != nil {
					t.Errorf("the task ended with %v", err)
				}
				if got := time.Since(start); got != tt.takes {
					t.Errorf("the end took %s, want %s", got, tt.takes)
				}
				if c, err := l.Dial(); err == nil {
					c.Close()
					t.Error("the listener is still open")
				}
			})
		})
	}
}

func TestServeEnds(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	t.Run("before it began", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		l := bufconn.Listen(1)
		if err := Serve("test", grpc.NewServer(), l, log).Run(ctx); err != nil {
			t.Error(err)
		}
		if c, err := l.Dial(); err == nil {
			c.Close()
			t.Error("the listener is still open")
		}
	})
	t.Run("listener fails", func(t *testing.T) {
		l := bufconn.Listen(1)
		l.Close()
		if err := Serve("test", grpc.NewServer(), l, log).Run(t.Context()); err == nil {
			t.Error("a server without a listener goes unnoticed")
		}
	})
}
