package ca

import (
	"cmp"
	"context"
	"crypto/x509"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// Bounds of a session, so that no agent can hold more of the CA than a node is worth.
const (
	helloTimeout = 10 * time.Second
	maxSessions  = 4 // of one node; a further one ends the oldest
	maxHoldings  = 4096
	maxHolding   = 128 << 10 // bytes of one
	maxHeld      = 16 << 20  // bytes of all, with what each stream takes beside them
	maxStreams   = 64        // of one holding
	streamWeight = 512       // bytes that a stream takes in memory, of which a few are on the wire
)

// sessions are the agents that are connected now. A node may have two for a moment, while its agent changes to a
// connection with a fresh SVID, and some more that are dead and not known to be yet.
type sessions struct {
	mu     sync.Mutex
	byNode map[string]map[*session]struct{}
}

// session is one agent's stream.
type session struct {
	asker
	leaf     *x509.Certificate   // by which the agent opened it
	chain    []*x509.Certificate // with what came after it
	root     string              // id of the authority above it
	version  string
	protocol uint32 // that both sides speak
	began    time.Time
	ousted   chan struct{} // closed when it has no say any more
	why      error         // why not; nil: newer sessions of the node took its place. Set before ousted is closed

	mu         sync.Mutex // guards what follows
	generation api.Generation
	hash       []byte    // of the bundle of that generation
	heard      time.Time // of its last report; zero before the first
	holdings   map[string]reported
	held       int            // bytes of holdings
	until      time.Time      // when the last SVID expires that it told of, as it says
	told       *journal.Agent // what it is as evidence; nil where that has to be made anew
	toldOf     api.Generation // of the record that told was made for
	// inherited is what pods were brought by what sessions of the same node before it said, by UID; nil once there is a report.
	inherited map[string]brought
	brought   brought // the agent's own bundle, and since when it has that one, as far as is known
	foreign   bool    // it was told that the agent holds a bundle which is not ours
}

type reported struct {
	holding *apiv1.Holding
	weight  int // in maxHeld
	at      time.Time
	brought brought
}

func (s *sessions) add(x *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byNode == nil {
		s.byNode = map[string]map[*session]struct{}{}
	}
	of := s.byNode[x.nodeUID]
	if of == nil {
		of = map[*session]struct{}{}
		s.byNode[x.nodeUID] = of
	}
	if len(of) >= maxSessions {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(of)), func(a, b *session) int { return a.began.Compare(b.began) })
		close(oldest.ousted)
		delete(of, oldest)
	}
	of[x] = struct{}{}
}

// of returns those of a node.
func (s *sessions) of(nodeUID string) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.byNode[nodeUID]))
}

// drop forgets the sessions of a node, whose streams were ended: they have no say any more, even while one still waits to be
// told so.
func (s *sessions) drop(nodeUID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byNode, nodeUID)
}

// end ends one session, if it is one still.
func (s *sessions) end(x *session, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.byNode[x.nodeUID][x]; !ok {
		return
	}
	x.why = why
	close(x.ousted)
	delete(s.byNode[x.nodeUID], x)
	if len(s.byNode[x.nodeUID]) == 0 {
		delete(s.byNode, x.nodeUID)
	}
}

func (s *sessions) remove(x *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byNode[x.nodeUID], x)
	if len(s.byNode[x.nodeUID]) == 0 {
		delete(s.byNode, x.nodeUID)
	}
}

// asker returns the agent of a node by the live session that was opened with the same certificate; SessionRequired where
// there is none. By the node alone, somebody who speaks for another cluster could ride on the session of a node whose UID
// he forged.
func (s *sessions) asker(nodeUID string, leaf *x509.Certificate) (asker, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range s.byNode[nodeUID] {
		if x.leaf.Equal(leaf) {
			return x.asker, nil
		}
	}
	return asker{}, api.E(api.SessionRequired, "the agent has no session with this replica")
}

func (s *sessions) nodes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byNode)
}

func (s *sessions) all() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*session
	for _, of := range s.byNode {
		all = slices.AppendSeq(all, maps.Keys(of))
	}
	return all
}

