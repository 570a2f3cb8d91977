package ca_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/health/grpc_health_v1"
	pb "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// nodeOf attests the agent of a pod, so that it may be on a node of another UID.
func nodeOf(t *testing.T, s *catest.Server, p attestortest.Pod) *node {
	t.Helper()
	s.Pods.Add(p)
	n := &node{t: t, s: s, pod: p}
	resp, key, err := n.attest(nil)
	if err != nil {
		t.Fatalf("the agent was not attested: %v", err)
	}
	n.svid = svidOf(t, resp.GetChain(), key)
	return n
}

func banNode(t *testing.T, c *ca.CA, r *apiv1.BanNodeRequest) *apiv1.BanNodeResponse {
	t.Helper()
	resp, err := adminOf(t, c).BanNode(t.Context(), r)
	if err != nil {
		t.Fatalf("not banned: %v", api.FromStatus(err))
	}
	return resp
}

func allowNode(t *testing.T, c *ca.CA, node string) *apiv1.AllowNodeResponse {
	t.Helper()
	resp, err := adminOf(t, c).AllowNode(t.Context(), &apiv1.AllowNodeRequest{Node: node, Reason: "found again"})
	if err != nil {
		t.Fatalf("not allowed: %v", api.FromStatus(err))
	}
	return resp
}

func listNodes(t *testing.T, c *ca.CA) []*apiv1.NodeInfo {
	t.Helper()
	resp, err := adminOf(t, c).ListNodes(t.Context(), &apiv1.ListNodesRequest{})
	if err != nil {
		t.Fatal(api.FromStatus(err))
	}
	return resp.GetNodes()
}

// refusedEverywhere makes every call that an agent has, over the connection that it has and over new ones.
func (n *node) refusedEverywhere(l *link, web attestortest.Pod) {
	n.t.Helper()
	_, err := l.issue(n.item(web))
	wantReason(n.t, err, api.NodeBanned)
	_, err = n.connect(nil)
	wantReason(n.t, err, api.NodeBanned)
	_, _, err = n.attest(nil)
	wantReason(n.t, err, api.NodeBanned)
	if after := api.AsError(err).RetryAfter; after < time.Minute || after > 2*time.Minute {
		n.t.Errorf("its agent is to come again after %s", after)
	}
	_, err = n.health().Check(n.t.Context(), &grpc_health_v1.HealthCheckRequest{})
	wantReason(n.t, api.FromStatus(err), api.NodeBanned)
}

// health connects with the node's SVID.
func (n *node) health() grpc_health_v1.HealthClient {
	return grpc_health_v1.NewHealthClient(dial(n.t, n.s, n.svid))
}

