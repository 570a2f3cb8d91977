package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// intermediateShort is what an intermediate has left at the least while the upstream signs: it is renewed at a third of its life, which is
// a day mostly, and an hour where SVIDs live no longer and the upstream gives no more.
const intermediateShort = 30 * time.Minute

// A checkedAuthority is what the CA says of where its root's key lives, and of the root that it issues under.
type checkedAuthority struct {
	Upstream *upstreamView `json:"upstream,omitempty"` // none: the CA is older and does not say
	Root     *rootView     `json:"root,omitempty"`     // the active one
	Rotation string        `json:"rotation,omitempty"` // id of the one under way
	Schedule *scheduleView `json:"schedule,omitempty"` // when one begins by itself, and its latest date
	Trouble  *troubleView  `json:"trouble,omitempty"`  // why that one cannot go on

	now time.Time // by the CA's clock
}

// checkUpstream asks the CA, as a viewer, whether it could have another intermediate signed and when its root is replaced. It is the one
// check that takes a role: nothing that the API server shows says it.
func (i *checkup) checkUpstream(ctx context.Context) {
	o := i.config.ca.Operators
	accounts := cmp.Or(o.Namespace, operatorsNamespace)
	object := namespaced(i.kf.namespace, "statefulset", caName)
	inside := i.kf.kubectl("exec", "-n", i.kf.namespace, caName+"-0", "-c", "ca") + " -- signet version --server"
	if i.config.ca.TrustDomain == "" || i.bundle == nil || !namespaceShape.MatchString(accounts) {
		return // as has been told; without the bundle the CA is not known
	}
	skip := func(why, do string) {
		i.add("upstream", resultWarning, object, "the CA was not asked: "+why, do).settled = true
	}
	switch {
	case o.Listen == "":
		skip("it has no port for operators", inside)
		return
	case !i.cluster.Verified():
		skip("who answers as the API server is not proven, and would say which CA is the right one", i.kf.kubectl("config", "view", "--minify"))
		return
	}
	switch err := i.mayComeAs(ctx, accounts, operatorRoles[0]); {
	case errors.Is(err, errMayNot):
		skip("you may not come as viewer", i.kf.kubectl("create", "rolebinding", "signet-viewer", "-n", accounts)+" --clusterrole signet-viewer --user YOU   # here and in "+i.kf.namespace)
		return
	case err != nil:
		i.cannot("upstream", object, "create SelfSubjectAccessReviews", err)
		return
	}
	v, err := i.askAuthority(ctx, accounts)
	if err != nil {
		do := inside
		if f, ok := errors.AsType[*failure](err); ok && f.next != i.kf.signet("check") {
			do = cmp.Or(f.next, inside)
		}
		i.add("upstream", resultUnknown, object, "the CA was asked in vain: "+errorDetail(err), do)
		return
	}
	i.report.Authority = v
	for _, row := range v.judge(i.kf) {
		i.add("upstream", row.Result, object, row.Found, row.Do).settled = row.settled
	}
}

// askAuthority asks the CA in the cluster that is looked at.
func (i *checkup) askAuthority(ctx context.Context, accounts string) (*checkedAuthority, error) {
	f := &operatorFlags{kubeFlags: *i.kf, accounts: accounts, role: operatorRoles[0]}
	if !i.config.td.IsZero() {
		f.domain = i.config.td.Name()
	}
	way, err := i.a.openWay(f)
	if err != nil {
		return nil, err
	}
	ch, err := openChannel(&channel{way: way})
	if err != nil {
		way.close()
		return nil, err
	}
	defer ch.Close()
	st, err := ask(ctx, i.a, ch, ch.GetStatus, &apiv1.GetStatusRequest{})
	if err != nil {
		return nil, err
	}
	rot, err := askRotation(ctx, i.a, ch, ch.RotationStatus, &apiv1.RotationStatusRequest{})
	if f, ok := errors.AsType[*failure](err); err != nil && !(ok && f.err.Reason == api.ProtocolSkew) { // an older CA says nothing of that
		return nil, err
	}
	return newCheckedAuthority(st.GetUpstream(), rot.GetRotation(), i.now), nil
}

func newCheckedAuthority(up *apiv1.UpstreamStatus, in *apiv1.Rotation, now time.Time) *checkedAuthority {
	v := &checkedAuthority{Upstream: newUpstream(up), now: now}
	if in == nil {
		return v
	}
	r := newRotation(in, now)
	v.Schedule, v.Trouble, v.now = r.Schedule, r.Trouble, r.now
	if n := slices.IndexFunc(r.Authorities, func(a rootView) bool { return a.State == "active" }); n >= 0 {
		v.Root = &r.Authorities[n]
	}
	if r.Operation != nil {
		v.Rotation = r.Operation.ID
	}
	return v
}

