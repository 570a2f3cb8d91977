package audit

import (
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
)

// The metrics of a ledger. None has a label that anybody outside chooses.
var (
	descRoom     = desc("signet_ledger_room_bytes", "Room that is reserved for decisions: what is left of the current segment, and the next one.")
	descFree     = desc("signet_ledger_filesystem_free_bytes", "What the file system of the ledger has left for the CA's user.")
	descReserved = desc("signet_ledger_next_segment", "1 while the next segment waits; 0 when there is no room for it: the ledger stops when the current one is full.")
	descSegments = desc("signet_ledger_segments", "Segments that are kept.")
	descRemoved  = desc("signet_ledger_segments_removed_total", "Segments that were removed because of their age.")
	descEntries  = desc("signet_ledger_entries_total", "Decisions put on record.")
	descSyncs    = desc("signet_ledger_syncs_total", "Syncs of the disk that they took.")
	descFull     = desc("signet_ledger_full_total", "Writes that found no room.")
	descRefusals = desc("signet_ledger_refusals_total", "Refusals of known callers, by what became of them: written (entries in the ring), coalesced (counted into one), dropped (the ring could not be written).", "result")
	descRing     = desc("signet_ledger_refusals_writable", "1 while the ring of refusals can be written.")
	descSampled  = desc("signet_ledger_refusals_unrecorded_total", "Refusals that are only counted; some are kept in memory.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Describe implements prometheus.Collector.
func (l *Log) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descRoom, descFree, descReserved, descSegments, descRemoved, descEntries, descSyncs, descFull, descRefusals, descRing, descSampled} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (l *Log) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	l.mu.Lock()
	room, segments, reserved := l.room-l.size, len(l.segments), 0.0
	if l.spare != nil {
		room += l.spare.room
	}
	if l.spare != nil || l.noRoom == nil {
		reserved = 1 // or it is being made
	}
	l.mu.Unlock()
	gauge(descRoom, float64(room))
	gauge(descReserved, reserved)
	gauge(descSegments, float64(segments))
	if free, ok := freeBytes(l.dir); ok {
		gauge(descFree, free)
	}
	writable := 1.0
	if l.counts.ringBroken.Load() {
		writable = 0
	}
	gauge(descRing, writable)
	count(descRemoved, l.counts.removed.Load())
	count(descEntries, l.counts.entries.Load())
	count(descSyncs, l.counts.syncs.Load())
	count(descFull, l.counts.full.Load())
	count(descRefusals, l.counts.refusalsWritten.Load(), "written")
	count(descRefusals, l.counts.coalesced.Load(), "coalesced")
	count(descRefusals, l.counts.dropped.Load(), "dropped")
	count(descSampled, l.counts.seen.Load())
}

// freeBytes returns what an unprivileged user may still write in dir.
func freeBytes(dir string) (float64, bool) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return 0, false
	}
	return float64(s.Bavail) * float64(s.Bsize), true
}
