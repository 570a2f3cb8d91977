package attestor

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
)

// Defaults and limits of ServiceAccountConfig.
const (
	MaxSkew            = 5 * time.Second
	DefaultMaxLifetime = 24 * time.Hour
)

// ServiceAccountConfig says whose tokens a ServiceAccount believes, and which.
type ServiceAccountConfig struct {
	// Issuers are the key sets of the clusters, by the "iss" of their tokens. At least one.
	Issuers map[string]Keys

	// Reviews are the issuers whose tokens are also shown to their cluster's API server, by the same names. An issuer that
	// is not in it is believed by its key set alone.
	Reviews map[string]ReviewConfig

	// Skew is how far in the future a token's "iat" and "nbf" may be, for clocks that differ. Zero is MaxSkew, which is
	// also the most; a negative one means none. Expiry has no leeway: kubelet replaces a token long before.
	Skew time.Duration

	// MaxLifetime is the longest that a token may live from "iat" to "exp". Zero is DefaultMaxLifetime. It keeps out
	// the tokens that API servers extend to a year.
	MaxLifetime time.Duration
}

// ServiceAccount checks projected ServiceAccount tokens of Kubernetes (api.EvidenceServiceAccount) against the key sets
// of their issuers. That proves that the API server made the token for a pod on a node; it cannot tell whether that pod
// still lives. For issuers with a review the API server is asked as well, about tokens that passed everything else: what
// is forged, expired or for somebody else never reaches it.
type ServiceAccount struct {
	issuers     map[string]Keys
	reviews     map[string]*review
	skew        time.Duration
	maxLifetime time.Duration
}

var _ Attestor = (*ServiceAccount)(nil)

// NewServiceAccount makes an attestor. It fails with api.ConfigInvalid.
func NewServiceAccount(cfg ServiceAccountConfig) (*ServiceAccount, error) {
	a := &ServiceAccount{issuers: maps.Clone(cfg.Issuers), reviews: map[string]*review{}, skew: cfg.Skew, maxLifetime: cfg.MaxLifetime}
	switch {
	case len(a.issuers) == 0:
		return nil, api.E(api.ConfigInvalid, "there is no token issuer")
	case a.skew > MaxSkew:
		return nil, api.E(api.ConfigInvalid, "skew is %v; the most is %v", a.skew, MaxSkew)
	case a.maxLifetime < 0:
		return nil, api.E(api.ConfigInvalid, "the longest lifetime of a token is negative")
	case a.skew == 0:
		a.skew = MaxSkew
	}
	for iss, keys := range a.issuers {
		if iss == "" || keys == nil {
			return nil, api.E(api.ConfigInvalid, "a token issuer lacks its name or its keys")
		}
	}
	for iss, c := range cfg.Reviews {
		if a.issuers[iss] == nil {
			return nil, api.E(api.ConfigInvalid, "a token review is for an issuer without keys")
		}
		r, err := newReview(c)
		if err != nil {
			return nil, err
		}
		a.reviews[iss] = r
	}
	a.skew = max(a.skew, 0)
	if a.maxLifetime == 0 {
		a.maxLifetime = DefaultMaxLifetime
	}
	return a, nil
}

// Attest checks a token. In this order, it (1) bounds it and takes it apart, (2) looks up its issuer, before anything is
// spent on its signature, (3) verifies the signature, (4) reads its Kubernetes claims, (5) checks that audience is its
// only audience, (6) checks its times, and, where its issuer has a review and the caller may use such claims (WithRefusal), (7)
// asks the API server, which may take as long as the review's timeout. Claims are always those of the token itself; the review can only refuse them. What fails from
// (5) on is refused with an error that ClaimedBy knows, and so is what is bound where nothing may be.
func (a *ServiceAccount) Attest(ctx context.Context, e Evidence, audience string, now time.Time) (Claims, error) {
	return a.reviewed(ctx, e, audience, now, kinds{claims: kubernetesClaims, maxLifetime: a.maxLifetime, skew: a.skew})
}

// kinds says which tokens are meant: how their Kubernetes claims are read, and how long they may live.
type kinds struct {
	claims      func(map[string]any) (Claims, error)
	maxLifetime time.Duration
	skew        time.Duration // before iat and nbf
	grace       time.Duration // after expiry
}

// reviewed does all steps of Attest.
func (a *ServiceAccount) reviewed(ctx context.Context, e Evidence, audience string, now time.Time, which kinds) (Claims, error) {
	start := time.Now()
	c, err := a.attest(ctx, e, audience, now, which)
	if err != nil {
		return Claims{}, err
	}
	r, ok := a.reviews[c.Issuer]
	if !ok {
		return c, nil
	}
	if err := refusal(ctx, c); err != nil {
		return Claims{}, refusedOf(c, err)
	}
	if err := r.check(ctx, e.Data, c, audience); err != nil { // (7)
		return Claims{}, refusedOf(c, err)
	}
	// The API server accepts a token for a minute after its expiry; we do not, however long it took to answer.
	if !now.Add(time.Since(start)).Before(c.ExpireAt) {
		return Claims{}, refusedOf(c, api.E(api.TokenExpired, "the token expired while it was reviewed"))
	}
	return c, nil
}

