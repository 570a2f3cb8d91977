package api_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// TestCodecWeighs: a message that would take far more memory than it has bytes is refused before it is decoded, in however many pieces
// it came; one that is merely large is not.
//
// threat: J06
func TestCodecWeighs(t *testing.T) {
	report := func(r *apiv1.Report) proto.Message {
		return &apiv1.SessionRequest{Message: &apiv1.SessionRequest_Report{Report: r}}
	}
	holdings := func(n int, h *apiv1.Holding) []*apiv1.Holding {
		all := make([]*apiv1.Holding, n)
		for i := range all {
			all[i] = h
		}
		return all
	}
	streams := make([]*apiv1.Stream, 1000)
	for i := range streams {
		streams[i] = &apiv1.Stream{}
	}
	for _, tt := range []struct {
		name string
		m    proto.Message
		good bool
	}{
		{"empty messages", report(&apiv1.Report{Changed: holdings(40_000, &apiv1.Holding{})}), false},
		{"empty messages in messages", report(&apiv1.Report{Changed: holdings(40, &apiv1.Holding{Streams: streams})}), false},
		{"a node that is full", report(&apiv1.Report{Changed: holdings(4096, &apiv1.Holding{Key: strings.Repeat("k", 100)})}), true},
		{"one long text", report(&apiv1.Report{Changed: holdings(1, &apiv1.Holding{Key: strings.Repeat("k", 1<<20)})}), true},
		{"little", report(&apiv1.Report{Changed: holdings(100, &apiv1.Holding{})}), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data, err := proto.Marshal(tt.m)
			if err != nil {
				t.Fatal(err)
			}
			for _, piece := range []int{len(data), 16 << 10} {
				var parts mem.BufferSlice
				for at := 0; at < len(data); at += piece {
					parts = append(parts, mem.SliceBuffer(data[at:min(at+piece, len(data))]))
				}
				got := &apiv1.SessionRequest{}
				if err := api.ServerCodec().Unmarshal(parts, got); err != nil {
					t.Fatal(err)
				}
				err := api.CheckRead(got)
				switch {
				case tt.good && (err != nil || !proto.Equal(got, tt.m)):
					t.Errorf("in pieces of %d: %v, or it is another message", piece, err)
				case !tt.good && (api.ReasonOf(err) != api.MessageMalformed || got.GetReport() != nil):
					t.Errorf("in pieces of %d: %v, and decoded: %t", piece, err, got.GetReport() != nil)
				}
			}
		})
	}
}
