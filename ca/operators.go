package ca

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/audit"
)

// The operators' port is where people come from elsewhere: TLS 1.3 with this replica's own SVID, and in each call either a
// token that the API server gave them for the role that they asked for, or a break-glass certificate. It is reached by a
// port-forward, so it sees everybody come from loopback and trusts nobody for it.

// PersonAttestor checks tokens of people. It is implemented by attestor.ServiceAccount.
type PersonAttestor interface {
	// AttestPerson is Attest for a token that is bound to nothing and lives at most api.MaxAdminTTL.
	AttestPerson(ctx context.Context, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error)
}

// OperatorRule says who the operators are. The zero rule knows none.
type OperatorRule struct {
	Attestor   PersonAttestor // of their tokens; nil: no token is taken
	Namespace  string         // of the three ServiceAccounts. Empty: signet-operators
	Issuers    []string       // whose tokens may operate this CA. Nil: those of the one cluster; where there are more it must be said
	BreakGlass []BreakGlass   // certificates that are taken; normally none is ever used
}

// BreakGlass is a client certificate for the day on which no token can be had.
type BreakGlass struct {
	Name        string // in its SPIFFE ID, /signet/admin/NAME
	Certificate *x509.Certificate
}

// MaxBreakGlassTTL is the longest life of a break-glass certificate: it is kept offline, and replaced with the calendar.
const MaxBreakGlassTTL = 2 * 366 * 24 * time.Hour

// NewBreakGlass checks that a certificate is one that may open the operators' port of td: self-signed, so that it does not
// die with an authority and no authority can make another one; for client authentication alone, with the one SPIFFE ID
// /signet/admin/NAME and a bounded life. Whether it has expired is asked at each call. The error has the reason
// ConfigInvalid.
func NewBreakGlass(c *x509.Certificate, td spiffeid.TrustDomain) (BreakGlass, error) {
	bad := func(format string, args ...any) (BreakGlass, error) {
		return BreakGlass{}, api.E(api.ConfigInvalid, "a break-glass certificate "+format, args...)
	}
	id, err := x509svid.IDFromCert(c)
	if err != nil {
		return bad("has no SPIFFE ID")
	}
	name, ok := api.AdminName(id, td)
	switch {
	case !ok:
		return bad("is for %.300q, which is not /signet/admin/NAME of this trust domain", id)
	case c.IsCA:
		return bad("is that of an authority")
	case !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) || c.KeyUsage != x509.KeyUsageDigitalSignature:
		return bad("is not for client authentication alone")
	case len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) > 0:
		return bad("has other names besides its SPIFFE ID")
	case c.NotAfter.Sub(c.NotBefore) > MaxBreakGlassTTL:
		return bad("lives more than two years")
	case c.PublicKeyAlgorithm != x509.ECDSA && c.PublicKeyAlgorithm != x509.Ed25519:
		return bad("has a key of another kind than ECDSA or Ed25519")
	case c.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) != nil:
		return bad("is not signed by its own key")
	}
	return BreakGlass{Name: name, Certificate: c}, nil
}

// Bounds of what callers of the operators' port may cost.
const (
	maxOperatorHeader = api.MaxTokenBytes + 8<<10 // so that a token above its bound is refused with a reason
	maxOperatorQueue  = 64                        // calls that wait for their token to be checked
	maxOperatorAsking = 8                         // of those, at an API server
	maxVerified       = 1024                      // tokens that are known to be good
	verifiedFor       = 30 * time.Second          // before they are looked at again: their ServiceAccount may be gone
)

// operators is what the operators' port knows of its callers.
type operators struct {
	work, ask *gate // of who has his token checked

	mu       sync.Mutex
	verified map[[sha256.Size]byte]verified // by the token's hash
	seen     map[string]time.Time           // credentials that are on record as used, until when they are good

	records chan operatorRecord
}

// operatorRecord is an entry of the ledger, for which somebody waits no longer than its ctx lasts.
type operatorRecord struct {
	ctx   context.Context
	entry audit.Entry
	done  chan<- error // of capacity 1
}

// verified is a token that was good a moment ago.
type verified struct {
	claims attestor.Claims
	until  time.Time
}

