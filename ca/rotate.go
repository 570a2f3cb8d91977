package ca

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// The engine of the root rotation. It decides nothing by itself: journal.Next does, on the record as it is stored at the moment of
// the swap and on evidence gathered then. It looks whenever the record, the evidence or this replica's intermediate has changed, and
// when something ends by itself; never more often. A process that is killed between any two lines of it goes on from the record.

const (
	rotateLook  = 20 * time.Second       // at most between two looks at a rotation: the timers of a machine that slept are late
	idleLook    = time.Minute            // while there is none
	gatherPause = 100 * time.Millisecond // between two looks because of evidence
	rotateRetry = time.Second            // after a failure, and then twice as long each time
	againAfter  = time.Hour              // a new root could not be made by itself

	maxEntryText  = 8 << 10   // bytes of what one entry of the ledger tells of names
	maxEntryNames = 2000      // that are put on record with one step
	maxNamesText  = 128 << 10 // bytes of them: each 8 KiB is a write that the step waits for, and bans with it
	reissueRate   = 500       // SVIDs a second that a wave of reissues asks for
	minReissue    = 500 * time.Millisecond
	maxWatchers   = 32
)

var errNoStep = errors.New("there is no step to take")

// keepRotation takes a rotation forward, and begins one when that is due. It ends with ctx.
func (ca *CA) keepRotation(ctx context.Context) error {
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval, retry.Multiplier, retry.RandomizationFactor = rotateRetry, followMaxRetry, 2, 0
	for {
		j, recordChanged := ca.record.Get()
		_, evidenceChanged := ca.evidence.Get()
		s, signingChanged := ca.signing.Get()
		_, toldChanged := ca.told.Get()
		ca.orderReissue(j, s, time.Now())
		took, wait, err := ca.advance(ctx, j)
		ca.noteTrouble(ctx, err)
		switch {
		case err != nil && err == ca.autoWhy: // waiting does not mend it, and it is told as long as it is so
			retry.Reset()
		case err != nil:
			wait, recordChanged, evidenceChanged, signingChanged = retry.NextBackOff(), nil, nil, nil
		case took:
			retry.Reset()
			continue
		default:
			retry.Reset()
		}
		if j.Operation == nil {
			evidenceChanged, signingChanged = nil, nil
		}
		due := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-recordChanged:
		case <-due.C:
		case <-signingChanged:
		case <-toldChanged:
		case <-evidenceChanged:
			select { // what comes with it is looked at together
			case <-ctx.Done():
			case <-time.After(gatherPause):
			}
		}
		due.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// noteTrouble keeps why nothing can be decided, or that it can.
func (ca *CA) noteTrouble(ctx context.Context, err error) {
	last := ca.trouble.Load()
	switch {
	case err == nil && last != nil:
		ca.trouble.Set(nil)
		ca.log.InfoContext(ctx, "the rotation goes on")
	case err != nil && ctx.Err() == nil:
		e := api.AsError(err)
		if e == last {
			return // nothing was tried since
		}
		ca.metrics.rotationFailures.Inc()
		if last == nil || last.Reason != e.Reason {
			ca.log.ErrorContext(ctx, "the rotation cannot go on", "reason", string(e.Reason), "error", err)
		}
		ca.trouble.Set(e)
	}
}

// advance takes the step that can be taken, or says when to look again.
func (ca *CA) advance(ctx context.Context, j journal.Journal) (took bool, wait time.Duration, err error) {
	now := time.Now()
	if j.Operation == nil {
		ca.metrics.setRotation(j, nil)
		return ca.beginDue(ctx, j, now)
	}
	acks, err := ca.gather(ctx, j, now)
	if err != nil {
		return false, 0, err
	}
	step, found := journal.Next(j, now, acks)
	ca.metrics.setRotation(j, found)
	if !step.Is() {
		ca.tellBlockers(ctx, j, found)
		return false, ca.lookForGone(nextLook(j, now, acks, found), acks), nil
	}
	_, _, err = ca.takeStep(ctx, caller{}, func(j journal.Journal, now time.Time, acks journal.Acks) (journal.Step, string, error) {
		step, _ := journal.Next(j, now, acks)
		return step, "", nil
	})
	if errors.Is(err, errNoStep) {
		return false, gatherPause, nil
	}
	return err == nil, 0, err
}

// nextLook is when something may change by itself: a blocker ends, a limit is over, an agent's last SVID expires.
func nextLook(j journal.Journal, now time.Time, acks journal.Acks, found []journal.Blocker) time.Duration {
	wait := rotateLook
	at := func(t time.Time) {
		if d := t.Sub(now); d > 0 {
			wait = min(wait, d)
		}
	}
	o := j.Operation
	at(o.Latest)
	at(o.Begun.Add(o.Straggler))
	for _, a := range j.Authorities {
		for _, t := range []time.Time{a.Times.Published, a.Times.Tainted} {
			at(t.Add(o.Straggler))
		}
	}
	for _, b := range found {
		at(b.Until)
	}
	for _, a := range acks.Agents {
		if !a.Connected {
			at(a.Until)
		}
	}
	return wait
}

// takeStep takes the step that decide chooses for the record as it is stored, on the evidence of that moment. Nothing is decided
// outside of the swap: where somebody else was first it is decided anew. Each step is on record before it is taken.
func (ca *CA) takeStep(ctx context.Context, who caller, decide func(journal.Journal, time.Time, journal.Acks) (step journal.Step, why string, err error)) (step journal.Step, id string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeTime)
	defer cancel()
	id = api.NewCorrelationID()
	var recorded journal.Step
	stored, err := ca.changeRecord(ctx, func(j journal.Journal) (journal.Journal, error) {
		now := time.Now()
		acks, err := ca.gather(ctx, j, now)
		if err != nil {
			return journal.Journal{}, err
		}
		var why string
		if step, why, err = decide(j, now, acks); err != nil {
			return journal.Journal{}, err
		}
		if !step.Is() {
			return journal.Journal{}, errNoStep
		}
		next, err := journal.Apply(j, step, now)
		if err != nil {
			return journal.Journal{}, err
		}
		if recorded.Do != step.Do || recorded.Authority != step.Authority || !slices.Equal(recorded.Forced, step.Forced) {
			if err := ca.recordStep(ctx, id, who, step, why, now); err != nil {
				return journal.Journal{}, err
			}
			recorded = step
		}
		return next, nil
	})
	if err != nil {
		return step, "", err
	}
	ca.metrics.rotationSteps.WithLabelValues(string(step.Do)).Inc()
	ca.log.InfoContext(ctx, "rotation: step taken", "step", string(step.Do), "authority", step.Authority, "operation", step.Operation,
		"generation", stored.Generation().String(), "passed_over", len(step.Passed), "forced_by", step.By, "correlation_id", id)
	if stored.Operation == nil {
		ca.log.InfoContext(ctx, "rotation: at its end", "operation", step.Operation, "root", stored.ActiveAuthority().ID)
	}
	return step, id, nil
}

