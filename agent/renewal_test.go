package agent_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// Every SVID is renewed at the time that was drawn for it, with a key that was never used, and each for itself.
func TestRenewal(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		keys := map[string]bool{}
		type watched struct {
			id   *agent.Identity
			last agent.Held
		}
		var all []*watched
		for i := range 4 {
			id, _ := n.keepFresh(newWorkload(s, fmt.Sprint("web-", i), here))
			all = append(all, &watched{id: id})
			time.Sleep(time.Minute)
		}
		renewals := 0
		for end := time.Now().Add(12 * time.Hour); time.Now().Before(end); time.Sleep(time.Second) {
			for i, w := range all {
				h := w.id.Held().Load()
				if !another(w.last)(h) {
					continue
				}
				key, err := x509.MarshalPKIXPublicKey(h.SVID.PrivateKey.Public())
				if err != nil {
					t.Fatal(err)
				}
				if keys[string(key)] {
					t.Errorf("workload %d: a key was used again", i)
				}
				keys[string(key)] = true
				if w.last.SVID != nil {
					renewals++
					if late := time.Since(w.last.RenewAt); late < 0 || late > 2*time.Second {
						t.Errorf("workload %d was renewed %s after the time that was drawn", i, late)
					}
				}
				if part := 1 - notAfter(h).Sub(h.RenewAt).Minutes()/svidLife.Minutes(); part < 0.29 || part > 0.51 {
					t.Errorf("workload %d is to be renewed at %.2f of its SVID's life", i, part)
				}
				w.last = h
			}
		}
		if renewals < 4*24 || renewals > 4*40 {
			t.Errorf("%d renewals of 4 workloads in 12 hours of hourly SVIDs", renewals)
		}
		if failed := n.metric("signet_agent_renewals_total/failed"); failed != 0 {
			t.Errorf("%v renewals failed", failed)
		}
	})
}

// What cannot be renewed backs off alone, keeps its SVID, and says why; the others go on.
func TestBackoffIsOnesOwn(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		sick, well := newWorkload(s, "web-1", here), newWorkload(s, "web-2", here)
		sickID, _ := n.keepFresh(sick)
		wellID, _ := n.keepFresh(well)
		first := await(t, sickID, time.Second, "SVID", hasSVID)
		await(t, wellID, time.Second, "SVID", hasSVID)
		s.Pods.Change(sick.pod, func(p *ca.Pod) { p.Finished = true })
		h := await(t, sickID, 31*time.Minute, "failure", func(h agent.Held) bool { return h.Refusal != nil })
		if h.Refusal.Reason != api.PodDeleted || h.SVID != first.SVID || h.Refused() != nil {
			t.Fatalf("failed with %v, holds the SVID %t; want it kept", h.Refusal, h.SVID == first.SVID)
		}
		for range 4 {
			before := wellID.Held().Load()
			now := await(t, wellID, 31*time.Minute, "renewal", another(before))
			if late := time.Since(before.RenewAt); late > 2*time.Second {
				t.Errorf("the other workload was renewed %s late", late)
			}
			_ = now
		}
		if got := holdings(t, s)["web-1"].GetHolding().GetLastError(); got != string(api.PodDeleted) {
			t.Errorf("the CA was told of error %q", got)
		}
	})
}

// While its SVID lasts nobody notices that a token has expired; the next stream brings a fresh one, which ends the wait.
func TestFreshTokenEndsTheWait(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		token := w.token(10 * time.Minute)
		id, _, err := n.Admit(t.Context(), token, "shared")
		if err != nil {
			t.Fatal(err)
		}
		first := await(t, id, time.Second, "SVID", hasSVID)
		time.Sleep(40 * time.Minute) // past the renewal
		h := id.Held().Load()
		if h.SVID != first.SVID || api.ReasonOf(h.Refusal) != api.TokenExpired {
			t.Fatalf("failed with %v, holds the SVID %t; want it kept", h.Refusal, h.SVID == first.SVID)
		}
		if n := len(n.log.find("identity not renewed, keeping what is held", "")); n != 1 {
			t.Errorf("said %d times that the token has expired, want once: nothing is tried without a token", n)
		}
		if _, _, err := n.Admit(t.Context(), token, "shared"); api.ReasonOf(err) != api.TokenExpired {
			t.Errorf("the old token is answered with %v", err)
		}
		if n.admit(w) != id {
			t.Error("the same pod got a second identity")
		}
		await(t, id, time.Second, "renewal", another(first))

		// The same once the SVID has expired: the stream with the fresh token is never told that the old one has expired.
		id.Report(1, &apiv1.Stream{Id: 1}) // somebody waits for it, so it is not forgotten
		last := id.Held().Load()
		time.Sleep(tokenLife + svidLife)
		if h := id.Held().Load(); h.SVID != nil || api.ReasonOf(h.Refusal) != api.TokenExpired || h.Refused() == nil {
			t.Fatalf("holds the SVID %t, refusal %v", h.SVID != nil, h.Refusal)
		}
		if n.admit(w) != id {
			t.Error("the same pod got a second identity")
		}
		if refused := id.Held().Load().Refused(); refused != nil {
			t.Errorf("with a fresh token it is refused with %v", refused)
		}
		await(t, id, time.Second, "SVID", another(last))
	})
}

