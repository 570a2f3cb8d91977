package attestor_test

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

const (
	audience = "signet:example.org"
	ttl      = time.Hour
)

// cluster is an issuer, one of its pods, and an attestor that knows the issuer.
type cluster struct {
	*attestortest.Issuer
	pod      attestortest.Pod
	attestor *attestor.ServiceAccount
}

func newCluster(t testing.TB, algorithm string) cluster {
	t.Helper()
	iss, err := attestortest.NewIssuer(attestortest.Config{Algorithm: algorithm})
	if err != nil {
		t.Fatal(err)
	}
	return cluster{iss, attestortest.NewPod("shop", "cart-7d9f-x2x", "cart", "node-1.example"), newAttestor(t, iss, attestor.ServiceAccountConfig{})}
}

// newAttestor knows iss by the key set that it has now.
func newAttestor(t testing.TB, iss *attestortest.Issuer, cfg attestor.ServiceAccountConfig) *attestor.ServiceAccount {
	t.Helper()
	keys, err := attestor.StaticKeys(iss.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	cfg.Issuers = map[string]attestor.Keys{iss.Name(): keys}
	a, err := attestor.NewServiceAccount(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (c cluster) token(t testing.TB, change ...func(*attestortest.Draft)) string {
	t.Helper()
	token, err := c.Token(c.pod, audience, ttl, change...)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func evidence(token string) attestor.Evidence {
	return attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
}

// refused fails unless err is want, is a refusal that may be shown, and says nothing that the token says.
func refused(t testing.TB, token string, c attestor.Claims, err error, want api.Reason) {
	t.Helper()
	if err == nil || api.ReasonOf(err) != want {
		t.Fatalf("got %v, want %s", err, want)
	}
	if c != (attestor.Claims{}) {
		t.Errorf("claims beside a refusal: %+v", c)
	}
	for _, part := range secrets(token) {
		if strings.Contains(err.Error(), part) {
			t.Errorf("error %q holds %q of the token", err, part)
		}
	}
}

// secrets are the strings of a token that no error may hold: its parts, and each string value of its claims.
func secrets(token string) []string {
	var out []string
	for part := range strings.SplitSeq(token, ".") {
		raw, _ := base64.RawURLEncoding.DecodeString(part)
		var m any
		json.Unmarshal(raw, &m)
		out = append(out, strs(m)...)
		out = append(out, part)
	}
	kept := out[:0]
	for _, s := range out {
		if len(s) >= 8 && !strings.Contains(audience, s) {
			kept = append(kept, s)
		}
	}
	return kept
}

func strs(v any) (out []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		for _, e := range v {
			out = append(out, strs(e)...)
		}
	case map[string]any:
		for _, e := range v {
			out = append(out, strs(e)...)
		}
	}
	return out
}

var allAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

func TestAttest(t *testing.T) {
	for _, alg := range allAlgorithms {
		t.Run(alg, func(t *testing.T) {
			c := newCluster(t, alg)
			before, token := time.Now(), c.token(t, attestortest.Claim("jti", "id-1"))
			now := time.Now()
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, now)
			if err != nil {
				t.Fatal(err)
			}
			want := attestor.Claims{
				Kind: api.EvidenceServiceAccount, Issuer: c.Name(),
				Namespace: "shop", ServiceAccount: "cart", ServiceAccountUID: c.pod.ServiceAccountUID,
				PodName: c.pod.Name, PodUID: c.pod.UID, NodeName: c.pod.NodeName, NodeUID: c.pod.NodeUID, TokenID: "id-1",
				IssuedAt: got.IssuedAt, ExpireAt: got.IssuedAt.Add(ttl),
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if got.IssuedAt.Before(before.Add(-2*time.Second)) || got.IssuedAt.After(now) {
				t.Errorf("issued at %v, the token was made between %v and %v", got.IssuedAt, before, now)
			}
		})
	}
}

type row struct {
	name   string
	change func(*attestortest.Draft)
	after  time.Duration // of now
	want   api.Reason    // empty: accepted
}

// run tries rows by a clock that stands still, for some are true of one second and not of the next.
func (c cluster) run(t *testing.T, a *attestor.ServiceAccount, rows []row) {
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				var changes []func(*attestortest.Draft)
				if r.change != nil {
					changes = append(changes, r.change)
				}
				token := c.token(t, changes...)
				got, err := a.Attest(t.Context(), evidence(token), audience, time.Now().Add(r.after))
				if r.want != "" {
					refused(t, token, got, err, r.want)
				} else if err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

func in(claim string, d time.Duration) func(*attestortest.Draft) {
	return func(draft *attestortest.Draft) { draft.Claims[claim] = time.Now().Add(d).Unix() }
}

func kube(f func(k map[string]any)) func(*attestortest.Draft) {
	return func(d *attestortest.Draft) { f(d.Kubernetes()) }
}

// set sets kubernetes.io.object.member.
func set(object, member string, v any) func(*attestortest.Draft) {
	return kube(func(k map[string]any) { k[object].(map[string]any)[member] = v })
}

// threat: A01, A02, CVE-2024-5798
func TestAudience(t *testing.T) {
	c := newCluster(t, "ES256")
	aud := func(v any) func(*attestortest.Draft) { return attestortest.Claim("aud", v) }
	c.run(t, c.attestor, []row{
		{"a list of one", aud([]any{audience}), 0, ""},
		{"a string", aud(audience), 0, ""},
		{"A01 API server only", aud([]any{"https://kubernetes.default.svc"}), 0, api.TokenAudience},
		{"A01 an agent's", aud("signet-agent:example.org"), 0, api.TokenAudience},
		{"A01 prefix", aud("signet:example.orgs"), 0, api.TokenAudience},
		{"A01 part", aud("signet:example"), 0, api.TokenAudience},
		{"A01 case", aud("Signet:example.org"), 0, api.TokenAudience},
		{"A01 joined", aud("signet:example.org other"), 0, api.TokenAudience},
		{"A02 ours and another", aud([]any{audience, "vault"}), 0, api.TokenAudienceNotExclusive},
		{"A02 another and ours", aud([]any{"vault", audience}), 0, api.TokenAudienceNotExclusive},
		{"A02 ours twice", aud([]any{audience, audience}), 0, api.TokenAudienceNotExclusive},
		{"I06 missing", attestortest.Without("aud"), 0, api.TokenAudience},
		{"I06 empty list", aud([]any{}), 0, api.TokenAudience},
		{"I06 empty string", aud(""), 0, api.TokenAudience},
		{"I06 null", aud(nil), 0, api.TokenAudience},
		{"number", aud(7), 0, api.TokenMalformed},
		{"object", aud(map[string]any{audience: true}), 0, api.TokenMalformed},
		{"ours and a number", aud([]any{audience, 7}), 0, api.TokenMalformed},
		{"nested list", aud([]any{[]any{audience}}), 0, api.TokenMalformed},
	})
	t.Run("no audience asked for", func(t *testing.T) {
		token := c.token(t, aud(""))
		got, err := c.attestor.Attest(t.Context(), evidence(token), "", time.Now())
		refused(t, token, got, err, api.TokenAudience)
	})
}

// threat: A04, A05, A06
func TestTimes(t *testing.T) {
	c := newCluster(t, "ES256")
	c.run(t, c.attestor, []row{
		{"A04 a second before expiry", nil, ttl - 2*time.Second, ""},
		{"A04 at expiry", nil, ttl, api.TokenExpired},
		{"A04 1 s past", nil, ttl + time.Second, api.TokenExpired},
		{"A04 59 s past", nil, ttl + 59*time.Second, api.TokenExpired},
		{"A04 61 s past", nil, ttl + 61*time.Second, api.TokenExpired},
		{"A05 nbf 10 min ahead", in("nbf", 10*time.Minute), 0, api.TokenNotYetValid},
		{"A05 iat 10 min ahead", in("iat", 10*time.Minute), 0, api.TokenNotYetValid},
		{"A05 the clock is 4 s behind", nil, -4 * time.Second, ""},
		{"I12 the clock is 7 s behind", nil, -7 * time.Second, api.TokenNotYetValid},
		{"I12 the clock is a year behind", nil, -365 * 24 * time.Hour, api.TokenNotYetValid},
		{"A06 a day and a second", in("exp", 24*time.Hour+2*time.Second), 0, api.TokenTTLTooLong},
		{"A06 a year, as extended", func(d *attestortest.Draft) {
			in("exp", 365*24*time.Hour)(d)
			set("pod", "name", c.pod.Name)(d)
			d.Kubernetes()["warnafter"] = time.Now().Add(3607 * time.Second).Unix()
		}, 0, api.TokenTTLTooLong},
		{"A06 a short one with warnafter", kube(func(k map[string]any) { k["warnafter"] = 1 }), 0, ""},
		{"A06 to the year 9999", attestortest.Claim("exp", int64(253402300799)), 0, api.TokenTTLTooLong},
		{"A06 issued in 1970", attestortest.Claim("iat", 0), 0, api.TokenTTLTooLong},
		{"nbf missing", attestortest.Without("nbf"), 0, ""},
		{"I05 exp missing", attestortest.Without("exp"), 0, api.TokenMalformed},
		{"iat missing", attestortest.Without("iat"), 0, api.TokenMalformed},
		{"exp null", attestortest.Claim("exp", nil), 0, api.TokenMalformed},
		{"exp string", attestortest.Claim("exp", fmt.Sprint(time.Now().Add(ttl).Unix())), 0, api.TokenMalformed},
		{"exp beyond int64", attestortest.Claim("exp", json.Number("99999999999999999999")), 0, api.TokenMalformed},
		{"exp beyond the year 9999", attestortest.Claim("exp", json.Number("253402300800")), 0, api.TokenMalformed},
		{"exp as exponent", attestortest.Claim("exp", json.Number("1e12")), 0, api.TokenMalformed},
		{"exp fraction", attestortest.Claim("exp", float64(time.Now().Add(ttl).Unix())+.5), 0, api.TokenMalformed},
		{"exp negative", attestortest.Claim("exp", -1), 0, api.TokenMalformed},
		{"nbf string", attestortest.Claim("nbf", "0"), 0, api.TokenMalformed},
		{"exp before iat", in("exp", -time.Second), 0, api.TokenMalformed},
	})
}

// threat: A05, A06, K10
func TestSkewAndLifetime(t *testing.T) {
	c := newCluster(t, "ES256")
	strict := newAttestor(t, c.Issuer, attestor.ServiceAccountConfig{Skew: -1, MaxLifetime: 30 * time.Minute})
	c.run(t, strict, []row{
		{"no skew", nil, -2 * time.Second, api.TokenNotYetValid},
		{"an hour is above the limit", nil, 0, api.TokenTTLTooLong},
		{"the limit itself", in("exp", 30*time.Minute), 0, ""},
	})
}

func TestAttestExpired(t *testing.T) {
	c := newCluster(t, "ES256")
	grace := 4 * time.Hour
	for _, r := range []row{
		{"fresh", nil, 0, ""},
		{"expired an hour ago", nil, 2 * ttl, ""},
		{"at the end of the grace", nil, ttl + grace, api.TokenExpired},
		{"everything else still holds", attestortest.Audiences("vault"), 2 * ttl, api.TokenAudience},
	} {
		t.Run(r.name, func(t *testing.T) {
			var token string
			if token = c.token(t); r.change != nil {
				token = c.token(t, r.change)
			}
			got, err := c.attestor.AttestExpired(t.Context(), evidence(token), audience, time.Now().Add(r.after), grace)
			if r.want != "" {
				refused(t, token, got, err, r.want)
			} else if err != nil {
				t.Fatal(err)
			}
		})
	}
}

// threat: A13, A14, A16, A17
func TestBinding(t *testing.T) {
	c := newCluster(t, "ES256")
	without := func(names ...string) func(*attestortest.Draft) {
		return kube(func(k map[string]any) {
			for _, n := range names {
				delete(k, n)
			}
		})
	}
	secret := map[string]any{"name": "token-x7x", "uid": "3a8f"}
	c.run(t, c.attestor, []row{
		{"A13 bound to nothing", without("pod", "node"), 0, api.TokenNotPodBound},
		{"A13 bound to a secret", func(d *attestortest.Draft) {
			without("pod", "node")(d)
			d.Kubernetes()["secret"] = secret
		}, 0, api.TokenNotPodBound},
		{"A13 bound to a secret and a pod", kube(func(k map[string]any) { k["secret"] = secret }), 0, api.TokenNotPodBound},
		{"A13 from a secret, of old", func(d *attestortest.Draft) {
			attestortest.Without("kubernetes.io", "aud", "exp", "iat", "nbf", "jti")(d)
			d.Claims["kubernetes.io/serviceaccount/namespace"] = c.pod.Namespace
			d.Claims["kubernetes.io/serviceaccount/secret.name"] = "token-x7x"
			d.Claims["kubernetes.io/serviceaccount/service-account.name"] = c.pod.ServiceAccount
		}, 0, api.TokenNotPodBound},
		{"A14 bound to a node only", without("pod"), 0, api.TokenNotPodBound},
		{"A16 no node", without("node"), 0, api.NodeUnverifiable},
		{"A16 node null", kube(func(k map[string]any) { k["node"] = nil }), 0, api.NodeUnverifiable},
		{"A16 node without name", set("node", "name", ""), 0, api.NodeUnverifiable},
		{"A17 node without UID", set("node", "uid", ""), 0, api.NodeUnverifiable},
		{"node is a string", kube(func(k map[string]any) { k["node"] = c.pod.NodeName }), 0, api.NodeUnverifiable},
		{"pod null", kube(func(k map[string]any) { k["pod"] = nil }), 0, api.SubjectMalformed},
		{"pod is a list", kube(func(k map[string]any) { k["pod"] = []any{"a", "b"} }), 0, api.SubjectMalformed},
		{"pod without UID", set("pod", "uid", nil), 0, api.SubjectMalformed},
		{"no kubernetes.io", attestortest.Without("kubernetes.io"), 0, api.TokenMalformed},
		{"kubernetes.io is a list", attestortest.Claim("kubernetes.io", []any{}), 0, api.TokenMalformed},
	})
}

// A15 and A17 are decided by the CA, which knows the agent's node: here the claim has to be that of the token.
func TestNodeClaim(t *testing.T) {
	c := newCluster(t, "ES256")
	for _, node := range []string{"node-1", "node-2"} {
		c.pod = attestortest.NewPod("shop", "cart", "cart", node)
		got, err := c.attestor.Attest(t.Context(), evidence(c.token(t)), audience, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if got.NodeName != node || got.NodeUID != c.pod.NodeUID {
			t.Errorf("got node %s %s, want %s %s", got.NodeName, got.NodeUID, node, c.pod.NodeUID)
		}
	}
}

// threat: A18
func TestSubject(t *testing.T) {
	c := newCluster(t, "ES256")
	// named sets namespace and name everywhere, so that nothing contradicts anything.
	named := func(namespace, name string) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) {
			d.Kubernetes()["namespace"] = namespace
			set("serviceaccount", "name", name)(d)
			d.Claims["sub"] = "system:serviceaccount:" + namespace + ":" + name
		}
	}
	sub := func(s any) func(*attestortest.Draft) { return attestortest.Claim("sub", s) }
	rows := []row{
		{"dots in a ServiceAccount", named("shop", "cart.v2"), 0, ""},
		{"253 bytes", named("shop", strings.Repeat("a", 253)), 0, ""},
		{"63 bytes of namespace", named(strings.Repeat("a", 63), "cart"), 0, ""},
		{"A18 254 bytes", named("shop", strings.Repeat("a", 254)), 0, api.SubjectMalformed},
		{"A18 64 bytes of namespace", named(strings.Repeat("a", 64), "cart"), 0, api.SubjectMalformed},
		{"A18 a user", sub("alice"), 0, api.SubjectMalformed},
		{"A18 a node", sub("system:node:node-1"), 0, api.SubjectMalformed},
		{"A18 another namespace", sub("system:serviceaccount:kube-system:cart"), 0, api.SubjectMalformed},
		{"A18 another name", sub("system:serviceaccount:shop:admin"), 0, api.SubjectMalformed},
		{"A18 one part more", sub("system:serviceaccount:shop:cart:x"), 0, api.SubjectMalformed},
		{"A18 prefix in upper case", sub("System:serviceaccount:shop:cart"), 0, api.SubjectMalformed},
		{"A18 trailing NUL", sub("system:serviceaccount:shop:cart\x00"), 0, api.SubjectMalformed},
		{"sub missing", attestortest.Without("sub"), 0, api.SubjectMalformed},
		{"sub is a list", sub([]any{"system:serviceaccount:shop:cart"}), 0, api.SubjectMalformed},
		{"no ServiceAccount", kube(func(k map[string]any) { delete(k, "serviceaccount") }), 0, api.SubjectMalformed},
		{"no namespace", kube(func(k map[string]any) { delete(k, "namespace") }), 0, api.SubjectMalformed},
		{"no UID", set("serviceaccount", "uid", ""), 0, api.SubjectMalformed},
		{"jti empty", attestortest.Claim("jti", ""), 0, api.TokenMalformed},
		{"jti null", attestortest.Claim("jti", nil), 0, api.TokenMalformed},
		{"jti with a newline", attestortest.Claim("jti", "a\nb"), 0, api.TokenMalformed},
		{"jti of 65 bytes", attestortest.Claim("jti", strings.Repeat("a", 65)), 0, api.TokenMalformed},
	}
	for _, bad := range []string{"", ".", "..", "a/b", "a:b", "../x", "a..b", "a.", ".a", "-a", "a-", "A", "a_b", "a b", "a%2eb", "a\x00", "ä", "a\n"} {
		rows = append(rows,
			row{fmt.Sprintf("A18 ServiceAccount %q", bad), named("shop", bad), 0, api.SubjectMalformed},
			row{fmt.Sprintf("A18 namespace %q", bad), named(bad, "cart"), 0, api.SubjectMalformed},
			row{fmt.Sprintf("pod %q", bad), set("pod", "name", bad), 0, api.SubjectMalformed})
		if bad != "" {
			rows = append(rows, row{fmt.Sprintf("node %q", bad), set("node", "name", bad), 0, api.SubjectMalformed})
		}
	}
	rows = append(rows, row{"A18 a dot in a namespace", named("a.b", "cart"), 0, api.SubjectMalformed})
	for _, bad := range []string{strings.Repeat("a", 65), "a/b", "a.b", "a b", "a_b", "..", "a\x00", "é"} {
		for _, object := range []string{"pod", "node", "serviceaccount"} {
			rows = append(rows, row{fmt.Sprintf("UID of %s %q", object, bad), set(object, "uid", bad), 0, api.SubjectMalformed})
		}
	}
	c.run(t, c.attestor, rows)
}

// threat: A24
func TestIssuer(t *testing.T) {
	c := newCluster(t, "ES256")
	foreign, err := attestortest.NewIssuer(attestortest.Config{Issuer: "https://cluster-b.example"})
	if err != nil {
		t.Fatal(err)
	}
	iss := func(v any) func(*attestortest.Draft) { return attestortest.Claim("iss", v) }
	c.run(t, c.attestor, []row{
		{"A24 another issuer", iss(foreign.Name()), 0, api.IssuerUnknown},
		{"A24 a slash more", iss(c.Name() + "/"), 0, api.IssuerUnknown},
		{"A24 of old", iss("kubernetes/serviceaccount"), 0, api.IssuerUnknown},
		{"A24 empty", iss(""), 0, api.IssuerUnknown},
		{"A24 missing", attestortest.Without("iss"), 0, api.IssuerUnknown},
		{"A24 list", iss([]any{c.Name()}), 0, api.IssuerUnknown},
	})
	t.Run("looked up before the signature", func(t *testing.T) {
		keys := &countingKeys{}
		a, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{c.Name(): keys}})
		if err != nil {
			t.Fatal(err)
		}
		token, err := foreign.Token(c.pod, audience, ttl)
		if err != nil {
			t.Fatal(err)
		}
		got, err := a.Attest(t.Context(), evidence(token), audience, time.Now())
		refused(t, token, got, err, api.IssuerUnknown)
		if keys.n != 0 {
			t.Errorf("%d keys looked up for a foreign token", keys.n)
		}
	})
	t.Run("two clusters", func(t *testing.T) {
		cfg := attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{}}
		for _, i := range []*attestortest.Issuer{c.Issuer, foreign} {
			keys, err := attestor.StaticKeys(i.JWKS())
			if err != nil {
				t.Fatal(err)
			}
			cfg.Issuers[i.Name()] = keys
		}
		a, err := attestor.NewServiceAccount(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range []*attestortest.Issuer{c.Issuer, foreign} {
			token, err := i.Token(c.pod, audience, ttl)
			if err != nil {
				t.Fatal(err)
			}
			got, err := a.Attest(t.Context(), evidence(token), audience, time.Now())
			if err != nil || got.Issuer != i.Name() {
				t.Errorf("got issuer %q, %v; want %q", got.Issuer, err, i.Name())
			}
		}
		// One cluster's key says nothing about the other's pods.
		token := c.token(t, iss(foreign.Name()))
		got, err := a.Attest(t.Context(), evidence(token), audience, time.Now())
		refused(t, token, got, err, api.TokenSignature)
	})
}

type countingKeys struct {
	attestor.Keys
	n int
}

func (k *countingKeys) Lookup(context.Context, string, string) (crypto.PublicKey, error) {
	k.n++
	return nil, api.E(api.TokenSignature, "none")
}

func TestNewServiceAccount(t *testing.T) {
	keys, err := attestor.StaticKeys(newCluster(t, "ES256").JWKS())
	if err != nil {
		t.Fatal(err)
	}
	good := map[string]attestor.Keys{"https://a.example": keys}
	for _, r := range []struct {
		name string
		cfg  attestor.ServiceAccountConfig
	}{
		{"no issuer", attestor.ServiceAccountConfig{}},
		{"an issuer without name", attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{"": keys}}},
		{"an issuer without keys", attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{"a": nil}}},
		{"skew of 6 s", attestor.ServiceAccountConfig{Issuers: good, Skew: 6 * time.Second}},
		{"negative lifetime", attestor.ServiceAccountConfig{Issuers: good, MaxLifetime: -1}},
	} {
		t.Run(r.name, func(t *testing.T) {
			if _, err := attestor.NewServiceAccount(r.cfg); api.ReasonOf(err) != api.ConfigInvalid {
				t.Errorf("got %v, want %s", err, api.ConfigInvalid)
			}
		})
	}
}
