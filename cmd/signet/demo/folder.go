package demo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/signet-ca/signet/api"
)

// folderPrefix starts the name of every demo's folder. It is short: a Unix socket's path has little room.
const folderPrefix = "signet-demo-"

// maxSocketPath is what every system has room for; Linux has for 107.
const maxSocketPath = 103

// folder is where a demo keeps everything, 0700, in memory where the system has a place for that.
type folder struct {
	path string
	lock *os.File // held while the demo lives; what is not held and not kept is swept by the next demo
}

// newFolder makes a folder in the first of bases that allows it, after it has removed what demos that were killed have left
// there.
func newFolder(bases []string) (*folder, error) {
	f := new(folder)
	var err error
	for _, base := range bases {
		sweep(base)
		if f.path, err = os.MkdirTemp(base, folderPrefix); err == nil { // 0700
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if len(f.agentSocket()) > maxSocketPath {
		return nil, errors.Join(api.E(api.SocketUnsafe, "%s is too long for the path of a Unix socket; set TMPDIR to a shorter one", f.path), f.remove())
	}
	// It gets its name once it is locked, so that no other demo finds it unlocked.
	if f.lock, err = os.Create(f.join("lock.new")); err == nil {
		_, err = tryLock(f.lock)
	}
	if err == nil {
		err = os.Rename(f.join("lock.new"), f.join("lock"))
	}
	if err == nil {
		err = os.Mkdir(f.join("logs"), 0o700)
	}
	if err != nil {
		return nil, errors.Join(err, f.remove())
	}
	return f, nil
}

// defaultBases are the places for the folder, best first: those in memory, then the system's for temporary files.
func defaultBases() []string {
	var list []string
	for _, dir := range []string{"/dev/shm", os.Getenv("XDG_RUNTIME_DIR")} {
		if dir != "" && inMemory(dir) {
			list = append(list, dir)
		}
	}
	return append(list, os.TempDir())
}

// sweep removes the folders of this user's demos that ended without cleaning up: those whose lock nobody holds. One that
// was kept on purpose has no lock. Failure to remove is not an error of this demo.
func sweep(base string) {
	old, _ := filepath.Glob(filepath.Join(base, folderPrefix+"*", "lock"))
	for _, path := range old {
		if !ours(filepath.Dir(path)) {
			continue
		}
		lock, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if free, err := tryLock(lock); free && err == nil {
			_ = os.RemoveAll(filepath.Dir(path))
		}
		_ = lock.Close()
	}
}

func (f *folder) join(elem ...string) string {
	return filepath.Join(append([]string{f.path}, elem...)...)
}

// log creates the log of one program, or appends to it.
func (f *folder) log(name string) (*os.File, error) {
	return os.OpenFile(f.join("logs", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

func (f *folder) remove() error {
	err := os.RemoveAll(f.path)
	if f.lock != nil {
		err = errors.Join(err, f.lock.Close())
	}
	return err
}

// keep leaves everything behind.
func (f *folder) keep() error {
	return errors.Join(os.Remove(f.join("lock")), f.lock.Close())
}

// keepLogs copies the logs, which hold no secrets, to where temporary files are, and returns their new folder. The
// folder itself holds keys: it is removed in any case.
func (f *folder) keepLogs() (string, error) {
	to, err := os.MkdirTemp("", folderPrefix+"logs-")
	if err != nil {
		return "", err
	}
	if err := os.CopyFS(to, os.DirFS(f.join("logs"))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return to, nil
}

// binaries returns the paths of the named programs, which must all be in dir; empty: the folder of the running program.
func binaries(dir string, names ...string) (map[string]string, error) {
	if dir == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		if self, err = filepath.EvalSymlinks(self); err != nil { // kubectl-signet may be a link
			return nil, err
		}
		dir = filepath.Dir(self)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	var missing []string
	for _, n := range names {
		path := filepath.Join(dir, n)
		if st, err := os.Stat(path); err != nil || st.IsDir() || st.Mode()&0o111 == 0 {
			missing = append(missing, n)
			continue
		}
		found[n] = path
	}
	if len(missing) > 0 {
		return nil, api.E(api.ProgramMissing, "%s is not in %s; from the source: go build -o %s ./cmd/...", strings.Join(missing, " and "), dir, dir)
	}
	return found, nil
}

// writeFile writes a file for this user alone and says which file failed.
func writeFile(path string, data []byte) error {
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return nil
}
