package sds

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// The names of secrets that are words. They are those that SPIRE and Istio use, so that configurations carry over.
const (
	NameDefault = "default" // the workload's own certificate and key
	NameRootCA  = "ROOTCA"  // the bundle of its own trust domain
	NameAll     = "ALL"     // the bundles of every trust domain
)

// wildcard is the name that asks for everything one may have.
const wildcard = "*"

// parseName checks the form of a name that a client sent. A name that is a SPIFFE ID or a trust domain's ID is returned
// parsed, a word as the zero ID. Everything else (paths, other schemes, what Istio calls file-cert:) is malformed: such
// a name is never looked up anywhere.
func parseName(name string) (spiffeid.ID, error) {
	if name == "" {
		return spiffeid.ID{}, api.E(api.ResourceName, "the name of a secret is empty")
	}
	if len(name) > api.MaxIDBytes {
		return spiffeid.ID{}, api.E(api.ResourceName, "the name of a secret is longer than %d bytes", api.MaxIDBytes)
	}
	if strings.Contains(name, ":") {
		id, err := spiffeid.FromString(name)
		if err != nil {
			return spiffeid.ID{}, api.Wrap(api.ResourceName, err, "the name of a secret is neither a word nor a SPIFFE ID")
		}
		if len(id.TrustDomain().Name()) > 255 { // SPIFFE-ID section 2.3
			return spiffeid.ID{}, api.E(api.ResourceName, "a trust domain in the name of a secret is longer than 255 bytes")
		}
		return id, nil
	}
	for i, c := range []byte(name) {
		alnum := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alnum && (i == 0 || c != '-' && c != '_' && c != '.') {
			return spiffeid.ID{}, api.E(api.ResourceName, "the name of a secret is neither a word nor a SPIFFE ID")
		}
	}
	return spiffeid.ID{}, nil
}

// parseNames checks and collapses names.
func parseNames(names []string) (subs []subscription, wild bool, err error) {
	seen := make(map[string]bool, min(len(names), MaxNames))
	for _, name := range names {
		if name == wildcard {
			wild = true
			continue
		}
		if seen[name] {
			continue
		}
		if len(subs) == MaxNames {
			return nil, false, errTooMany()
		}
		id, err := parseName(name)
		if err != nil {
			return nil, false, err
		}
		seen[name] = true
		subs = append(subs, subscription{name: name, id: id})
	}
	return subs, wild, nil
}

func errTooMany() error {
	return api.E(api.TooManyResources, "a stream may subscribe to %d names", MaxNames)
}

// wantsTrust reports whether the secret that a well-formed name asks for would be a bundle.
func wantsTrust(name string, id spiffeid.ID) bool {
	return name == NameRootCA || name == NameAll || !id.IsZero() && id.Path() == ""
}

// printable returns s with what is not printable replaced, cut to at most n bytes: for words of a client that end up in
// reports and logs.
func printable(s string, n int) string {
	var b strings.Builder
	for _, r := range s {
		if !strconv.IsPrint(r) || r == utf8.RuneError {
			r = '?'
		}
		if b.Len()+utf8.RuneLen(r) > n {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
