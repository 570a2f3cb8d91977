package csi

import (
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/run"
)

const (
	offerTime = 5 * time.Second // for Identities, which does not wait for anybody
	againTime = time.Second     // until a socket is served again whose server ended
)

// errNoSocket says that a volume's folder is as it was made, and its socket is not.
var errNoSocket = errors.New("the socket is not in its folder")

// volume is one that is published. Whoever has acquired its target may read and change it.
type volume struct {
	Volume
	target    target
	workload  Workload
	socket    *socket
	folder    fileID            // of mount; zero until it was made
	token     [sha256.Size]byte // of the newest one
	published time.Time         // kubelet asked for it last
	complaint string            // what was last logged about its folder
	ending    bool              // its streams were told to end
	cancel    context.CancelCauseFunc
	done      chan struct{} // closed when it is served no more
}

func newVolume(d *Driver, v Volume, t target, token []byte) *volume {
	return &volume{Volume: v, target: t, socket: newSocket(d.path(t)), token: sha256.Sum256(token), published: time.Now()}
}

// publish makes a volume, or takes over a new token for one that is there. A call that fails leaves nothing behind that
// was not there before.
func (d *Driver) publish(ctx context.Context, r request) error {
	release, err := d.acquire(ctx, r.target)
	if err != nil {
		return err
	}
	defer release()
	v, err := d.find(r.ID, r.target)
	if err != nil {
		return err
	}
	if v != nil {
		return d.again(ctx, v, r)
	}
	return d.first(ctx, r)
}

// find returns the volume at a target, nil where there is none. An id has one place, and a place one id.
func (d *Driver) find(id string, t target) (*volume, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, known := d.byID[id]
	v := d.volumes[t]
	if known && at != t || v != nil && v.ID != id {
		return nil, api.E(api.VolumeRefused, "the volume is published elsewhere, or another one is published in its place")
	}
	return v, nil
}

func (d *Driver) first(ctx context.Context, r request) error {
	v := newVolume(d, r.Volume, r.target, r.token)
	if err := d.enter(v); err != nil {
		return err
	}
	var err error
	if v.workload, err = d.offer(ctx, v.Volume, r.token); err != nil {
		d.leave(v)
		return err
	}
	d.step("offered")
	d.remember(v, r.token) // before there is a folder: a start finds what a crash left
	d.step("remembered")
	if err := d.make(v); err != nil {
		v.workload.Close()
		d.unremember(v.ID)
		d.leave(v)
		return err
	}
	d.start(v)
	return nil
}

func (d *Driver) offer(ctx context.Context, v Volume, token []byte) (Workload, error) {
	ctx, cancel := context.WithTimeout(ctx, offerTime)
	defer cancel()
	return d.cfg.Identities.Offer(ctx, v, token)
}

// again takes over the token of a volume that is there, and sees to its socket. kubelet calls every minute or so, most times
// with the token that it brought before.
func (d *Driver) again(ctx context.Context, v *volume, r request) error {
	if v.ending {
		return api.E(api.StateConflict, "the volume is being removed")
	}
	if v.Volume != r.Volume {
		return api.E(api.VolumeRefused, "the volume is published for another pod")
	}
	if sum := sha256.Sum256(r.token); sum != v.token {
		ctx, cancel := context.WithTimeout(ctx, offerTime)
		defer cancel()
		if err := v.workload.Offer(ctx, r.token); err != nil {
			return err
		}
		d.remember(v, r.token)
		v.token = sum
	}
	v.published = time.Now()
	if d.pods.look(v) == nil && v.socket.listening() {
		return nil
	}
	return d.make(v)
}

// make puts a volume's socket in its folder, which it makes where it is missing. A folder that was there and is fit for it
// stays; the socket takes the place of the one there.
func (d *Driver) make(v *volume) error {
	f, err := d.pods.open(v.target)
	if err != nil {
		return err
	}
	defer f.Close()
	m, made, err := f.make(v.folder)
	if err != nil {
		return err
	}
	defer m.Close()
	d.step("made the folder")
	l, id, err := m.listen(d.cfg.Bind, d.step)
	if err != nil {
		if made {
			err = errors.Join(err, f.remove())
		}
		return err
	}
	v.folder = m.id
	v.socket.replace(l, id)
	v.complaint = ""
	return nil
}

