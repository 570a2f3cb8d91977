//go:build linux

package csi

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/signet-ca/signet/api"
)

// The agent is replaced under running pods: their sockets are back before kubelet says anything, in the very same folders,
// with the tokens that were there; kubelet and the pods go on.
//
// threat: B18
func TestAgentReplaced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p, q := testPod(1), testPod(2)
	r.publish(p, 1)
	r.publish(p, 2)
	r.publish(q, 1)
	c := r.served(p)
	mounted, err := os.Open(r.k.target(p)) // as the container runtime holds it
	if err != nil {
		t.Fatal(err)
	}
	defer mounted.Close()
	r.stop()
	ended(t, c)
	if n := r.identities.open(); n != 2 {
		t.Errorf("%d identities, want 2: the volumes are not gone", n)
	}
	if _, _, err := connectIn(mounted); err == nil {
		t.Error("the socket is served by nobody")
	}
	if err := r.k.publish(p, r.k.request(p, p.token(3))); err == nil { // it keeps what is there: a remount
		t.Error("kubelet is answered by nobody")
	}
	r.start()
	eventually(t, "the sockets", func() error {
		for _, v := range []podVolume{p, q} {
			c, name, err := r.connect(v)
			if err != nil {
				return err
			}
			c.Close()
			if name != v.Name {
				t.Fatalf("the socket is that of %q", name)
			}
		}
		c, name, err := connectIn(mounted)
		if err == nil {
			c.Close()
			if name != p.Name {
				t.Fatalf("the pod's mount leads to %q", name)
			}
		}
		return err
	})
	r.k.register()
	r.publish(p, 2) // the token that was remembered
	if n := r.identities.count(p.Name); n != 3 {
		t.Errorf("tokens were taken %d times, want 3", n)
	}
	r.publish(p, 4)
	for _, v := range []podVolume{p, q} {
		if err := r.k.deletePod(v); err != nil {
			t.Error(err)
		}
		r.clean(v)
	}
}

// While the agent is away a pod is deleted, kubelet cannot reach it; or everything below is gone. Nothing is brought back
// that is not there, and kubelet gets rid of what is.
func TestGoneMeanwhile(t *testing.T) {
	r := newRig(t)
	whole, folder, mount, stays := testPod(1), testPod(2), testPod(3), testPod(4)
	for _, p := range []podVolume{whole, folder, mount, stays} {
		r.publish(p, 1)
	}
	r.stop()
	for _, path := range []string{filepath.Join(r.k.dir, "pods", whole.UID), r.k.parent(folder), r.k.target(mount)} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	before := tree(t, filepath.Join(r.k.dir, "pods"))
	r.start()
	r.k.register()
	sameTree(t, before, tree(t, filepath.Join(r.k.dir, "pods")))
	r.served(stays)
	if left := r.records(); len(left) != 1 || left[0] != stays.id()+recordSuffix {
		t.Errorf("remembered: %v", left)
	}
	for _, p := range []podVolume{mount, stays} {
		if err := r.k.deletePod(p); err != nil {
			t.Error(err)
		}
	}
	r.publish(folder, 1) // the pod lives after all
	r.served(folder)
}

