package main

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// ListAudit filters as the CA does. The scene "stalled" sends one piece and then nothing; "brokenoff" ends in an
// error after one; "replayed" has a refusal alone; "unable" is a CA that does not have the call.
func (f *fakeAdmin) ListAudit(req *apiv1.ListAuditRequest, s apiv1.Admin_ListAuditServer) error {
	scene, err := f.on(s.Context())
	if err != nil {
		return err
	}
	var all []*apiv1.AuditEntry
	switch scene {
	case "unable":
		return f.UnimplementedAdminServer.ListAudit(req, s)
	case "empty":
	case "hostile":
		if all = hostileRecord(); req.GetCorrelationId() != "" {
			return s.Send(&apiv1.ListAuditResponse{Entries: all}) // whatever was asked for
		}
	case "many":
		all = longRecord(1200)
	case "replayed":
		all = f.record()[4:5]
	default:
		all = f.record()
	}
	all = slices.DeleteFunc(all, func(e *apiv1.AuditEntry) bool { return !matches(req, e) })
	if last := int(req.GetLast()); last > 0 && len(all) > last {
		all = all[len(all)-last:]
	}
	for piece := range slices.Chunk(all, 100) {
		if err := s.Send(&apiv1.ListAuditResponse{Entries: piece}); err != nil {
			return err
		}
		switch scene {
		case "stalled":
			<-s.Context().Done()
			return s.Context().Err()
		case "brokenoff":
			return api.ToStatus(api.E(api.LedgerFailed, "the ledger ended early")).Err()
		}
	}
	return nil
}

func matches(req *apiv1.ListAuditRequest, e *apiv1.AuditEntry) bool {
	is := func(want string, have ...string) bool { return want == "" || slices.Contains(have, want) }
	at := e.GetTime().AsTime()
	return is(req.GetSpiffeId(), e.GetSpiffeId()) && is(req.GetNamespace(), e.GetNamespace()) && is(req.GetPod(), e.GetPod(), e.GetPodUid()) &&
		is(req.GetNode(), e.GetNode(), e.GetNodeUid(), e.GetCallerNode()) && is(req.GetSerial(), e.GetSerial()) && is(req.GetReason(), e.GetReason()) &&
		is(req.GetCorrelationId(), e.GetCorrelationId()) && is(req.GetTokenId(), e.GetTokenId()) &&
		(len(req.GetKinds()) == 0 || slices.Contains(req.GetKinds(), e.GetKind())) &&
		(req.GetSince() == nil || !at.Before(req.GetSince().AsTime())) && (req.GetUntil() == nil || at.Before(req.GetUntil().AsTime()))
}

// ago is a time before testNow; the odd milliseconds show where digits are lost.
func ago(d time.Duration) *timestamppb.Timestamp {
	return timestamppb.New(testNow.Add(-d).Add(250 * time.Millisecond))
}

const testCluster = "https://kubernetes.default.svc.cluster.local"

