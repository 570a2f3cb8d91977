package ca

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// NodeFinder is a Directory that knows nodes by name. Implementations are in ca/cluster.
type NodeFinder interface {
	// FindNodes returns the nodes that have this name or this UID, in whatever cluster, from memory; none where that is not
	// known now.
	FindNodes(nameOrUID string) []NodeID
}

// NodeID is a node of the cluster of an issuer.
type NodeID struct{ Issuer, UID, Name string }

// changeTime bounds a change of the record that an operator asks for. It goes on without him: a lost terminal loses nothing.
const changeTime = 30 * time.Second

// maxSaidIDs is how many of the identities that only a node's agent speaks of are listed: the agent of a stolen node may say
// what it likes, and who bans it waits for the list.
const maxSaidIDs = 256

// ListNodes implements the call of that name.
func (a *admin) ListNodes(ctx context.Context, _ *apiv1.ListNodesRequest) (*apiv1.ListNodesResponse, error) {
	if _, err := a.bundle(); err != nil {
		return nil, err
	}
	return looked(ctx, a.ca, func() *apiv1.ListNodesResponse {
		all := a.ca.listNodes(time.Now())
		return &apiv1.ListNodesResponse{Nodes: slices.SortedFunc(maps.Values(all), compareNodes)}
	})
}

// BanNode implements the call of that name.
func (a *admin) BanNode(ctx context.Context, r *apiv1.BanNodeRequest) (*apiv1.BanNodeResponse, error) {
	ca, now := a.ca, time.Now()
	if err := ca.checkNodeRequest(ctx, r.GetReason()); err != nil {
		return nil, err
	}
	node, err := ca.findNode(r.GetNode(), r.GetCluster(), now)
	if err != nil {
		return nil, err
	}
	brief(node, r.GetDryRun())
	resp := &apiv1.BanNodeResponse{Node: node}
	if node.GetBan() != nil {
		return resp, nil
	}
	who := admitted(ctx)
	ban := journal.Ban{
		Cluster: node.GetCluster(), NodeUID: node.GetNodeUid(), Node: node.GetNode(), At: now.UTC().Truncate(time.Millisecond),
		By: cut(who.name, journal.MaxBanText), Reason: r.GetReason(), ValidUntil: ca.validUntil(node, now),
	}
	resp.SessionsEnded, resp.Changed, node.Ban = ca.sessions.count(ban.Cluster, ban.NodeUID), true, banProto(ban)
	if r.GetDryRun() {
		return resp, nil
	}
	e := nodeEntry(audit.KindBanNode, who, ban, now)
	e.Detail = r.GetReason()
	stored, changed, err := ca.changeBans(ctx, e, func(j journal.Journal) (journal.Journal, bool, error) {
		if _, ok := j.Banned(ban.Cluster, ban.NodeUID); ok {
			return j, false, nil // another replica was first
		}
		ban.ValidUntil = ca.validUntil(node, time.Now()) // it may have waited for its turn, and for the store
		next, err := j.WithBan(ban)
		return next, true, err
	})
	if err != nil {
		return nil, err
	}
	first, _ := stored.Banned(ban.Cluster, ban.NodeUID)
	node.Connected, node.Ban = false, banProto(first)
	if resp.Changed = changed; changed {
		resp.CorrelationId = e.CorrelationID
		ca.log.WarnContext(ctx, "node banned", "node", ban.Node, "node_uid", ban.NodeUID, "cluster", ban.Cluster, "by", ban.By,
			"sessions_ended", resp.SessionsEnded, "correlation_id", e.CorrelationID)
	}
	return resp, nil
}

