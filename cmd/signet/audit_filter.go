package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// kindRefuse is the kind of a refusal; kindIssue that of a workload's SVID; kindBan and kindAllow those of decisions about
// nodes.
const (
	kindBan    = "ban-node"
	kindAllow  = "allow-node"
	kindIssue  = "issue"
	kindRefuse = "refuse"

	kindRotate  = "rotate"
	kindBackup  = "backup"
	kindRestore = "restore"
)

// auditKinds are the kinds of entries that this build can ask for, with what they are.
var auditKinds = [][2]string{
	{kindIssue, "a workload's SVID"},
	{"attest-agent", "an agent's SVID"},
	{"mint", "an intermediate"},
	{kindRefuse, "a refusal"},
	{kindBan, "a node was banned"},
	{kindAllow, "the ban of a node was taken back"},
	{kindRotate, "a rotation was begun, taken a step further or ended, or somebody was excused"},
	{kindBackup, "a backup was taken away"},
	{kindRestore, "the record was restored from a backup"},
	{"operator", "an operator came in from elsewhere"},
}

// wholeSerial is the number of hex digits of a serial number that this authority makes, 20 bytes.
const wholeSerial = 40

// An auditFilter is what the flags of audit ask for.
type auditFilter struct {
	req     apiv1.ListAuditRequest
	serial  string // the beginning of a serial number, which is compared here: the CA knows whole ones
	refused bool
	grace   bool  // only what was decided while an API server was away; compared here too
	seen    tally // what the CA sent
}

// auditFilterFlags adds the flags that audit and audit export share.
func (a *app) auditFilterFlags(c *cobra.Command) *auditFilter {
	f := new(auditFilter)
	fl := c.Flags()
	fl.Func("spiffe-id", "only this `SPIFFE-ID`", func(s string) error {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return fmt.Errorf("no SPIFFE ID, such as spiffe://example.org/ns/shop/sa/web: %w", err)
		}
		f.req.SpiffeId = id.String()
		return nil
	})
	fl.FuncP("namespace", "n", "only this `NAMESPACE`", func(s string) error { return f.inNamespace(s) })
	fl.Func("pod", "only this `POD`: its name, NAMESPACE/NAME or its UID", func(s string) error {
		if ns, name, ok := strings.Cut(s, "/"); ok {
			s = name
			if err := f.inNamespace(ns); err != nil {
				return err
			}
		}
		f.req.Pod = s
		return objectName(s, "the name of a pod, NAMESPACE/NAME or a UID")
	})
	fl.Func("node", "only this `NODE`, of the pod or of the agent that asked: its name or its UID", func(s string) error {
		f.req.Node = s
		return objectName(s, "the name of a node or a UID")
	})
	fl.Func("serial", "only the certificate with this `SERIAL`, or one that starts with it, in hex", f.setSerial)
	fl.Func("reason", "only refusals for this `REASON` or SGN code", func(s string) error {
		p, ok := findPage(s)
		if !ok {
			near := nearestPage(s)
			return fmt.Errorf("no reason or code of this build; the nearest is %s, %s; `signet explain` lists all", near.Reason, near.Code())
		}
		f.req.Reason = string(p.Reason)
		return nil
	})
	fl.Func("kind", "only this `KIND`: "+strings.Join(auditKindNames(), ", ")+"; several with commas", f.addKinds)
	fl.Func("since", "only from this `TIME` on: 2h or 7d (ago), 2026-11-24, 2026-11-24T12:00:00Z", func(s string) (err error) {
		f.req.Since, err = a.moment(s)
		return err
	})
	fl.Func("until", "only before this `TIME`, written as for --since", func(s string) (err error) {
		f.req.Until, err = a.moment(s)
		return err
	})
	fl.BoolVar(&f.refused, "refused", false, "only refusals")
	fl.BoolVar(&f.grace, "grace", false, "only what was decided by renewal tickets, while an API server was away")
	a.completeAuditFlags(c)
	return f
}

func auditKindNames() (names []string) {
	for _, k := range auditKinds {
		names = append(names, k[0])
	}
	return names
}

func (f *auditFilter) inNamespace(s string) error {
	if f.req.Namespace != "" && f.req.Namespace != s {
		return fmt.Errorf("another namespace than %s", f.req.Namespace)
	}
	f.req.Namespace = s
	return objectName(s, "the name of a namespace")
}

// objectName accepts what Kubernetes calls its objects; UIDs are such names, too.
func objectName(s, what string) error {
	if len(validation.IsDNS1123Subdomain(s)) > 0 {
		return errors.New("not " + what)
	}
	return nil
}