// What is remembered is read as if somebody else had written it.
func TestBadRecords(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, path string)
	}{
		{"empty", func(t *testing.T, path string) { os.WriteFile(path, nil, 0o600) }},
		{"torn", func(t *testing.T, path string) { os.Truncate(path, 40) }},
		{"huge", func(t *testing.T, path string) { os.WriteFile(path, make([]byte, maxRecord+1), 0o600) }},
		{"open to others", func(t *testing.T, path string) { os.Chmod(path, 0o644) }},
		{"link", func(t *testing.T, path string) { os.Rename(path, path+".x"); os.Symlink(path+".x", path) }},
		{"another volume's", func(t *testing.T, path string) {
			os.Rename(path, filepath.Join(filepath.Dir(path), testPod(2).id()+recordSuffix))
		}},
		{"another trust domain's", func(t *testing.T, path string) { replaceIn(t, path, audience, "signet:other.org") }},
		{"a path for a UID", func(t *testing.T, path string) {
			replaceIn(t, path, testPod(1).UID, "../../../etc")
		}},
		{"a path for a name", func(t *testing.T, path string) {
			replaceIn(t, path, `"Name":"signet"`, `"Name":"../../x"`)
		}},
		{"another pod's token", func(t *testing.T, path string) { replaceIn(t, path, testPod(1).Name, testPod(2).Name) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			p := testPod(1)
			r.publish(p, 1)
			r.stop()
			tc.change(t, filepath.Join(r.cfg.StateDir, p.id()+recordSuffix))
			before := tree(t, r.k.dir)
			delete(before, "plugins/csi.signet.dev/csi.sock")
			r.start()
			r.k.register()
			for path, text := range before {
				if tree(t, r.k.dir)[path] != text {
					t.Errorf("%s was changed", path)
				}
			}
			if left := r.records(); len(left) > 1 {
				t.Errorf("remembered: %v", left)
			}
			r.publish(p, 2) // kubelet asks again, and all is well
			r.served(p)
			if err := r.k.deletePod(p); err != nil {
				t.Error(err)
			}
			r.clean(p)
		})
	}
}

func replaceIn(t *testing.T, path, old, with string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(data), old) {
		t.Fatalf("the record does not hold %q", old)
	}
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(data), old, with)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Nothing is remembered: after a restart kubelet's next call takes over the folder as it is, for the pod holds it.
func TestNothingRemembered(t *testing.T) {
	r := newRig(t, func(c *Config) { c.StateDir = "" })
	p := testPod(1)
	r.publish(p, 1)
	mounted, err := os.Open(r.k.target(p))
	if err != nil {
		t.Fatal(err)
	}
	defer mounted.Close()
	r.stop()
	r.start()
	r.k.register()
	if _, _, err := connectIn(mounted); err == nil {
		t.Error("the socket is back without a token")
	}
	r.publish(p, 1)
	c, name, err := connectIn(mounted)
	if err != nil || name != p.Name {
		t.Fatalf("%q, %v", name, err)
	}
	c.Close()
	if err := r.k.deletePod(p); err != nil {
		t.Error(err)
	}
}

// kubelet is restarted: it registers the driver anew, asks for the volumes as if for the first time, and may remove those of
// pods that went meanwhile by its notes.
func TestKubeletRestarted(t *testing.T) {
	r := newRig(t)
	p, q := testPod(1), testPod(2)
	r.publish(p, 1)
	r.publish(q, 1)
	c := r.served(p)
	r.k = newKubelet(t, r.k.dir)
	r.k.register()
	r.publish(p, 1)
	if err := r.k.deletePod(q); err != nil {
		t.Error(err)
	}
	r.clean(q)
	alive(t, c)
	r.served(p)
}

// The server of a socket fails: it is served again.
func TestServeFails(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := testPod(1)
	r.publish(p, 1)
	c := r.served(p)
	r.d.mu.Lock()
	v := r.d.volumes[target{p.UID, p.volume}]
	r.d.mu.Unlock()
	v.socket.Close()
	ended(t, c)
	eventually(t, "the socket", func() error {
		c, _, err := r.connect(p)
		if err == nil {
			c.Close()
		}
		return err
	})
	r.served(p)
	if err := r.k.deletePod(p); err != nil {
		t.Error(err)
	}
	r.clean(p)
}

// heard says that kubelet registered us and called last at these times.
func (r *rig) heard(since, last time.Time) {
	r.d.mu.Lock()
	r.d.kubelet.since, r.d.kubelet.last = since, last
	r.d.mu.Unlock()
}

// swept sweeps until a pod's volume is known no more: one that the guard looks at just then is left for the next sweep.
func (r *rig) swept(now time.Time, p podVolume) {
	r.t.Helper()
	eventually(r.t, "a volume swept", func() error {
		r.d.sweep(now)
		if slices.Contains(r.d.targets(), target{p.UID, p.volume}) {
			return errors.New("it is there")
		}
		return nil
	})
}

