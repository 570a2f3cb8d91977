package cluster

import (
	"context"
	"errors"
	"regexp"
	"strconv"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/kube"
)

// TrustBundleSigner is the signerName of the ClusterTrustBundle. To write one for it needs the permission to "attest" it.
const TrustBundleSigner = kube.OurPrefix + "bundle"

// sequenceAnnotation is the generation of a ClusterTrustBundle, which has no other place for it.
const sequenceAnnotation = kube.OurPrefix + "sequence"

// dnsName is what may follow the signer in the name of a ClusterTrustBundle: a DNS name in lower case.
var dnsName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// TrustBundleNamed says whether a ClusterTrustBundle may be named after that trust domain. Underscores, say, may not be in
// its name.
func TrustBundleNamed(td string) bool { return len(td) <= 253 && dnsName.MatchString(td) }

// TrustBundleName is the name of the trust domain's ClusterTrustBundle.
func TrustBundleName(td spiffeid.TrustDomain) string { return "signet.dev:bundle:" + td.Name() }

// trustBundle keeps the one ClusterTrustBundle. Where the API server knows no such kind of object (Kubernetes before 1.37),
// that is told once and asked again now and then.
type trustBundle struct {
	cfg     KubePublisherConfig
	name    string
	confirm func(context.Context, *ca.Bundle) error // asks whether the original is that bundle: errReplaced
	watch   *kube.Watch
	changed chan struct{} // holds one: there is something to look at
	told    func()        // something of what tell says may have changed

	mu     sync.Mutex
	bundle *ca.Bundle // nil: nothing is to be shown
	pem    string
	good   string // the PEM that it last held rightly
	absent bool   // the API server was told to know no such kind
	held   int
	place  place
}

func newTrustBundle(cfg KubePublisherConfig, confirm func(context.Context, *ca.Bundle) error, told func()) *trustBundle {
	t := &trustBundle{told: told, cfg: cfg, name: TrustBundleName(cfg.TrustBundle), confirm: confirm, changed: make(chan struct{}, 1)}
	t.watch = cfg.watch(kindTrustBundle, kube.WatchConfig{
		Resource: kube.ClusterTrustBundles, Name: t.name,
		Replace: func(all []kube.Object) { t.look(len(all)) },
		Apply: func(_ kube.Object, deleted bool) {
			if deleted {
				t.look(0)
			} else {
				t.look(1)
			}
		},
		Failed: func(err error) {
			if errors.Is(err, kube.ErrNotFound) {
				t.unknown()
			}
		},
	}, func() int {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.held
	})
	return t
}

// look notes that the watch told of held objects, so the API server knows the kind.
func (t *trustBundle) look(held int) {
	t.mu.Lock()
	t.held, t.absent = held, false
	t.mu.Unlock()
	wake(t.changed)
}

// unknown notes that the API server knows no such kind of object.
func (t *trustBundle) unknown() {
	t.cfg.Metrics.trustBundle.Set(0)
	t.mu.Lock()
	told := t.absent
	t.absent = true
	t.mu.Unlock()
	t.told()
	if !told {
		t.cfg.Log.Warn("the API server knows no ClusterTrustBundles (certificates.k8s.io/v1), so none is kept")
	}
}

// set says what it is to hold from now on; nil: it is left as it is.
func (t *trustBundle) set(b *ca.Bundle, pem string) {
	t.mu.Lock()
	t.bundle, t.pem = b, pem
	t.mu.Unlock()
	wake(t.changed)
}

// settle makes it what it should be.
func (t *trustBundle) settle(ctx context.Context) error {
	t.mu.Lock()
	b, pem, good, absent := t.bundle, t.pem, t.good, t.absent
	t.mu.Unlock()
	if b == nil || absent {
		return nil
	}
	err := t.write(ctx, b, pem, good)
	if ctx.Err() == nil {
		t.note(func(p *place) { p.ended(err) })
	}
	switch {
	case err == nil:
		t.mu.Lock()
		t.good = pem
		t.mu.Unlock()
		t.cfg.Metrics.trustBundle.Set(1)
		return nil
	case ctx.Err() != nil:
		return nil
	case kube.CauseOf(err) == kube.CauseAbsent:
		t.unknown()
		return nil // the watch will tell
	}
	t.cfg.Metrics.trustBundle.Set(0)
	cause := kube.CauseOf(err)
	if errors.Is(err, errReplaced) {
		cause = kube.CauseConflict
	}
	t.cfg.Metrics.failures.WithLabelValues(kindTrustBundle, string(cause)).Inc()
	if cause != kube.CauseConflict {
		t.cfg.Log.WarnContext(ctx, "the ClusterTrustBundle cannot be written", "name", t.name, "error", err)
	}
	return err
}

// write writes it where it does not hold pem already, and tells if somebody else changed what was good.
func (t *trustBundle) write(ctx context.Context, b *ca.Bundle, pem, good string) error {
	old, err := t.cfg.Client.Get(ctx, kube.ClusterTrustBundles, "", t.name)
	ours := b.Generation.Sequence()
	sequence, _ := strconv.ParseUint(old.Annotations[sequenceAnnotation], 10, 64)
	if err == nil || errors.Is(err, kube.ErrNotFound) {
		var is journal.Held
		if shown, err := x509bundle.Parse(b.TrustDomain, []byte(old.TrustBundle)); err == nil && sequence != 0 {
			is = journal.Held{Generation: api.FromSequence(sequence), Hash: api.BundleHash(shown.X509Authorities())}
		}
		t.note(func(p *place) { p.holds(is) })
	}
	switch {
	case errors.Is(err, kube.ErrNotFound):
		if good == pem {
			t.alarm(ctx, "the ClusterTrustBundle was deleted by somebody else, and is made anew", nil)
		}
	case err != nil:
		return err
	case old.TrustBundle == pem && sequence == ours:
		return nil
	default:
		if sequence > ours { // somebody's tampering, or a newer bundle of another replica: the original knows
			if err := t.confirm(ctx, b); err != nil {
				return err
			}
		}
		if good == pem || sequence >= ours || sequence == 0 {
			t.alarm(ctx, "the ClusterTrustBundle was changed by somebody else, and is put right", tampered(sequence, b))
		}
	}
	_, err = t.cfg.Client.WriteTrustBundle(ctx, kube.TrustBundle{
		Name: t.name, ResourceVersion: old.ResourceVersion, Signer: TrustBundleSigner, PEM: pem,
		Labels: map[string]string{partOf: "signet"}, Annotations: map[string]string{sequenceAnnotation: strconv.FormatUint(ours, 10)},
	})
	if err == nil {
		t.note(func(p *place) { p.holds(heldOf(b)) })
	}
	return err
}

// note keeps what was found out of it.
func (t *trustBundle) note(f func(*place)) {
	t.mu.Lock()
	f(&t.place)
	t.mu.Unlock()
	t.told()
}

// tell appends what it holds; nothing where the API server knows no such kind, for then nobody reads it.
func (t *trustBundle) tell(list []journal.Copy) []journal.Copy {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.absent {
		return list
	}
	return append(list, t.place.copy(placeTrustBundle, t.name, ""))
}

func (t *trustBundle) alarm(ctx context.Context, what string, reason error) {
	t.cfg.Metrics.reverts.WithLabelValues(kindTrustBundle).Inc()
	t.cfg.Log.ErrorContext(ctx, what, "name", t.name, "error", reason)
}