// recordStep puts a step on record, with everybody over whom it is taken: in several entries of one id where they are many.
func (ca *CA) recordStep(ctx context.Context, id string, who caller, s journal.Step, why string, now time.Time) error {
	text := fmt.Sprintf("%s, operation %s", s.Do, s.Operation)
	if why != "" {
		text += ": " + why
	}
	names := passedNames(s.Passed)
	e := audit.Entry{Time: now, Kind: audit.KindRotate, CorrelationID: id, Issuer: s.Authority, Method: "step", Caller: who.name, TokenID: who.token.TokenID}
	if len(s.Forced) > 0 {
		e.Method = "ForceStep"
	}
	for first := true; first || len(names) > 0; first = false {
		if !first {
			text = fmt.Sprintf("%s, operation %s, continued", s.Do, s.Operation)
		}
		n, size := 0, 0
		for n < len(names) && (n == 0 || size+len(names[n]) < maxEntryText) {
			size += len(names[n]) + 2
			n++
		}
		if n > 0 {
			text += "; not ready and passed over: " + strings.Join(names[:n], ", ")
		}
		names = names[n:]
		e.Detail = text
		if err := ca.cfg.Ledger.Append(ctx, e); err != nil {
			return unrecorded(err, "the step could not be put on record, so it was not taken")
		}
	}
	return nil
}

