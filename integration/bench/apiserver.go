//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/controlplane"
)

// apiserver is a real control plane: its API server makes tokens and reviews them.
type apiserver struct {
	plane *controlplane.ControlPlane
	tb    *outsideTest
	pod   string // UID
}

// reached is what its client needs to know.
type reached struct {
	Kubeconfig string // of one who may review tokens
	JWKS       json.RawMessage
	PIDs       []int
}

func (a *apiserver) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "start":
		return with(arg, func(dir string) (any, error) { return a.start(ctx, dir) })
	case "tokens":
		return with(arg, func(n int) (any, error) { return a.tokens(ctx, n) })
	default:
		return nil, errUnknown
	}
}

// Close ends the control plane.
func (a *apiserver) Close() error {
	if a.tb != nil {
		a.tb.end()
	}
	return nil
}

type object = map[string]any

func (a *apiserver) start(ctx context.Context, dir string) (r reached, err error) {
	a.tb = &outsideTest{ctx: ctx}
	if err := a.tb.try(func() { a.plane = controlplane.Start(a.tb) }); err != nil {
		return r, err
	}
	rules := "/apis/rbac.authorization.k8s.io/v1/"
	for _, x := range []struct {
		path string
		o    object
	}{
		{"/api/v1/namespaces", object{"metadata": object{"name": "shop"}}},
		{"/api/v1/namespaces/shop/serviceaccounts", object{"metadata": object{"name": "web"}}},
		{"/api/v1/nodes", object{"metadata": object{"name": nodeName(0)}}},
		{rules + "clusterroles", object{
			"metadata": object{"name": "reviewer"},
			"rules":    []object{{"apiGroups": []string{"authentication.k8s.io"}, "resources": []string{"tokenreviews"}, "verbs": []string{"create"}}},
		}},
		{rules + "clusterrolebindings", object{
			"metadata": object{"name": "reviewer"},
			"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "reviewer"},
			"subjects": []object{{"kind": "ServiceAccount", "namespace": "shop", "name": "web"}},
		}},
	} {
		if err := a.plane.Do(ctx, http.MethodPost, x.path, x.o, nil); err != nil {
			return r, err
		}
	}
	var made struct{ Metadata struct{ UID string } }
	if err := a.plane.Do(ctx, http.MethodPost, "/api/v1/namespaces/shop/pods", object{
		"metadata": object{"name": "web-0"},
		"spec": object{
			"serviceAccountName": "web", "nodeName": nodeName(0), "automountServiceAccountToken": false,
			"containers": []object{{"name": "main", "image": "none"}},
		},
	}, &made); err != nil {
		return r, err
	}
	a.pod = made.Metadata.UID
	own, err := a.token(ctx, "")
	if err != nil {
		return r, err
	}
	file := filepath.Join(dir, "reviewer.token")
	if err := os.WriteFile(file, []byte(own), 0o600); err != nil {
		return r, err
	}
	if err := a.tb.try(func() { r.Kubeconfig = a.plane.Kubeconfig(a.tb, "reviewer", fmt.Sprintf(`{"tokenFile": %q}`, file)) }); err != nil {
		return r, err
	}
	r.PIDs = a.plane.Processes()
	return r, a.plane.Do(ctx, http.MethodGet, "/openid/v1/jwks", nil, &r.JWKS)
}

// tokens asks for so many tokens, each of its own, as kubelet does.
func (a *apiserver) tokens(ctx context.Context, n int) (all []string, err error) {
	for range n {
		token, err := a.token(ctx, "signet:"+trustDomain)
		if err != nil {
			return nil, err
		}
		all = append(all, token)
	}
	return all, nil
}

// token asks for one; no audience stands for the API server's own.
func (a *apiserver) token(ctx context.Context, audience string) (string, error) {
	spec := object{"expirationSeconds": 3600}
	if audience != "" {
		spec["audiences"] = []string{audience}
		spec["boundObjectRef"] = object{"kind": "Pod", "apiVersion": "v1", "name": "web-0", "uid": a.pod}
	}
	var made struct{ Status struct{ Token string } }
	err := a.plane.Do(ctx, http.MethodPost, "/api/v1/namespaces/shop/serviceaccounts/web/token", object{"spec": spec}, &made)
	return made.Status.Token, err
}

// outsideTest lets the control plane of tests run where there is no test. What it has no method for is nil, and not used.
type outsideTest struct {
	testing.TB

	ctx     context.Context
	cleanup []func()
	failed  bool
}

// stopped is how a function ends that calls Fatal or Skip.
type stopped struct{ err error }

// try returns what f failed with.
func (t *outsideTest) try(f func()) (err error) {
	defer func() {
		switch x := recover().(type) {
		case nil:
		case stopped:
			err = x.err
		default:
			panic(x)
		}
	}()
	f()
	return nil
}

func (t *outsideTest) end() {
	for len(t.cleanup) > 0 {
		last := len(t.cleanup) - 1
		f := t.cleanup[last]
		t.cleanup = t.cleanup[:last]
		f()
	}
}

func (t *outsideTest) Helper()                  {}
func (t *outsideTest) Context() context.Context { return t.ctx }
func (t *outsideTest) Cleanup(f func())         { t.cleanup = append(t.cleanup, f) }
func (t *outsideTest) Failed() bool             { return t.failed }
func (t *outsideTest) Logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().UTC().Format(time.TimeOnly)+" "+format+"\n", args...)
}

func (t *outsideTest) Fatal(args ...any) {
	t.failed = true
	panic(stopped{errors.New(fmt.Sprint(args...))})
}

func (t *outsideTest) Fatalf(format string, args ...any) { t.Fatal(fmt.Sprintf(format, args...)) }
func (t *outsideTest) Skip(args ...any)                  { panic(stopped{errors.New(fmt.Sprint(args...))}) }
