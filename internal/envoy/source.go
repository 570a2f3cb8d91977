package envoy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Source holds the SVID and the trust bundles that a Client receives, for go-spiffe's TLS configurations: a handshake
// takes what is the newest at that moment. It is safe for concurrent use. Make it with NewSource.
type Source struct {
	client *Client

	mu      sync.Mutex
	svid    *x509svid.SVID
	bundles *x509bundle.Set
	updates int           // SVIDs received
	ready   chan struct{} // closed when both are there
	last    error         // why the newest stream ended
}

// NewSource returns a Source that is filled by Follow.
func NewSource(c *Client) *Source {
	return &Source{client: c, bundles: x509bundle.NewSet(), ready: make(chan struct{})}
}

// Follow keeps the Source fresh until ctx ends: a stream that ends is opened anew, with a fresh token.
func (s *Source) Follow(ctx context.Context) error {
	for wait := 20 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, time.Second) {
		opened := time.Now()
		err := s.client.Watch(ctx, []string{"default", "ROOTCA"}, s.apply)
		s.mu.Lock()
		s.last = err
		s.mu.Unlock()
		if time.Since(opened) > time.Second {
			wait = 20 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// Ready waits until the Source holds an SVID and a bundle. When ctx ends first, the error says why the last stream ended.
func (s *Source) Ready(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		return errors.Join(context.Cause(ctx), s.last)
	}
}

// GetX509SVID returns the newest SVID. It implements x509svid.Source.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.svid == nil {
		return nil, errors.New("no SVID has come yet")
	}
	return s.svid, nil
}

// GetX509BundleForTrustDomain returns the newest bundle of td. It implements x509bundle.Source.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundles.GetX509BundleForTrustDomain(td)
}

// Updates returns how many SVIDs have come.
func (s *Source) Updates() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.updates
}

func (s *Source) apply(secret *tlsv3.Secret) error {
	svid, bundles, err := ParseSecret(secret)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	had := s.svid != nil && s.bundles.Len() > 0
	if svid != nil {
		s.svid = svid
		s.updates++
	}
	if bundles != nil {
		s.bundles = bundles
	}
	if !had && s.svid != nil && s.bundles.Len() > 0 {
		close(s.ready)
	}
	return nil
}

// ParseSecret returns the SVID or the bundles of an SDS secret; exactly one of them is not nil.
func ParseSecret(secret *tlsv3.Secret) (*x509svid.SVID, *x509bundle.Set, error) {
	if c := secret.GetTlsCertificate(); c != nil {
		svid, err := x509svid.Parse(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		return svid, nil, err
	}
	validator := secret.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig()
	if validator == nil {
		return nil, nil, fmt.Errorf("secret %q is neither a certificate nor a SPIFFE trust bundle", secret.GetName())
	}
	var config tlsv3.SPIFFECertValidatorConfig
	if err := validator.UnmarshalTo(&config); err != nil {
		return nil, nil, fmt.Errorf("secret %q: %w", secret.GetName(), err)
	}
	set := x509bundle.NewSet()
	for _, d := range config.GetTrustDomains() {
		td, err := spiffeid.TrustDomainFromString(d.GetName())
		if err != nil {
			return nil, nil, fmt.Errorf("secret %q: %w", secret.GetName(), err)
		}
		bundle, err := x509bundle.Parse(td, d.GetTrustBundle().GetInlineBytes())
		if err != nil {
			return nil, nil, fmt.Errorf("secret %q: %w", secret.GetName(), err)
		}
		set.Add(bundle)
	}
	if set.Len() == 0 {
		return nil, nil, fmt.Errorf("secret %q holds no trust domain", secret.GetName())
	}
	return nil, set, nil
}
