package envoy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// SecretType is the type URL of what SDS delivers.
const SecretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Client takes secrets from an SDS server over its Unix socket the way Envoy does. Its zero value but Socket is usable;
// its methods may be called concurrently.
type Client struct {
	Socket string
	Node   string                 // node id; may be empty
	Token  func() (string, error) // called whenever a stream opens; nil: no token is sent
	Delta  bool                   // the incremental protocol instead of state of the world
}

// Watch opens one stream, subscribes to names and calls apply for each secret that comes. A response whose secrets were
// all applied is acknowledged; the first error of apply refuses it (NACK), and the stream goes on. Watch returns when the
// stream ends, with its error, which is a gRPC status.
func (c *Client) Watch(ctx context.Context, names []string, apply func(*tlsv3.Secret) error) error {
	conn, err := grpc.NewClient("unix:"+c.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a Unix socket in a folder of one user
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			// Without it, a server that is busy for the length of a backoff would count as gone.
			MinConnectTimeout: 20 * time.Second,
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx) // ends the stream on every way out
	defer cancel()
	if c.Token != nil {
		token, err := c.Token()
		if err != nil {
			return fmt.Errorf("token for a stream: %w", err)
		}
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	if c.Delta {
		return c.watchDelta(ctx, secretv3.NewSecretDiscoveryServiceClient(conn), names, apply)
	}
	return c.watchState(ctx, secretv3.NewSecretDiscoveryServiceClient(conn), names, apply)
}

func (c *Client) watchState(ctx context.Context, sds secretv3.SecretDiscoveryServiceClient, names []string, apply func(*tlsv3.Secret) error) error {
	stream, err := sds.StreamSecrets(ctx)
	if err != nil {
		return err
	}
	req := &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: c.Node}, TypeUrl: SecretType, ResourceNames: names}
	for {
		if err := stream.Send(req); err != nil {
			return recvError(stream, err)
		}
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		req.ResponseNonce, req.ErrorDetail = resp.GetNonce(), applyAll(resp.GetResources(), apply)
		if req.ErrorDetail == nil {
			req.VersionInfo = resp.GetVersionInfo() // a refusal names the version before
		}
	}
}

func (c *Client) watchDelta(ctx context.Context, sds secretv3.SecretDiscoveryServiceClient, names []string, apply func(*tlsv3.Secret) error) error {
	stream, err := sds.DeltaSecrets(ctx)
	if err != nil {
		return err
	}
	req := &discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: c.Node}, TypeUrl: SecretType, ResourceNamesSubscribe: names}
	for {
		if err := stream.Send(req); err != nil {
			return recvError(stream, err)
		}
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		secrets := make([]*anypb.Any, len(resp.GetResources()))
		for i, r := range resp.GetResources() {
			secrets[i] = r.GetResource()
		}
		req = &discoveryv3.DeltaDiscoveryRequest{TypeUrl: SecretType, ResponseNonce: resp.GetNonce(), ErrorDetail: applyAll(secrets, apply)}
	}
}

// recvError returns the status that ended a stream: Send itself only says io.EOF.
func recvError(stream grpc.ClientStream, sent error) error {
	if !errors.Is(sent, io.EOF) {
		return sent
	}
	for { // responses may have come before the status; whatever they are, they are too late
		if err := stream.RecvMsg(new(emptypb.Empty)); err != nil {
			return err
		}
	}
}

func applyAll(secrets []*anypb.Any, apply func(*tlsv3.Secret) error) *status.Status {
	for _, a := range secrets {
		var s tlsv3.Secret
		err := a.UnmarshalTo(&s)
		if err == nil {
			err = apply(&s)
		}
		if err != nil {
			return &status.Status{Code: int32(codes.InvalidArgument), Message: err.Error()}
		}
	}
	return nil
}