func newOperators() *operators {
	return &operators{
		work: newGate(runtime.GOMAXPROCS(0), maxOperatorQueue), ask: newGate(maxOperatorAsking, maxOperatorQueue),
		verified: map[[sha256.Size]byte]verified{}, seen: map[string]time.Time{}, records: make(chan operatorRecord),
	}
}

// NewOperatorsServer returns the gRPC server of the operators' port, with Admin registered on it. It wants TLS 1.3 with
// OperatorsTLS within; whoever may not call is told so in the call, with a reason, not in the handshake.
func (ca *CA) NewOperatorsServer(extra ...grpc.ServerOption) *grpc.Server {
	opts := slices.Concat([]grpc.ServerOption{
		grpc.Creds(operatorsTransport{credentials.NewTLS(ca.OperatorsTLS())}),
		grpc.MaxRecvMsgSize(maxAdminMessage),
		grpc.MaxHeaderListSize(maxOperatorHeader),
	}, portOptions(), interceptors{ca, portOperators}.options(),
		[]grpc.ServerOption{grpc.ForceServerCodecV2(newLookCodec(ca.lookers))}, extra)
	s := grpc.NewServer(opts...)
	apiv1.RegisterAdminServer(guarded{s, ca, portOperators}, &admin{ca: ca})
	return s
}

// OperatorsTLS returns the TLS configuration of the operators' port: that of the agents' port, but that a client
// certificate is not verified in the handshake, which only proves that its key is the caller's.
func (ca *CA) OperatorsTLS() *tls.Config {
	c := ca.ServerTLS()
	c.VerifyConnection = nil
	return c
}

// operatorsTransport is the TLS of the operators' port. Its AuthInfo is a type of its own: what reads the agents' port's
// believes its certificates.
type operatorsTransport struct {
	credentials.TransportCredentials
}

// operatorsInfo is what is known of a connection to the operators' port. Its certificates are not verified.
type operatorsInfo struct {
	credentials.CommonAuthInfo
	presented []*x509.Certificate
	raw       net.Conn
	conn      *lookConn
}

// AuthType implements credentials.AuthInfo.
func (operatorsInfo) AuthType() string { return "tls, certificates not verified" }

// ServerHandshake implements credentials.TransportCredentials.
func (t operatorsTransport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	looked := &lookConn{Conn: raw}
	conn, info, err := t.TransportCredentials.ServerHandshake(looked)
	if err != nil {
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		conn.Close()
		return nil, nil, fmt.Errorf("not TLS but %s", info.AuthType())
	}
	return conn, operatorsInfo{tlsInfo.CommonAuthInfo, tlsInfo.State.PeerCertificates, raw, looked}, nil
}

// Clone implements credentials.TransportCredentials.
func (t operatorsTransport) Clone() credentials.TransportCredentials {
	return operatorsTransport{t.TransportCredentials.Clone()}
}

// callerOfOperators returns who makes a call at the operators' port. An error says what is wrong with his token; with it he
// has a name only where the token is good and somebody else's.
func (ca *CA) callerOfOperators(ctx context.Context, now time.Time) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, api.E(api.OperatorRequired, "the call came without a connection")
	}
	info, ok := p.AuthInfo.(operatorsInfo)
	if !ok {
		return caller{}, api.E(api.OperatorRequired, "the call came without TLS")
	}
	var who caller
	var err error
	if len(info.presented) > 0 { // then it alone counts: an agent's SVID must open nothing, whatever comes with it
		who = ca.callerByCertificate(info.presented, now)
	} else if who, err = ca.callerByToken(ctx, info.conn, now); err != nil {
		return who, err
	}
	if a, ok := info.raw.(admitter); ok && len(who.roles) > 0 {
		a.Admit(who.name)
	}
	return who, nil
}

// callerByCertificate knows break-glass certificates, and says of others what they are.
func (ca *CA) callerByCertificate(presented []*x509.Certificate, now time.Time) caller {
	for _, b := range ca.cfg.Operators.BreakGlass {
		if !b.Certificate.Equal(presented[0]) {
			continue
		}
		who := caller{name: "break-glass:" + b.Name, glass: true}
		if now.Before(b.Certificate.NotBefore) || now.After(b.Certificate.NotAfter) {
			who.found = "the break-glass certificate has expired or is not valid yet"
			return who
		}
		who.roles = allRoles
		return who
	}
	who := caller{found: "the client certificate is none that this CA's configuration names"}
	if id, err := ca.verifyPeer(presented, now); err == nil {
		who = caller{found: "the client certificate is an SVID, which opens nothing here", id: id.String(), name: id.String()}
	}
	return who
}

