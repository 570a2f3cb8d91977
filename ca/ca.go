// Package ca is the authority: it attests a workload by its token, decides which identity that is, records the decision,
// and signs.
//
// The CA believes a token, never an agent. Every identity is backed by a token that the API server issued for one pod,
// and that token is worth nothing outside a session of the agent on that pod's node; so a stolen node yields the
// identities of its own pods and no others. The main path is Issue in issue.go, numbered as in ARCHITECTURE.md.
package ca

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/internal/run"
)

// DefaultAgentTTL is for how long an agent's own SVID is valid where nothing else is said.
const DefaultAgentTTL = time.Hour

// Config is what a CA is made of. Fields without a default are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Replica     string // a path segment, unique among the replicas; its identity is /signet/ca/REPLICA
	Version     string // of the build, for people

	Store     Store
	Upstream  Upstream
	Ledger    Ledger
	Archive   Archive   // nil: what is on record cannot be asked for
	Directory Directory // nil: the life of a pod is not checked; only for development
	Publisher Publisher // nil: the bundle is not published
	Policy    *Policy
	Attestors map[string]attestor.Attestor // by kind of evidence
	KeySets   map[string]KeySets           // by issuer, pushed to agents
	Agents    AgentRule
	Operators OperatorRule

	AgentTTL   time.Duration    // of an agent's own SVID. Zero: DefaultAgentTTL
	Keys       issuance.KeyKind // of intermediates and of the CA's own identity. Zero: ECDSA P-256
	MintBudget int              // intermediates an hour under one root. Zero: 20
	Sealer     *Sealer          // of the keys of renewal tickets in the record. Nil: no tickets, so nothing is renewed while an API server is away
	Grace      time.Duration    // for which known workloads are renewed while the API server is away; at most MaxGrace. Zero: not at all
	SessionAge time.Duration    // of an agent's session, drawn from 3/4 of it up. Zero: 1 h
	Concurrent int              // SVIDs of workloads in work at once. Zero: 4 for each CPU, 64 at least
	Queue      int              // SVIDs that may wait for their turn. Zero: 4096
	Asking     int              // SVIDs that may wait for an API server at once, and agents as well. Zero: 32

	// ManualRotation says that the root is not replaced by itself before it expires.
	ManualRotation bool

	// UpstreamKind is the name of Upstream's driver, for people.
	UpstreamKind string

	// Backup makes a backup of what Store holds. Nil: none can be asked for.
	Backup func(ctx context.Context) (*Backup, error)

	// NotReady names what else the process lacks, for CA.NotReady. Nil: nothing.
	NotReady func() []string

	Log     *slog.Logger // nil: discarded
	Metrics *Metrics     // nil: NewMetrics
}

// AgentRule says which pods are agents.
type AgentRule struct {
	Namespace      string `yaml:"namespace"`      // Default: signet-system
	ServiceAccount string `yaml:"serviceAccount"` // Default: signet-agent
}

