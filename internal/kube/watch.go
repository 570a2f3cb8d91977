package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

// WatchConfig says what is followed, and who is told.
type WatchConfig struct {
	// Resource, all of it, or of one namespace, or the one object of that name.
	Resource  Resource
	Namespace string
	Name      string

	// Labels is a label selector that narrows it further; empty: none. What no longer matches it counts as deleted.
	Labels string

	// Digest: of an object's Data only the digest is kept, from the moment at which it was read.
	Digest bool

	// ProbeNamespace is where the server is probed, if not in Namespace: a list over all namespaces of a kind of which
	// there are many is dear, and of one namespace it proves the same.
	ProbeNamespace string

	// Stale is how long a stream may be cut before what it said is too old. The server is probed five times in it.
	// Required.
	Stale time.Duration

	// Replace is told of all objects there are, after a list. Required.
	Replace func([]Object)

	// Apply is told of one object that was added or changed, or that is deleted. Required.
	Apply func(o Object, deleted bool)

	// Failed is told why the stream could not be opened or broke off other than by its time, each time. May be nil.
	Failed func(error)
}

// Bounds of a watch.
const (
	watchTime  = 4 * time.Minute // a stream, before the server ends it; up to a quarter more
	watchQuiet = 150 * time.Second
	retryFirst = 100 * time.Millisecond
	retryMost  = 2 * time.Second
	retryNone  = time.Minute // where the API server knows no such kind of object
)

// selectors narrows a collection down.
func (w WatchConfig) selectors(query url.Values) {
	if w.Name != "" {
		query.Set("fieldSelector", "metadata.name="+w.Name)
	}
	if w.Labels != "" {
		query.Set("labelSelector", w.Labels)
	}
}

func (w WatchConfig) reduce(o Object) Object {
	if w.Digest {
		o.Digest, o.Data = Digest(o.Data), nil
	}
	return o
}

// Watch follows a collection: a list, then a stream of changes, resumed where it broke off, and a list again only where
// the server no longer keeps that version (410 Gone).
//
// That a stream is open does not prove that anything would come through it: a server that is frozen, or cut off from its
// etcd, leaves it open and silent, and sends a bookmark only once a minute. So the same collection is probed as well: a
// list of at most one object's metadata, which the server answers only after its own view has caught up with etcd. It
// travels over the connection of the stream. A stream counts as good up to the moment at which the last probe that was
// answered had been sent. A stream that stays silent while probes are answered, as some broken proxy may make it, is ended
// when two bookmarks are missing.
type Watch struct {
	client *Client
	cfg    WatchConfig

	mu     sync.Mutex
	synced bool
	stream int                // counts the streams that were opened
	end    context.CancelFunc // of the one that is open; nil: none is
	seen   time.Time
}

// NewWatch returns a watch that begins with Run.
func (c *Client) NewWatch(cfg WatchConfig) *Watch { return &Watch{client: c, cfg: cfg} }

// Seen is the moment up to which all changes are known, give or take the way of one answer; zero before the first list.
func (w *Watch) Seen() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.synced {
		return time.Time{}
	}
	return w.seen
}

// Connected says whether a stream is open now.
func (w *Watch) Connected() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.end != nil
}

// Run follows until ctx ends. Replace and Apply are called by it alone, one at a time.
func (w *Watch) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { w.probe(ctx) })
	version, delay := "", retryFirst
	for ctx.Err() == nil {
		began := time.Now()
		next, err := w.follow(ctx, version)
		version = next
		if ctx.Err() != nil {
			return nil
		}
		if err == nil && time.Since(began) > time.Second {
			delay = retryFirst
			continue
		}
		if err != nil && w.cfg.Failed != nil {
			w.cfg.Failed(err)
		}
		if time.Since(began) > retryMost {
			delay = retryFirst
		}
		wait := delay
		if errors.Is(err, ErrNotFound) {
			wait = retryNone
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait)):
		}
		delay = min(2*delay, retryMost)
	}
	return nil
}

// follow lists where there is no version, streams, and returns the version to go on from: none, if it is no longer kept.
func (w *Watch) follow(ctx context.Context, version string) (string, error) {
	if version == "" {
		start := time.Now()
		all, v, err := w.client.list(ctx, w.cfg)
		if err != nil {
			return "", err
		}
		w.cfg.Replace(all)
		version = v
		w.mu.Lock()
		w.synced, w.seen = true, start
		w.mu.Unlock()
	}
	next, err := w.streamFrom(ctx, version)
	if errors.Is(err, errExpired) {
		return "", nil // listed anew at once, or after a moment where that repeats
	}
	return next, err
}