// AllowNode implements the call of that name.
func (a *admin) AllowNode(ctx context.Context, r *apiv1.AllowNodeRequest) (*apiv1.AllowNodeResponse, error) {
	ca, now := a.ca, time.Now()
	if err := ca.checkNodeRequest(ctx, r.GetReason()); err != nil {
		return nil, err
	}
	node, err := ca.findBanned(r.GetNode(), r.GetCluster(), now)
	if err != nil {
		return nil, err
	}
	brief(node, r.GetDryRun())
	resp := &apiv1.AllowNodeResponse{Node: node, Changed: node.GetBan() != nil}
	if !resp.Changed || r.GetDryRun() {
		return resp, nil
	}
	who := admitted(ctx)
	e := nodeEntry(audit.KindAllowNode, who, journal.Ban{Cluster: node.GetCluster(), NodeUID: node.GetNodeUid(), Node: node.GetNode()}, now)
	e.Detail = r.GetReason()
	_, changed, err := ca.changeBans(ctx, e, func(j journal.Journal) (journal.Journal, bool, error) {
		_, ok := j.Banned(node.GetCluster(), node.GetNodeUid())
		return j.WithoutBan(node.GetCluster(), node.GetNodeUid()), ok, nil
	})
	if err != nil {
		return nil, err
	}
	if resp.Changed = changed; changed {
		resp.CorrelationId = e.CorrelationID
		ca.log.WarnContext(ctx, "node allowed", "node", node.GetNode(), "node_uid", node.GetNodeUid(), "cluster", node.GetCluster(), "by", who.name,
			"correlation_id", e.CorrelationID)
	}
	return resp, nil
}

// checkNodeRequest checks what both requests have in common, and reads the record anew: another replica may have banned or
// allowed a node.
func (ca *CA) checkNodeRequest(ctx context.Context, reason string) error {
	if ca.bundle.Load() == nil {
		return api.E(api.CAUnavailable, "the CA is starting")
	}
	if len(reason) > journal.MaxBanText {
		return api.E(api.MessageTooLarge, "the reason is longer than %d bytes", journal.MaxBanText)
	}
	return ca.reload(ctx)
}

// nodeEntry begins the ledger's entry about a decision of who.
func nodeEntry(kind audit.Kind, who caller, b journal.Ban, now time.Time) audit.Entry {
	method := "BanNode"
	if kind == audit.KindAllowNode {
		method = "AllowNode"
	}
	return audit.Entry{
		Time: now, Kind: kind, CorrelationID: api.NewCorrelationID(), Cluster: b.Cluster, Node: b.Node, NodeUID: b.NodeUID,
		Method: method, Caller: who.name, TokenID: who.token.TokenID,
	}
}

// changeBans changes who is banned, if change says that it is a change. As with all that the CA decides it is on record
// before it is done. That a full ledger keeps a node from being banned costs nothing meanwhile: then nobody is issued
// anything.
func (ca *CA) changeBans(ctx context.Context, e audit.Entry, change func(journal.Journal) (journal.Journal, bool, error)) (stored journal.Journal, changed bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeTime)
	defer cancel()
	recorded := false
	stored, err = ca.changeRecord(ctx, func(j journal.Journal) (journal.Journal, error) {
		next, isChange, err := change(j)
		if err == nil && isChange && !recorded {
			if err := ca.cfg.Ledger.Append(ctx, e); err != nil {
				return journal.Journal{}, unrecorded(err, "the decision could not be put on record, so nothing was changed")
			}
			recorded = true
		}
		changed = isChange
		return next, err
	})
	return stored, changed, err
}