// TestBanNode ends all that the agent of a node has, at once, and lets it begin nothing, over restarts too, until it is
// allowed. Other nodes do not notice; nobody can use the node's tokens in its place.
//
// threat: B06, L13
func TestBanNode(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, withHealth(catest.Options{}))
		bad, good := newNode(t, s, "node-1"), newNode(t, s, "node-2")
		lb, lg := bad.session(), good.session()
		web := s.Pod("shop", "web", "web", "node-1")
		svid, err := lb.issue(bad.item(web))
		if err != nil {
			t.Fatal(err)
		}
		id, end := svid.GetSpiffeId(), leafOf(t, svid).NotAfter
		watch, err := bad.health().Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := watch.Recv(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)

		began := time.Now()
		if ids := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1", DryRun: true}).GetNode().GetSpiffeIds(); !slices.Equal(ids, []string{id}) {
			t.Errorf("it holds %v", ids)
		}
		resp := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1", Reason: "stolen from rack 7"})
		for _, n := range listNodes(t, s.CA()) { // whether or not its stream has ended by now
			if n.GetConnected() != (n.GetNode() == "node-2") {
				t.Errorf("after the answer: %v", n)
			}
		}
		wantReason(t, lb.end(), api.NodeBanned)
		_, err = watch.Recv()
		wantReason(t, api.FromStatus(err), api.NodeBanned)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("its streams ended after %s", took)
		}
		got := resp.GetNode()
		if !resp.GetChanged() || resp.GetSessionsEnded() != 1 || got.GetConnected() || got.GetNodeUid() != bad.pod.NodeUID || got.GetCluster() != catest.IssuerName ||
			len(got.GetSpiffeIds()) > 0 || !got.GetValidUntil().AsTime().Equal(end) {
			t.Errorf("the answer: %v", resp)
		}
		ban := got.GetBan()
		if ban.GetBy() != "uid:0" || ban.GetReason() != "stolen from rack 7" || ban.GetAt().AsTime().Before(began.Add(-time.Second)) ||
			ban.GetValidUntil().AsTime().Before(end) || ban.GetValidUntil().AsTime().After(began.Add(time.Hour+32*time.Second)) {
			t.Errorf("the ban: %v", ban)
		}
		if v := metric(t, s.CA(), "signet_ca_nodes_banned"); v != 1 {
			t.Errorf("%v nodes are banned by the metric", v)
		}
		bad.refusedEverywhere(lb, web)
		// A token of that node is worth nothing at another one either.
		_, err = lg.issue(good.item(web))
		wantReason(t, err, api.NodeBanned)
		if _, err := lg.issue(good.item(s.Pod("shop", "api", "api", "node-2"))); err != nil {
			t.Errorf("another node: %v", err)
		}
		// What is said again changes nothing.
		again := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: bad.pod.NodeUID, Reason: "another"})
		if again.GetChanged() || again.GetCorrelationId() != "" || cmp.Diff(ban, again.GetNode().GetBan(), protocmp.Transform()) != "" {
			t.Errorf("the same again: %v", again)
		}

		s.Stop()
		s.Start()
		s.WaitReady()
		if v := metric(t, s.CA(), "signet_ca_nodes_banned"); v != 1 {
			t.Errorf("after a restart %v nodes are banned by the metric", v)
		}
		later := bad.s.CA()
		if nodes := listNodes(t, later); len(nodes) != 1 || nodes[0].GetNode() != "node-1" || nodes[0].GetConnected() ||
			cmp.Diff(ban, nodes[0].GetBan(), protocmp.Transform()) != "" {
			t.Errorf("after a restart: %v", nodes)
		}
		lb = &link{t: t, n: bad, client: apiv1.NewAuthorityClient(dial(t, s, bad.svid))}
		bad.refusedEverywhere(lb, web)

		allowed := allowNode(t, later, "node-1")
		if !allowed.GetChanged() || allowed.GetNode().GetBan() == nil {
			t.Errorf("allowed: %v", allowed)
		}
		if allowNode(t, later, "node-1").GetChanged() {
			t.Error("allowed twice")
		}
		if v := metric(t, later, "signet_ca_nodes_banned"); v != 0 {
			t.Errorf("%v nodes are banned by the metric, and none is", v)
		}
		if _, err := bad.session().issue(bad.item(web)); err != nil {
			t.Errorf("allowed again: %v", err)
		}
		wantNodeEntries(t, s, resp.GetCorrelationId(), allowed.GetCorrelationId(), bad.pod.NodeUID)
	})
}

// wantNodeEntries wants both decisions on record, by whom and why.
func wantNodeEntries(t *testing.T, s *catest.Server, banned, allowed, uid string) {
	t.Helper()
	want := []*apiv1.AuditEntry{
		{Source: "ledger", Kind: "ban-node", CorrelationId: banned, Cluster: catest.IssuerName, Node: "node-1", NodeUid: uid, Method: "BanNode", Caller: "uid:0", Detail: "stolen from rack 7"},
		{Source: "ledger", Kind: "allow-node", CorrelationId: allowed, Cluster: catest.IssuerName, Node: "node-1", NodeUid: uid, Method: "AllowNode", Caller: "uid:0", Detail: "found again"},
	}
	got := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Node: "node-1", Kinds: []string{"ban-node", "allow-node"}})
	if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreFields(&apiv1.AuditEntry{}, "seq", "time")); diff != "" {
		t.Errorf("on record (-want +got):\n%s", diff)
	}
	refused := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Reason: string(api.NodeBanned)})
	if len(refused) == 0 {
		t.Error("nobody was refused by the record")
	}
}