// passedNames are those of everybody over whom a step is taken, as they are put on record. Where they are too many they are taken of each
// node in turn, so that what one node says of its pods leaves room for the others', and a digest stands for all.
func passedNames(passed []journal.Blocker) []string {
	names, turn, size := make([]string, 0, len(passed)), make([]int, 0, len(passed)), 0
	of := map[nodeKey]int{}
	for _, b := range passed {
		name, n := fmt.Sprintf("%s (%s)", b.Name, b.Pass), 0
		if k := (nodeKey{b.Cluster, b.NodeUID}); b.Kind == journal.ByPod && b.More == 0 {
			n = of[k]
			of[k]++
		}
		names, turn = append(names, name), append(turn, n)
		size += len(name) + len(", ")
	}
	if len(names) <= maxEntryNames && size <= maxNamesText {
		return names
	}
	sum := digestOfNames(slices.Sorted(slices.Values(names)))
	order := make([]int, len(names))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(turn[a], turn[b]) })
	var few []string
	size = 0
	for _, i := range order {
		if size += len(names[i]) + len(", "); len(few) == maxEntryNames || size > maxNamesText {
			break
		}
		few = append(few, names[i])
	}
	return append(few, fmt.Sprintf("and %d more; SHA-256 of all, one a line: %x", len(names)-len(few), sum))
}

// tellBlockers logs who stands in the way, when those change.
func (ca *CA) tellBlockers(ctx context.Context, j journal.Journal, found []journal.Blocker) {
	sum := fnv.New64a()
	fmt.Fprint(sum, j.Operation.ID, " ", j.Generation())
	for _, b := range found { // which may be those of a whole fleet, and are in order
		if b.Blocks() {
			io.WriteString(sum, b.Name)
			sum.Write([]byte{0})
		}
	}
	if ca.toldBlockers == sum.Sum64() {
		return
	}
	ca.toldBlockers = sum.Sum64()
	names := blockingNames(found)
	ca.log.InfoContext(ctx, "rotation: waiting", "operation", j.Operation.ID, "waits_for", len(names), "first", strings.Join(names[:min(len(names), 5)], " "))
}

// operate makes a change of a rotation that somebody asked for. The entry is in the ledger before the change is stored. One that
// changes nothing, since it was made before, is neither recorded nor stored.
func (ca *CA) operate(ctx context.Context, e audit.Entry, change func(j journal.Journal, now time.Time) (journal.Journal, error)) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeTime)
	defer cancel()
	recorded := false
	_, err = ca.changeRecord(ctx, func(j journal.Journal) (journal.Journal, error) {
		next, err := change(j, time.Now())
		if err != nil {
			return journal.Journal{}, err
		}
		if same(j, next) {
			return journal.Journal{}, errNoStep
		}
		if !recorded {
			if err := ca.cfg.Ledger.Append(ctx, e); err != nil {
				return journal.Journal{}, unrecorded(err, "the decision could not be put on record, so nothing was changed")
			}
			recorded = true
		}
		return next, nil
	})
	if errors.Is(err, errNoStep) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	ca.log.WarnContext(ctx, "rotation: "+e.Method, "by", e.Caller, "detail", e.Detail, "correlation_id", e.CorrelationID)
	return true, nil
}

// same reports whether two records say the same.
func same(a, b journal.Journal) bool {
	x, xerr := a.Encode()
	y, yerr := b.Encode()
	return xerr == nil && yerr == nil && string(x) == string(y)
}

// newRoot makes a root that could follow the active one, or takes up the one that the upstream has. Nothing is stored by it.
func (ca *CA) newRoot(ctx context.Context, j journal.Journal) (journal.Authority, error) {
	f, ok := ca.cfg.Upstream.(Founder)
	if !ok {
		return journal.Authority{}, api.E(api.AuthorityRefused, "the upstream neither makes roots nor says which one is to follow")
	}
	limited, cancel := context.WithTimeout(ctx, mintTime)
	defer cancel()
	a, err := f.Found(limited, ca.cfg.TrustDomain, time.Now())
	if err != nil {
		return journal.Authority{}, err
	}
	if slices.ContainsFunc(j.Authorities, func(o journal.Authority) bool { return o.ID == a.ID }) {
		return journal.Authority{}, api.E(api.AuthorityRefused, "the upstream has no other root than authority %s, which is on record", a.ID)
	}
	return a, j.Refused(a, time.Now())
}

