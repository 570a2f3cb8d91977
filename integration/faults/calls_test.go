//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	writers = 8
	writes  = 200
)

// callsChild makes calls whose number is known, from many threads and under the signals of Go's scheduler.
func callsChild(dir string) {
	var wg sync.WaitGroup
	for n := range writers {
		wg.Go(func() {
			f, err := os.Create(filepath.Join(dir, fmt.Sprint(n)))
			if err != nil {
				fmt.Println(n, err)
				return
			}
			defer f.Close()
			for range writes {
				if _, err := f.WriteString("0123456789abcdef"); err != nil {
					fmt.Println(n, err)
					return
				}
			}
			if err := f.Sync(); err != nil {
				fmt.Println(n, err)
			}
		})
	}
	wg.Wait()
}

// TestWarden proves the instrument itself: each call is seen once, in whatever thread, and each act does what it says.
func TestWarden(t *testing.T) {
	size := func(dir string, n int) int64 {
		info, err := os.Stat(filepath.Join(dir, fmt.Sprint(n)))
		if errors.Is(err, fs.ErrNotExist) {
			return -1
		} else if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	total := func(dir string) (sum int64) {
		for n := range writers {
			sum += max(0, size(dir, n))
		}
		return sum
	}
	const all = writers * writes * 16
	for _, tc := range []struct {
		name  string
		at    string // the call
		nth   int
		do    act
		code  int
		said  string
		bytes int64 // in all files, at most; as much less as threads can have in hand
	}{
		{"pass", "write", 0, pass, 0, "", all},
		{"fail", "write", 777, fail, 0, "no space left on device", all - 16},
		{"late", "write", writers * writes, late, 0, "no space left on device", all},
		{"half", "write", 777, half, 0, "", all}, // the rest is written by the next call
		{"die", "write", 777, die, -1, "", 776 * 16},
		{"tear", "write", 777, tear, -1, "", 776*16 + 8},
		{"sync fails", "fsync", 1, fail, 0, "no space left on device", all},
		{"open fails", "openat", 1, fail, 0, "no space left on device", all * (writers - 1) / writers},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, nth := folder(t), 0
			w := &warden{root: dir, decide: func(c call) (act, unix.Errno) {
				if c.name == tc.at {
					nth++
				}
				if nth == tc.nth && c.name == tc.at {
					return tc.do, unix.ENOSPC
				}
				return pass, 0
			}}
			code, said := child(t, w, "calls", dir)
			if code != tc.code || !strings.Contains(said, tc.said) || tc.said == "" && said != "" {
				t.Errorf("exit code %d, it said %q; want %d and %q", code, said, tc.code, tc.said)
			}
			least := tc.bytes
			if tc.code != 0 {
				least -= writers * 16 // what was let through and not carried out before the kill
			} else if tc.nth == 777 && tc.do == fail {
				least -= writes * 16 // one writer gave up
			}
			if got := total(dir); got > tc.bytes || got < least {
				t.Errorf("%d bytes were written, want %d to %d", got, least, tc.bytes)
			}
			seen := map[string]int{}
			for _, c := range w.seen() {
				seen[c.name]++
			}
			if tc.do == pass && (seen["write"] != writers*writes || seen["openat"] != writers || seen["fsync"] != writers) {
				t.Errorf("seen %v", seen)
			}
		})
	}
}
