package attestortest_test

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/canary"
)

const audience = "signet:example.org"

var pod = attestortest.Pod{
	Namespace: "shop", Name: "cart-0", UID: "pod-uid", ServiceAccount: "cart", ServiceAccountUID: "sa-uid",
	NodeName: "node-1", NodeUID: "node-uid",
}

func newIssuer(t *testing.T, cfg attestortest.Config) *attestortest.Issuer {
	t.Helper()
	i, err := attestortest.NewIssuer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// verified reads a token by another library, with the issuer's published key set.
func verified(t *testing.T, i *attestortest.Issuer, token string) (jose.Header, map[string]any, error) {
	t.Helper()
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(i.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	algs := []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
	}
	tok, err := jwt.ParseSigned(token, algs)
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	err = tok.Claims(set, &claims)
	return tok.Headers[0], claims, err
}

func TestTokenHasTheShapeOfKubernetes(t *testing.T) {
	for _, alg := range []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"} {
		t.Run(alg, func(t *testing.T) {
			i := newIssuer(t, attestortest.Config{Issuer: "https://a.example", Algorithm: alg})
			before := time.Now().Unix()
			token, err := i.Token(pod, audience, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			header, got, err := verified(t, i, token)
			if err != nil {
				t.Fatal(err)
			}
			if header.Algorithm != alg || header.KeyID != i.KeyID() || len(header.ExtraHeaders) != 0 {
				t.Errorf("header %+v", header)
			}
			iat, _ := got["iat"].(float64)
			if int64(iat) < before || int64(iat) > time.Now().Unix() {
				t.Errorf("iat %v", got["iat"])
			}
			if jti, _ := got["jti"].(string); len(jti) != 36 {
				t.Errorf("jti %v", got["jti"])
			}
			want := map[string]any{
				"aud": []any{audience}, "exp": iat + 3600, "iat": iat, "nbf": iat, "iss": "https://a.example", "jti": got["jti"],
				"kubernetes.io": map[string]any{
					"namespace":      "shop",
					"node":           map[string]any{"name": "node-1", "uid": "node-uid"},
					"pod":            map[string]any{"name": "cart-0", "uid": "pod-uid"},
					"serviceaccount": map[string]any{"name": "cart", "uid": "sa-uid"},
				},
				"sub":    "system:serviceaccount:shop:cart",
				"canary": canary.Marker,
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := attestortest.NewIssuer(attestortest.Config{Algorithm: "HS256"}); err == nil {
		t.Error("HS256 was accepted")
	}
}

func TestChanges(t *testing.T) {
	i := newIssuer(t, attestortest.Config{})
	token, err := i.Token(pod, audience, time.Hour, attestortest.Audiences("a", "b"), attestortest.Claim("x", "y"),
		attestortest.Without("nbf", "jti"), attestortest.Header("typ", "JWT"),
		func(d *attestortest.Draft) { delete(d.Kubernetes(), "pod") })
	if err != nil {
		t.Fatal(err)
	}
	header, got, err := verified(t, i, token)
	if err != nil {
		t.Fatal(err)
	}
	k, _ := got["kubernetes.io"].(map[string]any)
	if diff := cmp.Diff([]any{"a", "b"}, got["aud"]); diff != "" || got["x"] != "y" || got["nbf"] != nil || got["jti"] != nil || k["pod"] != nil {
		t.Errorf("claims %v", got)
	}
	if header.ExtraHeaders["typ"] != "JWT" {
		t.Errorf("header %+v", header)
	}
	again, err := i.Token(pod, audience, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err = verified(t, i, again); err != nil || got["x"] != nil {
		t.Errorf("a change outlived its token: %v, %v", got, err)
	}
}

func TestRotate(t *testing.T) {
	i := newIssuer(t, attestortest.Config{})
	token := func() string {
		s, err := i.Token(pod, audience, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	old, oldID := token(), i.KeyID()
	if err := i.Rotate(); err != nil {
		t.Fatal(err)
	}
	header, _, err := verified(t, i, token())
	if err != nil || header.KeyID == oldID {
		t.Errorf("signs with %q, %v", header.KeyID, err)
	}
	if _, _, err := verified(t, i, old); err != nil {
		t.Errorf("the old token no longer verifies: %v", err)
	}
	i.Forget()
	if _, _, err := verified(t, i, old); err == nil {
		t.Error("the old key is still published")
	}
	if _, _, err := verified(t, i, token()); err != nil {
		t.Error(err)
	}
}

func TestServedWithoutASocket(t *testing.T) {
	bubble(t, func(t *testing.T) {
		i := newIssuer(t, attestortest.Config{})
		client := http.Client{Transport: i.Transport()}
		get := func(url string) (int, string, []byte) {
			t.Helper()
			resp, err := client.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, resp.Header.Get("Content-Type"), b
		}
		code, kind, body := get(i.KeysURL())
		if code != 200 || kind != "application/jwk-set+json" || string(body) != string(i.JWKS()) {
			t.Errorf("keys: %d %s %s", code, kind, body)
		}
		code, kind, body = get(attestortest.DefaultIssuer + attestortest.DiscoveryPath)
		var doc struct {
			Issuer string
			URI    string `json:"jwks_uri"`
		}
		if err := json.Unmarshal(body, &doc); err != nil {
			t.Fatal(err)
		}
		if code != 200 || kind != "application/json" || doc.Issuer != i.Name() || doc.URI != i.KeysURL() {
			t.Errorf("discovery: %d %s %s", code, kind, body)
		}
		if code, _, _ := get(i.Name() + "/etc/passwd"); code != 404 {
			t.Errorf("got %d, want 404", code)
		}
		// The bubble's clock is the token's.
		time.Sleep(24 * time.Hour)
		token, err := i.Token(pod, audience, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		_, claims, err := verified(t, i, token)
		if err != nil || claims["iat"] != float64(time.Now().Unix()) {
			t.Errorf("claims %v, %v", claims, err)
		}
	})
}

func TestWriteToken(t *testing.T) {
	i := newIssuer(t, attestortest.Config{})
	dir := t.TempDir()
	path := filepath.Join(dir, "token")
	write := func() {
		if err := i.WriteToken(path, pod, audience, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	write()
	// A reader sees whole tokens only, while it is being replaced.
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			b, err := os.ReadFile(path)
			if err != nil || strings.Count(string(b), ".") != 2 || strings.ContainsAny(string(b), "\n ") {
				t.Errorf("read %q, %v", b, err)
				return
			}
		}
	})
	for range 100 {
		write()
	}
	close(stop)
	wg.Wait()
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := i.WriteJWKS(filepath.Join(dir, "jwks.json")); err != nil {
		t.Fatal(err)
	}
	if err := i.WriteToken(filepath.Join(dir, "none", "token"), pod, audience, time.Hour); err == nil {
		t.Error("a folder that is not there was written to")
	}
	if err := i.WriteToken(path, pod, audience, time.Hour, attestortest.Claim("x", func() {})); err == nil {
		t.Error("a claim that cannot be written was written")
	}
	var names []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, []string{"jwks.json", "token"}) {
		t.Errorf("left behind: %v", names)
	}
}

func TestNewPod(t *testing.T) {
	a := attestortest.NewPod("shop", "cart-0", "cart", "node-1")
	b := attestortest.NewPod("shop", "cart-0", "cart", "node-1")
	if a.UID == b.UID || a.NodeUID != b.NodeUID || a.ServiceAccountUID != b.ServiceAccountUID {
		t.Errorf("a pod that was made again: %+v, %+v", a, b)
	}
	if c := attestortest.NewPod("bank", "cart-0", "cart", "node-2"); c.NodeUID == a.NodeUID || c.ServiceAccountUID == a.ServiceAccountUID {
		t.Errorf("others have the same UIDs: %+v, %+v", a, c)
	}
}
