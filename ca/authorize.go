package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
)

// Who may call what is decided here and nowhere else: by one table, before the handler and before any message of the call
// is read. A call without a row is refused, so that a new one is closed until somebody has thought about it.

// A role is what a caller can be. A caller may have several; a row of the table names the one that the call takes.
type role string

// The roles. What a port can know of a caller decides which of them he can have there.
const (
	roleAnyone    role = "anyone"              // nobody is known
	roleAgent     role = "agent"               // an SVID of an agent of this trust domain, valid now
	roleSession   role = "agent with session"  // and a live session, opened with that very certificate
	roleViewer    role = "viewer"              // may look
	roleOperator  role = "operator"            // may change what can be changed back
	roleEmergency role = "emergency responder" // may do what is meant for an incident
)

// A port is where a call came in. A service is answered on its own port only.
type port string

// The ports.
const (
	portAgents    port = "agents' port"
	portAdmin     port = "admin socket"
	portOperators port = "operators' port"
)

type permission struct {
	ports []port
	role  role
}

// Where a call is served.
var (
	agentsOnly = []port{portAgents}
	adminPorts = []port{portAdmin, portOperators}
)

// permissions has a row for each call that is served, by its full name.
var permissions = map[string]permission{
	apiv1.Authority_AttestAgent_FullMethodName: {agentsOnly, roleAnyone}, // the token within is the proof
	apiv1.Authority_Session_FullMethodName:     {agentsOnly, roleAgent},  // its first message ties it to a node of one cluster
	apiv1.Authority_Issue_FullMethodName:       {agentsOnly, roleSession},

	apiv1.Admin_GetStatus_FullMethodName:       {adminPorts, roleViewer},
	apiv1.Admin_GetBundle_FullMethodName:       {adminPorts, roleViewer},
	apiv1.Admin_ListAuthorities_FullMethodName: {adminPorts, roleViewer},
	apiv1.Admin_ListSVIDs_FullMethodName:       {adminPorts, roleViewer},
	apiv1.Admin_ListAudit_FullMethodName:       {adminPorts, roleViewer},
	apiv1.Admin_ListNodes_FullMethodName:       {adminPorts, roleViewer},
	apiv1.Admin_BanNode_FullMethodName:         {adminPorts, roleEmergency},
	apiv1.Admin_AllowNode_FullMethodName:       {adminPorts, roleEmergency},

	apiv1.Admin_PlanRotation_FullMethodName:      {adminPorts, roleViewer},
	apiv1.Admin_RotationStatus_FullMethodName:    {adminPorts, roleViewer},
	apiv1.Admin_WatchRotation_FullMethodName:     {adminPorts, roleViewer},
	apiv1.Admin_StartRotation_FullMethodName:     {adminPorts, roleOperator},
	apiv1.Admin_ExcuseRotation_FullMethodName:    {adminPorts, roleOperator},
	apiv1.Admin_UnexcuseRotation_FullMethodName:  {adminPorts, roleOperator},
	apiv1.Admin_AbortRotation_FullMethodName:     {adminPorts, roleOperator},
	apiv1.Admin_RollbackRotation_FullMethodName:  {adminPorts, roleOperator},
	apiv1.Admin_EmergencyRotation_FullMethodName: {adminPorts, roleEmergency}, // nobody trusts that root again
	apiv1.Admin_Backup_FullMethodName:            {adminPorts, roleEmergency}, // sealed, but whoever has the seal key as well is the CA
	apiv1.Admin_ForceStep_FullMethodName:         {adminPorts, roleEmergency}, // over somebody's head, who may lose his peers

	// Probes have no identity. What would stay open is for those who have one.
	grpc_health_v1.Health_Check_FullMethodName: {agentsOnly, roleAnyone},
	grpc_health_v1.Health_List_FullMethodName:  {agentsOnly, roleAgent},
	grpc_health_v1.Health_Watch_FullMethodName: {agentsOnly, roleAgent},
}

// callName is how a call is named on record and in the log. One without a row is named by whoever makes it, as he likes, and
// a new name would be a new entry each time: so it has none.
func callName(call string) string {
	if _, ok := permissions[call]; !ok {
		return "unknown"
	}
	return path.Base(call)
}

// Permission is one row of the table of who may call what, as people read it: who may at one port.
type Permission struct{ Call, Port, Role string }

// Permissions yields the table, sorted by port and call.
func Permissions() iter.Seq[Permission] {
	return func(yield func(Permission) bool) {
		for _, at := range []port{portAgents, portAdmin, portOperators} {
			for _, call := range slices.Sorted(maps.Keys(permissions)) {
				p := permissions[call]
				if slices.Contains(p.ports, at) && !yield(Permission{strings.TrimPrefix(call, "/"), string(at), string(p.role)}) {
					return
				}
			}
		}
	}
}

