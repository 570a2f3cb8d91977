package attestor

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
)

// missInterval is the least time between two reads that unknown key ids cause: anybody can make up a kid.
const missInterval = 5 * time.Second

// KeySourceConfig says where an issuer's key set is read. Exactly one of File and URL is set.
type KeySourceConfig struct {
	Issuer string // "iss" of the tokens; required
	File   string // a JWKS, replaced by renaming another over it
	URL    string // of a JWKS: https, or http on a loopback address where AllowHTTP is set; never from a token or a discovery document

	AllowHTTP bool              // for development: an http URL is allowed, on a loopback address
	CAFile    string            // PEM certificates that the URL's server must chain to, read anew each time; empty: the system's roots
	TokenFile string            // a bearer token that the URL asks for, as an API server does, read anew each time; empty: none
	Transport http.RoundTripper // nil: TLS 1.2 or later by CAFile, one connection a read, proxies by environment

	Refresh  time.Duration // time between two reads, spread by a tenth; zero: a minute
	Timeout  time.Duration // of one read; zero: 10 s
	MissWait time.Duration // how long a token with an unknown kid may wait for a read; zero: 1 s

	// Persist is a file that keeps the last good set over a restart, so that tokens can be checked while the issuer is
	// away; empty: none. The set of another issuer, File or URL in it is not used. Who can write it can make tokens, so
	// it belongs into a folder of this process alone. WriteFile writes it, atomically and durably; it is required with
	// Persist.
	Persist   string
	WriteFile func(path string, data []byte) error

	Log *slog.Logger // nil: silent
}

// KeySource keeps the key set of one issuer fresh while Run runs. The last good set is used until a newer one has been
// read, however long that takes: an error, an empty set, or one without any key we can use never takes keys away.
type KeySource struct {
	cfg KeySourceConfig
	log *slog.Logger

	kick chan struct{} // wakes Run for one read; capacity 1

	mu       sync.Mutex
	set      *KeySet       // newest; nil before the first
	changed  chan struct{} // closed when set is replaced
	status   KeyStatus
	running  bool
	pending  chan struct{} // closed when the read that is to come or under way has ended; nil: none is asked for
	lastMiss time.Time     // when an unknown kid last asked for a read

	unsaved bool // owned by Run: the set is newer than what Persist holds
}

// KeyStatus says how fresh an issuer's key set is.
type KeyStatus struct {
	Issuer string
	Keys   int       // that can be used; zero before the first set
	Read   time.Time // when this process last read a good set; zero: never, and what keys there are come from Persist
	Err    error     // of the last read; nil: it was good, or there was none yet
}

var _ Keys = (*KeySource)(nil)

// NewKeySource makes a source and loads what Persist holds; it reads nothing else before Run. It fails with
// api.ConfigInvalid.
func NewKeySource(cfg KeySourceConfig) (*KeySource, error) {
	if err := cfg.resolve(); err != nil {
		return nil, api.Wrap(api.ConfigInvalid, err, "key set of issuer "+cfg.Issuer+": "+err.Error())
	}
	s := &KeySource{
		cfg:     cfg,
		log:     cfg.Log.With("issuer", cfg.Issuer),
		kick:    make(chan struct{}, 1),
		changed: make(chan struct{}),
		pending: make(chan struct{}), // who comes before the first read waits for it
		status:  KeyStatus{Issuer: cfg.Issuer},
	}
	if cfg.Persist != "" {
		s.load()
	}
	return s, nil
}

// Run reads the set at once, then every Refresh, and sooner after an error or for an unknown kid. It returns nil when ctx
// has ended, and an error only when it is running already.
func (s *KeySource) Run(ctx context.Context) error {
	if !s.start() {
		return errors.New("the key source is running already")
	}
	defer s.stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-s.kick:
		}
		s.begin()
		set, err := s.read(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.end(ctx, set, err)
		if failures++; err == nil {
			failures = 0
		}
		timer.Reset(s.delay(failures))
	}
}