// begin begins a rotation to a new root. The root is made, and signed by the old one, before anything is stored; what would be
// refused with any root, and a repetition, is found first, so that none is made for it.
func (ca *CA) begin(ctx context.Context, e audit.Entry, r journal.StartRequest, withoutCross bool) (changed bool, err error) {
	if err := ca.reload(ctx); err != nil {
		return false, err
	}
	j := ca.record.Load()
	r.Kind = journal.Planned
	if _, err := journal.Start(j, r, time.Now()); err == nil || api.ReasonOf(err) != api.AuthorityRefused {
		return false, err // for want of a root it is AuthorityRefused
	}
	if r.Authority, err = ca.newRoot(ctx, j); err != nil {
		return false, err
	}
	active := j.ActiveAuthority()
	if (len(active.SealedKey) == 0) != (len(r.Authority.SealedKey) == 0) {
		r.Kind = journal.Switch
	}
	cross, err := ca.CrossSign(ctx, active, r.Authority)
	switch {
	case err == nil:
		r.Authority.Cross, r.Authority.CrossBy = cross.Raw, active.ID
	case !withoutCross || r.Automatic && !uncrossable(err) && !journal.Due(j, time.Now()).Overdue:
		if !uncrossable(err) {
			return false, err // that passes
		}
		return false, api.Wrap(api.UpstreamCross, err, "the new root cannot be signed by the old one: "+api.AsError(err).Detail)
	default:
		ca.log.WarnContext(ctx, "rotation: the new root is not signed by the old one; nobody is passed over for being late", "error", err)
	}
	e.Issuer = r.Authority.ID
	return ca.operate(ctx, e, func(j journal.Journal, now time.Time) (journal.Journal, error) { return journal.Start(j, r, now) })
}

// uncrossable reports whether the old root will not sign the new one later either.
func uncrossable(err error) bool {
	switch api.ReasonOf(err) {
	case api.UpstreamCross, api.UpstreamRoot, api.UpstreamRefused:
		return true
	}
	return false
}

// begunBefore reports whether an operation of that id was begun.
func begunBefore(j journal.Journal, id string) bool {
	return j.Operation != nil && j.Operation.ID == id || slices.ContainsFunc(j.Past, func(p journal.Past) bool { return p.ID == id })
}

// beginDue begins the rotation that is due by itself; otherwise it says when to look again. Where none can be begun it returns autoWhy
// until it has tried again: after an hour, or when the upstream tells of other roots.
func (ca *CA) beginDue(ctx context.Context, j journal.Journal, now time.Time) (took bool, wait time.Duration, err error) {
	if ca.cfg.ManualRotation {
		return false, idleLook, nil
	}
	s, told := journal.Due(j, now), ca.told.Load()
	if !s.Due || ca.clocks.check(now) != "" {
		ca.autoWhy, wait = nil, idleLook
		if d := s.Prepare.Sub(now); d > 0 {
			wait = min(wait, d)
		}
		return false, wait, nil
	}
	if ca.autoWhy != nil && now.Before(ca.autoAgain) && slices.EqualFunc(told, ca.autoTold, (*x509.Certificate).Equal) {
		return false, idleLook, ca.autoWhy
	}
	ca.autoWhy = nil
	id := "auto-" + now.UTC().Format("20060102-150405")
	e := rotateEntry("StartRotation", caller{}, now)
	e.Detail = fmt.Sprintf("operation %s begins by itself: the active root expires at %s", id, s.Expires.UTC().Format(time.RFC3339))
	changed, err := ca.begin(ctx, e, journal.StartRequest{Request: journal.Request{ID: id, By: "signet-ca/" + ca.cfg.Replica,
		Why: "the active root expires at " + s.Expires.UTC().Format(time.RFC3339)}, Automatic: true}, true)
	switch api.ReasonOf(err) {
	case api.RotationUnderWay:
		return false, gatherPause, nil // another replica, or somebody, was first
	case api.AuthorityRefused, api.StateFull:
		if err != nil { // waiting mends none of it soon
			ca.autoAgain, ca.autoTold = now.Add(againAfter), told
			ca.log.ErrorContext(ctx, "the root expires, and no rotation can be begun by itself", "expires", s.Expires, "error", err)
			ca.autoWhy = api.Wrap(api.ReasonOf(err), err, fmt.Sprintf("the active root expires at %s, and no rotation can be begun by itself: %s",
				s.Expires.UTC().Format(time.RFC3339), api.AsError(err).Detail))
			return false, idleLook, ca.autoWhy
		}
	}
	return err == nil && changed, idleLook, err
}