// AttestExpired is Attest for a token that may have expired up to grace ago: everything else must still hold, and nobody
// is asked. It is for renewals while no API server can give out new tokens or review old ones; an identity that is not
// held already must not rest on it.
func (a *ServiceAccount) AttestExpired(ctx context.Context, e Evidence, audience string, now time.Time, grace time.Duration) (Claims, error) {
	return a.attest(ctx, e, audience, now, kinds{claims: kubernetesClaims, maxLifetime: a.maxLifetime, skew: a.skew, grace: max(grace, 0)})
}

func (a *ServiceAccount) attest(ctx context.Context, e Evidence, audience string, now time.Time, which kinds) (Claims, error) {
	jws, m, err := takeApart(e) // (1)
	if err != nil {
		return Claims{}, err
	}
	iss, _ := m["iss"].(string)
	keys, ok := a.issuers[iss] // (2)
	if !ok {
		return Claims{}, api.E(api.IssuerUnknown, "the token's issuer is not one of ours")
	}
	if err := jws.verify(ctx, keys); err != nil { // (3)
		return Claims{}, err
	}
	c, wrong := which.claims(m) // (4)
	if wrong != nil && c.Namespace == "" {
		return Claims{}, wrong
	}
	c.Kind, c.Issuer = e.Kind, iss
	id, bad := tokenID(m, jws)
	if wrong != nil { // it is said whose it is only while it could do harm elsewhere: old ones lie about
		which.maxLifetime = a.maxLifetime
		if bad != nil || checkAudience(m["aud"], audience) != nil || a.checkTimes(&c, m, now, which) != nil {
			return Claims{}, wrong
		}
		c.TokenID = id
		return Claims{}, refusedOf(c, wrong)
	}
	c.TokenID = id                                            // on record also of what is refused from here on
	if err := checkAudience(m["aud"], audience); err != nil { // (5)
		return Claims{}, refusedOf(c, err)
	}
	if err := a.checkTimes(&c, m, now, which); err != nil { // (6)
		return Claims{}, refusedOf(c, err)
	}
	if bad != nil {
		return Claims{}, refusedOf(c, bad)
	}
	return c, nil
}

// takeApart bounds a token and reads its payload. Nothing in it is verified.
func takeApart(e Evidence) (*compact, map[string]any, error) {
	if e.Kind != api.EvidenceServiceAccount {
		return nil, nil, api.E(api.EvidenceKind, "the evidence is not a ServiceAccount token")
	}
	jws, err := parseCompact(e.Data)
	if err != nil {
		return nil, nil, err
	}
	m, err := parseObject(jws.payload, maxTokenValues)
	if err != nil {
		return nil, nil, api.E(api.TokenMalformed, "the token's payload is %s", err)
	}
	return jws, m, nil
}

// checkAudience wants exactly one audience (RFC 7519 section 4.1.3: a string or a list): each further one could replay
// the token here, and we there.
func checkAudience(aud any, want string) error {
	var list []string
	switch aud := aud.(type) {
	case nil:
	case string:
		list = []string{aud}
	case []any:
		for _, v := range aud {
			s, ok := v.(string)
			if !ok {
				return api.E(api.TokenMalformed, "the token's aud is not a list of strings")
			}
			list = append(list, s)
		}
	default:
		return api.E(api.TokenMalformed, "the token's aud is not a list of strings")
	}
	switch {
	case want == "" || !slices.Contains(list, want):
		return api.E(api.TokenAudience, "the token is for another audience, not %q", want)
	case len(list) != 1:
		return api.E(api.TokenAudienceNotExclusive, "the token has audiences besides %q", want)
	}
	return nil
}

