package durable

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("DURABLE_TEST_WRITER"); path != "" {
		writeForEver(path)
	}
	os.Exit(m.Run())
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// alone fails unless dir holds exactly the named entries: a temporary file left behind is a secret left behind.
func alone(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(names, " ") {
		t.Errorf("folder holds %q, want %q", got, names)
	}
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	defer syscall.Umask(syscall.Umask(0o077))
	for _, step := range []struct {
		data string
		mode fs.FileMode
	}{{"first", 0o600}, {"", 0o644}, {"third, longer than the others", 0o640}} {
		if err := WriteFile(path, []byte(step.data), step.mode); err != nil {
			t.Fatal(err)
		}
		if got := read(t, path); got != step.data {
			t.Errorf("content %q, want %q", got, step.data)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != step.mode {
			t.Errorf("mode %v, want %v whatever the umask", info.Mode(), step.mode)
		}
		alone(t, filepath.Dir(path), "f")
	}
}

func TestWriteFileReplacesLink(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(target, []byte("kept"), 0o600), os.Symlink(target, link)); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(link, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := read(t, target); got != "kept" {
		t.Errorf("the link was followed: target holds %q", got)
	}
	if got := read(t, link); got != "new" {
		t.Errorf("content %q, want new", got)
	}
}

// Every step fails once. Up to the rename the old content stands and nothing is left behind; after it the outcome is
// unknown and says so.
func TestWriteFileFailsAtEachStep(t *testing.T) {
	for _, tc := range []struct {
		at      Step
		err     error
		unknown bool
		content string
	}{
		{StepCreate, syscall.ENOSPC, false, "old"},
		{StepMode, syscall.EPERM, false, "old"},
		{StepWrite, syscall.ENOSPC, false, "old"},
		{StepSync, syscall.EIO, false, "old"},
		{StepClose, syscall.EIO, false, "old"},
		{StepRename, syscall.EROFS, false, "old"},
		{StepRename, syscall.EIO, true, "old"},
		{StepSyncDir, syscall.EIO, true, "new"},
	} {
		for name, move := range map[string]func(string, string) error{"WriteFile": os.Rename, "CreateFile": linkNew} {
			t.Run(fmt.Sprint(name, " ", tc.at, " ", tc.err), func(t *testing.T) {
				dir := t.TempDir()
				path := filepath.Join(dir, "f")
				existed := name == "WriteFile"
				if existed {
					if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				err := put(path, []byte("new"), 0o600, move, func(s Step) error {
					if s == tc.at {
						return tc.err
					}
					return nil
				})
				we, ok := errors.AsType[*WriteError](err)
				if !ok || we.Step != tc.at || !errors.Is(err, tc.err) {
					t.Fatalf("error %v, want %v at step %q", err, tc.err, tc.at)
				}
				if got := errors.Is(err, ErrUnknown); got != tc.unknown {
					t.Errorf("outcome unknown: %v, want %v", got, tc.unknown)
				}
				if existed || tc.content == "new" {
					alone(t, dir, "f")
					if got := read(t, path); got != tc.content {
						t.Errorf("content %q, want %q", got, tc.content)
					}
				} else {
					alone(t, dir)
				}
			})
		}
	}
}

func TestWriteFileRealErrors(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path string
		at         Step
		is         error
	}{
		{"no folder", filepath.Join(dir, "absent", "f"), StepCreate, fs.ErrNotExist},
		{"a folder is in the way", filepath.Join(dir, "folder"), StepRename, fs.ErrExist},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := WriteFile(tc.path, []byte("x"), 0o600)
			we, ok := errors.AsType[*WriteError](err)
			if !ok || we.Step != tc.at || !errors.Is(err, tc.is) {
				t.Fatalf("error %v, want %v at %q", err, tc.is, tc.at)
			}
			if strings.Contains(err.Error(), tempPrefix) || !strings.HasPrefix(err.Error(), tc.path+": cannot "+string(tc.at)+": ") {
				t.Errorf("error text %q", err)
			}
			alone(t, dir, "folder")
		})
	}
}

func TestCreateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	var won, lost atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			err := CreateFile(path, fmt.Append(nil, i), 0o600)
			switch {
			case err == nil:
				won.Add(1)
			case errors.Is(err, fs.ErrExist):
				lost.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || lost.Load() != 7 {
		t.Fatalf("%d calls made the file, %d found it there; want 1 and 7", won.Load(), lost.Load())
	}
	before := read(t, path)
	if err := CreateFile(path, []byte("other"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("error %v, want it to match fs.ErrExist", err)
	}
	if got := read(t, path); got != before {
		t.Errorf("an existing file was changed from %q to %q", before, got)
	}
	alone(t, filepath.Dir(path), "f")
}

func TestRemoveTemporary(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"state.db", tempPrefix + "A", tempPrefix + "B"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveTemporary(dir); err != nil {
		t.Fatal(err)
	}
	alone(t, dir, "state.db")
	if err := RemoveTemporary(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, want fs.ErrNotExist", err)
	}
}

func TestSyncFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := SyncFile(filepath.Join(dir, "f")); err != nil {
		t.Error(err)
	}
	if err := SyncFile(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, want fs.ErrNotExist", err)
	}
	if err := SyncFile(fifo); err == nil { // and it must not wait for a writer
		t.Error("a fifo was synced")
	}
}

// killedContent is what the child writes as number n: long enough that a torn write would show.
func killedContent(n int) []byte { return bytes.Repeat(fmt.Appendf(nil, "%08d", n), 4096) }

func writeForEver(path string) {
	for n := 0; ; n++ {
		if err := WriteFile(path, killedContent(n), 0o600); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(n)
	}
}

// A process killed at any moment leaves one whole content, and never an older one than it reported.
func TestWriteFileKilled(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, after := range []int{1, 2, 3, 5, 8, 13, 21, 34} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "DURABLE_TEST_WRITER="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		reported := -1
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if _, err := fmt.Sscan(lines.Text(), &reported); err != nil {
				t.Fatal(err)
			}
			if reported == after {
				cmd.Process.Kill() // and go on reading: it may have reported more
			}
		}
		cmd.Wait()
		var found int
		data := read(t, path)
		if _, err := fmt.Sscanf(data[:8], "%d", &found); err != nil {
			t.Fatal(err)
		}
		if data != string(killedContent(found)) {
			t.Fatalf("killed after %d: the file is torn", after)
		}
		if found < reported {
			t.Fatalf("killed after %d: the file holds %d, though %d was reported", after, found, reported)
		}
		if err := RemoveTemporary(dir); err != nil {
			t.Fatal(err)
		}
		alone(t, dir, "f")
	}
}
