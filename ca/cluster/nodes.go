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
