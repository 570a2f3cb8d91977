//go:build linux

package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
)

// TestSpare: what is spare costs no memory, and is there for the collector.
func TestSpare(t *testing.T) {
	debug.FreeOSMemory() // what is collected and not given back yet could be used again, and would have to be cleared
	before, heap := resident(t), heapBytes()
	kept := spare()
	runtime.GC()
	if grew := heapBytes() - heap; grew < spareBytes/2 {
		t.Errorf("the heap grew by %d bytes, want about %d", grew, spareBytes)
	}
	if grew := resident(t) - before; grew > spareBytes/2 {
		t.Errorf("%d bytes more are resident", grew)
	}
	runtime.KeepAlive(kept)
}

func heapBytes() int {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// resident is this process's resident memory in bytes (statm of proc(5)).
func resident(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
