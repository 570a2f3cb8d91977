//go:build linux

package csi

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
)

// outside makes a folder elsewhere that looks like a pod's, with a file and a socket that somebody listens on.
func outside(t *testing.T, r *rig) (dir string, check func()) {
	t.Helper()
	dir = filepath.Join(filepath.Dir(r.k.dir), "outside")
	for _, sub := range []string{"volumes/kubernetes.io~csi/signet/mount", "kubernetes.io~csi/signet/mount", "signet/mount", "mount"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, sub, "precious"), []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", filepath.Join(dir, sub, SocketName))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	before := tree(t, dir)
	return dir, func() { t.Helper(); sameTree(t, before, tree(t, dir)) }
}

// A link, a file or a mount at any place on the way to the volume, or a folder there that is not as ours are: nothing is made
// and nothing removed, and kubelet is told why.
//
// threat: B16
func TestUnsafePlaces(t *testing.T) {
	p := testPod(1)
	steps := []string{"", "volumes", "volumes/kubernetes.io~csi", "volumes/kubernetes.io~csi/signet", "volumes/kubernetes.io~csi/signet/mount"}
	type place struct {
		name string
		// spoil makes a place unsafe that is as kubelet makes it, with mount in it or without.
		spoil func(t *testing.T, r *rig)
	}
	var places []place
	for n, step := range steps {
		at := func(r *rig) string { return filepath.Join(r.k.dir, "pods", p.UID, step) }
		places = append(places,
			place{"link at " + step, func(t *testing.T, r *rig) {
				dir, _ := outside(t, r)
				to := filepath.Join(append([]string{dir}, strings.Split(strings.TrimPrefix(strings.TrimPrefix(step, "volumes/kubernetes.io~csi"), "/"), "/")...)...)
				if n < 3 {
					to = filepath.Join(append([]string{dir}, strings.Split(step, "/")...)...)
				}
				swap(t, at(r), func(path string) error { return os.Symlink(to, path) })
			}},
			place{"file at " + step, func(t *testing.T, r *rig) {
				swap(t, at(r), func(path string) error { return os.WriteFile(path, []byte("precious"), 0o600) })
			}},
			place{"mount at " + step, func(t *testing.T, r *rig) {
				if os.Geteuid() != 0 {
					t.Skip("only root can mount")
				}
				if err := os.MkdirAll(at(r), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := unix.Mount("none", at(r), "tmpfs", 0, "mode=0755"); err != nil {
					t.Skipf("cannot mount: %v", err)
				}
				t.Cleanup(func() { unix.Unmount(at(r), unix.MNT_DETACH) })
				rest := strings.TrimPrefix(strings.TrimPrefix(steps[3], step), "/")
				if n < 4 {
					os.MkdirAll(filepath.Join(at(r), rest), 0o755)
				}
			}})
	}
	mountIs := func(f func(t *testing.T, path string)) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			if err := os.MkdirAll(r.k.target(p), 0o755); err != nil {
				t.Fatal(err)
			}
			f(t, r.k.target(p))
		}
	}
	places = append(places,
		place{"folder open to others", mountIs(func(t *testing.T, path string) { os.Chmod(path, 0o777) })},
		place{"folder open to its group", mountIs(func(t *testing.T, path string) { os.Chmod(path, 0o775) })},
		place{"folder above open to others", func(t *testing.T, r *rig) { os.Chmod(r.k.parent(p), 0o777) }},
		place{"folder of another", mountIs(func(t *testing.T, path string) {
			if err := os.Chown(path, 1000, 1000); err != nil {
				t.Skip(err)
			}
		})},
		place{"folder above of another", func(t *testing.T, r *rig) {
			if err := os.Chown(r.k.parent(p), 1000, 1000); err != nil {
				t.Skip(err)
			}
		}},
		place{"folder with a file", mountIs(func(t *testing.T, path string) { os.WriteFile(filepath.Join(path, "precious"), nil, 0o600) })},
		place{"folder with a folder", mountIs(func(t *testing.T, path string) { os.Mkdir(filepath.Join(path, SocketName), 0o700) })},
		place{"folder with many files", mountIs(func(t *testing.T, path string) {
			for n := range 100 {
				os.WriteFile(filepath.Join(path, fmt.Sprint(tempPrefix, n)), nil, 0o600)
			}
		})},
		place{"folder with a file in the socket's place", mountIs(func(t *testing.T, path string) {
			os.WriteFile(filepath.Join(path, SocketName), []byte("precious"), 0o600)
		})},
		place{"folder with a link in the socket's place", mountIs(func(t *testing.T, path string) {
			os.Symlink("/etc/passwd", filepath.Join(path, SocketName))
		})},
		place{"folder with another's socket", mountIs(func(t *testing.T, path string) {
			s := shortPath(t, path)
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			t.Cleanup(func() { l.Close() })
			if err := os.Lchown(s, 1000, 1000); err != nil {
				t.Skip(err)
			}
		})},
	)
	r := newRig(t)
	for _, pl := range places {
		t.Run(pl.name, func(t *testing.T) {
			defer os.RemoveAll(filepath.Join(r.k.dir, "pods", p.UID))
			defer os.RemoveAll(filepath.Join(filepath.Dir(r.k.dir), "outside"))
			if err := os.MkdirAll(r.k.parent(p), 0o750); err != nil {
				t.Fatal(err)
			}
			pl.spoil(t, r)
			t.Cleanup(func() { os.RemoveAll(filepath.Join(r.k.dir, "pods", p.UID)) }) // once nothing is mounted there
			all := filepath.Dir(r.k.dir)
			before := tree(t, all)
			_, err := (&nodeServer{d: r.d}).NodePublishVolume(t.Context(), r.k.request(p, p.token(1)))
			if api.ReasonOf(err) != api.SocketUnsafe {
				t.Errorf("error %v", err)
			}
			sameTree(t, before, tree(t, all))
			u := &csipb.NodeUnpublishVolumeRequest{VolumeId: p.id(), TargetPath: r.k.target(p)}
			_, err = (&nodeServer{d: r.d}).NodeUnpublishVolume(t.Context(), u)
			if err != nil && api.ReasonOf(err) != api.SocketUnsafe {
				t.Errorf("error %v", err)
			}
			if err != nil { // what bears our own socket's name in a folder of ours may go
				sameTree(t, before, tree(t, all))
			}
			if r.identities.open() != 0 || len(r.records()) != 0 {
				t.Errorf("%d identities, remembered %v", r.identities.open(), r.records())
			}
		})
	}
}

