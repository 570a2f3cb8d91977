package demo

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A refusal is one however long the server takes to say it, and an answer is none.
func TestKnock(t *testing.T) {
	for _, tt := range []struct {
		name   string
		caller string
		late   time.Duration
		want   string // in the refusal; empty: there is none
	}{
		{"refused", intruder, 0, "certificate"},
		{"refused late", intruder, refusalTimeout * 5 / 4, "certificate"},
		{"let in", checkout, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.late > 0 && testing.Short() {
				t.Skip("it waits for the patience of who knocks to end")
			}
			a := newAuthority(t, trustDomain)
			in, out := a.holder(t, leaf(paymentsID)), a.holder(t, leaf("spiffe://demo.signet/ns/demo/sa/"+tt.caller))
			config := serverTLS(in, spiffeid.RequireFromString(checkoutID), func(error) { <-time.After(tt.late) })
			s := httptest.NewUnstartedServer(http.HandlerFunc(backend))
			s.Config.ErrorLog = log.New(io.Discard, "", 0)
			s.Listener = tls.NewListener(s.Listener, config)
			s.Start()
			defer s.Close()
			why, err := knock(t.Context(), s.Listener.Addr().(*net.TCPAddr).AddrPort(), clientTLS(out, spiffeid.RequireFromString(paymentsID), false))
			if err != nil || (why == "") != (tt.want == "") || !strings.Contains(why, tt.want) {
				t.Errorf("%q, %v, want %q", why, err, tt.want)
			}
		})
	}
}
