package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/durable"
)

// maxFile bounds a directory file, in bytes, before it is parsed.
const maxFile = 16 << 20

// FileDirectory is a ca.Directory over a JSON file of pods, for development and for clusters whose pods somebody else
// writes down. The file is read anew when it has changed; while it cannot be read nothing new is issued.
type FileDirectory struct {
	path string

	mu    sync.Mutex
	stamp fileStamp
	pods  map[podKey]ca.Pod
	err   error
}

type podKey struct{ issuer, uid string }

// fileStamp tells whether a file changed; writers replace it by rename, so the inode changes each time.
type fileStamp struct {
	mod   time.Time
	size  int64
	inode uint64
}

func stampOf(i fs.FileInfo) fileStamp { return fileStamp{i.ModTime(), i.Size(), inode(i)} }

// NewFileDirectory returns a directory over the file at path, which need not exist yet.
func NewFileDirectory(path string) *FileDirectory { return &FileDirectory{path: path} }

// filePods is the file's shape.
type filePods struct {
	Pods []filePod `json:"pods"`
}

type filePod struct {
	Issuer            string    `json:"issuer"`
	Namespace         string    `json:"namespace"`
	Name              string    `json:"name"`
	UID               string    `json:"uid"`
	ServiceAccount    string    `json:"serviceAccount"`
	ServiceAccountUID string    `json:"serviceAccountUID"`
	Node              string    `json:"node"`
	NodeUID           string    `json:"nodeUID"`
	DeletionTimestamp time.Time `json:"deletionTimestamp,omitzero"`
	Finished          bool      `json:"finished,omitempty"`
}

// Pod implements ca.Directory.
func (d *FileDirectory) Pod(_ context.Context, id ca.PodID) (ca.Pod, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	if d.err != nil {
		return ca.Pod{}, api.Wrap(api.DirectoryUnavailable, d.err, "the directory of pods cannot be read")
	}
	p, ok := d.pods[podKey{id.Issuer, id.UID}]
	if !ok {
		return ca.Pod{}, api.E(api.PodUnknown, "the pod is not in the directory of live pods")
	}
	return p, nil
}

// refresh reads the file anew when it has changed. A file that could not be read is tried again at once, for its mode may
// have changed and nothing else; one that was read and is wrong stays wrong until it changes.
func (d *FileDirectory) refresh() {
	data, stamp, err := readChanged(d.path, d.stamp)
	if err != nil {
		d.err, d.stamp = err, fileStamp{}
		return
	}
	if stamp == d.stamp {
		return
	}
	d.stamp = stamp
	pods, err := parsePods(data)
	if err != nil {
		d.err = fmt.Errorf("%s: %w", d.path, err)
		return
	}
	d.pods, d.err = pods, nil
}

// readChanged returns the content of a file whose stamp is no longer old; nil when it still is.
func readChanged(path string, old fileStamp) ([]byte, fileStamp, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fileStamp{}, err
	}
	if !info.Mode().IsRegular() { // opening a pipe would wait for its writer
		return nil, fileStamp{}, fmt.Errorf("%s is not a regular file", path)
	}
	if stampOf(info) == old {
		return nil, old, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fileStamp{}, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil { // of what is open, in case the name has moved on
		return nil, fileStamp{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fileStamp{}, err
	}
	return data, stampOf(info), nil
}

// parsePods parses a directory file. No two pods have the same issuer and UID, and each has both.
func parsePods(data []byte) (map[podKey]ca.Pod, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("larger than %d bytes", maxFile)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var f filePods
	if err := dec.Decode(&f); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the pods") // such as the rest of an older, longer file
	}
	pods := make(map[podKey]ca.Pod, len(f.Pods))
	for _, p := range f.Pods {
		k := podKey{p.Issuer, p.UID}
		if p.UID == "" || p.Issuer == "" {
			return nil, errors.New("a pod without uid or issuer")
		}
		if _, ok := pods[k]; ok {
			return nil, fmt.Errorf("the pod with UID %.64q is there twice", p.UID)
		}
		pods[k] = ca.Pod{
			Issuer: p.Issuer, Namespace: p.Namespace, Name: p.Name, UID: p.UID,
			ServiceAccount: p.ServiceAccount, ServiceAccountUID: p.ServiceAccountUID,
			NodeName: p.Node, NodeUID: p.NodeUID, DeleteAt: p.DeletionTimestamp, Finished: p.Finished,
		}
	}
	return pods, nil
}

// FilePublisher is a ca.Publisher that writes the bundle as files: bundle.json in the SPIFFE format, whose sequence is the
// generation, and bundle.pem beside it. What is there already it judges as a KubePublisher does, but it looks only when it is
// told to publish.
type FilePublisher struct {
	dir     string
	log     *slog.Logger
	metrics *Metrics

	mu   sync.Mutex // held while something is written
	last *ca.Bundle // that was published by this process; nil: none yet

	files files
}

// NewFilePublisher returns a publisher into dir, which is made when it is needed. Metrics may be nil: nobody asks.
func NewFilePublisher(dir string, log *slog.Logger, m *Metrics) *FilePublisher {
	if m == nil {
		m = NewMetrics()
	}
	return &FilePublisher{dir: dir, log: log, metrics: m}
}

// Names of the published files.
const (
	BundleJSON = "bundle.json"
	BundlePEM  = "bundle.pem"
)

// refreshHint is how often a reader of the files should look again (SPIFFE Trust Domain and Bundle section 4.1.3).
const refreshHint = 5 * time.Minute