// listNodes returns the nodes that have a session, that hold an SVID as far as is known, and that are banned.
func (ca *CA) listNodes(now time.Time) map[nodeKey]*apiv1.NodeInfo {
	all := map[nodeKey]*apiv1.NodeInfo{}
	issued, said := map[nodeKey]map[string]struct{}{}, map[nodeKey]map[string]struct{}{}
	node := func(k nodeKey, name string) *apiv1.NodeInfo {
		n := all[k]
		if n == nil {
			n = &apiv1.NodeInfo{Cluster: k.cluster, NodeUid: k.uid}
			all[k], issued[k], said[k] = n, map[string]struct{}{}, map[string]struct{}{}
		}
		n.Node = cmp.Or(n.Node, name)
		return n
	}
	holds := func(ids map[nodeKey]map[string]struct{}, k nodeKey, id string, until time.Time) {
		ids[k][id] = struct{}{}
		if n := all[k]; n.ValidUntil == nil || until.After(n.ValidUntil.AsTime()) {
			n.ValidUntil = timestamppb.New(until)
		}
	}
	sessions := ca.sessions.all()
	slices.SortFunc(sessions, func(a, b *session) int { return a.began.Compare(b.began) })
	for _, x := range sessions {
		k := nodeKey{x.issuer, x.nodeUID}
		n := node(k, x.nodeName)
		if !n.Connected {
			n.Connected, n.Since = true, timestamppb.New(x.began)
		}
		n.AgentVersion, n.Protocol = x.version, x.protocol // of the newest
		x.mu.Lock()
		n.Generation = x.generation.Sequence()
		for _, r := range x.holdings {
			h := r.holding
			// No SVID is longer valid than the longest: an agent that says so of one errs.
			until := earlier(h.GetNotAfter().AsTime(), now.Add(MaxTTL))
			if id, err := api.ParseWorkloadID(h.GetSpiffeId()); err == nil && id.MemberOf(ca.cfg.TrustDomain) && h.GetNotAfter().IsValid() && now.Before(until) {
				holds(said, k, h.GetSpiffeId(), until)
			}
		}
		x.mu.Unlock()
	}
	ca.memory.holders(now, func(k nodeKey, name string, of map[spiffeid.ID]time.Time) {
		node(k, name)
		for id, until := range of {
			holds(issued, k, id.String(), until)
		}
	})
	for _, b := range ca.record.Load().Bans {
		node(nodeKey{b.Cluster, b.NodeUID}, b.Node).Ban = banProto(b)
	}
	for k, n := range all {
		maps.DeleteFunc(said[k], func(id string, _ struct{}) bool { _, ok := issued[k][id]; return ok })
		more := slices.Sorted(maps.Keys(said[k]))
		listed := min(len(more), maxSaidIDs)
		n.MoreIds = uint32(len(more) - listed)
		n.SpiffeIds = slices.Sorted(maps.Keys(issued[k]))
		if listed > 0 {
			n.SpiffeIds = append(n.SpiffeIds, more[:listed]...)
			slices.Sort(n.SpiffeIds)
		}
	}
	return all
}

// brief leaves out of the answer to a change what the dry run before has said: nothing that a node holds may hold it up.
func brief(n *apiv1.NodeInfo, dryRun bool) {
	if !dryRun {
		n.SpiffeIds, n.MoreIds = nil, 0
	}
}

// validUntil is when the last SVID expires that a node can have once a ban is in force that is put on record now, for which
// ledger and store may take their time. This replica may not know of all SVIDs, for it may have been started a moment ago, or
// be one of several.
func (ca *CA) validUntil(n *apiv1.NodeInfo, now time.Time) time.Time {
	until := now.Add(changeTime + max(ca.cfg.Policy.MaxTTL(), ca.cfg.AgentTTL))
	if known := n.GetValidUntil(); known != nil && known.AsTime().After(until) {
		until = known.AsTime() // issued under a policy that allowed for more
	}
	return until.UTC().Truncate(time.Second).Add(time.Second)
}