// rotateEntry begins the ledger's entry about a decision of who.
func rotateEntry(method string, who caller, now time.Time) audit.Entry {
	return audit.Entry{Time: now, Kind: audit.KindRotate, CorrelationID: api.NewCorrelationID(), Method: method, Caller: who.name, TokenID: who.token.TokenID}
}

// orderReissue tells agents to renew what is under a compromised root, once this replica signs under another; and nothing any more
// when that is gone. The wave is as long as the CA needs for it, and no longer than half of what the operation leaves for it.
func (ca *CA) orderReissue(j journal.Journal, s *signing, now time.Time) {
	var tainted []string
	for _, a := range j.Authorities {
		if a.State == journal.Tainted {
			tainted = append(tainted, a.ID)
		}
	}
	old := ca.reissue.Load()
	switch {
	case len(tainted) == 0 || s == nil || slices.Contains(tainted, s.root):
		if old != nil && len(tainted) == 0 {
			ca.reissue.Set(nil)
		}
		return
	case old != nil && slices.Equal(old.GetRootKeyIds(), tainted):
		return
	}
	under, within := 0, minReissue
	for _, a := range ca.agents(j, nil, now) {
		under += 1 + len(a.Pods)
	}
	within = max(within, time.Duration(under)*time.Second/reissueRate)
	if o := j.Operation; o != nil {
		within = min(within, max(o.Straggler/2, minReissue))
	}
	ca.reissue.Set(&apiv1.Reissue{RootKeyIds: tainted, Within: durationpb.New(within)})
	ca.log.Warn("everything under a compromised root is reissued", "roots", strings.Join(tainted, " "), "agents_and_pods", under, "within", within.String())
}

// resolve returns the authority that somebody means by its id or the beginning of that; the active one where he names none.
func resolve(j journal.Journal, id string) (string, error) {
	if id == "" {
		return j.ActiveAuthority().ID, nil
	}
	var found []string
	for _, a := range j.Authorities {
		if strings.HasPrefix(a.ID, id) {
			found = append(found, a.ID)
		}
	}
	for _, g := range j.Gone {
		if strings.HasPrefix(g.ID, id) {
			found = append(found, g.ID)
		}
	}
	switch {
	case slices.Contains(found, id):
		return id, nil
	case len(found) == 1 && len(id) >= 8:
		return found[0], nil
	}
	return "", api.E(api.NotFound, "%d authorities have an id that begins with %.64q; 8 digits at least are needed", len(found), id)
}

// moreLosing is by which part of the number that was agreed to an emergency may hit more when it is declared: pods come and go
// while somebody reads a number and types it.
const moreLosing = 20

// losing counts the pods with an SVID under a root, as their agents told last.
func losing(acks journal.Acks, root string) int {
	n := 0
	for _, a := range acks.Agents {
		for _, p := range a.Pods {
			if slices.Contains(p.Roots, root) {
				n++
			}
		}
	}
	return n
}

// taint declares that a root is compromised, where that hits no more pods than was agreed to. A new root is made only where the
// record has none that could take its place.
func (ca *CA) taint(ctx context.Context, e audit.Entry, r journal.TaintRequest, agreed int) (changed bool, err error) {
	if err := ca.reload(ctx); err != nil {
		return false, err
	}
	j := ca.record.Load()
	known := begunBefore(j, r.ID)
	switch id, err := resolve(j, r.Compromised); {
	case r.Compromised == "":
		return false, api.E(api.RotationInvalid, "an emergency is about a root; say which")
	case err == nil:
		r.Compromised = id
	case !known:
		return false, err
	}
	if !known {
		acks, err := ca.gather(ctx, j, time.Now())
		if err != nil {
			return false, err
		}
		if n := losing(acks, r.Compromised); n > agreed+agreed/moreLosing {
			return false, api.E(api.LosingMore, "%d workloads would lose mTLS now, not %d", n, agreed)
		}
		next, err := journal.Taint(j, r, time.Now())
		if api.ReasonOf(err) == api.SuccessorNeeded || err == nil && ca.keyless(ctx, j, next) {
			if r.Authority, err = ca.newRoot(ctx, j); err != nil {
				return false, err
			}
		}
		e.Issuer = r.Compromised
	}
	return ca.operate(ctx, e, func(j journal.Journal, now time.Time) (journal.Journal, error) { return journal.Taint(j, r, now) })
}

