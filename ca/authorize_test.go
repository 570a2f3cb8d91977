package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

var update = flag.Bool("update", false, "write docs/authorization.md instead of comparing it")

// mayCall says again, apart from the table that is enforced, what a caller has to be.
var mayCall = map[string]string{
	"signet.v1.Authority/AttestAgent":                          "anyone",
	"signet.v1.Authority/Session":                              "agent",
	"signet.v1.Authority/Issue":                                "agent with session",
	"signet.v1.Admin/GetStatus":                                "viewer",
	"signet.v1.Admin/GetBundle":                                "viewer",
	"signet.v1.Admin/ListAuthorities":                          "viewer",
	"signet.v1.Admin/ListSVIDs":                                "viewer",
	"signet.v1.Admin/ListAudit":                                "viewer",
	"signet.v1.Admin/ListNodes":                                "viewer",
	"signet.v1.Admin/BanNode":                                  "emergency",
	"signet.v1.Admin/AllowNode":                                "emergency",
	"signet.v1.Admin/PlanRotation":                             "viewer",
	"signet.v1.Admin/RotationStatus":                           "viewer",
	"signet.v1.Admin/WatchRotation":                            "viewer",
	"signet.v1.Admin/StartRotation":                            "operator",
	"signet.v1.Admin/ExcuseRotation":                           "operator",
	"signet.v1.Admin/UnexcuseRotation":                         "operator",
	"signet.v1.Admin/AbortRotation":                            "operator",
	"signet.v1.Admin/RollbackRotation":                         "operator",
	"signet.v1.Admin/EmergencyRotation":                        "emergency",
	"signet.v1.Admin/ForceStep":                                "emergency",
	"signet.v1.Admin/Backup":                                   "emergency",
	"grpc.health.v1.Health/Check":                              "anyone",
	"grpc.health.v1.Health/List":                               "agent",
	"grpc.health.v1.Health/Watch":                              "agent",
	"signet.v1.Authority/NotThere":                             "nobody",
	"signet.v1.Admin/NotThere":                                 "nobody",
	"grpc.health.v1.Health/NotThere":                           "nobody",
	"grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "nobody",
}

// afterwards is what a handler says of an empty message, so that it is known to have been asked; nothing: it answers.
var afterwards = map[string]api.Reason{
	"signet.v1.Authority/AttestAgent": api.ProtocolSkew,
	"signet.v1.Authority/Session":     api.SessionProtocol,
	"signet.v1.Authority/Issue":       api.BatchSize,
	"signet.v1.Admin/BanNode":         api.NotFound,
	"signet.v1.Admin/AllowNode":       api.NotFound,

	"signet.v1.Admin/StartRotation":     api.RotationInvalid,
	"signet.v1.Admin/ExcuseRotation":    api.RotationInvalid,
	"signet.v1.Admin/AbortRotation":     api.RotationInvalid,
	"signet.v1.Admin/RollbackRotation":  api.RotationInvalid,
	"signet.v1.Admin/EmergencyRotation": api.RotationInvalid,
	"signet.v1.Admin/ForceStep":         api.RotationOver,
	"signet.v1.Admin/Backup":            api.NotFound, // the test's CA makes none
}

// A visitor is one kind of caller.
type visitor struct {
	name string
	is   []string // what he is, in the words of mayCall
	conn *grpc.ClientConn

	token string     // an operator's
	none  api.Reason // what he hears at the operators' port who has no role there
}

const (
	transport = "the handshake" // who refuses him, when it is not the table
	served    = "yes"
)

// want is what a visitor must hear of a call.
func (v visitor) want(call string) string {
	admin, operators := slices.Contains(v.is, "admin socket"), slices.Contains(v.is, "operators' port")
	switch {
	case slices.Contains(v.is, transport):
		return string(api.CAUnavailable)
	case mayCall[call] == "nobody" || (admin || operators) != strings.HasPrefix(call, "signet.v1.Admin/"):
		return string(api.CallUnknown)
	case slices.Contains(v.is, "banned"):
		return string(api.NodeBanned)
	case slices.Contains(v.is, mayCall[call]):
		return served
	case admin:
		return string(api.AdminForbidden)
	case operators && v.none != "":
		return string(v.none)
	case operators:
		return string(api.RoleRequired)
	case mayCall[call] == "agent with session" && slices.Contains(v.is, "agent"):
		return string(api.SessionRequired)
	}
	return string(api.AgentIdentityRequired)
}

