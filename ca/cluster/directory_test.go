package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
)

const (
	issuer = "https://kubernetes.default.svc.cluster.local"
	web    = `{"issuer":"` + issuer + `","namespace":"shop","name":"web-0","uid":"u1","serviceAccount":"web","serviceAccountUID":"s1","node":"n1","nodeUID":"n1-uid"}`
)

// FileDirectory is a ca.Directory, and FilePublisher a ca.Publisher.
var (
	_ ca.Directory = (*FileDirectory)(nil)
	_ ca.Publisher = (*FilePublisher)(nil)
)

// replace puts a file in place as writers of the directory do: by rename, so that a reader sees the old or the new.
func replace(t *testing.T, path, content string) {
	t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

// reason returns the api.Reason of asking for a pod, empty when it is there.
func reason(t *testing.T, d *FileDirectory, issuer, uid string) api.Reason {
	t.Helper()
	p, err := d.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: uid})
	if err == nil {
		if p.Issuer != issuer || p.UID != uid {
			t.Errorf("asked for pod %s, got %s", uid, p.UID)
		}
		return ""
	}
	if p != (ca.Pod{}) {
		t.Errorf("a pod beside the error: %+v", p)
	}
	return api.ReasonOf(err)
}

func TestDirectoryPod(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.json")
	replace(t, path, `{"pods":[`+web+`,
		{"issuer":"`+issuer+`","uid":"u2","deletionTimestamp":"2026-03-01T12:00:00Z","finished":true},
		{"issuer":"https://other","uid":"u1","namespace":"elsewhere"}]}`)
	d := NewFileDirectory(path)
	tests := []struct {
		name, issuer, uid string
		want              ca.Pod
		reason            api.Reason
	}{
		{"all fields", issuer, "u1", ca.Pod{
			Issuer: issuer, Namespace: "shop", Name: "web-0", UID: "u1", ServiceAccount: "web", ServiceAccountUID: "s1",
			NodeName: "n1", NodeUID: "n1-uid",
		}, ""},
		{"ends", issuer, "u2", ca.Pod{
			Issuer: issuer, UID: "u2", DeleteAt: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Finished: true,
		}, ""},
		{"same UID in another cluster", "https://other", "u1", ca.Pod{Issuer: "https://other", UID: "u1", Namespace: "elsewhere"}, ""},
		{"pod of another cluster", "https://other", "u2", ca.Pod{}, api.PodUnknown},
		{"unknown cluster", "https://nobody", "u1", ca.Pod{}, api.PodUnknown},
		{"issuer in other letters", strings.ToUpper(issuer), "u1", ca.Pod{}, api.PodUnknown},
		{"issuer with a slash", issuer + "/", "u1", ca.Pod{}, api.PodUnknown},
		{"unknown UID", issuer, "u3", ca.Pod{}, api.PodUnknown},
		{"no UID", issuer, "", ca.Pod{}, api.PodUnknown},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := d.Pod(t.Context(), ca.PodID{Issuer: tt.issuer, UID: tt.uid})
			if tt.reason == "" && err != nil || tt.reason != "" && api.ReasonOf(err) != tt.reason {
				t.Fatalf("error %v, want %q", err, tt.reason)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestDirectoryDamaged proves that a file that is wrong anywhere counts nowhere: a directory that lost half of itself must
// not look like one in which half of the pods ended.
func TestDirectoryDamaged(t *testing.T) {
	tests := []struct{ name, content string }{
		{"empty", ""},
		{"not JSON", "pods: []"},
		{"cut", `{"pods":[` + web},
		{"a list", "[" + web + "]"},
		{"rest of a longer file", `{"pods":[` + web + `]}]}`},
		{"two documents", `{"pods":[]} {"pods":[` + web + `]}`},
		{"unknown field", `{"pods":[` + web + `],"version":2}`},
		{"unknown field of a pod", `{"pods":[` + strings.Replace(web, `"name"`, `"hostNetwork":true,"name"`, 1) + `]}`},
		{"duplicate UID", `{"pods":[` + web + `,` + web + `]}`},
		{"no UID", `{"pods":[{"issuer":"` + issuer + `"}]}`},
		{"no issuer", `{"pods":[{"uid":"u1"}]}`},
		{"UID is a number", `{"pods":[{"issuer":"` + issuer + `","uid":1}]}`},
		{"deletion is no time", `{"pods":[{"issuer":"` + issuer + `","uid":"u1","deletionTimestamp":"soon"}]}`},
		{"too large", `{"pods":[` + web + `]}` + strings.Repeat(" ", maxFile)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pods.json")
			d := NewFileDirectory(path)
			replace(t, path, `{"pods":[`+web+`]}`)
			if got := reason(t, d, issuer, "u1"); got != "" {
				t.Fatalf("before: %s", got)
			}
			replace(t, path, tt.content)
			for range 2 { // the second time the file has not changed
				if got := reason(t, d, issuer, "u1"); got != api.DirectoryUnavailable {
					t.Fatalf("damaged: %q, want %s", got, api.DirectoryUnavailable)
				}
			}
			replace(t, path, `{"pods":[`+web+`]}`)
			if got := reason(t, d, issuer, "u1"); got != "" {
				t.Errorf("put right: %s", got)
			}
		})
	}
}

// TestDirectoryLargest proves that the bound itself is still read.
func TestDirectoryLargest(t *testing.T) {
	doc := `{"pods":[` + web + `]}`
	if _, err := parsePods([]byte(doc + strings.Repeat(" ", maxFile-len(doc)))); err != nil {
		t.Error(err)
	}
}

func TestDirectoryRecovers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "pods.json")
	d := NewFileDirectory(path)
	want := func(when string, want api.Reason) {
		t.Helper()
		if got := reason(t, d, issuer, "u1"); got != want {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	want("no folder", api.DirectoryUnavailable)
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	want("no file", api.DirectoryUnavailable)
	replace(t, path, `{"pods":[`+web+`]}`)
	want("there", "")
	replace(t, path, `{"pods":[]}`)
	want("the pod is gone", api.PodUnknown)
	replace(t, path, `{"pods":[`+web+`]}`)
	want("the pod is back", "")
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	want("the file is gone", api.DirectoryUnavailable)
	if err := os.Rename(path+".away", path); err != nil { // with the stamp that it had
		t.Fatal(err)
	}
	want("the same file is back", "")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	want("a folder", api.DirectoryUnavailable)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	want("a pipe without a writer", api.DirectoryUnavailable) // and does not wait for one
}

// TestDirectorySameSize proves that a change is seen that alters neither the size nor the time of the file.
func TestDirectorySameSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.json")
	d := NewFileDirectory(path)
	when := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, uid := range []string{"u1", "u2"} {
		replace(t, path, `{"pods":[{"issuer":"i","uid":"`+uid+`"}]}`)
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
		if got := reason(t, d, "i", uid); got != "" {
			t.Errorf("pod %s: %s", uid, got)
		}
	}
	if got := reason(t, d, "i", "u1"); got != api.PodUnknown {
		t.Errorf("the pod that is gone: %q, want %s", got, api.PodUnknown)
	}
}

// TestDirectorySaysNothing proves that neither the path nor the content of the file is shown to whoever asks.
func TestDirectorySaysNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.json")
	replace(t, path, `{"pods":[{"issuer":"i","uid":"secret-uid"},{"issuer":"i","uid":"secret-uid"}]}`)
	_, err := NewFileDirectory(path).Pod(t.Context(), ca.PodID{Issuer: "i", UID: "u1"})
	text := api.AsError(err).Detail
	if api.ReasonOf(err) != api.DirectoryUnavailable || strings.Contains(text, "secret-uid") || strings.Contains(text, path) {
		t.Errorf("%v", err)
	}
}

