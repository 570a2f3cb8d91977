package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// auditLast is how many entries audit shows unless it is told otherwise.
const auditLast = 100

// auditMost is the most that --last may say: ca.MaxAuditLast.
const auditMost = 100_000

func (a *app) auditCommand() *cobra.Command {
	var last int
	var all bool
	c := &cobra.Command{
		Use:   "audit",
		Short: "What was issued and what was refused, to whom and why",
		Long: "Print what the CA has on record, the newest last: each issuance, and each refusal of a caller that it knew. Those of\n" +
			"one caller for one reason within a minute are counted in one entry. Of refusals of unknown callers the CA keeps a sample,\n" +
			"in memory. The filters are all applied; JSON and YAML are an AuditEntryList, which is written as it arrives, so that\n" +
			"--all needs no memory but for jsonpath. For a file of all of it there is audit export.",
		Example: "  signet audit --refused --since 2h               # who asks for what he may not have\n" +
			"  signet audit --pod shop/web-1 -o wide           # all that one pod got or was refused\n" +
			"  signet audit --serial 4A:3B:91                  # whom was this certificate issued to\n" +
			"  signet audit --reason TOKEN_AUDIENCE --all -o json | jq -r '.items[].callerNode'\n" +
			"  signet audit export --since 30d > audit.jsonl   # for keeping",
		Args: noArgs,
	}
	o := outputFlags(c)
	f := a.auditFilterFlags(c)
	c.Flags().IntVar(&last, "last", auditLast, "only the newest `N` that match")
	c.Flags().BoolVar(&all, "all", false, "all that match")
	c.RunE = func(c *cobra.Command, _ []string) error {
		asked := c.Flags().Changed("last")
		switch {
		case all && asked:
			return usageError{errors.New("--last and --all exclude each other")}
		case last < 1 || last > auditMost:
			return usageError{fmt.Errorf("--last %d is not between 1 and %d; --all has no end", last, auditMost)}
		case all:
			last = 0
		}
		if err := f.check(); err != nil {
			return err
		}
		w := newAuditWriter(a, o)
		if err := a.eachAudit(c.Context(), f, last, w.add); err != nil {
			return errors.Join(err, w.flush())
		}
		if err := w.end(emptyAudit(f)); err != nil {
			return err
		}
		full := f.seen.n.Load() == auditLast // before refusals that came again were made one
		if f.local() {
			full = w.n == auditLast
		}
		if full && !all && !asked && o.isText() {
			a.say("the newest %d; --last N or --all for more", auditLast)
		}
		return nil
	}
	c.AddCommand(a.auditExportCommand())
	return c
}

func emptyAudit(f *auditFilter) string {
	if f.narrow() {
		return "nothing on record matches"
	}
	return "nothing is on record"
}

// An auditEntry is one decision on record.
type auditEntry struct {
	header
	Source            string   `json:"source,omitempty"` // ledger, refusals or sample
	Seq               uint64   `json:"seq"`              // within the source
	Time              string   `json:"time,omitempty"`
	Type              string   `json:"type"` // issue, attest-agent, mint, refuse, ban-node, allow-node, rotate, backup, restore, operator; kind is taken
	CorrelationID     string   `json:"correlationID,omitempty"`
	SPIFFEID          string   `json:"spiffeID,omitempty"`
	Cluster           string   `json:"cluster,omitempty"` // issuer of the token that was attested
	Namespace         string   `json:"namespace,omitempty"`
	ServiceAccount    string   `json:"serviceAccount,omitempty"`
	ServiceAccountUID string   `json:"serviceAccountUID,omitempty"`
	Pod               string   `json:"pod,omitempty"`
	PodUID            string   `json:"podUID,omitempty"`
	Node              string   `json:"node,omitempty"`
	NodeUID           string   `json:"nodeUID,omitempty"`
	TokenID           string   `json:"tokenID,omitempty"`
	DNSNames          []string `json:"dnsNames,omitempty"`
	Serial            string   `json:"serial,omitempty"`
	NotAfter          string   `json:"notAfter,omitempty"`
	IssuerKeyID       string   `json:"issuerKeyID,omitempty"`
	Reason            string   `json:"reason,omitempty"` // of a refusal
	Code              string   `json:"code,omitempty"`   // SGN-nnnn of the reason, where this build knows it
	Detail            string   `json:"detail,omitempty"`
	Method            string   `json:"method,omitempty"` // the call that was made
	Caller            string   `json:"caller,omitempty"` // SPIFFE ID of who made it, or uid:N
	CallerNode        string   `json:"callerNode,omitempty"`
	Count             uint64   `json:"count,omitempty"` // of a refusal: how often, this time included
	Last              string   `json:"last,omitempty"`  // the last of them, where there are more than one
	Grace             bool     `json:"grace,omitempty"` // decided by a renewal ticket, while the API server was away

	time, last, notAfter time.Time
}

