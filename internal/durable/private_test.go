package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestMkdirPrivate(t *testing.T) {
	for _, tc := range []struct {
		name  string
		setup func(path string) error
		why   string // part of the refusal; empty: accepted
	}{
		{"absent", func(string) error { return nil }, ""},
		{"there already", func(p string) error { return os.Mkdir(p, 0o700) }, ""},
		{"stricter than asked", func(p string) error { return os.Mkdir(p, 0o500) }, ""},
		{"group may enter", func(p string) error { return os.Mkdir(p, 0o710) }, "has mode 0710, want 0700"},
		{"others may read", func(p string) error { return os.Mkdir(p, 0o705) }, "has mode 0705, want 0700"},
		{"a link to a good folder", func(p string) error {
			return errors.Join(os.Mkdir(p+".real", 0o700), os.Symlink(p+".real", p))
		}, "is a symbolic link"},
		{"a link to nowhere", func(p string) error { return os.Symlink(p+".absent", p) }, "is a symbolic link"},
		{"a file", func(p string) error { return os.WriteFile(p, nil, 0o600) }, "is not a folder"},
		{"a fifo", func(p string) error { return syscall.Mkfifo(p, 0o600) }, "is not a folder"},
		{"somebody else's", func(p string) error {
			return errors.Join(os.Mkdir(p, 0o700), os.Chown(p, 4242, 4242))
		}, "is owned by user 4242"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer syscall.Umask(syscall.Umask(0))
			path := filepath.Join(t.TempDir(), "d")
			if err := tc.setup(path); errors.Is(err, fs.ErrPermission) {
				t.Skip("only root can give a folder away")
			} else if err != nil {
				t.Fatal(err)
			}
			err := MkdirPrivate(path + "/") // a trailing slash would follow a link
			if tc.why == "" {
				if err != nil {
					t.Fatal(err)
				}
				if info, err := os.Lstat(path); err != nil || !info.IsDir() || info.Mode().Perm()&0o077 != 0 {
					t.Errorf("made %v, %v", info.Mode(), err)
				}
				return
			}
			if !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), tc.why) {
				t.Errorf("error %v, want it unsafe: %q", err, tc.why)
			}
		})
	}
}

func TestMkdirPrivateParents(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := MkdirPrivate(filepath.Join(root, "a", "b", "c")); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"a", "a/b", "a/b/c"} {
		info, err := os.Lstat(filepath.Join(root, p))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v, want 0700", p, info.Mode())
		}
	}
	if info, _ := os.Lstat(root); info.Mode().Perm() != 0o755 {
		t.Errorf("a folder that was there before was changed to %v", info.Mode())
	}
}

// threat: L04
func TestReadPrivate(t *testing.T) {
	file := func(mode fs.FileMode) func(string) error {
		return func(p string) error {
			return errors.Join(os.WriteFile(p, []byte("secret"), 0o600), os.Chmod(p, mode))
		}
	}
	link := func(p string) error {
		return errors.Join(file(0o440)(p+".real"), os.Symlink(filepath.Base(p)+".real", p))
	}
	mounted := Reading{FollowLinks: true, GroupRead: true}
	for _, tc := range []struct {
		name  string
		setup func(path string) error
		as    Reading
		why   string // part of the refusal; empty: read
	}{
		{"owner only", file(0o600), Reading{}, ""},
		{"read only", file(0o400), Reading{}, ""},
		{"group may read", file(0o640), Reading{}, "has mode 0640, want 0600"},
		{"others may read", file(0o604), Reading{}, "has mode 0604, want 0600"},
		{"others may write", file(0o602), mounted, "has mode 0602, want 0600"},
		{"group may write", file(0o660), mounted, "has mode 0660, want 0640"},
		{"link", link, Reading{}, "is a symbolic link"},
		{"link and group", link, Reading{FollowLinks: true}, "has mode 0440, want 0400"},
		{"no link allowed", link, Reading{GroupRead: true}, "is a symbolic link"},
		{"Kubernetes Secret", link, mounted, ""},
		{"folder", func(p string) error { return os.Mkdir(p, 0o700) }, Reading{}, "is not a regular file"},
		{"fifo", func(p string) error { return syscall.Mkfifo(p, 0o600) }, mounted, "is not a regular file"},
		{"device through a link", func(p string) error { return os.Symlink("/dev/zero", p) }, mounted, "is not a regular file"},
		{"somebody else's", func(p string) error {
			return errors.Join(file(0o600)(p), os.Chown(p, 4242, 4242))
		}, Reading{}, "is owned by user 4242"},
		{"too large", func(p string) error { return os.WriteFile(p, []byte("secrets"), 0o600) }, Reading{}, "is larger than 6 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "f")
			if err := tc.setup(path); errors.Is(err, fs.ErrPermission) {
				t.Skip("only root can give a file away")
			} else if err != nil {
				t.Fatal(err)
			}
			data, err := tc.as.ReadPrivate(path, 6)
			if tc.why == "" {
				if err != nil || string(data) != "secret" {
					t.Errorf("read %q, %v", data, err)
				}
				return
			}
			if !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), tc.why) || data != nil {
				t.Errorf("read %q, error %v, want it unsafe: %q", data, err, tc.why)
			}
		})
	}
	t.Run("absent", func(t *testing.T) {
		_, err := ReadPrivate(filepath.Join(t.TempDir(), "f"), 6)
		if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrUnsafe) {
			t.Errorf("error %v, want fs.ErrNotExist", err)
		}
	})
}
