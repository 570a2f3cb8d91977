package csi

import (
	"context"
	"time"
)

const (
	// staleAfter is how long kubelet was there and did not ask for a volume, until it is taken for one that it has lost.
	// It asks for every volume of a pod that lives within two minutes.
	staleAfter = 15 * time.Minute
	stopTime   = 30 * time.Second // for the streams of a volume that is swept
)

// Labels of what is swept.
const (
	sweptRecord = "pod_gone" // the pod's folder is gone
	sweptFolder = "leftover" // kubelet can never ask for it to be removed
)

// sweep drops volumes whose pods are gone, and removes folders that kubelet has lost: it was killed while it wrote its notes
// about a volume, so it can never ask for it to be removed, and would stumble over it for ever.
func (d *Driver) sweep(now time.Time) {
	for _, t := range d.targets() {
		d.sweepKnown(t)
	}
	found, err := d.pods.leftovers()
	if err != nil {
		d.log.Warn("kubelet's folder of pods not looked through", "error", err)
		return
	}
	seen := make(map[target]time.Time, len(found))
	d.mu.Lock()
	for _, t := range found {
		if d.volumes[t] != nil {
			continue
		}
		if seen[t] = now; !d.leftovers[t].IsZero() {
			seen[t] = d.leftovers[t]
		}
	}
	d.leftovers = seen
	d.mu.Unlock()
	for t, since := range seen {
		if d.stale(since) {
			d.sweepUnknown(t)
		}
	}
}

// stale reports whether kubelet was there for long enough since a volume was seen last. That it is away says nothing about
// its pods: they run on without it.
func (d *Driver) stale(since time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.kubelet.since.IsZero() {
		return false
	}
	if d.kubelet.since.After(since) {
		since = d.kubelet.since
	}
	return d.kubelet.last.Sub(since) >= staleAfter
}

func (d *Driver) sweepKnown(t target) {
	release, ok := d.upkeep(t)
	if !ok {
		return
	}
	defer release()
	d.mu.Lock()
	v := d.volumes[t]
	d.mu.Unlock()
	if v == nil {
		return
	}
	what := ""
	if exists, err := d.pods.exists(t.podUID); err == nil && !exists {
		what = sweptRecord
	} else if err == nil && d.stale(v.published) && d.unpublishable(t) {
		what = sweptFolder
	}
	if what == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	err := d.stop(ctx, v)
	if err == nil && what == sweptFolder {
		err = d.pods.removeAll(t)
	}
	if err != nil {
		d.log.Warn("volume not swept", "namespace", v.Pod.Namespace, "pod", v.Pod.Name, "error", err)
		return
	}
	d.unremember(v.ID)
	d.metrics.swept.WithLabelValues(what).Inc()
	d.log.Info("volume of a pod that is gone swept", "namespace", v.Pod.Namespace, "pod", v.Pod.Name, "what", what)
}

func (d *Driver) unpublishable(t target) bool {
	f, err := d.pods.open(t)
	if err != nil {
		return false
	}
	defer f.Close()
	return f.unpublishable()
}

func (d *Driver) sweepUnknown(t target) {
	release, ok := d.upkeep(t)
	if !ok {
		return
	}
	defer release()
	d.mu.Lock()
	known := d.volumes[t] != nil
	d.mu.Unlock()
	if known {
		return
	}
	if err := d.pods.removeAll(t); err != nil {
		d.log.Warn("leftover of a pod not swept", "pod_uid", t.podUID, "error", err)
		return
	}
	d.metrics.swept.WithLabelValues(sweptFolder).Inc()
	d.log.Info("leftover of a pod that is gone swept", "pod_uid", t.podUID)
}
