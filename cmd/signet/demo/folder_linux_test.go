package demo

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
)

func TestFolder(t *testing.T) {
	base := t.TempDir()
	f, err := newFolder([]string{filepath.Join(base, "missing"), base})
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(f.path)
	if err != nil || st.Mode().Perm() != 0o700 || filepath.Dir(f.path) != base {
		t.Errorf("%s: %v, %v", f.path, st, err)
	}
	if err := f.remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(f.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

func TestFolderRefusesPathsThatAreTooLong(t *testing.T) {
	base := filepath.Join(t.TempDir(), strings.Repeat("x", 100))
	if err := os.Mkdir(base, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := newFolder([]string{base}); api.ReasonOf(err) != api.SocketUnsafe {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(base); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// What a killed demo leaves is removed by the next one; what lives, what was kept on purpose and what is not a demo's stays.
func TestSweep(t *testing.T) {
	base := t.TempDir()
	make := func() *folder {
		f, err := newFolder([]string{base})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	alive, kept, killed := make(), make(), make()
	if err := kept.keep(); err != nil {
		t.Fatal(err)
	}
	if err := killed.lock.Close(); err != nil { // what the kernel does
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	if err := os.WriteFile(filepath.Join(elsewhere, "lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(base, folderPrefix+"link")
	if err := os.Symlink(elsewhere, link); err != nil {
		t.Fatal(err)
	}
	next := make()
	for name, want := range map[string]bool{alive.path: true, kept.path: true, killed.path: false, next.path: true, link: true, filepath.Join(elsewhere, "lock"): true} {
		if _, err := os.Lstat(name); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", name, err, want)
		}
	}
	for _, f := range []*folder{alive, next} {
		if err := f.remove(); err != nil {
			t.Error(err)
		}
	}
}

func TestKeepLogs(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	f, err := newFolder([]string{t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer f.remove()
	l, err := f.log("signet-ca")
	if err != nil {
		t.Fatal(err)
	}
	l.WriteString("why\n")
	l.Close()
	if err := writeFile(f.join("seal.key"), []byte("secret")); err != nil {
		t.Fatal(err)
	}
	dir, err := f.keepLogs()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "signet-ca.log")); err != nil || string(b) != "why\n" {
		t.Errorf("%q, %v", b, err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("kept %v, %v: nothing but logs", files, err)
	}
}

func TestBinaries(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"there": 0o700, "plain": 0o600} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	got, err := binaries(dir, "there")
	if err != nil || got["there"] != filepath.Join(dir, "there") {
		t.Errorf("%v, %v", got, err)
	}
	_, err = binaries(dir, "there", "plain", "missing")
	if api.ReasonOf(err) != api.ProgramMissing || !strings.Contains(err.Error(), "plain and missing is not in "+dir) && !strings.Contains(err.Error(), "plain and missing are not in "+dir) {
		t.Errorf("error %v", err)
	}
}
