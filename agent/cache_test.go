package agent_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/catest"
)

// onTmpfs returns a folder that cannot reach a disk, or skips the test where there is none.
func onTmpfs(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "signet-agent-test-")
	if err != nil {
		t.Skip("there is no /dev/shm")
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if _, _, err := agent.OpenDirCache(dir, false); err != nil {
		t.Skipf("this machine's /dev/shm will not do: %v", err)
	}
	return dir
}

func open(t *testing.T, dir string) *agent.DirCache {
	t.Helper()
	c, _, err := agent.OpenDirCache(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func contents(c agent.Cache) map[string]string {
	all := map[string]string{}
	for name, data := range c.All() {
		all[name] = string(data)
	}
	return all
}

func TestDirCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "cache")
	c := open(t, dir)
	put := func(name, data string) {
		t.Helper()
		if err := c.Put(name, []byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if got := contents(c); len(got) != 0 {
		t.Errorf("a new cache holds %v", got)
	}
	put("trust", "1")
	put("self", "2")
	put("trust", "3")
	if diff := cmp.Diff(map[string]string{"trust": "3", "self": "2"}, contents(open(t, dir))); diff != "" {
		t.Error(diff)
	}
	for range 2 { // what is not there is deleted already
		if err := c.Delete("self"); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(map[string]string{"trust": "3"}, contents(c)); diff != "" {
		t.Error(diff)
	}
	for path, want := range map[string]fs.FileMode{dir: 0o700 | fs.ModeDir, filepath.Dir(dir): 0o700 | fs.ModeDir, filepath.Join(dir, "trust.json"): 0o600} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := c.Put("trust", nil); err == nil {
		t.Error("written into a folder that is gone")
	}
	if got := contents(c); len(got) != 0 {
		t.Errorf("a folder that is gone holds %v", got)
	}
}

// What others may have read or written, or what is no file, is not believed: it is there without content, so that whoever
// uses the cache deletes it.
func TestDirCacheUnsafeEntries(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	c := open(t, dir)
	write := func(name string, mode fs.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte("x"), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("good.json", 0o600)
	write("readable.json", 0o644)
	write("writable.json", 0o620)
	write("other.txt", 0o600)
	target := filepath.Join(t.TempDir(), "target")
	if err := errors.Join(
		os.WriteFile(target, []byte("x"), 0o600),
		os.Symlink(target, filepath.Join(dir, "link.json")),
		os.Mkdir(filepath.Join(dir, "folder.json"), 0o700),
		os.WriteFile(filepath.Join(dir, "large.json"), make([]byte, 1<<20+1), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"good": "x", "readable": "", "writable": "", "link": "", "folder": "", "large": ""}
	if diff := cmp.Diff(want, contents(c)); diff != "" {
		t.Error(diff)
	}
	if err := c.Delete("link"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(target); err != nil {
		t.Errorf("deleting a link deleted what it points to: %v", err)
	}
}

// threat: L04
func TestOpenDirCache(t *testing.T) {
	disk := t.TempDir()
	if c, _, _ := agent.OpenDirCache(filepath.Join(disk, "probe"), false); c != nil {
		t.Skip("temporary files are on a tmpfs here")
	}
	for _, tt := range []struct {
		name  string
		setup func(path string) error
		lax   bool
		want  api.Reason // zero: accepted
		warns bool
	}{
		{"on a disk", func(string) error { return nil }, false, api.CacheUnsafe, false},
		{"on a disk, for development", func(string) error { return nil }, true, "", true},
		{"open to others", func(p string) error { return errors.Join(os.Mkdir(p, 0o700), os.Chmod(p, 0o755)) }, true, api.FileUnsafe, false},
		{"a link", func(p string) error { return errors.Join(os.Mkdir(p+".real", 0o700), os.Symlink(p+".real", p)) }, true, api.FileUnsafe, false},
		{"a file", func(p string) error { return os.WriteFile(p, nil, 0o600) }, true, api.FileUnsafe, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(disk, strings.ReplaceAll(tt.name, " ", "-"))
			if err := tt.setup(path); err != nil {
				t.Fatal(err)
			}
			c, warning, err := agent.OpenDirCache(path, tt.lax)
			if tt.want != "" {
				if c != nil || warning != nil || api.ReasonOf(err) != tt.want || !strings.Contains(err.Error(), path) {
					t.Errorf("error %v, want %s", err, tt.want)
				}
				return
			}
			if c == nil || err != nil || tt.warns != (api.ReasonOf(warning) == api.CacheUnsafe) {
				t.Errorf("warning %v, error %v", warning, err)
			}
		})
	}
	t.Run("on a tmpfs", func(t *testing.T) {
		dir := onTmpfs(t)
		left := filepath.Join(dir, ".signet-tmp-KILLED")
		if err := os.WriteFile(left, []byte("a key"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, warning, err := agent.OpenDirCache(dir, false); err != nil || warning != nil {
			t.Errorf("warning %v, error %v", warning, err)
		}
		if _, err := os.Lstat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Error("what a killed process left is still there")
		}
	})
}

// filled returns what a cache holds after an agent has served two workloads.
func filled(t *testing.T, s *catest.Server) (m *memory, first, second *workload) {
	t.Helper()
	m = newMemory()
	n := startNode(t, s, here, func(c *agent.Config) { c.Cache = m })
	first, second = newWorkload(s, "web-1", here), newWorkload(s, "web-2", here)
	for _, w := range []*workload{first, second} {
		await(t, n.admit(w), time.Second, "SVID", hasSVID)
	}
	synctest.Wait()
	n.stop()
	return m, first, second
}

const notUsed = "cache entry not used"

// Damage costs what is damaged and nothing else; it is said and deleted.
func TestDamagedCache(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		whole, _, _ := filled(t, s)
		other, _, _ := filled(t, s)
		change := func(path string, to any) func([]byte) []byte {
			return func(data []byte) []byte {
				var e map[string]any
				if err := json.Unmarshal(data, &e); err != nil {
					t.Fatal(err)
				}
				at := e["content"].(map[string]any)
				head, tail, ok := strings.Cut(path, ".")
				if ok {
					at, head = at[head].(map[string]any), tail
				}
				at[head] = to
				return must(json.Marshal(e))
			}
		}
		cut := func(data []byte) []byte { return data[:len(data)/2] }
		pods := slices.DeleteFunc(whole.names(), func(n string) bool { return !strings.HasPrefix(n, "pod-") })
		otherKey := content(t, other.get(firstPod(other)))["svid"].(map[string]any)["key"]
		for _, tt := range []struct {
			name   string
			entry  string
			damage func([]byte) []byte
		}{
			{"half of the bundle", "trust", cut},
			{"no bundle in it", "trust", change("roots", nil)},
			{"a certificate that is none", "trust", change("roots", []string{"eA=="})},
			{"not JSON", "keysets", func([]byte) []byte { return []byte("x") }},
			{"empty", "keysets", func([]byte) []byte { return []byte{} }},
			{"unreadable", "keysets", func([]byte) []byte { return nil }},
			{"a workload's in the agent's place", "self", func([]byte) []byte {
				return []byte(`{"trustDomain":"example.org","content":` + string(must(json.Marshal(content(t, whole.get(pods[0]))["svid"]))) + `}`)
			}},
			{"half of the agent's", "self", cut},
			{"half of a pod's", pods[0], cut},
			{"null", pods[0], func([]byte) []byte { return []byte("null") }},
			{"without a chain", pods[0], change("svid.chain", nil)},
			{"without a key", pods[0], change("svid.key", nil)},
			{"with another's key", pods[0], change("svid.key", otherKey)},
			{"the agent's in a workload's place", pods[0], change("svid", content(t, whole.get("self")))},
		} {
			damaged := newMemory()
			damaged.entries = maps.Clone(whole.entries)
			damaged.entries[tt.entry] = tt.damage(whole.get(tt.entry))
			n := newNode(t, s, here, func(c *agent.Config) { c.Cache = damaged })
			said := n.log.find(notUsed, "")
			if len(said) != 1 || said[0].attrs["entry"] != tt.entry || said[0].level != slog.LevelWarn {
				t.Errorf("%s: warnings %v", tt.name, said)
			}
			if slices.Contains(damaged.names(), tt.entry) || len(damaged.names()) != len(whole.names())-1 {
				t.Errorf("%s: the cache now holds %q", tt.name, damaged.names())
			}
			want := 2.0
			if strings.HasPrefix(tt.entry, "pod-") {
				want = 1
			}
			if got := n.metric("signet_agent_svids"); got != want {
				t.Errorf("%s: %v SVIDs are held, want %v", tt.name, got, want)
			}
			// Nothing that is lost is more than fetched again.
			n.start()
			time.Sleep(time.Second)
			if n.metric("signet_agent_connected") != 1 {
				t.Errorf("%s: there is no session", tt.name)
			}
			n.stop()
		}
	})
}

func firstPod(m *memory) string {
	names := m.names()
	return names[slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, "pod-") })]
}

func content(t *testing.T, data []byte) map[string]any {
	t.Helper()
	var e struct {
		Content map[string]any `json:"content"`
	}
	if err := json.Unmarshal(data, &e); err != nil {
		t.Fatal(err)
	}
	return e.Content
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// What has expired meanwhile is not served, and neither it nor its key stays.
func TestExpiredCache(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		m, w, _ := filled(t, s)
		s.Stop()
		time.Sleep(svidLife + time.Second)
		n := newNode(t, s, here, func(c *agent.Config) { c.Cache = m })
		if n.metric("signet_agent_svids") != 0 || len(n.NotReady()) != 1 {
			t.Errorf("%v SVIDs are held", n.metric("signet_agent_svids"))
		}
		if diff := cmp.Diff([]string{"keysets", "trust"}, m.names()); diff != "" {
			t.Error(diff)
		}
		n.start()
		id := n.admit(w) // the key sets are good still
		s.Start()
		await(t, id, time.Minute, "SVID", hasSVID)
	})
}