var allRoles = []role{roleViewer, roleOperator, roleEmergency}

// rolesOf are the roles that the ServiceAccounts of the operators' namespace stand for, by name.
var rolesOf = map[string][]role{
	"viewer":    {roleViewer},
	"operator":  {roleViewer, roleOperator},
	"emergency": {roleViewer, roleOperator, roleEmergency},
}

// callerByToken knows the operators' ServiceAccounts.
func (ca *CA) callerByToken(ctx context.Context, conn *lookConn, now time.Time) (caller, error) {
	token, err := bearer(ctx)
	if err != nil {
		return caller{}, err
	}
	if ca.cfg.Operators.Attestor == nil {
		return caller{}, api.E(api.OperatorRequired, "this CA takes no tokens of operators")
	}
	c, err := ca.verifyToken(ctx, conn, token, now)
	if claimed, ok := attestor.ClaimedBy(err); ok && api.ReasonOf(err) == api.TokenBound {
		c = attestor.Claims{
			Issuer: claimed.Issuer, Namespace: claimed.Namespace, ServiceAccount: claimed.ServiceAccount, ServiceAccountUID: claimed.ServiceAccountUID,
			TokenID: claimed.TokenID,
		}
		return callerOfToken(c), err // somebody has taken it from a pod: that is to be on record
	}
	if err != nil {
		return caller{}, err
	}
	who := callerOfToken(c)
	who.roles, who.found = ca.rolesOfToken(c)
	return who, nil
}

// callerOfToken names whoever has a token. The issuer is part of the name: another cluster's ServiceAccount is somebody else,
// and so is whoever has the same jti.
func callerOfToken(c attestor.Claims) caller {
	return caller{name: fmt.Sprintf("sa:%s/%s jti:%s iss:%s", c.Namespace, c.ServiceAccount, c.TokenID, c.Issuer), token: c}
}

// rolesOfToken returns the roles of whoever has a good token, or why he has none.
func (ca *CA) rolesOfToken(c attestor.Claims) (roles []role, why string) {
	switch r := ca.cfg.Operators; {
	case r.Issuers != nil && !slices.Contains(r.Issuers, c.Issuer):
		return nil, "the token's cluster may not operate this CA"
	case c.Namespace != r.Namespace || rolesOf[c.ServiceAccount] == nil:
		return nil, "the token's ServiceAccount is not one of the operators'"
	}
	return rolesOf[c.ServiceAccount], ""
}

