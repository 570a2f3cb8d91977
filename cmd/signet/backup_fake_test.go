package main

import (
	"bytes"
	"crypto/sha256"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// Backup sends one of 100 bytes and the reason, in pieces of 64. In the scene "changed" it is not what was said, in "cutoff" the end is missing, in "nobackup"
// nothing is sent at all, in "stalled" no more than the first piece.
func (f *fakeAdmin) Backup(r *apiv1.BackupRequest, stream grpc.ServerStreamingServer[apiv1.BackupResponse]) error {
	scene, err := f.on(stream.Context())
	if err != nil {
		return err
	}
	if scene == "unrecorded" {
		return api.ToStatus(api.E(api.LedgerFull, "the backup could not be put on record, so it was not given away")).Err()
	}
	data := append([]byte("signet-backup/1\n"+r.GetReason()), bytes.Repeat([]byte("sealed\n"), 12)...)
	sum := sha256.Sum256(data)
	if scene == "changed" {
		data[77]++
	}
	piece := &apiv1.BackupResponse{Info: &apiv1.BackupInfo{TrustDomain: "example.org", Epoch: 1, Number: 5, Schema: 3, At: timestamppb.New(testNow),
		Size: uint64(len(data)), Sha256: sum[:], CorrelationId: "4be1f0a7c2d95e38"}}
	for rest := data; len(rest) > 0 && scene != "nobackup"; piece = new(apiv1.BackupResponse) {
		n := min(len(rest), 64)
		piece.Data, rest = rest[:n], rest[n:]
		if err := stream.Send(piece); err != nil {
			return err
		}
		switch scene {
		case "cutoff":
			return nil
		case "stalled":
			<-stream.Context().Done()
			return stream.Context().Err()
		}
	}
	return nil
}
