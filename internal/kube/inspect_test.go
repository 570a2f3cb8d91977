package kube_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/kube"
)

// operator is a client of s as a person has it.
func (s *server) operator(t testing.TB, changes ...[2]string) *kube.Operator {
	t.Helper()
	o, err := kube.OpenOperator(kube.OperatorConfig{Kubeconfig: s.kubeconfig(t, changes...), UserAgent: "signet/test", Timeout: 30 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

// reply answers with JSON.
func reply(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

type named struct {
	Metadata struct{ Name string }
}

func TestOperatorRead(t *testing.T) {
	s := newServer(t, true)
	o := s.operator(t)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		for k, want := range map[string]string{"Authorization": "Bearer " + bearer, "User-Agent": "signet/test", "Accept-Encoding": ""} {
			if got := r.Header.Get(k); got != want {
				t.Errorf("%s is %q, want %q", k, got, want)
			}
		}
		w.Header().Set("Date", "Tue, 24 Nov 2026 12:00:00 GMT")
		reply(200, `{"metadata":{"name":"a","more":[1]}}`)(w, r)
	})
	var got named
	date, err := o.Read(t.Context(), "/api/v1/x", &got)
	if err != nil || got.Metadata.Name != "a" || !date.Equal(time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)) {
		t.Errorf("%+v, %v, %v", got, date, err)
	}
	if !o.Verified() || o.Server() != s.URL {
		t.Errorf("verified %t, server %s", o.Verified(), o.Server())
	}
	other := newServer(t, true)
	other.answer(func(http.ResponseWriter, *http.Request) { t.Error("another server was asked") })
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   error
	}{
		"not there":   {reply(404, `{"message":"no"}`), kube.ErrNotFound},
		"forbidden":   {reply(403, `{"message":"no"}`), kube.ErrForbidden},
		"too much":    {reply(200, `{"x":"`+strings.Repeat("x", 9<<20)+`"}`), nil},
		"no JSON":     {reply(200, "canary"), nil},
		"other types": {reply(200, `{"metadata":{"name":1}}`), nil},
		"broken off":  {reply(200, `{"metadata":`), nil},
		"a page": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "{}")
		}, nil},
		"redirected": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s.answer(tt.answer)
			before := s.asked.Load()
			_, err := o.Read(t.Context(), "/api/v1/x", new(named))
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || strings.Contains(err.Error(), bearer) || len(err.Error()) > 1000 {
				t.Errorf("%.1000v", err)
			}
			if n := s.asked.Load() - before; n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

func TestOperatorWrites(t *testing.T) {
	s := newServer(t, true)
	o := s.operator(t)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		switch r.Method {
		case http.MethodPost:
			reply(201, `{"metadata":{"name":"made"}}`)(w, r)
		case http.MethodDelete:
			if !bytes.Contains(body, []byte(`"preconditions":{"uid":"u"}`)) || !bytes.Contains(body, []byte(`"propagationPolicy":"Background"`)) {
				t.Errorf("deleted by %s", body)
			}
			reply(200, `{}`)(w, r)
		}
	})
	var made named
	if err := o.Create(t.Context(), "/apis/x", map[string]string{"kind": "X"}, &made); err != nil || made.Metadata.Name != "made" {
		t.Errorf("%+v, %v", made, err)
	}
	if err := o.Delete(t.Context(), "/apis/x/a", "u"); err != nil {
		t.Error(err)
	}
	if err := o.Delete(t.Context(), "/apis/x/a", ""); err == nil {
		t.Error("deleted whatever has that name")
	}
	s.answer(reply(409, `{"message":"another"}`))
	if err := o.Delete(t.Context(), "/apis/x/a", "u"); !errors.Is(err, kube.ErrConflict) {
		t.Errorf("%v, want %v", err, kube.ErrConflict)
	}
}

