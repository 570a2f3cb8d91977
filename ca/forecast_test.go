package ca_test

import (
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// TestPlanOfFiles: a plan asks the upstream whether the root in use would sign another: in files it does as long as its key is there. And
// what was signed until the activation is waited for.
func TestPlanOfFiles(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		f := newFiled(t, 48*time.Hour, true)
		filed := f.status().GetOperation().GetAuthority()
		f.over("to-files", "done")
		p := f.plan()
		steps := p.GetForecast().GetSteps()
		if f.active() != filed || !p.GetForecast().GetCross() || len(steps) != 3 || steps[1].GetLatest() == nil {
			t.Errorf("with the key in the files: %v", p)
		}
		if steps[2].GetEarliest().AsTime().Before(steps[1].GetEarliest().AsTime().Add(time.Minute)) {
			t.Errorf("what was signed until the activation is not waited for: %v", steps)
		}
		f.put(48 * time.Hour)
		eventually(t, "the new files to be read", func() bool { return f.plan().GetCanMake() })
		if p := f.plan().GetForecast(); p.GetCross() || !strings.Contains(p.GetNoCross(), "files are of another root") || p.GetSteps()[1].GetLatest() != nil {
			t.Errorf("with another key in the files: %v", p)
		}
		_, err := f.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "next", Reason: "a drill"})
		wantReason(t, api.FromStatus(err), api.UpstreamCross)
	})
}
