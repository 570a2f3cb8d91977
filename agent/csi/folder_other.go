//go:build !linux

package csi

import (
	"net"

	"github.com/signet-ca/signet/api"
)

type fileID struct{}

type pods struct{ dir string }

func checkSystem() error {
	return api.E(api.SocketUnsafe, "volumes are served on Linux only")
}

func (pods) exists(string) (bool, error) { return false, checkSystem() }

func (pods) open(target) (folder, error) { return folder{}, checkSystem() }

func (pods) look(*volume) error { return checkSystem() }

func (pods) removeAll(target) error { return checkSystem() }

func (pods) hasMount(target) (bool, error) { return false, checkSystem() }

func (pods) leftovers() ([]target, error) { return nil, nil }

type folder struct{}

func (folder) Close() error { return nil }

func (folder) make(fileID) (mount, bool, error) { return mount{}, false, checkSystem() }

func (folder) remove() error { return checkSystem() }

func (folder) unpublishable() bool { return false }

type mount struct{ id fileID }

func (mount) Close() error { return nil }

func (mount) listen(func(string) (*net.UnixListener, error), func(string)) (*net.UnixListener, fileID, error) {
	return nil, fileID{}, checkSystem()
}