// CA is one replica of the authority. It is made by New and works while Run does.
type CA struct {
	cfg          Config
	log          *slog.Logger
	metrics      *Metrics
	started      time.Time
	signing      latest.Value[*signing] // nil until the first intermediate
	bundle       latest.Value[*Bundle]  // nil until the record was read
	record       latest.Value[journal.Journal]
	changing     sync.Mutex                   // held while the record is changed and installed
	revision     Revision                     // of record; guarded by changing
	bans         atomic.Pointer[banned]       // who is banned by record; nil until it was read
	streams      streams                      // of agents
	conns        conns                        // of agents
	broken       chan error                   // gets the error of a change of the record whose outcome is unknown; of capacity 1
	keySets      latest.Value[*apiv1.KeySets] // nil until the first was read
	sessions     sessions
	memory       *memory
	work         *gate // of Issue: agents that proved who they are
	door         *gate // of AttestAgent: whoever knocks, so that a crowd there costs the others nothing
	askWork      *gate // who has left work for as long as he waits for an API server
	askDoor      *gate // who has left door
	people       *operators
	lookers      *lookers
	tickets      atomic.Pointer[ticketKeys]   // nil where there are none
	sights       *sights                      // nil while nothing is renewed while an API server is away
	replica      sync.Mutex                   // held while this replica's own record is changed
	own          atomic.Pointer[Replica]      // that record as it was stored last, or is being stored; nil until then
	keys         keyUses                      // of intermediates
	evidence     latest.Value[struct{}]       // is set when a rotation may find other evidence than before
	autoWhy      error                        // why no rotation can be begun by itself; nil where one can. As all that follows of keepRotation alone
	autoAgain    time.Time                    // not before then is it tried again
	autoTold     []*x509.Certificate          // unless the upstream tells of other roots than these
	toldBlockers uint64                       // a hash of who was logged last
	seen         []AgentSeen                  // as it was written down last; of keepAgents alone, once it runs
	away         absent                       // agents
	shown        latest.Value[journal.Copy]   // the bundle as it was published last; zero while it was not
	reissue      latest.Value[*apiv1.Reissue] // order to agents; nil while there is none
	trouble      latest.Value[*api.Error]     // what keeps a rotation from being decided; nil while nothing does
	clocks       clocks
	watched      watched
	watchers     chan struct{}                     // holds one for each who watches a rotation
	asking       atomic.Pointer[asking]            // the request for an intermediate that is to be made again; nil for none
	unminted     atomic.Pointer[api.Error]         // why the last intermediate that was due is not there; nil while it is
	vain         atomic.Pointer[Vain]              // how the upstream was last asked in vain; nil while all is well
	told         latest.Value[[]*x509.Certificate] // what the upstream signs under and is not in the record
	probed       atomic.Pointer[probed]            // what the last probe of the upstream found; nil before the first
	stopping     chan struct{}                     // closed when Run ends: sessions end with it
	issued       atomic.Uint64
	refused      atomic.Uint64
	quiet        quiet

	protocols api.Protocols // that it speaks with agents
}

// doorQueue is how many unattested agents may wait for their turn; more are sent away with a delay.
const doorQueue = 256

// New returns a CA that does nothing yet. The error has the reason ConfigInvalid.
func New(cfg Config) (*CA, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, api.E(api.ConfigInvalid, "a trust domain is required")
	case cfg.Store == nil || cfg.Upstream == nil || cfg.Ledger == nil || cfg.Policy == nil:
		return nil, api.E(api.ConfigInvalid, "store, upstream, ledger and policy are required")
	case len(cfg.Attestors) == 0:
		return nil, api.E(api.ConfigInvalid, "at least one attestor is required")
	case cfg.MintBudget < 0 || cfg.SessionAge < 0 || cfg.Concurrent < 0 || cfg.Queue < 0 || cfg.Asking < 0:
		return nil, api.E(api.ConfigInvalid, "mint budget, session age, concurrency, queue and how many may ask cannot be negative")
	case cfg.AgentTTL != 0 && (cfg.AgentTTL < issuance.MinTTL || cfg.AgentTTL > issuance.MaxTTL):
		return nil, api.E(api.ConfigInvalid, "the lifetime of agents' SVIDs is not between %s and %s", issuance.MinTTL, issuance.MaxTTL)
	}
	if cfg.Operators.Attestor != nil && cfg.Operators.Issuers == nil && len(cfg.KeySets) > 1 {
		// Whoever may make a namespace in any of them would have every role.
		return nil, api.E(api.ConfigInvalid, "there are %d clusters, and whose tokens operate this CA is not said", len(cfg.KeySets))
	}
	if cfg.Grace < 0 || cfg.Grace > MaxGrace {
		return nil, api.E(api.ConfigInvalid, "a grace of %s is not between 0s and %s", cfg.Grace, MaxGrace)
	}
	if _, err := api.ReplicaID(cfg.TrustDomain, cfg.Replica); err != nil {
		return nil, api.E(api.ConfigInvalid, "replica %.80q does not make a SPIFFE ID: %v", cfg.Replica, err)
	}
	cfg.Agents.Namespace = cmp.Or(cfg.Agents.Namespace, "signet-system")
	cfg.Agents.ServiceAccount = cmp.Or(cfg.Agents.ServiceAccount, "signet-agent")
	cfg.Operators.Namespace = cmp.Or(cfg.Operators.Namespace, "signet-operators")
	cfg.AgentTTL = cmp.Or(cfg.AgentTTL, DefaultAgentTTL)
	cfg.MintBudget = cmp.Or(cfg.MintBudget, 20)
	cfg.SessionAge = cmp.Or(cfg.SessionAge, time.Hour)
	cfg.Concurrent = cmp.Or(cfg.Concurrent, max(64, 4*runtime.GOMAXPROCS(0)))
	cfg.Queue = cmp.Or(cfg.Queue, 4096)
	cfg.Asking = cmp.Or(cfg.Asking, attestor.DefaultReviewInFlight/2)
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	return &CA{
		cfg:      cfg,
		log:      cfg.Log,
		metrics:  cfg.Metrics,
		started:  time.Now(),
		memory:   newMemory(),
		work:     newPacedGate(cfg.Concurrent, cfg.Queue),
		door:     newPacedGate(runtime.GOMAXPROCS(0), doorQueue),
		askWork:  newGate(cfg.Asking, cfg.Queue),
		askDoor:  newGate(cfg.Asking, doorQueue),
		people:   newOperators(),
		lookers:  newLookers(),
		broken:   make(chan error, 1),
		sights:   newSights(cfg, time.Now()),
		stopping: make(chan struct{}),
		clocks:   clocks{last: time.Now()},
		watchers: make(chan struct{}, maxWatchers),

		protocols: api.SpokenProtocols(),
	}, nil
}

