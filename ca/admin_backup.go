package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// Backup is a backup of all that a store holds, sealed: it is opened by the seal key alone. It is made by ca/store.
type Backup struct {
	Data       []byte
	Generation api.Generation // of the bundle in it
	Schema     int            // of the record in it
	At         time.Time
}

// backupPiece is the length of a piece of a backup on the wire.
const backupPiece = 64 << 10

// Backup implements the call of that name. Who takes a backup away has all keys of the CA but for the one that opens it, so
// it is on record, with its hash, before the first of it is sent.
func (a *admin) Backup(r *apiv1.BackupRequest, stream grpc.ServerStreamingServer[apiv1.BackupResponse]) error {
	ctx := stream.Context()
	if a.ca.cfg.Backup == nil {
		return api.E(api.NotFound, "this CA makes no backups that can be asked for")
	}
	if len(r.GetReason()) > journal.MaxRotateText {
		return api.E(api.MessageTooLarge, "the reason is longer than %d bytes", journal.MaxRotateText)
	}
	look, err := a.ca.look(ctx) // one of these few at a time: a backup is in memory as a whole
	if err != nil {
		return err
	}
	defer look.end()
	b, err := a.ca.cfg.Backup(ctx)
	if err != nil {
		return err
	}
	sum, who := sha256.Sum256(b.Data), admitted(ctx)
	e := audit.Entry{
		Time: time.Now(), Kind: audit.KindBackup, CorrelationID: api.NewCorrelationID(), Method: "Backup", Caller: who.name, TokenID: who.token.TokenID,
		Detail: strings.TrimSuffix(fmt.Sprintf("generation %s, SHA-256 %x: %s", b.Generation, sum, r.GetReason()), ": "),
	}
	if err := a.ca.cfg.Ledger.Append(ctx, e); err != nil {
		return unrecorded(err, "the backup could not be put on record, so it was not given away")
	}
	a.ca.log.InfoContext(ctx, "backup", "by", who.name, "generation", b.Generation.String(), "bytes", len(b.Data), "correlation_id", e.CorrelationID)
	piece := &apiv1.BackupResponse{Info: &apiv1.BackupInfo{
		TrustDomain: a.ca.cfg.TrustDomain.Name(), Epoch: b.Generation.Epoch, Number: b.Generation.Number, Schema: uint32(b.Schema),
		At: timestamppb.New(b.At), Size: uint64(len(b.Data)), Sha256: sum[:], CorrelationId: e.CorrelationID,
	}}
	for rest := b.Data; ; piece = new(apiv1.BackupResponse) {
		n := min(len(rest), backupPiece)
		piece.Data, rest = rest[:n], rest[n:]
		look.sending()
		err := stream.Send(piece)
		look.sent()
		if err != nil || len(rest) == 0 {
			return err
		}
		select {
		case <-a.ca.stopping:
			return api.E(api.CAUnavailable, "the CA is stopping")
		default:
		}
	}
}

// Restored is what a restore says of itself, in the record of the replica that it adds. The ledger is no part of a backup, so
// it is told of it by the CA that starts next.
type Restored struct {
	At         time.Time `json:"at"`
	By         string    `json:"by,omitempty"` // "uid:" and the user who restored it
	Backup     string    `json:"backup"`       // generation of the backup
	BackupAt   time.Time `json:"backupAt"`
	Generation string    `json:"generation"`         // that it came to
	Recorded   bool      `json:"recorded,omitempty"` // it is in the ledger
}

// recordRestores puts restores on record that no start has put there yet. Where the ledger has no room it is told at a later
// start: nothing can be issued until then either.
func (ca *CA) recordRestores(ctx context.Context) error {
	replicas, err := ca.cfg.Store.Replicas(ctx)
	if err != nil {
		return err
	}
	for _, r := range replicas {
		if r.Restored == nil || r.Restored.Recorded {
			continue
		}
		told := *r.Restored
		e := audit.Entry{
			Time: time.Now(), Kind: audit.KindRestore, CorrelationID: api.NewCorrelationID(), Method: "restore", Caller: told.By,
			Detail: fmt.Sprintf("at %s from a backup of generation %s that was made at %s; the generation is %s since", told.At.UTC().Format(time.RFC3339),
				told.Backup, told.BackupAt.UTC().Format(time.RFC3339), told.Generation),
		}
		if err := ca.cfg.Ledger.Append(ctx, e); errors.Is(err, audit.ErrFull) {
			ca.log.ErrorContext(ctx, "a restore could not be put on record", "error", err)
			return nil
		} else if err != nil {
			return unrecorded(err, "a restore could not be put on record")
		}
		ca.log.WarnContext(ctx, "the record was restored from a backup", "at", told.At, "by", told.By, "backup", told.Backup, "backup_at", told.BackupAt,
			"generation", told.Generation, "correlation_id", e.CorrelationID)
		told.Recorded = true
		r.Restored = &told
		if err := ca.cfg.Store.SaveReplica(ctx, r); err != nil { // killed here, it is told twice
			return err
		}
	}
	return nil
}