// swap puts something else in the place of a path, which it moves aside.
func swap(t *testing.T, path string, put func(string) error) {
	t.Helper()
	aside := path + ".aside"
	if err := os.Rename(path, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(aside) })
	if err := put(path); err != nil {
		t.Fatal(err)
	}
}

// Somebody exchanges a folder on the way for a link elsewhere, to and fro, while volumes are made and removed: whatever
// comes of it, nothing elsewhere is touched.
//
// threat: B16
func TestSwappedOnTheWay(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := testPod(1)
	dir, check := outside(t, r)
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	for rel, to := range map[string]string{
		"": "", "volumes": "volumes", "volumes/kubernetes.io~csi": "kubernetes.io~csi", "volumes/kubernetes.io~csi/signet": "signet",
		"volumes/kubernetes.io~csi/signet/mount": "mount",
	} {
		at := filepath.Join(r.k.dir, "pods", p.UID, rel)
		link := filepath.Join(filepath.Dir(r.k.dir), "link")
		if err := errors.Join(os.MkdirAll(r.k.parent(p), 0o750), os.Symlink(filepath.Join(dir, to), link)); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default: // where there is nothing yet, nothing is exchanged
					unix.Renameat2(unix.AT_FDCWD, at, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
				}
			}
		})
		node, made := &nodeServer{d: r.d}, 0
		for range rounds {
			_, err := node.NodePublishVolume(t.Context(), r.k.request(p, p.token(1)))
			if err == nil {
				made++
			}
			_, uerr := node.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: p.id(), TargetPath: r.k.target(p)})
			for _, err := range []error{err, uerr} {
				switch reason := api.ReasonOf(err); {
				case err == nil, reason == api.SocketUnsafe, reason == api.VolumeTarget, reason == api.VolumeFailed, reason == api.StateConflict:
				default:
					t.Errorf("error %v", err)
				}
			}
		}
		close(done)
		wg.Wait()
		check()
		t.Logf("%s: %d of %d were made", filepath.Join("UID", rel), made, rounds)
		os.RemoveAll(link)
		os.RemoveAll(filepath.Join(r.k.dir, "pods", p.UID))
	}
}