// Run reads the record, publishes the bundle and keeps an intermediate until ctx ends; then it ends every session and
// returns nil. An error ends the process: the record is missing, damaged or foreign, or a write has an unknown outcome.
func (ca *CA) Run(ctx context.Context) error {
	defer close(ca.stopping)
	if err := ca.reload(ctx); err != nil {
		return err
	}
	j := ca.record.Load()
	ca.log.InfoContext(ctx, "record loaded", "trust_domain", j.TrustDomain, "generation", j.Generation().String(), "root", j.ActiveAuthority().ID,
		"banned_nodes", len(j.Bans))
	if err := ca.recordRestores(ctx); err != nil {
		return err
	}
	if err := ca.startTicketKeys(ctx); err != nil {
		return err
	}
	ca.startSight(ctx)
	if err := ca.recallAgents(ctx); err != nil {
		return err
	}
	return run.All(ctx,
		run.Task{Name: "rotation", Run: ca.keepRotation},
		run.Task{Name: "agents on record", Run: ca.keepAgents},
		run.Task{Name: "intermediate", Run: ca.keepIntermediate},
		run.Task{Name: "roots of the upstream", Run: ca.watchUpstream},
		run.Task{Name: "probe of the upstream", Run: ca.probeUpstream},
		run.Task{Name: "ticket keys", Run: ca.keepTicketKeys},
		run.Task{Name: "sight of clusters", Run: ca.keepSight},
		run.Task{Name: "publisher", Run: ca.keepPublished},
		run.Task{Name: "places of the bundle", Run: ca.followCopies},
		run.Task{Name: "key sets", Run: ca.keepKeySets},
		run.Task{Name: "memory", Run: ca.keepMemory},
		run.Task{Name: "ledger", Run: ca.watchLedger},
		run.Task{Name: "record", Run: ca.watchRecord},
		run.Task{Name: "bans", Run: ca.closeBanned},
		run.Task{Name: "operators' record", Run: ca.keepRecords},
		run.Task{Name: "record of others", Run: ca.followRecord},
	)
}

// Bundle returns the trust bundle; nil before Run has read the record.
func (ca *CA) Bundle() *Bundle { return ca.bundle.Load() }

// NotReady names what is missing before the CA can issue; empty when it is ready. It is what probes and operators are told.
func (ca *CA) NotReady() []string {
	var missing []string
	if ca.cfg.NotReady != nil {
		missing = ca.cfg.NotReady()
	}
	if ca.bundle.Load() == nil {
		missing = append(missing, "the record was not read yet")
	}
	if s := ca.signing.Load(); s == nil || !time.Now().Before(s.cert.NotAfter) {
		what := "there is no intermediate to sign with"
		if v := ca.vain.Load(); v != nil && v.Reason != api.Internal {
			what += ": " + string(v.Reason)
		}
		missing = append(missing, what)
	}
	for _, issuer := range slices.Sorted(maps.Keys(ca.cfg.KeySets)) {
		if jwks, _ := ca.cfg.KeySets[issuer].Snapshot(); jwks == nil {
			missing = append(missing, fmt.Sprintf("the key set of issuer %s was never read", issuer))
		}
	}
	if ca.cfg.Archive != nil {
		if why := ca.cfg.Archive.NotReady(); why != "" {
			return append(missing, why)
		}
	}
	select {
	case <-ca.cfg.Ledger.Failed():
		missing = append(missing, "the ledger cannot be written")
	default:
	}
	return missing
}

// How often the bundle is shown while that works, and how soon again at first where it does not.
const (
	publishPause = time.Minute
	publishRetry = time.Second
)

