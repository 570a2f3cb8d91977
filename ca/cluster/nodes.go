package cluster

import (
	"maps"
	"slices"
	"time"

	"github.com/signet-ca/signet/ca"
)

// FindNodes implements ca.NodeFinder.
func (d *KubeDirectory) FindNodes(nameOrUID string) []ca.NodeID {
	if d.current(time.Now()) != nil {
		return nil // who has this name now is not known
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	var found []ca.NodeID
	for name, uid := range d.nodes {
		if name == nameOrUID || uid == nameOrUID {
			found = append(found, ca.NodeID{Issuer: d.cfg.Issuer, UID: uid, Name: name})
		}
	}
	return found
}

// FindNodes implements ca.NodeFinder.
func (c Clusters) FindNodes(nameOrUID string) []ca.NodeID {
	var found []ca.NodeID
	for _, issuer := range slices.Sorted(maps.Keys(c)) {
		found = append(found, c[issuer].FindNodes(nameOrUID)...)
	}
	return found
}

// NodeGone implements ca.NodeWatcher. A cluster that has no nodes at all is one that is not seen well.
func (d *KubeDirectory) NodeGone(n ca.NodeID) (upTo time.Time, gone bool) {
	upTo, now := d.Seen(n.Issuer)
	if !now {
		return time.Time{}, false
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if len(d.nodes) == 0 || n.UID == "" {
		return time.Time{}, false
	}
	if n.Name != "" {
		return upTo, d.nodes[n.Name] != n.UID // a node never changes its name
	}
	for _, uid := range d.nodes {
		if uid == n.UID {
			return upTo, false
		}
	}
	return upTo, true
}

// NodeGone implements ca.NodeWatcher.
func (c Clusters) NodeGone(n ca.NodeID) (upTo time.Time, gone bool) {
	if d := c[n.Issuer]; d != nil {
		return d.NodeGone(n)
	}
	return time.Time{}, false
}