// enter makes a volume known, so that its id and its place are taken.
func (d *Driver) enter(v *volume) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.volumes) >= d.cfg.MaxVolumes {
		return api.E(api.Overloaded, "the node has %d volumes already", d.cfg.MaxVolumes)
	}
	if at, ok := d.byID[v.ID]; ok && at != v.target {
		return api.E(api.VolumeRefused, "the volume is published elsewhere")
	}
	d.volumes[v.target] = v
	d.byID[v.ID] = v.target
	delete(d.leftovers, v.target)
	d.metrics.volumes.Set(float64(len(d.volumes)))
	return nil
}

func (d *Driver) leave(v *volume) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.volumes[v.target] == v {
		delete(d.volumes, v.target)
		delete(d.byID, v.ID)
	}
	d.metrics.volumes.Set(float64(len(d.volumes)))
}

// start serves a volume's socket until stop, or the end of Run.
func (d *Driver) start(v *volume) {
	d.mu.Lock()
	ctx, cancel := context.WithCancelCause(d.running)
	d.mu.Unlock()
	v.cancel, v.done = cancel, make(chan struct{})
	d.serving.Go(func() {
		defer close(v.done)
		defer cancel(nil)
		defer v.socket.Close()
		for ctx.Err() == nil {
			err := run.All(ctx, run.Task{Name: "socket of a pod", Run: func(ctx context.Context) error { return v.workload.Serve(ctx, v.socket) }})
			if ctx.Err() != nil {
				return
			}
			d.log.ErrorContext(ctx, "socket not served, trying again", "namespace", v.Pod.Namespace, "pod", v.Pod.Name, "error", err)
			wait(ctx, againTime)
			v.socket.reopen()
		}
	})
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// stop ends a volume's streams and forgets it; its folder and what is remembered of it stay.
func (d *Driver) stop(ctx context.Context, v *volume) error {
	v.ending = true
	v.cancel(ErrUnpublished) // whoever serves the socket closes it, when the pod's streams have been told
	select {
	case <-v.done:
	case <-ctx.Done():
		v.socket.Close()
		return api.Wrap(api.DeadlineExceeded, ctx.Err(), "the pod's streams did not end in time")
	}
	d.leave(v)
	v.workload.Close()
	return nil
}

// unpublish removes a volume. It succeeds where there is none, so that kubelet can call it as often as it likes.
func (d *Driver) unpublish(ctx context.Context, id string, t target) error {
	release, err := d.acquire(ctx, t)
	if err != nil {
		return err
	}
	defer release()
	v, err := d.find(id, t)
	if err != nil {
		return err
	}
	if v != nil {
		if err := d.stop(ctx, v); err != nil {
			return err
		}
	}
	d.step("stopped")
	if err := d.remove(t); err != nil {
		return err
	}
	d.step("removed the folder")
	d.unremember(id)
	return nil
}

// remove takes a volume's folder away, as far as it is ours.
func (d *Driver) remove(t target) error {
	f, err := d.pods.open(t)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return f.remove()
}

// tend puts a volume's socket back where it was removed or replaced. A folder that was is not touched: the pod still sees
// the old one, and kubelet's next call decides.
func (d *Driver) tend(t target) {
	release, ok := d.upkeep(t)
	if !ok {
		return
	}
	defer release()
	d.mu.Lock()
	v := d.volumes[t]
	d.mu.Unlock()
	if v == nil || v.ending {
		return
	}
	err := d.pods.look(v)
	if err == nil && v.socket.listening() {
		return
	}
	if err == nil || errors.Is(err, errNoSocket) {
		first := !v.socket.listening()
		if err = d.make(v); err == nil {
			if !first {
				d.metrics.remade.Inc()
				d.log.Warn("socket was removed or replaced, made anew", "namespace", v.Pod.Namespace, "pod", v.Pod.Name)
			}
			return
		}
	}
	d.complain(v, err)
}

// complain logs why a socket is not in place, once for each reason.
func (d *Driver) complain(v *volume, err error) {
	if msg := err.Error(); msg != v.complaint {
		v.complaint = msg
		d.log.Error("socket of a pod is not in place", "namespace", v.Pod.Namespace, "pod", v.Pod.Name, "error", err)
	}
}