// keepPublished shows the bundle at each change and once a minute, so that a foreign change is put right. Where that fails
// it is tried again after a second, then after twice as long each time.
func (ca *CA) keepPublished(ctx context.Context) error {
	if ca.cfg.Publisher == nil {
		return nil
	}
	for retry := publishRetry; ; {
		b, changed := ca.bundle.Get()
		wait := publishPause
		schema, err := ca.show(ctx, b)
		if err != nil {
			ca.log.ErrorContext(ctx, "bundle not published", "error", err)
			ca.metrics.publishFailures.Inc()
			wait = min(retry, publishPause)
			retry = 2 * wait
			wait = wait/2 + rand.N(wait/2)
		} else {
			retry = publishRetry
		}
		ca.restShown(ctx, changed, schema, wait)
		if ctx.Err() != nil {
			return nil
		}
	}
}

// keepKeySets gathers the issuers' key sets, and which of their clusters are away, into the one message that sessions push.
func (ca *CA) keepKeySets(ctx context.Context) error {
	changed := make(chan struct{}, 1)
	var tasks []run.Task
	for issuer, source := range ca.cfg.KeySets {
		tasks = append(tasks, run.Task{Name: issuer, Run: func(ctx context.Context) error {
			for {
				_, newer := source.Snapshot()
				select {
				case changed <- struct{}{}:
				default:
				}
				select {
				case <-ctx.Done():
					return nil
				case <-newer:
				}
			}
		}})
	}
	tasks = append(tasks, run.Task{Name: "gather", Run: func(ctx context.Context) error {
		_, awayChanged := ca.awaySince()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-awayChanged:
			}
			var away map[string]time.Time
			away, awayChanged = ca.awaySince() // together, so that what is told is as new as what is awaited
			sets := &apiv1.KeySets{}
			for _, issuer := range slices.Sorted(maps.Keys(ca.cfg.KeySets)) {
				if jwks, _ := ca.cfg.KeySets[issuer].Snapshot(); jwks != nil {
					sets.Sets = append(sets.Sets, &apiv1.KeySet{Issuer: issuer, Jwks: jwks, AwaySince: timeProto(away[issuer])})
				}
			}
			if len(sets.Sets) > 0 {
				ca.keySets.Set(sets)
			}
		}
	}})
	return run.All(ctx, tasks...)
}

// watchLedger ends the process when the ledger has failed: what it then holds is read anew at the next start.
func (ca *CA) watchLedger(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-ca.cfg.Ledger.Failed():
		return api.E(api.LedgerFailed, "the ledger can no longer be written")
	}
}

// watchRecord ends the process when it is not known whether a change of the record was kept.
func (ca *CA) watchRecord(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-ca.broken:
		return err
	}
}

func (ca *CA) keepMemory(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Minute):
			ca.memory.sweep(time.Now())
		}
	}
}

// Init makes the first root of a trust domain and its record, with a key of renewal tickets where there is a seal. It refuses where there is a record (StateExists) or where
// a bundle of the trust domain is published already (BundlePublished): a lost volume is not a new root.
func Init(ctx context.Context, td spiffeid.TrustDomain, s Store, f Founder, p Publisher, seal *Sealer) (*Bundle, error) {
	_, _, err := s.Load(ctx)
	switch {
	case err == nil:
		return nil, api.E(api.StateExists, "there is a record already; init makes one only where there is none")
	case api.ReasonOf(err) != api.StateMissing:
		return nil, err
	}
	if p != nil {
		published, err := p.Published(ctx, td)
		if err != nil {
			return nil, err
		}
		if published {
			return nil, api.E(api.BundlePublished, "a bundle of trust domain %q is published already, so its root exists or existed somewhere", td)
		}
	}
	root, err := f.Found(ctx, td, time.Now())
	if err != nil {
		return nil, err
	}
	j, err := journal.New(td, root)
	if err != nil {
		return nil, err
	}
	if seal != nil {
		if j, err = withTicketKey(j, seal, time.Now()); err != nil {
			return nil, err
		}
	}
	if _, err := s.Swap(ctx, 0, j); err != nil {
		return nil, err
	}
	b, err := NewBundle(j)
	if err != nil {
		return nil, err
	}
	if p != nil {
		if err := p.Publish(ctx, b); err != nil {
			return nil, fmt.Errorf("the root was made, but its bundle could not be published: %w", err)
		}
	}
	return b, nil
}
