package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// TestCheckUpstream judges what a CA says of its upstream and of the root that is to be replaced.
func TestCheckUpstream(t *testing.T) {
	const day = 24 * time.Hour
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(testNow.Add(d)) }
	for _, tt := range []struct {
		name   string
		change func(u *apiv1.UpstreamStatus, r *apiv1.Rotation)
		want   []string // result and what is found, of each row
	}{
		{"good", func(*apiv1.UpstreamStatus, *apiv1.Rotation) {}, []string{
			"good: disk would sign; SVIDs are issued without it until 2026-11-25T08:00:00Z; 18 of 20 intermediates an hour are left; root 71717171 expires at 2027-11-24T12:00:00Z, " +
				"and is replaced by itself from 2027-08-26T12:00:00Z on, by 2027-10-25T12:00:00Z at the latest"}},
		{"replaced by hand", func(_ *apiv1.UpstreamStatus, r *apiv1.Rotation) { r.Schedule.Automatic = false }, []string{"good: …is to be replaced from 2027-08-26T12:00:00Z on: by itself the CA does not"}},
		{"under way", func(_ *apiv1.UpstreamStatus, r *apiv1.Rotation) {
			r.Operation, r.Schedule.Prepare, r.Schedule.Latest = &apiv1.RotationOperation{Id: "yearly"}, at(-day), at(-time.Hour)
		}, []string{"good: …; operation yearly replaces it"}},
		{"it would not sign", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) {
			u.Healthy, u.Reason, u.Detail, u.Since = false, string(api.UpstreamFiles), "they do not fit", at(-time.Hour)
		}, []string{"bad: disk WOULD NOT SIGN since 2026-11-24T11:00:00Z: " + api.UpstreamFiles.Page().Code() + " UPSTREAM_FILES: they do not fit; SVIDs are issued without it until 2026-11-25T08:00:00Z"}},
		{"not asked", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) { u.ProbedAt = nil }, []string{"unknown: disk was not asked yet whether it would sign"}},
		{"no intermediate, and no budget", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) { u.IntermediateNotAfter, u.MintLeft = nil, 0 },
			[]string{"bad: the CA has no intermediate that is valid, so nobody is issued anything", "warning: all 20 intermediates were asked for…"}},
		{"one that has expired", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) { u.IntermediateNotAfter = at(0) }, []string{"bad: the CA has no intermediate that is valid…"}},
		{"one that is not renewed", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) { u.IntermediateNotAfter = at(20 * time.Minute) },
			[]string{"warning: the intermediate ends in 20m, and is not renewed, though the upstream would sign"}},
		{"announced", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) { u.Announced = []string{fakeNew} }, []string{"warning: the upstream announces 1 root that no rotation has taken up: 73737373"}},
		{"due", func(_ *apiv1.UpstreamStatus, r *apiv1.Rotation) { r.Schedule.Prepare = at(-day) },
			[]string{"warning: root 71717171 expires at 2027-11-24T12:00:00Z, and the rotation that is due since 2026-11-23T12:00:00Z has not begun"}},
		{"due by hand", func(_ *apiv1.UpstreamStatus, r *apiv1.Rotation) {
			r.Schedule.Prepare, r.Schedule.Automatic = at(-day), false
		},
			[]string{"warning: root 71717171 expires at 2027-11-24T12:00:00Z, it is time to replace it since 2026-11-23T12:00:00Z, and by itself the CA does not"}},
		{"overdue", func(_ *apiv1.UpstreamStatus, r *apiv1.Rotation) {
			r.Schedule.Prepare, r.Schedule.Latest = at(-day), at(-time.Hour)
		},
			[]string{"bad: root 71717171 expires at 2027-11-24T12:00:00Z and should have been replaced by 2026-11-24T11:00:00Z; no rotation is under way"}},
		{"trouble", func(_ *apiv1.UpstreamStatus, r *apiv1.Rotation) {
			r.TroubleReason, r.Trouble = string(api.UpstreamUnavailable), "no answer for 41s"
		}, []string{"bad: the rotation cannot go on: UPSTREAM_UNAVAILABLE: no answer for 41s"}},
		{"no budget is told", func(u *apiv1.UpstreamStatus, _ *apiv1.Rotation) { u.MintBudget, u.MintLeft = 0, 0 }, []string{"good: …"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u := &apiv1.UpstreamStatus{Kind: "disk", Healthy: true, ProbedAt: at(-time.Minute), Since: at(-time.Hour), IntermediateNotAfter: at(20 * time.Hour), MintBudget: 20, MintLeft: 18}
			r := &apiv1.Rotation{Now: at(0), Authorities: []*apiv1.RotationRoot{{Id: fakeNew, State: "published"}, {Id: fakeOld, State: "active", NotAfter: at(365 * day)}},
				Schedule: &apiv1.RotationSchedule{Prepare: at(275 * day), Latest: at(335 * day), Expires: at(365 * day), Automatic: true}}
			tt.change(u, r)
			var got []string
			for _, row := range newCheckedAuthority(u, r, testNow).judge(&kubeFlags{namespace: defaultNamespace}) {
				got = append(got, row.Result+": "+row.Found)
				if (row.Do == "") != (row.Result == resultGood) {
					t.Errorf("%s: to do: %q", got[len(got)-1], row.Do)
				}
			}
			same := func(got, want string) bool {
				from, to, cut := strings.Cut(want, "…")
				return strings.HasPrefix(got, from) && strings.HasSuffix(got, to) && (cut || got == want)
			}
			if !slices.EqualFunc(got, tt.want, same) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
	if rows := newCheckedAuthority(nil, nil, testNow).judge(&kubeFlags{namespace: "id"}); len(rows) != 1 || rows[0].Result != resultWarning {
		t.Errorf("of a CA that does not say: %+v", rows)
	}
}

// TestCheckUpstreamAsked asks a real CA as check does.
func TestCheckUpstreamAsked(t *testing.T) {
	c := newOperated(t, catest.Options{})
	a, _, _ := newTestApp(nil)
	a.timeout = time.Minute
	kf := &kubeFlags{kubeconfig: c.kubeconfig, namespace: defaultNamespace}
	cluster, err := a.openCluster(kf)
	if err != nil {
		t.Fatal(err)
	}
	defer cluster.Close()
	i := &checkup{a: a, cluster: cluster, kf: kf, now: time.Now()}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var v *checkedAuthority
	for end := time.Now().Add(time.Minute); v == nil || v.Upstream.ProbedAt == ""; <-tick.C { // it is, in its own time
		if v, err = i.askAuthority(t.Context(), operatorsNamespace); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(end) {
			t.Fatal("it is never probed")
		}
	}
	rows := v.judge(kf)
	if len(rows) != 1 || rows[0].Result != resultGood || !strings.Contains(rows[0].Found, "19 of 20 intermediates an hour are left; root "+fmt.Sprintf("%x", c.ca.CA().Bundle().Roots[0].SubjectKeyId[:4])) ||
		!strings.Contains(rows[0].Found, ", and is replaced by itself from ") {
		t.Errorf("%+v", rows[0])
	}
}