// removeAll removes a folder in which the guard may put a socket back meanwhile.
func removeAll(t *testing.T, path string) {
	t.Helper()
	eventually(t, "the folder gone", func() error { return os.RemoveAll(path) })
}

// Between two calls the folder is replaced: by one that is fit, which is taken, and by others, which are not.
func TestFolderReplaced(t *testing.T) {
	r := newRig(t)
	p := testPod(1)
	r.publish(p, 1)
	c := r.served(p)
	removeAll(t, r.k.target(p))
	r.publish(p, 1)
	r.served(p)
	alive(t, c)
	removeAll(t, r.k.target(p))
	if err := os.Symlink("/etc", r.k.target(p)); err != nil {
		t.Fatal(err)
	}
	r.d.tend(target{p.UID, p.volume})
	wantError(t, r.k.publish(p, r.k.request(p, p.token(1))), api.SocketUnsafe)
	wantError(t, r.k.unpublish(p), api.SocketUnsafe)
	ended(t, c)
	if err := os.Remove(r.k.target(p)); err != nil {
		t.Fatal(err)
	}
	if err := r.k.deletePod(p); err != nil {
		t.Error(err)
	}
	r.clean(p)
}

// Somebody removes or replaces the socket in its folder: it is back within a second, and who was connected is not disturbed.
//
// threat: B17
func TestSocketReplaced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := testPod(1)
	r.publish(p, 1)
	c := r.served(p)
	folder, err := os.Stat(r.k.target(p))
	if err != nil {
		t.Fatal(err)
	}
	for name, put := range map[string]func(path string) error{
		"removed": func(string) error { return nil },
		"file":    func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"link":    func(path string) error { return os.Symlink("/etc/passwd", path) },
		"socket": func(path string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err == nil {
				t.Cleanup(func() { l.Close() })
				l.SetUnlinkOnClose(false)
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := shortPath(t, r.k.target(p))
			eventually(t, "something else in its place", func() error { // the guard may be faster than we are
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				return put(path)
			})
			eventually(t, "the socket", func() error {
				if info, err := os.Lstat(path); err != nil || info.Mode().Type() != fs.ModeSocket {
					return errors.New("it is not there")
				}
				r.d.mu.Lock()
				v := r.d.volumes[target{p.UID, p.volume}]
				r.d.mu.Unlock()
				if id, _, err := identify(unix.AT_FDCWD, path); err != nil || id != v.socket.file() {
					return errors.New("it is not ours")
				}
				return nil
			})
			r.served(p)
			alive(t, c)
		})
	}
	if now, err := os.Stat(r.k.target(p)); err != nil || !os.SameFile(folder, now) {
		t.Error("the folder was replaced")
	}
	if err := r.k.deletePod(p); err != nil {
		t.Error(err)
	}
	r.clean(p)
}

// Calls for one volume and for others, all at once: each ends with success or is told to come back, and at the end there is
// what the last call left.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.MaxPublishes = 4 })
	pods := []podVolume{testPod(1), testPod(2), testPod(3)}
	for _, p := range pods {
		if err := os.MkdirAll(r.k.parent(p), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	node := &nodeServer{d: r.d}
	var wg sync.WaitGroup
	for n := range 12 {
		wg.Go(func() {
			for round := range 40 {
				p := pods[(n+round)%len(pods)]
				var err error
				switch {
				case n%3 == 0:
					_, err = node.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: p.id(), TargetPath: r.k.target(p)})
				case n%3 == 1 && round%8 == 0:
					r.d.tend(target{p.UID, p.volume})
				default:
					_, err = node.NodePublishVolume(t.Context(), r.k.request(p, p.token(round)))
				}
				if reason := api.ReasonOf(err); err != nil && reason != api.StateConflict && reason != api.Overloaded {
					t.Errorf("error %v", err)
				}
			}
		})
	}
	wg.Wait()
	for _, p := range pods {
		eventually(t, "a quiet moment", func() error { return r.k.publish(p, r.k.request(p, p.token(99))) })
		r.served(p)
		eventually(t, "a quiet moment", func() error { return r.k.deletePod(p) })
		r.clean(p)
	}
	if n := r.identities.open(); n != 0 {
		t.Errorf("%d identities are left", n)
	}
}