// streamFrom opens one stream and reads it to its end.
func (w *Watch) streamFrom(ctx context.Context, version string) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	limit := watchTime + rand.N(watchTime/4)
	query := url.Values{
		"watch": {"1"}, "allowWatchBookmarks": {"true"}, "resourceVersion": {version},
		"timeoutSeconds": {strconv.Itoa(int(limit / time.Second))},
	}
	w.cfg.selectors(query)
	patience := time.AfterFunc(w.client.timeout, cancel) // for the head of the answer, then for each event
	defer patience.Stop()
	resp, err := w.client.do(ctx, http.MethodGet, w.cfg.Resource.path(w.cfg.Namespace, ""), query, w.cfg.Resource.accept(false), nil)
	if err != nil {
		return version, err
	}
	defer resp.Body.Close()
	w.opened(cancel)
	defer w.opened(nil)
	return w.read(resp.Body, version, func() { patience.Reset(watchQuiet) })
}

// opened notes the stream that is open now. What it has to say of the time before comes first, so it is good only once a
// probe that was sent after this has been answered.
func (w *Watch) opened(end context.CancelFunc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.end = end; end != nil {
		w.stream++
	}
}

// event is one line of a watch.
type event struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"`
}

// read applies events until the stream ends, and returns the version of the last. A stream that the server ends between
// two events has had its time.
func (w *Watch) read(body io.Reader, version string, heard func()) (string, error) {
	in := &capped{r: body}
	dec := json.NewDecoder(in)
	for {
		heard()
		in.next()
		var e event
		switch err := dec.Decode(&e); {
		case errors.Is(err, io.EOF):
			return version, nil
		case err != nil:
			return version, fmt.Errorf("the watch of %s broke off: %w", w.cfg.Resource, err)
		}
		if e.Type == "ERROR" {
			var s status
			if err := json.Unmarshal(e.Object, &s); err != nil || s.Code == 0 {
				return "", fmt.Errorf("the watch of %s ended with an error that does not parse", w.cfg.Resource)
			}
			return version, s.err()
		}
		var o wireObject
		if err := json.Unmarshal(e.Object, &o); err != nil || o.Metadata.ResourceVersion == "" {
			return "", fmt.Errorf("the watch of %s sent something else than an object", w.cfg.Resource)
		}
		switch e.Type {
		case "BOOKMARK":
		case "ADDED", "MODIFIED", "DELETED":
			if o.Metadata.UID == "" || o.Metadata.Name == "" {
				return "", fmt.Errorf("the watch of %s sent something else than an object", w.cfg.Resource)
			}
			w.cfg.Apply(w.cfg.reduce(o.object()), e.Type == "DELETED")
		default:
			return "", fmt.Errorf("the watch of %s sent an event of unknown type", w.cfg.Resource)
		}
		version = o.Metadata.ResourceVersion
	}
}

// probe asks now and then whether the server still sees what happens.
func (w *Watch) probe(ctx context.Context) {
	tick := time.NewTicker(w.cfg.Stale / 5)
	defer tick.Stop()
	for {
		w.probeOnce(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// probeOnce moves what is seen forward if the answer comes while the stream is open that was open when it was asked, and
// ends a stream whose server has not answered for long.
func (w *Watch) probeOnce(ctx context.Context) {
	w.mu.Lock()
	stream, end := w.stream, w.end
	w.mu.Unlock()
	if end == nil {
		return
	}
	start := time.Now()
	err := w.ask(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.stream != stream || w.end == nil:
	case err == nil:
		w.seen = start
	case time.Since(w.seen) > 3*w.cfg.Stale:
		end() // its connection may be the one that is dead
	}
}

// ask lists at most one object, consistently.
func (w *Watch) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, min(w.client.timeout, w.cfg.Stale/2))
	defer cancel()
	query := url.Values{"limit": {"1"}}
	w.cfg.selectors(query)
	where := cmp.Or(w.cfg.ProbeNamespace, w.cfg.Namespace)
	resp, err := w.client.do(ctx, http.MethodGet, w.cfg.Resource.path(where, ""), query, metadataList, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	meta, err := readList(resp.Body, func(Object) error { return nil })
	if err == nil && meta.ResourceVersion == "" {
		err = errors.New("the answer is not a list")
	}
	return err
}
