package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// poll is how often a starting Envoy is asked whether it is ready.
const poll = 5 * time.Millisecond

// maxAdminBytes bounds what is read from an admin interface.
const maxAdminBytes = 8 << 20

// Config says how to run one Envoy.
type Config struct {
	Binary string // path of the program; required
	Dir    string // folder for its bootstrap and the address of its admin interface, open to its owner alone; required
	Proxy  Proxy
	Log    io.Writer // see Command.Log
}

// Envoy is a running Envoy.
type Envoy struct {
	*Process
	Started time.Time // when the process was started
	proxy   string    // its name
	admin   string    // host:port
	client  *http.Client
}

// Run writes the bootstrap of c.Proxy, starts an Envoy on it and returns when its admin interface answers. The Envoy may
// then still wait for its certificate: see Live. It ends with ctx only until Run returns; afterwards with Kill or Stop.
func (c Config) Run(ctx context.Context) (*Envoy, error) {
	text, err := Bootstrap(c.Proxy)
	if err != nil {
		return nil, err
	}
	file, admin := filepath.Join(c.Dir, c.Proxy.Name+".yaml"), filepath.Join(c.Dir, c.Proxy.Name+".admin")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, err
	}
	if err := os.Remove(admin); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	e := &Envoy{Started: time.Now(), proxy: c.Proxy.Name, client: &http.Client{Transport: &http.Transport{MaxIdleConns: 1}}}
	// One worker thread is enough for what is shown and tested; hot restart would claim a shared memory segment per host.
	e.Process, err = Start(Command{Name: "envoy " + c.Proxy.Name, Path: c.Binary, Log: c.Log, Args: []string{
		"-c", file, "--admin-address-path", admin, "--disable-hot-restart", "--concurrency", "1", "--log-level", "info",
	}})
	if err != nil {
		return nil, err
	}
	err = e.until(ctx, func() (bool, error) {
		b, err := os.ReadFile(admin)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		if e.admin = strings.TrimSpace(string(b)); err != nil || e.admin == "" {
			return false, err
		}
		_, err = e.get(ctx, "/server_info") // the address is told before anybody answers there
		return err == nil, nil
	})
	if err != nil {
		e.Kill()
		return nil, err
	}
	return e, nil
}

// Find returns the absolute path of an Envoy: wanted, when that is not empty, or else the first of candidates that is a
// program, or else "envoy" of PATH. The error is exec.ErrNotFound (or fs.ErrNotExist for wanted) when there is none.
func Find(wanted string, candidates ...string) (string, error) {
	if wanted != "" {
		path, err := exec.LookPath(wanted)
		if err != nil {
			return "", err
		}
		return filepath.Abs(path)
	}
	for _, c := range candidates {
		if abs, err := filepath.Abs(c); err == nil {
			if path, err := exec.LookPath(abs); err == nil {
				return path, nil
			}
		}
	}
	return exec.LookPath("envoy")
}

var version = regexp.MustCompile(`/(\d+\.\d+\.\d+[^/\s]*)/`)

// Version returns the version of the Envoy at path, such as "1.40.0".
func Version(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", path, err)
	}
	m := version.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s does not say an Envoy's version", path)
	}
	return string(m[1]), nil
}

// Name is the name of the proxy.
func (e *Envoy) Name() string { return e.proxy }

// Live waits until the Envoy serves, with the bootstraps of this package until it has its certificate and trust bundle,
// and returns when it was first seen to.
func (e *Envoy) Live(ctx context.Context) (time.Time, error) {
	err := e.until(ctx, func() (bool, error) {
		b, err := e.get(ctx, "/ready")
		return err == nil && strings.TrimSpace(string(b)) == "LIVE", nil
	})
	return time.Now(), err
}

// Listener returns the address that the listener with this name is bound to.
func (e *Envoy) Listener(ctx context.Context, name string) (netip.AddrPort, error) {
	b, err := e.get(ctx, "/listeners?format=json")
	if err != nil {
		return netip.AddrPort{}, err
	}
	var doc struct {
		Statuses []struct {
			Name  string `json:"name"`
			Local struct {
				Socket struct {
					Address string `json:"address"`
					Port    uint16 `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return netip.AddrPort{}, fmt.Errorf("listeners of %s: %w", e.name, err)
	}
	for _, l := range doc.Statuses {
		if l.Name == name && l.Local.Socket.Port != 0 {
			addr, err := netip.ParseAddr(l.Local.Socket.Address)
			return netip.AddrPortFrom(addr, l.Local.Socket.Port), err
		}
	}
	return netip.AddrPort{}, fmt.Errorf("%s has no listener %q", e.name, name)
}

// Counter returns one of Envoy's statistics by its full name, and 0 for one that is not there (yet).
func (e *Envoy) Counter(ctx context.Context, name string) (uint64, error) {
	q := url.Values{"format": {"json"}, "filter": {"^" + regexp.QuoteMeta(name) + "$"}}
	b, err := e.get(ctx, "/stats?"+q.Encode())
	if err != nil {
		return 0, err
	}
	var doc struct {
		Stats []struct {
			Name  string `json:"name"`
			Value uint64 `json:"value"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return 0, fmt.Errorf("statistics of %s: %w", e.name, err)
	}
	for _, s := range doc.Stats {
		if s.Name == name {
			return s.Value, nil
		}
	}
	return 0, nil
}

// Get returns the body of a page of the admin interface, such as "/certs". A status other than 200 is an error.
func (e *Envoy) Get(ctx context.Context, page string) ([]byte, error) { return e.get(ctx, page) }

func (e *Envoy) get(ctx context.Context, page string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+e.admin+page, nil)
	if err != nil {
		return nil, err
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAdminBytes))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s with status %d", e.name, page, resp.StatusCode)
	}
	return b, err
}

// until asks again and again until ok, an error, the end of ctx or the end of the process.
func (e *Envoy) until(ctx context.Context, ok func() (bool, error)) error {
	t := time.NewTicker(poll)
	defer t.Stop()
	for {
		if good, err := ok(); good || err != nil {
			return err
		}
		select {
		case <-t.C:
		case <-e.Done():
			return fmt.Errorf("%s ended while it started: %w", e.name, errors.Join(e.Err(), errEnded))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", e.name, context.Cause(ctx))
		}
	}
}

var errEnded = errors.New("its log says why")
