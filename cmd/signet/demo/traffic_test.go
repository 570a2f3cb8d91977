package demo

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestXFCCURI(t *testing.T) {
	tests := map[string]string{
		"": "",
		"By=spiffe://a/b;Hash=00;URI=spiffe://demo.signet/x": "spiffe://demo.signet/x",
		"URI=spiffe://demo.signet/x":                         "spiffe://demo.signet/x",
		"By=URI=no;Hash=00":                                  "",
	}
	for header, want := range tests {
		if got := xfccURI(header); got != want {
			t.Errorf("%q: %q, want %q", header, got, want)
		}
	}
}

// An answer that does not prove who was on both sides counts as a failure, whatever its status.
func TestTrafficBelievesNothing(t *testing.T) {
	a := newAuthority(t, trustDomain)
	encode := func(id string) string {
		cert, _ := a.issue(t, leaf(id))
		return encodeCert(cert.Raw)
	}
	good := map[string]string{
		echo + headerXFCC: "URI=" + checkoutID, headerUpstreamID: paymentsID,
		echo + headerCallerCert: encode(checkoutID), headerUpstreamCert: encode(paymentsID),
	}
	tests := map[string]struct {
		status int
		header map[string]string // on top of the good ones
		want   string            // part of the failure; empty: none
	}{
		"good":                        {200, nil, ""},
		"an error":                    {503, nil, "status 503: paid"},
		"nobody called":               {200, map[string]string{echo + headerXFCC: ""}, `took the caller for ""`},
		"somebody else called":        {200, map[string]string{echo + headerXFCC: "URI=" + paymentsID}, "took the caller for"},
		"somebody else answered":      {200, map[string]string{headerUpstreamID: checkoutID}, "took its upstream for"},
		"no certificate":              {200, map[string]string{headerUpstreamCert: "-"}, "certificate of payments: header holds no PEM"},
		"a certificate that is none":  {200, map[string]string{echo + headerCallerCert: encodeCert([]byte("x"))}, "certificate of checkout: x509"},
		"bad escapes":                 {200, map[string]string{echo + headerCallerCert: "%zz"}, "certificate of checkout: invalid URL escape"},
		"the certificate of another":  {200, map[string]string{headerUpstreamCert: encode(checkoutID)}, "certificate is not that of " + paymentsID},
		"a certificate without an ID": {200, map[string]string{headerUpstreamCert: encodeCert(a.cert.Raw)}, "certificate is not that of " + paymentsID},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for k, v := range good {
					w.Header().Set(k, v)
				}
				for k, v := range tt.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(tt.status)
				w.Write([]byte("paid\n"))
			}))
			defer s.Close()
			tr := newTraffic(s.Listener.Addr().(*net.TCPAddr).AddrPort(), checkoutID, paymentsID)
			tr.count(tr.request())
			c := tr.now.Load()
			if tt.want == "" {
				if c.failed != 0 || c.checkout.certificates != 1 || c.first.IsZero() {
					t.Errorf("%+v", c)
				}
				return
			}
			if c.failed != 1 || !strings.Contains(c.failures[0], tt.want) || !c.first.IsZero() {
				t.Errorf("%+v, want a failure with %q", c, tt.want)
			}
		})
	}
}

func TestTrafficKeepsTheFirstFailures(t *testing.T) {
	tr := newTraffic((&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}).AddrPort(), checkoutID, paymentsID)
	for range maxFailures + 3 {
		tr.count(answer{}, errors.New("no"))
	}
	if c := tr.now.Load(); c.failed != maxFailures+3 || len(c.failures) != maxFailures {
		t.Errorf("%d failed, %d kept", c.failed, len(c.failures))
	}
}

func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTraffic((&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}).AddrPort(), checkoutID, paymentsID)
		three := func(c counts) bool { return c.requests == 3 }
		go func() {
			for range 3 {
				time.Sleep(time.Second)
				tr.count(answer{}, errors.New("no"))
			}
		}()
		if c, err := tr.await(t.Context(), time.Minute, "nothing", three); err != nil || c.requests != 3 {
			t.Errorf("%d requests, %v", c.requests, err)
		}
		_, err := tr.await(t.Context(), time.Minute, "there is no fourth request", func(c counts) bool { return c.requests == 4 })
		if err == nil || err.Error() != "there is no fourth request within 1m0s" {
			t.Errorf("error %v", err)
		}
		why := errors.New("that will do")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(why)
		if _, err := tr.await(ctx, time.Minute, "", func(counts) bool { return false }); !errors.Is(err, why) {
			t.Errorf("error %v, want %v", err, why)
		}
	})
}
