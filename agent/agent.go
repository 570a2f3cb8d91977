// Package agent keeps the identities of one node fresh.
//
// It is a courier: it proves nothing and decides nothing about who a workload is. It carries the workload's token and a
// CSR to the CA, checks what comes back, keeps the last good thing until it expires, and renews with a fresh key before
// that. It knows nothing of Envoy: whoever serves identities to workloads (SDS, the Workload API) asks it through Admit
// and follows the values it hands out. It links no signing code and no key but those it made for its own node.
package agent

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/internal/run"
)

// Config is what an agent is made of. Fields without a default are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Dial        func(ctx context.Context) (net.Conn, error) // a new connection to the CA
	Trust       *Trust                                      // the first trust; what the cache holds comes before it
	Published   func() (*Trust, error)                      // reads the published bundle: asked where the CA is not known by what is held. nil: none
	Prover      attestor.Prover                             // the agent's own token, audience api.AgentAudience
	Verifier    func(KeySets) (attestor.Attestor, error)    // checks workloads' tokens by the key sets that the CA pushed
	Cache       Cache                                       // nil: nothing outlives the process
	Version     string                                      // of the build, for people

	IssueTimeout time.Duration // of one request to the CA, and until a session is open. Zero: 10 s
	MinBackoff   time.Duration // after the first failure, on average. Zero: 250 ms
	MaxBackoff   time.Duration // at most between two tries, unless the CA asks for more. Zero: 30 s
	ReportEvery  time.Duration // least time between two reports to the CA. Zero: 1 s
	Keepalive    time.Duration // of an idle connection, until the CA is asked whether it is there. Zero: 1 min

	Log     *slog.Logger // nil: discarded
	Metrics *Metrics     // nil: NewMetrics
}

// KeySets are the issuers' key sets (JWKS, JSON) by issuer, as attestor.ByKeySets takes them.
type KeySets = map[string][]byte

// Agent is made by New and works while Run does.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	metrics *Metrics

	protocols api.Protocols // that it speaks with the CA

	trustMu   sync.Mutex // held while a bundle is compared with trust and takes its place
	trustKept bool       // the cache holds trust: what an agent was told once it does not forget
	trust     latest.Value[*Trust]
	verifier  latest.Value[attestor.Attestor]    // nil until there are key sets
	self      latest.Value[*credential]          // the agent's own identity; nil until attested
	link      latest.Value[*link]                // nil while there is no session
	trouble   latest.Value[*api.Error]           // why there is none; nil before the first failure
	away      latest.Value[map[string]time.Time] // clusters that are away, by issuer: since when, as the CA said last
	changed   latest.Value[uint64]               // counts changes that the CA should hear of

	shunned atomic.Pointer[shunned] // compromised roots, as the CA said last; nil before that

	banned atomic.Bool    // by the CA, as it said last
	hurry  chan time.Time // holds one order: when the own SVID is renewed at the latest

	mu         sync.Mutex
	identities map[podKey]*Identity
	running    context.Context // nil before Run and after it
	keepers    sync.WaitGroup  // one for each identity
	sequence   uint64          // of changed
}

// podKey says whose an identity is: one pod of one cluster, under one ServiceAccount.
type podKey struct{ issuer, podUID, serviceAccountUID string }

// maxIdentities bounds what one node can hold; kubelet's own limit of pods is far below.
const maxIdentities = 4096

// New returns an agent that holds what its cache holds and serves it at once; Run makes it fresh. The error has the
// reason ConfigInvalid.
func New(cfg Config) (*Agent, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, api.E(api.ConfigInvalid, "a trust domain is required")
	case cfg.Dial == nil || cfg.Prover == nil || cfg.Verifier == nil:
		return nil, api.E(api.ConfigInvalid, "a connection to the CA, a token of the agent's own and a verifier are required")
	}
	cfg.IssueTimeout = cmp.Or(cfg.IssueTimeout, 10*time.Second)
	cfg.MinBackoff = cmp.Or(cfg.MinBackoff, 250*time.Millisecond)
	cfg.MaxBackoff = cmp.Or(cfg.MaxBackoff, 30*time.Second)
	cfg.ReportEvery = cmp.Or(cfg.ReportEvery, time.Second)
	cfg.Keepalive = cmp.Or(cfg.Keepalive, time.Minute)
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	a := &Agent{cfg: cfg, log: cfg.Log, metrics: cfg.Metrics, protocols: api.SpokenProtocols(), identities: map[podKey]*Identity{},
		hurry: make(chan time.Time, 1)}
	a.restore(time.Now())
	switch held := a.trust.Load(); {
	case held == nil && cfg.Trust != nil:
		return nil, api.E(api.BundleRejected, "the published bundle has generation %s, which no CA can have come to: it is not trusted", cfg.Trust.Generation)
	case held == nil:
		return nil, api.E(api.ConfigInvalid, "there is neither a cached trust bundle nor one to begin with")
	}
	a.metrics.setTrust(a.trust.Load())
	return a, nil
}

// Run keeps a session with the CA and every identity fresh until ctx ends, and returns nil. It is called once.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	a.mu.Lock()
	a.running = ctx
	for _, id := range a.identities {
		a.startKeeper(id)
	}
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.running = nil
		a.mu.Unlock()
		cancel() // the session may have failed before its time
		a.keepers.Wait()
	}()
	return run.All(ctx, run.Task{Name: "session", Run: a.keepSession})
}