// findNode returns the one node that is meant by a name or a UID. Nothing is guessed: a node that was made anew under its
// name is another one, and so is that of another cluster.
func (ca *CA) findNode(nameOrUID, cluster string, now time.Time) (*apiv1.NodeInfo, error) {
	all := ca.listNodes(now)
	if f, ok := ca.cfg.Directory.(NodeFinder); ok {
		for _, n := range f.FindNodes(nameOrUID) {
			if k := (nodeKey{n.Issuer, n.UID}); all[k] == nil {
				all[k] = &apiv1.NodeInfo{Cluster: n.Issuer, Node: n.Name, NodeUid: n.UID}
			}
		}
	}
	node, err := oneNode(all, nameOrUID, cluster)
	if node != nil || err != nil {
		return node, err
	}
	// Somebody who has only the UID left of a node that nobody knows any more may ban it. A name that is not known is more
	// likely mistyped.
	var clusters []string
	for _, issuer := range slices.Sorted(maps.Keys(ca.cfg.KeySets)) {
		if cluster == "" || cluster == issuer {
			clusters = append(clusters, issuer)
		}
	}
	switch {
	case !isUUID(nameOrUID):
		return nil, api.E(api.NotFound, "no such node is in a cluster of this CA, has a session, holds an SVID or is banned")
	case len(clusters) == 0:
		return nil, api.E(api.NotFound, "this CA has no such cluster")
	case len(clusters) > 1:
		return nil, api.E(api.NodeAmbiguous, "no node of this UID is known, and this CA has %d clusters: say which", len(clusters))
	}
	return &apiv1.NodeInfo{Cluster: clusters[0], NodeUid: nameOrUID}, nil
}

// findBanned returns the one node that is meant among those that are banned; one that is not banned where it is none of
// them.
func (ca *CA) findBanned(nameOrUID, cluster string, now time.Time) (*apiv1.NodeInfo, error) {
	all := ca.listNodes(now)
	maps.DeleteFunc(all, func(_ nodeKey, n *apiv1.NodeInfo) bool { return n.GetBan() == nil })
	if node, err := oneNode(all, nameOrUID, cluster); node != nil || err != nil {
		return node, err
	}
	return ca.findNode(nameOrUID, cluster, now)
}

// oneNode picks the one that has this UID, or else this name; nil where none has.
func oneNode(all map[nodeKey]*apiv1.NodeInfo, nameOrUID, cluster string) (*apiv1.NodeInfo, error) {
	var byUID, byName []*apiv1.NodeInfo
	for _, n := range all {
		switch {
		case nameOrUID == "" || cluster != "" && n.GetCluster() != cluster:
		case n.GetNodeUid() == nameOrUID:
			byUID = append(byUID, n)
		case n.GetNode() == nameOrUID:
			byName = append(byName, n)
		}
	}
	found := byUID
	if len(found) == 0 {
		found = byName
	}
	switch len(found) {
	case 0:
		return nil, nil
	case 1:
		return found[0], nil
	}
	slices.SortFunc(found, compareNodes)
	var which []string
	for _, n := range found[:min(len(found), 5)] {
		which = append(which, n.GetNodeUid()+" of "+n.GetCluster())
	}
	return nil, api.E(api.NodeAmbiguous, "%d nodes are called that: %s", len(found), strings.Join(which, ", "))
}

// isUUID reports whether s is what Kubernetes makes UIDs of, so that it is no name by mistake.
func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		hyphen := i == 8 || i == 13 || i == 18 || i == 23
		if hyphen != (s[i] == '-') || !hyphen && !strings.Contains("0123456789abcdef", s[i:i+1]) {
			return false
		}
	}
	return true
}

func compareNodes(a, b *apiv1.NodeInfo) int {
	return cmp.Or(strings.Compare(a.GetCluster(), b.GetCluster()), strings.Compare(a.GetNode(), b.GetNode()), strings.Compare(a.GetNodeUid(), b.GetNodeUid()))
}

func banProto(b journal.Ban) *apiv1.Ban {
	return &apiv1.Ban{At: timestamppb.New(b.At), By: b.By, Reason: b.Reason, ValidUntil: timeProto(b.ValidUntil)}
}

// count returns how many sessions a node has.
func (s *sessions) count(cluster, nodeUID string) uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n uint32
	for x := range s.byNode[nodeUID] {
		if x.issuer == cluster {
			n++
		}
	}
	return n
}