// hears makes the call with an empty message and returns what came of it.
func (v visitor) hears(t *testing.T, call string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if v.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, bearerOf(v.token)...)
	}
	stream, err := v.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/"+call)
	if err == nil {
		if err = stream.SendMsg(&emptypb.Empty{}); err == nil || err == io.EOF {
			stream.CloseSend() // what is wrong with the stream, RecvMsg says
			err = stream.RecvMsg(&emptypb.Empty{})
		}
	}
	reason := api.ReasonOf(api.FromStatus(err))
	switch {
	case err == nil, err == io.EOF, reason == afterwards[call]:
		return served
	case status.Code(err) == codes.Unimplemented && reason == api.Internal:
		return served // by a handler that is not written yet
	case status.Code(err) != reason.GRPC():
		t.Errorf("%s, %s: code %s with reason %s", v.name, call, status.Code(err), reason)
	}
	return string(reason)
}

// visitors of the agents' port.
func visitorsOf(t *testing.T, s *catest.Server) []visitor {
	t.Helper()
	ours, other := s.TD, spiffeid.RequireTrustDomainFromString("other.org")
	n, far, held := newNode(t, s, "node-1"), newNode(t, s, "node-2"), newNode(t, s, "node-3")
	key := newKey(t)
	web := n.item(s.Pod("shop", "web", "web", "node-1"))
	web.Csr = newCSR(t, key)
	l := n.session()
	issued, err := l.issue(web)
	if err != nil {
		t.Fatal(err)
	}
	self := s.CA().Self()
	replica := svidOf(t, self.Certificate, self.PrivateKey.(crypto.Signer))
	as := func(svid *x509svid.SVID) *grpc.ClientConn { return dial(t, s, svid) }
	banned := newNode(t, s, "node-banned")
	banned.session()
	if _, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "node-banned"}); err != nil {
		t.Fatal(api.FromStatus(err))
	}
	return []visitor{
		{name: "no certificate", is: []string{"anyone"}, conn: as(nil)},
		{name: "workload", is: []string{"anyone"}, conn: as(svidOf(t, issued.GetChain(), key))},
		{name: "agent without session", is: []string{"anyone", "agent"}, conn: as(held.svid)},
		{name: "agent with session", is: []string{"anyone", "agent", "agent with session"}, conn: as(n.svid)},
		{name: "agent of another node, with its session", is: []string{"anyone", "agent", "agent with session"}, conn: as(far.session().n.svid)},
		{name: "agent of a banned node", is: []string{"banned"}, conn: as(banned.svid)},
		{name: "the CA itself", is: []string{"anyone"}, conn: as(replica)},
		{name: "agent of a foreign trust domain", is: []string{transport}, conn: as(foreignSVID(t, other, spiffeid.RequireFromString("spiffe://other.org"+n.svid.ID.Path())))},
		{name: "agent under a foreign root of our name", is: []string{transport}, conn: as(foreignSVID(t, ours, n.svid.ID))},
	}
}

// adminVisitors of the admin channel, by what its credentials say of them. That the kernel says it is proven by
// cmd/signet-ca, with a real socket.
func adminVisitors(t *testing.T, s *catest.Server) []visitor {
	t.Helper()
	may := []string{"admin socket", "viewer", "operator", "emergency"}
	none := func(*testing.T) grpc.ServerOption { return grpc.EmptyServerOption{} }(t)
	return []visitor{
		{name: "root", is: may, conn: adminConn(t, s.CA(), catest.AsUser(0))},
		{name: "the CA's user", is: may, conn: adminConn(t, s.CA(), catest.AsUser(os.Geteuid()))},
		{name: "another user", is: may[:1], conn: adminConn(t, s.CA(), catest.AsUser(os.Geteuid()+1000))},
		{name: "a user whom nobody knows", is: may[:1], conn: adminConn(t, s.CA(), none)},
	}
}

// operatorsVisitors are those of the operators' port; svids are certificates that open nothing there, by whose they are.
func operatorsVisitors(t *testing.T, s *catest.Server, glass tls.Certificate, svids map[string]*tls.Certificate) []visitor {
	t.Helper()
	is := []string{"operators' port", "viewer", "operator", "emergency"}
	plain := operatorsConn(t, s, nil)
	person := func(namespace, account string) string { return s.Person(namespace, account, 10*time.Minute) }
	emergency := person(operatorsNS, "emergency")
	all := []visitor{
		{name: "no token", is: is[:1], conn: plain, none: api.TokenMissing},
		{name: "token of viewer", is: is[:2], conn: plain, token: person(operatorsNS, "viewer")},
		{name: "token of operator", is: is[:3], conn: plain, token: person(operatorsNS, "operator")},
		{name: "token of emergency", is: is, conn: plain, token: emergency},
		{name: "token of another ServiceAccount", is: is[:1], conn: plain, token: person(operatorsNS, "default"), none: api.OperatorRequired},
		{name: "token of emergency in another namespace", is: is[:1], conn: plain, token: person("shop", "emergency"), none: api.OperatorRequired},
		{name: "break-glass certificate", is: is, conn: operatorsConn(t, s, &glass)},
	}
	for _, whose := range slices.Sorted(maps.Keys(svids)) {
		all = append(all, visitor{name: whose + ", with a token of emergency", is: is[:1], conn: operatorsConn(t, s, svids[whose]), token: emergency, none: api.OperatorRequired})
	}
	return all
}