// TestBanDryRun says what a ban would touch, and touches nothing.
func TestBanDryRun(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	svid, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1")))
	if err != nil {
		t.Fatal(err)
	}
	before := listNodes(t, s.CA())
	resp := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1", Reason: "what if", DryRun: true})
	if !resp.GetChanged() || resp.GetSessionsEnded() != 1 || resp.GetCorrelationId() != "" || !resp.GetNode().GetConnected() ||
		resp.GetNode().GetBan().GetReason() != "what if" || !slices.Equal(resp.GetNode().GetSpiffeIds(), []string{svid.GetSpiffeId()}) {
		t.Errorf("the answer: %v", resp)
	}
	if diff := cmp.Diff(before, listNodes(t, s.CA()), protocmp.Transform()); diff != "" {
		t.Errorf("something was changed (-before +after):\n%s", diff)
	}
	if _, err := l.issue(n.item(s.Pod("shop", "api", "api", "node-1"))); err != nil {
		t.Error(err)
	}
	banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1"})
	allowed, err := adminOf(t, s.CA()).AllowNode(t.Context(), &apiv1.AllowNodeRequest{Node: "node-1", DryRun: true})
	if err != nil || !allowed.GetChanged() || allowed.GetCorrelationId() != "" {
		t.Errorf("the answer: %v, %v", allowed, err)
	}
	if _, err := n.connect(nil); api.ReasonOf(err) != api.NodeBanned {
		t.Errorf("it was allowed: %v", err)
	}
	if found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Kinds: []string{"ban-node", "allow-node"}}); len(found) != 1 {
		t.Errorf("on record: %v", found)
	}
}