// checkTimes wants exp and iat, and nbf to hold where it is there, and fills the times of c.
func (a *ServiceAccount) checkTimes(c *Claims, m map[string]any, now time.Time, which kinds) error {
	exp, okExp := numericDate(m["exp"])
	iat, okIat := numericDate(m["iat"])
	nbf, okNbf := iat, true
	if v, ok := m["nbf"]; ok {
		nbf, okNbf = numericDate(v)
	}
	switch {
	case !okExp || !okIat || !okNbf:
		return api.E(api.TokenMalformed, "the token's exp, iat or nbf is missing or not a whole number of seconds")
	case !exp.After(iat):
		return api.E(api.TokenMalformed, "the token expires before it was issued")
	case !now.Before(exp.Add(which.grace)):
		return api.E(api.TokenExpired, "the token expired %v ago", now.Sub(exp).Truncate(time.Second))
	case iat.After(now.Add(which.skew)) || nbf.After(now.Add(which.skew)):
		return api.E(api.TokenNotYetValid, "the token is valid from %s, and the clock here says %s", latest(iat, nbf).UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case exp.Sub(iat) > which.maxLifetime:
		return api.E(api.TokenTTLTooLong, "the token lives %v; the most is %v", exp.Sub(iat), which.maxLifetime)
	}
	c.IssuedAt, c.ExpireAt = iat, exp
	return nil
}

// latest is the later of two times.
func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// numericDate reads a NumericDate (RFC 7519 section 2) as Kubernetes writes it: whole seconds, before the year 10000.
func numericDate(v any) (time.Time, bool) {
	n, ok := v.(json.Number)
	if !ok {
		return time.Time{}, false
	}
	sec, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil || sec < 0 || sec > 253402300799 {
		return time.Time{}, false
	}
	return time.Unix(sec, 0).UTC(), true
}

// tokenID is the issuer's "jti", or a hash of the token where there is none (in clusters before Kubernetes 1.30).
func tokenID(m map[string]any, jws *compact) (string, error) {
	v, ok := m["jti"]
	if !ok {
		return jws.hash(), nil
	}
	id, ok := v.(string)
	if !ok || !api.IsUID(id) {
		return "", api.E(api.TokenMalformed, "the token's jti is malformed")
	}
	return id, nil
}

// kubernetesClaims reads what the API server wrote about pod, node and ServiceAccount
// (k8s.io/kubernetes/pkg/serviceaccount/claims.go documents the claims).
func kubernetesClaims(m map[string]any) (Claims, error) {
	k, err := ownClaims(m)
	if err != nil {
		return Claims{}, err
	}
	c, err := subject(m, k)
	if err != nil {
		return Claims{}, err
	}
	var ok bool
	_, secret := k["secret"]
	if _, pod := k["pod"]; !pod || secret {
		return Claims{}, api.E(api.TokenNotPodBound, "the token is not bound to a pod")
	}
	if c.PodName, c.PodUID, ok = reference(k["pod"]); !ok || !api.IsSubdomain(c.PodName) || !api.IsUID(c.PodUID) {
		return Claims{}, api.E(api.SubjectMalformed, "the token's pod is malformed")
	}
	if c.NodeName, c.NodeUID, ok = reference(k["node"]); !ok || c.NodeName == "" || c.NodeUID == "" {
		return Claims{}, api.E(api.NodeUnverifiable, "the token does not name its pod's node and the node's UID")
	}
	if !api.IsSubdomain(c.NodeName) || !api.IsUID(c.NodeUID) {
		return Claims{}, api.E(api.SubjectMalformed, "the token's node is malformed")
	}
	return c, nil
}

// ownClaims returns the claims of Kubernetes.
func ownClaims(m map[string]any) (map[string]any, error) {
	k, ok := m["kubernetes.io"].(map[string]any)
	if ok {
		return k, nil
	}
	for name := range m {
		if strings.HasPrefix(name, "kubernetes.io/serviceaccount/") { // from a Secret, of old
			return nil, api.E(api.TokenNotPodBound, "the token comes from a Secret")
		}
	}
	return nil, api.E(api.TokenMalformed, "the token has no kubernetes.io claims")
}

// subject reads namespace and ServiceAccount, which the token tells twice: in "sub" and in its Kubernetes claims.
func subject(m, k map[string]any) (Claims, error) {
	var c Claims
	var ok bool
	c.Namespace, _ = k["namespace"].(string)
	if c.ServiceAccount, c.ServiceAccountUID, ok = reference(k["serviceaccount"]); !ok {
		return Claims{}, api.E(api.SubjectMalformed, "the token does not name its ServiceAccount")
	}
	if !api.IsLabel(c.Namespace) || !api.IsSubdomain(c.ServiceAccount) || !api.IsUID(c.ServiceAccountUID) {
		return Claims{}, api.E(api.SubjectMalformed, "the token's namespace or ServiceAccount is malformed")
	}
	if sub, _ := m["sub"].(string); sub != "system:serviceaccount:"+c.Namespace+":"+c.ServiceAccount {
		return Claims{}, api.E(api.SubjectMalformed, "the token's sub is not the ServiceAccount of its claims")
	}
	return c, nil
}

// reference reads {"name": ..., "uid": ...}; a member that is missing or no string is empty.
func reference(v any) (name, uid string, ok bool) {
	m, ok := v.(map[string]any)
	name, _ = m["name"].(string)
	uid, _ = m["uid"].(string)
	return name, uid, ok
}
