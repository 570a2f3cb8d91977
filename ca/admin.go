package ca

import (
	"context"
	"crypto/x509"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/issuance"
)

// maxAdminMessage is the length of the largest message that is read at the admin socket.
const maxAdminMessage = 1 << 20

// NewAdminServer returns the gRPC server of the admin channel. The caller serves it on a Unix socket of mode 0600 and
// gives credentials whose AuthInfo is a LocalUser; with any other, every call is refused.
func (ca *CA) NewAdminServer(opts ...grpc.ServerOption) *grpc.Server {
	s := grpc.NewServer(slices.Concat([]grpc.ServerOption{
		grpc.ConnectionTimeout(handshakeTime),
		grpc.MaxRecvMsgSize(maxAdminMessage),
		grpc.WaitForHandlers(true),
	}, interceptors{ca, portAdmin}.options(), opts)...)
	apiv1.RegisterAdminServer(guarded{s, ca, portAdmin}, &admin{ca: ca})
	return s
}

// admin serves the operator's tool.
type admin struct {
	apiv1.UnimplementedAdminServer
	ca *CA
}

// GetStatus implements the call of that name.
func (a *admin) GetStatus(ctx context.Context, _ *apiv1.GetStatusRequest) (*apiv1.GetStatusResponse, error) {
	b, err := a.bundle()
	if err != nil {
		return nil, err
	}
	return &apiv1.GetStatusResponse{
		TrustDomain: b.TrustDomain.Name(),
		Replica:     a.ca.cfg.Replica,
		Version:     a.ca.cfg.Version,
		Epoch:       b.Generation.Epoch,
		Number:      b.Generation.Number,
		StartedAt:   timestamppb.New(a.ca.started),
		Agents:      uint32(a.ca.sessions.nodes()),
		Issued:      a.ca.issued.Load(),
		Refused:     a.ca.refused.Load(),
		NotReady:    a.ca.NotReady(),
		Caller:      admitted(ctx).name,
		Roles:       shortRoles(admitted(ctx).roles),

		Protocol:       a.ca.protocols.Newest,
		OldestProtocol: a.ca.protocols.Oldest,
		Upstream:       a.ca.upstreamStatus(),
	}, nil
}

// GetBundle implements the call of that name.
func (a *admin) GetBundle(context.Context, *apiv1.GetBundleRequest) (*apiv1.GetBundleResponse, error) {
	b, err := a.bundle()
	if err != nil {
		return nil, err
	}
	return &apiv1.GetBundleResponse{TrustDomain: b.TrustDomain.Name(), Bundle: bundleProto(b)}, nil
}

// ListAuthorities implements the call of that name.
func (a *admin) ListAuthorities(context.Context, *apiv1.ListAuthoritiesRequest) (*apiv1.ListAuthoritiesResponse, error) {
	b, err := a.bundle()
	if err != nil {
		return nil, err
	}
	resp := &apiv1.ListAuthoritiesResponse{TrustDomain: b.TrustDomain.Name()}
	for _, root := range a.ca.record.Load().Authorities {
		c, err := x509.ParseCertificate(root.Certificate)
		if err != nil {
			return nil, err
		}
		info := authorityInfo(c, "root", string(root.State))
		info.Parent = info.Id
		info.Upstream, info.KeySealed, info.Since = root.Upstream, len(root.SealedKey) > 0, root.Since
		info.CrossBy, info.CrossCertificate, info.CrossNotAfter = root.CrossBy, root.Cross, timeProto(crossEnd(root.Cross))
		t := root.Times
		info.PreparedAt, info.PublishedAt, info.ActiveAt = timeProto(t.Prepared), timeProto(t.Published), timeProto(t.Active)
		info.RetiringAt, info.TaintedAt = timeProto(t.Retiring), timeProto(t.Tainted)
		resp.Authorities = append(resp.Authorities, info)
	}
	if s := a.ca.signing.Load(); s != nil {
		info := authorityInfo(s.cert, "intermediate", "active")
		info.Parent, info.Replica = s.root, a.ca.cfg.Replica
		resp.Authorities = append(resp.Authorities, info)
	}
	for _, g := range a.ca.record.Load().Gone {
		resp.Gone = append(resp.Gone, &apiv1.GoneAuthority{Id: g.ID, Hash: g.Hash, At: timeProto(g.At), NotAfter: timeProto(g.NotAfter), Tainted: g.Tainted})
	}
	for _, c := range a.ca.announced() {
		resp.Announced = append(resp.Announced, authorityInfo(c, "root", "announced"))
	}
	return resp, nil
}

// ListSVIDs implements the call of that name.
func (a *admin) ListSVIDs(ctx context.Context, r *apiv1.ListSVIDsRequest) (*apiv1.ListSVIDsResponse, error) {
	return looked(ctx, a.ca, func() *apiv1.ListSVIDsResponse {
		return &apiv1.ListSVIDsResponse{Holdings: a.ca.listHoldings(r.GetNamespace(), r.GetSpiffeId())}
	})
}

func (a *admin) bundle() (*Bundle, error) {
	if b := a.ca.bundle.Load(); b != nil {
		return b, nil
	}
	return nil, api.E(api.CAUnavailable, "the CA is starting")
}

func authorityInfo(c *x509.Certificate, kind, state string) *apiv1.AuthorityInfo {
	return &apiv1.AuthorityInfo{
		Id:          hexID(c),
		Kind:        kind,
		State:       state,
		Subject:     c.Subject.String(),
		Key:         issuance.KeyName(c.PublicKey),
		NotBefore:   timestamppb.New(c.NotBefore),
		NotAfter:    timestamppb.New(c.NotAfter),
		Certificate: c.Raw,
	}
}