// TestListNodes tells of each node what its agent says and what this replica issued, over all of its sessions.
func TestListNodes(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		if got := listNodes(t, s.CA()); len(got) != 0 {
			t.Errorf("nobody is there: %v", got)
		}
		two, one := newNode(t, s, "node-2"), newNode(t, s, "node-1")
		first := one.session()
		since := time.Now()
		svid, err := first.issue(one.item(s.Pod("shop", "web", "web", "node-1")))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		one.session()
		l := two.session()
		told := time.Now().Add(30 * time.Minute)
		for _, r := range []*apiv1.Report{
			{Full: true, BundleEpoch: 1, BundleNumber: 1, Changed: []*apiv1.Holding{
				{Key: "a", SpiffeId: "spiffe://example.org/b", NotAfter: timestamppb.New(told)},
				{Key: "b", SpiffeId: "spiffe://example.org/a", NotAfter: timestamppb.New(told.Add(-time.Minute))},
				{Key: "c", SpiffeId: "spiffe://example.org/a", NotAfter: timestamppb.New(told)},
				{Key: "expired", SpiffeId: "spiffe://example.org/old", NotAfter: timestamppb.New(time.Now())},
				{Key: "refused", LastError: "POD_DELETED"},
				{Key: "none", SpiffeId: "what it likes", NotAfter: timestamppb.New(told)},
				{Key: "foreign", SpiffeId: "spiffe://example.com/a", NotAfter: timestamppb.New(told)},
				{Key: "domain", SpiffeId: "spiffe://example.org", NotAfter: timestamppb.New(told)},
				{Key: "never", SpiffeId: "spiffe://example.org/never"},
				{Key: "long", SpiffeId: "spiffe://example.org/" + strings.Repeat("a", api.MaxIDBytes), NotAfter: timestamppb.New(told)},
			}},
		} {
			if err := l.stream.Send(report(r)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		want := []*apiv1.NodeInfo{
			{Cluster: catest.IssuerName, Node: "node-1", NodeUid: one.pod.NodeUID, Connected: true, AgentVersion: "test", Protocol: api.Protocol, Since: timestamppb.New(since),
				SpiffeIds: []string{svid.GetSpiffeId()}, ValidUntil: timestamppb.New(leafOf(t, svid).NotAfter)},
			{Cluster: catest.IssuerName, Node: "node-2", NodeUid: two.pod.NodeUID, Connected: true, AgentVersion: "test", Protocol: api.Protocol, Since: timestamppb.New(since.Add(time.Minute)),
				Generation: 1<<32 | 1, SpiffeIds: []string{"spiffe://example.org/a", "spiffe://example.org/b"}, ValidUntil: timestamppb.New(told)},
		}
		if diff := cmp.Diff(want, listNodes(t, s.CA()), protocmp.Transform()); diff != "" {
			t.Errorf("nodes (-want +got):\n%s", diff)
		}
		// An agent that claims to hold something for a year does not.
		if err := l.stream.Send(report(&apiv1.Report{Full: true, Changed: []*apiv1.Holding{{Key: "a", SpiffeId: "spiffe://example.org/a", NotAfter: timestamppb.New(time.Now().Add(365 * day))}}})); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if until := listNodes(t, s.CA())[1].GetValidUntil().AsTime(); until.After(time.Now().Add(ca.MaxTTL)) {
			t.Errorf("an SVID is valid until %s", until)
		}
		// The agent of node-1 goes away; what was issued is known until it expires.
		s.CA().DropSessions(one.pod.NodeUID)
		gone := listNodes(t, s.CA())[0]
		if gone.GetConnected() || gone.GetNode() != "node-1" || len(gone.GetSpiffeIds()) != 1 {
			t.Errorf("without a session: %v", gone)
		}
		time.Sleep(time.Until(leafOf(t, svid).NotAfter))
		for _, n := range listNodes(t, s.CA()) {
			if n.GetNode() == "node-1" {
				t.Errorf("long after: %v", n)
			}
		}
	})
}

// TestBanNodeThatInvents has a stolen node's agent say that it holds as much as a session may say: that holds up neither the
// look before a ban nor the ban, and hides nothing that was issued.
//
// threat: B06
func TestBanNodeThatInvents(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		n := newNode(t, s, "node-1")
		l := n.session()
		svid, err := l.issue(n.item(s.Pod("shop", "web", "zzz", "node-1"))) // the last of all by its name
		if err != nil {
			t.Fatal(err)
		}
		const each, sessions = 4000, 4
		for i := range sessions {
			if i > 0 {
				l = n.session()
			}
			for chunk := range 8 {
				r := &apiv1.Report{}
				for j := range each / 8 {
					r.Changed = append(r.Changed, &apiv1.Holding{
						Key: fmt.Sprintf("%d-%d", chunk, j), NotAfter: timestamppb.New(time.Now().Add(time.Hour)),
						SpiffeId: fmt.Sprintf("spiffe://example.org/%s/%d-%d-%d", strings.Repeat("a", 1900), i, chunk, j),
					})
				}
				if err := l.stream.Send(report(r)); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait()
		dry := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1", DryRun: true})
		if ids := dry.GetNode().GetSpiffeIds(); len(ids) != 257 || !slices.IsSorted(ids) || !slices.Contains(ids, svid.GetSpiffeId()) || dry.GetNode().GetMoreIds() != each*sessions-256 {
			t.Errorf("listed are %d identities, and %d more", len(ids), dry.GetNode().GetMoreIds())
		}
		if size := pb.Size(dry); size > 1<<20 {
			t.Errorf("a dry run answers with %d bytes", size)
		}
		resp := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: n.pod.NodeUID})
		if size := pb.Size(resp); !resp.GetChanged() || size > 4<<10 {
			t.Errorf("changed %t; a ban answers with %d bytes", resp.GetChanged(), size)
		}
		allowed := allowNode(t, s.CA(), n.pod.NodeUID)
		if size := pb.Size(allowed); !allowed.GetChanged() || size > 4<<10 {
			t.Errorf("its end answers with %d bytes", size)
		}
	})
}

