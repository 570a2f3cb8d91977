//go:build integration && !(linux && (amd64 || arm64))

package faults

import "testing"

func TestFaults(t *testing.T) {
	t.Skip("system calls are failed by seccomp, which is Linux's, on amd64 and arm64")
}
