// Command probe is what the pods of the cluster's tests run, as one static program:
//
//	probe                wait for a signal, and for children that lost their parents: also the pause container
//	probe serve ADDR     answer HTTP requests with what the client was told to be
//	probe get N URL      send N requests, each on a connection of its own, and print how many failed and the last answer
//	probe load URL       the same until standard input ends, fifty a second
//	probe quit URL       have the Envoy with that admin interface end
//	probe watch          fetch the X.509 SVID again and again, and say when that begins to fail or to succeed
//	probe svid FILE ...  fetch the X.509 SVID over the Workload API, say how long it took and which files of certificates in
//	                     PEM hold the authorities of its trust domain, and end
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
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
	case args[0] == "load" && len(args) == 2:
		err = load(args[1])
	case args[0] == "quit" && len(args) == 2:
		err = quit(args[1])
	case args[0] == "watch" && len(args) == 1:
		err = watch()
	case args[0] == "svid":
		err = svid(args[1:])
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

// tally is how requests went.
type tally struct {
	Sent   int    `json:"sent"`
	Failed int    `json:"failed"`
	Last   string `json:"last"` // answer, or of the first that failed
}

var client = &http.Client{Timeout: 90 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

func (c *tally) send(url string) {
	c.Sent++
	resp, err := client.Get(url)
	if err != nil {
		c.Failed, c.Last = c.Failed+1, err.Error()
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if c.Failed == 0 {
		c.Last = fmt.Sprintf("%s: %s", resp.Status, body)
	}
	if err != nil || resp.StatusCode != http.StatusOK {
		c.Failed++
	}
}

func get(times, url string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	var c tally
	for range n {
		c.send(url)
	}
	return json.NewEncoder(os.Stdout).Encode(c)
}

func load(url string) error {
	ended := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(ended) }()
	var c tally
	tick := time.NewTicker(20 * time.Millisecond)
	for {
		select {
		case <-ended:
			return json.NewEncoder(os.Stdout).Encode(c)
		case <-tick.C:
			c.send(url)
		}
	}
}

func quit(admin string) error {
	resp, err := client.Post(admin+"/quitquitquit", "", nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func watch() error {
	go func() { wait(); os.Exit(0) }()
	for was, first := false, true; ; first = false {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		_, err := workloadapi.FetchX509SVID(ctx)
		cancel()
		if ok := err == nil; first || ok != was {
			was = ok
			fmt.Printf("{\"at\": %d, \"ok\": %t}\n", time.Now().UnixMicro(), ok)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// waited returns how long the threads of this process together were ready to run and had no processor, by
// https://docs.kernel.org/scheduler/sched-stats.html; 0 where the kernel does not count it.
func waited() time.Duration {
	files, _ := filepath.Glob("/proc/self/task/*/schedstat")
	var sum time.Duration
	for _, file := range files {
		var ran, waited time.Duration // ns
		if b, err := os.ReadFile(file); err == nil {
			_, _ = fmt.Sscan(string(b), &ran, &waited)
		}
		sum += waited
	}
	return sum
}

// svid says in its log and in the container's message of termination what it got.
func svid(files []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	queued := waited()
	got, err := workloadapi.FetchX509Context(ctx)
	if err != nil {
		return err
	}
	took := time.Now()
	queued = waited() - queued
	// Once more, on a connection of its own: what of that time was the program's own, which had to come from the image.
	if _, err := workloadapi.FetchX509Context(ctx); err != nil {
		return err
	}
	again := time.Since(took)
	own, ok := got.Bundles.Get(got.DefaultSVID().ID.TrustDomain())
	if !ok {
		return errors.New("no bundle of the SVID's trust domain")
	}
	var same []string
	for _, file := range files {
		b, err := x509bundle.Load(own.TrustDomain(), file)
		if err != nil {
			return err
		}
		if b.Equal(own) {
			same = append(same, file)
		}
	}
	report, err := json.Marshal(map[string]any{
		"started": started.UnixMicro(), "svid": took.UnixMicro(), "again": again.Microseconds(), "queued": queued.Microseconds(), "uid": os.Getuid(),
		"id": got.DefaultSVID().ID.String(), "authorities": len(own.X509Authorities()), "files": same,
	})
	if err != nil {
		return err
	}
	fmt.Println(string(report))
	return os.WriteFile("/dev/termination-log", report, 0)
}