// Trust follows the trust bundle; it is never nil.
func (a *Agent) Trust() *latest.Value[*Trust] { return &a.trust }

// NotReady names what is missing before the agent can serve; empty when it is ready. An agent that holds identities is
// ready while the CA is away, but not where its node is banned, nor where it is of a version that the CA does not serve:
// nobody new is served there, and a rollout of such agents ends at the first of them.
func (a *Agent) NotReady() []string {
	if a.link.Load() != nil {
		return nil
	}
	if a.banned.Load() {
		return []string{"this node is banned: nothing is renewed on it (" + string(api.NodeBanned) + ", " + api.NodeBanned.Code() + ")"}
	}
	missing, e := "there is no session with the CA and no identity is held", a.trouble.Load()
	if e != nil {
		missing += ": " + strings.Join(strings.Fields(e.Detail), " ") + " (" + string(e.Reason) + ", " + e.Reason.Code() + ")"
		if e.Reason == api.ProtocolSkew {
			return []string{strings.Replace(missing, " and no identity is held", "", 1)}
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range a.identities {
		if id.held.Load().SVID != nil {
			return nil
		}
	}
	return []string{missing}
}

// Admit says whose identity the bearer of a token may use, and keeps that identity fresh from then on. The token is
// checked here, by the key sets that the CA pushed, so that an identity that is held can be served while the CA is away;
// a new one is only ever given by the CA, which checks again. Volume says where on the node the token was delivered.
//
// Admit blocks while there are no key sets to check by. Until is when the token expires; while the API server is away one
// that has expired since still opens what is held, for some minutes at a time. It returns an *api.Error: why the
// token is not good, or why the CA refused this workload moments ago.
func (a *Agent) Admit(ctx context.Context, e attestor.Evidence, volume string) (id *Identity, until time.Time, err error) {
	v, err := a.waitVerifier(ctx)
	if err != nil {
		return nil, time.Time{}, err
	}
	c, err := v.Attest(ctx, e, api.WorkloadAudience(a.cfg.TrustDomain), time.Now())
	if err != nil {
		return a.admitLate(ctx, v, e, err)
	}
	if err := a.checkNode(c); err != nil {
		return nil, time.Time{}, err
	}
	if id, err = a.identity(c, e, volume); err != nil {
		return nil, time.Time{}, err
	}
	if refused := id.held.Load().Refused(); refused != nil {
		return nil, time.Time{}, refused
	}
	return id, c.ExpireAt, nil
}

// checkNode wants a token of our own node.
func (a *Agent) checkNode(c attestor.Claims) error {
	if self := a.self.Load(); self != nil && c.NodeUID != self.nodeUID {
		return api.E(api.NodeMismatch, "the token's pod runs on another node")
	}
	return nil
}

func (a *Agent) waitVerifier(ctx context.Context) (attestor.Attestor, error) {
	for {
		v, changed := a.verifier.Get()
		if v != nil {
			return v, nil
		}
		select {
		case <-ctx.Done():
			return nil, api.E(api.KeysUnavailable, "the CA has not sent the issuers' key sets yet")
		case <-changed:
		}
	}
}

// identity returns the identity of a pod whose token was checked, for enter's sake.
func (a *Agent) identity(c attestor.Claims, e attestor.Evidence, volume string) (*Identity, error) {
	k := podKey{c.Issuer, c.PodUID, c.ServiceAccountUID}
	return a.enter(k, Pod{Namespace: c.Namespace, Name: c.PodName, UID: c.PodUID}, func(id *Identity) { id.offer(e, c.ExpireAt, volume) })
}

// enter returns the identity of a pod, making one that is on its way where there is none, and has offer give it a proof. Both
// happen under the lock that forget takes, so that nobody is handed an identity that is kept no more.
func (a *Agent) enter(k podKey, p Pod, offer func(*Identity)) (*Identity, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	id, ok := a.identities[k]
	if !ok {
		if len(a.identities) >= maxIdentities {
			return nil, api.E(api.Overloaded, "the node holds %d identities already", maxIdentities)
		}
		id = newIdentity(k, p, a)
		a.identities[k] = id
	}
	offer(id)
	if !ok {
		a.startKeeper(id)
	}
	return id, nil
}

// startKeeper runs an identity's keeper; the caller holds a.mu. Before Run nothing is started: Run does it.
func (a *Agent) startKeeper(id *Identity) {
	if a.running == nil {
		return
	}
	ctx, cancel := context.WithCancel(a.running)
	id.stop = cancel
	a.keepers.Go(func() {
		defer cancel()
		a.keep(ctx, id, a.renew)
	})
}

// forget drops an identity whose pod is gone; false when somebody has come for it meanwhile.
func (a *Agent) forget(id *Identity) bool {
	a.mu.Lock()
	gone := id.idle(time.Now())
	if gone {
		delete(a.identities, id.key)
	}
	a.mu.Unlock()
	if gone {
		a.uncache(id, true)
		a.touch()
	}
	return gone
}

func (a *Agent) list() []*Identity {
	a.mu.Lock()
	defer a.mu.Unlock()
	ids := make([]*Identity, 0, len(a.identities))
	for _, id := range a.identities {
		ids = append(ids, id)
	}
	return ids
}

// touch tells the reporter that something changed.
func (a *Agent) touch() {
	a.mu.Lock()
	a.sequence++
	n := a.sequence
	a.mu.Unlock()
	a.changed.Set(n)
}