// Pods go without a word: their folders vanish, or kubelet was killed while it wrote its notes, so that it can never ask.
// What is left of them is swept; what may belong to a pod that lives is not.
func TestSweep(t *testing.T) {
	r := newRig(t)
	gone, torn, lives := testPod(1), testPod(2), testPod(3)
	for _, p := range []podVolume{gone, torn, lives} {
		r.publish(p, 1)
	}
	c := r.served(gone)
	removeAll(t, filepath.Join(r.k.dir, "pods", gone.UID))
	notes := filepath.Join(r.k.parent(torn), volumeData)
	if err := os.Truncate(notes, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.k.unpublish(torn); err == nil {
		t.Fatal("kubelet can remove it after all")
	}
	start := time.Now()
	r.swept(start, gone)
	ended(t, c)
	r.clean(gone)
	r.served(torn)

	for _, tc := range []struct {
		name        string
		since, last time.Time
	}{
		{"kubelet is away", start.Add(-time.Hour), start.Add(time.Second)},
		{"kubelet has just come back", start.Add(time.Hour), start.Add(time.Hour + time.Minute)},
		{"kubelet was never there", time.Time{}, start.Add(time.Hour)},
	} {
		r.heard(tc.since, tc.last)
		r.d.sweep(start.Add(2 * time.Hour))
		if _, _, err := r.connect(torn); err != nil {
			t.Errorf("%s: a pod that may live lost its socket", tc.name)
		}
	}
	r.heard(start.Add(-time.Hour), start.Add(time.Hour))
	r.swept(start.Add(time.Hour), torn)
	r.clean(torn)
	if err := r.k.removeOrphan(torn); err != nil {
		t.Errorf("kubelet stumbles over what is left: %v", err)
	}
	r.served(lives)
	if left := r.records(); len(left) != 1 {
		t.Errorf("remembered: %v", left)
	}
}

// Leftovers of which nothing is remembered either: ours are known by what they hold. Those of other drivers, and of pods
// that kubelet can still ask for, are let be.
func TestSweepUnknown(t *testing.T) {
	r := newRig(t)
	torn, missing, asked, foreign, empty := testPod(1), testPod(2), testPod(3), testPod(4), testPod(5)
	for _, p := range []podVolume{torn, missing, asked, foreign} {
		r.publish(p, 1)
	}
	r.stop()
	if err := errors.Join(os.RemoveAll(r.cfg.StateDir), os.MkdirAll(r.k.target(empty), 0o755),
		os.Truncate(filepath.Join(r.k.parent(torn), volumeData), 10), os.Remove(filepath.Join(r.k.parent(missing), volumeData)),
		os.Truncate(filepath.Join(r.k.parent(foreign), volumeData), 0), os.WriteFile(filepath.Join(r.k.target(foreign), "data"), nil, 0o600),
		os.Mkdir(filepath.Join(r.k.dir, "pods", "not a pod"), 0o750)); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.k.register()
	start := time.Now()
	r.heard(start.Add(-time.Hour), start)
	r.d.sweep(start)
	r.heard(start.Add(-time.Hour), start.Add(staleAfter+time.Minute))
	before := tree(t, filepath.Join(r.k.dir, "pods"))
	r.d.sweep(start.Add(staleAfter + time.Minute))
	for _, p := range []podVolume{torn, missing} {
		r.clean(p)
		if err := r.k.removeOrphan(p); err != nil {
			t.Error(err)
		}
		for path := range before {
			if strings.HasPrefix(path, p.UID) {
				delete(before, path)
			}
		}
	}
	sameTree(t, before, tree(t, filepath.Join(r.k.dir, "pods")))
	if err := r.k.deletePod(asked); err != nil {
		t.Error(err)
	}
	_, err := (&nodeServer{d: r.d}).NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: foreign.id(), TargetPath: r.k.target(foreign)})
	if api.ReasonOf(err) != api.SocketUnsafe {
		t.Errorf("a folder with something else in it: %v", err)
	}
}