// Whatever was learnt in one trust domain is worth nothing in another, its roots above all.
//
// spiffe: B-08
func TestForeignCache(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		m, _, _ := filled(t, s)
		before := len(m.names())
		td := spiffeid.RequireTrustDomainFromString("other.example")
		cfg := agent.Config{TrustDomain: td, Dial: s.Dial, Prover: ownToken(s, here), Verifier: attestor.ByKeySets, Cache: m}
		if _, err := agent.New(cfg); api.ReasonOf(err) != api.ConfigInvalid {
			t.Errorf("without a bundle of its own: %v, want %s", err, api.ConfigInvalid)
		}
		r := newRoot(t)
		m, _, _ = filled(t, s)
		var err error
		if cfg.Trust, err = agent.ParseTrust(td, pemOf(r.cert)); err != nil {
			t.Fatal(err)
		}
		log := &records{}
		cfg.Cache, cfg.Log = m, slog.New(log)
		a, err := agent.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.Trust().Load(); got != cfg.Trust {
			t.Error("the cached roots of another trust domain are trusted")
		}
		if len(a.NotReady()) == 0 || len(m.names()) != 0 || len(log.find(notUsed, "")) != before {
			t.Errorf("of %d entries there are left %q", before, m.names())
		}
		if _, err := a.GetX509BundleForTrustDomain(s.TD); err == nil {
			t.Error("there is a bundle for the other trust domain")
		}
	})
}