// judge says what is not as it should be, or that all of it is.
func (v *checkedAuthority) judge(kf *kubeFlags) (rows []*checkRow) {
	tell := func(result, do, format string, args ...any) *checkRow {
		rows = append(rows, &checkRow{Result: result, Found: fmt.Sprintf(format, args...), Do: do})
		return rows[len(rows)-1]
	}
	u := v.Upstream
	if u == nil {
		tell(resultWarning, kf.line("signet version --server"), "the CA does not say: it is of an earlier version than this command").settled = true
		return rows
	}
	logs := kf.kubectl("-n", kf.namespace, "logs", caName+"-0", "-c", "ca")
	switch left := u.intermediateNotAfter.Sub(v.now); {
	case u.ProbedAt == "":
		tell(resultUnknown, kf.signet("check", "--wait"), "%s was not asked yet whether it would sign", u.Type)
	case !u.Healthy:
		tell(resultBad, "signet explain "+cmp.Or(u.Code, "exit-codes"), "%s", u.String())
	case u.intermediateNotAfter.IsZero() || left <= 0:
		tell(resultBad, logs, "the CA has no intermediate that is valid, so nobody is issued anything")
	case left < intermediateShort:
		tell(resultWarning, logs, "the intermediate ends in %s, and is not renewed, though the upstream would sign", duration.HumanDuration(left))
	}
	if u.MintLeft != nil && *u.MintLeft == 0 {
		tell(resultWarning, kf.kubectl("-n", kf.namespace, "get", "pods")+"   # is the CA started again and again?",
			"all %d intermediates were asked for that the CA asks for in an hour; a CA that is started now waits for its own", u.MintBudget)
	}
	if n := len(u.Announced); n > 0 {
		tell(resultWarning, v.line(kf, "plan"), "the upstream announces %s that no rotation has taken up: %s", plural(n, "root"), strings.Join(shorts(u.Announced), ", ")).settled = true
	}
	v.judgeSchedule(kf, tell)
	if len(rows) == 0 {
		tell(resultGood, "", "%s", v.text())
	}
	return rows
}

// judgeSchedule says whether the root that is to be replaced is.
func (v *checkedAuthority) judgeSchedule(kf *kubeFlags, tell func(result, do, format string, args ...any) *checkRow) {
	s, root := v.Schedule, v.Root
	switch {
	case v.Trouble != nil:
		tell(resultBad, "signet explain "+cmp.Or(v.Trouble.Code, "exit-codes"), "the rotation cannot go on: %s", strings.TrimSpace(v.Trouble.Reason+after(": ", v.Trouble.Detail)))
	case s == nil || root == nil || v.Rotation != "" || s.prepare.IsZero() || v.now.Before(s.prepare):
	case !s.latest.IsZero() && !v.now.Before(s.latest):
		tell(resultBad, v.line(kf, "plan"), "root %s expires at %s and should have been replaced by %s; no rotation is under way", short(root.ID), root.NotAfter, s.Latest)
	case s.Automatic:
		tell(resultWarning, v.line(kf, "plan"), "root %s expires at %s, and the rotation that is due since %s has not begun", short(root.ID), root.NotAfter, s.Prepare)
	default:
		tell(resultWarning, v.line(kf, "plan"), "root %s expires at %s, it is time to replace it since %s, and by itself the CA does not", short(root.ID), root.NotAfter, s.Prepare)
	}
}

// line is a line to type about the rotation of that CA.
func (v *checkedAuthority) line(kf *kubeFlags, command string) string {
	line := kf.line("signet rotate " + command)
	if kf.namespace != defaultNamespace {
		line += " --signet-namespace " + kf.namespace
	}
	return line
}

// text is what is said where all is well.
func (v *checkedAuthority) text() string {
	u := v.Upstream
	s := u.String()
	if u.MintLeft != nil {
		s += fmt.Sprintf("; %d of %d intermediates an hour are left", *u.MintLeft, u.MintBudget)
	}
	if r := v.Root; r != nil {
		s += "; root " + short(r.ID) + after(" expires at ", r.NotAfter)
	}
	switch c := v.Schedule; {
	case v.Rotation != "":
		s += "; operation " + v.Rotation + " replaces it"
	case c == nil || c.Prepare == "":
	case c.Automatic:
		s += ", and is replaced by itself from " + c.Prepare + " on" + after(", by ", c.Latest) + " at the latest"
	default:
		s += ", and is to be replaced from " + c.Prepare + " on: by itself the CA does not"
	}
	return s
}