func adminConn(t *testing.T, c *ca.CA, option grpc.ServerOption) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := c.NewAdminServer(option)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l)
	}()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		<-done
	})
	return conn
}

// matrix asks every call of every visitor.
func matrix(t *testing.T, visitors []visitor) map[string]map[string]string {
	t.Helper()
	all := map[string]map[string]string{}
	for _, v := range visitors {
		all[v.name] = map[string]string{}
		for call := range mayCall {
			got := v.hears(t, call)
			all[v.name][call] = got
			if want := v.want(call); got != want {
				t.Errorf("%s, %s: %s, want %s", v.name, call, got, want)
			}
		}
	}
	return all
}

// expiredVisitors are agents whose SVID has expired. In fake time: who has to wait for it waits for nothing.
func expiredVisitors(t *testing.T) (names []string, all map[string]map[string]string) {
	t.Helper()
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, withHealth(catest.Options{}))
		n := newNode(t, s, "node-1")
		l := n.session()
		old := dial(t, s, n.svid)
		// A stream that stays keeps the connection from being given up for idle.
		watch, err := grpc_health_v1.NewHealthClient(old).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := watch.Recv(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour + time.Second)
		if err := l.end(); api.ReasonOf(err) != api.SessionEnded {
			t.Errorf("the session of an expired agent: %v", err)
		}
		visitors := []visitor{
			{name: "expired agent, old connection", is: []string{"anyone"}, conn: old},
			{name: "expired agent, new connection", is: []string{transport}, conn: dial(t, s, n.svid)},
		}
		names, all = []string{visitors[0].name, visitors[1].name}, matrix(t, visitors)
	})
	return names, all
}

// withHealth serves health beside the CA's own service, as signet-ca does.
func withHealth(o catest.Options) catest.Options {
	o.Services = func(s grpc.ServiceRegistrar) { grpc_health_v1.RegisterHealthServer(s, health.NewServer()) }
	return o
}

