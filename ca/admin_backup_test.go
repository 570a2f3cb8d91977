package ca_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// backupOf takes a backup, and returns what was said of it and what came.
func backupOf(ctx context.Context, client apiv1.AdminClient, reason string) (info *apiv1.BackupInfo, data []byte, err error) {
	stream, err := client.Backup(ctx, &apiv1.BackupRequest{Reason: reason})
	if err != nil {
		return nil, nil, api.FromStatus(err)
	}
	for first := true; ; first = false {
		piece, err := stream.Recv()
		if err == io.EOF {
			return info, data, nil
		}
		if err != nil {
			return info, data, api.FromStatus(err)
		}
		if first != (piece.GetInfo() != nil) {
			return info, data, errors.New("what it is is said in the first piece, and nowhere else")
		}
		if first {
			info = piece.GetInfo()
		}
		data = append(data, piece.GetData()...)
	}
}

// TestBackupCall: an emergency responder takes away what the store makes, whole, and that is on record before; nobody else does,
// and nobody while the ledger cannot be written.
func TestBackupCall(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		want := bytes.Repeat([]byte("sealed "), 30_000)
		made := 0
		var ledger *gatedLedger
		s := start(t, catest.Options{Config: func(cfg *ca.Config) {
			cfg.Backup = func(context.Context) (*ca.Backup, error) {
				made++
				return &ca.Backup{Data: want, Generation: api.Generation{Epoch: 1, Number: 1}, Schema: 3, At: time.Now()}, nil
			}
			ledger = &gatedLedger{Ledger: cfg.Ledger}
			cfg.Ledger = ledger
		}})
		people := apiv1.NewAdminClient(operatorsConn(t, s, nil))
		as := func(role string) context.Context {
			return metadata.AppendToOutgoingContext(t.Context(), bearerOf(s.Person(operatorsNS, role, 10*time.Minute))...)
		}
		for _, role := range []string{"viewer", "operator"} {
			_, data, err := backupOf(as(role), people, "")
			if wantReason(t, err, api.RoleRequired); len(data) > 0 || made > 0 {
				t.Errorf("a %s: %d bytes, made %d times", role, len(data), made)
			}
		}
		ledger.set(func(_ context.Context, e audit.Entry) error {
			if e.Kind == audit.KindBackup {
				return errors.New("no")
			}
			return nil
		})
		_, data, err := backupOf(as("emergency"), people, "")
		if wantReason(t, err, api.LedgerFailed); len(data) > 0 {
			t.Errorf("%d bytes though it could not be put on record", len(data))
		}
		ledger.set(nil)
		info, data, err := backupOf(as("emergency"), people, "before the upgrade")
		if err != nil || !bytes.Equal(data, want) {
			t.Fatalf("%d bytes of %d: %v", len(data), len(want), err)
		}
		sum := sha256.Sum256(want)
		if info.GetSize() != uint64(len(want)) || !bytes.Equal(info.GetSha256(), sum[:]) || info.GetEpoch() != 1 || info.GetSchema() != 3 || info.GetTrustDomain() != s.TD.Name() {
			t.Errorf("said of it: %v", info)
		}
		if _, _, err := backupOf(as("emergency"), people, strings.Repeat("x", journal.MaxRotateText+1)); api.ReasonOf(err) != api.MessageTooLarge {
			t.Errorf("a reason that is too long: %v", err)
		}
		var found []audit.Record
		for _, r := range ledgerOf(t, s) {
			if r.Kind == audit.KindBackup {
				found = append(found, r)
			}
		}
		if len(found) != 1 || found[0].CorrelationID != info.GetCorrelationId() || !strings.HasSuffix(found[0].Detail, ": before the upgrade") ||
			!strings.HasPrefix(found[0].Caller, "sa:"+operatorsNS+"/emergency") {
			t.Errorf("on record: %+v", found)
		}
	})
}

// TestBackupNowhere: a CA that is given no way to make one says so.
func TestBackupNowhere(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		_, _, err := backupOf(t.Context(), adminOf(t, s.CA()), "")
		wantReason(t, err, api.NotFound)
	})
}
