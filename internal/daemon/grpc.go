package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-ca/signet/internal/run"
)

// graceTime is how long calls in flight may take when the process ends.
const graceTime = 5 * time.Second

// Serve returns the task that serves s on l until its context ends: then calls in flight are finished, for five seconds
// at most, and the listener is closed. What names the port in the log.
func Serve(what string, s *grpc.Server, l net.Listener, log *slog.Logger) run.Task {
	return run.Task{Name: what, Run: func(ctx context.Context) error {
		log.InfoContext(ctx, "serving", "what", what, "address", l.Addr().String())
		failed := make(chan error, 1)
		go func() { failed <- s.Serve(l) }()
		select {
		case err := <-failed:
			return err
		case <-ctx.Done():
		}
		force := time.AfterFunc(graceTime, s.Stop)
		defer force.Stop()
		s.GracefulStop()
		if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	}}
}
