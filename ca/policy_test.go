package ca_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
)

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

// TestTemplate accepts the templates that give each ServiceAccount an ID of its own, and no other.
//
// spiffe: ID-01, ID-02, ID-05, ID-06
// threat: GHSA-59w7
func TestTemplate(t *testing.T) {
	for _, tt := range []struct {
		template string
		id       string // of namespace shop, ServiceAccount web; empty: refused
	}{
		{"", "/ns/shop/sa/web"},
		{"/ns/{namespace}/sa/{serviceAccount}", "/ns/shop/sa/web"},
		{"/k8s/{serviceAccount}/{namespace}", "/k8s/web/shop"},
		{"/a.b_C-9/{namespace}/{serviceAccount}/z", "/a.b_C-9/shop/web/z"},
		{"/signets/{namespace}/{serviceAccount}", "/signets/shop/web"},
		{"/Signet/{namespace}/{serviceAccount}", "/Signet/shop/web"}, // paths heed letter case

		// Reserved, or within a workload's reach to become so.
		{"/signet/{namespace}/{serviceAccount}", ""},
		{"/{namespace}/{serviceAccount}", ""},
		{"/{serviceAccount}/ns/{namespace}", ""},
		{"/{namespace}/agent/{serviceAccount}", ""},

		// Two ServiceAccounts would share an ID.
		{"/ns/{namespace}", ""},
		{"/sa/{serviceAccount}", ""},
		{"/all", ""},
		{"/ns/{namespace}-{serviceAccount}", ""},
		{"/ns/{namespace}/sa/{namespace}", ""},
		{"/ns/{namespace}/{namespace}/{serviceAccount}", ""},
		{"/ns/x{namespace}/sa/{serviceAccount}", ""},
		{"/ns/{namespace}x/sa/{serviceAccount}", ""},
		{"/ns/{namespace}/sa/{serviceAccount}.{namespace}", ""},

		// No path, or a path of something else.
		{"ns/{namespace}/sa/{serviceAccount}", ""},
		{"/", ""},
		{"//{namespace}/{serviceAccount}", ""},
		{"/ns/{namespace}/sa/{serviceAccount}/", ""},
		{"/ns//{namespace}/{serviceAccount}", ""},
		{"/ns/../{namespace}/{serviceAccount}", ""},
		{"/./{namespace}/{serviceAccount}", ""},
		{"/ns/{namespace}/sa/{serviceAccount}/..", ""},
		{"/n%73/{namespace}/{serviceAccount}", ""},
		{"/ns?/{namespace}/{serviceAccount}", ""},
		{"/ns#/{namespace}/{serviceAccount}", ""},
		{"/ns:1@x/{namespace}/{serviceAccount}", ""},
		{"/n s/{namespace}/{serviceAccount}", ""},
		{"/ñ/{namespace}/{serviceAccount}", ""},
		{"/ns\\{namespace}/{serviceAccount}", ""},
		{"spiffe://example.org/ns/{namespace}/sa/{serviceAccount}", ""},

		// Placeholders that are none.
		{"/ns/{Namespace}/sa/{serviceAccount}", ""},
		{"/ns/{namespace/sa/{serviceAccount}", ""},
		{"/ns/{namespace}/sa/{serviceAccount}/{pod}", ""},
		{"/ns/{namespace}/sa/{serviceAccount}/{}", ""},
		{"/ns/{{namespace}}/sa/{serviceAccount}", ""},
	} {
		t.Run(tt.template, func(t *testing.T) {
			p, err := ca.NewPolicy(ca.PolicyFile{Template: tt.template, Namespaces: []string{"*"}}, exampleOrg, false)
			if tt.id == "" {
				wantReason(t, err, api.ConfigInvalid)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			d, err := p.Decide(attestor.Claims{Namespace: "shop", ServiceAccount: "web"})
			if err != nil || d.ID.String() != "spiffe://example.org"+tt.id {
				t.Errorf("the identity is %s (%v), want %s", d.ID, err, tt.id)
			}
		})
	}
}

// TestTemplateInjective draws names, as nasty as Kubernetes and worse attestors allow: two different workloads never share
// an identity, and none has a reserved one, a malformed one or one of another trust domain.
//
// spiffe: ID-01, ID-05, ID-06, ID-07
// threat: CVE-2021-41803
func TestTemplateInjective(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	parts := []string{"a", "b", "-", ".", "..", "/", "signet", "ns", "sa", "{namespace}", "{serviceAccount}", "%2f", "", "A", "0", "ca", "agent", "@", ":", "?", "#", "\x00", strings.Repeat("x", 63)}
	name := func() string {
		var b strings.Builder
		for range 1 + r.IntN(3) {
			b.WriteString(parts[r.IntN(len(parts))])
		}
		return b.String()
	}
	for _, template := range []string{"", "/k8s/{serviceAccount}/{namespace}", "/x/{namespace}/{serviceAccount}/ns/sa"} {
		p, err := ca.NewPolicy(ca.PolicyFile{Template: template, Namespaces: []string{"*"}}, exampleOrg, false)
		if err != nil {
			t.Fatal(err)
		}
		owner := map[string][2]string{}
		given := 0
		for range 20_000 {
			who := [2]string{name(), name()}
			d, err := p.Decide(attestor.Claims{Namespace: who[0], ServiceAccount: who[1]})
			if err != nil {
				wantReason(t, err, api.IDMalformed)
				if strings.Contains(api.AsError(err).Detail, who[0]) && len(who[0]) > 5 {
					t.Fatalf("the refusal names the workload: %v", err)
				}
				continue
			}
			given++
			id := d.ID.String()
			if other, ok := owner[id]; ok && other != who {
				t.Fatalf("%q and %q share %s", other, who, id)
			}
			owner[id] = who
			if _, err := api.ParseWorkloadID(id); err != nil || api.IsReserved(d.ID) || !d.ID.MemberOf(exampleOrg) {
				t.Fatalf("%q became %s (%v)", who, id, err)
			}
		}
		if given < 1000 {
			t.Errorf("only %d of the names made an identity", given)
		}
	}
}

// TestIDTooLong refuses an identity that no verifier needs to read.
//
// spiffe: ID-07
func TestIDTooLong(t *testing.T) {
	p, err := ca.NewPolicy(ca.PolicyFile{
		Template: "/" + strings.Repeat("p", 1900) + "/{namespace}/{serviceAccount}", Namespaces: []string{"*"},
	}, exampleOrg, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Decide(attestor.Claims{Namespace: "shop", ServiceAccount: strings.Repeat("a", 100)}); err != nil {
		t.Errorf("an identity within the limit: %v", err)
	}
	_, err = p.Decide(attestor.Claims{Namespace: "shop", ServiceAccount: strings.Repeat("a", 253)})
	wantReason(t, err, api.IDMalformed)
}

func FuzzTemplate(f *testing.F) {
	for _, s := range []string{"", ca.DefaultTemplate, "/signet/{namespace}/{serviceAccount}", "/a/{serviceAccount}/{namespace}", "//", "/{namespace}", "/a/{namespace}/../{serviceAccount}"} {
		f.Add(s, "shop", "web", "bank", "db")
	}
	f.Add("/ns/{namespace}/sa/{serviceAccount}", "a", "b/c", "a/b", "c")
	f.Fuzz(func(t *testing.T, template, ns1, sa1, ns2, sa2 string) {
		p, err := ca.NewPolicy(ca.PolicyFile{Template: template, Namespaces: []string{"*"}}, exampleOrg, false)
		if err != nil {
			if api.ReasonOf(err) != api.ConfigInvalid {
				t.Fatal(err)
			}
			return
		}
		one, err1 := p.Decide(attestor.Claims{Namespace: ns1, ServiceAccount: sa1})
		two, err2 := p.Decide(attestor.Claims{Namespace: ns2, ServiceAccount: sa2})
		for _, d := range []struct {
			ca.Decision
			err error
		}{{one, err1}, {two, err2}} {
			if d.err != nil {
				if api.ReasonOf(d.err) != api.IDMalformed {
					t.Fatal(d.err)
				}
				continue
			}
			if _, err := api.ParseWorkloadID(d.ID.String()); err != nil || api.IsReserved(d.ID) || !d.ID.MemberOf(exampleOrg) {
				t.Fatalf("%q made %s (%v)", template, d.ID, err)
			}
		}
		if err1 == nil && err2 == nil && one.ID == two.ID && (ns1 != ns2 || sa1 != sa2) {
			t.Fatalf("%q gives %q/%q and %q/%q the same identity", template, ns1, sa1, ns2, sa2)
		}
	})
}

// TestPolicyFile accepts and refuses everything but templates; all that is wrong is told at once.
//
// threat: L17
func TestPolicyFile(t *testing.T) {
	all := []string{"*"}
	rule := func(change func(*ca.PolicyRule)) ca.PolicyFile {
		r := ca.PolicyRule{Namespaces: []string{"shop"}}
		change(&r)
		return ca.PolicyFile{Namespaces: all, Rules: []ca.PolicyRule{r}}
	}
	for _, tt := range []struct {
		name        string
		file        ca.PolicyFile
		development bool
		wrong       []string // parts of the error; none: accepted
	}{
		{"empty", ca.PolicyFile{}, false, nil},
		{"headed", ca.PolicyFile{APIVersion: "signet.dev/v1", Kind: "Policy"}, false, nil},
		{"of another version", ca.PolicyFile{APIVersion: "signet.dev/v2"}, false, []string{"apiVersion"}},
		{"of another kind", ca.PolicyFile{Kind: "CAConfig"}, false, []string{"kind"}},
		{"TTL 5 m", ca.PolicyFile{TTL: 5 * time.Minute}, false, nil},
		{"TTL below 5 m", ca.PolicyFile{TTL: 5*time.Minute - 1}, false, []string{"ttl"}},
		{"TTL 24 h", ca.PolicyFile{TTL: 24 * time.Hour}, false, nil},
		{"TTL above 24 h", ca.PolicyFile{TTL: 24*time.Hour + 1}, false, []string{"ttl"}},
		{"negative TTL", ca.PolicyFile{TTL: -time.Hour}, false, []string{"ttl"}},
		{"TTL 10 s for development", ca.PolicyFile{TTL: 10 * time.Second}, true, nil},
		{"TTL 10 s", ca.PolicyFile{TTL: 10 * time.Second}, false, []string{"ttl"}},
		{"TTL below 10 s for development", ca.PolicyFile{TTL: 9 * time.Second}, true, []string{"ttl"}},
		{"names", ca.PolicyFile{Namespaces: []string{"shop", "a-1", "*"}}, false, nil},
		{"pattern", ca.PolicyFile{Namespaces: []string{"shop-*"}}, false, []string{"namespaces"}},
		{"upper case", ca.PolicyFile{Namespaces: []string{"Shop"}}, false, []string{"namespaces"}},
		{"empty name", ca.PolicyFile{Namespaces: []string{""}}, false, []string{"namespaces"}},
		{"rule for nobody", rule(func(r *ca.PolicyRule) { r.Namespaces = nil }), false, []string{"rules[0].namespaces"}},
		{"rule with a pattern", rule(func(r *ca.PolicyRule) { r.ServiceAccounts = []string{"web*"} }), false, []string{"rules[0].serviceAccounts"}},
		{"rule with a dotted name", rule(func(r *ca.PolicyRule) { r.ServiceAccounts = []string{"web.v2"} }), false, nil},
		{"rule with a short TTL", rule(func(r *ca.PolicyRule) { r.TTL = time.Minute }), false, []string{"rules[0].ttl"}},
		{"rule with a long TTL", rule(func(r *ca.PolicyRule) { r.TTL = 48 * time.Hour }), false, []string{"rules[0].ttl"}},
		{"DNS name", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"{serviceAccount}.{namespace}.svc.cluster.local", "a.b"} }), false, nil},
		{"DNS name of one label", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"localhost"} }), false, []string{"rules[0].dnsNames"}},
		{"DNS name that ends in a placeholder", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"svc.{namespace}"} }), false, []string{"ends in a placeholder"}},
		{"DNS name with half a placeholder", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"x-{namespace}.svc"} }), false, []string{"rules[0].dnsNames"}},
		{"wildcard", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"*.svc.local"} }), false, []string{"rules[0].dnsNames"}},
		{"DNS name in upper case", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"A.b"} }), false, []string{"rules[0].dnsNames"}},
		{"DNS name with an empty label", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"a..b"} }), false, []string{"rules[0].dnsNames"}},
		{"DNS name with a dot at its end", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"a.b."} }), false, []string{"rules[0].dnsNames"}},
		{"DNS name with a hyphen at its end", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{"a-.b"} }), false, []string{"rules[0].dnsNames"}},
		{"DNS name too long", rule(func(r *ca.PolicyRule) { r.DNSNames = []string{strings.Repeat("a.", 127) + "b"} }), false, []string{"rules[0].dnsNames"}},
		{"all at once", ca.PolicyFile{
			Kind: "x", Template: "/", TTL: time.Second, Namespaces: []string{"!"}, Rules: []ca.PolicyRule{{}, {Namespaces: all, TTL: 1}},
		}, false, []string{"kind", "template", "ttl", "namespaces", "rules[0]", "rules[1].ttl"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ca.NewPolicy(tt.file, exampleOrg, tt.development)
			if tt.wrong == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantReason(t, err, api.ConfigInvalid)
			for _, part := range tt.wrong {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%v: it does not tell of %s", err, part)
				}
			}
		})
	}
}

