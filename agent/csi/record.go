package csi

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/durable"
)

const (
	recordSuffix = ".json"
	maxRecord    = 2*api.MaxTokenBytes + 4<<10
)

// record is what is remembered of a volume, with its newest token.
type record struct {
	Audience string `json:"audience"` // of the token: what was learnt in one trust domain is worth nothing in another
	Volume   Volume `json:"volume"`
	Token    []byte `json:"token"` // secret
}

func (d *Driver) recordPath(id string) string {
	return filepath.Join(d.cfg.StateDir, id+recordSuffix)
}

// remember keeps a volume for the next start. A failure costs only that start: the socket is back when kubelet asks again.
func (d *Driver) remember(v *volume, token []byte) {
	if d.cfg.StateDir == "" {
		return
	}
	data, err := json.Marshal(record{d.cfg.Audience, v.Volume, token})
	if err == nil {
		err = durable.WriteFile(d.recordPath(v.ID), data, 0o600)
	}
	if err != nil {
		d.metrics.forgotten.Inc()
		d.log.Error("volume not remembered", "namespace", v.Pod.Namespace, "pod", v.Pod.Name, "error", err)
	}
}

func (d *Driver) unremember(id string) {
	if d.cfg.StateDir == "" {
		return
	}
	if err := os.Remove(d.recordPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Error("record of a volume not removed", "error", err)
	}
}

// restore listens again on the sockets of the volumes that are remembered and still there.
func (d *Driver) restore(ctx context.Context) {
	if d.cfg.StateDir == "" {
		return
	}
	entries, err := os.ReadDir(d.cfg.StateDir)
	if err != nil {
		d.log.Error("remembered volumes not read", "error", err)
		return
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok || !isVolumeID(id) || ctx.Err() != nil {
			continue
		}
		if err := d.restoreOne(ctx, id); err != nil {
			d.log.Warn("remembered volume dropped", "error", err)
			d.unremember(id)
		}
	}
	if n := len(d.targets()); n > 0 {
		d.log.Info("volumes restored", "volumes", n)
	}
}

// restoreOne restores the volume of one record. An error drops the record; what is in kubelet's folder stays for kubelet.
func (d *Driver) restoreOne(ctx context.Context, id string) error {
	data, err := durable.ReadPrivate(d.recordPath(id), maxRecord)
	if err != nil {
		return err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return errors.New("its record is damaged")
	}
	t := target{r.Volume.Pod.UID, r.Volume.Name}
	switch p := r.Volume.Pod; {
	case r.Volume.ID != id || !api.IsUID(p.UID) || !api.IsLabel(t.name) || !api.IsLabel(p.Namespace) || !api.IsSubdomain(p.Name) ||
		!api.IsSubdomain(p.ServiceAccount) || len(r.Token) == 0:
		return errors.New("its record is damaged")
	case r.Audience != d.cfg.Audience:
		return errors.New("it belongs to another trust domain")
	}
	if there, err := d.pods.hasMount(t); err == nil && !there {
		return errors.New("its folder is gone")
	}
	release, ok := d.upkeep(t)
	if !ok {
		return nil // the end has come: the record stays
	}
	defer release()
	v := newVolume(d, r.Volume, t, r.Token)
	if err := d.enter(v); err != nil {
		return err
	}
	offer, cancel := context.WithTimeout(ctx, offerTime)
	defer cancel()
	if v.workload, err = d.cfg.Identities.Restore(offer, v.Volume, r.Token); err != nil {
		d.leave(v)
		return err
	}
	if err := d.make(v); err != nil {
		d.complain(v, err) // and tried again every second
	}
	d.start(v)
	return nil
}