// TestAuthorization makes every call as every kind of caller, and writes what came of it into docs/authorization.md.
//
// threat: L21, CVE-2020-7955, CVE-2025-44005
func TestAuthorization(t *testing.T) {
	glass := catest.BreakGlass(t, spiffeTD(t, catest.TrustDomain), "safe-1")
	s := start(t, withHealth(catest.Options{Config: func(cfg *ca.Config) { cfg.Operators.BreakGlass = breakGlass(t, glass) }}))
	agents, admins := visitorsOf(t, s), adminVisitors(t, s)
	n := newNode(t, s, "node-4")
	operators := operatorsVisitors(t, s, glass, map[string]*tls.Certificate{"an agent's SVID": tlsOf(n.svid), "the CA's SVID": s.CA().Self()})
	all := matrix(t, slices.Concat(agents, admins, operators))
	expired, more := expiredVisitors(t)
	maps.Copy(all, more)

	var page bytes.Buffer
	page.WriteString("# Who may call what\n\n<!-- Made by `make generate` from the table in ca/authorize.go and from what callers were told in a test. -->\n\n" +
		"Every call has one row, and a call without one is refused. It is decided before any message of the call is read. The CA's\n" +
		"own user and root have every role of the admin socket. At the operators' port the ServiceAccount of a token says which\n" +
		"roles its bearer has: `viewer` one, `operator` two, `emergency` all three; docs/operators.md tells of it.\n\n| call | served at | who may |\n|---|---|---|\n")
	calls := map[string][]string{}
	for p := range ca.Permissions() {
		fmt.Fprintf(&page, "| `%s` | %s | %s |\n", p.Call, p.Port, p.Role)
		calls[p.Port] = append(calls[p.Port], p.Call)
	}
	names := func(visitors []visitor) (names []string) {
		for _, v := range visitors {
			names = append(names, v.name)
		}
		return names
	}
	section := func(title, port string, names []string) {
		fmt.Fprintf(&page, "\n## %s\n\n| caller |", title)
		for _, call := range calls[port] {
			fmt.Fprintf(&page, " %s |", call[strings.LastIndex(call, "/")+1:])
		}
		fmt.Fprintf(&page, " all else |\n|---|%s---|\n", strings.Repeat("---|", len(calls[port])))
		for _, name := range names {
			fmt.Fprintf(&page, "| %s |", name)
			for _, call := range slices.Concat(calls[port], []string{"signet.v1.Authority/NotThere"}) {
				fmt.Fprintf(&page, " %s |", all[name][call])
			}
			page.WriteByte('\n')
		}
	}
	section("Callers of the agents' port", "agents' port", slices.Concat(names(agents), expired))
	section("Callers of the admin socket", "admin socket", names(admins))
	section("Callers of the operators' port", "operators' port", names(operators))
	page.WriteString("\n`yes`: the call reaches its handler, which checks what is in it. `CA_UNAVAILABLE`: the handshake fails, so there is nobody to\ngive a reason.\n")
	const name = "../docs/authorization.md"
	if *update {
		if err := os.WriteFile(name, page.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, page.Bytes()) {
		t.Errorf("docs/authorization.md is stale: run `make generate` (%v)", err)
	}
}

// TestEveryCallHasARow asks gRPC which calls there are: each has a row, on the port that serves it, and each row has a
// call.
//
// threat: CVE-2025-44005
func TestEveryCallHasARow(t *testing.T) {
	s := start(t, withHealth(catest.Options{}))
	rows := map[[2]string]bool{}
	for p := range ca.Permissions() {
		rows[[2]string{p.Port, p.Call}] = true
		if mayCall[p.Call] == "" {
			t.Errorf("%s is not in this test", p.Call)
		}
	}
	agents := s.CA().NewServer()
	grpc_health_v1.RegisterHealthServer(s.CA().Guard(agents), health.NewServer())
	for port, server := range map[string]*grpc.Server{"agents' port": agents, "admin socket": s.CA().NewAdminServer(), "operators' port": s.CA().NewOperatorsServer()} {
		for service, info := range server.GetServiceInfo() {
			for _, m := range info.Methods {
				row := [2]string{port, service + "/" + m.Name}
				if !rows[row] {
					t.Errorf("%s is served at the %s without a row", row[1], port)
				}
				delete(rows, row)
			}
		}
	}
	for row := range rows {
		t.Errorf("the row of %s at the %s belongs to no call", row[1], row[0])
	}
}

// TestCallsWithoutRow refuses what was registered without a row, unary or stream, to whoever asks, and never asks its
// handler.
func TestCallsWithoutRow(t *testing.T) {
	asked := make(chan string, 8)
	desc := &grpc.ServiceDesc{
		ServiceName: "signet.v1.Later", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, dec func(any) error, inner grpc.UnaryServerInterceptor) (any, error) {
			in := &emptypb.Empty{}
			if err := dec(in); err != nil {
				return nil, err
			}
			return inner(ctx, in, &grpc.UnaryServerInfo{FullMethod: "/signet.v1.Later/Unary"}, func(context.Context, any) (any, error) {
				asked <- "unary"
				return in, nil
			})
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Stream", ServerStreams: true, ClientStreams: true, Handler: func(any, grpc.ServerStream) error {
			asked <- "stream"
			return nil
		}}},
	}
	s := start(t, catest.Options{Services: func(r grpc.ServiceRegistrar) { r.RegisterService(desc, nil) }})
	n := newNode(t, s, "node-1")
	n.session()
	v := visitor{name: "agent with session", conn: dial(t, s, n.svid)}
	for _, call := range []string{"signet.v1.Later/Unary", "signet.v1.Later/Stream"} {
		if got := v.hears(t, call); got != string(api.CallUnknown) {
			t.Errorf("%s: %s", call, got)
		}
	}
	select {
	case which := <-asked:
		t.Errorf("the handler of the %s call was asked", which)
	default:
	}
}

// TestDecidedBeforeMessages refuses who may not call without having read anything: the message is never sent.
//
// threat: J08
func TestDecidedBeforeMessages(t *testing.T) {
	s := start(t, catest.Options{})
	conn := dial(t, s, nil)
	for call, want := range map[string]api.Reason{
		apiv1.Authority_Issue_FullMethodName:   api.AgentIdentityRequired,
		apiv1.Authority_Session_FullMethodName: api.AgentIdentityRequired,
		apiv1.Admin_GetStatus_FullMethodName:   api.CallUnknown,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, call)
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, api.FromStatus(stream.RecvMsg(&emptypb.Empty{})), want)
		cancel()
	}
}
