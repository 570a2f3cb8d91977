package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// user is whom an image's process runs as where nobody says otherwise. The agent too: only its per-pod sockets need uid 0,
// because kubelet's folders are root's, and then the DaemonSet says so where a reviewer sees it.
const user = "65532:65532"

const (
	passwd = "root:x:0:0:root:/nonexistent:/nonexistent\nnonroot:x:65532:65532:nonroot:/nonexistent:/nonexistent\n"
	group  = "root:x:0:\nnonroot:x:65532:\n"
)

const (
	spdxType  = "application/spdx+json"
	emptyType = "application/vnd.oci.empty.v1+json" // OCI image-spec, "Guidance for an empty descriptor"
	emptyJSON = "{}"
)

// archive writes one image with its SBOMs, as SPEC.tar and SPEC-ARCH.spdx.json, and returns its lines of digests.txt.
func (c config) archive(spec imageSpec, binaries string, e goEnvironment) (string, error) {
	dir, err := os.MkdirTemp(binaries, "layout-")
	if err != nil {
		return "", err
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return "", err
	}
	var lines, platformLines strings.Builder
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var sboms []v1.Image
	for _, arch := range c.platforms {
		contents := make(map[string][]byte)
		size := 0
		for _, name := range spec.binaries() {
			if contents[name], err = os.ReadFile(filepath.Join(binaries, arch, name)); err != nil {
				return "", err
			}
			size += len(contents[name])
		}
		img, err := c.image(spec, arch, contents)
		if err != nil {
			return "", err
		}
		desc, err := partial.Descriptor(img)
		if err != nil {
			return "", err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		doc, err := c.sbom(spec, arch, contents, e)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(c.out, spec.name+"-"+arch+".spdx.json"), doc, 0o644); err != nil {
			return "", err
		}
		artifact, err := referrer(doc, *desc, c.created)
		if err != nil {
			return "", err
		}
		sboms = append(sboms, artifact)
		if err := describe(&platformLines, spec, arch, img, artifact, size); err != nil {
			return "", err
		}
	}
	index = mutate.Annotations(index, c.labels(spec)).(v1.ImageIndex)
	// The name is for containerd, the tag for everybody else (OCI image-spec, "Pre-Defined Annotation Keys").
	if err := path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          c.repository + "/" + spec.name + ":" + c.tag(),
		"org.opencontainers.image.ref.name": c.tag(),
	})); err != nil {
		return "", err
	}
	for _, artifact := range sboms {
		if err := path.AppendImage(artifact); err != nil {
			return "", err
		}
	}
	digest, err := index.Digest()
	if err != nil {
		return "", err
	}
	size, err := writeTar(dir, filepath.Join(c.out, spec.name+".tar"))
	if err != nil {
		return "", err
	}
	fmt.Fprintf(&lines, "%-12s  index       %s  archive %s\n", spec.name, digest, mebibytes(size))
	return lines.String() + platformLines.String(), nil
}

func describe(w io.Writer, spec imageSpec, arch string, img, artifact v1.Image, binary int) error {
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	sbom, err := artifact.Digest()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%-12s  linux/%s %s  binary %s, layer %s\n", spec.name, arch, digest, mebibytes(int64(binary)), mebibytes(m.Layers[0].Size))
	fmt.Fprintf(w, "%-12s  sbom/%s  %s\n", spec.name, arch, sbom)
	return nil
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// labels are the annotations that the OCI image-spec names, of image and index alike.
func (c config) labels(spec imageSpec) map[string]string {
	labels := map[string]string{
		"org.opencontainers.image.title":       spec.title,
		"org.opencontainers.image.description": spec.description,
		"org.opencontainers.image.version":     c.version,
		"org.opencontainers.image.source":      "https://" + module,
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.created":     c.created.Format(time.RFC3339),
	}
	if c.revision != "" {
		labels["org.opencontainers.image.revision"] = c.revision
	}
	return labels
}

// image is one platform's image.
func (c config) image(spec imageSpec, arch string, binaries map[string][]byte) (v1.Image, error) {
	files, err := rootFS(binaries)
	if err != nil {
		return nil, err
	}
	// gzip and not zstd: containerd before 1.5 and Docker before 23 read nothing else.
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithCompressionLevel(gzip.DefaultCompression), tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.ConfigFile(img, &v1.ConfigFile{
		OS: "linux", Architecture: arch, Created: v1.Time{Time: c.created}, RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			User:       user,
			WorkingDir: "/",
			Env:        []string{"PATH=/usr/bin"}, // for `kubectl exec`
			Entrypoint: []string{"/usr/bin/" + spec.name},
			Labels:     c.labels(spec),
		},
	})
	if err != nil {
		return nil, err
	}
	img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: c.created}, CreatedBy: "make images"}})
	if err != nil {
		return nil, err
	}
	return noArtifact{mutate.Annotations(img, c.labels(spec)).(v1.Image)}, nil
}