// Session serves one agent: first its Hello, then the bundle and the key sets at each change, until the session's end.
func (a *authority) Session(stream apiv1.Authority_SessionServer) error {
	ca, ctx := a.ca, stream.Context()
	who := admitted(ctx)
	in := receive(stream)
	x, err := ca.hello(ctx, in, who)
	if err != nil {
		return err
	}
	x.leaf, x.chain = who.leaf, who.chain
	if _, err := ca.verifyPeer(x.chain, time.Now()); err != nil { // the connection may be older than the bundle
		return err
	}
	x.root = rootAbove(x.chain, ca.bundle.Load().Roots)
	x.inherited, x.brought = ca.broughtBefore(x)
	ca.sessions.add(x)
	err = ca.refuseBanned(x.issuer, x.nodeUID) // since it was asked for its Hello
	if err == nil {
		_, err = ca.verifyPeer(x.chain, time.Now()) // a root may have gone before there was a session to end
	}
	if err != nil {
		ca.sessions.remove(x)
		return err
	}
	ca.metrics.sessions.Inc()
	ca.log.InfoContext(ctx, "session opened", "node", x.nodeName, "node_uid", x.nodeUID, "agent_version", x.version, "protocol", x.protocol)
	defer func() {
		ca.noteAway(x)
		ca.sessions.remove(x)
		ca.evidence.Set(struct{}{})
		ca.metrics.sessions.Dec()
		ca.log.InfoContext(ctx, "session ended", "node", x.nodeName, "node_uid", x.nodeUID)
	}()
	welcome := &apiv1.Welcome{Protocol: x.protocol, TrustDomain: ca.cfg.TrustDomain.Name(), Replica: ca.cfg.Replica}
	if err := stream.Send(&apiv1.SessionResponse{Message: &apiv1.SessionResponse_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	return ca.serveSession(stream, x, in, min(time.Until(who.leaf.NotAfter), jitter(ca.cfg.SessionAge)))
}

func (ca *CA) serveSession(stream apiv1.Authority_SessionServer, x *session, in <-chan received, age time.Duration) error {
	end := time.NewTimer(age)
	defer end.Stop()
	b, bundleChanged := ca.bundle.Get()
	sets, setsChanged := ca.keySets.Get()
	gone, goneChanged := ca.elsewhere(x.issuer)
	order, orderChanged := ca.reissue.Get()
	var leave <-chan time.Time
	sendBundle, sendSets, sendOrder := true, true, true
	for {
		if gone && leave == nil {
			leave = time.After(leaveAfter())
		} else if !gone {
			leave = nil
		}
		if sendOrder && order != nil && !sendBundle { // what is issued by the order is under this bundle
			var newer *Bundle
			if newer, bundleChanged = ca.bundle.Get(); newer != b {
				b, sendBundle = newer, true
			}
		}
		if sendBundle {
			if err := stream.Send(&apiv1.SessionResponse{Message: &apiv1.SessionResponse_Bundle{Bundle: bundleProto(b)}}); err != nil {
				return err
			}
		}
		if sendSets && sets != nil {
			if err := stream.Send(&apiv1.SessionResponse{Message: &apiv1.SessionResponse_KeySets{KeySets: sets}}); err != nil {
				return err
			}
		}
		if sendOrder && order != nil {
			if err := stream.Send(&apiv1.SessionResponse{Message: &apiv1.SessionResponse_Reissue{Reissue: order}}); err != nil {
				return err
			}
		}
		sendBundle, sendSets, sendOrder = false, false, false
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-end.C:
			return api.E(api.SessionEnded, "the session has reached its end")
		case <-ca.stopping:
			return api.E(api.SessionEnded, "the CA is stopping")
		case <-x.ousted:
			if x.why != nil {
				return x.why
			}
			return api.E(api.SessionEnded, "the agent has opened %d newer sessions", maxSessions)
		case <-leave:
			return api.E(api.SessionEnded, "this replica cannot see the agent's cluster, and another one does")
		case <-goneChanged:
			gone, goneChanged = ca.elsewhere(x.issuer)
		case <-bundleChanged:
			b, bundleChanged = ca.bundle.Get()
			sendBundle = true
		case <-setsChanged:
			sets, setsChanged = ca.keySets.Get()
			sendSets = true
		case <-orderChanged:
			order, orderChanged = ca.reissue.Get()
			sendOrder = true
		case m := <-in:
			if m.err == io.EOF {
				return nil // the agent is done
			}
			if m.err != nil {
				return unreadable(m.err)
			}
			if err := x.apply(m.msg.GetReport()); err != nil {
				return err
			}
			ca.noteForeign(stream.Context(), x)
			ca.evidence.Set(struct{}{})
		}
	}
}

type received struct {
	msg *apiv1.SessionRequest
	err error
}

// receive reads a stream into a channel. Its goroutine ends with the stream, which ends when the handler returns: gRPC
// has no other way to end a Recv.
func receive(stream apiv1.Authority_SessionServer) <-chan received {
	in := make(chan received)
	go func() {
		for {
			m, err := stream.Recv()
			select {
			case in <- received{m, err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return in
}

// unreadable is what the end of the agent's half of a stream means where it should go on: nothing where the agent went
// away, a broken protocol where it closed its half or sent what is no message.
func unreadable(err error) error {
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable:
		return err
	}
	return api.Wrap(api.SessionProtocol, err, "the agent's next message cannot be read")
}

// hello waits for the first message and ties the session to a node of one cluster: the agent's own token must name the
// node that its SVID names.
//
// While the API server is away its Hello shows the ticket of the SVID with which the session is opened.
func (ca *CA) hello(ctx context.Context, in <-chan received, who caller) (*session, error) {
	nodeUID := who.node
	var m received
	select {
	case m = <-in:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-ca.stopping:
		return nil, api.E(api.SessionEnded, "the CA is stopping")
	case <-time.After(helloTimeout):
		return nil, api.E(api.SessionProtocol, "no Hello within %s", helloTimeout)
	}
	if m.err != nil {
		return nil, unreadable(m.err)
	}
	h := m.msg.GetHello()
	if h == nil {
		return nil, api.E(api.SessionProtocol, "the first message of a session is Hello")
	}
	now := time.Now()
	protocol, err := ca.agree(h.GetProtocol(), h.GetOldestProtocol())
	if err != nil {
		return nil, ca.recordRefusal(ctx, "Session", asker{nodeUID: nodeUID}, audit.Entry{}, err)
	}
	c, err := ca.attestSession(ctx, h, who, now)
	if err != nil {
		return nil, ca.recordRefusal(ctx, "Session", asker{nodeUID: nodeUID}, entryOf(audit.KindRefuse, c, now), err)
	}
	return &session{
		asker:    asker{nodeUID: nodeUID, nodeName: c.NodeName, issuer: c.Issuer},
		version:  cut(h.GetVersion(), 64),
		protocol: protocol,
		began:    now,
		ousted:   make(chan struct{}),
		holdings: map[string]reported{},
	}, nil
}

// attestSession attests the token in a Hello and decides whether the agent who has made the connection may open a session
// with it. What is known of the token comes with the error.
func (ca *CA) attestSession(ctx context.Context, h *apiv1.Hello, who caller, now time.Time) (attestor.Claims, error) {
	evidence := attestor.Evidence{Kind: h.GetEvidence().GetKind(), Data: h.GetEvidence().GetData()}
	k, err := ca.recall(evidence, api.AgentAudience(ca.cfg.TrustDomain), h.GetTicket(), now)
	if err != nil {
		return attestor.Claims{}, err
	}
	c, err := ca.attestNode(ctx, k, evidence, now)
	if err != nil {
		return c, err
	}
	return c, ca.checkAgent(ctx, c, who, k, now)
}

// checkAgent decides whether an agent with an SVID of that node may open a session with its token.
func (ca *CA) checkAgent(ctx context.Context, c attestor.Claims, who caller, k *known, now time.Time) error {
	if c.NodeUID != who.node {
		return api.E(api.NodeMismatch, "the agent's token names another node than its SVID")
	}
	if k != nil {
		if err := ca.checkAgentTicket(k, c, who); err != nil {
			return err
		}
	}
	return ca.checkAgentPod(ctx, c, k, now)
}

// apply takes over what an agent says it holds.
func (x *session) apply(r *apiv1.Report) error {
	if r == nil {
		return api.E(api.SessionProtocol, "after Hello an agent sends reports")
	}
	now := time.Now()
	x.mu.Lock()
	defer x.mu.Unlock()
	before := x.holdings
	if r.GetFull() {
		x.holdings, x.held = map[string]reported{}, 0
	}
	for _, k := range r.GetRemoved() {
		x.held -= x.holdings[k].weight
		delete(x.holdings, k)
	}
	for _, h := range r.GetChanged() {
		size := proto.Size(h)
		weight := size + streamWeight*len(h.GetStreams())
		if size > maxHolding || len(h.GetStreams()) > maxStreams {
			return api.E(api.SessionProtocol, "a holding above %d bytes or with more than %d streams", maxHolding, maxStreams)
		}
		x.held += weight - x.holdings[h.GetKey()].weight
		was, known := before[h.GetKey()]
		since := now
		if !known {
			was.brought = x.inherited[h.GetPodUid()]
		}
		if fresh := !known && x.inherited == nil; fresh && brings(h, x.brought.bundle) {
			since = x.brought.at
		}
		x.holdings[h.GetKey()] = reported{h, weight, now, broughtOf(was.brought, h, since)}
		// No SVID is longer valid than the longest: an agent that says so of one errs.
		if until := h.GetNotAfter(); until.IsValid() && until.AsTime().After(x.until) {
			x.until = earlier(until.AsTime(), now.Add(MaxTTL))
		}
	}
	if len(x.holdings) > maxHoldings || x.held > maxHeld {
		return api.E(api.SessionProtocol, "more than %d holdings or %d bytes of them on one node", maxHoldings, maxHeld)
	}
	x.generation = api.Generation{Epoch: r.GetBundleEpoch(), Number: r.GetBundleNumber()}
	x.hash, x.heard, x.told, x.inherited = r.GetBundleHash(), now, nil, nil
	if is := held(x.generation, x.hash); is != x.brought.bundle {
		x.brought = brought{is, now}
	}
	return nil
}

// listHoldings returns what live agents hold, sorted by SPIFFE ID, then pod, key and node. Where a node has two sessions, the newest
// report of a key is used.
func (ca *CA) listHoldings(namespace, id string) []*apiv1.NodeHolding {
	newest := map[string]*apiv1.NodeHolding{}
	for _, x := range ca.sessions.all() {
		x.mu.Lock()
		for k, r := range x.holdings {
			h := r.holding
			if namespace != "" && h.GetNamespace() != namespace || id != "" && h.GetSpiffeId() != id {
				continue
			}
			key := x.nodeUID + "\x00" + k
			if old := newest[key]; old == nil || old.GetReportedAt().AsTime().Before(r.at) {
				newest[key] = &apiv1.NodeHolding{Node: x.nodeName, NodeUid: x.nodeUID, Holding: h, ReportedAt: timestamppb.New(r.at)}
			}
		}
		x.mu.Unlock()
	}
	return slices.SortedFunc(maps.Values(newest), func(a, b *apiv1.NodeHolding) int {
		return cmp.Or(
			strings.Compare(a.Holding.GetSpiffeId(), b.Holding.GetSpiffeId()),
			strings.Compare(a.Holding.GetPodName(), b.Holding.GetPodName()),
			strings.Compare(a.Holding.GetKey(), b.Holding.GetKey()),
			strings.Compare(a.GetNode(), b.GetNode()),
		)
	})
}

func bundleProto(b *Bundle) *apiv1.Bundle {
	p := &apiv1.Bundle{Epoch: b.Generation.Epoch, Number: b.Generation.Number, Hash: b.Hash[:]}
	for _, r := range b.Roots {
		p.Roots = append(p.Roots, r.Raw)
	}
	return p
}

// cut shortens a foreign string to n bytes.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "?")
}