// bearer returns the one token of a call.
func bearer(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	switch len(values) {
	case 0:
		return "", api.E(api.TokenMissing, "the call has no authorization metadata")
	case 1:
	default:
		return "", api.E(api.TokenAmbiguous, "the call has %d tokens", len(values))
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	switch {
	case !ok || !strings.EqualFold(scheme, "bearer") || token == "":
		return "", api.E(api.TokenMalformed, "the authorization is not \"Bearer TOKEN\"")
	case len(token) > api.MaxTokenBytes:
		return "", api.E(api.TokenTooLarge, "the token is above %d bytes", api.MaxTokenBytes)
	}
	return token, nil
}

// verifyToken attests a token, in turn, unless it was good a moment ago.
func (ca *CA) verifyToken(ctx context.Context, conn *lookConn, token string, now time.Time) (attestor.Claims, error) {
	o, key := ca.people, sha256.Sum256([]byte(token))
	o.mu.Lock()
	v, ok := o.verified[key]
	o.mu.Unlock()
	if ok && now.Before(v.until) {
		return v.claims, nil
	}
	turn, err := o.work.take(ctx, fmt.Sprintf("%p", conn), o.ask) // all have one address; a crowd on one connection waits behind itself
	if err != nil {
		return attestor.Claims{}, err
	}
	defer turn.end()
	ctx = attestor.WithAside(ctx, turn.aside)
	// Whoever may use a ServiceAccount can have a token for this audience, so who is no operator is told so before an API
	// server is asked about him.
	var stranger attestor.Claims
	ctx = attestor.WithRefusal(ctx, func(c attestor.Claims) error {
		if _, why := ca.rolesOfToken(c); why != "" {
			stranger = c
			return api.E(api.OperatorRequired, "%s", why)
		}
		return nil
	})
	evidence := attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
	c, err := ca.cfg.Operators.Attestor.AttestPerson(ctx, evidence, api.AdminAudience(ca.cfg.TrustDomain), now)
	switch {
	case stranger.Issuer != "":
		return stranger, nil // a good token, that opens nothing
	case err != nil:
		return attestor.Claims{}, err
	}
	until := now.Add(verifiedFor)
	if c.ExpireAt.Before(until) {
		until = c.ExpireAt
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.verified) >= maxVerified {
		o.sweep(now)
	}
	if len(o.verified) < maxVerified { // or else it is checked each time
		o.verified[key] = verified{c, until}
	}
	return c, nil
}

// sweep forgets what is over; the caller holds mu.
func (o *operators) sweep(now time.Time) {
	for k, v := range o.verified {
		if !now.Before(v.until) {
			delete(o.verified, k)
		}
	}
	for k, until := range o.seen {
		if !now.Before(until) {
			delete(o.seen, k)
		}
	}
}

// first reports whether a credential is used for the first time, as far as this replica remembers.
func (o *operators) first(id string, until, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, ok := o.seen[id]; ok {
		return false
	}
	if len(o.seen) >= maxVerified {
		o.sweep(now)
	}
	if len(o.seen) < maxVerified { // or else it is on record each time
		o.seen[id] = until
	}
	return true
}

// forget takes back what first has said.
func (o *operators) forget(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.seen, id)
}

// recordOperator puts on record that an operator came in: a token once, a break-glass certificate at each call. Who only
// looks is let in even where nothing can be put on record, for he is to find out why; who would change something is not.
func (ca *CA) recordOperator(ctx context.Context, call string, who caller, needs role, now time.Time) error {
	e := audit.Entry{Time: now, Kind: audit.KindOperator, CorrelationID: api.NewCorrelationID(), Method: callName(call), Caller: who.name}
	if who.glass {
		ca.metrics.breakGlass.Inc()
		ca.log.WarnContext(ctx, "break-glass certificate used", "caller", who.name, "method", callName(call), "correlation_id", e.CorrelationID)
	} else {
		c := who.token
		e.Cluster, e.Namespace, e.ServiceAccount, e.ServiceAccountUID, e.TokenID = c.Issuer, c.Namespace, c.ServiceAccount, c.ServiceAccountUID, c.TokenID
		if !ca.people.first(who.name, c.ExpireAt, now) {
			return nil
		}
		ca.log.InfoContext(ctx, "operator", "caller", who.name, "method", callName(call), "correlation_id", e.CorrelationID)
	}
	ctx, cancel := context.WithTimeout(ctx, refuseTime)
	defer cancel()
	record := ca.cfg.Ledger.Append
	if needs == roleViewer {
		record = ca.recordLooker
	}
	err := record(ctx, e)
	if err == nil {
		return nil
	}
	ca.people.forget(who.name)
	if needs == roleViewer {
		ca.log.ErrorContext(ctx, "operator not recorded", "caller", who.name, "error", err)
		return nil
	}
	return unrecorded(err, "who operates the CA could not be put on record")
}

// recordLooker is Append of the ledger, but that it is over when ctx is: whoever leads a batch there waits for the disk
// however long that takes, and who only looks may have come to find out why it takes so long.
func (ca *CA) recordLooker(ctx context.Context, e audit.Entry) error {
	done := make(chan error, 1)
	select {
	case ca.people.records <- operatorRecord{ctx, e, done}:
	case <-ca.stopping:
		return api.E(api.CAUnavailable, "the CA is stopping")
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keepRecords writes what recordLooker is given, one after the other, until ctx ends.
func (ca *CA) keepRecords(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-ca.people.records:
			r.done <- ca.cfg.Ledger.Append(r.ctx, r.entry)
		}
	}
}