// A pod that is gone is not renewed. Its SVID is kept until it expires, then its streams are told why, and once nobody can
// renew it and nobody asks for it, nothing of it is left.
func TestPodGone(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		n := startNode(t, s, here, func(c *agent.Config) { c.Cache = cache })
		w := newWorkload(s, "web-1", here)
		id := n.admit(w)
		id.Report(1, &apiv1.Stream{Id: 1})
		first := await(t, id, time.Second, "SVID", hasSVID)
		synctest.Wait()
		if len(cache.names()) != 4 {
			t.Errorf("the cache holds %q", cache.names())
		}
		time.Sleep(10 * time.Minute)
		n.admit(w) // its token is good until ten minutes after its SVID
		s.Pods.Remove(w.pod)
		lost := await(t, id, svidLife, "end", lostSVID)
		if !time.Now().Equal(notAfter(first)) {
			t.Errorf("the SVID was held until %s, it expired at %s", time.Now(), notAfter(first))
		}
		if lost.Refused() == nil || lost.Refused().Reason != api.PodUnknown {
			t.Errorf("its streams are told %v", lost.Refused())
		}
		if _, _, err := n.Admit(t.Context(), w.token(time.Minute), "shared"); api.ReasonOf(err) != api.PodUnknown {
			t.Errorf("the next stream is told %v", err)
		}
		if n.metric("signet_agent_expired_total") != 1 || n.metric("signet_agent_svids") != 0 {
			t.Error("the metrics do not tell of it")
		}
		time.Sleep(20 * time.Minute) // the token has expired; a stream is open still
		if holdings(t, s)["web-1"] == nil {
			t.Error("forgotten while a stream is open")
		}
		id.Report(1, nil)
		time.Sleep(2 * time.Minute)
		if got := holdings(t, s); len(got) != 0 {
			t.Errorf("the CA was told of %v", got)
		}
		for _, name := range cache.names() {
			if name != "self" && name != "trust" && name != "keysets" {
				t.Errorf("the cache still holds %q", name)
			}
		}

		// It can come back: the pod was not gone after all.
		s.Pods.Add(w.pod)
		if again := n.admit(w); again == id {
			t.Error("the forgotten identity was handed out again")
		} else {
			await(t, again, time.Second, "SVID", hasSVID)
		}
	})
}

// A pod on its way out is renewed until its deletion time, and not beyond.
func TestPodTerminating(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		id, _ := n.keepFresh(w)
		first := await(t, id, time.Second, "SVID", hasSVID)
		deleteAt := time.Now().Add(35 * time.Minute)
		s.Pods.Change(w.pod, func(p *ca.Pod) { p.DeleteAt = deleteAt })
		second := await(t, id, 31*time.Minute, "renewal", another(first))
		lost := await(t, id, 2*time.Hour, "end", lostSVID)
		if !time.Now().Equal(notAfter(second)) || lost.Refused() == nil || lost.Refused().Reason != api.PodDeleted {
			t.Errorf("lost at %s for %v, want it at the end of the second SVID, %s", time.Now(), lost.Refused(), notAfter(second))
		}
	})
}

// The CA cannot see its pods for a while: known workloads keep what they have, new ones wait and are not refused.
func TestDirectoryAway(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		known, _ := n.keepFresh(newWorkload(s, "web-1", here))
		await(t, known, time.Second, "SVID", hasSVID)
		s.Pods.Fail(api.Wrap(api.DirectoryUnavailable, errors.New("cut off"), "the directory is away"))
		fresh, _ := n.keepFresh(newWorkload(s, "web-2", here))
		time.Sleep(40 * time.Minute) // at an hour, at most, the session ends and no other can be opened
		if h := known.Held().Load(); h.SVID == nil || api.ReasonOf(h.Refusal) != api.DirectoryUnavailable {
			t.Errorf("the known workload holds an SVID %t, refusal %v", h.SVID != nil, h.Refusal)
		}
		if h := fresh.Held().Load(); h.SVID != nil || h.Refused() != nil {
			t.Errorf("the new workload holds an SVID %t, refused %v; want it to wait", h.SVID != nil, h.Refused())
		}
		s.Pods.Fail(nil)
		await(t, known, 31*time.Second, "renewal", func(h agent.Held) bool { return h.SVID != nil && h.Refusal == nil })
		await(t, fresh, 31*time.Second, "SVID", hasSVID)
	})
}