func newAuditEntry(in *apiv1.AuditEntry) *auditEntry {
	e := &auditEntry{
		Source: in.GetSource(), Seq: in.GetSeq(), Type: in.GetKind(), CorrelationID: in.GetCorrelationId(), SPIFFEID: in.GetSpiffeId(),
		Cluster: in.GetCluster(), Namespace: in.GetNamespace(), ServiceAccount: in.GetServiceAccount(),
		ServiceAccountUID: in.GetServiceAccountUid(), Pod: in.GetPod(), PodUID: in.GetPodUid(), Node: in.GetNode(), NodeUID: in.GetNodeUid(),
		TokenID: in.GetTokenId(), DNSNames: in.GetDnsNames(), Serial: in.GetSerial(), IssuerKeyID: in.GetIssuer(), Reason: in.GetReason(),
		Detail: in.GetDetail(), Method: in.GetMethod(), Caller: in.GetCaller(), CallerNode: in.GetCallerNode(), Grace: in.GetGrace(),
		time: timeOf(in.GetTime()), last: timeOf(in.GetLast()), notAfter: timeOf(in.GetNotAfter()),
	}
	name := e.CorrelationID
	if name == "" {
		name = fmt.Sprintf("%s-%d", e.Source, e.Seq)
	}
	e.header = newHeader("AuditEntry", name)
	e.Time, e.NotAfter = exactly(e.time), stamp(e.notAfter)
	if r := api.Reason(e.Reason); r.Known() {
		e.Code = r.Code()
	}
	if e.Type == kindRefuse {
		e.Count = max(1, in.GetCount())
	}
	if e.Count > 1 {
		e.Last = exactly(e.last)
	}
	return e
}

