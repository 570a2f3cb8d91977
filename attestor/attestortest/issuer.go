// Package attestortest stands in for the token issuer of a Kubernetes cluster: it signs ServiceAccount tokens of the shape
// that Kubernetes 1.37 writes, with real keys, and publishes its key set as the API server does.
//
// It is not for production. Whoever holds an Issuer is every pod of its cluster: nothing asks who may have which token,
// and its keys live in the memory of the process that made them. Tests use it, and so does `signet demo`, which has no
// cluster. It needs no socket (see Issuer.Transport) and reads the time from time.Now, so it works in a testing/synctest
// bubble.
package attestortest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// DefaultIssuer is the issuer of a cluster that was set up without naming one.
const DefaultIssuer = "https://kubernetes.default.svc.cluster.local"

// Where an API server publishes its key set, relative to the issuer.
const (
	KeysPath      = "/openid/v1/jwks"
	DiscoveryPath = "/.well-known/openid-configuration"
)

// Config says what an Issuer is. The zero Config is an issuer like that of a new cluster, but for ES256.
type Config struct {
	Issuer    string // "iss" of its tokens; empty: DefaultIssuer
	Algorithm string // of its keys (RFC 7518 section 3.1: RS256 to PS512, ES256 to ES512, EdDSA); empty: ES256
}

// Issuer signs tokens. It is safe for concurrent use.
type Issuer struct {
	name      string
	algorithm string

	mu   sync.Mutex
	keys []*signingKey // oldest first; the last one signs; never empty
}

// NewIssuer makes an issuer with one new key.
func NewIssuer(cfg Config) (*Issuer, error) {
	i := &Issuer{name: cfg.Issuer, algorithm: cfg.Algorithm}
	if i.name == "" {
		i.name = DefaultIssuer
	}
	if i.algorithm == "" {
		i.algorithm = "ES256"
	}
	if err := i.Rotate(); err != nil {
		return nil, err
	}
	return i, nil
}

// Name is the "iss" of the issuer's tokens.
func (i *Issuer) Name() string { return i.name }

// KeysURL is where a verifier would find the key set: the issuer's name and KeysPath.
func (i *Issuer) KeysURL() string { return strings.TrimSuffix(i.name, "/") + KeysPath }

// KeyID is the "kid" of the key that signs now.
func (i *Issuer) KeyID() string { return i.current().kid }

// Rotate adds a key and signs with it from now on. The older keys stay in the key set, so tokens made before still verify.
func (i *Issuer) Rotate() error {
	k, err := newSigningKey(i.algorithm)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = append(i.keys, k)
	return nil
}

// Forget takes every key but the newest out of the key set: the end of a rotation.
func (i *Issuer) Forget() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = i.keys[len(i.keys)-1:]
}

// JWKS is the key set (RFC 7517 section 5) as the API server publishes it: each entry has use, kty, kid and alg.
func (i *Issuer) JWKS() []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	set := struct {
		Keys []map[string]string `json:"keys"`
	}{}
	for _, k := range i.keys {
		set.Keys = append(set.Keys, k.jwk)
	}
	return mustJSON(set)
}

// WriteJWKS writes the key set to path, atomically.
func (i *Issuer) WriteJWKS(path string) error { return writeFile(path, i.JWKS()) }

// Handler serves the key set and the discovery document, as the API server does.
func (i *Issuer) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+KeysPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Header().Set("Cache-Control", "public, max-age=3600")
		w.Write(i.JWKS())
	})
	mux.HandleFunc("GET "+DiscoveryPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(mustJSON(map[string]any{
			"issuer":                                i.name,
			"jwks_uri":                              i.KeysURL(),
			"response_types_supported":              []string{"id_token"},
			"subject_types_supported":               []string{"public"},
			"id_token_signing_alg_values_supported": []string{i.algorithm},
		}))
	})
	return mux
}

// Transport answers requests to any host from Handler, in the caller's goroutine and without a socket.
func (i *Issuer) Transport() http.RoundTripper { return HandlerTransport(i.Handler()) }

// HandlerTransport answers requests to any host from h, in the caller's goroutine and without a socket. A handler that
// blocks must watch the request's context itself.
func HandlerTransport(h http.Handler) http.RoundTripper { return handlerTransport{h} }

type handlerTransport struct{ h http.Handler }

func (t handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	w := &recorder{header: http.Header{}}
	t.h.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	w.WriteHeader(http.StatusOK)
	return &http.Response{
		Status: fmt.Sprintf("%d %s", w.code, http.StatusText(w.code)), StatusCode: w.code,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: w.header, Body: &body{&w.body}, ContentLength: int64(w.body.Len()), Request: r,
	}, nil
}

// recorder is what httptest.ResponseRecorder is, without the flag that httptest registers in every binary that links it.
type recorder struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (w *recorder) Header() http.Header { return w.header }

func (w *recorder) WriteHeader(code int) {
	if w.code == 0 {
		w.code = code
	}
}

func (w *recorder) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(p)
}

type body struct{ *bytes.Buffer }

func (*body) Close() error { return nil }

func (i *Issuer) current() *signingKey {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.keys[len(i.keys)-1]
}

// mustJSON encodes values of this package's own making, which always encode.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
