// Command push copies images from archives into a registry, as `docker push` would, without Docker.
//
//	push -registry registry.example.org/signet bin/images/signet-ca.tar bin/images/signet-agent.tar
//
// An archive is what tools/images makes, an OCI layout with everything that refers to the image beside it, or what
// `docker save` makes. An image that is called localhost/NAME:TAG there is REGISTRY/NAME:TAG then, to the byte. Who it is
// to the registry is what `docker login` or `podman login` left behind; it asks for no password and keeps none.
package main

import (
	"archive/tar"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// local is what the archives' names begin with.
const local = "localhost/"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "push:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("push", flag.ContinueOnError)
	flags.SetOutput(stderr)
	registry := flags.String("registry", "", "what the images' names are to begin with: HOST[:PORT][/PATH]")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *registry == "" || flags.NArg() == 0 {
		return errors.New("usage: push -registry HOST[:PORT][/PATH] ARCHIVE, one or more")
	}
	p := pusher{registry: *registry, stdout: stdout, options: []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}}
	for _, archive := range flags.Args() {
		if err := p.archive(archive); err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(archive), err)
		}
	}
	return nil
}

type pusher struct {
	registry string
	stdout   io.Writer
	options  []remote.Option
}

// archive pushes what is in one archive.
func (p pusher) archive(file string) error {
	dir, err := os.MkdirTemp("", "push-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := unpack(file, dir); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "index.json")); err == nil {
		return p.layout(dir)
	}
	opener := func() (io.ReadCloser, error) { return os.Open(file) }
	manifest, err := tarball.LoadManifest(opener)
	if err != nil {
		return err
	}
	for _, d := range manifest {
		for _, tag := range d.RepoTags {
			from, err := name.NewTag(tag, name.WithDefaultRegistry(""))
			if err != nil {
				return err
			}
			image, err := tarball.Image(opener, &from)
			if err != nil {
				return err
			}
			if err := p.write(tag, image); err != nil {
				return err
			}
		}
	}
	return nil
}

// layout pushes an OCI layout: what has a name by it, and the rest, which refers to it, by digest beside it.
func (p pusher) layout(dir string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	repository := ""
	for _, d := range manifest.Manifests {
		called := d.Annotations["io.containerd.image.name"]
		if called != "" {
			repository, _, _ = strings.Cut(strings.TrimPrefix(called, local), ":")
		} else if repository == "" {
			return fmt.Errorf("%s has no name, and nothing before it", d.Digest)
		} else {
			called = repository + "@" + d.Digest.String()
		}
		var what remote.Taggable
		if d.MediaType.IsIndex() {
			what, err = index.ImageIndex(d.Digest)
		} else {
			what, err = index.Image(d.Digest)
		}
		if err != nil {
			return err
		}
		if err := p.write(called, what); err != nil {
			return err
		}
	}
	return nil
}

// write pushes one manifest and all that it needs.
func (p pusher) write(called string, what remote.Taggable) error {
	to, err := name.ParseReference(path.Join(p.registry, strings.TrimPrefix(called, local)))
	if err != nil {
		return err
	}
	switch what := what.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(to, what, p.options...)
	case v1.Image:
		err = remote.Write(to, what, p.options...)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.stdout, "pushed", to)
	return err
}

// unpack writes the files of an archive of images. Of names it takes no more than such an archive has: folders below.
func unpack(file, dir string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := root.MkdirAll(path.Dir(h.Name), 0o755); err != nil {
			return err
		}
		out, err := root.Create(h.Name)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, r)
		if err = errors.Join(err, out.Close()); err != nil {
			return err
		}
	}
}