// exactly is stamp with all digits: the order of two decisions can hang on them.
func exactly(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// pod is NAMESPACE/NAME, or the half of it that is known.
func (e *auditEntry) pod() string {
	switch {
	case e.Namespace == "":
		return e.Pod
	case e.Pod == "":
		return e.Namespace + "/"
	}
	return e.Namespace + "/" + e.Pod
}

// times says how often it was and when last, "x37, last 12:01:10", and nothing of what was once.
func (e *auditEntry) times() string {
	if e.Count < 2 {
		return ""
	}
	s := fmt.Sprintf("x%d", e.Count)
	if e.last.IsZero() {
		return s
	}
	layout := time.TimeOnly
	if e.last.Sub(e.time).Abs() >= 12*time.Hour || e.last.Day() != e.time.Day() {
		layout = time.RFC3339
	}
	return s + ", last " + e.last.Format(layout)
}

// errEnough ends eachAudit early, without an error.
var errEnough = errors.New("enough")

// eachAudit calls do with each entry that the filter lets through, oldest first; only the newest last of them unless
// last is 0. It holds one piece of the CA's answer at a time, and last entries where it must count itself.
func (a *app) eachAudit(ctx context.Context, f *auditFilter, last int, do func(*auditEntry) error) error {
	ch, err := a.connect()
	if err != nil {
		return err
	}
	defer ch.Close()
	stop := a.waiting(ch.where(), &f.seen)
	defer stop()
	if a.tty(a.stdout) { // which shows soon enough that something comes
		then := do
		do = func(e *auditEntry) error { stop(); return then(e) }
	}
	if !f.local() || last == 0 {
		f.req.Last = uint32(last)
		return a.streamAudit(ctx, ch, &f.req, &f.seen, func(e *auditEntry) error {
			if !f.keeps(e) {
				return nil
			}
			return do(e)
		})
	}
	var newest []*auditEntry
	err = a.streamAudit(ctx, ch, &f.req, &f.seen, func(e *auditEntry) error {
		if f.keeps(e) {
			if len(newest) == last {
				newest = newest[1:]
			}
			newest = append(newest, e)
		}
		return nil
	})
	for _, e := range newest {
		if err == nil {
			err = do(e)
		}
	}
	return err
}

// streamAudit reads one answer of ListAudit, counting what comes. A piece of it may take --timeout; the whole may take as
// long as it needs.
func (a *app) streamAudit(ctx context.Context, ch *channel, req *apiv1.ListAuditRequest, seen *tally, do func(*auditEntry) error) error {
	f := fold{do: do}
	err := a.receiveAudit(ctx, ch, req, func(in *apiv1.AuditEntry) error {
		e := newAuditEntry(in)
		seen.add(e)
		return f.add(e)
	})
	if err == errEnough {
		return nil
	}
	if ferr := f.flush(); ferr != nil && ferr != errEnough {
		return errors.Join(err, ferr)
	}
	return err
}

// maxFold is how many entries are held back at most.
const maxFold = 4096

// A fold makes one entry of the two that the CA has of a refusal that came again: when it came first, and within about a
// minute when they were counted. It holds back what comes in between.
type fold struct {
	do   func(*auditEntry) error
	held []*auditEntry // begins with a refusal
}

func (f *fold) add(e *auditEntry) error {
	if e.Type == kindRefuse {
		for i, h := range f.held {
			if h.CorrelationID == e.CorrelationID && h.Type == e.Type && h.Source == e.Source && h.Reason == e.Reason && h.time.Equal(e.time) {
				if e.Count > h.Count {
					f.held[i] = e
				}
				return nil
			}
		}
	}
	f.held = append(f.held, e)
	for len(f.held) > 0 && (f.held[0].Type != kindRefuse || len(f.held) > maxFold || e.time.Sub(f.held[0].time) > 2*time.Minute) {
		first := f.held[0]
		f.held = f.held[1:]
		if err := f.do(first); err != nil {
			return err
		}
	}
	return nil
}

func (f *fold) flush() error {
	for _, e := range f.held {
		if err := f.do(e); err != nil {
			return err
		}
	}
	return nil
}

// receiveAudit calls do with each entry as it comes.
func (a *app) receiveAudit(ctx context.Context, ch *channel, req *apiv1.ListAuditRequest, do func(*apiv1.AuditEntry) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	limit := a.timeout
	if limit == 0 {
		limit = math.MaxInt64
	}
	idle := time.AfterFunc(limit, func() { cancel(context.DeadlineExceeded) })
	defer idle.Stop()
	stream, err := ch.ListAudit(ctx, req)
	for err == nil {
		var piece *apiv1.ListAuditResponse
		if piece, err = stream.Recv(); err != nil {
			break
		}
		idle.Stop() // who reads our output may take his time
		for _, in := range piece.GetEntries() {
			if err := do(in); err != nil {
				return err
			}
		}
		idle.Reset(limit)
	}
	switch {
	case err == io.EOF:
		return nil
	case context.Cause(ctx) == context.DeadlineExceeded:
		return &failure{err: api.Wrap(api.DeadlineExceeded, err, "the CA sent nothing for "+a.timeout.String()),
			why:  "It listens at " + ch.where() + " and is stopped or overloaded, or has a long record to search.",
			next: "the same with --timeout 5m, or audit with a --since nearer by"}
	case status.Code(err) == codes.Unimplemented:
		return &failure{err: api.Wrap(api.ProtocolSkew, err, "this CA cannot list what is on record"),
			why: "It is older than this command.", next: "signet version --server"}
	}
	failed := a.callFailed(ch, err)
	if f, ok := errors.AsType[*failure](failed); ok {
		f.deaf = true
	}
	return failed
}