// slowStore takes its time to read the record, once it is told to.
type slowStore struct {
	ca.Store
	slow *atomic.Bool
}

// Load implements ca.Store.
func (s slowStore) Load(ctx context.Context) (journal.Journal, ca.Revision, error) {
	if s.slow.Load() {
		time.Sleep(10 * time.Second)
	}
	return s.Store.Load(ctx)
}

// slowLedger takes its time for a ban.
type slowLedger struct{ ca.Ledger }

// Append implements ca.Ledger.
func (l slowLedger) Append(ctx context.Context, e audit.Entry) error {
	if e.Kind == audit.KindBanNode {
		time.Sleep(15 * time.Second)
	}
	return l.Ledger.Append(ctx, e)
}

// TestBanSlow issues to a node until its ban is in force, which store and ledger put off: none of that is valid after the time
// that the answer says.
//
// threat: B06
func TestBanSlow(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		slow := new(atomic.Bool)
		s := start(t, catest.Options{Config: func(c *ca.Config) {
			c.Ledger, c.Store = slowLedger{c.Ledger}, slowStore{c.Store, slow}
		}})
		n := newNode(t, s, "node-1")
		l := n.session()
		slow.Store(true)
		banned := make(chan *apiv1.BanNodeResponse, 1)
		admin := adminOf(t, s.CA())
		go func() {
			resp, err := admin.BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "node-1"})
			if err != nil {
				t.Errorf("not banned: %v", api.FromStatus(err))
			}
			banned <- resp
		}()
		var last time.Time
		web := s.Pod("shop", "web", "web", "node-1")
		for {
			svid, err := l.issue(n.item(web))
			if err != nil {
				break // the session ended, or the call was refused
			}
			last = leafOf(t, svid).NotAfter
			time.Sleep(time.Second)
		}
		until := (<-banned).GetNode().GetBan().GetValidUntil().AsTime()
		if last.IsZero() || last.After(until) || until.Sub(last) > time.Minute {
			t.Errorf("in no case after %s, but one is valid until %s", until, last)
		}
	})
}