// noArtifact keeps the library from calling an image an artifact of the type of its configuration in the index: the OCI
// image-spec has artifactType for what is not an image.
type noArtifact struct{ v1.Image }

// ArtifactType is looked for by partial.Descriptor.
func (noArtifact) ArtifactType() (string, error) { return "", nil }

// rootFS is the whole of an image's files, as a tar: parents first, then by name, all root's and none writable.
func rootFS(binaries map[string][]byte) ([]byte, error) {
	type file struct {
		name string
		mode int64
		body string
	}
	files := []file{
		{"etc/", 0o755, ""},
		{"etc/group", 0o444, group},
		{"etc/passwd", 0o444, passwd},
		{"usr/", 0o755, ""},
		{"usr/bin/", 0o755, ""},
	}
	for _, name := range slices.Sorted(maps.Keys(binaries)) {
		files = append(files, file{"usr/bin/" + name, 0o555, string(binaries[name])})
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.body)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

// An artifact is a manifest that carries one file and no image; with partial.CompressedToImage it is written as images are.
type artifact struct {
	manifest []byte
	file     v1.Layer
}

func (a artifact) RawManifest() ([]byte, error)                             { return a.manifest, nil }
func (artifact) RawConfigFile() ([]byte, error)                             { return []byte(emptyJSON), nil }
func (artifact) MediaType() (types.MediaType, error)                        { return types.OCIManifestSchema1, nil }
func (a artifact) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) { return a.layer(h) }

func (a artifact) layer(h v1.Hash) (v1.Layer, error) {
	if digest, err := a.file.Digest(); err != nil || digest != h {
		return nil, errors.Join(err, fmt.Errorf("no layer %s", h))
	}
	return a.file, nil
}

// referrer is the manifest that attaches an SBOM to the image that subject describes (OCI image-spec 1.1, "Guidelines for
// Artifact Usage"): a registry lists it among the image's referrers.
func referrer(sbom []byte, subject v1.Descriptor, created time.Time) (v1.Image, error) {
	file := static.NewLayer(sbom, spdxType)
	desc, err := partial.Descriptor(file)
	if err != nil {
		return nil, err
	}
	digest, size, err := v1.SHA256(strings.NewReader(emptyJSON))
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  spdxType,
		Config:        v1.Descriptor{MediaType: emptyType, Digest: digest, Size: size},
		Layers:        []v1.Descriptor{*desc},
		Subject:       &v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations:   map[string]string{"org.opencontainers.image.created": created.Format(time.RFC3339)},
	})
	if err != nil {
		return nil, err
	}
	return partial.CompressedToImage(artifact{manifest: manifest, file: file})
}

// writeTar packs an image layout and returns the archive's size. Order, modes, owners and times are the same everywhere:
// filepath.WalkDir goes by name.
func writeTar(dir, path string) (int64, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		rel, rerr := filepath.Rel(dir, name)
		if err = errors.Join(err, rerr); err != nil || rel == "." {
			return err
		}
		h := &tar.Header{Name: filepath.ToSlash(rel), Mode: 0o644, Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		if d.IsDir() {
			h.Name, h.Mode, h.Typeflag = h.Name+"/", 0o755, tar.TypeDir
			return w.WriteHeader(h)
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		h.Size = int64(len(data))
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	if err = errors.Join(err, w.Close()); err != nil {
		return 0, err
	}
	return int64(b.Len()), os.WriteFile(path, b.Bytes(), 0o644)
}
