package upstream

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

func init() { Register("disk", openDisk) }

// DiskConfig says in which files an authority lies: PEM, all of them, and replaced together.
type DiskConfig struct {
	// The private key: PKCS #8, SEC 1 or PKCS #1, unencrypted; ECDSA, Ed25519 or RSA from 2048 bits on. Mode 0600. Required
	// for kind disk.
	KeyFile string `yaml:"keyFile"`
	// The certificate of that key, first, and what leads from it to the root. Required for kind disk.
	CertificateFile string `yaml:"certificateFile"`
	// The roots; required where the certificate is not a root itself. Default: the certificate.
	RootsFile string `yaml:"rootsFile"`
	// The files are a mounted Kubernetes Secret: symbolic links and the group's read bit are accepted. Default: false.
	MountedSecret bool `yaml:"mountedSecret"`
}

// diskPause is how often the files are looked at: three calls of stat, and nothing is read that did not change. Watches of
// the kernel are no substitute: they do not see what is done on another machine to a shared folder, and one on a link does
// not see it replaced.
const diskPause = 5 * time.Second

// lookTime is how long one look at the files may take. Files on another machine can keep a call waiting for ever, and no call of
// the kernel's can be taken back: who looks is left behind then, one at a time, and what was read last goes on.
const lookTime = 5 * time.Second

// badPause is how often files that are no good are read again although nothing changed: one of them may not be valid yet.
const badPause = 30 * time.Second

// disk is an authority in PEM files: a root, or an intermediate with its roots beside it. Key, chain and roots are read and
// checked together, and taken together or not at all; until then what was read last goes on.
//
// The key is in memory while the process lives: whoever can read that memory, or the file, is the authority.
type disk struct {
	config  DiskConfig
	names   []string      // DNS names that SVIDs can get
	longest time.Duration // that an SVID is valid
	pause   time.Duration

	answers answers

	turn  chan struct{} // of capacity 1; held while somebody looks, also by one who was left behind
	stamp func(path string) stamp
	seen  stamps    // the files as they were when they were last read; with turn
	tried time.Time // when they were last read; with turn

	mu   sync.Mutex
	good *fileSet // what was read last and is good; nil before the first
	why  error    // why what is there now is not used; nil where it is
}

// fileSet is an authority as it was read; it is never changed.
type fileSet struct {
	key   crypto.Signer
	chain []*x509.Certificate // the key's certificate first
	roots []*x509.Certificate // that the chain leads to, in the order of the file
	at    time.Time
}

// stamp tells one state of a file from another without reading it.
type stamp struct {
	dev, ino    uint64
	size        int64
	mtime       time.Time
	ctime       syscall.Timespec
	mode        fs.FileMode
	uid         uint32
	missing     bool
	unreachable bool
}

type stamps [3]stamp

func openDisk(c Config, p Parts) (ca.Upstream, error) {
	d := c.Disk
	if d.KeyFile == "" || d.CertificateFile == "" {
		return nil, api.E(api.ConfigInvalid, "upstream.disk.keyFile and upstream.disk.certificateFile are required for upstream.kind disk")
	}
	if d.KeyFile == d.CertificateFile || d.KeyFile == d.RootsFile {
		return nil, api.E(api.ConfigInvalid, "upstream.disk.keyFile is to hold the key alone")
	}
	return &disk{config: d, names: p.DNSNames, longest: p.Longest, pause: diskPause, turn: make(chan struct{}, 1), stamp: stampOf}, nil
}

// look returns what is to be used now: it reads the files if they are not what was read last, and keeps what it has where
// they are no good, or do not answer in time (UpstreamUnavailable). The error says why what is there is not used; with a set all the
// same where an older one is.
func (d *disk) look(ctx context.Context, now time.Time) (*fileSet, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	looked := make(chan struct{})
	select {
	case d.turn <- struct{}{}:
		go func() { // which nobody waits for where the kernel does not answer it
			defer func() { <-d.turn }()
			defer close(looked)
			d.renew(now)
		}()
	case <-ctx.Done():
	}
	var late error
	select {
	case <-looked:
	case <-ctx.Done():
		late = api.Wrap(api.UpstreamUnavailable, ctx.Err(), "the upstream's files do not answer: the disk or the machine on which they lie is away")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	why := cmp.Or(late, d.why)
	if d.good != nil && why != nil {
		e := api.AsError(why)
		return d.good, api.Wrap(e.Reason, why, fmt.Sprintf("%s; what was read at %s goes on", e.Detail, d.good.at.UTC().Format(time.RFC3339)))
	}
	return d.good, why
}

// renew reads the files if they are not what was read last. The caller has the turn.
func (d *disk) renew(now time.Time) {
	keep := func(set *fileSet, why error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.why = why; set != nil {
			d.good = set
		}
	}
	for range 3 { // the files may be replaced meanwhile
		before := d.stamps()
		d.mu.Lock()
		known := before == d.seen && (d.why == nil && d.good != nil || d.why != nil && now.Sub(d.tried).Abs() < badPause)
		d.mu.Unlock()
		if known {
			return
		}
		d.tried = now
		set, err := d.read(now)
		after := d.stamps()
		if before != after {
			d.seen = stamps{} // to be read again at the next look at the latest
			if err == nil {
				err = api.E(api.UpstreamFiles, "the upstream's files are being replaced")
			}
			keep(nil, err)
			continue
		}
		d.seen = before
		if err != nil {
			set = nil
		}
		keep(set, err)
		return
	}
}

func (d *disk) stamps() stamps {
	var s stamps
	for i, path := range []string{d.config.KeyFile, d.config.CertificateFile, d.config.RootsFile} {
		if path != "" {
			s[i] = d.stamp(path)
		}
	}
	return s
}

func stampOf(path string) stamp {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return stamp{missing: true}
	case err != nil:
		return stamp{unreachable: true}
	}
	s := stamp{size: info.Size(), mtime: info.ModTime(), mode: info.Mode()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.dev, s.ino, s.ctime, s.uid = uint64(st.Dev), st.Ino, changed(st), st.Uid
	}
	return s
}

