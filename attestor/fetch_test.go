package attestor_test

import (
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
)

// tlsIssuer serves a cluster's key set over TLS on a real socket.
type tlsIssuer struct {
	cluster
	counted
	url    string
	caFile string
}

func newTLSIssuer(t *testing.T) *tlsIssuer {
	t.Helper()
	i := &tlsIssuer{cluster: newCluster(t, "ES256"), caFile: filepath.Join(t.TempDir(), "ca.pem")}
	i.counted.set(i.Handler().ServeHTTP)
	srv := httptest.NewUnstartedServer(&i.counted)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // refused handshakes are expected
	srv.StartTLS()
	t.Cleanup(srv.Close)
	i.url = srv.URL + "/openid/v1/jwks"
	writeCA(t, i.caFile, srv)
	return i
}

func writeCA(t *testing.T, path string, srv *httptest.Server) {
	t.Helper()
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(path, block, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (i *tlsIssuer) config() attestor.KeySourceConfig {
	return attestor.KeySourceConfig{Issuer: i.Name(), URL: i.url, CAFile: i.caFile, Refresh: time.Hour, MissWait: 20 * time.Second}
}

func TestFetchOverTLS(t *testing.T) {
	i := newTLSIssuer(t)
	s, stop := start(t, i.config())
	i.attestor = attestorBy(t, i.Name(), s)
	accepted(t, i.cluster, i.token(t))
	if err := i.Rotate(); err != nil {
		t.Fatal(err)
	}
	accepted(t, i.cluster, i.token(t)) // by an unknown kid, an hour before the next refresh
	if n := i.n.Load(); n != 2 {
		t.Errorf("%d reads, want 2", n)
	}
	stop()
	accepted(t, i.cluster, i.token(t))
}

// Whatever the server answers, it neither takes keys away nor gives any; and the read is over within its time.
//
// threat: L20
func TestFetchBadAnswers(t *testing.T) {
	elsewhere := newTLSIssuer(t)
	plain := httptest.NewServer(elsewhere.Handler())
	t.Cleanup(plain.Close)
	redirect := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusTemporaryRedirect) }
	}
	answer := func(code int, contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(code)
			w.Write([]byte(body))
		}
	}
	const jwkSet = "application/jwk-set+json"
	foreign := string(elsewhere.JWKS())
	for _, r := range []struct {
		name string
		h    http.HandlerFunc
	}{
		{"503 with a key set", answer(503, jwkSet, foreign)},
		{"404", answer(404, jwkSet, foreign)},
		{"206", answer(206, jwkSet, foreign)},
		{"201", answer(201, jwkSet, foreign)},
		{"304", answer(304, jwkSet, "")},
		{"empty set", answer(200, jwkSet, `{"keys":[]}`)},
		{"no set", answer(200, jwkSet, `{}`)},
		{"empty body", answer(200, jwkSet, "")},
		{"HTML", answer(200, "text/html", foreign)},
		{"text", answer(200, "text/plain", foreign)},
		{"no content type", answer(200, "", foreign)},
		{"HTML said to be JSON", answer(200, "application/json", "<html>")},
		{"cut off", answer(200, jwkSet, foreign[:len(foreign)/2])},
		{"I09 5 MiB", answer(200, jwkSet, foreign+strings.Repeat(" ", 5<<20))},
		{"without end", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", jwkSet)
			for chunk := []byte(strings.Repeat(" ", 64<<10)); r.Context().Err() == nil; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}},
		{"huge header", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Pad", strings.Repeat("a", 1<<20))
			elsewhere.Handler().ServeHTTP(w, r)
		}},
		{"to another host", redirect(elsewhere.url)},
		{"to http", redirect(plain.URL + "/openid/v1/jwks")},
		{"to http on the same host", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+r.Host+"/openid/v1/jwks", http.StatusFound)
		}},
		{"to a file", redirect("file:///etc/passwd")},
		{"in circles", redirect("/openid/v1/jwks")},
		{"slow to answer", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		{"slow in the middle", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", jwkSet)
			w.Write([]byte(foreign[:20]))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}},
		{"closed", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			i := newTLSIssuer(t)
			cfg := i.config()
			cfg.Timeout = time.Second

			s, _ := start(t, cfg)
			fresh(t, s)
			i.attestor = attestorBy(t, i.Name(), s)
			i.counted.set(r.h)
			if _, err := s.Lookup(t.Context(), elsewhere.KeyID(), "ES256"); api.ReasonOf(err) != api.TokenSignature {
				t.Errorf("a key came from it: %v", err)
			}
			if st := s.Status(); st.Err == nil || st.Keys != 1 {
				t.Errorf("taken for a good read: %+v", st)
			}
			accepted(t, i.cluster, i.token(t))

			s, _ = start(t, cfg)
			if _, err := s.Lookup(t.Context(), i.KeyID(), "ES256"); api.ReasonOf(err) != api.KeysUnavailable {
				t.Errorf("at first: got %v, want %s", err, api.KeysUnavailable)
			}
		})
	}
	t.Cleanup(func() {
		if n := elsewhere.n.Load(); n != 0 {
			t.Errorf("%d requests went elsewhere", n)
		}
	})
}

