package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/durable"
)

// What a directory knew when it last saw its cluster is kept in a file, so that a CA that is started anew while the API
// server is away can go on from it. It is a copy of memory, written within seconds of a deletion or of the loss of sight,
// within a minute of any other change, every five minutes though nothing changes, and at the end: a process that is killed
// must not bring back what it saw deleted. That it is written while not all is seen does no harm, for it says up to when all
// was. It says which pods live, so it belongs into a folder of the CA alone.

// Bounds of that file.
const (
	maxMemory      = 64 << 20 // bytes; more is not written, and not read
	memoryVersion  = 1
	memoryTick     = time.Second
	memorySoon     = 5 * time.Second // after a write, once something is gone or sight is lost; longer where a write takes long
	memoryInterval = time.Minute     // after a write, once anything else has changed
	memoryRefresh  = 5 * time.Minute // after a write, though nothing has changed
	memoryShare    = 20              // the part of the time that writes may take
)

// memoryFile is the file's shape.
type memoryFile struct {
	Version  int             `json:"version"`
	Issuer   string          `json:"issuer"`
	Seen     time.Time       `json:"seen"`
	Pods     []memoryPod     `json:"pods"`
	Accounts []memoryAccount `json:"accounts"`
	Nodes    []memoryNode    `json:"nodes"`
}

type memoryPod struct {
	UID       string `json:"u"`
	Namespace string `json:"s"`
	Name      string `json:"n"`
	Account   string `json:"a"`
	Node      string `json:"o,omitempty"`
	Made      int64  `json:"m"`
	DeleteAt  int64  `json:"d,omitempty"`
	Finished  bool   `json:"f,omitempty"`
}

type memoryAccount struct {
	UID       string    `json:"u"`
	Namespace string    `json:"s"`
	Name      string    `json:"n"`
	Made      time.Time `json:"m"`
}

type memoryNode struct {
	UID  string `json:"u"`
	Name string `json:"n"`
}

// Seen implements ca.Rememberer.
func (d *KubeDirectory) Seen(issuer string) (upTo time.Time, now bool) {
	if issuer != d.cfg.Issuer {
		return time.Time{}, false
	}
	for _, w := range d.watches {
		seen := w.Seen()
		if seen.IsZero() {
			d.mu.RLock()
			defer d.mu.RUnlock()
			return d.restored, false
		}
		if upTo.IsZero() || seen.Before(upTo) {
			upTo = seen
		}
	}
	return upTo, d.current(time.Now()) == nil
}

