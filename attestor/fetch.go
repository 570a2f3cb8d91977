package attestor

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
)

// resolve checks the config and fills what its zero values mean.
func (c *KeySourceConfig) resolve() error {
	switch {
	case c.Issuer == "":
		return errors.New("issuer is missing")
	case (c.File == "") == (c.URL == ""):
		return errors.New("exactly one of file and url is needed")
	case (c.Persist == "") != (c.WriteFile == nil):
		return errors.New("persist needs a function to write with")
	case c.Refresh < 0 || c.Timeout < 0 || c.MissWait < 0:
		return errors.New("a duration is negative")
	case c.URL == "" && (c.CAFile != "" || c.TokenFile != ""):
		return errors.New("a ca or token file is for a url")
	case c.Transport != nil && c.CAFile != "":
		return errors.New("a transport brings its own ca")
	}
	if c.URL != "" {
		if err := c.checkURL(); err != nil {
			return err
		}
	}
	c.Refresh = cmp.Or(c.Refresh, time.Minute)
	c.Timeout = cmp.Or(c.Timeout, 10*time.Second)
	c.MissWait = cmp.Or(c.MissWait, time.Second)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func (c *KeySourceConfig) checkURL() error {
	u, err := url.Parse(c.URL)
	switch {
	case err != nil || u.Host == "" || u.Fragment != "":
		return errors.New("url is malformed")
	case u.User != nil:
		return errors.New("url has a user")
	case u.Scheme == "https":
		return nil
	case u.Scheme != "http" || !c.AllowHTTP:
		return errors.New("url is not https")
	case !isLoopback(u.Hostname()):
		return errors.New("an http url is for a loopback address only")
	case c.TokenFile != "":
		return errors.New("a token is not sent over http")
	}
	return nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// source names where the set comes from.
func (c *KeySourceConfig) source() string { return cmp.Or(c.URL, c.File) }

// read reads the set once.
func (s *KeySource) read(ctx context.Context) (*KeySet, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	var data []byte
	var err error
	if s.cfg.File != "" {
		data, err = readFile(s.cfg.File, MaxKeySetBytes+1)
	} else {
		data, err = s.fetch(ctx)
	}
	if err != nil {
		return nil, err
	}
	return ParseKeySet(data)
}

// fetch gets the set from its URL: 200, JSON, and at most one byte more than a set may have.
func (s *KeySource) fetch(ctx context.Context) ([]byte, error) {
	transport, err := s.transport()
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.cfg.URL, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/jwk-set+json, application/json")
	if s.cfg.TokenFile != "" {
		token, err := TokenFile{s.cfg.TokenFile}.Prove(ctx)
		if err != nil {
			return nil, err
		}
		r.Header.Set("Authorization", "Bearer "+string(token.Data))
	}
	client := http.Client{Transport: transport, CheckRedirect: sameOrigin}
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d, not 200", resp.StatusCode)
	}
	kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" && !strings.HasSuffix(kind, "+json") {
		return nil, errors.New("the response is not JSON by its content type")
	}
	return io.ReadAll(io.LimitReader(resp.Body, MaxKeySetBytes+1))
}

// sameOrigin lets a server move a set about, but not send us elsewhere: not to another host, not from https to http.
func sameOrigin(r *http.Request, via []*http.Request) error {
	first := via[0].URL
	switch {
	case len(via) > 3:
		return errors.New("too many redirects")
	case r.URL.Scheme != first.Scheme || !strings.EqualFold(r.URL.Host, first.Host):
		return errors.New("redirected to another origin")
	}
	return nil
}

// transport is made anew for each read, so that a CA file that was replaced is heeded at once. A set is read once a minute:
// a connection kept in between would only be one more that can be stale.
func (s *KeySource) transport() (http.RoundTripper, error) {
	if s.cfg.Transport != nil {
		return s.cfg.Transport, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.cfg.CAFile != "" {
		pem, err := readFile(s.cfg.CAFile, MaxKeySetBytes)
		if err != nil {
			return nil, err
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("the ca file holds no certificate")
		}
	}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		TLSClientConfig:        conf,
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: 64 << 10,
	}, nil
}

// persisted is what the Persist file holds. Issuer and source are part of it: keys that were believed for one are not
// believed for another because a config was changed.
type persisted struct {
	Issuer string          `json:"issuer"`
	Source string          `json:"source"`
	JWKS   json.RawMessage `json:"jwks"`
}

// load takes the last good set of an earlier process. Whatever is wrong with it is no error: the set is read anyway.
func (s *KeySource) load() {
	set, err := s.readPersisted()
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		s.log.Warn("kept key set is not used", "error", err)
		return
	}
	s.set, s.status.Keys = set, set.Len()
}

func (s *KeySource) readPersisted() (*KeySet, error) {
	data, err := readFile(s.cfg.Persist, MaxKeySetBytes+64<<10)
	if err != nil {
		return nil, err
	}
	var p persisted
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, err
	}
	if p.Issuer != s.cfg.Issuer || p.Source != s.cfg.source() {
		return nil, errors.New("it is of another issuer or place")
	}
	return ParseKeySet(p.JWKS)
}

// save keeps the set for the next process. This process does not depend on it, so a failure is logged and tried again.
func (s *KeySource) save(set *KeySet) error {
	data, err := json.Marshal(persisted{s.cfg.Issuer, s.cfg.source(), set.JWKS()})
	if err == nil {
		err = s.cfg.WriteFile(s.cfg.Persist, data)
	}
	if err != nil {
		s.log.Error("key set cannot be kept", "error", err)
	}
	return err
}

// errNoKeys is the refusal while an issuer's key set was never read.
func errNoKeys(cause error) error {
	return &api.Error{
		Reason: api.KeysUnavailable, Detail: "the issuer's key set was never read",
		RetryAfter: time.Second, Err: cause,
	}
}