// threat: L20
func TestFetchRedirectWithinTheOrigin(t *testing.T) {
	i := newTLSIssuer(t)
	i.counted.set(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/openid/v1/jwks" {
			http.Redirect(w, r, "/moved", http.StatusFound)
			return
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Write(i.JWKS())
	})
	s, _ := start(t, i.config())
	i.attestor = attestorBy(t, i.Name(), s)
	accepted(t, i.cluster, i.token(t))
}

func TestFetchTrustsItsCAOnly(t *testing.T) {
	i := newTLSIssuer(t)
	good, err := os.ReadFile(i.caFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		name   string
		change func(t *testing.T, cfg *attestor.KeySourceConfig)
	}{
		{"the system's roots", func(_ *testing.T, cfg *attestor.KeySourceConfig) { cfg.CAFile = "" }},
		{"a file that is not there", func(_ *testing.T, cfg *attestor.KeySourceConfig) { cfg.CAFile += ".none" }},
		{"a file without certificates", func(t *testing.T, cfg *attestor.KeySourceConfig) {
			cfg.CAFile = filepath.Join(t.TempDir(), "ca.pem")
			if err := os.WriteFile(cfg.CAFile, []byte("none"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"another host's name", func(_ *testing.T, cfg *attestor.KeySourceConfig) {
			cfg.URL = strings.Replace(cfg.URL, "127.0.0.1", "localhost", 1)
		}},
	} {
		t.Run(r.name, func(t *testing.T) {
			cfg := i.config()
			r.change(t, &cfg)
			s, _ := start(t, cfg)
			if _, err := s.Lookup(t.Context(), i.KeyID(), "ES256"); api.ReasonOf(err) != api.KeysUnavailable {
				t.Errorf("got %v, want %s", err, api.KeysUnavailable)
			}
		})
	}
	t.Run("replaced", func(t *testing.T) {
		cfg := i.config()
		cfg.Refresh = 10 * time.Millisecond
		cfg.CAFile = filepath.Join(t.TempDir(), "ca.pem")
		s, _ := start(t, cfg)
		if _, err := s.Lookup(t.Context(), i.KeyID(), "ES256"); api.ReasonOf(err) != api.KeysUnavailable {
			t.Errorf("got %v, want %s", err, api.KeysUnavailable)
		}
		if err := os.WriteFile(cfg.CAFile, good, 0o600); err != nil {
			t.Fatal(err)
		}
		fresh(t, s)
	})
}

func TestFetchSendsItsToken(t *testing.T) {
	i := newTLSIssuer(t)
	cfg := i.config()
	cfg.TokenFile = filepath.Join(t.TempDir(), "token")
	i.counted.set(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer abc.def.ghi" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		i.Handler().ServeHTTP(w, r)
	})
	s, stop := start(t, cfg)
	if _, err := s.Lookup(t.Context(), i.KeyID(), "ES256"); api.ReasonOf(err) != api.KeysUnavailable || i.n.Load() != 0 {
		t.Errorf("without a token: %v, %d requests", err, i.n.Load())
	}
	stop()
	if err := os.WriteFile(cfg.TokenFile, []byte("abc.def.ghi\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = start(t, cfg)
	if _, err := s.Lookup(t.Context(), i.KeyID(), "ES256"); err != nil {
		t.Error(err)
	}
}

func TestFetchOverLoopback(t *testing.T) {
	c := newCluster(t, "RS256")
	srv := httptest.NewServer(c.Handler())
	t.Cleanup(srv.Close)
	s, _ := start(t, attestor.KeySourceConfig{Issuer: c.Name(), URL: srv.URL + "/openid/v1/jwks", AllowHTTP: true, MissWait: 20 * time.Second})
	c.attestor = attestorBy(t, c.Name(), s)
	accepted(t, c, c.token(t))
}