// delay is the time to the next read: Refresh, or from 1 s up to it after failures.
func (s *KeySource) delay(failures int) time.Duration {
	d := s.cfg.Refresh
	if failures > 0 {
		d = min(d, time.Second<<min(failures-1, 20))
	}
	return d - d/10 + rand.N(d/5+1)
}

// Snapshot returns the newest set, as KeySet.JWKS has it, and a channel that is closed when there is a newer one. Before
// the first set it is nil.
func (s *KeySource) Snapshot() (jwks []byte, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.set != nil {
		jwks = s.set.JWKS()
	}
	return jwks, s.changed
}

// Status returns how fresh the set is.
func (s *KeySource) Status() KeyStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Lookup implements Keys. For an unknown kid, and while there is no set at all, it waits for one read (at most MissWait),
// which all callers share and which happens at most every five seconds.
func (s *KeySource) Lookup(ctx context.Context, kid, alg string) (crypto.PublicKey, error) {
	if key, err := s.find(ctx, kid, alg); err == nil {
		return key, nil
	}
	if done := s.ask(time.Now()); done != nil {
		if err := waitAside(ctx, func() { s.await(ctx, done) }); err != nil {
			return nil, err
		}
	}
	return s.find(ctx, kid, alg)
}

func (s *KeySource) find(ctx context.Context, kid, alg string) (crypto.PublicKey, error) {
	s.mu.Lock()
	set, cause := s.set, s.status.Err
	s.mu.Unlock()
	if set == nil {
		return nil, errNoKeys(cause)
	}
	return staticKeys{set}.Lookup(ctx, kid, alg)
}

// await waits until done is closed, for a bounded time.
func (s *KeySource) await(ctx context.Context, done <-chan struct{}) {
	timer := time.NewTimer(s.cfg.MissWait)
	defer timer.Stop()
	select {
	case <-done:
	case <-ctx.Done():
	case <-timer.C:
	}
}

// ask returns the channel that is closed when the next read has ended, or nil when there will be none soon.
func (s *KeySource) ask(now time.Time) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending != nil {
		return s.pending
	}
	if !s.running || !s.lastMiss.IsZero() && now.Sub(s.lastMiss) < missInterval {
		return nil
	}
	s.lastMiss = now
	s.pending = make(chan struct{})
	s.kick <- struct{}{} // empty: only ask fills it, begin empties it, and both set pending
	return s.pending
}

func (s *KeySource) start() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running {
		return false
	}
	s.running = true
	return true
}

// stop releases who still waits.
func (s *KeySource) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = false
	s.release()
}

// begin marks that a read is under way, and takes back the wish for it.
func (s *KeySource) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending == nil {
		s.pending = make(chan struct{})
	}
	select {
	case <-s.kick:
	default:
	}
}

// release needs s.mu.
func (s *KeySource) release() {
	if s.pending != nil {
		close(s.pending)
		s.pending = nil
	}
	select {
	case <-s.kick:
	default:
	}
}

// end takes over what was read: the new set, or the error.
func (s *KeySource) end(ctx context.Context, set *KeySet, err error) {
	s.mu.Lock()
	news := err == nil && (s.set == nil || !bytes.Equal(s.set.JWKS(), set.JWKS()))
	if news {
		s.replace(set)
	}
	if s.status.Err = err; err == nil {
		s.status.Read = time.Now()
	}
	kept := s.status.Keys
	s.release()
	s.mu.Unlock()

	if err != nil {
		s.log.WarnContext(ctx, "key set cannot be read", "error", err, "kept_keys", kept)
		return
	}
	if news {
		s.log.InfoContext(ctx, "key set changed", "keys", set.Len(), "ignored", set.Ignored())
	}
	if s.cfg.Persist == "" || !news && !s.unsaved {
		return
	}
	if s.unsaved = true; s.save(set) == nil {
		s.unsaved = false
	}
}

// replace needs s.mu.
func (s *KeySource) replace(set *KeySet) {
	s.set = set
	s.status.Keys = set.Len()
	close(s.changed)
	s.changed = make(chan struct{})
}
