package nodes

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sweep removes what runs before this one left behind because they were killed.
func sweep() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), workPattern+"*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		lock, err := lockFolder(dir)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue // somebody else's, or gone by now
		}
		if err == nil {
			err = remove(dir)
			lock.Close()
		}
		if err != nil {
			return fmt.Errorf("removing what an earlier run left: %w", err)
		}
	}
	return nil
}

// remove takes away what outlives the namespaces of the run with this folder. Its processes have ended, or are about to.
func remove(dir string) error {
	var err error
	for range 50 {
		if err = removeCgroups(filepath.Base(dir)); err == nil {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	return errors.Join(err, restoreSysctls(dir), os.RemoveAll(dir))
}

const cgroupRoot = "/sys/fs/cgroup"

// cgroupHierarchies are the folders below which a cgroup is made: one, or in the first version one for each controller.
func cgroupHierarchies() ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		return []string{cgroupRoot}, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, err
	}
	var list []string
	for _, e := range entries {
		if e.IsDir() { // the links are other names of the same
			list = append(list, filepath.Join(cgroupRoot, e.Name()))
		}
	}
	return list, nil
}

// makeCgroups makes a cgroup by that path in every hierarchy, ready to have others below it.
func makeCgroups(path string) error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	for _, parent := range hierarchies {
		for part := range strings.SplitSeq(path, "/") {
			if controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers")); err == nil {
				for c := range strings.FieldsSeq(string(controllers)) { // one that is in use otherwise is not to be had
					_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+c), 0)
				}
			}
			dir := filepath.Join(parent, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // of the first version: empty lets nobody in
				if set, err := os.ReadFile(filepath.Join(parent, file)); err == nil {
					if err := os.WriteFile(filepath.Join(dir, file), set, 0); err != nil {
						return err
					}
				}
			}
			parent = dir
		}
	}
	return nil
}

// removeCgroups removes a cgroup and all below it from every hierarchy.
func removeCgroups(path string) error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range hierarchies {
		var dirs []string
		_ = filepath.WalkDir(filepath.Join(h, path), func(p string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) { // the deepest first
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("%s: %w", dir, err))
			}
		}
	}
	return errors.Join(errs...)
}

// sysctls are what kubelet sets for the whole machine.
var sysctls = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// saveSysctls remembers them in the run's folder.
func saveSysctls(dir string) error {
	values := make(map[string]string)
	for _, name := range sysctls {
		if value, err := os.ReadFile("/proc/sys/" + name); err == nil {
			values[name] = string(value)
		}
	}
	data, err := json.Marshal(values)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "sysctls.json"), data, 0o600)
}

// restoreSysctls sets them to what they were.
func restoreSysctls(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "sysctls.json"))
	if err != nil {
		return nil //nolint:nilerr // killed before kubelet could have set any
	}
	var values map[string]string
	if err := json.Unmarshal(data, &values); err != nil {
		return err
	}
	var errs []error
	for name, value := range values {
		now, err := os.ReadFile("/proc/sys/" + name)
		if err == nil && string(now) != value {
			err = os.WriteFile("/proc/sys/"+name, []byte(value), 0)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