// Recall implements ca.Rememberer.
func (d *KubeDirectory) Recall(id ca.PodID) (ca.Pod, error) {
	if upTo, _ := d.Seen(id.Issuer); upTo.IsZero() {
		return ca.Pod{}, unavailable(errUnsynced)
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	p, known := d.pods[id.UID]
	sa, node := d.accounts[account{p.namespace, p.account}], d.nodes[p.node]
	_, gone := d.gone[id.UID]
	switch {
	case gone:
		return ca.Pod{}, api.E(api.PodDeleted, "the pod is deleted")
	case !known || p.node == "":
		return ca.Pod{}, api.E(api.DirectoryUnavailable, "the cluster cannot be seen now, and the pod was not known when it was last seen")
	case sa.uid == "":
		return ca.Pod{}, api.E(api.PodMismatch, "the pod's ServiceAccount is gone")
	case node == "":
		return ca.Pod{}, api.E(api.PodMismatch, "the pod's node is gone")
	case olderThan(p, sa):
		return ca.Pod{}, errAccountAnew()
	}
	return d.pod(id, p, sa, node), nil
}

// Seen implements ca.Rememberer.
func (c Clusters) Seen(issuer string) (upTo time.Time, now bool) {
	if d := c[issuer]; d != nil {
		return d.Seen(issuer)
	}
	return time.Time{}, false
}

// Recall implements ca.Rememberer.
func (c Clusters) Recall(id ca.PodID) (ca.Pod, error) {
	if d := c[id.Issuer]; d != nil {
		return d.Recall(id)
	}
	return ca.Pod{}, errUnknown()
}

// restore takes over what the file remembers; what cannot be read is no memory, which is told and no error.
func (d *KubeDirectory) restore() {
	data, err := durable.ReadPrivate(d.cfg.Persist, maxMemory)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var m memoryFile
	if err == nil {
		m, err = parseMemory(data, d.cfg.Issuer)
	}
	if err != nil {
		d.cfg.Log.Warn("what was last seen of the cluster cannot be read", "issuer", d.cfg.Issuer, "path", d.cfg.Persist, "error", err)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range m.Pods {
		d.pods[p.UID] = kubePod{
			namespace: p.Namespace, name: p.Name, account: p.Account, node: p.Node, made: p.Made, deleteAt: p.DeleteAt, finished: p.Finished,
		}
	}
	for _, a := range m.Accounts {
		d.accounts[account{a.Namespace, a.Name}] = owner{a.UID, a.Made}
	}
	for _, n := range m.Nodes {
		d.nodes[n.Name] = n.UID
	}
	d.restored = m.Seen
}

// parseMemory reads the file of the cluster of an issuer.
func parseMemory(data []byte, issuer string) (memoryFile, error) {
	var m memoryFile
	if err := json.Unmarshal(data, &m); err != nil {
		return memoryFile{}, err
	}
	switch {
	case m.Version != memoryVersion:
		return memoryFile{}, fmt.Errorf("version %d, this build knows %d", m.Version, memoryVersion)
	case m.Issuer != issuer:
		return memoryFile{}, errors.New("it is about another cluster")
	case m.Seen.IsZero():
		return memoryFile{}, errors.New("it does not say when that was")
	}
	return m, nil
}

// memoryMark is what decides whether the file is to be written: the state of what it would hold.
type memoryMark struct {
	changes, ends uint64
	upTo          int64 // Unix nanoseconds; 0: nothing was ever seen
}

// saving is what is known of the file. It is used by one goroutine.
type saving struct {
	held  memoryMark // by the file
	tried time.Time
	took  time.Duration
}

// due says whether the file is to be written.
func (s *saving) due(is memoryMark, sees, ended bool, now time.Time) bool {
	if is.upTo == 0 || is == s.held {
		return false // nothing is known, or nothing new
	}
	wait := memoryRefresh
	switch {
	case ended || s.tried.IsZero():
		return true
	case is.ends != s.held.ends || !sees:
		wait = min(max(memorySoon, memoryShare*s.took), memoryInterval)
	case is.changes != s.held.changes:
		wait = memoryInterval
	}
	return now.Sub(s.tried) >= wait
}

// mark is the state of what the file would hold that says that all is known up to then; d.mu must be held.
func (d *KubeDirectory) mark(upTo time.Time) memoryMark {
	m := memoryMark{changes: d.changes, ends: d.ends}
	if !upTo.IsZero() {
		m.upTo = upTo.UnixNano()
	}
	return m
}

// save writes what is known now, of which all is known up to then, and returns what it wrote.
func (d *KubeDirectory) save() (memoryMark, error) {
	upTo, _ := d.Seen(d.cfg.Issuer) // before what is read, so that it is never too late
	m := memoryFile{Version: memoryVersion, Issuer: d.cfg.Issuer, Seen: upTo.UTC()}
	d.mu.RLock()
	saved := d.mark(upTo)
	for uid, p := range d.pods {
		m.Pods = append(m.Pods, memoryPod{uid, p.namespace, p.name, p.account, p.node, p.made, p.deleteAt, p.finished})
	}
	for k, o := range d.accounts {
		m.Accounts = append(m.Accounts, memoryAccount{o.uid, k.namespace, k.name, o.made})
	}
	for name, uid := range d.nodes {
		m.Nodes = append(m.Nodes, memoryNode{uid, name})
	}
	d.mu.RUnlock()
	data, err := json.Marshal(m)
	if err != nil {
		return memoryMark{}, err
	}
	if len(data) > maxMemory {
		return memoryMark{}, fmt.Errorf("%d bytes are more than the %d that are read", len(data), maxMemory)
	}
	return saved, durable.WriteFile(d.cfg.Persist, data, 0o600)
}

// remember keeps the file until ctx ends.
func (d *KubeDirectory) remember(ctx context.Context) error {
	if d.cfg.Persist == "" {
		return nil
	}
	tick := time.NewTicker(memoryTick)
	defer tick.Stop()
	var s saving
	if upTo := d.restored; !upTo.IsZero() {
		s.held.upTo = upTo.UnixNano() // of the changes since the file was read it holds none
	}
	for {
		ended := false
		select {
		case <-ctx.Done():
			ended = true
		case <-tick.C:
		}
		now := time.Now()
		upTo, _ := d.Seen(d.cfg.Issuer)
		d.mu.RLock()
		is := d.mark(upTo)
		d.mu.RUnlock()
		if s.due(is, d.current(now) == nil, ended, now) {
			s.tried = now
			saved, err := d.save()
			if err == nil {
				s.held = saved
			} else {
				d.tell("memory", err.Error())
			}
			s.took = time.Since(now)
		}
		if ended {
			return nil
		}
	}
}