// Mint implements ca.Upstream.
func (d *disk) Mint(ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
	now := time.Now()
	return d.answers.once(r, now, func() ([]*x509.Certificate, error) {
		pub, err := issuance.ParseIntermediateCSR(r.CSR, r.TrustDomain)
		if err != nil {
			return nil, err
		}
		set, path, err := d.under(ctx, r.Root, now)
		if err != nil {
			return nil, err
		}
		notAfter := r.NotAfter
		for _, c := range path {
			if c.NotAfter.Before(notAfter) {
				notAfter = c.NotAfter
			}
		}
		cert, err := issuance.SignIntermediate(path[0], set.key, issuance.IntermediateRequest{
			TrustDomain:  r.TrustDomain,
			PublicKey:    pub,
			NotAfter:     notAfter,
			ExcludeNames: r.ExcludeNames,
		}, now)
		if err != nil {
			return nil, err
		}
		return slices.Concat([]*x509.Certificate{cert}, path[:len(path)-1]), nil
	})
}

// under returns the files' authority and its path to a root of the record; UpstreamRoot where there is none.
func (d *disk) under(ctx context.Context, root journal.Authority, now time.Time) (*fileSet, []*x509.Certificate, error) {
	set, err := d.look(ctx, now)
	if set == nil {
		return nil, nil, err
	}
	for _, c := range set.roots {
		if string(c.Raw) != string(root.Certificate) {
			continue
		}
		if path := issuance.PathTo(set.chain, c, now); path != nil {
			return set, path, nil
		}
		return nil, nil, api.E(api.UpstreamChain, "a certificate between the upstream's files and their root has expired or is not valid yet")
	}
	return nil, nil, api.E(api.UpstreamRoot, "the upstream's files are of another root than the one that is active; a new root is taken up by a rotation")
}

// WatchRoots implements ca.Upstream: the files are looked at every few seconds.
func (d *disk) WatchRoots(ctx context.Context, tell func([]*x509.Certificate)) error {
	var last *fileSet
	for {
		if set, _ := d.look(ctx, time.Now()); set != last { // what is wrong is told by Probe
			last = set
			tell(slices.Clone(set.roots))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(d.pause):
		}
	}
}

// Probe implements ca.Upstream. What is there now has to be good: at the next start there is nothing else.
func (d *disk) Probe(ctx context.Context, td spiffeid.TrustDomain, root journal.Authority) error {
	now := time.Now()
	if _, err := d.look(ctx, now); err != nil {
		return err
	}
	set, path, err := d.under(ctx, root, now)
	if err != nil {
		return err
	}
	return issuance.CheckParent(path, set.key, td, d.names, now)
}

// Found implements ca.Founder: it takes up the first root that the files lead to.
func (d *disk) Found(ctx context.Context, td spiffeid.TrustDomain, now time.Time) (journal.Authority, error) {
	set, err := d.look(ctx, now)
	if err != nil {
		return journal.Authority{}, err
	}
	root := set.roots[0]
	path := issuance.PathTo(set.chain, root, now)
	if err := issuance.CheckParent(path, set.key, td, d.names, now); err != nil {
		return journal.Authority{}, err
	}
	// As the CA judges the intermediate that is signed then.
	left := path[0].NotAfter.Sub(now)
	for _, c := range path {
		left = min(left, c.NotAfter.Sub(now))
	}
	if least := issuance.LeastLife(d.longest, root, now); left < least {
		return journal.Authority{}, api.E(api.UpstreamLifetime, "an intermediate under these files would live for %s, at least %s are needed", left.Truncate(time.Second), least)
	}
	if len(root.SubjectKeyId) == 0 {
		return journal.Authority{}, api.E(api.UpstreamSubject, "the upstream's root has no key identifier, by which roots are told apart")
	}
	return journal.Authority{ID: hex.EncodeToString(root.SubjectKeyId), State: journal.Active, Certificate: root.Raw}, nil
}

// CrossSign implements ca.CrossSigner, where the key is the older root's own.
func (d *disk) CrossSign(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority, newer *x509.Certificate) (*x509.Certificate, error) {
	now := time.Now()
	root, key, err := d.own(ctx, older, now)
	if err != nil {
		return nil, err
	}
	return issuance.CrossSign(td, root, key, newer, now)
}

// CanCross implements ca.CrossProber.
func (d *disk) CanCross(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority) error {
	now := time.Now()
	root, key, err := d.own(ctx, older, now)
	if err != nil {
		return err
	}
	return issuance.CanCross(td, root, key, now)
}

// own returns a root with its own key.
func (d *disk) own(ctx context.Context, a journal.Authority, now time.Time) (*x509.Certificate, crypto.Signer, error) {
	set, path, err := d.under(ctx, a, now)
	if err != nil {
		return nil, nil, err
	}
	if len(path) > 1 {
		return nil, nil, api.E(api.UpstreamRoot, "the upstream's files hold the key of an intermediate, and only the root itself can vouch for another root")
	}
	return path[0], set.key, nil
}
