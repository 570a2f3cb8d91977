package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/daemon"
)

// restorePlan is what a restore will do, or has done.
type restorePlan struct {
	APIVersion  string    `json:"apiVersion"`
	Kind        string    `json:"kind"`
	TrustDomain string    `json:"trustDomain"`
	BackupAt    time.Time `json:"backupAt"`
	// BackupGeneration is that of the backup, ShownGeneration the highest that is known to have been shown ("" where none is),
	// Generation the one of the restored store.
	BackupGeneration string            `json:"backupGeneration"`
	ShownGeneration  string            `json:"shownGeneration,omitempty"`
	Generation       string            `json:"generation"`
	Authorities      []authorityState  `json:"authorities"`
	Operation        *restoreOperation `json:"operation,omitempty"`
	// Bans are those that the store that is replaced holds and the backup does not; they are kept. For LostBans there is no room.
	Bans     []string `json:"bans,omitempty"`
	LostBans []string `json:"lostBans,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
	Replaces string   `json:"replaces,omitempty"` // what is known of the store that is there
	Kept     string   `json:"kept,omitempty"`     // the file name of that store once it is replaced
	Restored bool     `json:"restored"`           // it was done

	snapshot store.Snapshot
}

type authorityState struct {
	ID    string `json:"id"`
	State string `json:"state"`
}

type restoreOperation struct {
	ID   string `json:"id"`
	Kind string `json:"kind"`
}

// restoreFlags are the flags of restore.
type restoreFlags struct {
	format  outputFlag
	replace bool
	dryRun  bool
	yes     string
}

func restoreCommand() daemon.Command[*loaded] {
	var f restoreFlags
	return daemon.Command[*loaded]{
		Name:  "restore",
		Short: "Make the store anew from a backup, at a generation above every one that was shown",
		Long: `Make the store anew from the backup FILE, or with - from the standard input. The CA must not be running. It shows what it
will do and asks for the trust domain; scripts give it with --yes.

It refuses a backup of another trust domain, one that is damaged or that the seal key does not open, and one that still
trusts a root which the store that is there knows to be compromised. Where there is a store it takes --replace, and keeps
the old one beside it. The new generation is above that of the backup, of the store, of the published bundle, and of what
an earlier restore came to. docs/backup.md says what is lost.

Exit codes: 0 done, 1 refused or failed, and nothing was changed, 2 the command line or the answer was wrong.`,
		Words: "FILE|-",
		Flags: func(c *cobra.Command) {
			f.format.add(c)
			c.Flags().BoolVar(&f.replace, "replace", false, "take the place of the store that is there, which is kept under another name")
			c.Flags().BoolVar(&f.dryRun, "dry-run", false, "show what would be done, and change nothing")
			c.Flags().StringVarP(&f.yes, "yes", "y", "", "do not ask: the `TRUST-DOMAIN` that is restored")
		},
		Look: func(ctx context.Context, load func() (*loaded, error), file string, out io.Writer) error {
			if file == "" {
				return daemon.Usage(errors.New("say which file, or - for the standard input; see signet-ca restore --help"))
			}
			if err := f.format.check(); err != nil {
				return err
			}
			l, err := load()
			if err != nil {
				return err
			}
			return restore(ctx, l, f, file, out)
		},
	}
}

func restore(ctx context.Context, l *loaded, f restoreFlags, file string, out io.Writer) error {
	plan, err := planRestore(ctx, l, f, file)
	if err != nil {
		return err
	}
	if f.dryRun {
		return f.format.print(out, plan, plan.rows("would become"))
	}
	if err := confirmRestore(plan, f, file); err != nil {
		return err
	}
	if err := makeFolders(l); err != nil {
		return err
	}
	if plan.Kept, err = store.Put(ctx, l.Store, plan.snapshot, f.replace); err != nil {
		return err
	}
	plan.Restored = true
	return f.format.print(out, plan, plan.rows("now"))
}

// planRestore checks all that can be checked before anything is changed.
func planRestore(ctx context.Context, l *loaded, f restoreFlags, file string) (*restorePlan, error) {
	data, err := readBackup(file)
	if err != nil {
		return nil, err
	}
	sealer, err := readSealer(l.Seal)
	if err != nil {
		return nil, err
	}
	backup, h, err := store.Unseal(data, l.td, sealer)
	if err != nil {
		return nil, err
	}
	plan := &restorePlan{APIVersion: cliVersion, Kind: "Restore", TrustDomain: h.TrustDomain, BackupAt: h.At, BackupGeneration: h.Generation}
	seen, err := plan.lookAtStore(ctx, l, f.replace, &backup.Journal)
	if err != nil {
		return nil, err
	}
	shown, err := published(ctx, l)
	switch {
	case err != nil:
		plan.Warnings = append(plan.Warnings, fmt.Sprintf("what is published cannot be read, so the generation follows from the backup and the clock: %v", err))
	case !shown.Plausible(time.Now()):
		plan.Warnings = append(plan.Warnings, fmt.Sprintf("what is published was changed by somebody else: it claims generation %s, which no CA can have come to; it is not counted, and replaced once the CA runs", shown))
		shown = api.Generation{}
	}
	if seen = append(seen, shown); highest(seen) != (api.Generation{}) {
		plan.ShownGeneration = highest(seen).String()
	}
	if plan.snapshot, err = backup.Restored(ca.Restored{By: fmt.Sprint("uid:", os.Getuid()), BackupAt: h.At}, seen, time.Now()); err != nil {
		return nil, err
	}
	j := plan.snapshot.Journal
	plan.Generation = j.Generation().String()
	for _, a := range j.Authorities {
		plan.Authorities = append(plan.Authorities, authorityState{a.ID, string(a.State)})
	}
	if o := j.Operation; o != nil {
		plan.Operation = &restoreOperation{o.ID, string(o.Kind)}
	}
	return plan, nil
}

// readBackup reads a file, or the standard input, up to the size that a backup has at most.
func readBackup(file string) ([]byte, error) {
	in := io.Reader(os.Stdin)
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, api.Wrap(api.InputUnreadable, err, fmt.Sprintf("the backup cannot be read: %v", err))
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, store.MaxBackup+1))
	if err != nil {
		return nil, api.Wrap(api.InputUnreadable, err, fmt.Sprintf("the backup cannot be read: %v", err))
	}
	return data, nil
}

// lookAtStore finds out what the store that is there knows, and adds its bans to the backup's. One that cannot be read knows nothing:
// that is why there are backups.
func (p *restorePlan) lookAtStore(ctx context.Context, l *loaded, replace bool, backup *journal.Journal) (seen []api.Generation, err error) {
	_, err = os.Lstat(l.Store.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !replace:
		return nil, api.E(api.StateExists, "there is a store at %s already; --replace puts the backup in its place, and keeps it", l.Store.Path)
	}
	old, err := store.Peek(ctx, l.Store)
	switch api.ReasonOf(err) {
	case api.StateCorrupt, api.StateMissing, api.StateNewer:
		p.Replaces = "a store that cannot be read: " + detail(err)
		return nil, nil
	}
	if err == nil {
		err = ours(old, l.td)
	}
	if err != nil {
		return nil, err
	}
	j := old.Journal
	if ids := backup.Compromised(j); len(ids) > 0 {
		return nil, api.E(api.AuthorityRefused, "the backup trusts authority %s, and the store that is there knows that it was compromised", strings.Join(ids, ", "))
	}
	for _, b := range j.Bans {
		if _, ok := backup.Banned(b.Cluster, b.NodeUID); ok {
			continue
		}
		name := strings.TrimSpace(b.Node + " " + b.NodeUID)
		if with, err := backup.WithBan(b); err == nil {
			*backup, p.Bans = with, append(p.Bans, name)
		} else {
			p.LostBans = append(p.LostBans, name)
		}
	}
	p.Replaces = fmt.Sprintf("a store of generation %s", j.Generation())
	return []api.Generation{j.Generation()}, nil
}

// published returns the generation of the published bundle, the zero Generation where there is none.
func published(ctx context.Context, l *loaded) (api.Generation, error) {
	p, err := openPublisher(l, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		return api.Generation{}, err
	}
	shown, err := p.shown(ctx, l.td)
	return shown.Generation, err
}

func highest(seen []api.Generation) (g api.Generation) {
	for _, s := range seen {
		if s.Sequence() > g.Sequence() {
			g = s
		}
	}
	return g
}

// rows are what people are told.
func (p *restorePlan) rows(verb string) [][2]string {
	rows := [][2]string{
		{"trust domain", p.TrustDomain},
		{"backup", fmt.Sprintf("generation %s, made at %s", p.BackupGeneration, p.BackupAt.Format(time.RFC3339))},
	}
	if p.ShownGeneration != "" {
		rows = append(rows, [2]string{"shown since", "generation " + p.ShownGeneration})
	}
	rows = append(rows, [2]string{verb, "generation " + p.Generation})
	for _, a := range p.Authorities {
		rows = append(rows, [2]string{"root", a.ID + ", " + a.State})
	}
	if p.Operation != nil {
		rows = append(rows, [2]string{"rotation", fmt.Sprintf("%s (%s) goes on where it was; nothing counts as proven", p.Operation.ID, p.Operation.Kind)})
	}
	if p.Replaces != "" {
		rows = append(rows, [2]string{"replaces", p.Replaces})
	}
	for _, b := range p.Bans {
		rows = append(rows, [2]string{"ban kept", b})
	}
	for _, b := range p.LostBans {
		rows = append(rows, [2]string{"ban lost", b})
	}
	for _, w := range p.Warnings {
		rows = append(rows, [2]string{"warning", w})
	}
	if p.Kept != "" {
		rows = append(rows, [2]string{"kept", p.Kept})
	}
	return rows
}

// confirmRestore wants the trust domain, from the command line or typed by somebody who was shown the plan.
func confirmRestore(p *restorePlan, f restoreFlags, file string) error {
	typed := f.yes
	if typed == "" {
		if file == "-" || !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stderr.Fd())) {
			return daemon.Usage(errors.New("nobody is here to be asked: --dry-run says what it would do, --yes TRUST-DOMAIN does it"))
		}
		if err := outputFlag("table").print(os.Stderr, nil, p.rows("would become")); err != nil {
			return err
		}
		fmt.Fprint(os.Stderr, "\nWhat was decided since the backup is lost. Type the trust domain to restore it: ")
		line, err := bufio.NewReader(io.LimitReader(os.Stdin, 1<<10)).ReadString('\n')
		if err != nil && err != io.EOF {
			return err
		}
		typed = strings.TrimSpace(line)
	}
	if typed != p.TrustDomain {
		return daemon.Usage(fmt.Errorf("that is not %s, whose backup this is: nothing was changed", p.TrustDomain))
	}
	return nil
}
