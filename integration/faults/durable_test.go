//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-ca/signet/internal/durable"
)

const (
	oldContent = "the old content"
	newContent = "the new content, which is longer"
)

// durableChild replaces a file, makes one, makes one that is there, and looks after what is there.
func durableChild(dir string) {
	failed := false
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"replace", func() error { return durable.WriteFile(filepath.Join(dir, "replace"), []byte(newContent), 0o600) }},
		{"make", func() error { return durable.CreateFile(filepath.Join(dir, "make"), []byte(newContent), 0o600) }},
		{"again", func() error {
			err := durable.CreateFile(filepath.Join(dir, "again"), []byte(newContent), 0o600)
			if errors.Is(err, fs.ErrExist) {
				return nil
			}
			return cmpErr(err)
		}},
		{"folder", func() error { return durable.MkdirPrivate(filepath.Join(dir, "a", "b")) }},
		{"sync", func() error { return durable.SyncFile(filepath.Join(dir, "again")) }},
	} {
		fmt.Println("try", step.name)
		err := step.do()
		switch {
		case err == nil:
			fmt.Println("done", step.name)
			continue
		case errors.Is(err, durable.ErrUnknown):
			fmt.Println("unknown", step.name, err)
		default:
			fmt.Println("fail", step.name, err)
		}
		failed = true
	}
	if failed {
		os.Exit(1)
	}
}

// cmpErr makes an error of none: something must have been there.
func cmpErr(err error) error {
	if err == nil {
		return errors.New("it replaced what was there")
	}
	return err
}

// TestDurable proves every call of durable writes: the old content or the new and nothing else, the new one where it was
// said, the old one where it failed without an unknown outcome, and no temporary file unless the process was killed or
// could not remove it.
func TestDurable(t *testing.T) {
	subject{
		prepare: func(t testing.TB, dir string) {
			for _, name := range []string{"replace", "again"} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(oldContent), 0o600); err != nil {
					t.Error(err)
				}
			}
		},
		run:   func(t testing.TB, w *warden) (int, string) { return child(t, w, "durable", w.root) },
		judge: judgeDurable,
	}.enumerate(t)
}

func judgeDurable(r run) error {
	for name, before := range map[string]string{"replace": oldContent, "make": "", "again": oldContent} {
		data, err := os.ReadFile(filepath.Join(r.dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		can := map[string]bool{before: true, newContent: true}
		switch {
		case name == "again":
			can = map[string]bool{before: true}
		case strings.Contains(r.said, "done "+name):
			can = map[string]bool{newContent: true}
		case strings.Contains(r.said, "fail "+name):
			can = map[string]bool{before: true}
		}
		if !can[string(data)] {
			return fmt.Errorf("%s holds %q", name, data)
		}
	}
	if r.fault.do == die || r.fault.do == tear || r.fault.sticky {
		return nil
	}
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && r.fault.at.name != "unlinkat" {
			return fmt.Errorf("%s was left", e.Name())
		}
	}
	return nil
}
