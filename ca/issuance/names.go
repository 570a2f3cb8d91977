package issuance

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxTrustDomainBytes is the longest name of a trust domain (SPIFFE-ID section 2.3).
const maxTrustDomainBytes = 255

// checkTrustDomain refuses names of trust domains for which no certificate can be written that others read: too long, or
// with an empty label (".a", "a..b", "a."), which SPIFFE-ID allows and crypto/x509 refuses to parse in a URI.
func checkTrustDomain(td spiffeid.TrustDomain) error {
	switch name := td.Name(); {
	case name == "":
		return errors.New("there is no trust domain")
	case len(name) > maxTrustDomainBytes:
		return fmt.Errorf("the trust domain is longer than %d bytes", maxTrustDomainBytes)
	case strings.HasPrefix(name, "."), strings.HasSuffix(name, "."), strings.Contains(name, ".."):
		return errors.New("the trust domain has an empty label, which crypto/x509 does not read")
	}
	return nil
}

// maxDNSNames is how many DNS names stand in one leaf at most.
const maxDNSNames = 32

// checkDNSNames wants names that a TLS client may be compared with (RFC 9525 section 6.3): lower-case letters, digits and
// hyphens in labels of 1 to 63 bytes, 253 in all, a "*" only as the whole of the first of at least three labels. Nothing
// that may be read as an IP address, none twice.
func checkDNSNames(names []string) error {
	if len(names) == 0 {
		return nil
	}
	if len(names) > maxDNSNames {
		return fmt.Errorf("there are more than %d DNS names", maxDNSNames)
	}
	seen := make(map[string]bool, len(names))
	for _, name := range names {
		if seen[name] {
			return errors.New("a DNS name is there twice")
		}
		seen[name] = true
		if !isDNSName(name) {
			return errors.New("a DNS name is malformed")
		}
	}
	return nil
}

func isDNSName(name string) bool {
	if _, err := netip.ParseAddr(name); err == nil || len(name) > 253 {
		return false
	}
	if rest, ok := strings.CutPrefix(name, "*."); ok {
		if !strings.Contains(rest, ".") {
			return false
		}
		name = rest
	}
	digits := false // the last label is a number, as of an IPv4 address in one of its many forms
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if c := label[i]; !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-') {
				return false
			}
		}
		digits = strings.Trim(label, "0123456789") == ""
	}
	return !digits
}
