package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/kube"
)

// Without the permission the CA is not ready, and says which rule is missing. The moment somebody adds it, it is.
//
// threat: G08
func TestReviewPermission(t *testing.T) {
	var allowed atomic.Bool
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{
			"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "status": map[string]any{"allowed": allowed.Load()},
		})
	}))
	t.Cleanup(s.Close)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "x",
		"contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
		"clusters": [{"name": "x", "cluster": {"server": %q, "certificate-authority-data": %s}}],
		"users": [{"name": "x", "user": {"token": "x"}}]}`, s.URL, base64JSON(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := kube.Open(kube.Config{Kubeconfig: path, UserAgent: "signet-ca/test", Timeout: 30 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	r := &reviewer{client: client, timeout: 30 * time.Second, log: slog.New(slog.DiscardHandler)}
	all := reviewers{"https://one.example": r}

	if err := r.check(t.Context()); err == nil {
		t.Fatal("it is allowed")
	}
	missing := all.notReady()
	if len(missing) != 1 || !strings.Contains(missing[0], "https://one.example") ||
		!strings.Contains(missing[0], `{apiGroups: ["authentication.k8s.io"], resources: ["tokenreviews"], verbs: ["create"]}`) {
		t.Errorf("it says %q", missing)
	}
	allowed.Store(true)
	if err := r.check(t.Context()); err != nil {
		t.Error(err)
	}
	if missing := all.notReady(); len(missing) > 0 {
		t.Errorf("it still says %q", missing)
	}
}

func base64JSON(t *testing.T, data []byte) []byte {
	t.Helper()
	text, err := json.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
