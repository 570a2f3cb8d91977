package audit

import (
	"strings"
	"sync"
	"time"
)

// Bounds of the sample.
const (
	sampleSize = 1024
	sampleRate = 10      // a second
	sampleText = 1 << 10 // bytes of each text
)

// sample is the newest of the refusals that are only counted.
type sample struct {
	mu     sync.Mutex
	kept   []Record // a ring once it is full
	next   uint64   // number of the next record, from 0
	second int64    // the second in which taken were taken
	taken  int
}

// Sample keeps a refusal that is only counted, in memory and for a while: at most ten a second, the newest 1,024. It never
// waits for anything.
func (l *Log) Sample(e Entry) {
	now := time.Now()
	if e.Time.IsZero() {
		e.Time = now
	}
	e.Time = e.Time.UTC()
	l.counts.seen.Add(1)
	e.clean()
	s := &l.sample
	s.mu.Lock()
	defer s.mu.Unlock()
	if second := now.Unix(); second != s.second {
		s.second, s.taken = second, 0
	}
	if s.taken >= sampleRate {
		return
	}
	s.taken++
	rec := Record{Source: SourceSample, Seq: s.next + 1, Entry: e}
	if len(s.kept) < sampleSize {
		s.kept = append(s.kept, rec)
	} else {
		s.kept[s.next%sampleSize] = rec
	}
	s.next++
}

// records returns what is kept, oldest first.
func (s *sample) records() []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.kept) < sampleSize {
		return append([]Record(nil), s.kept...)
	}
	at := s.next % sampleSize
	return append(append([]Record(nil), s.kept[at:]...), s.kept[:at]...)
}

// clean makes every text of e one that may be kept and sent, whoever wrote it: valid UTF-8, and not without end.
func (e *Entry) clean() {
	for _, s := range []*string{
		&e.CorrelationID, &e.SPIFFEID, &e.Cluster, &e.Namespace, &e.ServiceAccount, &e.ServiceAccountUID, &e.Pod, &e.PodUID, &e.Node, &e.NodeUID,
		&e.TokenID, &e.Serial, &e.Issuer, &e.Reason, &e.Detail, &e.Method, &e.Caller, &e.CallerNode, &e.CallerNodeUID,
	} {
		*s = strings.ToValidUTF8((*s)[:min(len(*s), sampleText)], "\uFFFD")
	}
	e.DNSNames = nil // no refusal has any
}