// lacksKey reports whether the upstream does not have the key of a root, as after a switch from another one. Where that cannot be
// told now it is not said.
func (ca *CA) lacksKey(ctx context.Context, root journal.Authority) bool {
	limited, cancel := context.WithTimeout(ctx, mintTime)
	defer cancel()
	return api.ReasonOf(ca.cfg.Upstream.Probe(limited, ca.cfg.TrustDomain, root)) == api.UpstreamRoot
}

// keyless reports whether an emergency leads to another root than the active one, such as one that retires, which nobody here can
// sign under.
func (ca *CA) keyless(ctx context.Context, j, next journal.Journal) bool {
	o := next.Operation
	if o == nil || o.Authority == j.ActiveAuthority().ID {
		return false
	}
	i := slices.IndexFunc(next.Authorities, func(a journal.Authority) bool { return a.ID == o.Authority })
	return i >= 0 && ca.lacksKey(ctx, next.Authorities[i])
}

// rollback makes the root that was active before active again, if anything can be issued under it.
func (ca *CA) rollback(ctx context.Context, e audit.Entry, r journal.Request) (changed bool, err error) {
	if err := ca.reload(ctx); err != nil {
		return false, err
	}
	j := ca.record.Load()
	if o := j.Operation; o != nil && o.ID == r.ID && o.Back == nil {
		i := slices.IndexFunc(j.Authorities, func(a journal.Authority) bool { return a.ID == o.Replaces })
		if i >= 0 && j.Authorities[i].State == journal.Retiring && ca.lacksKey(ctx, j.Authorities[i]) {
			return false, api.E(api.UpstreamRoot, "the key of authority %s is not where the configuration says; configure its upstream again first", o.Replaces)
		}
	}
	return ca.operate(ctx, e, func(j journal.Journal, now time.Time) (journal.Journal, error) { return journal.Rollback(j, r, now) })
}

// forecast is what an emergency about a root would do; without one, what a planned rotation would, or what is under way has left.
func (ca *CA) forecast(ctx context.Context, j journal.Journal, emergency bool, compromised string, limits journal.Limits, now time.Time) (journal.Forecast, int, error) {
	acks, err := ca.gather(ctx, j, now)
	if err != nil {
		return journal.Forecast{}, 0, err
	}
	if !emergency {
		f := journal.Plan(j, now, acks, limits)
		if j.Operation == nil && f.Active.Left > 0 {
			f.SetCross(ca.uncrossed(ctx, j.ActiveAuthority(), f.NoCross), now, acks, limits)
		}
		return f, 0, nil
	}
	if compromised, err = resolve(j, compromised); err != nil {
		return journal.Forecast{}, 0, err
	}
	r := journal.TaintRequest{Request: journal.Request{ID: "plan", By: "plan"}, Compromised: compromised, Limits: limits}
	next, err := journal.Taint(j, r, now)
	if api.ReasonOf(err) == api.SuccessorNeeded || err == nil && ca.keyless(ctx, j, next) {
		if r.Authority, err = ca.newRoot(ctx, j); err == nil {
			next, err = journal.Taint(j, r, now)
		}
	}
	if err != nil {
		return journal.Forecast{}, 0, err
	}
	f := journal.Plan(next, now, acks, limits)
	f.Operation, f.Kind = "", journal.Emergency
	if made := r.Authority; len(made.SealedKey) > 0 { // for this plan alone: what is declared makes another
		f.Next = nil
		for i := range f.Steps {
			if f.Steps[i].Authority == made.ID {
				f.Steps[i].Authority = ""
			}
		}
	}
	return f, losing(acks, compromised), nil
}

// uncrossed is why a root will not sign another, as its upstream says; of one that cannot be asked beforehand it is the guess.
func (ca *CA) uncrossed(ctx context.Context, root journal.Authority, guess string) string {
	switch up := ca.cfg.Upstream.(type) {
	case CrossProber:
		limited, cancel := context.WithTimeout(ctx, mintTime)
		defer cancel()
		if err := up.CanCross(limited, ca.cfg.TrustDomain, root); err != nil {
			return api.AsError(err).Detail
		}
		return ""
	case CrossSigner:
		return guess
	default:
		return "the upstream does not sign roots"
	}
}

// crossEnd is when a cross certificate expires; the zero time where there is none.
func crossEnd(der []byte) time.Time {
	if c, err := x509.ParseCertificate(der); err == nil {
		return c.NotAfter
	}
	return time.Time{}
}
