package sds

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/api"
)

// A codec is one of the two streaming protocols: how its requests read and how its responses are written.
type codec[Req, Resp any] struct {
	protocol string
	node     func(*Req) *core.Node
	decode   func(*Req) (ask, error)
	encode   func(*response) *Resp
}

// sotw is the state-of-the-world protocol. A response holds only the secrets that are new on its stream: of all types
// but listeners and clusters, a client keeps what a response leaves out (xDS protocol, "Grouping Resources into
// Responses"), and to repeat a key that has not changed would only make the proxy build its TLS context again.
var sotw = codec[discovery.DiscoveryRequest, discovery.DiscoveryResponse]{
	protocol: ProtocolSotW,
	node:     (*discovery.DiscoveryRequest).GetNode,
	decode: func(r *discovery.DiscoveryRequest) (ask, error) {
		a := ask{
			nonce: r.GetResponseNonce(), refused: r.GetErrorDetail() != nil, because: r.GetErrorDetail().GetMessage(),
			whole: true, subscribe: r.GetResourceNames(),
		}
		return a, checkRequest(r.GetTypeUrl(), len(r.GetResourceLocators()))
	},
	encode: func(r *response) *discovery.DiscoveryResponse {
		resp := &discovery.DiscoveryResponse{
			VersionInfo: r.version, Nonce: r.nonce, TypeUrl: TypeURL, Resources: make([]*anypb.Any, len(r.secrets)),
		}
		for i, e := range r.secrets {
			resp.Resources[i] = e.resource.Resource
		}
		return resp
	},
}

// delta is the incremental protocol. removed_resources is never set: a secret is never withdrawn before its successor
// is there, and a name that belongs to somebody else is left out without a word.
var delta = codec[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]{
	protocol: ProtocolDelta,
	node:     (*discovery.DeltaDiscoveryRequest).GetNode,
	decode: func(r *discovery.DeltaDiscoveryRequest) (ask, error) {
		a := ask{
			nonce: r.GetResponseNonce(), refused: r.GetErrorDetail() != nil, because: r.GetErrorDetail().GetMessage(),
			subscribe: r.GetResourceNamesSubscribe(), drop: r.GetResourceNamesUnsubscribe(), held: r.GetInitialResourceVersions(),
		}
		return a, checkRequest(r.GetTypeUrl(), len(r.GetResourceLocatorsSubscribe())+len(r.GetResourceLocatorsUnsubscribe()))
	},
	encode: func(r *response) *discovery.DeltaDiscoveryResponse {
		resp := &discovery.DeltaDiscoveryResponse{
			SystemVersionInfo: r.version, Nonce: r.nonce, TypeUrl: TypeURL, Resources: make([]*discovery.Resource, len(r.secrets)),
		}
		for i, e := range r.secrets {
			resp.Resources[i] = e.resource
		}
		return resp
	},
}

// checkRequest refuses what is not a request for secrets by name. An empty type is that of the service (xDS protocol:
// "implicit in singleton xDS APIs").
func checkRequest(kind string, locators int) error {
	if kind != "" && kind != TypeURL {
		return api.E(api.TypeURL, "only secrets are served here")
	}
	if locators > 0 {
		return api.E(api.ResourceName, "secrets are found by name, not by locator")
	}
	return nil
}

// checkNode refuses a node that is larger than anybody needs, before anything of the request is looked at.
func checkNode(n *core.Node) error {
	if n != nil && proto.Size(n) > MaxNodeBytes {
		return api.E(api.NodeMetadataTooLarge, "the node's description is larger than %d bytes", MaxNodeBytes)
	}
	return nil
}
