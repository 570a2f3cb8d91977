package workloadapi

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"

	"github.com/signet-ca/signet/api"
)

// The header that every call has to carry (SPIFFE Workload Endpoint section 3): who can make a service open a connection
// for him can rarely choose its gRPC metadata too.
const (
	headerName  = "workload.spiffe.io"
	headerValue = "true"
)

// Register makes g serve the Workload API, and reflection of all that g serves (gRPC's v1; SPIFFE Workload Endpoint section
// 7). Whoever makes g sets its message size, its streams per connection and its keepalive, which a Server cannot reach, and
// registers no decompressor; Serve does all of that.
//
// The handlers that are registered are not those that were generated: here a call is looked at before its request is read,
// and no request is read at all. Those of the calls that are served have no fields, so to open the call is to ask.
func (s *Server) Register(g reflection.GRPCServer) {
	g.RegisterService(s.service(), nil)
	reflection.RegisterV1(supervised{g, s})
}

// service describes the Workload API with handlers of our own. It is never extended (section 7), and of what go-spiffe
// knows of it, all that is not served here is refused by name.
func (s *Server) service() *grpc.ServiceDesc {
	d := workload.SpiffeWorkloadAPI_ServiceDesc
	d.HandlerType = nil
	d.Methods, d.Streams = slices.Clone(d.Methods), slices.Clone(d.Streams)
	for i := range d.Methods {
		m := &d.Methods[i]
		name := m.MethodName
		m.Handler = func(_ any, ctx context.Context, _ func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			return nil, s.reject(ctx, name)
		}
	}
	for i := range d.Streams {
		m := &d.Streams[i]
		name := m.StreamName
		switch name {
		case CallSVID:
			m.Handler = s.handler(name, func(m *material) *response { return m.svids })
		case CallBundles:
			m.Handler = s.handler(name, func(m *material) *response { return m.bundles })
		default:
			m.Handler = func(_ any, wire grpc.ServerStream) error { return s.reject(wire.Context(), name) }
		}
	}
	return &d
}

// handler serves a call that streams what pick chooses.
func (s *Server) handler(call string, pick func(*material) *response) grpc.StreamHandler {
	return func(_ any, wire grpc.ServerStream) error {
		return s.shield(call, func() error {
			if err := checkHeader(wire.Context()); err != nil {
				return s.refuse(call, err)
			}
			return s.supervise(wire, call, func(st *stream) error { return st.follow(pick) })
		})
	}
}

// reject answers a call that is not served.
func (s *Server) reject(ctx context.Context, call string) error {
	return s.shield(call, func() error {
		err := checkHeader(ctx)
		switch {
		case err != nil:
		case strings.Contains(call, "JWT"):
			err = api.E(api.ProfileNotServed, "JWT-SVIDs come with a later version; X.509-SVIDs are served")
		default:
			err = api.E(api.ProfileNotServed, "this kind of SVID is not served; X.509-SVIDs are")
		}
		return s.refuse(call, err)
	})
}

// shield contains what panics outside of a stream's own life, in a hook say. Errors of the calls are statuses already.
func (s *Server) shield(call string, f func() error) error {
	err := contain(f)
	if e, ok := errors.AsType[*api.Error](err); ok {
		_, err = s.explain("call ended", call, 0, e)
	}
	return err
}

func checkHeader(ctx context.Context) error {
	if v := metadata.ValueFromIncomingContext(ctx, headerName); len(v) != 1 || v[0] != headerValue {
		return api.E(api.HeaderMissing, "the metadata %s: %s is required, once", headerName, headerValue)
	}
	return nil
}

// supervised registers services whose streams count and end like those of the Workload API, but live no longer than its
// clients may take for anything: reflection answers in an instant. They need no header: they hold nothing of a workload.
type supervised struct {
	reflection.GRPCServer
	srv *Server
}

// RegisterService implements grpc.ServiceRegistrar.
func (g supervised) RegisterService(d *grpc.ServiceDesc, impl any) {
	c := *d
	c.Streams = slices.Clone(d.Streams)
	for i := range c.Streams {
		m := &c.Streams[i]
		name, handle := m.StreamName, m.Handler
		m.Handler = func(impl any, wire grpc.ServerStream) error {
			return g.srv.shield(name, func() error {
				return g.srv.supervise(wire, name, func(st *stream) error {
					st.expect(api.E(api.DeadlineExceeded, "the call took longer than %s", g.srv.cfg.Timeout))
					if err := handle(impl, wire); err != nil {
						return passed{err}
					}
					return nil
				})
			})
		}
	}
	g.GRPCServer.RegisterService(&c, impl)
}
