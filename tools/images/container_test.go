package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// containerd is one of our own, below a folder of the test.
type containerd struct {
	t       *testing.T
	address string
}

func startContainerd(t *testing.T) containerd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("containers are started by root only")
	}
	for _, name := range []string{"containerd", "ctr", "runc"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("there is no %s here", name)
		}
	}
	dir, err := os.MkdirTemp("", "signet-ctr-") // short: a socket's path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := containerd{t, filepath.Join(dir, "c.sock")}
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, fmt.Appendf(nil, `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = %q
[ttrpc]
  address = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), c.address, c.address+".ttrpc"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command("containerd", "--config", file)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("containerd: %s", log.Bytes()[max(0, log.Len()-4096):])
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		out, err := exec.Command("ctr", "-a", c.address, "version").CombinedOutput()
		if err == nil {
			return c
		} else if time.Now().After(deadline) {
			t.Fatalf("containerd does not answer: %v: %s", err, out)
		}
	}
}

// ctr runs one command of its client and returns what it printed.
func (c containerd) ctr(args ...string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(c.t.Context(), "ctr", append([]string{"-a", c.address}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// run runs a container to its end, with a root that is read-only, and as whom the image says.
func (c containerd) run(image, id string, more []string, command ...string) (stdout, stderr string, err error) {
	args := slices.Concat([]string{"run", "--rm", "--read-only", "--snapshotter=native"}, more, []string{image, id}, command)
	return c.ctr(args...)
}

// The images run in a real containerd as a user that is not root, with nothing to write to and no shell.
func TestContainers(t *testing.T) {
	c := startContainerd(t)
	probe := filepath.Join(t.TempDir(), "probe")
	build := exec.Command("go", "build", "-o", probe, "./testdata/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, spec := range imageSpecs {
		t.Run(spec.name, func(t *testing.T) {
			archive := filepath.Join(images(t), spec.name+".tar")
			if _, stderr, err := c.ctr("image", "import", "--snapshotter=native", archive); err != nil {
				t.Fatalf("%v: %s", err, stderr)
			}
			image := "localhost/" + spec.name + ":v0.0.0-test_build"
			listed, _, err := c.ctr("image", "ls")
			if err != nil || !strings.Contains(listed, image) || !strings.Contains(listed, "linux/"+runtime.GOARCH) {
				t.Fatalf("%v: %s", err, listed)
			}
			for _, name := range spec.binaries() {
				version := []string{name, "--version"}
				if name == "signet" {
					version[1] = "version"
				}
				stdout, stderr, err := c.run(image, spec.name+"-version-"+name, nil, version...)
				if err != nil || !strings.Contains(stdout, "v0.0.0-test+build") {
					t.Errorf("version of %s: %v: %s%s", name, err, stdout, stderr)
				}
			}
			if _, stderr, err := c.run(image, spec.name+"-shell", nil, "/bin/sh", "-c", "true"); err == nil || !strings.Contains(stderr, "no such file") {
				t.Errorf("a shell: %v: %s", err, stderr)
			}
			_, stderr, err := c.run(image, spec.name+"-usage", nil, spec.name, "no-such-command")
			if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 2 {
				t.Errorf("a wrong command: %v: %s", err, stderr)
			}
			mount := []string{"--mount", "type=bind,src=" + probe + ",dst=/probe,options=rbind:ro"}
			stdout, stderr, err := c.run(image, spec.name+"-probe", mount, "/probe")
			if err != nil {
				t.Fatalf("probe: %v: %s%s", err, stdout, stderr)
			}
			var got struct {
				UID, GID             int
				Shell                string
				Executable, Writable []string
			}
			if err := json.Unmarshal([]byte(stdout), &got); err != nil {
				t.Fatalf("%v: %s", err, stdout)
			}
			executable := []string{"/probe"}
			for _, name := range slices.Sorted(slices.Values(spec.binaries())) {
				executable = append(executable, "/usr/bin/"+name)
			}
			if got.UID != 65532 || got.GID != 65532 || got.Shell != "" || len(got.Writable) > 0 ||
				!slices.Equal(got.Executable, executable) {
				t.Errorf("the probe found %+v", got)
			}
		})
	}
}
