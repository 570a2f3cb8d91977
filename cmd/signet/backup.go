package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/durable"
)

// maxBackup is what no backup is larger than.
const maxBackup = 64 << 20

// A backupView is the answer of backup.
type backupView struct {
	header
	TrustDomain   string `json:"trustDomain"`
	Generation    string `json:"generation"` // of the bundle in it, EPOCH.NUMBER
	Epoch         uint32 `json:"epoch"`
	Schema        uint32 `json:"schema"` // of the record in it
	At            string `json:"at"`
	Size          uint64 `json:"size"`           // in bytes
	SHA256        string `json:"sha256"`         // lower-case hex
	File          string `json:"file,omitempty"` // empty: it went to stdout
	CorrelationID string `json:"correlationID,omitempty"`
}

func (a *app) backupCommand() *cobra.Command {
	var (
		reason string
		force  bool
	)
	c := &cobra.Command{
		Use:   "backup FILE|-",
		Short: "Take a backup of the CA's record away, sealed under its seal key",
		Long: "Take a backup of all that the CA's store holds: roots with their keys, rotation, bans, replicas. It is sealed under the\n" +
			"CA's seal key, which is not in it: keep a copy of that elsewhere, for neither is worth anything without the other.\n" +
			"It disturbs nobody, takes the role emergency, and goes on record. docs/backup.md tells how often, and how to restore\n" +
			"one (signet-ca restore, while the CA does not run).\n\n" +
			"The file is made with mode 0600 and there only when it is whole. It takes the place of none but with --force.",
		Example: "  signet --as-role emergency backup signet-2026-11-24.backup --reason 'before the upgrade'\n" +
			"  signet --as-role emergency backup latest.backup --force -o json\n" +
			"  signet --as-role emergency backup - | age -r RECIPIENT > signet.backup.age",
		Args: oneArg("a file, or - for stdout"),
	}
	o := outputFlags(c)
	c.Flags().StringVar(&reason, "reason", "", "why, in your `WORDS`; goes on record")
	c.Flags().BoolVar(&force, "force", false, "take the place of a file that is there")
	c.RunE = func(c *cobra.Command, args []string) error {
		file := args[0]
		_, err := os.Lstat(file)
		switch there := err == nil; {
		case len(reason) > maxReason:
			return checkReason(reason)
		case file == "":
			return usageError{errors.New("the name of the file is empty")}
		case file == "-" && a.tty(a.stdout):
			return usageError{errors.New("stdout is a terminal, and a backup is nothing to read: name a file, or redirect")}
		case file != "-" && there && !force:
			return usageError{fmt.Errorf("%s is there already; --force takes its place", file)}
		}
		v, data, err := a.takeBackup(c.Context(), o, reason)
		if err != nil {
			return err
		}
		told := *a
		if file == "-" {
			told.stdout = a.stderr
			_, err = sink{a.stdout, "stdout"}.Write(data)
		} else {
			v.File = file
			err = keepBackup(file, data, force)
		}
		if err != nil {
			return err
		}
		return told.print(o, v.result())
	}
	return c
}

// keepBackup writes it, whole or not at all.
func keepBackup(file string, data []byte, force bool) error {
	put := durable.CreateFile
	if force {
		put = durable.WriteFile
	}
	if err := put(file, data, 0o600); err != nil {
		return &failure{err: api.Wrap(api.OutputFailed, err, "cannot write the backup: "+err.Error()), next: "signet backup --help"}
	}
	return nil
}

func (v *backupView) result() result {
	return result{object: v, text: func(bool) []block {
		return []block{{pairs: append([]pair{
			{"Trust domain", v.TrustDomain + ", generation " + v.Generation},
			{"Backup", fmt.Sprintf("%s, %d bytes, made at %s", v.where(), v.Size, v.At)},
			{"SHA-256", v.SHA256},
			{"Opened by", "the CA's seal key alone, which is not in it"},
		}, known(pair{"On record", v.CorrelationID})...)}}
	}}
}

