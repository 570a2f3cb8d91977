package issuance

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// A flaw is what is wrong with an upstream's answer: a reason of the table, and a text in which nothing of the answer is.
type flaw struct {
	reason api.Reason
	text   string
}

func (f flaw) Error() string { return f.text }

// refusal makes an *api.Error of what a check found: with the flaw's own reason, else api.UpstreamRefused.
func refusal(err error) error {
	if err == nil {
		return nil
	}
	reason := api.UpstreamRefused
	if f, ok := errors.AsType[flaw](err); ok {
		reason = f.reason
	}
	return api.Wrap(reason, err, err.Error())
}

// distinct drops repeated certificates and bounds the rest: building paths from many is what costs.
func distinct(chain []*x509.Certificate) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, c := range chain {
		switch {
		case c == nil:
			return nil, flaw{api.UpstreamAnswer, "the upstream's chain has a hole"}
		case slices.ContainsFunc(out, c.Equal):
			continue
		case len(out) > maxChain: // one more than a chain may have, for the root
			return nil, flaw{api.UpstreamAnswer, fmt.Sprintf("the upstream's chain has more than %d certificates", maxChain+1)}
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, flaw{api.UpstreamAnswer, "the upstream's chain is empty"}
	}
	return out, nil
}

// climb returns the shortest path from chain[0] to one of the roots along which each certificate is signed by the next:
// by name and signature alone, so that whatever else is wrong with one of them is found by who looks for it. Where there is
// none, the error says where it ended. The roots may be those of a whole record; the chain is bounded by distinct.
func climb(chain, roots []*x509.Certificate) ([]*x509.Certificate, error) {
	roots = slices.DeleteFunc(slices.Clone(roots), func(c *x509.Certificate) bool { return c == nil || isAuthority(c) != nil })
	if slices.ContainsFunc(roots, chain[0].Equal) || signedBy(chain[0], chain[0]) {
		return nil, flaw{api.UpstreamChain, "the upstream's answer is a root, not an intermediate"}
	}
	why := flaw{api.UpstreamChain, "the upstream's chain does not lead to a root of the record"}
	seen := map[*x509.Certificate]bool{chain[0]: true}
	for paths := [][]*x509.Certificate{chain[:1]}; len(paths) > 0; {
		path := paths[0]
		paths = paths[1:]
		c := path[len(path)-1]
		if !strongSignature(c.SignatureAlgorithm) {
			why = flaw{api.UpstreamAlgorithm, fmt.Sprintf("certificate %d of the path is signed with an algorithm that is not accepted", len(path))}
			continue
		}
		for _, root := range roots {
			if signedBy(c, root) {
				return append(slices.Clone(path), root), nil
			}
		}
		for _, next := range chain[1:] {
			switch {
			case seen[next] || !signedBy(c, next):
			case signedBy(next, next):
				why = flaw{api.UpstreamRoot, "the upstream signs under another root than the one that is active"}
			default:
				seen[next] = true
				paths = append(paths, append(slices.Clone(path), next))
			}
		}
	}
	return nil, why
}

// signedBy reports whether parent's key signed c, which names parent as its issuer. What parent may sign is not asked.
func signedBy(c, parent *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, parent.RawSubject) && parent.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
}

// verifyPath has crypto/x509 verify a path that was checked: it must find the very same chain, whatever else it knows of.
func verifyPath(path []*x509.Certificate, at time.Time) error {
	opts := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   at,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	opts.Roots.AddCert(path[len(path)-1])
	for _, c := range path[1 : len(path)-1] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := path[0].Verify(opts); err != nil {
		return flaw{api.UpstreamChain, "the upstream's answer does not verify: " + whyNot(err)}
	}
	return nil
}

// PathTo returns the certificates from chain[0] to root, shortest first, of which each is signed by the next and all are
// valid at that time; nil where there is no such path. The chain has at most nine certificates.
func PathTo(chain []*x509.Certificate, root *x509.Certificate, at time.Time) []*x509.Certificate {
	chain, err := distinct(chain)
	if err != nil {
		return nil
	}
	if chain[0].Equal(root) {
		if at.Before(root.NotBefore) || at.After(root.NotAfter) {
			return nil
		}
		return chain[:1]
	}
	path, err := climb(chain, []*x509.Certificate{root})
	if err != nil || verifyPath(path, at) != nil {
		return nil
	}
	return path
}