// Published implements ca.Publisher: any bundle file counts, for whatever is there was trusted by somebody.
func (p *FilePublisher) Published(context.Context, spiffeid.TrustDomain) (bool, error) {
	for _, name := range []string{BundleJSON, BundlePEM} {
		_, err := os.Lstat(filepath.Join(p.dir, name))
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return false, nil
}

// Shown returns the bundle that is published: without a generation where there is none that says its own, and without a hash where its
// roots cannot be told.
func (p *FilePublisher) Shown(_ context.Context, td spiffeid.TrustDomain) (journal.Held, error) {
	data, err := p.read()
	return shownBy(td, data), err
}

// read returns the files that are there.
func (p *FilePublisher) read() (map[string]string, error) {
	files := map[string]string{}
	for _, name := range []string{BundleJSON, BundlePEM} {
		data, err := os.ReadFile(filepath.Join(p.dir, name))
		if err == nil {
			files[name] = string(data)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return files, nil
}

// Publish implements ca.Publisher. Files that hold the bundle already are left alone.
func (p *FilePublisher) Publish(ctx context.Context, b *ca.Bundle) (err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() { p.files.note(p.dir, b, err) }()
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	want, err := documents(b)
	if err != nil {
		return err
	}
	if err := p.compare(ctx, b, want); err != nil {
		p.metrics.failures.WithLabelValues(kindBundle, string(api.ReasonOf(err))).Inc()
		return err
	}
	if err := errors.Join(p.write(BundlePEM, want[BundlePEM]), p.write(BundleJSON, want[BundleJSON])); err != nil {
		return err
	}
	p.last = b
	return nil
}

// compare says whether what is there must be left alone: BundleRollback or BundleEquivocation. What cannot be read at all is replaced.
func (p *FilePublisher) compare(ctx context.Context, b *ca.Bundle, want map[string]string) error {
	data, _ := p.read()
	if maps.Equal(data, want) {
		return nil
	}
	sequence, hash, good := parseBundle(b.TrustDomain, data)
	foreign, why := judge(b, sequence, hash, good, p.last != nil && p.last.Generation == b.Generation && p.last.Hash == b.Hash)
	if !foreign {
		return why
	}
	p.metrics.reverts.WithLabelValues(kindBundle).Inc()
	p.log.ErrorContext(ctx, "the published bundle was changed by somebody else, and is put right", "dir", p.dir, "error", why)
	return nil
}

// judge says what it means that something else than b is published where b is to be: by whom that is, as its sequence, the hash of its
// roots, and whether it is good say, and whether this process has published b there (mine). Where it is foreign it is an alarm, of which
// why may say more, and it is replaced. Otherwise why is the reason for which it must be left alone; nil: it may be replaced.
//
// A higher number is one that agents may have come to believe, so nobody undoes it, except where no CA can have come to it: agents do
// not believe that one either, and whoever may write there could otherwise take the place from the CA for ever.
func judge(b *ca.Bundle, sequence uint64, hash [32]byte, good, mine bool) (foreign bool, why error) {
	ours, shown := b.Generation.Sequence(), api.FromSequence(sequence)
	other := good && sequence == ours && hash != b.Hash
	switch {
	case sequence > ours && shown.Plausible(time.Now()):
		return false, api.E(api.BundleRollback, "the published bundle has generation %s, ours is %s", shown, b.Generation)
	case sequence > ours:
		return true, api.E(api.BundleRejected, "it claims generation %s, which no CA can have come to", shown)
	case other && !mine:
		return false, api.E(api.BundleEquivocation, "the published bundle has our generation %s and other roots", b.Generation)
	case other:
		return true, api.E(api.BundleEquivocation, "another claims generation %s", b.Generation)
	}
	return mine, nil
}

// shownBy is the bundle that documents show. Where they do not hold roots, or not the same, nobody can say which are believed: the hash is
// zero.
func shownBy(td spiffeid.TrustDomain, data map[string]string) (h journal.Held) {
	sequence, hash, good := parseBundle(td, data)
	h.Generation = api.FromSequence(sequence)
	if good {
		h.Hash = hash
	}
	return h
}

// publishedSequence is that of a bundle in the SPIFFE format; 0 for what is no bundle at all, which is put right.
func publishedSequence(data []byte) uint64 {
	var old struct {
		Keys     []json.RawMessage `json:"keys"`
		Sequence uint64            `json:"spiffe_sequence"`
	}
	if err := json.Unmarshal(data, &old); err != nil || old.Keys == nil {
		return 0
	}
	return old.Sequence
}

// marshalBundle returns a bundle in the SPIFFE format, and as PEM.
func marshalBundle(b *ca.Bundle) (doc, pemDoc []byte, err error) {
	sb := spiffebundle.New(b.TrustDomain)
	for _, r := range b.Roots {
		sb.AddX509Authority(r)
	}
	sb.SetSequenceNumber(b.Generation.Sequence())
	sb.SetRefreshHint(refreshHint)
	if doc, err = sb.Marshal(); err != nil {
		return nil, nil, err
	}
	pemDoc, err = sb.X509Bundle().Marshal()
	return doc, pemDoc, err
}

func (p *FilePublisher) write(name, data string) error {
	path := filepath.Join(p.dir, name)
	if old, err := os.ReadFile(path); err == nil && string(old) == data {
		return nil
	}
	return durable.WriteFile(path, []byte(data), 0o644)
}
