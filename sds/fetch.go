package sds

import (
	"context"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/signet-ca/signet/api"
)

// fetch answers a unary request.
func fetch(ctx context.Context, s *Server, req *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	w, err := s.admit(ctx, protocolFetch)
	if err != nil {
		return nil, err
	}
	defer s.dismiss(w)
	var resp *discovery.DiscoveryResponse
	err = contain(func() (err error) {
		call(s.cfg.Hooks.Opened, protocolFetch)
		resp, err = s.await(ctx, w, req)
		return err
	})
	if err = s.end(protocolFetch, s.log.With("workload", w.Name, "protocol", protocolFetch), err); err != nil {
		return nil, err
	}
	return resp, nil
}

// await waits until all that req asks for and may have is ready.
func (s *Server) await(ctx context.Context, w *Workload, req *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	if err := checkNode(req.GetNode()); err != nil {
		return nil, err
	}
	a, err := sotw.decode(req)
	if err != nil {
		return nil, err
	}
	session := newSession(w.ID)
	if _, err := session.handle(a); err != nil {
		return nil, err
	}
	var expire <-chan time.Time
	if now := time.Now(); !w.ExpireAt.IsZero() {
		t := time.NewTimer(expiry(w.ExpireAt, now).Sub(now))
		defer t.Stop()
		expire = t.C
	}
	patience := time.NewTimer(s.cfg.AnswerTimeout)
	defer patience.Stop()
	for {
		if err := s.over(w); err != nil {
			return nil, err
		}
		material, changed := w.Material.Get()
		ready, waiting, err := session.resolve(material, time.Now())
		if err != nil {
			return nil, err
		}
		if waiting == 0 {
			return sotw.encode(session.send(ready)), nil
		}
		select {
		case <-changed:
		case <-patience.C:
			return nil, api.E(api.DeadlineExceeded, "the secrets were not ready within %s", s.cfg.AnswerTimeout)
		case <-expire:
			return nil, api.E(api.ReauthRequired, "the token of this request is about to expire")
		case <-w.Done:
		case <-s.closing.Done():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
