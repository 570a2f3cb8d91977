package issuance

import (
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// Verify reports whether a chain, leaf first, is an X.509-SVID for id at that time under a trust domain's roots: RFC 5280
// path validation, and every rule of X509-SVID section 5.2 and of the sections it refers to. Our own stricter rules are
// not applied, so SVIDs of others pass too. Roots that are not authorities are no roots. The error is api.SVIDRejected;
// its text is free of names.
func Verify(chain, roots []*x509.Certificate, id spiffeid.ID, now time.Time) error {
	if len(chain) == 0 || len(chain) > maxChain+1 || slices.Contains(chain, nil) {
		return api.E(api.SVIDRejected, "a chain has 1 to %d certificates", maxChain+1)
	}
	leaf := chain[0]
	look := lookAt(leaf)
	if err := apply(leafLints, look, false); err != nil {
		return api.E(api.SVIDRejected, "%s", api.AsError(err).Detail)
	}
	if got, err := look.names.workloadID(); err != nil || id.IsZero() || got != id {
		return api.E(api.SVIDRejected, "the SVID is for another identity")
	}
	opts := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range roots {
		if c != nil && isAuthority(c) == nil {
			opts.Roots.AddCert(c)
		}
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	paths, err := leaf.Verify(opts)
	if err != nil {
		return api.Wrap(api.SVIDRejected, err, whyNot(err))
	}
	for _, path := range paths {
		if mayIssue(path[1:]) {
			return nil
		}
	}
	return api.E(api.SVIDRejected, "an authority on the way to the root may not issue it")
}

// mayIssue reports whether the authorities of a verified path are all allowed to be there: to sign certificates
// (X509-SVID section 4.3; crypto/x509 takes a missing key usage for any), and of both extended usages if of any.
func mayIssue(authorities []*x509.Certificate) bool {
	for _, c := range authorities {
		if signsCertificates(c) != nil || !bothUsagesBelow(c) {
			return false
		}
	}
	return len(authorities) > 0
}

// bothUsagesBelow reports whether an authority may issue certificates for servers and for clients.
func bothUsagesBelow(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 ||
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) || bothExtendedUsages(c) == nil
}

// whyNot tells the common failures of path validation apart. The texts of crypto/x509 have names in them.
func whyNot(err error) string {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		switch invalid.Reason {
		case x509.Expired:
			return "a certificate of the chain has expired or is not valid yet"
		case x509.CANotAuthorizedForThisName:
			return "the names of the SVID are outside of what an authority above may sign"
		case x509.TooManyIntermediates:
			return "the chain is longer than an authority in it allows"
		}
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "the chain does not lead to a root of the trust bundle"
	}
	return "the chain does not verify"
}