// TestWhichNode finds the node that is meant by a name or a UID, and guesses nothing.
func TestWhichNode(t *testing.T) {
	_, second := twoClusters(t)
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		second(cfg)
		cfg.KeySets[otherIssuer] = cfg.KeySets[catest.IssuerName]
	}})
	const unknown, anew = "12345678-1234-4234-8234-123456789abc", "0f0f0f0f-0000-4000-8000-000000000000"
	n := newNode(t, s, "node-1")
	n.session()
	p := s.AgentPod("node-2")
	p.NodeUID = anew
	old, fresh := newNode(t, s, "node-2"), nodeOf(t, s, p)
	old.session()
	fresh.session()
	quiet := s.Pod("shop", "web", "web", "quiet") // a node without an agent
	s.Pods.Change(s.Pod("shop", "far", "far", "node-far"), func(p *ca.Pod) { p.Issuer = otherIssuer })
	s.Pods.Change(s.Pod("shop", "far-2", "far", "node-1"), func(p *ca.Pod) { p.Issuer, p.NodeUID = otherIssuer, "node-1-far" })
	for _, tt := range []struct {
		name, node, cluster string
		want                api.Reason // empty: found
		uid                 string
	}{
		{"a UID with a session", n.pod.NodeUID, "", "", n.pod.NodeUID},
		{"a name of two clusters", "node-1", "", api.NodeAmbiguous, ""},
		{"that of the one", "node-1", catest.IssuerName, "", n.pod.NodeUID},
		{"that of the other", "node-1", otherIssuer, "", "node-1-far"},
		{"a UID in another cluster", n.pod.NodeUID, otherIssuer, "", n.pod.NodeUID}, // nobody knows it there, and it may be banned
		{"a name that was used anew", "node-2", "", api.NodeAmbiguous, ""},
		{"the old one", old.pod.NodeUID, "", "", old.pod.NodeUID},
		{"the new one", anew, "", "", anew},
		{"a node that only the directory knows", "quiet", "", "", quiet.NodeUID},
		{"its UID", quiet.NodeUID, "", "", quiet.NodeUID},
		{"only in the other cluster", "node-far", "", "", attestortest.NewPod("", "", "", "node-far").NodeUID},
		{"not there", "node-9", "", api.NotFound, ""},
		{"not in that cluster", "quiet", otherIssuer, api.NotFound, ""},
		{"no such cluster", unknown, "https://nowhere.test", api.NotFound, ""},
		{"a UID that nobody knows, in whichever cluster", unknown, "", api.NodeAmbiguous, ""},
		{"a UID that nobody knows, in one cluster", unknown, otherIssuer, "", unknown},
		{"almost a UID", unknown[:35] + "g", otherIssuer, api.NotFound, ""},
		{"a UID in upper case", strings.ToUpper(unknown), otherIssuer, api.NotFound, ""},
		{"nothing", "", "", api.NotFound, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: tt.node, Cluster: tt.cluster, DryRun: true})
			if tt.want != "" {
				wantReason(t, api.FromStatus(err), tt.want)
				return
			}
			if err != nil {
				t.Fatal(api.FromStatus(err))
			}
			if got := resp.GetNode(); got.GetNodeUid() != tt.uid || tt.cluster != "" && got.GetCluster() != tt.cluster {
				t.Errorf("it is %v, want %s", got, tt.uid)
			}
		})
	}
	// Of those that are banned a name says which one, though another lives under it.
	banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: old.pod.NodeUID})
	if _, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "node-2"}); api.ReasonOf(api.FromStatus(err)) != api.NodeAmbiguous {
		t.Errorf("banned by a name of two nodes, one of which is banned: %v", err)
	}
	if got := allowNode(t, s.CA(), "node-2"); !got.GetChanged() || got.GetNode().GetNodeUid() != old.pod.NodeUID {
		t.Errorf("allowed: %v", got)
	}
	for _, which := range []string{"node-9", "node-2"} { // there is none, and neither is banned
		want := map[string]api.Reason{"node-9": api.NotFound, "node-2": api.NodeAmbiguous}[which]
		_, err := adminOf(t, s.CA()).AllowNode(t.Context(), &apiv1.AllowNodeRequest{Node: which})
		wantReason(t, api.FromStatus(err), want)
	}
	_, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "quiet", Reason: strings.Repeat("x", journal.MaxBanText+1)})
	wantReason(t, api.FromStatus(err), api.MessageTooLarge)
}

// TestNodeMadeAnew lets a node in that has the name of a banned one, and is another by its UID. What comes from the banned one
// under the new name's SVID is refused all the same.
//
// threat: A17
func TestNodeMadeAnew(t *testing.T) {
	s := start(t, catest.Options{})
	old := newNode(t, s, "node-1")
	old.session()
	banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1"})
	p := s.AgentPod("node-1")
	p.NodeUID = "0f0f0f0f-0000-4000-8000-000000000000"
	fresh := nodeOf(t, s, p)
	l := fresh.session()
	web := attestortest.NewPod("shop", "web", "web", "node-1")
	web.NodeUID = p.NodeUID
	s.Pods.Add(web)
	if _, err := l.issue(fresh.item(web)); err != nil {
		t.Errorf("the new node: %v", err)
	}
	_, err := l.issue(fresh.item(s.Pod("shop", "web", "web", "node-1")))
	wantReason(t, err, api.NodeBanned)
	_, err = (&node{t: t, s: s, pod: old.pod, svid: fresh.svid}).connect(nil)
	wantReason(t, err, api.NodeBanned)
	_, err = (&node{t: t, s: s, pod: fresh.pod, svid: old.svid}).connect(nil)
	wantReason(t, err, api.NodeBanned)
}
