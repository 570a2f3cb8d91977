//go:build linux

package csi

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// childEnv makes this test binary an agent in a folder, which kills itself at a step, as often as it was passed before.
const childEnv = "SIGNET_CSI_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		time.AfterFunc(2*time.Minute, func() { os.Exit(3) }) // should the test be gone
		child(dir, os.Getenv(childEnv+"_STEP"))
		return
	}
	os.Exit(m.Run())
}

func child(dir, at string) {
	d, err := New(testConfig(dir, newIdentities()))
	if err != nil {
		fmt.Println(err)
		return
	}
	d.step = func(name string) {
		if name == at {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	fmt.Println("starting")
	fmt.Println(d.Run(context.Background()))
}

// agent starts a child; it ends with the test.
func agent(t *testing.T, dir, step string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+dir, childEnv+"_STEP="+step)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || strings.TrimSpace(line) != "starting" {
		t.Fatalf("the agent said %q, %v", line, err)
	}
	return cmd
}

// The agent is killed at every step of making and of removing a volume. The next one goes on: kubelet, which tries the call
// again or gives the pod up, gets it done, another pod's socket is there all the while, and nothing is left.
func TestKilled(t *testing.T) {
	t.Parallel()
	publishing := []string{"offered", "remembered", "made the folder", "bound the socket", "set the mode", "showed the socket"}
	removing := []string{"stopped", "removed the folder"}
	for _, step := range append(publishing, removing...) {
		for _, again := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/again=%v", step, again), func(t *testing.T) {
				dir, err := os.MkdirTemp("", "csi")
				if err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(dir)
				k := newKubelet(t, filepath.Join(dir, "kubelet"))
				r := &rig{t: t, k: k, cfg: testConfig(dir, nil)}
				p, other := testPod(1), testPod(2)
				removes := step == "stopped" || step == "removed the folder"

				first := agent(t, dir, "")
				k.register()
				r.publish(other, 1)
				if removes {
					r.publish(p, 1)
				}
				first.Process.Kill()
				first.Wait()

				killed := agent(t, dir, step)
				// The other pod's socket is made anew at the start, which passes some of the steps, too.
				if !removes && step != "offered" && step != "remembered" {
					killed.Wait()
				} else {
					r.eventuallyServed(other)
					k.register()
					if removes {
						err = k.unpublish(p)
					} else {
						err = k.publish(p, k.request(p, p.token(1)))
					}
					if err == nil || final(err) {
						t.Fatalf("error %v, want one that kubelet takes for unknown", err)
					}
					killed.Wait()
				}

				agent(t, dir, "")
				r.eventuallyServed(other)
				k.register()
				if again && !removes {
					r.publish(p, 1)
					r.served(p)
				} else if !removes { // kubelet does not know whether there is a volume, and removes it
					if err := k.writeNotes(p); err != nil {
						t.Fatal(err)
					}
				}
				if err := k.deletePod(p); err != nil {
					t.Fatal(err)
				}
				r.clean(p)
				r.served(other)
				if err := k.deletePod(other); err != nil {
					t.Fatal(err)
				}
				if left := tree(t, filepath.Join(k.dir, "pods")); len(left) != 1 {
					t.Errorf("left: %v", left)
				}
				if left := r.records(); len(left) != 0 {
					t.Errorf("remembered: %v", left)
				}
			})
		}
	}
}

// A first volume is killed in the making at every step, where nothing else is there.
func TestKilledFirst(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"offered", "remembered", "made the folder", "bound the socket", "set the mode", "showed the socket"} {
		t.Run(step, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "csi")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			k := newKubelet(t, filepath.Join(dir, "kubelet"))
			r := &rig{t: t, k: k, cfg: testConfig(dir, nil)}
			p := testPod(1)
			killed := agent(t, dir, step)
			k.register()
			if err := k.publish(p, k.request(p, p.token(1))); err == nil || final(err) {
				t.Fatalf("error %v, want one that kubelet takes for unknown", err)
			}
			killed.Wait()
			agent(t, dir, "")
			k.register()
			if err := k.deletePod(p); err != nil { // the pod is given up
				t.Fatal(err)
			}
			r.clean(p)
			if left := tree(t, filepath.Join(k.dir, "pods")); len(left) != 1 {
				t.Errorf("left: %v", left)
			}
			if left := r.records(); len(left) != 0 {
				t.Errorf("remembered: %v", left)
			}
		})
	}
}

func (r *rig) eventuallyServed(p podVolume) {
	r.t.Helper()
	eventually(r.t, "the socket", func() error {
		c, name, err := r.connect(p)
		if err != nil {
			return err
		}
		c.Close()
		if name != p.Name {
			r.t.Fatalf("the socket is that of %q", name)
		}
		return nil
	})
}
