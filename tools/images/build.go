package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// goEnvironment is what the Go command says of this machine: folders that no binary may tell of.
type goEnvironment struct {
	GOROOT, GOMODCACHE, GOCACHE, GOPATH string
}

func (c config) goEnv(ctx context.Context) (goEnvironment, error) {
	cmd := exec.CommandContext(ctx, c.goCommand, "env", "-json", "GOROOT", "GOMODCACHE", "GOCACHE", "GOPATH")
	cmd.Dir, cmd.Env, cmd.Stderr = c.root, append(os.Environ(), c.env...), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return goEnvironment{}, fmt.Errorf("go env: %w", err)
	}
	var e goEnvironment
	return e, json.Unmarshal(out, &e)
}

// compile builds the binaries of all images for one platform into dir, and checks them.
//
// Every setting that changes the bytes is fixed here and not taken from the machine. Symbol tables stay out: they are a
// third of the size, and neither the stack traces of a panic nor what scanners read is in them.
func (c config) compile(ctx context.Context, arch, dir string, e goEnvironment) error {
	args := []string{"build", "-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags", "-s -w -X main.version=" + c.version, "-o", dir + "/"}
	for _, name := range c.binaries() {
		args = append(args, "./cmd/"+name)
	}
	cmd := exec.CommandContext(ctx, c.goCommand, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.root, os.Stderr, os.Stderr
	cmd.Env = slices.Concat(os.Environ(), c.env, []string{
		"GOOS=linux", "GOARCH=" + arch, "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOEXPERIMENT=", "GOFIPS140=off", "GOAMD64=v1", "GOARM64=v8.0",
		"PWD=" + c.root,
	})
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go build for %s: %w", arch, err)
	}
	for _, name := range c.binaries() {
		if err := checkBinary(filepath.Join(dir, name), arch, slices.Concat(e.folders(), []string{c.root, c.out, dir})); err != nil {
			return fmt.Errorf("%s for %s: %w", name, arch, err)
		}
	}
	return nil
}

// binaries are those of all images, each once.
func (c config) binaries() []string {
	var names []string
	for _, spec := range c.images {
		names = append(names, spec.binaries()...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (e goEnvironment) folders() []string {
	return []string{e.GOROOT, e.GOMODCACHE, e.GOCACHE, e.GOPATH}
}

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkBinary says what would make the binary unfit for an image: another platform's, dynamically linked, or one that tells
// of the machine that it was built on.
func checkBinary(path, arch string, folders []string) error {
	f, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Machine != machines[arch] {
		return fmt.Errorf("it is for %v", f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			return errors.New("it is not static")
		}
	}
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return err
	}
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	for key, want := range map[string]string{"-trimpath": "true", "CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": arch, "vcs.revision": ""} {
		if settings[key] != want {
			return fmt.Errorf("it was built with %s=%q instead of %q", key, settings[key], want)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if found := machinePath(data, folders); found != "" {
		return fmt.Errorf("it holds the path %s of this machine", found)
	}
	return nil
}

// machinePath returns the first of the folders that data tells of, or "". Folders right below the root have names like
// /go or /src that occur in data for other reasons, and are not looked for.
func machinePath(data []byte, folders []string) string {
	for _, folder := range folders {
		folder = filepath.Clean(folder)
		if strings.Count(folder, "/") >= 2 && bytes.Contains(data, []byte(folder+"/")) {
			return folder
		}
	}
	return ""
}
