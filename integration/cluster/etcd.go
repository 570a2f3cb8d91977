package main

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcd runs one member with its data in a folder until a signal ends it. It chooses a free port of loopback and prints the
// URL that it serves clients on, when it does.
func etcd(args []string) int {
	if len(args) != 1 {
		fmt.Fprintln(os.Stderr, "usage: cluster etcd DIR")
		return 2
	}
	if err := serve(args[0]); err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		return 1
	}
	return 0
}

func serve(dir string) error {
	any := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel = dir, "warn"
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{any}, []url.URL{any}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{any}, []url.URL{any}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true // the data dies with the test
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	defer e.Close()
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(3 * time.Minute):
		return errors.New("it is not ready")
	case <-stop:
		return nil
	}
	fmt.Println("http://" + e.Clients[0].Addr().String())
	select {
	case err = <-e.Err():
	case <-e.Server.StopNotify():
	case <-stop:
	}
	return err
}