// LocalUser is what the credentials of the admin channel say of a caller. A channel whose credentials say nothing of the
// kind lets nobody in.
type LocalUser interface {
	credentials.AuthInfo
	UserID() int // as the kernel knows it, never as the caller says
}

// caller is who makes a call, as far as its connection proves it.
type caller struct {
	roles []role
	found string              // what was found, for a refusal: lower case, without a name
	id    string              // the verified SPIFFE ID, whatever it may do here; empty where there is none
	node  string              // UID of the agent's node; empty for others
	leaf  *x509.Certificate   // the agent's; nil for others
	chain []*x509.Certificate // what he showed, leaf first; nil for others
	asker asker               // with roleSession

	name  string          // as the record tells of an operator: "uid:", a user; "sa:", NAMESPACE/NAME, the token's id and its issuer; "break-glass:", a name
	token attestor.Claims // an operator's
	glass bool            // he came by a break-glass certificate
}

// admission is the decision about one call.
type admission struct {
	call string
	caller
}

type (
	admissionKey struct{}
	refusedKey   struct{}
)

// admitted returns who makes the call that ctx belongs to. Where nothing was decided it is nobody.
func admitted(ctx context.Context) caller {
	a, _ := ctx.Value(admissionKey{}).(*admission)
	if a == nil {
		return caller{}
	}
	return a.caller
}

// admit decides whether a call may be made, and returns the context in which it goes on.
func (ca *CA) admit(ctx context.Context, at port, call string) (context.Context, error) {
	if a, _ := ctx.Value(admissionKey{}).(*admission); a != nil && a.call == call {
		return ctx, nil // decided before its first message was read
	}
	p, ok := permissions[call]
	if !ok || !slices.Contains(p.ports, at) {
		return ctx, api.E(api.CallUnknown, "this call is not served at the %s", at)
	}
	var who caller
	var err error
	switch at {
	case portAgents:
		who, err = ca.callerByTLS(ctx, p.role, time.Now())
	case portAdmin:
		who, err = callerByUser(ctx)
	case portOperators:
		who, err = ca.callerOfOperators(ctx, time.Now())
	}
	if err == nil && who.node != "" {
		err = ca.refuseBannedAgent(who.node)
	}
	if err != nil {
		return context.WithValue(ctx, refusedKey{}, who), err
	}
	if !slices.Contains(who.roles, p.role) {
		ctx = context.WithValue(ctx, refusedKey{}, who)
		switch {
		case at == portAdmin:
			return ctx, api.E(api.AdminForbidden, "%s", who.found)
		case at == portOperators && len(who.roles) == 0:
			return ctx, api.E(api.OperatorRequired, "%s", who.found)
		case at == portOperators:
			return ctx, api.E(api.RoleRequired, "this takes the role %q, and the caller's are %q", p.role.short(), shortRoles(who.roles))
		}
		return ctx, api.E(api.AgentIdentityRequired, "%s", who.found)
	}
	if at == portOperators {
		if err := ca.recordOperator(ctx, call, who, p.role, time.Now()); err != nil {
			return context.WithValue(ctx, refusedKey{}, who), err
		}
	}
	return context.WithValue(ctx, admissionKey{}, &admission{call, who}), nil
}

// callerByTLS returns who is on the other side of the agents' port. The chain was verified in the handshake; its time is
// checked again, for a connection may outlive it. A session is looked for where wanted is about one.
func (ca *CA) callerByTLS(ctx context.Context, wanted role, now time.Time) (caller, error) {
	nobody := func(found string) (caller, error) { return caller{roles: []role{roleAnyone}, found: found}, nil }
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nobody("the call came without a connection")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nobody("the call came without a client certificate")
	}
	leaf := info.State.PeerCertificates[0]
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return nobody("the client certificate has no SPIFFE ID")
	}
	if !now.Before(leaf.NotAfter) {
		return nobody("the client's SVID has expired")
	}
	uid, ok := api.NodeUID(id, ca.cfg.TrustDomain)
	if !ok {
		found := "the client certificate is not that of an agent of this trust domain"
		return caller{roles: []role{roleAnyone}, found: found, id: id.String()}, nil
	}
	who := caller{roles: []role{roleAnyone, roleAgent}, id: id.String(), node: uid, leaf: leaf, chain: info.State.PeerCertificates}
	if wanted == roleSession {
		if err := ca.refuseBannedAgent(uid); err != nil {
			return caller{}, err
		}
		if who.asker, err = ca.sessions.asker(uid, leaf); err != nil {
			return caller{}, err
		}
		who.roles = append(who.roles, roleSession)
	}
	return who, nil
}

