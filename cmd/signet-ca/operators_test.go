package main

import (
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/daemon"
)

// What is wrong with who operates the CA is said before anything is opened.
func TestOperatorsConfig(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	glass := base64.StdEncoding.EncodeToString(catest.BreakGlass(t, td, "safe-1").Certificate[0])
	other := base64.StdEncoding.EncodeToString(catest.BreakGlass(t, spiffeid.RequireTrustDomainFromString("other.org"), "safe-1").Certificate[0])
	for _, row := range []struct {
		name string
		o    operatorsConfig
		says string // empty: good
		more string // another issuer; empty: none
	}{
		{"nobody", operatorsConfig{}, "", ""},
		{"all", operatorsConfig{Listen: "127.0.0.1:8444", Namespace: "people", Issuers: []string{"https://a"}, BreakGlass: []string{glass}}, "", ""},
		{"no port", operatorsConfig{BreakGlass: []string{glass}}, "operators.listen is not set", ""},
		{"bad port", operatorsConfig{Listen: "8444"}, "is not host:port", ""},
		{"bad namespace", operatorsConfig{Listen: ":8444", Namespace: "No"}, "is not the name of a namespace", ""},
		{"the agents' namespace", operatorsConfig{Listen: ":8444", Namespace: "signet-system"}, "without pods", ""},
		{"unknown issuer", operatorsConfig{Listen: ":8444", Issuers: []string{"https://b"}}, "issuers[0]", ""},
		{"no base64", operatorsConfig{Listen: ":8444", BreakGlass: []string{"-----BEGIN"}}, "not base64", ""},
		{"no certificate", operatorsConfig{Listen: ":8444", BreakGlass: []string{"AAAA"}}, "not a certificate", ""},
		{"twice", operatorsConfig{Listen: ":8444", BreakGlass: []string{glass, glass}}, "there already", ""},
		{"several clusters, and not said whose", operatorsConfig{Listen: ":8444"}, "operators.issuers is required", "https://b"},
		{"several clusters, and none", operatorsConfig{Listen: ":8444", Issuers: []string{}, BreakGlass: []string{glass}}, "operators.issuers is required", "https://b"},
		{"several clusters, and one of them", operatorsConfig{Listen: ":8444", Issuers: []string{"https://b"}}, "", "https://b"},
		{"several clusters, and no port", operatorsConfig{}, "", "https://b"},
		{"another trust domain's", operatorsConfig{Listen: ":8444", BreakGlass: []string{other}}, "/signet/admin/NAME", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := config{TrustDomain: "example.org", Operators: row.o, Issuers: []issuerConfig{{Issuer: "https://a"}}, Agents: agentsConfig{Namespace: "signet-system"}}
			if row.more != "" {
				c.Issuers = append(c.Issuers, issuerConfig{Issuer: row.more})
			}
			var wrong []string
			c.checkOperators(func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) })
			got := strings.Join(wrong, "; ")
			if (row.says == "") != (got == "") || !strings.Contains(got, row.says) {
				t.Errorf("%q", got)
			}
			if row.name == "all" {
				l := &loaded{config: c, td: td}
				if r := l.operators(nil, slog.New(slog.DiscardHandler)); len(r.BreakGlass) != 1 || r.BreakGlass[0].Name != "safe-1" || r.Namespace != "people" {
					t.Errorf("%+v", r)
				}
			}
		})
	}
}

// TestOperatorsPortCrowd: whoever may forward the port and says nothing keeps no operator out, however many connections he
// opens.
//
// threat: J07
func TestOperatorsPortCrowd(t *testing.T) {
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	limits := operatorsLimits(nil)
	l := daemon.Limit(raw, limits)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { // an echo of one byte, then silence
				defer c.Close()
				io.CopyN(c, c, 1)
				io.Copy(io.Discard, c)
			})
		}
	})
	var crowd []net.Conn
	for range limits.Strangers + 20 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		crowd = append(crowd, c)
	}
	late, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	late.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := late.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(late, make([]byte, 1)); err != nil {
		t.Errorf("whoever came after a crowd of silent ones was sent away: %v", err)
	}
	for _, c := range append(crowd, late) {
		c.Close()
	}
	l.Close()
	wg.Wait()
}