func (v *backupView) where() string {
	if v.File == "" {
		return "stdout"
	}
	return v.File
}

// takeBackup returns what the CA sends, once it is known to be what the CA said. A piece of it may take --timeout.
func (a *app) takeBackup(ctx context.Context, o *output, reason string) (*backupView, []byte, error) {
	var t transfer
	v, err := once(a, func(ch *channel) (*backupView, error) {
		defer a.showTransfer(o, &t, ch.where())()
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		limit := a.timeout
		if limit == 0 {
			limit = math.MaxInt64
		}
		idle := time.AfterFunc(limit, func() { cancel(context.DeadlineExceeded) })
		defer idle.Stop()
		stream, err := ch.Backup(ctx, &apiv1.BackupRequest{Reason: reason})
		for err == nil {
			var piece *apiv1.BackupResponse
			if piece, err = stream.Recv(); err != nil {
				break
			}
			idle.Reset(limit)
			if err := t.add(piece); err != nil {
				return nil, err
			}
		}
		if err != io.EOF {
			if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
				err = context.DeadlineExceeded
			}
			return nil, olderCA(a.callFailed(ch, err))
		}
		return t.end()
	})
	return v, t.data, err
}

// A transfer is a backup on its way. How far it has come may be asked at any time.
type transfer struct {
	info *apiv1.BackupInfo // nil before the first piece
	data []byte

	size, came atomic.Uint64
}

func (t *transfer) add(piece *apiv1.BackupResponse) error {
	if t.info == nil {
		if t.info = piece.GetInfo(); t.info == nil || t.info.GetSize() > maxBackup {
			return wrongBackup("it does not begin as a backup does")
		}
		t.size.Store(t.info.GetSize())
	}
	t.data = append(t.data, piece.GetData()...)
	t.came.Store(uint64(len(t.data)))
	if uint64(len(t.data)) > t.info.GetSize() {
		return wrongBackup("more came than was said")
	}
	return nil
}

// end compares what came with what was said.
func (t *transfer) end() (*backupView, error) {
	sum := sha256.Sum256(t.data)
	switch {
	case t.info == nil:
		return nil, wrongBackup("nothing came")
	case uint64(len(t.data)) != t.info.GetSize() || !bytes.Equal(sum[:], t.info.GetSha256()):
		return nil, wrongBackup(fmt.Sprintf("of %d bytes %d came, or they were changed on the way", t.info.GetSize(), len(t.data)))
	}
	g := api.Generation{Epoch: t.info.GetEpoch(), Number: t.info.GetNumber()}
	return &backupView{
		header: newHeader("Backup", g.String()), TrustDomain: t.info.GetTrustDomain(), Generation: g.String(), Epoch: g.Epoch, Schema: t.info.GetSchema(),
		At: stamp(timeOf(t.info.GetAt())), Size: t.info.GetSize(), SHA256: hex.EncodeToString(sum[:]), CorrelationID: t.info.GetCorrelationId(),
	}, nil
}

// showTransfer says what is waited for once that takes longer than patience, and how much has come, until the returned function is
// called.
func (a *app) showTransfer(o *output, t *transfer, where string) (stop func()) {
	p := a.newWaiting(o)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(patience)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			found := "nothing has come from the CA at " + where
			if size := t.size.Load(); size > 0 {
				found = fmt.Sprintf("%d %% of %d bytes", 100*t.came.Load()/size, size)
			}
			p.show([]want{{"backup", found}})
			tick.Reset(repaint)
		}
	})
	return func() {
		close(done)
		wg.Wait()
		p.done()
	}
}

func wrongBackup(found string) error {
	return &failure{err: api.E(api.BackupDamaged, "what the CA sent is no whole backup: %s", found),
		why: "It was changed or cut off on its way. Nothing was kept of it.", next: "signet backup --help"}
}