// A cached SVID that does not verify under the cached bundle is not served: the bundle is what its peers have.
func TestCacheUnderAnotherRoot(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		m, _, _ := filled(t, s)
		newer, err := agent.NewTrust(s.TD, api.Generation{Epoch: 1, Number: 1}, s.CA().Bundle().Roots)
		if err != nil {
			t.Fatal(err)
		}
		e := map[string]any{"trustDomain": s.TD.Name(), "content": map[string]any{"sequence": 1<<32 | 2, "roots": [][]byte{newRoot(t).cert.Raw}}}
		m.entries["trust"] = must(json.Marshal(e))
		n := newNode(t, s, here, func(c *agent.Config) { c.Cache, c.Trust = m, newer })
		if n.Trust().Load().Generation.Number != 2 {
			t.Error("the bundle file came before what is cached")
		}
		if n.metric("signet_agent_svids") != 0 {
			t.Error("SVIDs are served that do not verify under the bundle")
		}
		if diff := cmp.Diff([]string{"keysets", "trust"}, m.names()); diff != "" {
			t.Error(diff)
		}
	})
}

// What an agent has heard of, it does not forget: after a restart an older bundle is refused, even where the first one that
// it was given never changed.
//
// threat: H01
func TestBundleGenerationOutlivesRestart(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		m := newMemory()
		n := startNode(t, s, here, func(c *agent.Config) { c.Cache = m })
		time.Sleep(time.Second)
		n.stop()
		older, err := agent.NewTrust(s.TD, api.Generation{Epoch: 0, Number: 9}, s.CA().Bundle().Roots)
		if err != nil {
			t.Fatal(err)
		}
		n = newNode(t, s, here, func(c *agent.Config) { c.Cache, c.Trust = m, older })
		if got := n.Trust().Load().Generation.String(); got != "1.1" {
			t.Errorf("after a restart the bundle is of generation %s", got)
		}
	})
}

// A cache that cannot be written costs a warning.
func TestCacheNotWritable(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		m := newMemory()
		m.fails = fmt.Errorf("no space left")
		n := startNode(t, s, here, func(c *agent.Config) { c.Cache = m })
		await(t, n.admit(newWorkload(s, "web-1", here)), time.Second, "SVID", hasSVID)
		synctest.Wait()
		if got := n.log.find("cache not written", ""); len(got) != 4 {
			t.Errorf("warned %d times, want 4: bundle, key sets, own identity, workload", len(got))
		}
	})
}

// The cache in a folder does what the one in memory does.
//
// threat: D16
func TestRestartWithDirCache(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here, func(c *agent.Config) { c.Cache = open(t, dir) })
		w := newWorkload(s, "web-1", here)
		first := await(t, n.admit(w), time.Second, "SVID", hasSVID)
		n.stop()
		s.Stop()
		n = startNode(t, s, here, func(c *agent.Config) { c.Cache, c.Trust = open(t, dir), nil })
		if h := n.admit(w).Held().Load(); h.SVID == nil || serial(h) != serial(first) {
			t.Error("a restarted agent does not hold the SVID")
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 4 {
			t.Errorf("%d files, error %v", len(entries), err)
		}
		for _, e := range entries {
			if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
				t.Errorf("%s has mode %v", e.Name(), info.Mode())
			}
		}
	})
}