// TestRules uses the first rule that covers a workload, whole, and no other.
//
// threat: L17, CVE-2026-39350
func TestRules(t *testing.T) {
	p, err := ca.NewPolicy(ca.PolicyFile{
		TTL:        time.Hour,
		Namespaces: []string{"shop", "bank"},
		Ed25519:    true,
		Rules: []ca.PolicyRule{
			{Namespaces: []string{"shop"}, ServiceAccounts: []string{"web"}, TTL: 10 * time.Minute},
			{Namespaces: []string{"shop"}, DNSNames: []string{"{serviceAccount}.{namespace}.svc", "shop.example.org"}},
			{Namespaces: []string{"*"}, TTL: 20 * time.Minute},
		},
	}, exampleOrg, false)
	if err != nil {
		t.Fatal(err)
	}
	if p.MaxTTL() != time.Hour || !p.Keys().Ed25519 {
		t.Errorf("longest TTL %s, keys %+v", p.MaxTTL(), p.Keys())
	}
	if diff := cmp.Diff([]string{"x.x.svc", "shop.example.org"}, p.DNSNames()); diff != "" {
		t.Errorf("sample DNS names (-want +got):\n%s", diff)
	}
	for _, tt := range []struct {
		namespace, account string
		ttl                time.Duration
		names              []string
		err                api.Reason
	}{
		{"shop", "web", 10 * time.Minute, nil, ""},
		{"shop", "db", time.Hour, []string{"db.shop.svc", "shop.example.org"}, ""},
		{"bank", "web", 20 * time.Minute, nil, ""},
		{"shop", "admin.prod", 0, nil, api.DNSNameRefused},
		{"dev", "web", 0, nil, api.NamespaceNotAllowed},
		{"", "web", 0, nil, api.NamespaceNotAllowed},
		{"*", "web", 0, nil, api.NamespaceNotAllowed},
	} {
		t.Run(tt.namespace+"/"+tt.account, func(t *testing.T) {
			d, err := p.Decide(attestor.Claims{Namespace: tt.namespace, ServiceAccount: tt.account})
			if tt.err != "" {
				wantReason(t, err, tt.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("spiffe://example.org/ns/%s/sa/%s", tt.namespace, tt.account)
			if d.ID.String() != want || d.TTL != tt.ttl || !cmp.Equal(d.DNSNames, tt.names) {
				t.Errorf("decided %+v, want %s, %s, %q", d, want, tt.ttl, tt.names)
			}
		})
	}
}

// TestPolicyImmutable keeps a policy as it was checked, whatever becomes of the values that it was made from.
func TestPolicyImmutable(t *testing.T) {
	f := ca.PolicyFile{Namespaces: []string{"shop"}, Rules: []ca.PolicyRule{{Namespaces: []string{"shop"}, DNSNames: []string{"a.b"}}}}
	p, err := ca.NewPolicy(f, exampleOrg, false)
	if err != nil {
		t.Fatal(err)
	}
	f.Namespaces[0], f.Rules[0].DNSNames[0], f.Rules[0].TTL = "*", "evil.example", 48*time.Hour
	d, err := p.Decide(attestor.Claims{Namespace: "shop", ServiceAccount: "web"})
	if err != nil || d.TTL != time.Hour || !cmp.Equal(d.DNSNames, []string{"a.b"}) {
		t.Errorf("decided %+v (%v)", d, err)
	}
	if _, err := p.Decide(attestor.Claims{Namespace: "dev", ServiceAccount: "web"}); err == nil {
		t.Error("a namespace came in behind the policy's back")
	}
}