func TestOperatorEach(t *testing.T) {
	s := newServer(t, true)
	o := s.operator(t)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Get("labelSelector") != "a=b" || q.Get("limit") == "" {
			t.Errorf("asked %s", r.URL)
		}
		page := r.URL.Query().Get("continue")
		next := map[string]string{"": "1", "1": "2", "2": ""}[page]
		reply(200, fmt.Sprintf(`{"items":[{"metadata":{"name":"x%s"}},{"metadata":{"name":"y%s"}}],"metadata":{"continue":%q},"kind":"List"}`, page, page, next))(w, r)
	})
	var names []string
	each := func(n named) error { names = append(names, n.Metadata.Name); return nil }
	query := url.Values{"labelSelector": {"a=b"}}
	if err := kube.Each(t.Context(), o, "/api/v1/x", query, each); err != nil || strings.Join(names, " ") != "x y x1 y1 x2 y2" || len(query) != 1 {
		t.Errorf("%v, %v", names, err)
	}
	stop := errors.New("enough")
	if err := kube.Each(t.Context(), o, "/api/v1/x", query, func(named) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("%v, want %v", err, stop)
	}
	for name, body := range map[string]string{
		"no list":       `{"kind":"Pod","metadata":{}}`,
		"broken off":    `{"items":[{"metadata":{"name":"x"}}`,
		"other types":   `{"items":{"a":1}}`,
		"item too big":  `{"items":[{"metadata":{"name":"` + strings.Repeat("x", 9<<20) + `"}}]}`,
		"nothing":       ``,
		"two documents": `[]`,
	} {
		t.Run(name, func(t *testing.T) {
			s.answer(reply(200, body))
			if err := kube.Each(t.Context(), o, "/api/v1/x", nil, func(named) error { return nil }); err == nil {
				t.Error("taken for a list")
			}
		})
	}
	s.answer(reply(200, `{"items":null,"metadata":{}}`))
	if err := kube.Each(t.Context(), o, "/api/v1/x", nil, each); err != nil {
		t.Errorf("an empty list: %v", err)
	}
}

// A person's kubeconfig may do what kubectl does with it, and no error quotes it.
func TestOpenOperator(t *testing.T) {
	s := newServer(t, true)
	s.answer(reply(200, `{}`))
	good := [2]string{"token: " + bearer, "token: " + bearer}
	script := filepath.Join(t.TempDir(), "login")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho '"+
		`{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"`+bearer+`"}}`+"'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change   [2]string
		verified bool
	}{
		"token":      {good, true},
		"a command":  {[2]string{"{token: " + bearer + "}", "{exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: " + script + "}}"}, true},
		"unverified": {[2]string{"certificate-authority: ca.crt", "insecure-skip-tls-verify: true"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := s.operator(t, tt.change)
			if _, err := o.Read(t.Context(), "/version", new(named)); err != nil || o.Verified() != tt.verified {
				t.Errorf("verified %t, %v", o.Verified(), err)
			}
		})
	}
	for name, tt := range map[string]struct {
		change  [2]string
		context string
		says    string
	}{
		"no YAML":         {[2]string{"apiVersion: v1", "apiVersion: [" + bearer}, "", "does not parse"},
		"of another kind": {[2]string{"token: " + bearer, "token: [" + bearer + "]"}, "", "does not parse"},
		"no such context": {good, "other", `context "other" does not exist`},
		"no such CA file": {[2]string{"ca.crt", "none.crt"}, "", "none.crt"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kube.OpenOperator(kube.OperatorConfig{Kubeconfig: s.kubeconfig(t, tt.change), Context: tt.context, UserAgent: "x"})
			if err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), bearer) {
				t.Errorf("%v, want %q", err, tt.says)
			}
		})
	}
	if _, err := kube.OpenOperator(kube.OperatorConfig{Kubeconfig: filepath.Join(t.TempDir(), "none"), UserAgent: "x"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want %v", err, os.ErrNotExist)
	}
}