// record is what the CA has on record in most scenes, oldest first: issuances, and refusals of each source.
func (f *fakeAdmin) record() []*apiv1.AuditEntry {
	issuer := hex.EncodeToString(f.inter.SubjectKeyId)
	agent := "spiffe://example.org/signet/agent/uid-of-node-"
	issued := func(seq uint64, since time.Duration, pod, node, serial string) *apiv1.AuditEntry {
		name, _, _ := strings.Cut(pod, "-")
		return &apiv1.AuditEntry{Source: "ledger", Seq: seq, Time: ago(since), Kind: "issue", CorrelationId: fmt.Sprintf("c0ffee00000000%02x", seq),
			SpiffeId: "spiffe://example.org/ns/shop/sa/" + name, Cluster: testCluster, Namespace: "shop", ServiceAccount: name,
			ServiceAccountUid: "uid-of-" + name, Pod: pod, PodUid: "uid-of-" + pod, Node: node, NodeUid: "uid-of-" + node,
			TokenId: "token-of-" + pod, Serial: strings.Repeat(serial, 20), NotAfter: timestamppb.New(testNow.Add(time.Hour - since)),
			Issuer: issuer, Method: "Issue", Caller: agent + node[len(node)-1:], CallerNode: node}
	}
	web, cart := issued(3, 50*time.Minute, "web-1", "node-a", "a1"), issued(4, 40*time.Minute, "cart-0", "node-b", "b2")
	web.DnsNames = []string{"web.shop.svc", "web.shop.svc.cluster.local"}
	replayed := issued(1, 30*time.Minute, "web-1", "node-a", "")
	replayed.Source, replayed.Kind, replayed.CorrelationId = "refusals", kindRefuse, "4be1f0a7c2d95e38"
	replayed.SpiffeId, replayed.NotAfter, replayed.Issuer = "", nil, ""
	replayed.Reason, replayed.Detail = string(api.TokenReplayedElsewhere), "the token was already used on another node or volume"
	foreign := issued(2, 25*time.Minute, "job-7", "node-b", "")
	foreign.Source, foreign.Kind, foreign.CorrelationId, foreign.Namespace = "refusals", kindRefuse, "9a0c5512f3e48d76", "kube-system"
	foreign.SpiffeId, foreign.NotAfter, foreign.Issuer = "", nil, ""
	foreign.Reason, foreign.Detail = string(api.NamespaceNotAllowed), "the policy does not allow this namespace"
	foreign.Count, foreign.Last = 37, ago(90*time.Second)
	again := issued(5, 10*time.Minute, "web-1", "node-a", "d4")
	again.Grace, again.Detail = true, "renewed by its ticket: the API server has not been seen for 1h0m0s"
	return []*apiv1.AuditEntry{
		{Source: "ledger", Seq: 1, Time: ago(60 * time.Minute), Kind: "mint", CorrelationId: "c0ffee0000000001", SpiffeId: "spiffe://example.org",
			NotAfter: timestamppb.New(testNow.Add(23 * time.Hour)), Issuer: hex.EncodeToString(f.root.SubjectKeyId)},
		{Source: "ledger", Seq: 2, Time: ago(55 * time.Minute), Kind: "attest-agent", CorrelationId: "c0ffee0000000002", SpiffeId: agent + "a",
			Cluster: testCluster, Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "signet-agent-x7k2p", PodUid: "uid-of-agent",
			Node: "node-a", NodeUid: "uid-of-node-a", Serial: strings.Repeat("e5", 20), NotAfter: timestamppb.New(testNow.Add(5 * time.Minute)),
			Issuer: issuer, Method: "AttestAgent"},
		web, cart, replayed, foreign,
		{Source: "sample", Seq: 1, Time: ago(20 * time.Minute), Kind: kindRefuse, CorrelationId: "77d1e2f30419ab5c",
			Reason: string(api.AgentIdentityRequired), Detail: "an agent's SVID is required", Method: "Session"},
		again,
		{Source: "refusals", Seq: 3, Time: ago(5 * time.Minute), Kind: kindRefuse, CorrelationId: "0d9f8e7c6b5a4938",
			Reason: "REASON_OF_TOMORROW", Detail: "something new", Method: "Issue", Caller: agent + "b", CallerNode: "node-b"},
	}
}

// hostileRecord is what no CA should ever send.
func hostileRecord() []*apiv1.AuditEntry {
	evil := "\x1b]0;owned\a\r\nforged  line\u202e"
	spoken := &apiv1.AuditEntry{Source: evil, Time: ago(time.Minute), Kind: evil, CorrelationId: evil, SpiffeId: evil, Cluster: evil, Namespace: evil,
		ServiceAccount: evil, ServiceAccountUid: evil, Pod: evil, PodUid: evil, Node: evil, NodeUid: evil, TokenId: evil, DnsNames: []string{evil},
		Serial: evil, Issuer: evil, Reason: evil, Detail: evil, Method: evil, Caller: evil, CallerNode: evil, Count: 2, Last: ago(0)}
	return []*apiv1.AuditEntry{
		nil,
		{},
		{Time: &timestamppb.Timestamp{Seconds: 1 << 60}, Last: &timestamppb.Timestamp{Nanos: -1}, Count: 1<<64 - 1, Seq: 1<<64 - 1, Kind: kindRefuse},
		spoken,
	}
}

// longRecord is more than fits into one piece of an answer, or into one part of a table.
func longRecord(n int) (all []*apiv1.AuditEntry) {
	for i := range n {
		all = append(all, &apiv1.AuditEntry{Source: "ledger", Seq: uint64(i + 1), Time: ago(time.Duration(n-i) * time.Second), Kind: "issue",
			CorrelationId: fmt.Sprintf("%016x", i+1), SpiffeId: "spiffe://example.org/ns/shop/sa/web", Namespace: "shop", Pod: fmt.Sprintf("web-%d", i),
			Serial: fmt.Sprintf("%02x%s", cmp.Or(i%7, 1), strings.Repeat("0", 38))})
	}
	return all
}
