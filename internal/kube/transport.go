package kube

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
)

// maxAnswer bounds the body of an answer, in bytes. A TokenReview quotes the token of at most 16 KiB and adds some names.
const maxAnswer = 256 << 10

// bounded reads an answer whole, up to maxAnswer, before anything looks at it, and lets nothing through but success with
// JSON and an error's status. The bodies of lists and watches it leaves to those who read them piece by piece.
type bounded struct{ next http.RoundTripper }

// streamed marks the context of a request whose body is bounded by its reader.
type streamed struct{}

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if err := checkHead(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	if r.Context().Value(streamed{}) != nil {
		return resp, nil
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("the API server's answer broke off: %w", err)
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("the API server's answer is above %d bytes", maxAnswer)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// checkHead says what is wrong with an answer before its body is looked at.
func checkHead(resp *http.Response) error {
	switch class := resp.StatusCode / 100; {
	case class == 3:
		return errRedirected
	case class != 2 && class != 4 && class != 5:
		return fmt.Errorf("the API server answered with status %d", resp.StatusCode)
	case class == 2:
		if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "application/json" {
			return errors.New("the API server's answer is not JSON by its content type")
		}
	}
	return nil
}

// CloseIdleConnections lets Client.Close through.
func (b bounded) CloseIdleConnections() {
	if c, ok := b.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// WrappedRoundTripper lets client-go find what is within.
func (b bounded) WrappedRoundTripper() http.RoundTripper { return b.next }

var errRedirected = errors.New("the API server redirects, and a token is not carried elsewhere")

// noRedirects is a second lock on what bounded does not let through.
func noRedirects(*http.Request, []*http.Request) error { return errRedirected }
