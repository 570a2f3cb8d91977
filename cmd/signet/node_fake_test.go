package main

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

const (
	nodeCluster = "https://kubernetes.default.svc"
	otherNodes  = "https://other.example.org"
)

// nodes of the scene; a ban stays until it is taken back.
func (f *fakeAdmin) nodes(scene string) []*apiv1.NodeInfo {
	node := func(cluster, name, uid string, since time.Duration, ids ...string) *apiv1.NodeInfo {
		n := &apiv1.NodeInfo{Cluster: cluster, Node: name, NodeUid: uid, Connected: true, AgentVersion: "v0.1.0", Protocol: 1,
			Since: timestamppb.New(testNow.Add(-since)), Generation: newGeneration}
		for _, id := range ids {
			n.SpiffeIds = append(n.SpiffeIds, "spiffe://example.org/"+id)
			n.ValidUntil = timestamppb.New(testNow.Add(41 * time.Minute))
		}
		if b := f.bans[uid]; b != nil {
			n.Ban, n.Connected, n.Since, n.AgentVersion, n.Generation = b, false, nil, "", 0
		}
		return n
	}
	all := []*apiv1.NodeInfo{
		node(nodeCluster, "node-a", "11111111-1111-4111-8111-111111111111", 3*time.Hour, "ns/shop/sa/cart", "ns/shop/sa/web"),
		node(nodeCluster, "node-b", "22222222-2222-4222-8222-222222222222", 5*time.Minute),
		node(nodeCluster, "node-c", "33333333-3333-4333-8333-333333333333", time.Hour, "ns/bank/sa/ledger"),
		node(otherNodes, "node-c", "44444444-4444-4444-8444-444444444444", time.Hour),
	}
	switch scene {
	case "empty":
		return nil
	case "hostile":
		n := node(nodeCluster, "node-e\x1b[2J", "55555555-5555-4555-8555-555555555555", time.Hour, "\x1b]0;owned\a")
		n.AgentVersion, n.MoreIds = "v1\r\nforged", 16128
		return []*apiv1.NodeInfo{n}
	}
	return all
}

func (f *fakeAdmin) node(scene, name, cluster string) (*apiv1.NodeInfo, error) {
	var found []*apiv1.NodeInfo
	for _, n := range f.nodes(scene) {
		if (n.GetNode() == name || n.GetNodeUid() == name) && (cluster == "" || cluster == n.GetCluster()) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return nil, api.ToStatus(api.E(api.NotFound, "no such node")).Err()
	case 1:
		return found[0], nil
	}
	return nil, api.ToStatus(api.E(api.NodeAmbiguous, "%d nodes are called that: %s of %s, %s of %s", len(found),
		found[0].GetNodeUid(), found[0].GetCluster(), found[1].GetNodeUid(), found[1].GetCluster())).Err()
}

// ListNodes returns four nodes, of which two have a name in common.
func (f *fakeAdmin) ListNodes(ctx context.Context, _ *apiv1.ListNodesRequest) (*apiv1.ListNodesResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &apiv1.ListNodesResponse{Nodes: slices.Clone(f.nodes(scene))}, nil
}

// BanNode bans as the CA does.
func (f *fakeAdmin) BanNode(ctx context.Context, r *apiv1.BanNodeRequest) (*apiv1.BanNodeResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.node(scene, r.GetNode(), r.GetCluster())
	if err != nil {
		return nil, err
	}
	resp := &apiv1.BanNodeResponse{Node: n}
	if n.GetBan() != nil {
		return resp, nil
	}
	resp.SessionsEnded, resp.Changed = 1, true
	n.Ban = &apiv1.Ban{At: timestamppb.New(testNow), By: "uid:0", Reason: r.GetReason(), ValidUntil: timestamppb.New(testNow.Add(time.Hour))}
	if !r.GetDryRun() {
		if f.bans == nil {
			f.bans = map[string]*apiv1.Ban{}
		}
		f.bans[n.GetNodeUid()] = proto.CloneOf(n.GetBan())
		n.Connected, resp.CorrelationId = false, "00112233445566bb"
		n.SpiffeIds = nil
	}
	return resp, nil
}

// AllowNode takes a ban back as the CA does.
func (f *fakeAdmin) AllowNode(ctx context.Context, r *apiv1.AllowNodeRequest) (*apiv1.AllowNodeResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.node(scene, r.GetNode(), r.GetCluster())
	if err != nil {
		return nil, err
	}
	resp := &apiv1.AllowNodeResponse{Node: n, Changed: n.GetBan() != nil}
	if resp.Changed && !r.GetDryRun() {
		delete(f.bans, n.GetNodeUid())
		n.SpiffeIds = nil
		resp.CorrelationId = "00112233445566aa"
	}
	return resp, nil
}
