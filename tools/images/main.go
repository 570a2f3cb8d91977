// Command images makes the container images of the binaries, as OCI archives, without Docker and without a registry.
//
//	images -root . -out bin/images -version v1.2.3 -created 1767225600
//
// Each image has two files for a runtime to read, /etc/passwd and /etc/group, and its static binary, that of the CA the
// operator's tool as well. It has no shell, no
// package manager and no CA certificates: whoever breaks into the process finds nothing to go on with, scanners have
// nothing to report but the binary's own modules, and whom a process believes is what its configuration names.
//
// The same sources, version, time and Go make the same bytes in any folder on any machine, so that whoever doubts an
// image builds his own and compares the digests. It is a module's own tool, apart from the product: what it links is not
// in the product's go.mod.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// platforms are what each image is made for; the operating system is always Linux.
var platforms = []string{"amd64", "arm64"}

// An imageSpec is one image: a binary of cmd/ under its name, and perhaps others beside it.
type imageSpec struct {
	name        string
	title       string
	description string
	also        []string
}

// binaries are all that are in the image, the one that it starts first.
func (s imageSpec) binaries() []string { return append([]string{s.name}, s.also...) }

// imageSpecs are all images, in the order in which they are told.
var imageSpecs = []imageSpec{
	// The operator's tool lies where the admin socket is: `kubectl exec` needs no way to that socket from elsewhere.
	{"signet-ca", "Signet CA", "The certificate authority of a SPIFFE trust domain", []string{"signet"}},
	{"signet-agent", "Signet agent", "Keeps the SVIDs of a node's workloads fresh and serves them", nil},
	{"signet", "Signet", "The operator's tool", nil},
}

// config is what the images are made from. All of it ends up in them, the folders aside.
type config struct {
	root       string    // the product's sources
	out        string    // where the files go; those of the same names are replaced
	version    string    // of the binaries and in the labels
	revision   string    // commit of the sources; empty leaves the label out
	created    time.Time // in UTC, whole seconds
	repository string    // what an image's name begins with, like localhost in localhost/signet-ca:v1.2.3
	images     []imageSpec
	platforms  []string
	goCommand  string
	env        []string // added to the environment of the Go command
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := parse(os.Args[1:], os.Stderr)
	if err == nil {
		err = makeImages(ctx, c, os.Stdout)
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "images:", err)
		stop()
		os.Exit(1)
	}
}

// parse reads the command line.
func parse(args []string, stderr io.Writer) (config, error) {
	c := config{images: imageSpecs, platforms: platforms}
	var created int64
	flags := flag.NewFlagSet("images", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.root, "root", ".", "the product's sources")
	flags.StringVar(&c.out, "out", "bin/images", "where the files go")
	flags.StringVar(&c.version, "version", "devel", "the version of the binaries")
	flags.StringVar(&c.revision, "revision", "", "the commit of the sources")
	flags.Int64Var(&created, "created", 0, "when the sources were made, in seconds since 1970 (SOURCE_DATE_EPOCH)")
	flags.StringVar(&c.repository, "repository", "localhost", "what an image's name begins with")
	flags.StringVar(&c.goCommand, "go", "go", "the Go command")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	if flags.NArg() > 0 {
		return config{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	c.created = time.Unix(created, 0).UTC()
	var err error
	if c.root, err = filepath.Abs(c.root); err != nil {
		return config{}, err
	}
	c.out, err = filepath.Abs(c.out)
	return c, err
}

// A version goes into the linker's flags and into a tag, which has at most 128 characters (OCI distribution-spec, "Pulling
// manifests").
var validVersion = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$`)

// tag is the version as a tag may be written: without the plus sign of semantic versions.
func (c config) tag() string { return strings.ReplaceAll(c.version, "+", "_") }

// makeImages builds the binaries of all platforms, checks them, and writes the archives, the SBOMs and digests.txt.
func makeImages(ctx context.Context, c config, stdout io.Writer) error {
	if !validVersion.MatchString(c.version) {
		return fmt.Errorf("no tag can be made from version %q", c.version)
	}
	work, err := os.MkdirTemp("", "signet-images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	goEnv, err := c.goEnv(ctx)
	if err != nil {
		return err
	}
	for _, arch := range c.platforms {
		if err := c.compile(ctx, arch, filepath.Join(work, arch), goEnv); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(c.out, 0o755); err != nil {
		return err
	}
	// Written last, so that where it is, all else is of the same run.
	list := filepath.Join(c.out, "digests.txt")
	if err := os.RemoveAll(list); err != nil {
		return err
	}
	var digests strings.Builder
	for _, spec := range c.images {
		lines, err := c.archive(spec, work, goEnv)
		if err != nil {
			return fmt.Errorf("%s: %w", spec.name, err)
		}
		digests.WriteString(lines)
	}
	fmt.Fprint(stdout, digests.String())
	return os.WriteFile(list, []byte(digests.String()), 0o644)
}
