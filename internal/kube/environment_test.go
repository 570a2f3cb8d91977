package kube_test

import (
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/signet-ca/signet/attestor/attestortest"
)

// The environment's proxies are not heeded; one that the kubeconfig names is.
func TestProxies(t *testing.T) {
	var proxied atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		proxied.Add(1)
		w.WriteHeader(http.StatusBadGateway)
	}))
	t.Cleanup(proxy.Close)
	s := newServer(t, false)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		review, _ := asked(r)
		send(w, http.StatusCreated, good(review, attestortest.Pod{}))
	})
	named := s.open(t, [2]string{"certificate-authority: ca.crt", "certificate-authority: ca.crt, proxy-url: " + proxy.URL})
	if _, err := named.ReviewToken(t.Context(), []byte("a.b.c"), "x"); err == nil || proxied.Load() != 1 {
		t.Errorf("%v; the proxy was asked %d times", err, proxied.Load())
	}
	proxied.Store(0)
	t.Setenv("HTTPS_PROXY", proxy.URL)
	const elsewhere = "https://api.signet.invalid:6443" // no environment's proxy is for loopback
	r := httptest.NewRequest(http.MethodPost, elsewhere, nil)
	if u, err := http.ProxyFromEnvironment(r); err != nil || u == nil {
		t.Skip("this process read its environment before")
	}
	if _, err := s.open(t, [2]string{s.URL, elsewhere}).ReviewToken(t.Context(), []byte("a.b.c"), "x"); err == nil || proxied.Load() != 0 {
		t.Errorf("%v; the proxy was asked %d times", err, proxied.Load())
	}
}
