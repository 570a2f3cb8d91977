package audit

import (
	"context"
	"encoding/json"
	"time"
)

// Report is what Verify found.
type Report struct {
	Segments       int
	First, Last    uint64    // numbers of the oldest and the newest entry; zero where there is none
	Oldest, Newest time.Time // of those
	Torn           int64     // bytes behind the last entry that one interrupted write may have left
	Damage         []error   // each a *CorruptError, or an error of reading: the first of each segment
	Refusals       uint64    // entries in the ring
	RingDamage     int       // parts of the ring that cannot be read to their end
}

// Verify reads all that is on record in dir and checks every checksum and every number. It changes nothing, takes no lock
// and works on a copy, and while the ledger is in use. The error is that the folder cannot be read or that ctx ended.
func Verify(ctx context.Context, dir string) (Report, error) {
	var report Report
	s, err := openScan(dir)
	if err != nil {
		return report, err
	}
	s.ctx = ctx
	report.Segments = len(s.parts)
	next := uint64(0)
	for i := range s.parts {
		r, gone, whole := s.part(i, next, func(r *reader, err error) bool {
			if err == nil {
				err = report.add(r)
			}
			if err != nil {
				report.Damage = append(report.Damage, err)
			}
			return err == nil
		})
		if next = 0; whole && !gone {
			next, report.Torn = r.seq+1, r.torn
		}
	}
	if report.Refusals, report.RingDamage, err = verifyRing(ctx, dir); err != nil {
		return report, err
	}
	return report, ctx.Err()
}

// add takes an entry into account.
func (report *Report) add(r *reader) error {
	var e Entry
	if err := json.Unmarshal(r.line, &e); err != nil {
		return &CorruptError{r.part.name(), r.seq, r.offset - int64(len(r.line)) - 1, notParsed}
	}
	if report.First == 0 {
		report.First, report.Oldest = r.seq, e.Time
	}
	report.Last, report.Newest = r.seq, e.Time
	return nil
}

func verifyRing(ctx context.Context, dir string) (entries uint64, damaged int, err error) {
	scans, err := scanRefusals(ctx, dir)
	for _, s := range scans {
		for _, err := range records(s, nil) {
			if err != nil {
				damaged++
				break
			}
			entries++
		}
	}
	return entries, damaged, err
}