// callerByUser returns who is on the other side of the admin socket. The CA's own user and root may do everything that
// has a row; a narrower role needs a caller who is told apart by more than his user.
func callerByUser(ctx context.Context) (caller, error) {
	user, ok := localUser(ctx)
	if !ok {
		return caller{found: "the connection does not tell which user is on its other side"}, nil
	}
	if uid := user.UserID(); uid != 0 && uid != os.Geteuid() {
		return caller{found: "the caller is neither the user who runs the CA nor root"}, nil
	}
	return caller{roles: allRoles, name: fmt.Sprint("uid:", user.UserID())}, nil
}

// short is the name of an operator's role as he types it.
func (r role) short() string {
	if r == roleEmergency {
		return "emergency"
	}
	return string(r)
}

func shortRoles(roles []role) (all []string) {
	for _, r := range roles {
		all = append(all, r.short())
	}
	return all
}

// refusedCaller returns who was refused in the call that ctx belongs to, as far as he is an operator, or tried to be.
func refusedCaller(ctx context.Context) (caller, bool) {
	who, ok := ctx.Value(refusedKey{}).(caller)
	return who, ok && who.name != ""
}

// Guard returns what services are to be registered with that stand beside Authority on the server of the agents' port: it
// makes their calls as well guarded as its own.
func (ca *CA) Guard(s *grpc.Server) grpc.ServiceRegistrar { return guarded{s, ca, portAgents} }

// localUser returns what the credentials of the admin channel say of a caller, if he came by one.
func localUser(ctx context.Context) (LocalUser, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	user, ok := p.AuthInfo.(LocalUser)
	return user, ok
}

// guarded registers services so that a call is decided about before its first message is read, and that a message which
// is none is refused like all else: the interceptor of a unary call runs only after that.
type guarded struct {
	*grpc.Server
	ca *CA
	at port
}

// RegisterService implements grpc.ServiceRegistrar.
func (g guarded) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods = slices.Clone(d.Methods)
	for i := range d.Methods {
		m := &d.Methods[i]
		call, next := "/"+d.ServiceName+"/"+m.MethodName, m.Handler
		m.Handler = func(srv any, ctx context.Context, dec func(any) error, inner grpc.UnaryServerInterceptor) (any, error) {
			ctx, err := g.ca.admit(ctx, g.at, call)
			if err != nil {
				return nil, g.ca.boundary(ctx, call, err, nil)
			}
			return next(srv, ctx, func(m any) error { return g.receive(ctx, call, m, dec) }, inner)
		}
	}
	g.Server.RegisterService(&d, impl)
}

// receive reads the message of a unary call, within the boundary of its own.
func (g guarded) receive(ctx context.Context, call string, m any, dec func(any) error) (err error) {
	defer func() { err = g.ca.boundary(ctx, call, err, recover()) }()
	return api.ReceiveOnly(ctx, m, g.at.maxMessage(), dec)
}

// maxMessage is the length of the largest message that is read at a port.
func (p port) maxMessage() int {
	if p == portAgents {
		return maxMessage
	}
	return maxAdminMessage
}

// interceptors decide about the calls of one port and are its boundary.
type interceptors struct {
	ca *CA
	at port
}

func (i interceptors) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(api.ServerCodec()),
		grpc.UnaryInterceptor(i.unary),
		grpc.StreamInterceptor(i.stream),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { // admit has refused it
			return api.E(api.CallUnknown, "this call is not served at the %s", i.at)
		}),
	}
}

// unary is the boundary of single calls: it contains panics, and every error leaves with its reason and correlation id.
func (i interceptors) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() { err = i.ca.boundary(ctx, info.FullMethod, err, recover()) }()
	ctx, err = i.ca.admit(ctx, i.at, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// stream is the boundary of streams.
func (i interceptors) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	ctx := ss.Context()
	defer func() { err = i.ca.boundary(ctx, info.FullMethod, err, recover()) }()
	ctx, err = i.ca.admit(ctx, i.at, info.FullMethod)
	if err != nil {
		return err
	}
	if who := admitted(ctx); who.node != "" {
		following, done := i.ca.follow(ctx, who.node)
		defer func() {
			if why, ok := errors.AsType[*api.Error](context.Cause(following)); ok {
				err = why // whatever the handler made of its end
			}
			done()
		}()
		ctx = following
	}
	receive := api.Receive
	if !info.IsClientStream {
		receive = api.ReceiveOnly
	}
	return next(srv, admittedStream{ss, ctx, func(m any) error { return receive(ctx, m, i.at.maxMessage(), ss.RecvMsg) }})
}

// admittedStream is a stream whose context knows who opened it, and whose messages are refused like all else if they are
// none.
type admittedStream struct {
	grpc.ServerStream
	ctx     context.Context
	receive func(m any) error
}

// Context implements grpc.ServerStream.
func (s admittedStream) Context() context.Context { return s.ctx }

// RecvMsg implements grpc.ServerStream.
func (s admittedStream) RecvMsg(m any) error { return s.receive(m) }