// setSerial accepts how openssl and others write serial numbers: 4A:3B, 0x4a3b, 4A3B.
func (f *auditFilter) setSerial(s string) error {
	digits := strings.ToLower(strings.NewReplacer(":", "", " ", "").Replace(s))
	digits = strings.TrimPrefix(strings.TrimPrefix(digits, "serial="), "0x")
	even := digits + strings.Repeat("0", len(digits)%2)
	if _, err := hex.DecodeString(even); err != nil || digits == "" || len(digits) > wholeSerial {
		return fmt.Errorf("not 1 to %d hex digits, with or without colons", wholeSerial)
	}
	f.req.Serial, f.serial = "", ""
	if len(digits) == wholeSerial {
		f.req.Serial = digits
	} else {
		f.serial = digits
	}
	return nil
}

func (f *auditFilter) addKinds(s string) error {
	for kind := range strings.SplitSeq(s, ",") {
		kind = strings.TrimSpace(kind)
		if !slices.Contains(auditKindNames(), kind) {
			return fmt.Errorf("one of %s", strings.Join(auditKindNames(), ", "))
		}
		if !slices.Contains(f.req.Kinds, kind) {
			f.req.Kinds = append(f.req.Kinds, kind)
		}
	}
	return nil
}

// moment reads a time, or how long ago it was.
func (a *app) moment(s string) (*timestamppb.Timestamp, error) {
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return timestamppb.New(t), nil
		}
	}
	ago, err := lookBack(s)
	if err != nil {
		return nil, errors.New("neither a duration such as 2h or 7d nor a time such as 2026-11-24T12:00:00Z (RFC 3339)")
	}
	return timestamppb.New(a.now().Add(-ago)), nil
}

// lookBack reads a duration that is not negative, with days.
func lookBack(s string) (time.Duration, error) {
	const day = 24 * time.Hour
	var ago time.Duration
	if days, rest, ok := strings.Cut(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16) // 179 years
		if err != nil {
			return 0, err
		}
		ago, s = time.Duration(n)*day, rest
		if s == "" {
			return ago, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, err
	}
	if d < 0 || ago > math.MaxInt64-d {
		return 0, errors.New("out of range")
	}
	return ago + d, nil
}

// check looks at what flags say together, and completes the request.
func (f *auditFilter) check() error {
	switch {
	case f.refused && len(f.req.Kinds) > 0:
		return usageError{errors.New("--refused and --kind exclude each other")}
	case f.req.Reason != "" && len(f.req.Kinds) > 0 && !slices.Contains(f.req.Kinds, kindRefuse):
		return usageError{errors.New("--reason is of refusals, and --kind leaves them out")}
	case f.req.Since != nil && f.req.Until != nil && !f.req.Since.AsTime().Before(f.req.Until.AsTime()):
		return usageError{fmt.Errorf("--since %s is not before --until %s", stamp(f.req.Since.AsTime()), stamp(f.req.Until.AsTime()))}
	}
	if f.refused {
		f.req.Kinds = []string{kindRefuse}
	}
	return nil
}

// narrow reports whether anything is left out.
func (f *auditFilter) narrow() bool {
	r := &f.req
	return f.local() || r.SpiffeId != "" || r.Namespace != "" || r.Pod != "" || r.Node != "" || r.Serial != "" || r.Reason != "" ||
		len(r.Kinds) > 0 || r.Since != nil || r.Until != nil
}

// keeps reports whether an entry passes what is compared here.
func (f *auditFilter) keeps(e *auditEntry) bool {
	return strings.HasPrefix(e.Serial, f.serial) && (e.Grace || !f.grace)
}

// local reports whether anything is compared here.
func (f *auditFilter) local() bool { return f.serial != "" || f.grace }

func (a *app) completeAuditFlags(c *cobra.Command) {
	c.RegisterFlagCompletionFunc("namespace", a.completeNamespaces)
	c.RegisterFlagCompletionFunc("spiffe-id", func(c *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		words, directive := a.completeSVIDs(c, nil, typed)
		return slices.DeleteFunc(words, func(w string) bool { return !strings.Contains(w, "://") }), directive
	})
	c.RegisterFlagCompletionFunc("reason", func(*cobra.Command, []string, string) (words []string, _ cobra.ShellCompDirective) {
		for p := range api.Pages() {
			words = append(words, cobra.CompletionWithDesc(string(p.Reason), p.Title))
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	})
	c.RegisterFlagCompletionFunc("kind", func(*cobra.Command, []string, string) (words []string, _ cobra.ShellCompDirective) {
		for _, k := range auditKinds {
			words = append(words, cobra.CompletionWithDesc(k[0], k[1]))
		}
		return words, cobra.ShellCompDirectiveNoFileComp
	})
}
