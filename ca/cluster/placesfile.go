package cluster

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/latest"
)

// publishedFiles are the names of the files, the one that agents believe first.
var publishedFiles = [2]string{BundleJSON, BundlePEM}

// files is what is known of the files of a FilePublisher, which are read whenever somebody asks. The zero value is ready.
type files struct {
	told latest.Value[struct{}]

	mu   sync.Mutex
	last *ca.Bundle        // that was to be written last; nil: none yet
	want map[string]string // its documents
	of   [len(publishedFiles)]struct {
		place
		read string // what place holds
	}
}

// Copies implements ca.CopyTeller.
func (p *FilePublisher) Copies() ([]journal.Copy, <-chan struct{}) {
	_, changed := p.files.told.Get()
	p.files.mu.Lock()
	defer p.files.mu.Unlock()
	p.files.look(p.dir)
	var list []journal.Copy
	for i, name := range publishedFiles {
		list = append(list, p.files.of[i].copy(placeFile, name, ""))
	}
	return list, changed
}

// note keeps how an attempt to publish ended.
func (f *files) note(dir string, b *ca.Bundle, ended error) {
	want, err := documents(b)
	if err != nil {
		return
	}
	f.mu.Lock()
	f.last, f.want = b, want
	f.look(dir)
	for i := range f.of {
		if f.of[i].held == heldOf(b) {
			f.of[i].ended(nil)
		} else {
			f.of[i].ended(ended)
		}
	}
	f.mu.Unlock()
	f.told.Set(struct{}{})
}

// look reads the files, while mu is held. Of a bundle.pem that is not what was to be written nobody can tell the generation.
func (f *files) look(dir string) {
	for i, name := range publishedFiles {
		is := &f.of[i]
		data, err := os.ReadFile(filepath.Join(dir, name))
		switch text := string(data); {
		case err != nil: // nobody can read it
			is.holds(journal.Held{})
			is.read = ""
			if !errors.Is(err, fs.ErrNotExist) {
				is.ended(err)
			}
		case f.last != nil && text == f.want[name]:
			is.holds(heldOf(f.last))
			is.read = text
		case text != is.read:
			is.holds(journal.Held{Generation: api.FromSequence(publishedSequence(data))})
			is.read = text
		}
	}
}
