//go:build linux

package csi

import (
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
)

// BenchmarkPublish is a volume from kubelet's first call to its last, beside a connection of the pod.
func BenchmarkPublish(b *testing.B) {
	r := newRig(b)
	p := testPod(1)
	if err := r.k.writeNotes(p); err != nil {
		b.Fatal(err)
	}
	node := &nodeServer{d: r.d}
	for b.Loop() {
		if _, err := node.NodePublishVolume(b.Context(), r.k.request(p, p.token(1))); err != nil {
			b.Fatal(err)
		}
		c, _, err := r.connect(p)
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
		if _, err := node.NodeUnpublishVolume(b.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: p.id(), TargetPath: r.k.target(p)}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkTend is what each volume costs every second.
func BenchmarkTend(b *testing.B) {
	r := newRig(b)
	p := testPod(1)
	r.publish(p, 1)
	for b.Loop() {
		r.d.tend(target{p.UID, p.volume})
	}
}
