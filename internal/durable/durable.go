// Package durable puts files on disk so that a crash leaves the old content or the new, and opens files and folders
// that hold secrets only when nobody else can read or replace them.
//
// Everything that Signet must find again after a power failure goes through here, for one reason: the order of
// write, fsync, rename and fsync of the folder is easy to get wrong and its mistakes show only once the power is gone.
// An error says at which step it happened, because that decides what is known afterwards: up to the rename the old
// content stands; from then on the outcome is unknown, and the caller must end and read again rather than retry.
package durable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// ErrUnknown is matched by errors.Is when the new content may or may not survive a power failure. It is seen by readers
// now. A caller that keeps state ends the process: an unknown outcome is never retried.
var ErrUnknown = errors.New("it is not known whether the write survives a power failure")

// A Step is one act of a durable write, in the order in which they happen.
type Step string

// The steps of WriteFile and CreateFile.
const (
	StepCreate  Step = "create a temporary file"
	StepMode    Step = "set the mode"
	StepWrite   Step = "write"
	StepSync    Step = "sync"
	StepClose   Step = "close"
	StepRename  Step = "put in place"
	StepSyncDir Step = "sync the folder"
)

// A WriteError says at which step a write failed. Unless it matches ErrUnknown, the path is as it was before the call.
// No temporary file is left behind in either case.
type WriteError struct {
	Step Step
	Path string // of the file that was to be written
	Err  error
}

// Error returns "PATH: cannot STEP: cause", without the name of the temporary file.
func (e *WriteError) Error() string {
	err := e.Err
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	} else if le, ok := errors.AsType[*os.LinkError](err); ok {
		err = le.Err
	}
	return fmt.Sprintf("%s: cannot %s: %v", e.Path, e.Step, err)
}

// Unwrap returns the cause.
func (e *WriteError) Unwrap() error { return e.Err }

// Is reports whether target is ErrUnknown and the outcome is unknown: the name is in place and its folder may not be on
// disk, or the disk failed at the rename itself. That a new name could neither be finished nor taken back is in Err.
func (e *WriteError) Is(target error) bool {
	unknown := e.Step == StepSyncDir || e.Step == StepRename && errors.Is(e.Err, syscall.EIO)
	return target == ErrUnknown && unknown
}

// WriteFile replaces the content of path by data, or makes the file, with exactly mode whatever the umask. When it
// returns nil, the new content survives a power failure. A reader sees the old content or the new, never a part. A
// symbolic link at path is replaced, not followed. Every error is a *WriteError.
//
// Concurrent calls for one path are safe; which content wins is open. A killed process may leave a temporary file
// behind; RemoveTemporary finds it.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return put(path, data, mode, os.Rename, noFault)
}

// CreateFile is WriteFile for a path at which nothing may exist yet: it fails with an error that matches fs.ErrExist
// and leaves what is there untouched. Of concurrent calls for one path, one succeeds.
func CreateFile(path string, data []byte, mode fs.FileMode) error {
	return put(path, data, mode, linkNew, noFault)
}

// linkNew gives the file its final name only if that name is free, which rename cannot say.
func linkNew(tmp, path string) error {
	if err := os.Link(tmp, path); err != nil {
		return err
	}
	err := os.Remove(tmp)
	if err == nil {
		return nil
	}
	if rerr := os.Remove(path); rerr != nil { // as if it had never been: the caller is told that it failed
		return errors.Join(err, rerr, ErrUnknown)
	}
	return err
}

// noFault is what put asks before each step outside tests.
func noFault(Step) error { return nil }

// put writes data beside path and moves it there. Fault lets a test fail any step, as a disk would.
func put(path string, data []byte, mode fs.FileMode, move func(tmp, path string) error, fault func(Step) error) error {
	dir := filepath.Dir(path)
	tmp := filepath.Join(dir, tempPrefix+rand.Text())
	var f *os.File
	steps := []struct {
		name Step
		do   func() error
	}{
		{StepCreate, func() (err error) {
			f, err = os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			return err
		}},
		{StepMode, func() error { return f.Chmod(mode) }},
		{StepWrite, func() error { _, err := f.Write(data); return err }},
		{StepSync, func() error { return f.Sync() }},
		{StepClose, func() error { return f.Close() }},
		{StepRename, func() error { return move(tmp, path) }},
		{StepSyncDir, func() error { return SyncDir(dir) }},
	}
	for _, s := range steps {
		err := fault(s.name)
		if err == nil {
			err = s.do()
		}
		if err != nil {
			if f != nil && s.name != StepSyncDir {
				f.Close() // closed already after StepClose, which does no harm
				os.Remove(tmp)
			}
			return &WriteError{Step: s.name, Path: path, Err: err}
		}
	}
	return nil
}

// SyncDir makes the names in the folder dir durable: files made, renamed or removed there stay so after a power failure.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// SyncFile makes the file at path durable as it is now, with its name. Whoever finds a file and builds on it calls this
// first: the process that put it there may have been killed before it was safe.
func SyncFile(path string) error {
	f, err := openNonblock(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// tempPrefix begins the name of every temporary file, so that RemoveTemporary finds what a killed process left.
const tempPrefix = ".signet-tmp-"

// RemoveTemporary removes the temporary files that killed processes left in dir; they may hold secrets. Call it at
// start, while no other process writes there: it would take the file from under a write in progress.
func RemoveTemporary(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), tempPrefix) {
			errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
