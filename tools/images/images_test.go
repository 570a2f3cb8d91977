package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

var created = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// testConfig makes all images of the sources in root.
func testConfig(root, out string) config {
	return config{
		root: root, out: out, version: "v0.0.0-test+build", revision: "0123456789", created: created, repository: "localhost",
		images: imageSpecs, platforms: platforms, goCommand: "go",
	}
}

// made is the folder with all images, made once for all tests.
var made = sync.OnceValues(func() (string, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	out, err := os.MkdirTemp("", "signet-images-test-")
	if err != nil {
		return "", err
	}
	madeIn = out
	c := testConfig(root, filepath.Join(out, "images"))
	return c.out, makeImages(context.Background(), c, io.Discard)
})

// madeIn is the folder above it, once there is one.
var madeIn string

func TestMain(m *testing.M) {
	code := m.Run()
	if madeIn != "" {
		os.RemoveAll(madeIn)
	}
	os.Exit(code)
}

func images(t *testing.T) string {
	t.Helper()
	out, err := made()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// unpacked is an image's archive as a folder.
func unpacked(t *testing.T, name string) layout.Path {
	t.Helper()
	f, err := os.Open(filepath.Join(images(t), name+".tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	last := ""
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return layout.Path(dir)
		} else if err != nil {
			t.Fatal(err)
		}
		if h.Name <= last {
			t.Errorf("%s comes after %s", h.Name, last)
		}
		last = h.Name
		if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(time.Unix(0, 0)) || h.Uname != "" {
			t.Errorf("%s has owner or time of its own: %+v", h.Name, h)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			err = os.Mkdir(path, 0o755)
		} else {
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, data, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// threat: N02, N08
func TestLayout(t *testing.T) {
	for _, spec := range imageSpecs {
		t.Run(spec.name, func(t *testing.T) {
			path := unpacked(t, spec.name)
			top, err := path.ImageIndex()
			if err != nil {
				t.Fatal(err)
			}
			if err := validate.Index(top); err != nil {
				t.Error(err)
			}
			m, err := top.IndexManifest()
			if err != nil {
				t.Fatal(err)
			}
			if len(m.Manifests) != 1+len(platforms) {
				t.Fatalf("%d entries in index.json", len(m.Manifests))
			}
			if got := m.Manifests[0].Annotations["io.containerd.image.name"]; got != "localhost/"+spec.name+":v0.0.0-test_build" {
				t.Errorf("its name is %s", got)
			}
			index, err := top.ImageIndex(m.Manifests[0].Digest)
			if err != nil {
				t.Fatal(err)
			}
			im, err := index.IndexManifest()
			if err != nil {
				t.Fatal(err)
			}
			for i, arch := range platforms {
				desc := im.Manifests[i]
				if desc.Platform == nil || desc.Platform.OS != "linux" || desc.Platform.Architecture != arch || desc.ArtifactType != "" {
					t.Errorf("image %d is described as %+v", i, desc)
				}
				img, err := index.Image(desc.Digest)
				if err != nil {
					t.Fatal(err)
				}
				checkImage(t, spec, arch, img)
				checkReferrer(t, spec, arch, path, m.Manifests[1+i], desc)
			}
			digests, err := os.ReadFile(filepath.Join(images(t), "digests.txt"))
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range []string{m.Manifests[0].Digest.String(), m.Manifests[1].Digest.String(), im.Manifests[0].Digest.String(), im.Manifests[1].Digest.String()} {
				if !bytes.Contains(digests, []byte(d)) {
					t.Errorf("digests.txt does not tell of %s", d)
				}
			}
		})
	}
}

// checkImage reads one platform's image: who it runs as, and that it has these files and no other.
func checkImage(t *testing.T, spec imageSpec, arch string, img v1.Image) {
	t.Helper()
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Architecture != arch || cfg.OS != "linux" || !cfg.Created.Equal(created) || cfg.Config.User != "65532:65532" ||
		!slices.Equal(cfg.Config.Entrypoint, []string{"/usr/bin/" + spec.name}) {
		t.Errorf("configuration: %+v", cfg)
	}
	for label, want := range map[string]string{
		"version": "v0.0.0-test+build", "revision": "0123456789", "licenses": "Apache-2.0", "source": "https://github.com/signet-ca/signet",
		"created": "2026-01-01T00:00:00Z", "title": spec.title, "description": spec.description,
	} {
		if got := cfg.Config.Labels["org.opencontainers.image."+label]; got != want {
			t.Errorf("label %s is %q", label, got)
		}
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatal(len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var got []string
	for files := tar.NewReader(r); ; {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.Name)
		if h.Mode&0o022 != 0 || h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(time.Unix(0, 0)) {
			t.Errorf("%s: %+v", h.Name, h)
		}
	}
	want := []string{"etc/", "etc/group", "etc/passwd", "usr/", "usr/bin/"}
	for _, name := range slices.Sorted(slices.Values(spec.binaries())) {
		want = append(want, "usr/bin/"+name)
	}
	if !slices.Equal(got, want) {
		t.Errorf("it has the files %v", got)
	}
}

// checkReferrer follows the SBOM from index.json to the image that it is about, and compares it with the file beside.
func checkReferrer(t *testing.T, spec imageSpec, arch string, path layout.Path, desc, subject v1.Descriptor) {
	t.Helper()
	raw, err := path.Bytes(desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if desc.ArtifactType != spdxType || m.ArtifactType != spdxType || m.Subject == nil || m.Subject.Digest != subject.Digest || m.Subject.Size != subject.Size || len(m.Layers) != 1 {
		t.Fatalf("the SBOM's manifest is %s", raw)
	}
	doc, err := path.Bytes(m.Layers[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	beside, err := os.ReadFile(filepath.Join(images(t), spec.name+"-"+arch+".spdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(doc, beside) {
		t.Error("the SBOM in the archive is not that beside it")
	}
	var sbom spdxDocument
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&sbom); err != nil {
		t.Fatal(err)
	}
	if sbom.SPDXVersion != "SPDX-2.3" || len(sbom.Packages) < 10 || len(sbom.Relationships) < len(sbom.Packages) {
		t.Errorf("SBOM of %d packages and %d relationships", len(sbom.Packages), len(sbom.Relationships))
	}
	related := map[string]bool{}
	for _, r := range sbom.Relationships {
		related[r.Related] = true
	}
	for i, p := range sbom.Packages {
		if !related[p.SPDXID] {
			t.Errorf("nothing is said of what %s is for", p.Name)
		}
		if names := spec.binaries(); i < len(names) && (p.Name != names[i] || p.Purpose != "APPLICATION" || len(p.Checksums) != 1) {
			t.Errorf("package %d is %+v, not %s", i, p, names[i])
		}
	}
	for _, p := range sbom.Packages {
		if p.LicenseDeclared == noAssertion || p.VersionInfo == "" {
			t.Errorf("%s %s: no licence or version found", p.Name, p.VersionInfo)
		}
	}
}

// The same sources make the same bytes in another folder.
//
// threat: N04
func TestReproducible(t *testing.T) {
	root := copySources(t)
	c := testConfig(root, filepath.Join(root, "elsewhere"))
	if err := makeImages(t.Context(), c, io.Discard); err != nil {
		t.Fatal(err)
	}
	first, second := sums(t, images(t)), sums(t, c.out)
	if len(first) != 1+len(imageSpecs)*(1+len(platforms)) || len(first) != len(second) {
		t.Errorf("%d and %d files", len(first), len(second))
	}
	for name, sum := range first {
		if second[name] != sum {
			t.Errorf("%s differs", name)
		}
	}
}

// In TestReproducible both builds take compiled packages from one cache. Here nothing is taken from it.
//
// threat: N04
func TestReproducibleCold(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles the agent from nothing: minutes on a small machine")
	}
	root := copySources(t)
	c := testConfig(root, filepath.Join(root, "elsewhere"))
	c.images, c.platforms = imageSpecs[1:2], platforms[:1]
	c.env = []string{"GOCACHE=" + t.TempDir()}
	if err := makeImages(t.Context(), c, io.Discard); err != nil {
		t.Fatal(err)
	}
	name := c.images[0].name + "-" + c.platforms[0] + ".spdx.json" // has the digest of the binary
	if sums(t, c.out)[name] != sums(t, images(t))[name] {
		t.Errorf("%s differs", name)
	}
}

// copySources copies what version control knows of, as it lies here, into a folder of another depth.
func copySources(t *testing.T) string {
	t.Helper()
	from := filepath.Join("..", "..")
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = from
	out, err := cmd.Output()
	if err != nil {
		t.Skip("no version control here to say what the sources are:", err)
	}
	to := filepath.Join(t.TempDir(), "a", "longer", "way", "to", "it")
	for name := range strings.SplitSeq(strings.Trim(string(out), "\x00"), "\x00") {
		data, err := os.ReadFile(filepath.Join(from, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed, and that is not committed
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(to, name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func sums(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][32]byte)
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[entry.Name()] = sha256.Sum256(data)
	}
	return all
}

// A tool that others wrote reads the archives as well.
func TestSkopeo(t *testing.T) {
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Skip("there is no skopeo here")
	}
	for _, spec := range imageSpecs {
		for _, arch := range platforms {
			out, err := exec.CommandContext(t.Context(), "skopeo", "inspect", "--override-os=linux", "--override-arch="+arch, "--config",
				"oci-archive:"+filepath.Join(images(t), spec.name+".tar")+":v0.0.0-test_build").CombinedOutput()
			if err != nil {
				t.Errorf("%s for %s: %v\n%s", spec.name, arch, err, out)
			} else if !bytes.Contains(out, []byte(`"`+arch+`"`)) {
				t.Errorf("%s for %s: it found %s", spec.name, arch, out)
			}
		}
	}
}

func TestCheckBinary(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := checkBinary(self, "arm64", nil); err == nil || !strings.Contains(err.Error(), "it is for") && !strings.Contains(err.Error(), "static") && !strings.Contains(err.Error(), "built with") {
		t.Errorf("the binary of this test passed: %v", err)
	}
	for _, tt := range []struct {
		data, folder, want string
	}{
		{"at /home/someone/signet/ca/ca.go", "/home/someone/signet", "/home/someone/signet"},
		{"at /home/someone/signet/ca/ca.go", "/home/someone/signet/", "/home/someone/signet"},
		{"at /home/someone/signets/ca.go", "/home/someone/signet", ""},
		{"github.com/signet-ca/signet/ca/ca.go", "/home/someone/signet", ""},
		{"/go/x", "/go", ""}, {"/x", "/", ""}, {"x/", "", ""},
	} {
		if got := machinePath([]byte(tt.data), []string{tt.folder}); got != tt.want {
			t.Errorf("%q in %q: %q", tt.folder, tt.data, got)
		}
	}
}

func TestLicenses(t *testing.T) {
	const bsd = "Redistribution and use in source and binary forms, with or\nwithout modification"
	for text, want := range map[string]string{
		"":                                    "",
		bsd:                                   "BSD-2-Clause",
		"all rights reserved":                 "",
		bsd + " * Neither the name of Google": "BSD-3-Clause",
		"  Apache License\n   Version 2.0, January 2004": "Apache-2.0",
		"Mozilla Public License, version 2.0":            "MPL-2.0",
		"Apache License Version 2.0 ... " + bsd:          "Apache-2.0 BSD-2-Clause",
	} {
		if got := strings.Join(licenses([]byte(text)), " "); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		args []string
		tag  string // empty: refused
	}{
		{nil, "devel"},
		{[]string{"-version", "v1.2.3+dirty", "-created", "1767225600"}, "v1.2.3_dirty"},
		{[]string{"-created", "yesterday"}, ""},
		{[]string{"signet-ca"}, ""},
	} {
		c, err := parse(tt.args, io.Discard)
		if (err == nil) != (tt.tag != "") || err == nil && c.tag() != tt.tag {
			t.Errorf("%v: tag %q, %v", tt.args, c.tag(), err)
		}
		if err == nil && len(tt.args) == 4 && !c.created.Equal(created) {
			t.Errorf("created %v", c.created)
		}
	}
	for _, version := range []string{"", "+", ".", "v1 -X main.x=y", "v1/2", "v1'", strings.Repeat("x", 129)} {
		if err := makeImages(t.Context(), config{version: version}, io.Discard); err == nil || !strings.Contains(err.Error(), "no tag") {
			t.Errorf("version %q: %v", version, err)
		}
	}
}
