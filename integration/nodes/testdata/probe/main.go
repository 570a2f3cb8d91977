// Command probe is what the pods of the cluster's tests run, as one static program:
//
//	probe                wait for a signal, and for children that lost their parents: also the pause container
//	probe serve ADDR     answer HTTP requests with what the client was told to be
//	probe get N URL      send N requests, each on a connection of its own, and print how many failed and the last answer
//	probe svid           fetch the X.509 SVID over the Workload API, say how long it took, and end
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

var started = time.Now()

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 0:
		wait()
	case args[0] == "serve" && len(args) == 2:
		err = serve(args[1])
	case args[0] == "get" && len(args) == 3:
		err = get(args[1], args[2])
	case args[0] == "svid" && len(args) == 1:
		err = svid()
	default:
		err = fmt.Errorf("unknown arguments %q", args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func wait() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

func serve(address string) error {
	go func() { wait(); os.Exit(0) }()
	server := &http.Server{Addr: address, ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "client: %s\n", r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	return server.ListenAndServe()
}

func get(times, url string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	failed, last := 0, ""
	for range n {
		resp, err := client.Get(url)
		if err != nil {
			failed, last = failed+1, err.Error()
			continue
		}
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			failed++
		}
		last = fmt.Sprintf("%s: %s", resp.Status, body)
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"failed": failed, "last": last})
}

// svid says in its log and in the container's message of termination what it got.
func svid() error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	got, err := workloadapi.FetchX509Context(ctx)
	if err != nil {
		return err
	}
	report, err := json.Marshal(map[string]any{
		"started": started.UnixMicro(), "svid": time.Now().UnixMicro(), "uid": os.Getuid(),
		"id": got.DefaultSVID().ID.String(), "authorities": len(got.Bundles.Bundles()),
	})
	if err != nil {
		return err
	}
	fmt.Println(string(report))
	return os.WriteFile("/dev/termination-log", report, 0)
}
