package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/durable"
)

// cliVersion is the apiVersion of what is printed as JSON. Fields are only ever added.
const cliVersion = "cli.signet.dev/v1"

// outputFlag is -o of the commands here.
type outputFlag string

func (o *outputFlag) add(c *cobra.Command) {
	c.Flags().StringVarP((*string)(o), "output", "o", "table", "table or json")
}

func (o outputFlag) check() error {
	if o != "table" && o != "json" {
		return daemon.Usage(fmt.Errorf("-o %.16q is not table or json", string(o)))
	}
	return nil
}

// print writes an answer: v as JSON, or rows of a name and a value.
func (o outputFlag) print(out io.Writer, v any, rows [][2]string) error {
	if o == "json" {
		enc := json.NewEncoder(out)
		enc.SetIndent("", "    ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
	}
	return w.Flush()
}

// backupAnswer is what is told of a backup that was made.
type backupAnswer struct {
	APIVersion  string    `json:"apiVersion"`
	Kind        string    `json:"kind"`
	File        string    `json:"file,omitempty"` // empty: the standard output
	TrustDomain string    `json:"trustDomain"`
	Generation  string    `json:"generation"` // of the bundle in it, EPOCH.NUMBER
	Epoch       uint32    `json:"epoch"`
	Schema      int       `json:"schema"` // of the record in it
	At          time.Time `json:"at"`
	Size        int       `json:"size"`   // in bytes
	SHA256      string    `json:"sha256"` // lower-case hex
}

// backupCommand makes a backup, whether or not the CA runs.
func backupCommand() daemon.Command[*loaded] {
	var format outputFlag
	return daemon.Command[*loaded]{
		Name:  "backup",
		Short: "Write all that the store holds to a file, sealed under the seal key",
		Long: `Write all that the store holds to FILE, or with - to the standard output, sealed under the seal key. It works while the CA
runs and when it does not, changes nothing, and never replaces a file. The CA's user has to call it, for it reads the seal key.

Keep it apart from the seal key, and a copy of that key somewhere else: neither is worth anything without the other.
The ledger is not in it. docs/backup.md says how often, and what a restore means.`,
		Words: "FILE|-",
		Flags: func(c *cobra.Command) { format.add(c) },
		Look: func(ctx context.Context, load func() (*loaded, error), file string, out io.Writer) error {
			if file == "" {
				return daemon.Usage(errors.New("say which file, or - for the standard output; see signet-ca backup --help"))
			}
			if err := format.check(); err != nil {
				return err
			}
			l, err := load()
			if err != nil {
				return err
			}
			b, err := makeBackup(ctx, l)
			if err != nil {
				return err
			}
			data := b.Data
			answer := backupAnswer{cliVersion, "Backup", file, l.td.Name(), b.Generation.String(), b.Generation.Epoch, b.Schema, b.At, len(data), fmt.Sprintf("%x", sha256.Sum256(data))}
			if file == "-" {
				answer.File = ""
				if _, err := out.Write(data); err != nil {
					return err
				}
				out = os.Stderr
			} else if err := durable.CreateFile(file, data, 0o600); errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("there is a file %s already, and a backup replaces none", file)
			} else if err != nil {
				return err
			}
			return format.print(out, answer, [][2]string{
				{"trust domain", answer.TrustDomain},
				{"generation", answer.Generation},
				{"backup", fmt.Sprintf("%s, %d bytes, opened by %s alone", file, len(data), l.Seal.KeyFile)},
				{"sha256", answer.SHA256},
			})
		},
	}
}

// makeBackup returns a backup of the store as its file is, whether or not the CA runs.
func makeBackup(ctx context.Context, l *loaded) (*ca.Backup, error) {
	sealer, err := readSealer(l.Seal)
	if err != nil {
		return nil, err
	}
	s, err := store.Peek(ctx, l.Store)
	if err != nil {
		return nil, err
	}
	return sealBackup(s, l.td, sealer)
}

// sealBackup returns a backup of what a store held, and opens it once to see that it can be.
func sealBackup(s store.Snapshot, td spiffeid.TrustDomain, sealer *ca.Sealer) (*ca.Backup, error) {
	if err := ours(s, td); err != nil {
		return nil, err
	}
	data, err := s.Seal(sealer, time.Now())
	if err != nil {
		return nil, err
	}
	held, h, err := store.Unseal(data, td, sealer)
	if err != nil {
		return nil, err
	}
	return &ca.Backup{Data: data, Generation: held.Journal.Generation(), Schema: h.Schema, At: h.At}, nil
}

// ours refuses what belongs to another trust domain.
func ours(s store.Snapshot, td spiffeid.TrustDomain) error {
	if s.Journal.TrustDomain != td.Name() {
		return api.E(api.StateForeign, "the store is of trust domain %q, the configuration is of %q", s.Journal.TrustDomain, td)
	}
	return nil
}