// TestDirectoryConcurrent asks while the file changes: an answer is of the old file or the new.
func TestDirectoryConcurrent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.json")
	replace(t, path, `{"pods":[`+web+`]}`)
	d := NewFileDirectory(path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 4)
	for range cap(done) {
		go func() {
			for ctx.Err() == nil {
				if _, err := d.Pod(ctx, ca.PodID{Issuer: issuer, UID: "u1"}); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for i := range 100 {
		replace(t, path, fmt.Sprintf(`{"pods":[%s,{"issuer":"i","uid":"%d"}]}`, web, i))
	}
	cancel()
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// FuzzPods holds the parser of the directory file to what its readers rely on: it never panics, and every pod that it
// returns lies under the issuer and UID that it has.
func FuzzPods(f *testing.F) {
	for _, seed := range []string{
		`{"pods":[` + web + `]}`, `{"pods":[` + web + `,` + web + `]}`, `{"pods":[{"issuer":"i","uid":"u","finished":true}]}`, `{"pods":null}`,
		`{"pods":[{"issuer":"i","uid":"u","deletionTimestamp":"2026-03-01T12:00:00Z"}]}`, `{"pods":[{}]}`, `{}`, `null`, `[]`, ``, `{"pods":[]}x`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		pods, err := parsePods(data)
		if err != nil {
			if pods != nil {
				t.Error("pods beside an error")
			}
			return
		}
		for k, p := range pods {
			if k.issuer == "" || k.uid == "" || k != (podKey{p.Issuer, p.UID}) {
				t.Errorf("pod %q of %q lies under %q of %q", p.UID, p.Issuer, k.uid, k.issuer)
			}
		}
		if !json.Valid(bytes.TrimSpace(data)) {
			t.Error("what is not JSON was taken")
		}
	})
}
