package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Both kinds of archives arrive, under the names that `signet install` gives them, with the digests that they had.
func TestPush(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	to := strings.TrimPrefix(server.URL, "http://") + "/team"
	index, sbom, oci := ociArchive(t)
	image, docker := dockerArchive(t)

	var out bytes.Buffer
	if err := run(t.Context(), []string{"-registry", to, oci, docker}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for called, want := range map[string]v1.Hash{
		"signet-ca:v1.2.3":               index,
		"signet-ca@" + sbom.String():     sbom,
		"signet-probe:1":                 image,
		"signet-probe@" + image.String(): image,
	} {
		ref, err := name.ParseReference(to + "/" + called)
		if err != nil {
			t.Fatal(err)
		}
		got, err := remote.Head(ref)
		if err != nil || got.Digest != want {
			t.Errorf("%s: %v, want %v: %v", called, got, want, err)
		}
	}
	if !strings.Contains(out.String(), "pushed "+to+"/signet-ca:v1.2.3\n") {
		t.Errorf("it says %q", &out)
	}
}

func TestPushRefused(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	server.Close()
	to := strings.TrimPrefix(server.URL, "http://")
	_, docker := dockerArchive(t)
	hollow := filepath.Join(t.TempDir(), "hollow.tar")
	if err := os.WriteFile(hollow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"no registry":        {docker},
		"nothing to push":    {"-registry", to},
		"nobody there":       {"-registry", to, docker},
		"no such archive":    {"-registry", to, docker + "x"},
		"nothing in it":      {"-registry", to, hollow},
		"a name that is not": {"-registry", "Not A Name", docker},
	} {
		t.Run(name, func(t *testing.T) {
			if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
				t.Error("no error")
			}
		})
	}
}

// ociArchive is one as tools/images makes it: an index with a name, and beside it what refers to it.
func ociArchive(t *testing.T) (index, beside v1.Hash, file string) {
	t.Helper()
	dir := t.TempDir()
	idx, err := random.Index(100, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	idx = mutate.IndexMediaType(idx, types.OCIImageIndex)
	artifact, err := random.Image(100, 1)
	if err != nil {
		t.Fatal(err)
	}
	artifact = mutate.MediaType(artifact, types.OCIManifestSchema1)
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendIndex(idx, layout.WithAnnotations(map[string]string{"io.containerd.image.name": "localhost/signet-ca:v1.2.3"})); err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(artifact); err != nil {
		t.Fatal(err)
	}
	if index, err = idx.Digest(); err != nil {
		t.Fatal(err)
	}
	if beside, err = artifact.Digest(); err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "signet-ca.tar")
	pack(t, dir, file)
	return index, beside, file
}

// dockerArchive is one as the tests of the cluster make it.
func dockerArchive(t *testing.T) (v1.Hash, string) {
	t.Helper()
	image, err := random.Image(100, 1)
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("localhost/signet-probe:1", name.WithDefaultRegistry(""))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "signet-probe-1.tar")
	if err := tarball.WriteToFile(file, tag, image); err != nil {
		t.Fatal(err)
	}
	read, err := tarball.ImageFromPath(file, &tag)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := read.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest, file
}

// pack makes an archive of a folder.
func pack(t *testing.T, dir, file string) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), os.WriteFile(file, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
}
